"""Two ways to run one training: inline in a Tune trial, or by a Ray Train group of workers. The loop is the same.

A training is stopped by a file that rank 0 reads, ``stop`` in the study directory, ``cut.json`` or ``leave.json`` in
its own folder; so nothing is ever stopped from outside, where Ray leaks placement groups. A file reaches every node
that sees the study, needs no actor that could die, and lets another process ask for the stop. A training writes its
results into its folder before it ends; Ray carries none.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from carft_ray import errors, files
from carft_ray.errors import ClusterError
from carft_ray.launch.failures import causes
from carft_ray.launch.ray_cluster.cluster import HEAD_ONLY
from carft_ray.launch.ray_group import WorkerGroup, anywhere_but
from carft_ray.launch.runtime import Runtime, stop_reader
from carft_ray.launch.worker import run_worker
from carft_ray.layout import STOP
from carft_ray.study import outcome
from carft_ray.study.outcome import Failure, TrialSpec, read_failure
from carft_ray.training.run_context import RunContext


def tune_trainable(runtime: Runtime) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``; ``avoid``, Ray's names of nodes that are left out; and
    ``one_node``, as of ``Capacity``, for a group of workers.
    It reports once, at the end: ``lost`` says why its workers are gone. Without a report Tune prints a line.
    """
    if runtime.nested:
        return tune.with_resources(tune.with_parameters(NestedTrial, runtime=runtime), HEAD_ONLY)

    def inline_trial(config: dict[str, Any]) -> dict[str, str]:
        spec = TrialSpec(**config["spec"])
        folder = spec.folder(runtime.study_dir)
        context = RunContext(should_stop=stop_reader(runtime.study_dir, folder, spec.attempt))
        if not run_worker(runtime, spec, folder, context):
            failure = read_failure(folder, spec.attempt)
            if failure and failure.outcome == "memory":  # Ray ends the process, and with it all that it held
                raise RuntimeError(f"{spec.name}: {failure.reason}")
        return {"lost": ""}

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        where: dict[str, Any] = {"bundle_label_selector": [anywhere_but(config["avoid"])]} if config["avoid"] else {}
        return tune.PlacementGroupFactory([runtime.capacity.worker_resources], **where)

    return tune.with_resources(inline_trial, resources)


class NestedTrial(tune.Trainable):
    """A process that starts a Ray Train group and gives it one training after the other."""

    def setup(self, config: dict[str, Any], runtime: Runtime) -> None:  # type: ignore[override]  # by with_parameters
        """Keeps what all trainings share."""
        self._runtime, self._group = runtime, WorkerGroup(runtime)

    def step(self) -> dict[str, Any]:
        """Runs one attempt."""
        capacity = replace(self._runtime.capacity, one_node=self.config["one_node"])
        here, spec = replace(self._runtime, capacity=capacity), TrialSpec(**self.config["spec"])
        lost, is_stopping = None, False
        while lost is None and not is_stopping:  # a second time where the group had ended before
            if not self._group.fits(here, self.config["avoid"]):
                self._group.close()
                self._group = WorkerGroup(here, self.config["avoid"])
            lost = _run(self._group, spec, spec.folder(here.study_dir))
            is_stopping = files.seen(here.study_dir / STOP)
        return {"lost": lost or "", "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Says that the next training may run in this process."""
        return True

    def cleanup(self) -> None:
        """Ends the group."""
        self._group.close()


def _run(group: WorkerGroup, spec: TrialSpec, folder: Path) -> str | None:
    """Runs an attempt; how it ended lies in its folder.

    Returns:
        Why the group ended before its time, for an attempt without a message (``causes.explained``); else empty. None
        where the group had ended before.
    """
    try:
        return "" if group.run(spec, folder) else None
    except Exception as error:
        return _dead_worker(error, spec, folder) or causes.explained(error)


def _dead_worker(error: Exception, spec: TrialSpec, folder: Path) -> str:
    """Notes that an attempt was lost when one of its workers has died, whatever the others have made of it.

    Returns:
        Which worker, where and why; empty when none has died.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    dead = {rank: each for rank, each in failures.items() if causes.is_death(each)}
    if not dead:
        return ""
    rank, alive = min(dead), outcome.read_heartbeat(folder, spec.attempt)
    node, address = alive.nodes[rank] if alive and rank < len(alive.nodes) else ("", "")
    cause = causes.root_cause(dead[rank])
    where = f"rank {rank}{f' on {address}' if address else ''}"
    reason = cause if causes.is_full_memory(cause) else f"{where}: {cause}"
    before = read_failure(folder, spec.attempt)
    if before is None or before.outcome in ("error", "lost"):
        details = "" if before is None else before.details or before.reason
        with contextlib.suppress(errors.StorageError):
            lost = Failure("lost", reason, spec.attempt, ClusterError.exit_code, details, node)
            outcome.replace_failure(folder, lost)
    return reason
