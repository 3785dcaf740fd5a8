"""One worker of a training: what it runs, its signs of life, and what it leaves when it fails."""

import contextlib
import faulthandler
import json
import math
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from carft_ray import errors, files
from carft_ray.errors import CarftError, ClusterError, Problem, StorageError
from carft_ray.launch.cluster import ray_errors
from carft_ray.launch.cluster.ray_private import forget_pickled_columns
from carft_ray.launch.workers.mailbox import (
    CALL_TIMEOUT_S,
    PATIENCE_S,
    RETRY_EVERY_S,
    Box,
    Kind,
    Order,
    Post,
    Process,
    Record,
)
from carft_ray.launch.workers.micro_batch import fitted, memory_failure
from carft_ray.launch.workers.node_files import Delivery, sees, training_at_hand
from carft_ray.launch.workers.runtime import Fill, MakeSoup, Prepare, Runner, Runtime, Train
from carft_ray.layout import PREPARED, ROWS
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import alone, with_keys
from carft_ray.store import attempt_files
from carft_ray.store.heartbeat import process_started
from carft_ray.study.training import Failure, TrialSpec
from carft_ray.training.out_of_memory import free_device, free_host, is_out_of_memory
from carft_ray.training.run_context import RunContext

WATCH_EVERY_S = 1.0  # the watchdog of threads is set this often at most
STACKS_AFTER = 0.9  # of the time after which an attempt without a step is ended, what its threads do is written
STACKS_TIMEOUT_S = 10.0
# all that ``torch.save`` says of a full disk
TORCH_SAVE = re.compile(r"inline_container\.cc.*unexpected pos|PytorchStreamWriter failed")
POST_EVERY_S = 1.0


def there(name: str, *given: Any) -> Any:
    """Calls a function ``MODULE:NAME``, imported where it runs: the driver holds no torch."""
    function = resolve_name(name)
    forget_pickled_columns()
    return function(*given)


fill: Fill = partial(there, "carft_ray.training.shared_inputs:fill_cache")
prepare: Prepare = partial(there, "carft_ray.training.run:prepare")
train: Train = partial(there, "carft_ray.training.run:run_training")
soup: MakeSoup = partial(there, "carft_ray.training.soup:run_soup")
RUNNER = Runner(prepare, train, fill, soup)


class Poster:
    """Posts for one rank of an attempt, in a thread, so that no step waits for the mailbox.

    Used as a context: the first post is made before the block begins, the last one after it.

    Args:
        box: The mailbox.
        training: Folder of the training within the study.
        attempt: Number of the attempt.
        rank: Of this worker.
        process: This one, of rank 0.

    Attributes:
        order: The last one.
    """

    def __init__(self, box: Box, training: str, attempt: int, rank: int = 0, process: Process | None = None) -> None:
        self.order: Order = "go"
        self._box, self._post = box, Post(training, attempt, rank, process=process)
        self._heard_at = time.monotonic()
        self._records: list[Record] = []  # that the driver may not have
        self._num_taken = 0  # by it, of those before
        self._posting = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poster", daemon=True)

    def __enter__(self) -> "Poster":
        self.post()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ends.set()
        self._thread.join()
        limit = time.monotonic() + CALL_TIMEOUT_S
        while not self.post() and time.monotonic() < limit:  # how it has ended, and the last records
            time.sleep(RETRY_EVERY_S)

    def knows(self, **found: Any) -> None:
        """Takes fields of ``Process``, of rank 0, and posts them."""
        if self._post.process is not None:
            self._post = replace(self._post, process=replace(self._post.process, **found))
            self.post()

    def step(self) -> Order:
        """Sends a heartbeat; returns the order."""
        self._post = replace(self._post, steps=self._post.steps + 1)
        return self.order

    def failed(self, failure: Failure) -> None:
        """Takes how the attempt has ended for this rank."""
        self._post = replace(self._post, failure=failure)

    def record(self, kind: Kind, value: Any) -> None:
        """Takes a record for the driver."""
        self._records.append((kind, value))

    def post(self) -> bool:
        """Posts at once; tells whether there was an answer. None for ``PATIENCE_S`` makes the order ``leave``."""
        with self._posting:
            try:
                post = replace(self._post, records=tuple(self._records), first=self._num_taken)
                answer = self._box.post(post)
            except OSError:
                if time.monotonic() - self._heard_at >= PATIENCE_S:
                    self.order = "leave"
                return False
            self.order, self._heard_at = answer.order, time.monotonic()
            num_taken = max(self._num_taken, answer.num_taken)  # an outdated attempt is not told
            del self._records[: num_taken - self._num_taken]
            self._num_taken = num_taken
            return True

    def _run(self) -> None:
        while not self._ends.wait(POST_EVERY_S):
            self.post()


