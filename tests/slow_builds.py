"""The real preparation and training, with builds of the cache that take long; workers import it by name.

Each build and each wait for one appends a line to ``builds.jsonl`` beside the study: what (``begins``, ``ends``,
``waits``), which cache, which process, when, and how many trials had a folder then.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import stand_in

from carft_ray.data import cached_sets
from carft_ray.launch.workers import worker
from carft_ray.layout import STOP
from carft_ray.training import run, shared_inputs  # noqa: F401  (with torch: nothing is imported within a trial)

SECONDS = 24.0  # of a build
FILL_S = 12.0  # of one before the first trial: each node tells of it after three seconds, the driver of both
HANG_TIMEOUT_S = 20.0  # so that only a build takes as long, however busy the machine is
CLASSES = ("circle", "square")
NUM_TRAIN = 60


def note(base_dir, what):
    trials = len(list((base_dir / "study" / "trials").glob("*")))
    cache = Path(os.environ["XDG_CACHE_HOME"]).name
    line = {"what": what, "cache": cache, "pid": os.getpid(), "at": time.time(), "trials": trials}
    with open(base_dir / "builds.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def notes(base_dir):
    return [json.loads(line) for line in (base_dir / "builds.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def slow(base_dir, seconds=SECONDS, at_once=1, waiting_ones=0):
    """Within the block, packing a training set is slow, and goes on when so many builds have begun.

    With ``waiting_ones`` it goes on when another process waits for it, or after a minute.
    """
    build, kept = cached_sets._build, cached_sets._kept

    def slow_build(source, kind, made, on_image, path):
        if kind != cached_sets.PACKED:
            return build(source, kind, made, on_image, path)

        def on_slow_image(done, total):
            time.sleep(seconds / total)
            if on_image is not None:
                on_image(done, total)

        note(base_dir, "begins")
        while sum(line["what"] == "begins" for line in notes(base_dir)) < at_once:
            time.sleep(0.1)
        deadline = time.monotonic() + 60
        while sum(line["what"] == "waits" for line in notes(base_dir)) < waiting_ones and time.monotonic() < deadline:
            on_slow_image(0, 1000)
        build(source, kind, made, on_slow_image, path)
        return note(base_dir, "ends")

    def noted_kept(source, kind, makes, made, view, keeping):
        def noted_image(done, total):
            if kind == cached_sets.PACKED and (done, total) == (0, len(source)):  # another process builds
                note(base_dir, "waits")
            keeping.on_image(done, total)

        return kept(source, kind, makes, made, view, replace(keeping, on_image=keeping.on_image and noted_image))

    with mock.patch.object(cached_sets, "_build", slow_build), mock.patch.object(cached_sets, "_kept", noted_kept):
        yield


def fill(recipe, prepared_dir, say):
    with slow(prepared_dir.parent.parent, FILL_S, at_once=2):
        return worker.fill(recipe, prepared_dir, say)


def fill_or_die(recipe, prepared_dir, say):
    """Kills the second node, Ray's own process, before its cache is filled."""
    if Path(os.environ["XDG_CACHE_HOME"]).name == "two":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)  # this process does not notice before the cluster's end, as Ray does not of a lost machine
    return worker.fill(recipe, prepared_dir, say)


def fill_and_ask_to_stop(recipe, prepared_dir, say):
    """Asks for a stop of the search as another process does, in the middle of a long build."""
    (prepared_dir.parent / STOP).touch()
    time.sleep(1000)


def prepare_or_die(recipe, prepared_dir, say, made_of):
    """The first time its process dies."""
    try:
        (prepared_dir.parent.parent / "died").touch(exist_ok=False)
    except FileExistsError:
        return stand_in.prepare(recipe, prepared_dir, say)
    return os.kill(os.getpid(), signal.SIGKILL)


def prepare_for_ever(recipe, folder, say, made_of=None):
    """Asks for a stop of the search, and continues; leaves the number of its process beside the study."""
    (folder.parent.parent / "pid").write_text(str(os.getpid()))
    (folder.parent / STOP).touch()
    time.sleep(1000)


def prepare(recipe, folder, say, made_of):
    with slow(folder.parent.parent):
        return worker.prepare(recipe, folder, say, made_of)


def prepare_and_empty(recipe, folder, say, made_of):
    """Leaves trials an empty cache, as that of a node that has come later."""
    prepared = worker.prepare(recipe, folder, say, made_of)
    shared_inputs._loaded.clear()
    shutil.rmtree(folder.parent.parent / "cache")
    return prepared


def train(recipe, out_dir, prepared_dir, *arguments):
    with slow(prepared_dir.parent.parent, waiting_ones=1):
        return worker.train(recipe, out_dir, prepared_dir, *arguments)
