"""A Ray Train group of workers that runs one training after the other.

A group takes seconds to start, so whoever has started one gives it the next training, too: process group, model, data
and compiled code are kept. Both talk through the mailbox, and say again what holds with each look: the one "do this,
your Nth training", rank 0 of the group "I have ended N".

A group ends with a worker that dies or raises (so does the attempt; the study gives the training another one), after a
training that was told to stop or leave, after 30 seconds without a training, and when it is closed.
"""

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import ray
from ray import tune

from carft_ray.launch.cluster import ray_errors
from carft_ray.launch.cluster.cluster import ENVIRONMENT
from carft_ray.launch.cluster.ray_private import lean
from carft_ray.launch.workers.mailbox import Box
from carft_ray.launch.workers.runtime import Runtime
from carft_ray.launch.workers.worker import run_worker
from carft_ray.study.training import Failure, TrialSpec
from carft_ray.training.run_context import RunContext

NODE_LABEL = "ray.io/node-id"  # that Ray gives every node
IDLE_S = 30.0
# after which a rank gives up its wait for the others: one may build a set into the cache of its node for hours. A hang
# without signs of life is the driver's to end, sooner and with its stacks. Ray's own detector
# (RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR, experimental in 2.60) sees collectives alone, and takes this wait for a hang
COLLECTIVE_TIMEOUT_S = 8 * 3600
LOOK_EVERY_S = 0.5  # for the end of a training: 200 groups have one mailbox
ASK_EVERY_S = 0.05  # for the next training
END = "end"  # in place of work
CLOSE_S = 60.0  # a group that does not end is left to Ray, which ends it with the process that has started it
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The training that a group is given as its ``number``th, from 1."""

    number: int
    spec: TrialSpec


@dataclass(frozen=True)
class Said:
    """What rank 0 of a group says: its nodes, which training it has begun and which ended, and whether that was the
    last one.
    """

    nodes: Sequence[str] = ()
    begun: int = 0
    ended: int = 0
    last: bool = False


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
        self._box = runtime.mailbox
        self._name = uuid.uuid4().hex
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._number = 0
        self._said = Said()
        self._error: BaseException | None = None

    def fits(self, runtime: Runtime, avoid: Sequence[str]) -> bool:
        """Tells whether it is there for a training of this runtime, and on none of the nodes that are left out."""
        same = runtime.capacity == self._runtime.capacity
        return self._thread.is_alive() and same and not set(avoid) & set(self._said.nodes)

    def run(self, spec: TrialSpec) -> bool:
        """Runs one attempt and waits for it; a result lies in its folder then, a failure was posted.

        Returns:
            Whether the group took it; False where it had ended since the training before.

        Raises:
            BaseException: What ended the group within the attempt, or before its first, as Ray Train raised it.
        """
        self._number += 1
        work, is_first = Work(self._number, spec), self._number == 1
        self._give(work)
        if is_first:
            self._thread.start()
        while self._thread.is_alive() and self._said.ended < self._number:
            self._thread.join(LOOK_EVERY_S)
            self._give(work)
        self._give(work)  # what it has said at its very end
        if self._said.last:  # its resources are free before the next training is given
            self._thread.join(CLOSE_S)
        if self._said.ended < self._number and (is_first or self._said.begun == self._number):
            raise self._error or RuntimeError("its workers ended without a message")
        return self._said.ended == self._number

    def close(self) -> None:
        """Asks the workers to end and waits until they have, within a bound."""
        if self._thread.is_alive():
            self._give(END)
            self._thread.join(CLOSE_S)

    def _give(self, work: Work | str) -> None:
        with contextlib.suppress(OSError):  # it is said again
            self._said = self._box.ask(self._name, work) or self._said

    def _fit(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="carft-train-", ignore_cleanup_errors=True) as folder:
                _trainer(self._runtime, self._name, self._avoid, folder).fit()
        except BaseException as error:  # raised by ``run``
            self._error = error


def _trainer(runtime: Runtime, name: str, avoid: Sequence[str], folder: str) -> Any:
    """Returns the ``TorchTrainer`` of a group, with a folder for Ray's own files. Nothing is restarted inside."""
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
        train_loop_config={"runtime": runtime, "name": name},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=runtime.capacity.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=runtime.capacity.worker_resources,
            placement_strategy="STRICT_PACK" if runtime.capacity.one_node else "PACK",
            **selector,
        ),
        run_config=RunConfig(
            name=name,  # of its own: Ray Train would resume a run by its name
            storage_path=folder,
            failure_config=FailureConfig(**failures),
        ),
    )
    return lean(trainer)