def run_worker(runtime: Runtime, spec: TrialSpec, context: RunContext) -> Order | Failure:
    """Runs one attempt in this process. A result lies in its folder afterwards; a failure is posted.

    Once the driver has begun another attempt, it ends at its next check; what it has written counts for nothing.

    Args:
        runtime: How and where trainings run.
        spec: The attempt.
        context: Rank and stop flag, which counts besides the driver's order.

    Returns:
        How it failed; else, as it has finished or was stopped after a checkpoint, the order that it had then.

    Raises:
        MemoryError, RuntimeError: The machine has no memory for the process as such; nothing is left in the folder.
    """
    try:
        this = _this_process(context)
        with Poster(runtime.mailbox, spec.training, spec.attempt, context.rank, this) as poster:
            failure = _run_worker(runtime, spec, context, poster)
            if failure is not None:
                poster.failed(failure)
            return failure or poster.order
    finally:
        free_device()  # for the next training of this process, and for those of others that share the GPU
        free_host()


def _run_worker(runtime: Runtime, spec: TrialSpec, context: RunContext, poster: Poster) -> Failure | None:
    recipe, nodes = runtime.recipe, tuple[tuple[str, str], ...]()
    try:
        everybody = _meet(runtime, context)
        nodes = tuple((node_id, address) for node_id, address, _ in everybody)
        poster.knows(nodes=nodes)
        sight = [(node_id, seen) for node_id, _, seen in everybody]
        with training_at_hand(runtime, spec, context, sight, poster.record) as (study_dir, context, sends):
            folder, place = spec.folder(study_dir), spec.place(study_dir)
            with files.writing(place):
                place.mkdir(parents=True, exist_ok=True)
            if context.rank == 0:
                addresses = dict.fromkeys(address for _, address in nodes)
                start = f" with {context.world_size} workers" if context.world_size > 1 else ""
                start += f" from {attempt_files.progress_words(folder)}" if spec.attempt > 1 else ""
                poster.record("log", f"attempt {spec.attempt}: starts on {', '.join(addresses)}{start}")
            values = spec.values if spec.soup is None else spec.soup["train"]
            recipe = apply(runtime.recipe if spec.kind in ("trial", "soup") else alone(runtime.recipe), values)
            if (fits := fitted(recipe, spec.fits, context.world_size)) is not None:
                recipe = with_keys(recipe, train={"micro_batch": fits})
            take_gpu(runtime, context)
            context = replace(context, references=spec.references)
            with _watched(context, poster, place, runtime.recipe.resources.hang_timeout_s, sends) as context:
                run = runtime.runner.train
                if spec.soup is not None and runtime.runner.soup is not None:
                    run = partial(runtime.runner.soup, spec.soup)
                result = run(recipe, folder, study_dir / PREPARED, context, spec.attempt)
        if sends is not None:
            poster.record("log", f"attempt {spec.attempt}: {sends.words()}")
    except errors.OutOfMemoryError as error:
        failure = memory_failure(error, recipe, spec.values, spec.attempt)
        return replace(failure, details=traceback.format_exc())
    except Exception as error:  # whatever it is, the tables show it; processes and clusters stay healthy
        if is_out_of_memory(error):
            poster.record("log", f"attempt {spec.attempt}: no memory\n{traceback.format_exc().rstrip()}")
            raise
        failed = _failure(error, spec.attempt, context, nodes)
        return failed and replace(failed, details=traceback.format_exc())
    if math.isfinite(result["objective"]):
        return None
    reason = f"objective is {result['objective']}"
    return Failure("diverged", reason, spec.attempt, errors.DivergedError.exit_code)


def _meet(runtime: Runtime, context: RunContext) -> list[tuple[str, str, bool]]:
    """Returns of each rank Ray's name and the address of its node, and whether that sees the study."""
    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    mine = (node_id, ray.util.get_node_ip_address(), sees(runtime))  # type: ignore[no-untyped-call]  # of Ray
    if context.world_size == 1:
        return [mine]
    from carft_ray.training.ranks import gather

    return gather(context, mine)


def _this_process(context: RunContext) -> Process | None:
    """Returns what the driver is to know of rank 0."""
    if context.rank != 0:
        return None
    node_id, group = "", None
    if ray.is_initialized():
        node_id, group = ray.get_runtime_context().get_node_id(), ray.util.get_current_placement_group()
    pid = os.getpid()
    return Process(pid, process_started(pid), node_id, group.id.hex() if group else "")


