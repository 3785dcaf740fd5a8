"""What `search`, `resume`, `confirm`, `train` and `reproduce` do. A ``Plan`` says what is trained, ``run`` does it:

with open_study(...) as study:          # the claim, no stop file of before, the recipe, what a kill has left
    resolved.yaml, recovery             # of this command; what has ended is recorded, the rest is queued
    with computing(...) as runtime:     # shared images, then Ray or this process; signals are InterruptedRunError
        prepare(study, runtime, say)    # sets, caches, heads, zero-shot; what they are, into the log
        run_trainings(study, runtime)   # ``launch.run_trainings``
    end(ran)                            # the result, or why there is none

Killed and run again, each continues where it was.
"""

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from carft_ray import environment, files
from carft_ray.data.cache import cache_dir
from carft_ray.data.duplicates.find_duplicates import SharedRow, digests_of_tests
from carft_ray.data.duplicates.shared_images import shared_of_study, write_shared
from carft_ray.errors import (
    BudgetError,
    CarftError,
    DivergedError,
    InterruptedRunError,
    Problem,
    UsageError,
    interruption,
)
from carft_ray.launch import events
from carft_ray.launch.budget import nothing_within_budget, used_up
from carft_ray.launch.cluster.capacity import Node, crowding
from carft_ray.launch.cluster.cluster import running_ray
from carft_ray.launch.cluster.ray_errors import no_successful_trial, set_aside_error
from carft_ray.launch.cluster.ray_private import forget_pickled_columns
from carft_ray.launch.curves import Curves
from carft_ray.launch.events import Note, OnEvent, Preparing
from carft_ray.launch.nodes import await_nodes, may_grow
from carft_ray.launch.run_trainings import STOPPED, run_trainings
from carft_ray.launch.stop import interruptions_as
from carft_ray.launch.workers.file_transfer import start_files
from carft_ray.launch.workers.mailbox import Mailbox, start_mailbox
from carft_ray.launch.workers.own_trainer import own_notes
from carft_ray.launch.workers.preparation import run_prepare
from carft_ray.launch.workers.runtime import Runner, Runtime, Say, decide_targets, make_runtime
from carft_ray.launch.workers.worker import RUNNER
from carft_ray.layout import FOLDERS, LOG, RAY_LOG, RESOLVED
from carft_ray.recipe.loading import dump_recipe, trust_word
from carft_ray.recipe.schema.recipe import Recipe, single
from carft_ray.recipe.space import num_trials
from carft_ray.store.attempt_files import progress_words
from carft_ray.store.log import log_of
from carft_ray.study.holding import is_ours
from carft_ray.study.ledger import note_test_sets
from carft_ray.study.opening import open_study
from carft_ray.study.place import DRIVEN, address_in, named
from carft_ray.study.provenance import made_of, record_provenance
from carft_ray.study.recipe_identity import recorded_recipe, study_recipe
from carft_ray.study.rows import num_finished
from carft_ray.study.snapshot import Snapshot, snapshot
from carft_ray.study.soups import Soup, of_study
from carft_ray.study.soups import enter as enter_soups
from carft_ray.study.study import Study
from carft_ray.study.take_over import recover_given, recover_running
from carft_ray.study.training import Kind, TrialRow, result_of
from carft_ray.words import counted

