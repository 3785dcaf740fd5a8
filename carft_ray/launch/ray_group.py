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
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
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
from carft_ray.learning.context import RunContext
from carft_ray.recipe.schema import Recipe
from carft_ray.study.outcome import TrialSpec, must_leave

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
        self._offset = self._number = self._begun = self._ended = 0
        self._nodes: list[str] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def fits(self, runtime: Runtime, avoid: Sequence[str]) -> bool:
        """Tells whether it is there for a training of this runtime, and on none of the nodes that are left out."""
        same = runtime.capacity == self._runtime.capacity
        return self._is_alive() and same and not set(avoid) & set(self._nodes)

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
        if is_first := self._thread is None:
            with files.writing(self._folder):
                self._folder.mkdir(parents=True)
                (self._folder / TOLD).touch()
        self._number += 1
        order = {"number": self._number, "spec": asdict(spec), "folder": str(folder)}
        files.append_line(self._folder / ORDERS, json.dumps(order))
        if is_first:
            self._thread = threading.Thread(target=self._fit, args=(f"{spec.name}-{spec.attempt}",), daemon=True)
            self._thread.start()
        while self._ended < self._number and self._is_alive():
            self._listen()
        self._listen()
        if self._ended < self._number and (is_first or self._begun == self._number):
            raise self._error or RuntimeError("its workers ended without a message")
        return self._ended == self._number

    def close(self) -> None:
        """Asks the workers to end and waits until they have."""
        if self._is_alive():
            # without it they end, too: as soon as the files are gone, or when nothing comes for long
            with contextlib.suppress(StorageError):
                files.append_line(self._folder / ORDERS, json.dumps({"number": 0}))
            self._join()

    def _is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self, timeout_s: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _listen(self) -> None:
        """Waits a moment, or until the group has ended, and reads what was told."""
        self._join(LOOK_EVERY_S)
        rows, self._offset = _new_rows(self._folder / TOLD, self._offset)
        for row in rows:
            self._nodes, self._begun = row.get("nodes", self._nodes), row.get("begun", self._begun)
            if row.get("last"):  # its resources are free before the next training is given
                self._join()
            self._ended = row.get("ended", self._ended)

    def _fit(self, name: str) -> None:
        try:
            _trainer(self._runtime, self._folder, name, self._avoid).fit()
        except BaseException as error:  # raised by ``run``
            self._error = error


def _trainer(runtime: Runtime, folder: Path, name: str, avoid: Sequence[str]) -> Any:
    """Returns the ``TorchTrainer`` of a group. Nothing is restarted inside."""
    for key, value in ENVIRONMENT.items():  # a job that was there before the search has an environment of its own
        os.environ.setdefault(key, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = runtime.capacity.gpus_per_worker > 0
    can_select = "label_selector" in {each.name for each in fields(ScalingConfig)}  # older releases of Ray cannot
    counts_apart = "max_preemption_failures" in {each.name for each in fields(FailureConfig)}  # and do not
    selector: Row = {"label_selector": anywhere_but(avoid)} if avoid and can_select else {}
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
            name=name,  # of its own: Ray Train would resume a run by its name
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
    from carft_ray.learning.ranks import from_rank_0, gather

    runtime, folder = config["runtime"], config["folder"]
    place = ray.train.get_context()
    context = RunContext(place.get_world_rank(), place.get_world_size())
    nodes, orders = gather(context, ray.get_runtime_context().get_node_id()), _Orders(runtime, folder)
    if context.rank == 0:
        files.append_line(folder / TOLD, json.dumps({"nodes": nodes}))
    while order := from_rank_0(context, orders.take):
        spec, out_dir = TrialSpec(**order["spec"]), Path(order["folder"])
        should_stop = stop_reader(runtime.study_dir, out_dir, spec.attempt)
        if not run_worker(runtime, spec, out_dir, replace(context, should_stop=should_stop), order["idle_s"]):
            raise RuntimeError(f"{spec.name} failed, see its folder")
        gather(context, None)  # no rank has failed
        if from_rank_0(context, orders.ended):
            return


class _Orders:
    """The files of a group as rank 0 reads and writes them."""

    def __init__(self, runtime: Runtime, folder: Path) -> None:
        self._stop, self._folder = runtime.study_dir / STOP, folder
        self._offset, self._free_since = 0, time.monotonic()
        self._order: Row = {}  # the last one

    def take(self) -> Row | None:
        """Waits for the next training; None at the end of the group. ``idle_s``: how long its workers had none."""
        limit = self._free_since + IDLE_S
        is_first = not self._order
        while is_first or (time.monotonic() < limit and not files.seen(self._stop)):
            try:
                rows, self._offset = _new_rows(self._folder / ORDERS, self._offset)
            except FileNotFoundError:  # another search has begun in this study
                return None
            if rows:
                self._order = rows[0]
                if not self._order["number"]:
                    return None
                files.append_line(self._folder / TOLD, json.dumps({"begun": self._order["number"]}))
                return {**self._order, "idle_s": 0.0 if is_first else time.monotonic() - self._free_since}
            time.sleep(LOOK_EVERY_S)
        return None

    def ended(self) -> bool:
        """Tells that the training which was taken last has ended well; returns whether the group ends with it."""
        self._free_since = time.monotonic()
        out_dir, attempt = Path(self._order["folder"]), self._order["spec"]["attempt"]
        is_last = files.seen(self._stop) or must_leave(out_dir, attempt)
        files.append_line(self._folder / TOLD, json.dumps({"ended": self._order["number"], "last": is_last}))
        return is_last


def _new_rows(path: Path, offset: int) -> tuple[list[Row], int]:
    """Returns the rows after an offset, and the next offset; none where the disk does not answer."""
    content = b""
    with files.passing_faults(), open(path, "rb") as file:
        file.seek(offset)
        content = file.read()
    end = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:end].splitlines()], offset + end
