"""One training by a group of Ray Train workers, for the ``train`` verb; the loop is that of the trials."""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.errors import ClusterError, Problem
from carft_ray.launch.failures.causes import STARTED_LATE, explained
from carft_ray.launch.preparation import run_prepare
from carft_ray.launch.ray_cluster.cluster import HEAD_ONLY
from carft_ray.launch.ray_workers import NestedRun
from carft_ray.launch.runtime import RUNNER, Runner
from carft_ray.launch.session import computing
from carft_ray.launch.stop import CHECK_EVERY_S, interruption, stop_file_on_signal
from carft_ray.layout import CHECKPOINTS, LOG, METRICS, RAY_FILES, STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study import outcome
from carft_ray.study.outcome import TrialSpec
from carft_ray.study.study import LOST_ATTEMPTS

Row = dict[str, float]

logger = logging.getLogger(__name__)


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
        out_dir: Folder of the training, seen by every node; it must be held (``study.holding``).
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        resume_command: Shown after an interruption.
        on_epoch: Given the metrics of every epoch.
        runner: What is trained; by default ``training.run``.
        say: Given texts of what the preparation does.

    Returns:
        Content of ``result.json``, and what the preparation found (``training.run.prepare``).

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        ClusterError: The workers could not start, or died again and again without advancing.
        DivergedError, CarftError: As a worker raised it.
    """
    out_dir = out_dir.resolve()
    runner = runner or RUNNER
    interrupted = partial(interruption, "stopped; the newest checkpoint is kept", resume_command)
    number, before = 0, [0, 0]  # attempts in a row that were lost without advancing, and how far they came
    while True:
        attempt = 1 + len(list((out_dir / CHECKPOINTS).glob("attempt-*")))
        spec = TrialSpec("trial", 0, "train", {}, attempt)
        for stale in (STOP,):  # of an attempt of this number, which ended without a checkpoint
            files.remove(out_dir / stale)
        try:
            with computing(recipe, out_dir, runner, address, interrupted, say) as runtime:
                prepared = run_prepare(runtime, say)
                with stop_file_on_signal(out_dir / STOP):
                    actor: Any = ray.remote(num_cpus=0, resources=HEAD_ONLY)(NestedRun).remote()
                    gone = _wait(actor.run.remote(runtime, spec, out_dir), out_dir, on_epoch)
        finally:
            shutil.rmtree(out_dir / RAY_FILES, ignore_errors=True)
        if (result := outcome.read_result(out_dir)) is not None:
            return result, prepared
        failure: outcome.Failure | None = None
        if failure is not None and failure.outcome == "memory":  # again with the smaller micro-batch that was noted
            number, before = 0, [0, 0]
            continue
        if failure is not None and failure.outcome != "lost":
            raise outcome.failure_error(failure, "train", out_dir)
        if files.seen(out_dir / STOP):
            raise interrupted()
        reason, _, details = (gone or "they ended without a message").partition("\n")
        if failure is not None:
            reason, details = failure.reason, failure.details
        elif runtime.attached and STARTED_LATE in reason:  # it has only waited for nodes
            logger.warning("the training waits again: %s", reason)
            continue
        outcome.log_lost(out_dir, attempt, reason, details)
        now = outcome.progress_of(out_dir)
        number, before = 1 if now > before else number + 1, now
        has_begun = failure is not None or files.seen(out_dir / LOG)
        if not has_begun or number >= LOST_ATTEMPTS:
            step = f"Details are in {out_dir / LOG}."
            raise ClusterError(Problem("train", "its workers must stay alive", reason, next_step=step))
        logger.warning("the training gets another attempt: %s", reason)


def _wait(task: ray.ObjectRef[str], out_dir: Path, on_epoch: Callable[[Row], None]) -> str:
    """Waits for an attempt and passes on its epochs; returns why it was lost (``causes.explained``)."""
    has_ended, offset = False, files.read_new_lines(out_dir / METRICS, 0)[1]
    while not has_ended:
        has_ended = bool(ray.wait([task], timeout=CHECK_EVERY_S)[0])
        rows, offset = files.read_new_lines(out_dir / METRICS, offset)
        for row in rows:
            on_epoch(row)
    try:
        return str(ray.get(task))
    except ray.exceptions.RayError as error:
        return explained(error)