NAME = "train"  # of the training of `train`
Trainings = Mapping[str, dict[str, Any]]
Around = Callable[[Study, int], AbstractContextManager[None]]
R = TypeVar("R")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a command trains, from where the values come, and who is told.

    Attributes:
        recipe: The recipe. What may differ from that of an existing study is in ``study.recipe_identity``.
        study_dir: The study directory; made when it is missing.
        address: Ray cluster to attach to; None: a Ray of our own on this machine.
        on_event: Told what happens, in the calling thread.
        runner: What is trained; by default ``training.run``.
        resume_command: Shown after an interruption.
        given: Called with the open study and before anything is trained. Returns the values over the recipe's ``train``
            by name, ``seed`` and ``alpha`` among them. None: the baselines of the recipe, and what the sampler proposes
            within the budget.
        kind: What the trainings are that count.
        alone: There is one training, that of `train`: prepared even when it has finished, and in this process when it
            has one worker.
        change_space: The search space may change.
        again: Why a search goes on after a read of the test sets.
        soups: Called with the open study once all its trainings have ended; returns what soups are made then, by name
            (``study.soups``). None: no soups.
        around: What surrounds preparation and trainings: a context, given the open study and the number of trials that
            were finished before, such as ``results.figure.figure_at_the_end``.
        shared: Images that stand in two roles; None: those of the study, or they are found now.
    """

    recipe: Recipe
    study_dir: Path
    address: str | None = None
    on_event: OnEvent = lambda event: None
    runner: Runner = RUNNER
    _: KW_ONLY
    resume_command: str = ""
    given: Callable[[Study], Trainings] | None = None
    kind: Kind = "trial"
    alone: bool = False
    change_space: bool = False
    again: str | None = None
    soups: Callable[[Study], Mapping[str, Soup]] | None = None
    around: Around = lambda study, num_before: nullcontext()
    shared: Sequence[SharedRow] | None = None

    @property
    def in_process(self) -> bool:
        """Whether all runs in this process, without Ray."""
        asked = self.recipe.resources
        return asked.executor == "debug" or (self.alone and asked.executor != "ray-train" and asked.num_workers == 1)


@dataclass(frozen=True)
class Ran:
    """What has become of a plan.

    Attributes:
        study: The study at the end, with the recipe of the plan.
        num_new: Trials that have ended in it; 0 when there was nothing to do.
        elapsed_s: Seconds that it took.
        out_of_budget: Which limit of the budget ended it; empty when nothing is left.
        zero_shot: What ``prepare`` found; empty when there was nothing to do.
        given: What the plan has given.
        resume_command: Continues it.
    """

    study: Snapshot
    num_new: int
    elapsed_s: float
    out_of_budget: str
    zero_shot: dict[str, Any]
    given: Trainings | None
    resume_command: str

    @property
    def set_aside(self) -> list[TrialRow]:
        """Trials, baselines and soups whose attempts were lost again and again; another search tries them again."""
        return [row for row in (*self.study.trials, *self.study.all_baselines, *self.study.soups) if row.set_aside]


def run(plan: Plan, end: Callable[[Ran], R]) -> R:
    """Claims a study, trains what a plan says, and returns what ``end`` makes of it while the study is held.

    When the budget is used up, running trainings are asked to write a checkpoint, and the plan has run. Ctrl-C (or
    SIGTERM, or the end of the terminal) asks them the same and waits for them; a second one does not wait.

    Args:
        plan: The plan.
        end: Given how the plan was run; returns the result, or raises why there is none.

    Raises:
        InterruptedRunError: Stopped on request; run it again to resume.
        RecipeError, UsageError: The folder belongs to another recipe, or is no study.
        HoldOutError: Two roles share images.
        StorageError, ClusterError, DataError: As their messages say.
    """
    began, recipe, proposes = time.monotonic(), plan.recipe, plan.given is None
    told = Preparing if plan.alone else Note  # `train` resumes what a kill has left, and that is no warning
    confirms = plan.kind in ("confirm", "soup")  # which is no search: `resume` uses the recipe of the last one
    with open_study(
        plan.study_dir,
        recipe,
        plan.change_space,
        lambda text: plan.on_event(told(text)),
        keeps_recipe=confirms,
        is_search=proposes,
        again=plan.again,
    ) as study:
        on_event = events.to_all(plan.on_event, Curves(study.study_dir, recipe))
        trainings = None if plan.given is None else plan.given(study)
        of_study = study_recipe(study.study_dir, study.log) if confirms else recipe
        files.write_text(study.study_dir / RESOLVED, dump_recipe(of_study))
        num_before = num_finished(study.searched())
        recovered = recover_running(study) if trainings is None else recover_given(study, trainings, plan.kind)
        for note in (*study.notes, *(own_notes(recipe) if proposes else ())):
            on_event(Note(note))
        for row in recovered:
            is_baseline = row.kind == "baseline" and not row.repeat_of
            on_event(events.BaselineFinished(row) if is_baseline else events.TrialFinished(row, is_best=False))

        def follow() -> bool:
            """Queues the soups once all trainings have ended; tells whether there are any to make."""
            if plan.soups is not None and study.done():
                enter_soups(study, plan.soups(study))
                if names := [spec.name for spec in study.waiting]:
                    on_event(Preparing(f"making {counted(len(names), 'soup')}: {', '.join(names)}"))
            return not study.done()

        def interrupted() -> InterruptedRunError:
            return interruption(f"stopped; {_progress(plan, study, trainings)}", plan.resume_command)

        follow()  # after a kill, say
        ended = used_up(recipe.budget, 0.0, study.gpu_seconds()) if proposes and not study.done() else ""
        zero_shot: dict[str, Any] = {}
        with plan.around(study, num_before):
            if not ended and (plan.alone or not study.done()):
                since = began if proposes else None
                try:
                    with computing(plan, study, interrupted, lambda text: on_event(Preparing(text)), since) as runtime:
                        zero_shot, runtime = _prepare_all(plan, study, runtime, trainings, on_event)
                        if not study.done():
                            ended = run_trainings(study, runtime, on_event, since)
                        if not ended and follow():
                            ended = run_trainings(study, runtime, on_event, since)
                except BudgetError as error:  # it has waited for nodes until then
                    ended = str(error)
            if ended == STOPPED:
                raise interrupted()
            elapsed_s = time.monotonic() - began
        now = study.snapshot()
        num_new = now.num_finished - num_before
        return end(Ran(now, num_new, elapsed_s, ended, zero_shot, trainings, plan.resume_command))


def _prepare_all(
    plan: Plan, study: Study, runtime: Runtime, trainings: Trainings | None, on_event: OnEvent
) -> tuple[dict[str, Any], Runtime]:
    """Prepares, and says what begins; returns what ``prepare`` found of zero-shot, and the runtime of the trainings."""
    if not plan.alone:
        on_event(Preparing())
    zero_shot = prepare(study, runtime, lambda text: on_event(Preparing(text)))
    if row := study.add_zero_shot(zero_shot):
        on_event(events.BaselineFinished(row))
    decided, note = decide_targets(runtime.recipe, None if trainings is None else trainings.values())
    if note:
        on_event(events.Decided(note))
    capacity = runtime.capacity
    only_soups = bool(study.waiting) and all(spec.kind == "soup" for spec in study.waiting)
    if not plan.alone and not only_soups:
        rows = study.searched() if plan.kind == "trial" else study.rows(plan.kind)
        wanted, finished = _counts(plan, rows, trainings)
        on_event(events.Started(wanted, finished, capacity.concurrency, capacity.reason, plan.kind))
    elif plan.alone and not plan.in_process:
        on_event(Preparing(f"training with {counted(plan.recipe.resources.num_workers, 'Ray Train worker')}"))
    if trainings is None and plan.recipe.budget.gpu_hours is not None and not capacity.gpus_per_worker:
        on_event(Note("budget.gpu_hours has no effect here: the trainings use no GPU"))
    return zero_shot, replace(runtime, recipe=decided)


def _counts(plan: Plan, rows: Sequence[TrialRow], trainings: Trainings | None) -> tuple[int, int]:
    """Returns how many trainings a plan has, and how many of them have ended."""
    if trainings is None:
        return num_trials(plan.recipe), num_finished(rows)
    return len(trainings), num_finished(row for row in rows if row.name in trainings)


def _progress(plan: Plan, study: Study, trainings: Trainings | None) -> str:
    """Returns how far a plan is, by what lies in the folder: Ctrl-C may have spoiled a commit."""
    if plan.alone:
        training = f"{FOLDERS[plan.kind]}/{NAME}"
        words = progress_words(study.study_dir / training, study.log.store.known(training))
        return f"it continues from {words}"
    now = snapshot(study.study_dir)
    if plan.kind == "soup":
        return f"{num_finished(now.soups)} of {counted(len(now.soups), 'soup')} made"
    rows = now.searched if plan.kind == "trial" else now.of(plan.kind)
    wanted, finished = _counts(plan, rows, trainings)
    return f"{finished} of {counted(wanted, 'trial' if trainings is None else 'training')} finished"


@contextlib.contextmanager
def computing(
    plan: Plan,
    study: Study,
    interrupted: Callable[[], InterruptedRunError],
    say: Say,
    since: float | None = None,
) -> Iterator[Runtime]:
    """Compares the images of the roles, then starts Ray, or attaches to one, for as long as the block lasts.

    Args:
        plan: What is run.
        study: The study.
        interrupted: Returns what a signal becomes.
        say: Told what is being done.
        since: When the budget's wall time began; None: it does not count.

    Raises:
        InterruptedRunError: A signal came.
        BudgetError: The wall time has passed before a node came.
        HoldOutError: Two roles share images.
        ClusterError: There is no Ray, or a training does not fit.
    """
    forget_pickled_columns()  # before a set is opened here
    recipe, shared, address, folder = plan.recipe, plan.shared, plan.address, study.study_dir
    with interruptions_as(interrupted, study.stop):
        rows = shared_of_study(recipe, cache_dir(recipe), folder, say) if shared is None else shared
        ray = running_ray(address, folder / RAY_LOG, study.stop, recipe.resources.wait_for_nodes or 0.0, say)
        with nullcontext((_this_machine(recipe),)) if plan.in_process else ray as nodes:
            write_shared(folder, rows)
            if shared is None:
                note_test_sets(study.log, partial(digests_of_tests, recipe, cache_dir(recipe)))
            attached = address is not None and not plan.in_process
            grows = attached and may_grow()
            if attached:
                nodes = await_nodes(recipe, nodes, grows, study, say, since)
            runtime = make_runtime(recipe, folder, nodes, plan.runner, grows)
            if slow := crowding(recipe, runtime.capacity, nodes):
                logger.warning("%s", slow)
            box = Mailbox() if plan.in_process else start_mailbox()
            runtime = replace(runtime, in_process=plan.in_process, attached=attached, mailbox=box)
            if attached:
                last, first = (study.log.number, study.log.digest), study.log.digest_of(1)
                served, bucket = start_files(folder, address_in(folder, DRIVEN) or "", last)
                runtime = replace(runtime, files=served, commit=last, first_commit=first, bucket=bucket)
            yield runtime


def prepare(study: Study, runtime: Runtime, say: Say) -> dict[str, Any]:
    """Does what all trainings share, and notes in the log what their numbers come from.

    Returns:
        Zero-shot metrics and counts (``training.run.prepare``).

    Raises:
        DataError: Images, classes, prompts or weights are not those of the study, in which nothing has changed.
        CarftError: As ``run_prepare``.
    """
    metrics = run_prepare(replace(runtime, made_of=made_of(study.log)), say, study.stop.asked)
    record_provenance(runtime.study_dir, study.log, runtime.recipe, metrics.pop("provenance", None))
    return metrics


def _this_machine(recipe: Recipe) -> Node:
    """Returns this machine; what the recipe asks for is taken to be there, as nobody else shares it."""
    from torch import cuda  # what runs here needs it anyway

    asked = recipe.resources
    cpus, gpus = (asked.cpus_per_worker or 1) * asked.num_workers, (asked.gpus_per_worker or 0) * asked.num_workers
    return Node(max(environment.usable_cores(), cpus), max(cuda.device_count(), gpus), asked.accelerator or "")


def run_search(plan: Plan) -> Ran:
    """Runs a search to its end, or resumes one. ``best.yaml`` follows the best trial all the time.

    Args:
        plan: The plan; its ``resume_command`` is made here.

    Returns:
        How it was run; its study has a best trial.

    Raises:
        NoSuccessfulTrialError: All trials have failed.
        MachineError: No trial is complete, and some were set aside (``Ran.set_aside``).
        BudgetError: The budget was used up before a trial was complete.
        CarftError: As ``run``.
    """
    recipe, study_dir = plan.recipe, plan.study_dir.resolve()
    again = f"carft-ray resume {shlex.quote(named(study_dir))}{trust_word(recipe)}"
    again += "" if plan.address is None else f" --address {shlex.quote(plan.address)}"

    def found(ran: Ran) -> Ran:
        if ran.study.best is not None:
            return ran
        if ran.out_of_budget:
            raise nothing_within_budget(recipe, ran.study.trials, ran.out_of_budget, again)
        if ran.set_aside:
            raise set_aside_error(ran.set_aside, again)
        raise no_successful_trial(study_dir, ran.study.trials)

    kinds = recipe.search.soups
    soups = (lambda study: of_study(study.snapshot(), kinds)) if kinds else None
    return run(replace(plan, resume_command=again, soups=soups), found)


def run_soups(plan: Plan, soups: Mapping[str, Soup]) -> Snapshot:
    """Makes soups of a study, as trainings of a search are run; what is made already is left alone.

    Args:
        plan: The plan.
        soups: By name (``study.soups``).

    Returns:
        The study.

    Raises:
        CarftError: As ``run``; one whose attempts were lost again and again is a ``MachineError``.
    """

    def found(ran: Ran) -> Snapshot:
        if set_aside := [row for row in ran.study.soups if row.set_aside and row.name in soups]:
            raise set_aside_error(set_aside, plan.resume_command)
        return ran.study

    return run(replace(plan, kind="soup", given=lambda study: {}, soups=lambda study: soups), found)


def run_confirm(plan: Plan, end: Callable[[Snapshot], R]) -> R:
    """Trains what a plan gives, as trials of a search are trained; what is finished already is left alone.

    Trainings of one seed share the frozen model's targets: the first one that needs them stores them.

    Args:
        plan: The plan.
        end: Given the study while it is still held, so that files that it writes are uploaded, too.

    Returns:
        What ``end`` returns.

    Raises:
        MachineError: Trainings were set aside; run it again to try these again.
        DataError: Images, classes or weights are no longer those of the study.
        CarftError: As ``run``.
    """

    def found(ran: Ran) -> R:
        rows = [row for row in ran.study.confirmations if row.name in (ran.given or ())]
        if set_aside := [row for row in rows if row.set_aside]:
            raise set_aside_error(set_aside, plan.resume_command)
        return end(ran.study)

    return run(replace(plan, kind="confirm"), found)


def train_once(plan: Plan, resume: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs one training to its end, or resumes one: one worker in this process, more of them with Ray.

    Its folder is a study of one trial, whose values are those of the recipe. It searches nothing. Ctrl-C (or SIGTERM)
    writes a checkpoint and ends.

    Args:
        plan: The plan; what its recipe says of a search has no effect.
        resume: Whether a training in the folder is to be resumed; without it the folder must be new.

    Returns:
        Content of ``result.json``, and what ``prepare`` found of zero-shot.

    Raises:
        UsageError: The folder holds something, or nothing to resume.
        MachineError: The attempts were lost one after the other; run it again to try more.
        DivergedError: The training has diverged.
        CarftError: As ``run``.
    """
    out_dir = plan.study_dir.resolve()
    _check_folder(out_dir, resume)

    def found(ran: Ran) -> tuple[dict[str, Any], dict[str, Any]]:
        [row] = ran.study.trials
        if row.set_aside:
            raise set_aside_error([row], plan.resume_command)
        if row.outcome == "complete":
            return result_of(out_dir, row), ran.zero_shot
        kind = DivergedError if row.outcome == "diverged" else CarftError
        raise kind(Problem(NAME, row.reason, next_step=f"Details are in {row.folder(out_dir) / LOG}."))

    one = replace(plan, recipe=single(plan.recipe), study_dir=out_dir, given=lambda study: {NAME: {}}, alone=True)
    return run(one, found)


def _check_folder(out_dir: Path, resume: bool) -> None:
    other = "Give another folder with --out."
    kept = recorded_recipe(out_dir, log_of(out_dir))
    if kept is not None and kept.search.space:
        raise UsageError(Problem(str(out_dir), "must be the folder of a training", "a study", next_step=other))
    if resume and kept is None:
        step = "Leave --resume out to start one."
        raise UsageError(Problem(str(out_dir), "must contain a training to resume", "none", next_step=step))
    if not resume and kept is not None:
        done = snapshot(out_dir).best is not None
        state = "a finished training" if done else "an unfinished training"
        step = f"Add --resume to {'see its result' if done else 'continue it'}. {other}"
        raise UsageError(Problem(str(out_dir), "must be a new folder", state, next_step=step))
    if kept is None:
        files.require_new(out_dir, "--out", lambda name: is_ours(out_dir / name))
