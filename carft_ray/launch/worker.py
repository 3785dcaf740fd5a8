"""One worker of a training: what it runs, its heartbeat, and what it leaves when it fails."""

import contextlib
import faulthandler
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import errors, files
from carft_ray.errors import CarftError, ClusterError, OutdatedAttemptError
from carft_ray.launch.failures import causes
from carft_ray.launch.micro_batch import fitted, memory_failure
from carft_ray.launch.runtime import Runtime, not_visible
from carft_ray.layout import HEARTBEAT, LOG, PREPARED
from carft_ray.recipe.schema.recipe import alone
from carft_ray.recipe.trial_values import apply
from carft_ray.study import outcome
from carft_ray.study.outcome import Failure, Heartbeat, TrialSpec, append_log, check_fence
from carft_ray.training.out_of_memory import free_device, is_out_of_memory
from carft_ray.training.run_context import RunContext

HEARTBEAT_EVERY_S = 1.0  # steps are reported to the driver this often at most
STACKS_AFTER = 0.9  # of the time after which an attempt without a step is ended, its threads are written to its log


def run_worker(runtime: Runtime, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    """Runs one attempt in this process; how it ended lies in the folder afterwards.

    Once the driver has begun another attempt, it writes nothing more and ends at its next check or write.

    Args:
        runtime: How and where trainings run.
        spec: The attempt.
        folder: Of the training.
        context: Rank and stop flag.

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
    finally:
        free_device()  # for the next training of this process, and for those of others that share the GPU


def _run_worker(runtime: Runtime, spec: TrialSpec, folder: Path, context: RunContext) -> bool:
    recipe, nodes = runtime.recipe, tuple[tuple[str, str], ...]()
    try:
        nodes = _meet(runtime, context)
        folder.mkdir(parents=True, exist_ok=True)
        if context.rank == 0:
            addresses = dict.fromkeys(address for _, address in nodes)
            start = f" with {context.world_size} workers" if context.world_size > 1 else ""
            start += f" from {outcome.progress_words(folder)}" if spec.attempt > 1 else ""
            append_log(folder, f"attempt {spec.attempt}: starts on {', '.join(addresses)}{start}")
        recipe = apply(runtime.recipe if spec.kind == "trial" else alone(runtime.recipe), spec.values)
        recipe = fitted(recipe, runtime.study_dir, context.world_size)
        gpus = runtime.capacity.num_workers * runtime.capacity.gpus_per_worker
        alive = {"began": time.time(), "gpus": gpus, "nodes": list(nodes)}
        with _heartbeat(folder, spec.attempt, context, alive, runtime.recipe.resources.hang_timeout_s) as context:
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
        from carft_ray.training.ranks import gather

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
    alive: dict[str, Any],
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
    names = {"node_id": alive["nodes"][0][0], "group": group.id.hex() if group else ""}
    files.write_json(path, {"attempt": attempt, "pid": os.getpid(), **alive, **names})
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
    return Failure("error", line, attempt)