def _worker(config: Row) -> None:
    """One worker of a group. A failure is raised again, so that Ray ends the others, who may wait for this one."""
    from carft_ray.training.ranks import from_rank_0, gather

    runtime, place = config["runtime"], ray.train.get_context()
    context = RunContext(place.get_world_rank(), place.get_world_size())
    said = Said(gather(context, ray.get_runtime_context().get_node_id()))
    while work := from_rank_0(context, partial(_next, runtime.mailbox, config["name"], said)):
        ended = run_worker(runtime, work.spec, context)
        if isinstance(ended, Failure):
            raise RuntimeError(f"{work.spec.name} failed: {ended.reason}")
        gather(context, None)  # no rank has failed
        said = Said(said.nodes, work.number, work.number, ended not in ("go", "cut"))


def _next(box: Box, group: str, said: Said) -> Work | None:
    """Returns what a group is to do next, once that is there; None: it is to end.

    Args:
        box: The mailbox.
        group: Name of the group.
        said: What it says meanwhile.

    Raises:
        OSError: The mailbox cannot be reached.
    """
    free_since = time.monotonic()
    while True:
        is_late = time.monotonic() - free_since >= IDLE_S
        try:
            work: Work | str | None = box.answer(group, said)
        except OSError:
            if is_late:
                raise
            time.sleep(ASK_EVERY_S)
            continue
        if isinstance(work, Work) and work.number > said.ended:
            if work.number == said.begun:
                return work  # which the one who waits for it knows now
            said = replace(said, begun=work.number)
        elif said.last or is_late or work == END:
            return None
        else:
            time.sleep(ASK_EVERY_S)


class NestedTrial(tune.Trainable):
    """A process that starts a Ray Train group and gives it one training after the other."""

    def setup(self, config: dict[str, Any], runtime: Runtime) -> None:  # type: ignore[override]  # by with_parameters
        """Keeps what all trainings share."""
        self._runtime, self._group = runtime, WorkerGroup(runtime)

    def step(self) -> dict[str, Any]:
        """Runs one attempt."""
        capacity = replace(self._runtime.capacity, one_node=self.config["one_node"])
        here, spec = replace(self._runtime, capacity=capacity), TrialSpec(**self.config["spec"])
        lost: dict[str, Any] | None = None
        while lost is None:  # a second time where the group had ended before
            if not self._group.fits(here, self.config["avoid"]):
                self._group.close()
                self._group = WorkerGroup(here, self.config["avoid"])
            lost = _run(self._group, spec)
        return {**lost, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Says that the next training may run in this process."""
        return True

    def cleanup(self) -> None:
        """Ends the group."""
        self._group.close()


def _run(group: WorkerGroup, spec: TrialSpec) -> dict[str, Any] | None:
    """Runs an attempt; returns what Tune is told of its end, or None where the group had ended before."""
    try:
        return {"lost": ""} if group.run(spec) else None
    except Exception as error:
        failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
        dead = {rank: each for rank, each in failures.items() if ray_errors.is_death(each)}
        if not dead:
            return {"lost": ray_errors.explained(error)}
        rank = min(dead)
        return {"lost": ray_errors.root_cause(dead[rank]), "dead_rank": rank}
