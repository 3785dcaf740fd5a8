"""The commands `search`, `resume`, `confirm` and `train` as functions; others: ``api.trained`` and ``api.answers``.

The command line calls them: checks, seal of the test sets and errors (``carft_ray.errors``) are the same.

    >>> import carft_ray
    >>> study = carft_ray.search("recipe.yaml", "studies/first", overrides={"search.trials": 2})
    >>> study.best.name in str(study)
    True
    >>> study = carft_ray.resume("studies/first", trials="+1")
    >>> study.trials().num_rows
    3

They print only progress and warnings: a live table on a terminal, one updated output in a notebook. On Ctrl-C, or the
stop button of a notebook, running trainings write a checkpoint; the same call resumes. Torch and Ray are loaded when a
function needs them.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carft_ray.api.answers import Answer, Searched
from carft_ray.api.checks import (
    Overrides,
    RecipeLike,
    as_command,
    check_recipe,
    load_recipe,
    override_words,
    several,
)
from carft_ray.errors import Problem, RecipeError, UsageError, require_choice
from carft_ray.recipe.schema.recipe import BudgetConfig, Recipe, TrackingConfig, alone, with_keys
from carft_ray.results.reading import study_view
from carft_ray.store.log import log_of
from carft_ray.study.holding import is_study
from carft_ray.study.place import in_bucket, named, own_folder
from carft_ray.study.recipe_identity import recipe_for_use, recorded_recipe, study_recipe
from carft_ray.study.snapshot import Snapshot
from carft_ray.training.own_function import require_trusted
from carft_ray.ui import console
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.launch.workers.runtime import Runner
    from carft_ray.results.confirm_plan import Stage
    from carft_ray.study.study import Study

Trainer = Callable[..., Any]

WINNER_RULES = ("search", "confirmed")
SAME_CALL = "the same call again"
logger = logging.getLogger(__name__)


@as_command
def search(
    recipe: RecipeLike,
    study: str | Path,
    *,
    overrides: Overrides = (),
    train: Trainer | None = None,
    address: str | None = None,
    change_space: bool = False,
    warm_start: Sequence[str | Path] = (),
    again: str | None = None,
    trust: bool = False,
    trust_paths: bool = False,
    notify_url: str | None = None,
    progress: bool = True,
    strict: bool = True,
) -> Searched:
    """Searches for the best hyperparameters. The same call on the same study resumes the search.

    Args:
        recipe: Same as in ``load_recipe``.
        study: The study directory, or its address, ``s3://...``; created if it does not exist.
        overrides: Same as in ``load_recipe``. ``{"resources.executor": "debug"}`` trains in this process, without Ray.
        train: Your own fine-tuning in place of the built-in one, ``train(values, context)``
            (``launch.workers.own_trainer``). Give it again to resume.
        address: Ray cluster to attach to: ``host:port``, or ``auto`` for the one that this machine or process belongs
            to; None: a new local Ray on this machine.
        change_space: Allow another search space for the study.
        warm_start: Folders or addresses of other studies whose trials are passed to the sampler.
        again: Reason to train more although the test sets were read; every report shows it.
        trust: Run the code that ``train.function`` names.
        trust_paths: Same as in ``load_recipe``.
        notify_url: Webhook that gets JSON on a new best, on a failed trial and at the end.
        progress: Show progress. False: only warnings.
        strict: Raise when trainings were set aside. False: they are in the result.

    Returns:
        The study, with the results of the search.

    Raises:
        InterruptedRunError: Stopped on request; the same call resumes.
        RecipeError, DataError, HoldOutError: Same as in ``load_recipe``; or the recipe searches nothing or is not that
            of the study, or the test sets of the study were read and no reason is given.
        NoSuccessfulTrialError, BudgetError: All trials have failed; the budget was used up before one was complete.
        MachineError: Trainings were set aside.
        UsageError: The folder holds the training of a `train`, or no study.
        StorageError, ClusterError: See their messages.
    """
    study = own_folder(study)
    if is_study(study) and (kept := recorded_recipe(study.resolve(), log_of(study))) is not None:
        study_view.require_search(study, kept)
    value = load_recipe(recipe, overrides, trust_paths)
    further = [str(path) if in_bucket(path) else str(Path(path).resolve()) for path in several(warm_start)]
    value = with_keys(value, search={"warm_start": tuple(dict.fromkeys((*value.search.warm_start, *further)))})
    from carft_ray.recipe.rules import check_searchable

    if problems := check_searchable(value):
        raise RecipeError(problems)
    value, runner = _with_trainer(value, train, trust)
    from carft_ray.recipe.loading import trust_word

    if trust and not trust_word(value):
        logger.warning("--trust has no effect: the recipe has no train.function")
    from carft_ray.launch.command import Plan, run_search
    from carft_ray.results.figure import figure_at_the_end
    from carft_ray.results.search_summary import search_summary
    from carft_ray.ui.progress import search_shown

    with (
        _sending(value, study, notify_url) as sent,
        search_shown(progress, study, value.train.epochs) as on_event,
    ):
        plan = Plan(value, study, address, sent(on_event), runner)
        ran = run_search(replace(plan, change_space=change_space, again=again, around=figure_at_the_end))
    summary, folder = search_summary(ran), ran.study.study_dir
    found = Searched(folder, summary, ran.out_of_budget, tuple(ran.set_aside), ran.resume_command)
    if strict:
        found.check()
    return found


@as_command
def resume(
    study: str | Path,
    trials: int | str | None = None,
    *,
    overrides: Overrides = (),
    trust_paths: bool = False,
    **options: Any,
) -> Searched:
    """Resumes or extends a study, with the recipe of its last search.

    Args:
        study: The study directory.
        trials: Total number of trials, or how many more, ``"+4"``, of a study whose trials have all ended: the same
            call again continues them.
        overrides: Same as in ``load_recipe``: budget, resources, sampler, and the search space with ``change_space``.
        trust_paths: Read the files that the recipe of the study names, and keep images where it says, although this
            machine has not written the study. Not needed for a study in a folder, except for its ``data.cache_dir``.
        options: The other arguments of ``search``.

    Returns:
        Same as in ``search``.

    Raises:
        UsageError: It is not a study, or one in a bucket that this machine has not written and that names files.
        CarftError: Same as in ``search``.
    """
    study = own_folder(study)
    study_dir = study_view.require_study(study)
    kept = study_recipe(study_dir, log_of(study_dir))
    study_view.require_search(study, kept)
    words = override_words(overrides)
    if trials is not None:
        view = study_view.read_study(study_dir)
        total = study_view.total_trials(str(trials), view)
        if total == kept.search.trials and str(trials).strip().startswith("+"):
            ended = f"{view.num_finished} of its {counted(total, 'trial')} have ended"
            console.say(f"trials {trials} adds none, since {ended}; for more at once, give a total")
        words.append(f"search.trials={total}")
    recipe = recipe_for_use(study_dir, kept, "resume {}", words, trust_paths)
    return search(recipe.model_dump(mode="json"), study, **options)


@as_command
def confirm(
    study: str | Path,
    *,
    top: int = 3,
    seeds: int = 3,
    winner: str = "search",
    against: Sequence[str | Path] = (),
    ablation: bool = True,
    overrides: Overrides = (),
    train: Trainer | None = None,
    address: str | None = None,
    trust: bool = False,
    trust_paths: bool = False,
    notify_url: str | None = None,
    progress: bool = True,
    resume_command: str = SAME_CALL,
) -> Answer:
    """Trains the winner, the next best trials and the baselines again with fresh seeds, to see what the best is worth.

    Args:
        study: The study directory; no search may be running on it.
        top: Number of trials to train again, best first.
        seeds: Fresh seeds per trial, at least 2; more can be added later.
        winner: ``search``: the winner of the search. ``confirmed``: the best on the fresh seeds, which is then
            trained with as many further seeds.
        against: Studies whose winners become further baselines.
        ablation: Train the winner's values without penalties, too, to see what the penalties contribute.
        overrides: Same as in ``load_recipe``; only keys that change where and how fast trainings run.
        train: Same as in ``search``; the fine-tuning of the study.
        address: Same as in ``search``.
        trust: Run the code that ``train.function`` names.
        trust_paths: Same as in ``resume``.
        notify_url: Same as in ``search``.
        progress: Show progress.
        resume_command: Shown after an interruption.

    Returns:
        The comparison; its ``numbers`` are also ``confirm/summary.json`` of the study.

    Raises:
        UsageError: A search runs on the study, or it is not a study; or as in ``resume``.
        InterruptedRunError: Stopped on request; the same call resumes.
        NoSuccessfulTrialError: No trial has finished, or the winner failed with a fresh seed.
        CarftError: Same as in ``search``.
    """
    require_choice("--winner", "must be a rule that chooses the winner", winner, WINNER_RULES)
    for name, number, least in (("--top", top, 1), ("--seeds", seeds, 2)):
        if number < least:
            raise UsageError(Problem(name, f"must be at least {least}", str(number)))
    view = _read_free(study)
    others = [study_view.read_study(path) for path in several(against)]
    words = override_words(overrides)
    recipe = check_recipe(recipe_for_use(view.study_dir, view.recipe, "confirm {}", words, trust_paths))
    recipe, runner = _with_trainer(recipe, train, trust)
    from carft_ray.data.duplicates.shared_images import read_shared, shared_lines
    from carft_ray.launch.command import Plan, run_confirm
    from carft_ray.results import confirm_plan
    from carft_ray.results.confirm_numbers import choose, confirm_lines, summarise
    from carft_ray.results.delivered import trained_rows
    from carft_ray.study.soups import of_study
    from carft_ray.ui.progress import search_shown

    study_dir, say = view.study_dir, console.sayer(progress)
    with _sending(recipe, study_dir, notify_url) as sent:
        first, notes = confirm_plan.plan(view, top, seeds, others, ablation)
        second: Stage | None = None
        known: Snapshot = view
        for note in notes:
            logger.warning("%s", note)

        def soups_of_rows(held: "Study") -> dict[str, Any]:
            now = held.snapshot()
            groups = [[*own, *fresh] for row, own, fresh in trained_rows(now, first, second) if row.training]
            return of_study(now, recipe.search.soups, groups)

        def train_stage(end: Callable[[Snapshot], Any]) -> Any:
            stage = second or first
            say(confirm_plan.cost(known, stage))
            trainings = stage.trainings()
            with search_shown(progress, study_dir, recipe.train.epochs, kind="confirm", trainings=trainings) as shown:
                plan = Plan(
                    recipe,
                    study_dir,
                    address,
                    sent(shown),
                    runner,
                    given=lambda held: confirm_plan.fix(held, recipe, first, second, others),
                    resume_command=resume_command,
                    soups=soups_of_rows if second or winner == "search" else None,
                )
                return run_confirm(plan, end)

        if winner == "confirmed":
            known, chosen = train_stage(lambda held: (held, choose(held, first)))
            second = confirm_plan.second_stage(first, chosen, recipe)
            say(f"The best on the fresh seeds is {chosen}. These seeds selected it, so others measure it.")
        summary = train_stage(lambda held: summarise(held, first, second))
    lines = [*shared_lines(read_shared(study_dir)), *confirm_lines(summary)]
    return Answer(recipe.name, summary, (console.estimate_table(summary["rows"]),), tuple(lines))


def _read_free(study: str | Path) -> study_view.Overview:
    """Reads a study on which no search may run."""
    view = study_view.read_study(own_folder(study))
    is_of_bucket = in_bucket(study)  # a log in a folder tells by itself, after a wait, whether a silent holder is gone
    if view.holder is not None and (is_of_bucket or view.log.is_held_here):
        step = f"Wait until it ends, or end it: carft-ray stop {shlex.quote(str(study))}"
        raise UsageError(Problem(str(study), "must be a study on which no search runs", view.holder, next_step=step))
    return view


@as_command
def soup(
    study: str | Path,
    members: Sequence[str | int] = (),
    *,
    kind: str | None = None,
    overrides: Overrides = (),
    address: str | None = None,
    trust_paths: bool = False,
    progress: bool = True,
    resume_command: str = SAME_CALL,
) -> Answer:
    """Makes soups, means of the weights of trainings, and measures their alpha curves on the validation sets.

    Args:
        study: The study directory; no search may be running on it.
        members: Trainings by number or name, ``confirm/NAME`` among them, the best first; none: those of the study.
        kind: One of ``study.soups.KINDS``; None: ``uniform`` of given members, else ``repeats`` and ``greedy``.
        overrides: Same as in ``load_recipe``; only keys that change where and how fast trainings run.
        address: Same as in ``search``.
        trust_paths: Same as in ``resume``.
        progress: Show progress.
        resume_command: Shown after an interruption.

    Returns:
        All soups of the study; ``numbers`` has ``soups``, and ``model``, which `export` writes.

    Raises:
        UsageError: There are not two trainings with weights, or a member is none; or as in ``confirm``.
        NoSuccessfulTrialError: No trial, or not the member, has finished.
        CarftError: Same as in ``confirm``.
    """
    from carft_ray.results.confirm_plan import read_plan
    from carft_ray.results.delivered import delivered, trained_rows
    from carft_ray.results.reading.finished import open_finished
    from carft_ray.results.soup_lines import soup_lines
    from carft_ray.study import soups

    if kind is not None:
        require_choice("--kind", "must be a kind of soup", kind, soups.KINDS)
    if members and kind == "repeats":
        raise UsageError(Problem("--kind", "must be another kind for given members", "repeats", soups.KINDS[1:]))
    view = _read_free(study)
    recipe = recipe_for_use(view.study_dir, view.recipe, "soup {}", override_words(overrides), trust_paths)
    recipe = check_recipe(recipe)
    kinds: tuple[soups.SoupKind, ...] = (kind,) if kind else ("repeats", "greedy")  # type: ignore[assignment]  # one of KINDS
    if members:
        rows = [open_finished(view.study_dir, each, "--member").row for each in members]
        if odd := [row.called for row in rows if not row.digest or row.kind == "soup"]:
            raise UsageError(Problem("--member", "must be trainings", odd[0]))
        if len({row.training for row in rows}) < len(rows):
            raise UsageError(Problem("--member", "must name each training once", ", ".join(map(str, members))))
        wanted = soups.made_of(view, kinds[0] if kind else "uniform", rows)
    else:
        stages = read_plan(view.study_dir)
        groups = [[*own, *fresh] for row, own, fresh in trained_rows(view, *stages) if row.training] if stages else []
        wanted = soups.of_study(view, kinds, groups)
    if not wanted:
        rule = "a soup needs two trainings whose weights the study keeps"
        step = f"Train more: carft-ray resume {shlex.quote(str(study))} --trials +4"
        raise UsageError(Problem(str(study), rule, next_step=step))
    from carft_ray.launch.command import Plan, run_soups
    from carft_ray.ui.progress import search_shown

    with search_shown(progress, view.study_dir, recipe.train.epochs, kind="soup") as on_event:
        plan = Plan(recipe, view.study_dir, address, on_event, resume_command=resume_command)
        now = study_view.Overview.from_snapshot(run_soups(plan, wanted))
    (model, standing), made = delivered(now), [now.data(row) for row in now.soups]
    numbers = {"study": named(view.study_dir), "soups": made, "model": {**model, "standing": standing}}
    return Answer(recipe.name, numbers, (console.trial_table(made),), tuple(soup_lines(now)))


def _sending(recipe: Recipe, study_dir: Path, notify_url: str | None) -> AbstractContextManager[Any]:
    """Sends what happens in the block to the recipe's trackers and to a webhook (``launch.outbox``)."""
    from carft_ray.launch.notify import webhook
    from carft_ray.launch.outbox import sending
    from carft_ray.launch.tracking import trackers

    receivers = webhook(notify_url, recipe.name, study_dir) | trackers(recipe, study_dir, logger.warning)
    return sending(receivers, logger.warning)


