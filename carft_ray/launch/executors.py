"""Two ways to run one training: inline in a Tune trial, or as a Ray Train group of workers. The loop is the same.

A training is stopped by a file that rank 0 reads, ``stop`` in the study directory or ``cut.json`` in its own folder; so
nothing is ever stopped from outside, where Ray leaks placement groups. A file reaches every node that sees the study,
needs no actor that could die, and lets another process ask for the stop. A training writes its results into its folder
before it ends; Ray carries none.
"""

import contextlib
import faulthandler
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import errors, files
from carft_ray.errors import CarftError, ClusterError, OutdatedAttemptError
from carft_ray.launch.micro_batch import fitted, memory_failure
from carft_ray.launch.ray_cluster.cluster import START_TIMEOUT
from carft_ray.launch.recovery import causes
from carft_ray.launch.runtime import Runtime, not_visible, stop_reader
from carft_ray.layout import HEARTBEAT, LOG, PREPARED, RAY_FILES
from carft_ray.learning.context import RunContext
from carft_ray.learning.memory import is_out_of_memory
from carft_ray.recipe.schema import alone
from carft_ray.recipe.spaces.space import apply
from carft_ray.study import outcome
from carft_ray.study.outcome import Failure, Heartbeat, TrialSpec, append_log, check_fence, read_failure
from carft_ray.words import counted

HEARTBEAT_EVERY_S = 1.0  # steps are reported to the driver this often at most
STACKS_AFTER = 0.9  # of the time after which an attempt without a step is ended, its threads are written to its log
# the driver of a Ray Train group takes no CPU, which could starve its own workers; every head node has this resource
HEAD_ONLY = {"node:__internal_head__": 0.001}
NODE_LABEL = "ray.io/node-id"  # that Ray gives every node


def tune_trainable(runtime: Runtime) -> Any:
    """Returns the Tune trainable, with its resources.

    Its ``config`` holds ``spec``, the fields of a ``TrialSpec``, and ``avoid``, Ray's names of nodes that are left out.
    It reports once, at the end: ``lost`` says why its workers are gone. Without a report Tune prints a line.
    """
    if runtime.nested:

        def nested_trial(config: dict[str, Any]) -> dict[str, str]:
            return {"lost": run_nested(runtime, TrialSpec(**config["spec"]), avoid=config["avoid"])}

        return tune.with_resources(nested_trial, HEAD_ONLY)

    def inline_trial(config: dict[str, Any]) -> dict[str, str]:
        spec = TrialSpec(**config["spec"])
        folder = spec.folder(runtime.study_dir)
        context = RunContext(should_stop=stop_reader(runtime.study_dir, folder))
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


