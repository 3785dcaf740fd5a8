"""A single training: the folder of `train`, prepared, run here or by Ray Train workers, resumable."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.data.shared.shared_images import SharedRow, write_shared
from carft_ray.errors import ClusterError, OutOfMemoryError, Problem, StorageError, UsageError
from carft_ray.evaluation.training import run_training
from carft_ray.launch.executors import HEAD_ONLY, run_nested
from carft_ray.launch.micro_batch import fitted, memory_failure
from carft_ray.launch.preparation import run_prepare
from carft_ray.launch.recovery.causes import explained
from carft_ray.launch.runtime import RUNNER, Runner, prepare_single
from carft_ray.launch.session import begin, computing, prepare
from carft_ray.launch.stop import CHECK_EVERY_S, interruption, stop_file_on_signal
from carft_ray.layout import (
    CHECKPOINTS,
    ERROR,
    JOURNAL,
    LOG,
    MANIFEST,
    METRICS,
    PREPARED,
    RAY_FILES,
    RESULT,
    STOP,
    WEIGHTS,
)
from carft_ray.learning.checkpoint import newest_checkpoint
from carft_ray.learning.context import RunContext
from carft_ray.learning.loop import StoppedRun
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.region import DIRECTIONS
from carft_ray.study.identity import claim
from carft_ray.study.lock import gone_if_nothing_began, is_ours, study_lock
from carft_ray.study.outcome import (
    TrialSpec,
    failure_error,
    log_lost,
    progress_of,
    read_failure,
    read_heartbeat,
    read_result,
)
from carft_ray.study.provenance import record_provenance
from carft_ray.study.study import LOST_ATTEMPTS
from carft_ray.words import counted

Row = dict[str, float]

logger = logging.getLogger(__name__)


def train_once(
    recipe: Recipe,
    out_dir: Path,
    resume: bool,
    resume_command: str,
    say: Callable[[str], None],
    progress: Callable[[Row], None],
    report: Callable[[Row], None],
    address: str | None = None,
    prepare_first: Callable[[Path], dict[str, Any]] | None = None,
    shared: Sequence[SharedRow] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs one training to its end, or resumes one.

    Ctrl-C (or SIGTERM) writes a checkpoint and ends.

    Args:
        recipe: The recipe.
        out_dir: Folder of the training.
        resume: Whether a training in the folder is to be resumed; without it the folder must be new.
        resume_command: Shown after an interruption.
        say: Given texts of what is being done.
        progress: Given the metrics every few steps (one worker, in this process).
        report: Given the metrics of every epoch (one worker, in this process).
        address: Ray cluster to attach to when there are several workers.
        prepare_first: Makes what the training shares with others in the folder given; by default it shares nothing.
        shared: Images that stand in two roles; None: they are found now.

    Returns:
        Content of ``result.json``, and what ``prepare`` found of zero-shot.

    Raises:
        UsageError: The folder holds something, or nothing to resume.
        InterruptedRunError: Stopped on request.
        HoldOutError: Two roles share images.
        RecipeError, DataError, StorageError, DivergedError: As their messages say.
    """
    out_dir = out_dir.resolve()
    _check_folder(out_dir, resume)
    is_new = not files.exists(out_dir / MANIFEST)
    with (
        study_lock(out_dir) as held,
        gone_if_nothing_began(out_dir, is_new, lambda: not is_new or files.exists(out_dir / CHECKPOINTS)),
    ):
        if held.note:
            say(held.note)
        claim(out_dir, recipe, may=DIRECTIONS)  # it has no space
        files.remove_remains(out_dir)
        _check_checkpoints(out_dir)
        begin(out_dir, recipe)
        if shared is not None:
            write_shared(out_dir, shared)
        at_once = partial(interruption, "stopped at once; what was written before is kept", resume_command)

        def first(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
            return prepare_single(recipe, folder, say) if prepare_first is None else prepare_first(folder)

        try:
            if recipe.resources.executor == "ray-train" or recipe.resources.num_workers > 1:
                found = None if prepare_first is None else prepare_first(out_dir / PREPARED)
                say(f"training with {counted(recipe.resources.num_workers, 'Ray Train worker')}")
                result, prepared = train_with_ray(recipe, out_dir, address, resume_command, report, say=say)
                zero_shot = found or prepared
                record_provenance(out_dir, recipe, zero_shot.pop("provenance"))
                return result, zero_shot
            runner = replace(RUNNER, prepare=first)
            with computing(recipe, out_dir, runner, None, at_once, say, in_process=True) as runtime:
                zero_shot = prepare(runtime, say)
                attempt = 1 + len(list((out_dir / CHECKPOINTS).glob("attempt-*")))
                context = RunContext(progress=progress, report=report, should_stop=lambda: files.seen(out_dir / STOP))
                with stop_file_on_signal(out_dir / STOP):
                    result = _run(runtime.recipe, out_dir, context, attempt, say)
        except StoppedRun as stopped:
            raise interruption(f"{stopped}; the checkpoint is written", resume_command) from None
        except KeyboardInterrupt:
            raise at_once() from None
        return result, zero_shot


def train_with_ray(
    recipe: Recipe,
    out_dir: Path,
    address: str | None = None,
    resume_command: str = "",
    on_epoch: Callable[[Row], None] = lambda row: None,
    runner: Runner | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs one training on ``recipe.resources.num_workers`` Ray Train workers, or resumes one.

    Args:
        recipe: The recipe.
        out_dir: Folder of the training, seen by every node; it must be claimed and locked (``study.lock``).
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        resume_command: Shown after an interruption.
        on_epoch: Given the metrics of every epoch.
        runner: What is trained; by default ``evaluation.training``.
        say: Given texts of what the preparation does.

    Returns:
        Content of ``result.json``, and what the preparation found (``evaluation.training.prepare``).

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        ClusterError: The workers could not start, or died again and again without advancing.
        DivergedError, CarftError: As a worker raised it.
    """
    out_dir = out_dir.resolve()
    runner = runner or replace(RUNNER, prepare=prepare_single)
    interrupted = partial(interruption, "stopped; the newest checkpoint is kept", resume_command)
    number, before = 0, [0, 0]  # attempts in a row that were lost without advancing, and how far they came
    while True:
        attempt = 1 + len(list((out_dir / CHECKPOINTS).glob("attempt-*")))
        spec = TrialSpec("trial", 0, "train", {}, attempt)
        for stale in (STOP, ERROR):  # of an attempt that was killed before its first checkpoint, with this number
            with files.writing(out_dir / stale):
                (out_dir / stale).unlink(missing_ok=True)
        try:
            with computing(recipe, out_dir, runner, address, interrupted, say) as runtime:
                prepared = run_prepare(runtime, say)
                with stop_file_on_signal(out_dir / STOP):
                    # in a task: in this process Ray Train would take Ctrl-C for itself
                    task = ray.remote(num_cpus=0, resources=HEAD_ONLY, max_retries=0)(run_nested)
                    gone = _wait(task.remote(runtime, spec, out_dir), out_dir / METRICS, on_epoch)
        finally:
            shutil.rmtree(out_dir / RAY_FILES, ignore_errors=True)
        if (result := read_result(out_dir)) is not None:
            return result, prepared
        failure = read_failure(out_dir, attempt)
        if failure is not None and failure.outcome == "memory":  # again with the smaller micro-batch that was noted
            number, before = 0, [0, 0]
            continue
        if failure is not None and failure.outcome != "lost":
            raise failure_error(failure, "train", out_dir)
        if files.seen(out_dir / STOP):
            raise interrupted()
        reason, _, details = (gone or "they ended without a message").partition("\n")
        if failure is not None:
            reason, details = failure.reason, failure.details
        log_lost(out_dir, attempt, reason, details)
        now = progress_of(out_dir)
        number, before = 1 if now > before else number + 1, now
        has_begun = failure is not None or read_heartbeat(out_dir, attempt) is not None
        if not has_begun or number >= LOST_ATTEMPTS:
            step = f"Details are in {out_dir / LOG}."
            raise ClusterError(Problem("train", "its workers must stay alive", reason, next_step=step))
        logger.warning("the training gets another attempt: %s", reason)


def _wait(task: ray.ObjectRef, metrics_path: Path, on_epoch: Callable[[Row], None]) -> str:
    """Waits for a training and passes on its epochs; returns why it was lost (``causes.explained``), or nothing."""
    has_ended, offset = False, files.read_new_lines(metrics_path, 0)[1]
    while not has_ended:
        has_ended = bool(ray.wait([task], timeout=CHECK_EVERY_S)[0])
        rows, offset = files.read_new_lines(metrics_path, offset)
        for row in rows:
            on_epoch(row)
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        return explained(error)


def _run(
    recipe: Recipe, out_dir: Path, context: RunContext, attempt: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a training with the micro-batch that fits, from its checkpoint with half of it whenever memory is short."""
    while True:
        tried = fitted(recipe, out_dir, context.world_size)
        try:
            return run_training(tried, out_dir, out_dir / PREPARED, context, attempt)
        except OutOfMemoryError as error:
            failure = memory_failure(error, tried, {}, out_dir, attempt)
            if failure.outcome != "memory":
                raise
        say(failure.reason)  # the exception is gone by now, and with it what it held
        attempt += 1


def _check_folder(out_dir: Path, resume: bool) -> None:
    other = "Give another folder with --out."
    if files.exists(out_dir / JOURNAL):
        raise UsageError(Problem(str(out_dir), "must be the folder of a training", "a study", next_step=other))
    has_training = files.exists(out_dir / MANIFEST)
    if resume and not has_training:
        step = "Leave --resume out to begin one."
        raise UsageError(Problem(str(out_dir), "must hold a training to resume", "none", next_step=step))
    if not resume and has_training:
        done = files.exists(out_dir / RESULT)
        state = "a finished training" if done else "an unfinished training"
        step = f"Add --resume to {'see its result' if done else 'continue it'}. {other}"
        raise UsageError(Problem(str(out_dir), "must be a new folder", state, next_step=step))
    if not has_training:
        files.require_new(out_dir, "--out", is_ours)


def _check_checkpoints(out_dir: Path) -> None:
    """Refuses to begin again unasked when checkpoints are there and none can be read."""
    if files.exists(out_dir / WEIGHTS):  # the checkpoints have done their work
        return
    checkpoint, damaged = newest_checkpoint(out_dir / CHECKPOINTS)
    if checkpoint is None and damaged:
        step = f"Remove {out_dir / 'checkpoint'} to begin again from the first step."
        raise StorageError([*damaged, Problem(str(out_dir), "must hold a checkpoint that can be read", next_step=step)])