def _with_trainer(recipe: Recipe, train: Trainer | None, trust: bool) -> tuple[Recipe, "Runner"]:
    """Returns the recipe, and the runner of a fine-tuning of the user's or of the built-in one.

    Raises:
        UsageError: The recipe names code, in ``train`` or a baseline, that was neither given nor is trusted.
        RecipeError: It cannot be imported or called, or the recipe asks for a linear probe before it.
    """
    if train is None:
        require_trusted(recipe, trust)
        from carft_ray.launch.workers.worker import RUNNER

        return recipe, RUNNER
    require_trusted(with_keys(recipe, train={"function": None}), trust)  # it is here; baselines may name others
    from carft_ray.launch.workers.own_trainer import with_function
    from carft_ray.recipe.rules import own_function_problems

    named_here, runner = with_function(recipe, train)
    if problems := list(own_function_problems(named_here)):
        raise RecipeError(problems)
    return named_here, runner


@as_command
def train(
    recipe: RecipeLike,
    out: str | Path,
    *,
    overrides: Overrides = (),
    resume: bool = False,
    address: str | None = None,
    trust: bool = False,
    trust_paths: bool = False,
    progress: bool = True,
    resume_command: str = f"{SAME_CALL}, with resume=True",
) -> Answer:
    """Fine-tunes once and measures the alpha curve on the validation sets.

    Its folder is a study of one trial.

    Args:
        recipe: Same as in ``load_recipe``; its keys of search, budget and tracking have no effect.
        out: Folder of the training; new, or that of the training to resume.
        overrides: Same as in ``load_recipe``.
        resume: Resume from the newest checkpoint in the folder.
        address: Ray cluster to attach to if there are several workers.
        trust: Run the code that ``train.function`` names.
        trust_paths: Same as in ``load_recipe``.
        progress: Show progress.
        resume_command: Shown after an interruption.

    Returns:
        The content of ``result.json`` with ``folder`` and ``zero_shot``.

    Raises:
        UsageError: The folder is not empty, or has nothing to resume.
        InterruptedRunError: Stopped on request.
        DivergedError: The training has diverged.
        MachineError: Its attempts were lost one after the other; the same call tries again.
        CarftError: Same as in ``load_recipe``; StorageError, ClusterError: see their messages.
    """
    value, out = load_recipe(recipe, overrides, trust_paths), own_folder(out)
    require_trusted(value, trust, baselines=False)
    if address is not None and value.resources.executor != "ray-train" and value.resources.num_workers == 1:
        logger.warning("--address has no effect: one worker trains in this process")
    if value.budget != BudgetConfig():
        logger.warning("budget has no effect on one training")
    if value.tracking != TrackingConfig():
        logger.warning("tracking has no effect on one training; a search of one trial is tracked")
    from carft_ray.evaluation.alpha_curve import point_at
    from carft_ray.launch.command import Plan, train_once
    from carft_ray.ui.progress import training_shown

    with training_shown(progress) as on_event:
        plan = Plan(alone(value), out, address, on_event, resume_command=resume_command)
        result, zero_shot = train_once(plan, resume)
    rows = {
        "zero-shot": zero_shot,
        "fine-tuned, alpha 1": point_at(result["curve"], 1.0) or {},
        f"mixed, alpha {result['alpha']:g}": result["metrics"],
    }
    line = "Validation sets; alpha was chosen on them. Intervals: over images."
    numbers = {"folder": named(out), "zero_shot": zero_shot, **result}
    return Answer(value.name, numbers, (console.accuracy_table(rows, result["num_images"]),), (line,))
