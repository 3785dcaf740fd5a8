"""One training by a group of Ray Train workers, for the ``train`` verb; the loop is that of the trials."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.errors import ClusterError, InterruptedRunError, Problem
from carft_ray.launch.executors import HEAD_ONLY, run_nested
from carft_ray.launch.preparation import run_prepare
from carft_ray.launch.recovery.causes import explained, log_cause
from carft_ray.launch.runtime import RUNNER, Runner, prepare_single
from carft_ray.launch.session import computing
from carft_ray.launch.signals import stop_file_on_signal
from carft_ray.layout import CHECKPOINTS, ERROR, LOG, METRICS, RAY_FILES, STOP
from carft_ray.recipe.schema import Recipe
from carft_ray.study.outcome import TrialSpec, failure_error, progress_of, read_failure, read_heartbeat, read_result
from carft_ray.study.study import LOST_ATTEMPTS

LOOK_EVERY_S = 0.5

logger = logging.getLogger(__name__)


def _ignore(row: dict[str, float]) -> None:
    del row


def train_with_ray(
    recipe: Recipe,
    out_dir: Path,
    address: str | None = None,
    resume_command: str = "",
    on_epoch: Callable[[dict[str, float]], None] = _ignore,
    runner: Runner | None = None,
    lost: tuple[int, list[int]] = (0, [0, 0]),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs one training on ``recipe.resources.num_workers`` Ray Train workers, or goes on with one.

    Args:
        recipe: The recipe.
        out_dir: Folder of the training, seen by every node; it must be claimed and locked (``study.lock``).
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        resume_command: Shown after an interruption.
        on_epoch: Given the metrics of every epoch.
        runner: What is trained; by default ``evaluation.training``.
        lost: Attempts in a row that a machine has ended without advancing, and how far they came (``progress_of``).
        say: Told what the preparation does.

    Returns:
        Content of ``result.json``, and what the preparation found (``evaluation.training.prepare``).

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        ClusterError: The workers could not start, or died again and again without advancing.
        DivergedError, CarftError: As a worker raised it.
    """
    out_dir = out_dir.resolve()
    attempt = 1 + len(list((out_dir / CHECKPOINTS).glob("attempt-*")))
    spec = TrialSpec("trial", 0, "train", {}, attempt)
    for stale in (STOP, ERROR):  # of an attempt that was killed before its first checkpoint, and so had this number
        with files.writing(out_dir / stale):
            (out_dir / stale).unlink(missing_ok=True)
    gone, prepared = "", dict[str, Any]()
    try:
        runner = runner or replace(RUNNER, prepare=prepare_single)
        with computing(recipe, out_dir, runner, address, lambda: _interrupted(resume_command), say) as runtime:
            prepared = run_prepare(runtime, say)
            with stop_file_on_signal(out_dir / STOP):
                # in a task: in this process Ray Train would take Ctrl-C for itself
                task = ray.remote(num_cpus=0, resources=HEAD_ONLY, max_retries=0)(run_nested)
                gone = _wait(task.remote(runtime, spec, out_dir), out_dir / METRICS, on_epoch)
    finally:
        shutil.rmtree(out_dir / RAY_FILES, ignore_errors=True)
    result = read_result(out_dir)
    if result is not None:
        return result, prepared
    failure = read_failure(out_dir, attempt)
    if failure is not None and failure.outcome == "memory":  # again with the smaller micro-batch that was noted
        return train_with_ray(recipe, out_dir, address, resume_command, on_epoch, runner, say=say)
    if failure is not None and failure.outcome != "lost":
        raise failure_error(failure, "train", out_dir)
    if files.seen(out_dir / STOP):
        raise _interrupted(resume_command)
    gone = f"{failure.reason}\n{failure.details}" if failure else gone or "they ended without a word"
    reason, now = log_cause(out_dir, attempt, gone), progress_of(out_dir)
    number = 1 if now > lost[1] else lost[0] + 1
    has_begun = failure is not None or read_heartbeat(out_dir, attempt) is not None
    if has_begun and number < LOST_ATTEMPTS:
        logger.warning("the training gets another attempt: %s", reason)
        return train_with_ray(recipe, out_dir, address, resume_command, on_epoch, runner, (number, now), say)
    step = f"Details are in {out_dir / LOG}."
    raise ClusterError(Problem("train", "its workers must stay alive", reason, next_step=step))


def _wait(task: ray.ObjectRef, metrics_path: Path, on_epoch: Callable[[dict[str, float]], None]) -> str:
    """Waits for a training and tells its epochs; returns why it was lost (``causes.explained``), or nothing."""
    told = len(files.read_json_lines(metrics_path))
    while True:
        ready, _ = ray.wait([task], timeout=LOOK_EVERY_S)
        for row in files.read_json_lines(metrics_path)[told:]:
            told += 1
            on_epoch(row)
        if ready:
            break
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        return explained(error)


def _interrupted(resume_command: str) -> InterruptedRunError:
    step = f"Resume with: {resume_command}" if resume_command else ""
    return InterruptedRunError(Problem("", "stopped; the newest checkpoint is kept", next_step=step))
