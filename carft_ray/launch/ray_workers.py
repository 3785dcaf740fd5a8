"""Two ways to run one training: inline in a Tune trial, or as a Ray Train group of workers. The loop is the same.

A training is stopped by a file that rank 0 reads, ``stop`` in the study directory, ``cut.json`` or ``leave.json`` in
its own folder; so nothing is ever stopped from outside, where Ray leaks placement groups. A file reaches every node
that sees the study, needs no actor that could die, and lets another process ask for the stop. A training writes its
results into its folder before it ends; Ray carries none.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from carft_ray import errors
from carft_ray.errors import ClusterError
from carft_ray.launch.failures import causes
from carft_ray.launch.ray_cluster.cluster import ENVIRONMENT, HEAD_ONLY, START_TIMEOUT
from carft_ray.launch.runtime import Runtime, stop_reader
from carft_ray.launch.worker import run_worker
from carft_ray.layout import RAY_FILES
from carft_ray.learning.context import RunContext
from carft_ray.study import outcome
from carft_ray.study.outcome import Failure, TrialSpec, read_failure
from carft_ray.words import counted

NODE_LABEL = "ray.io/node-id"  # that Ray gives every node


def tune_trainable(runtime: Runtime) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``, and ``avoid``, Ray's names of nodes that are left out;
    ``capacity`` holds what has another value by now than in the runtime's capacity, for a group of workers.
    It reports once, at the end: ``lost`` says why its workers are gone. Without a report Tune prints a line.
    """
    if runtime.nested:

        def nested_trial(config: dict[str, Any]) -> dict[str, str]:
            here = replace(runtime, capacity=replace(runtime.capacity, **config["capacity"]))
            return {"lost": run_nested(here, TrialSpec(**config["spec"]), avoid=config["avoid"])}

        return tune.with_resources(nested_trial, HEAD_ONLY)

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
        where: dict[str, Any] = {"bundle_label_selector": [_anywhere_but(config["avoid"])]} if config["avoid"] else {}
        return tune.PlacementGroupFactory([runtime.capacity.worker_resources], **where)

    return tune.with_resources(inline_trial, resources)


def _anywhere_but(nodes: Sequence[str]) -> dict[str, str]:
    """Returns Ray's label selector for all nodes but these."""
    return {NODE_LABEL: f"!in({','.join(nodes)})"}


def run_nested(runtime: Runtime, spec: TrialSpec, folder: Path | None = None, avoid: Sequence[str] = ()) -> str:
    """Runs one attempt as a Ray Train group and waits for it; how it ended lies in its folder.

    Nothing is restarted inside: an attempt whose worker dies ends, and the study gives the training another one.

    Args:
        runtime: How and where trainings run.
        spec: The attempt.
        folder: Of the training; by default that of the spec.
        avoid: Ray's names of nodes that are left out.

    Returns:
        Why the group ended before its time, for an attempt without a message (``causes.explained``); else empty.
    """
    for name, value in ENVIRONMENT.items():  # a job that was there before the search has an environment of its own
        os.environ.setdefault(name, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = folder or spec.folder(runtime.study_dir)
    use_gpu = runtime.capacity.gpus_per_worker > 0
    can_select = "label_selector" in {each.name for each in fields(ScalingConfig)}  # older releases of Ray cannot
    counts_apart = "max_preemption_failures" in {each.name for each in fields(FailureConfig)}  # and do not
    selector: dict[str, Any] = {"label_selector": _anywhere_but(avoid)} if avoid and can_select else {}
    failures: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 1}
    failures |= {"max_preemption_failures": 0} if counts_apart else {}
    trainer = TorchTrainer(
        _nested_worker,
        train_loop_config={"runtime": runtime, "spec": spec, "folder": folder},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=runtime.capacity.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=runtime.capacity.worker_resources,
            placement_strategy="STRICT_PACK" if runtime.capacity.one_node else "PACK",
            **selector,
        ),
        run_config=RunConfig(
            name=f"{spec.name}-{spec.attempt}",  # a name of its own: Ray Train would resume a run by its name
            storage_path=str(runtime.study_dir / RAY_FILES / "train"),
            failure_config=FailureConfig(**failures),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return _dead_worker(error, spec, folder) or _late(error, runtime) or causes.explained(error)
    return ""


def _nested_worker(config: dict[str, Any]) -> None:
    """One worker of a group. A failure is raised again, so that Ray ends the others, who may wait for this one."""
    runtime, spec, folder = config["runtime"], config["spec"], config["folder"]
    place, should_stop = ray.train.get_context(), stop_reader(runtime.study_dir, folder, spec.attempt)
    context = RunContext(place.get_world_rank(), place.get_world_size(), should_stop=should_stop)
    if not run_worker(runtime, spec, folder, context):
        raise RuntimeError(f"{spec.name} failed, see its folder")


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


def _late(error: Exception, runtime: Runtime) -> str:
    """Returns that the workers of a group did not come in time; empty when they failed in another way."""
    if type(getattr(error, "controller_failure", None)).__name__ != "WorkerGroupStartupTimeoutError":
        return ""
    capacity, limit_s = runtime.capacity, os.environ.get(START_TIMEOUT, "60")
    gpus = f" and {counted(capacity.gpus_per_worker, 'GPU')}" if capacity.gpus_per_worker else ""
    what = f"{counted(capacity.num_workers, 'worker')} with {counted(capacity.cpus_per_worker, 'CPU')}{gpus} each"
    return f"{what} did not start within {limit_s} s ({START_TIMEOUT}): is the cluster full?"