def run_worker(runtime: Runtime, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    """Runs one attempt in this process; how it ended lies in the folder afterwards.

    Once the driver has begun another attempt, it writes nothing more and ends at its next check or write.

    Returns:
        Whether it ended well: finished, or stopped after a checkpoint.

    Raises:
        MemoryError, RuntimeError: The machine has no memory for the process as such; nothing is left in the folder.
    """
    try:
        with files.fenced(lambda: check_fence(folder, spec.attempt)):
            return _run_worker(runtime, spec, folder, context)
    except OutdatedAttemptError:
        return False


def _run_worker(runtime: Runtime, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    recipe, nodes = runtime.recipe, tuple[tuple[str, str], ...]()
    try:
        nodes = _meet(runtime, context)
        folder.mkdir(parents=True, exist_ok=True)
        if context.rank == 0:
            addresses = dict.fromkeys(address for _, address in nodes)
            start = f" from {outcome.progress_words(folder)}" if spec.attempt > 1 else ""
            append_log(folder, f"attempt {spec.attempt}: starts on {', '.join(addresses)}{start}")
        recipe = apply(runtime.recipe if spec.kind == "trial" else alone(runtime.recipe), spec.values)
        recipe = fitted(recipe, runtime.study_dir, context.world_size)
        gpus = runtime.capacity.num_workers * runtime.capacity.gpus_per_worker
        with _heartbeat(folder, spec.attempt, context, gpus, nodes, runtime.recipe.resources.hang_timeout_s) as context:
            result = runtime.runner.train(recipe, folder, runtime.study_dir / PREPARED, context, spec.attempt)
    except OutdatedAttemptError:
        raise
    except errors.OutOfMemoryError as error:
        failure = memory_failure(error, recipe, spec.values, runtime.study_dir, spec.attempt)
        failure = replace(failure, details=traceback.format_exc())
    except Exception as error:  # whatever it is, the tables show it; processes and clusters stay healthy
        if is_out_of_memory(error):
            append_log(folder, f"attempt {spec.attempt}: no memory\n{traceback.format_exc().rstrip()}")
            raise
        sorted_out = _failure(error, spec.attempt, context, nodes)
        if sorted_out is None:
            return True
        failure = replace(sorted_out, details=traceback.format_exc())
        if failure.outcome == "lost":  # with the folder, perhaps: what was raised goes to Ray then
            if not nodes and getattr(error, "rank", None) == context.rank:  # this node does not see the study
                raise
            try:
                outcome.write_failure(folder, failure)
            except errors.StorageError:
                raise error from None
            return False
    else:
        if math.isfinite(result["objective"]):
            return True
        reason = f"objective is {result['objective']}"
        failure = Failure("diverged", reason, spec.attempt, errors.DivergedError.exit_code)
    outcome.write_failure(folder, failure)
    return False


def _meet(runtime: Runtime, context: RunContext) -> tuple[tuple[str, str], ...]:
    """Returns Ray's name and the address of each rank's node, once all of them see the study.

    Raises:
        MachineError: One does not; the message is the same on every rank.
    """
    problem, node_id = not_visible(runtime), ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    everybody = [(node_id, ray.util.get_node_ip_address(), problem)]  # type: ignore[no-untyped-call]
    if context.world_size > 1:
        from carft_ray.learning.ranks import gather  # torch; the driver holds none

        everybody = gather(context, everybody[0])
    for rank, (_, _, problem) in enumerate(everybody):
        if problem:
            raise errors.MachineError(problem, rank)
    return tuple((node_id, address) for node_id, address, _ in everybody)


@contextlib.contextmanager
def _heartbeat(
    folder: Path,
    attempt: int,
    context: RunContext,
    gpus: float,
    nodes: Sequence[tuple[str, str]],
    hang_timeout_s: float | None,
) -> Iterator[RunContext]:
    """Shows the driver which process runs the attempt, and with each step (each check for a stop) that it still does.

    The file stays after a failure: it names the nodes. All ranks report steps: rank 0 may be waiting for one
    that builds a set into the cache of its node.

    Without a step for most of ``hang_timeout_s`` the stacks of all threads of rank 0 go to the log: the driver is about
    to end the process. Python's own watchdog writes them, whatever the process does; setting it costs 0.1 ms a second.
    """
    path, next_at = folder / HEARTBEAT, time.monotonic() + HEARTBEAT_EVERY_S

    def should_stop(watch: Callable[[], None] = lambda: None) -> bool:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + HEARTBEAT_EVERY_S
            check_fence(folder, attempt)
            watch()
            with contextlib.suppress(OSError):  # a step is not worth a failure
                os.utime(path)
        return context.should_stop()

    if context.rank != 0:
        yield replace(context, should_stop=should_stop)
        return
    group = ray.util.get_current_placement_group() if ray.is_initialized() else None
    names = {"node_id": nodes[0][0], "group": group.id.hex() if group else "", "nodes": list(nodes)}
    files.write_json(path, {"attempt": attempt, "pid": os.getpid(), "began": time.time(), "gpus": gpus, **names})
    with open(folder / LOG, "a") as log:

        def watch() -> None:
            if hang_timeout_s is not None:
                faulthandler.dump_traceback_later(STACKS_AFTER * hang_timeout_s, file=log)

        watch()
        has_failed = False
        try:
            yield replace(context, should_stop=partial(should_stop, watch))
        except Exception as error:
            has_failed = getattr(error, "exit_code", 1) != errors.InterruptedRunError.exit_code
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                if not has_failed and outcome.read_heartbeat(folder, attempt):  # it is still ours
                    path.unlink(missing_ok=True)


def end_process(alive: Heartbeat) -> None:
    """Ends the process of an attempt that hangs, on whatever node it runs; does not wait for it."""
    where = NodeAffinitySchedulingStrategy(node_id=alive.node_id, soft=False)
    ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(_kill).remote(alive.pid)  # type: ignore[call-overload]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _failure(error: Exception, attempt: int, context: RunContext, nodes: Sequence[tuple[str, str]]) -> Failure | None:
    """Sorts an exception of a training; None for a stop.

    Args:
        error: The exception.
        attempt: Number of the attempt.
        context: Of the worker that met it.
        nodes: Name and address of each rank's node; empty where they are not known yet.
    """
    if isinstance(error, CarftError) and error.exit_code == errors.InterruptedRunError.exit_code:
        return None
    text = str(error).strip()
    line = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    if isinstance(error, errors.DivergedError):
        reason = "; ".join(str(replace(problem, next_step="")) for problem in error.problems)
        return Failure("diverged", reason, attempt, error.exit_code)
    rank = causes.lost_rank(error, context)
    if rank is not None:
        reason = " ".join(text.split()) if isinstance(error, CarftError) else line
        node = nodes[rank][0] if rank != causes.UNKNOWN and nodes else ""
        return Failure("lost", reason, attempt, ClusterError.exit_code, node=node)
    if isinstance(error, CarftError):
        return Failure("fatal", text, attempt, error.exit_code)
    if (step := causes.device_error_step(error)) is not None:
        return Failure("lost", line, attempt, ClusterError.exit_code, node=nodes[context.rank][0], step=step)
    return Failure("error", line, attempt)


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
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = folder or spec.folder(runtime.study_dir)
    use_gpu = runtime.capacity.gpus_per_worker > 0
    can_select = "label_selector" in {each.name for each in fields(ScalingConfig)}  # older releases of Ray cannot
    selector: dict[str, Any] = {"label_selector": _anywhere_but(avoid)} if avoid and can_select else {}
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
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=1),  # type: ignore[call-arg]  # V2
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
    place, should_stop = ray.train.get_context(), stop_reader(runtime.study_dir, folder)
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
