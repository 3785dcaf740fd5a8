"""A Ray Train group of workers that runs one training after the other.

A group takes seconds to start, so whoever has started one gives it the next training, too: process group, model, data
and compiled code are kept. Both talk through two files, opened anew for each look, so that a network file system shows
what is new: ``orders.jsonl`` has a line per training, ``told.jsonl`` says what has become of them.

A group ends with a worker that dies or raises (so does the attempt; the study gives the training another one), after a
training that was asked to leave, when the search stops, after 30 seconds without a training, and when it is closed.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.launch.ray_cluster.cluster import ENVIRONMENT
from carft_ray.launch.ray_cluster.ray_private import lean
from carft_ray.launch.runtime import Runtime, stop_reader
from carft_ray.launch.worker import run_worker
from carft_ray.layout import RAY_FILES, STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.outcome import TrialSpec, must_leave
from carft_ray.training.run_context import RunContext

NODE_LABEL = "ray.io/node-id"  # that Ray gives every node
IDLE_S = 30.0
PATIENCE, SHORTEST_TIMEOUT_S = 8, 1800  # 8 hours by default; the default of torch
LOOK_EVERY_S = 0.05
ORDERS, TOLD = "orders.jsonl", "told.jsonl"
Row = dict[str, Any]


def anywhere_but(nodes: Sequence[str]) -> dict[str, str]:
    """Returns Ray's label selector for all nodes but these."""
    return {NODE_LABEL: f"!in({','.join(nodes)})"}


class WorkerGroup:
    """Workers, started by the first training that is run."""

    def __init__(self, runtime: Runtime, avoid: Sequence[str] = ()) -> None:
        """Starts nothing yet.

        Args:
            runtime: How and where trainings run; its capacity gives the number of workers.
            avoid: Ray's names of nodes that are left out.
        """
        self._runtime, self._avoid = runtime, tuple(avoid)
        self._folder = runtime.study_dir / RAY_FILES / "groups" / uuid.uuid4().hex
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._number = self._offset = 0
        self._told: Row = {"nodes": [], "begun": 0, "ended": 0, "last": False}
        self._error: BaseException | None = None

    def fits(self, runtime: Runtime, avoid: Sequence[str]) -> bool:
        """Tells whether it is there for a training of this runtime, and on none of the nodes that are left out."""
        same = runtime.capacity == self._runtime.capacity
        return self._thread.is_alive() and same and not set(avoid) & set(self._told["nodes"])

    def run(self, spec: TrialSpec, folder: Path) -> bool:
        """Runs one attempt and waits for it; how it ended lies in its folder.

        Args:
            spec: The attempt.
            folder: Of the training.

        Returns:
            Whether the group took it; False where it had ended since the training before.

        Raises:
            BaseException: What ended the group within the attempt, or before its first, as Ray Train raised it.
        """
        self._number += 1
        is_first = self._number == 1
        if is_first:
            with files.writing(self._folder):
                self._folder.mkdir(parents=True)
        order = {"number": self._number, "spec": asdict(spec), "folder": str(folder)}
        files.append_line(self._folder / ORDERS, json.dumps(order))
        if is_first:
            self._thread.start()
        while self._thread.is_alive() and self._told["ended"] < self._number:
            self._thread.join(LOOK_EVERY_S)
            self._listen()
        self._listen()
        if self._told["last"]:  # its resources are free before the next training is given
            self._thread.join()
        if self._told["ended"] < self._number and (is_first or self._told["begun"] == self._number):
            raise self._error or RuntimeError("its workers ended without a message")
        return bool(self._told["ended"] == self._number)

    def close(self) -> None:
        """Asks the workers to end and waits until they have."""
        if self._thread.is_alive():
            # without it they end, too, when nothing comes for long
            with contextlib.suppress(StorageError):
                files.append_line(self._folder / ORDERS, json.dumps({"number": 0}))
            self._thread.join()

    def _listen(self) -> None:
        rows, self._offset = _new_rows(self._folder / TOLD, self._offset)
        for row in rows:
            self._told |= row

    def _fit(self) -> None:
        try:
            _trainer(self._runtime, self._folder, self._avoid).fit()
        except BaseException as error:  # raised by ``run``
            self._error = error


