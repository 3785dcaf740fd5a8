"""A whole search: folder, study, Ray, preparation, baselines and trials; run again, it continues where it was."""

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from carft_ray.errors import BudgetError, InterruptedRunError, MachineError, Problem
from carft_ray.launch.curves import Curves
from carft_ray.launch.events import BaselineFinished, Decided, Event, Note, Preparing, Started, TrialFinished, to_all
from carft_ray.launch.failures.causes import no_successful_trial
from carft_ray.launch.own_trainer import own_notes
from carft_ray.launch.runtime import RUNNER, Runner, Runtime, Say
from carft_ray.launch.session import begin, computing, prepare
from carft_ray.launch.stop import interruption, used_up
from carft_ray.launch.trainings import STOPPED, run_trainings
from carft_ray.recipe.loading import trust_word
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.shared_targets import decide_targets
from carft_ray.recipe.space.grid import num_trials
from carft_ray.study.holding import is_study
from carft_ray.study.mirror import named
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import TrialRow
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, num_finished, trials
from carft_ray.study.study import Study
from carft_ray.study.uploads import open_log
from carft_ray.study.warm_start import new_sources
from carft_ray.words import counted


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        study_dir: The study directory, absolute.
        best: The trial with the largest objective.
        trials: All trials of the study.
        baselines: Zero-shot and the recipe's baselines.
        num_new: Trials that ended in this search; 0 when there was nothing to do.
        elapsed_s: Seconds that this search took.
        out_of_budget: Which limit of the budget ended it; empty when all trials are finished.
        set_aside: Trials and baselines whose attempts were lost again and again; another search tries them again.
    """

    study_dir: Path
    best: TrialRow
    trials: list[TrialRow]
    baselines: list[TrialRow]
    num_new: int
    elapsed_s: float
    out_of_budget: str = ""
    set_aside: tuple[TrialRow, ...] = ()


def run_search(
    recipe: Recipe,
    study_dir: Path,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    runner: Runner | None = None,
    change_space: bool = False,
    around: Callable[[Study, int], AbstractContextManager[None]] = lambda study, num_before: nullcontext(),
) -> SearchResult:
    """Runs a search to its end, or resumes one.

    ``best.yaml`` follows the best trial all the time.

    When its budget is used up, running trainings are asked to write a checkpoint, and the search ends with its best.
    Ctrl-C (or SIGTERM) asks the running trainings to write a checkpoint and waits for them; a second one does not wait.

    Args:
        recipe: The recipe. What may differ from that of an existing study is in ``study.identity``.
        study_dir: The study directory; made when it is missing.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        on_event: Told what happens, in the calling thread.
        runner: What is trained; by default ``training.run``.
        change_space: The search space may change.
        around: What surrounds the search: a context, given the open study and the number of trials that were finished
            before, such as ``results.study_figure.figure_at_the_end``.

    Returns:
        The best trial, and all rows.

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        NoSuccessfulTrialError: All trials have failed.
        MachineError: No trial is complete, and some were set aside (``SearchResult.set_aside``).
        BudgetError: The budget was used up before a trial was complete.
        RecipeError, UsageError: The folder belongs to another recipe, or is no study.
        HoldOutError: Two roles share images.
        StorageError, ClusterError, DataError: As their messages say.
    """
    began, study_dir = time.monotonic(), study_dir.resolve()
    if recipe.search.warm_start and is_study(study_dir):
        log = open_log(study_dir)
        log.follow()
        new_sources(log, study_dir, recipe)  # one that is refused must not stay in the recipe of the study
    with open_study(study_dir, recipe, change_space, lambda text: on_event(Note(text))) as study:
        study_dir = study.study_dir
        on_event = to_all(on_event, Curves(study_dir, recipe))
        new_sources(study.log, study_dir, recipe)  # a new study vanishes when one is unfit
        begin(study_dir, recipe)
        num_before = num_finished(study.rows())
        recovered = recover_running(study)
        for note in (*study.notes, *own_notes(recipe)):
            on_event(Note(note))
        for row in recovered:
            on_event(BaselineFinished(row) if row.kind == "baseline" else TrialFinished(row, is_best=False))

        def say(text: str) -> None:
            on_event(Preparing(text))

        ended = "" if study.done() else used_up(recipe.budget, 0.0, study.gpu_seconds())
        with around(study, num_before):
            if not ended and not study.done():
                interrupted = partial(_interrupted, study, address)
                with computing(study, recipe, runner or RUNNER, address, interrupted, say) as runtime:
                    ended = _run(study, runtime, on_event, say, began)
                if ended == STOPPED:
                    raise interrupted()
            elapsed_s = time.monotonic() - began
        rows = study.rows()
        best = best_row(rows)
        set_aside = study.set_aside()
        if best is None and ended:
            raise _nothing_within_budget(study, ended, address)
        if best is None and set_aside:
            raise set_aside_error(set_aside, _resume(study, address))
        if best is None:
            raise no_successful_trial(study_dir, rows)
        num_new, baselines = num_finished(rows) - num_before, study.rows("baseline")
        return SearchResult(study_dir, best, rows, baselines, num_new, elapsed_s, ended, tuple(set_aside))


def set_aside_error(rows: Sequence[TrialRow], resume_command: str) -> MachineError:
    """Returns the error for trainings that are set aside: each with its reason, and the command that tries them again.

    Args:
        rows: Of the trainings.
        resume_command: The command.
    """
    problems = [Problem(row.name, f"is set aside: {row.reason}") for row in rows]
    problems[-1] = replace(problems[-1], next_step=f"Nothing is lost. Correct the cause, then: {resume_command}")
    return MachineError(problems)


def _run(study: Study, runtime: Runtime, on_event: Callable[[Event], None], say: Say, began: float) -> str:
    """Prepares and trains; returns what ended it early, as ``run_trainings`` does."""
    on_event(Preparing())
    metrics = prepare(study, runtime, say)
    if zero_shot := study.add_zero_shot(metrics):
        on_event(BaselineFinished(zero_shot))
    decided, note = decide_targets(runtime.recipe)
    runtime = replace(runtime, recipe=decided)
    if note:
        on_event(Decided(note))
    capacity = runtime.capacity
    on_event(Started(num_trials(study.recipe), num_finished(study.rows()), capacity.concurrency, capacity.reason))
    if study.recipe.budget.gpu_hours is not None and not capacity.gpus_per_worker:
        on_event(Note("budget.gpu_hours has no effect here: the trainings use no GPU"))
    return run_trainings(study, runtime, on_event, began)


def _interrupted(study: Study, address: str | None) -> InterruptedRunError:
    finished = num_finished(trials(study.study_dir))  # read anew: Ctrl-C may have spoiled a commit
    what = f"stopped; {finished} of {counted(num_trials(study.recipe), 'trial')} finished"
    return interruption(what, _resume(study, address))


def _nothing_within_budget(study: Study, ended: str, address: str | None) -> BudgetError:
    begun = sum(row.outcome == "running" for row in study.rows())
    rule = f"{ended}, and no trial is complete" + (f"; {counted(begun, 'trial')} stopped" if begun else "")
    hours = study.recipe.budget.gpu_hours
    more = f"--set budget.gpu_hours={2 * hours:g}" if hours is not None and "gpu_hours" in ended else "--wall-time 8h"
    step = f"Give more and continue with: {_resume(study, address)} {more}"
    return BudgetError(Problem("budget", rule, next_step=step))


def _resume(study: Study, address: str | None) -> str:
    command = f"carft-ray resume {shlex.quote(named(study.study_dir))}{trust_word(study.recipe)}"
    return command if address is None else f"{command} --address {shlex.quote(address)}"
