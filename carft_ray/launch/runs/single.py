"""A single training: a study of one trial, whose values are those of the recipe. It searches nothing."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.copies.shared_images import SharedRow
from carft_ray.errors import CarftError, DivergedError, InterruptedRunError, Problem, UsageError
from carft_ray.launch.curves import Curves
from carft_ray.launch.events import Event, Note, Stopping, TrialEpoch, TrialFinished, to_all
from carft_ray.launch.runs.search import set_aside_error
from carft_ray.launch.runtime import RUNNER, Runner
from carft_ray.launch.session import begin, computing, prepare
from carft_ray.launch.stop import interruption
from carft_ray.launch.trainings import run_trainings
from carft_ray.layout import LOG
from carft_ray.recipe.schema.recipe import Recipe, single
from carft_ray.study import outcome
from carft_ray.study.holding import is_ours
from carft_ray.study.identity import has_recipe, is_single
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import TrialRow
from carft_ray.study.recovery import recover
from carft_ray.study.rows import best_row, trials
from carft_ray.words import counted

NAME = "train"  # of the training

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
    shared: Sequence[SharedRow] | None = None,
    runner: Runner | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs one training to its end, or resumes one: one worker in this process, more of them with Ray.

    Ctrl-C (or SIGTERM) writes a checkpoint and ends.

    Args:
        recipe: The recipe; what it says of a search has no effect.
        out_dir: Folder of the study.
        resume: Whether a training in the folder is to be resumed; without it the folder must be new.
        resume_command: Shown after an interruption.
        say: Given texts of what is being done.
        progress: Given the metrics every few steps (one worker, in this process).
        report: Given the metrics of every epoch.
        address: Ray cluster to attach to when there are several workers.
        shared: Images that stand in two roles; None: they are found now.
        runner: What is trained; by default ``training.run``.

    Returns:
        Content of ``result.json``, and what ``prepare`` found of zero-shot.

    Raises:
        UsageError: The folder holds something, or nothing to resume.
        InterruptedRunError: Stopped on request; run it again to resume.
        MachineError: The attempts were lost one after the other; run it again to try more.
        DivergedError: The training has diverged.
        HoldOutError: Two roles share images.
        CarftError: As ``run_search``.
    """
    recipe, out_dir = single(recipe), out_dir.resolve()
    _check_folder(out_dir, resume)
    in_process = recipe.resources.executor != "ray-train" and recipe.resources.num_workers == 1

    def tell(event: Event) -> None:
        if isinstance(event, TrialEpoch):
            report(event.metrics)
        elif isinstance(event, Note):
            logger.warning("%s", event.text)
        elif isinstance(event, Stopping):
            say(event.line())

    with open_study(out_dir, recipe, tell=say) as study:
        begin(out_dir, recipe)
        on_event = to_all(tell, Curves(out_dir, recipe))
        study.asks = False
        study.enter("trial", {NAME: {}})
        for row in recover(study, "trial"):
            on_event(TrialFinished(row, is_best=False))
        row = study.rows()[0]

        def interrupted() -> InterruptedRunError:
            words = outcome.progress_words(row.folder(out_dir), study.log.known(row.training))
            return interruption(f"stopped; it continues from {words}", resume_command)

        with computing(study, recipe, runner or RUNNER, address, interrupted, say, shared, in_process) as runtime:
            zero_shot = prepare(study, runtime, say)
            study.add_zero_shot(zero_shot)
            if not in_process:
                say(f"training with {counted(recipe.resources.num_workers, 'Ray Train worker')}")
            if not study.done() and run_trainings(study, runtime, on_event, progress=progress):
                raise interrupted()
        return _result(out_dir, study.rows()[0], resume_command), zero_shot


def _result(study_dir: Path, row: TrialRow, resume_command: str) -> dict[str, Any]:
    """Returns the content of ``result.json``, or raises why there is none."""
    if row.set_aside:
        raise set_aside_error([row], resume_command)
    if row.outcome == "complete":
        return outcome.result_of(study_dir, row)
    kind = DivergedError if row.outcome == "diverged" else CarftError
    raise kind(Problem(NAME, row.reason, next_step=f"Details are in {row.folder(study_dir) / LOG}."))


def _check_folder(out_dir: Path, resume: bool) -> None:
    other = "Give another folder with --out."
    has_training = has_recipe(out_dir)
    if has_training and not is_single(out_dir):
        raise UsageError(Problem(str(out_dir), "must be the folder of a training", "a study", next_step=other))
    if resume and not has_training:
        step = "Leave --resume out to start one."
        raise UsageError(Problem(str(out_dir), "must contain a training to resume", "none", next_step=step))
    if not resume and has_training:
        done = best_row(trials(out_dir)) is not None
        state = "a finished training" if done else "an unfinished training"
        step = f"Add --resume to {'see its result' if done else 'continue it'}. {other}"
        raise UsageError(Problem(str(out_dir), "must be a new folder", state, next_step=step))
    if not has_training:
        files.require_new(out_dir, "--out", lambda name: is_ours(out_dir / name))
