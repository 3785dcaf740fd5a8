"""A real training whose workers kill themselves at planned moments; workers import it by name.

``base/strikes/t0000`` holds a file for each kill of that trial, ``01.json``, ``02.json``: the worker of ``rank`` dies
at the ``calls``-th call of ``place`` in its attempt, or ``delay_s`` later. Baselines are left in peace. The first file
that is left holds, from the attempt of its number on: what outlives a kill in the same attempt dies of that kill alone.
A file is renamed before its kill, so that no kill comes twice.
"""

import contextlib
import json
import os
import pkgutil
import signal
import threading
from collections import Counter
from unittest import mock

import stand_in

from carft_ray.launch.workers import worker

prepare = worker.prepare
PLACES = {
    "all_reduce": "torch.distributed.all_reduce",  # the means of a window
    "broadcast": "torch.distributed.broadcast_object_list",  # rank 1 waits in it for what rank 0 has found
    "checkpoint": "carft_ray.training.checkpoint.save_tensors",  # rank 0 alone; twice for each
}


def train(recipe, out_dir, prepared_dir, context, attempt):
    calls, state = Counter(), {"evaluated": "curve"}

    def at(place):
        calls[place] += 1
        planned = stand_in.scripts(prepared_dir) / "strikes" / out_dir.name[:5]
        path = min(planned.glob("*.json"), default=None)
        if path is None or int(path.stem) > attempt:
            return
        try:
            strike = json.loads(path.read_text())
        except FileNotFoundError:  # the other rank has just been struck by it
            return
        if (strike["rank"], strike["place"], strike["calls"]) == (context.rank, place, calls[place]):
            path.rename(path.with_suffix(".done"))
            end = threading.Timer(strike["delay_s"], os.kill, (os.getpid(), signal.SIGKILL))
            end.run() if strike["delay_s"] == 0 else end.start()

    def hook(model, *given):
        parameters = [each for each in model.parameters() if each.requires_grad]
        parameters[len(parameters) // 2].register_hook(lambda gradient: at("backward"))

    def called(target, before=lambda *given: None, after=lambda *given: None):
        real = pkgutil.resolve_name(target)

        def call(*args, **kwargs):
            before(*args)
            result = real(*args, **kwargs)
            after(*args)
            return result

        return mock.patch(target, call)

    with contextlib.ExitStack() as patches:
        for place, target in PLACES.items():
            patches.enter_context(called(target, lambda *given, place=place: at(place)))
        patches.enter_context(called("carft_ray.training.run.predict_all", lambda *given: at(state["evaluated"])))
        during = (lambda *given, now=now: state.update(evaluated=now) for now in ("evaluation", "curve"))
        patches.enter_context(called("carft_ray.training.run.fine_tune", *during))
        patches.enter_context(called("torch.nn.parallel.DistributedDataParallel.__init__", after=hook))
        return worker.train(recipe, out_dir, prepared_dir, context, attempt)