def _trainer(runtime: Runtime, folder: Path, avoid: Sequence[str]) -> Any:
    """Returns the ``TorchTrainer`` of a group. Nothing is restarted inside."""
    for key, value in ENVIRONMENT.items():  # a job that was there before the search has an environment of its own
        os.environ.setdefault(key, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = runtime.capacity.gpus_per_worker > 0
    counts_apart = "max_preemption_failures" in {each.name for each in fields(FailureConfig)}  # Ray 2.55 does not
    selector: Row = {"label_selector": anywhere_but(avoid)} if avoid else {}
    failures: Row = {"max_failures": 0, "controller_failure_limit": 1}
    failures |= {"max_preemption_failures": 0} if counts_apart else {}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"runtime": runtime, "folder": folder},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=collective_timeout_s(runtime.recipe)),
        scaling_config=ScalingConfig(
            num_workers=runtime.capacity.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=runtime.capacity.worker_resources,
            placement_strategy="STRICT_PACK" if runtime.capacity.one_node else "PACK",
            **selector,
        ),
        run_config=RunConfig(
            name=folder.name,  # of its own: Ray Train would resume a run by its name
            storage_path=str(runtime.study_dir / RAY_FILES / "train"),
            failure_config=FailureConfig(**failures),
        ),
    )
    return lean(trainer)


def collective_timeout_s(recipe: Recipe) -> int:
    """Returns after how many seconds a rank gives up its wait for the others.

    Many times ``resources.hang_timeout_s``: ranks wait for one that builds a set into the cache of its node, which
    takes hours and gives signs of life. A hang without such signs is the driver's to end, sooner and with its stacks.
    Ray's own detector (RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR, experimental in 2.60) is left off: it looks at collectives
    alone, so that this wait is a hang to it.
    """
    return max(SHORTEST_TIMEOUT_S, int(PATIENCE * (recipe.resources.hang_timeout_s or 3600)))


def _worker(config: Row) -> None:
    """One worker of a group. A failure is raised again, so that Ray ends the others, who may wait for this one."""
    from carft_ray.training.ranks import from_rank_0, gather

    runtime, place = config["runtime"], ray.train.get_context()
    context = RunContext(place.get_world_rank(), place.get_world_size())
    orders = _orders(runtime, config["folder"], gather(context, ray.get_runtime_context().get_node_id()))
    while order := from_rank_0(context, partial(next, orders, None)):
        spec, out_dir = TrialSpec(**order["spec"]), Path(order["folder"])
        should_stop = stop_reader(runtime.study_dir, out_dir, spec.attempt)
        if not run_worker(runtime, spec, out_dir, replace(context, should_stop=should_stop)):
            raise RuntimeError(f"{spec.name} failed, see its folder")
        gather(context, None)  # no rank has failed


def _orders(runtime: Runtime, folder: Path, nodes: Sequence[str]) -> Iterator[Row]:
    """Yields the trainings that a group is given, each once the one before has ended well; read and told by rank 0.

    Args:
        runtime: Of the group.
        folder: Of its files.
        nodes: Ray's names of the nodes of its workers.

    Yields:
        What ``WorkerGroup.run`` has written.
    """
    stop, offset, free_since = runtime.study_dir / STOP, 0, time.monotonic()
    while True:
        rows, offset = _new_rows(folder / ORDERS, offset)
        if not rows:
            if time.monotonic() >= free_since + IDLE_S or files.seen(stop):
                return
            time.sleep(LOOK_EVERY_S)
            continue
        order = rows[-1]
        if not order["number"]:
            return
        number = order["number"]
        files.append_line(folder / TOLD, json.dumps({"begun": number, "nodes": nodes}))
        yield order
        free_since = time.monotonic()
        is_last = files.seen(stop) or must_leave(Path(order["folder"]), order["spec"]["attempt"])
        files.append_line(folder / TOLD, json.dumps({"ended": number, "last": is_last}))
        if is_last:
            return


def _new_rows(path: Path, offset: int) -> tuple[list[Row], int]:
    """Returns the rows after an offset, and the next offset; none where the file is missing or its disk is silent."""
    content = b""
    with contextlib.suppress(FileNotFoundError), files.passing_faults(), open(path, "rb") as file:
        file.seek(offset)
        content = file.read()
    end = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:end].splitlines()], offset + end