@contextlib.contextmanager
def _watched(
    context: RunContext, poster: Poster, place: Path, hang_timeout_s: float | None, sends: Delivery | None = None
) -> Iterator[RunContext]:
    """Gives a context that keeps and posts what is reported, and whose checks for a stop are signs of life, which the
    driver's order answers. On a node that does not see the study, what was kept until a report goes there with it.

    All ranks give them: rank 0 may be waiting for one that builds a set into the cache of its node.

    Without a step for most of ``hang_timeout_s`` the stacks of all threads of rank 0 go to a file of its node, from
    which the one who ends the process takes them. Python's own watchdog writes them, whatever the process does; setting
    it costs 0.1 ms a second.
    """
    next_at = 0.0

    def progress(row: dict[str, float]) -> None:
        poster.record("step", row)
        context.progress(row)

    def report(row: dict[str, float]) -> None:
        files.append_line(place / ROWS, json.dumps(row))
        if sends is not None:
            sends.own()
        poster.record("row", row)
        context.report(row)

    def should_stop(watch: Callable[[], None] = lambda: None) -> bool:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + WATCH_EVERY_S
            watch()
        asked = context.should_stop()
        if sends is not None:
            sends.check()
        return poster.step() != "go" or asked

    posting = replace(context, should_stop=should_stop, progress=progress, report=report)
    if context.rank != 0 or hang_timeout_s is None or (stacks := _file_for_stacks()) is None:
        yield posting
        return
    limit_s = STACKS_AFTER * hang_timeout_s
    with stacks:
        poster.knows(stacks=stacks.name)
        try:
            watch = partial(faulthandler.dump_traceback_later, limit_s, file=stacks)
            watch()
            yield replace(posting, should_stop=partial(should_stop, watch))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _file_for_stacks() -> "tempfile._TemporaryFileWrapper[str] | None":
    """Returns a temporary file of this node; None where its disk has no space for one, as a training needs none."""
    with contextlib.suppress(OSError):
        return tempfile.NamedTemporaryFile("w", prefix="carft-stacks-")
    return None


def end_process(process: Process) -> Callable[[], str]:
    """Ends the process of an attempt that hangs, on whatever node it runs; does not wait for it.

    Returns:
        What its threads did, as a function that waits for the answer of the node.
    """
    where = NodeAffinitySchedulingStrategy(node_id=process.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(kill)  # type: ignore[call-overload]
    found = task.remote(process)

    def stacks() -> str:
        with contextlib.suppress(ray.exceptions.RayError):  # its node is gone, say
            return str(ray.get(found, timeout=STACKS_TIMEOUT_S))
        return ""

    return stacks


def kill(process: Process) -> str:
    """Kills a process of this machine, unless its number has become that of another one; returns what it hung in."""
    if process_started(process.pid) == process.started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    text, path = "", Path(process.stacks)
    with contextlib.suppress(OSError):
        text = path.read_text()
        path.unlink()
    return text


def take_gpu(runtime: Runtime, context: RunContext) -> None:
    """Keeps this process to its share of a GPU's memory: others could not use what torch keeps of the rest.

    It refuses to compute on the CPU where Ray has given it a GPU: the driver or the GPU has failed there.

    Args:
        runtime: Its recipe says how many GPUs a worker gets.
        context: Of the worker.

    Raises:
        MachineError: torch was built for CUDA and finds no GPU.
    """
    share = runtime.recipe.resources.gpus_per_worker
    if not share or runtime.in_process:
        return
    from carft_ray.model.device import has_lost_gpu, limit_memory  # loads torch

    if has_lost_gpu():
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # of Ray
        text = f"Ray has given this process a GPU, but torch finds none (does nvidia-smi work on {address}?)"
        raise errors.MachineError(text, context.rank)
    limit_memory(share)


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
    rank = ray_errors.lost_rank(error, context)
    if rank is not None:
        reason = " ".join(text.split()) if isinstance(error, CarftError) else line
        node = nodes[rank][0] if rank != ray_errors.UNKNOWN and nodes else ""
        return Failure("lost", reason, attempt, ClusterError.exit_code, node=node)
    if isinstance(error, OSError) and error.errno in files.DISK_STEPS:  # of a function of the user's own, say
        error = files.storage_error(Path(error.filename or "the disk"), error)
    elif isinstance(error, RuntimeError) and TORCH_SAVE.search(text):
        error = StorageError(Problem("torch.save", "must write everything that it is given (is the disk full?)", line))
    if isinstance(error, CarftError):
        return Failure("fatal", str(error), attempt, error.exit_code)
    return Failure("error", line, attempt)
