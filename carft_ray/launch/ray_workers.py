"""Two ways to run one training: inline in a Tune trial, or by a Ray Train group of workers. The loop is the same.

A training is stopped by an order that rank 0 reads from the mailbox; so nothing is ever stopped from outside, where Ray
leaks placement groups. A training writes its results into its folder before it ends; Ray carries none.
"""

from dataclasses import replace
from typing import Any

from ray import tune

from carft_ray.launch.failures import causes
from carft_ray.launch.ray_cluster.cluster import HEAD_ONLY
from carft_ray.launch.ray_group import WorkerGroup, anywhere_but
from carft_ray.launch.runtime import Runtime
from carft_ray.launch.worker import run_worker
from carft_ray.study.outcome import Failure, TrialSpec
from carft_ray.training.run_context import RunContext


def tune_trainable(runtime: Runtime) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``; ``avoid``, Ray's names of nodes that are left out; and
    ``one_node``, as of ``Capacity``, for a group of workers.
    It reports once, at the end: ``lost`` says why its workers are gone, ``dead_rank`` which of them has died. Without a
    report Tune prints a line.
    """
    if runtime.nested:
        return tune.with_resources(tune.with_parameters(NestedTrial, runtime=runtime), HEAD_ONLY)

    def inline_trial(config: dict[str, Any]) -> dict[str, str]:
        spec = TrialSpec(**config["spec"])
        ended = run_worker(runtime, spec, RunContext())
        if isinstance(ended, Failure) and ended.outcome == "memory":  # Ray ends the process, and all that it held
            raise RuntimeError(f"{spec.name}: {ended.reason}")
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
        dead = {rank: each for rank, each in failures.items() if causes.is_death(each)}
        if not dead:
            return {"lost": causes.explained(error)}
        rank = min(dead)
        return {"lost": causes.root_cause(dead[rank]), "dead_rank": rank}
