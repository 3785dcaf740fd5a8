"""A single training: the folder of `train`, prepared, run here or by Ray Train workers, resumable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.copies.shared_images import SharedRow, write_shared
from carft_ray.errors import OutOfMemoryError, Problem, UsageError
from carft_ray.launch.micro_batch import fitted, memory_failure
from carft_ray.launch.runtime import RUNNER
from carft_ray.launch.session import begin, computing, prepare
from carft_ray.launch.stop import interruption, stop_file_on_signal
from carft_ray.layout import ATTEMPT, MANIFEST, OWNER, PREPARED, RESULT, STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.study.holding import check_fit, gone_if_nothing_began, held, is_ours, is_study
from carft_ray.study.identity import claim, compare
from carft_ray.study.provenance import record_provenance
from carft_ray.training.loop import StoppedRun
from carft_ray.training.run import run_training
from carft_ray.training.run_context import RunContext
from carft_ray.words import counted

Row = dict[str, float]


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
    check_fit(out_dir)
    compare(out_dir, recipe, change_space=True)  # before anything is written; it has no space
    is_new, log = not files.exists(out_dir / MANIFEST), Log(Folder(out_dir / OWNER))
    with (
        held(log, say),
        gone_if_nothing_began(out_dir, log, is_new, lambda: bool(list(out_dir.glob(f"{ATTEMPT}*")))),
    ):
        claim(out_dir, recipe, change_space=True)
        files.remove_remains(out_dir)
        begin(out_dir, recipe)
        if shared is not None:
            write_shared(out_dir, shared)
        at_once = partial(interruption, "stopped at once; what was written before is kept", resume_command)

        def first(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
            return RUNNER.prepare(recipe, folder, say) if prepare_first is None else prepare_first(folder)

        try:
            if recipe.resources.executor == "ray-train" or recipe.resources.num_workers > 1:
                from carft_ray.launch.runs.ray_train import train_with_ray

                found = None if prepare_first is None else prepare_first(out_dir / PREPARED)
                say(f"training with {counted(recipe.resources.num_workers, 'Ray Train worker')}")
                result, prepared = train_with_ray(recipe, out_dir, address, resume_command, report, say=say)
                zero_shot = found or prepared
                record_provenance(out_dir, recipe, zero_shot.pop("provenance"))
                return result, zero_shot
            runner = replace(RUNNER, prepare=first)
            with computing(recipe, out_dir, runner, None, at_once, say, in_process=True) as runtime:
                zero_shot = prepare(runtime, say)
                attempt = 1 + len(list(out_dir.glob(f"{ATTEMPT}*")))
                context = RunContext(progress=progress, report=report, should_stop=lambda: files.seen(out_dir / STOP))
                with stop_file_on_signal(out_dir / STOP):
                    result = _run(runtime.recipe, out_dir, context, attempt, say)
        except StoppedRun as stopped:
            kept = (
                "the checkpoint is written" if recipe.train.function is None else "what train.function keeps is there"
            )
            raise interruption(f"{stopped}; {kept}", resume_command) from None
        except KeyboardInterrupt:
            raise at_once() from None
        return result, zero_shot


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
    if is_study(out_dir):
        raise UsageError(Problem(str(out_dir), "must be the folder of a training", "a study", next_step=other))
    has_training = files.exists(out_dir / MANIFEST)
    if resume and not has_training:
        step = "Leave --resume out to begin one."
        raise UsageError(Problem(str(out_dir), "must hold a training to resume", "none", next_step=step))
    if not resume and has_training:
        done = bool(list(out_dir.glob(f"{ATTEMPT}*/{RESULT}")))
        state = "a finished training" if done else "an unfinished training"
        step = f"Add --resume to {'see its result' if done else 'continue it'}. {other}"
        raise UsageError(Problem(str(out_dir), "must be a new folder", state, next_step=step))
    if not has_training:
        files.require_new(out_dir, "--out", lambda name: is_ours(out_dir / name))
