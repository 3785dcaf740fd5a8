"""The trainings of a study as rows, made of what Optuna keeps in its log (``snapshot`` reads all of a study)."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError
from carft_ray.layout import COMMITS, PREDICTIONS, PREPARED, ZERO_SHOT_TABLE
from carft_ray.store.commit import uncollected
from carft_ray.store.log import Log
from carft_ray.study import attributes as attr
from carft_ray.study import pareto_front, typed
from carft_ray.study.recipe_identity import resume_command
from carft_ray.study.training import Kind, TrialRow, file_of
from carft_ray.untrusted import require_plain

Found = TypeVar("Found")

STUDY_NAMES: dict[Kind, str] = {"trial": "search", "baseline": "baselines", "confirm": "confirm", "soup": "soups"}
ZERO_SHOT = "zero_shot"
SAME_NAMES = (
    attr.ALPHA,
    attr.AT_CHANCE,
    attr.DIGEST,
    attr.MEASURED,
    attr.REPEAT_OF,
    attr.SOUP,
)  # attributes that a row has, too


def all_rows(storage: JournalStorage) -> dict[Kind, list[TrialRow]]:
    """Returns trials, baselines, trainings of the confirm and soups of an open log.

    Raises:
        StorageError: No folder may have the name of one of them.
    """
    studies = {kind: stored(storage, name) for kind, name in STUDY_NAMES.items()}
    return {kind: rows_of(kind, study) if study else [] for kind, study in studies.items()}


def best_first(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Returns rows from the best down, the earlier of equals first; those without an objective come last."""
    return sorted(rows, key=rank)


def rank(row: TrialRow) -> tuple[float, ...]:
    """Returns what the best row has least of.

    Rows that meet all constraints come before those that do not, and of these the less violating first. Then the
    expected objective of their values counts. Where it is not known, it is the standing of a Pareto search, then the
    objective.
    """
    measured = row.violation, -row.standing, -(row.objective or 0.0)
    return row.objective is None, *(measured if row.order is None else row.order), row.number


def require_finished(study_dir: Path, found: Found | None) -> Found:
    """Returns what was found of the finished trials of a study.

    Raises:
        NoSuccessfulTrialError: That is nothing.
    """
    if not found:
        step = f"Continue it: {resume_command(study_dir)}"
        raise NoSuccessfulTrialError(Problem(str(study_dir), "must have a finished trial", "none", next_step=step))
    return found


def searched(trials: Iterable[TrialRow], baselines: Iterable[TrialRow]) -> list[TrialRow]:
    """Returns the trainings that count as trials of a search: repeats of baselines, too."""
    return [*trials, *(row for row in baselines if row.repeat_of)]


def num_finished(rows: Iterable[TrialRow]) -> int:
    """Returns how many trainings have ended, well or not."""
    return sum(row.outcome != "running" for row in rows)


def best_row(rows: Iterable[TrialRow]) -> TrialRow | None:
    """Returns the first complete row of ``best_first``."""
    complete = [row for row in rows if row.outcome == "complete" and row.objective is not None]
    return min(complete, key=rank, default=None)


def state_and_values(trial: FrozenTrial) -> tuple[TrialState, list[float] | None]:
    """Returns state and objectives of a trial as recorded, whether it lies in the present space or not."""
    before = trial.user_attrs.get(attr.OUTSIDE)
    if before is None:
        return trial.state, trial.values
    return TrialState[before["state"]], before["objectives"]


def rows_of(kind: Kind, study: optuna.Study) -> list[TrialRow]:
    """Returns the trainings of an Optuna study as rows, those of a Pareto search with their standing."""
    rows = [row_of(kind, trial) for trial in trainings(study)]
    rule = study.user_attrs.get(attr.FRONT) if kind == "trial" else None
    return rows if rule is None else pareto_front.stand(rows, pareto_front.FrontRule(**rule))


def predictions_path(study_dir: Path, row: TrialRow | None) -> Path:
    """Returns the path of the validation predictions of a training; of None or ``ZERO_SHOT`` that of the frozen model.

    Raises:
        StorageError: As ``file_of``.
    """
    if row is None or row.name == ZERO_SHOT:
        return files.inside(study_dir, f"{PREPARED}/{ZERO_SHOT_TABLE}")
    return file_of(study_dir, row, PREDICTIONS)


def trainings(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials of an Optuna study that are trainings of this study, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if is_training(trial)]


def is_training(trial: FrozenTrial) -> bool:
    """Tells whether a trial is a training of this study; the others show the sampler what was measured before."""
    return not {attr.TRAINING_OF, attr.WARM_FROM} & trial.user_attrs.keys()


def row_of(kind: Kind, trial: FrozenTrial) -> TrialRow:
    """Returns a trial of an Optuna study as a row, without standing."""
    attributes = _checked(kind, trial)
    finished = trial.state.is_finished()
    state, objectives = state_and_values(trial)
    objective = objectives[0] if objectives and len(objectives) == 1 else attributes.get(attr.OBJECTIVE)
    spent, attempt = attributes.get(attr.SPENT, {}), attributes.get(attr.ATTEMPT, 0)
    elapsed_s = attributes.get(attr.ELAPSED_S)
    if elapsed_s is not None:
        elapsed_s += sum(seconds for number, (seconds, _) in spent.items() if number != str(attempt))
    elif trial.duration is not None:
        elapsed_s = max(trial.duration.total_seconds(), 0.0)
    return TrialRow(
        kind=kind,
        number=trial.number,
        name=attributes.get(attr.NAME, f"t{trial.number:04d}"),
        values=values_of(trial),
        outcome=attributes.get(attr.OUTCOME, "error") if finished else "running",
        attempt=attempt,
        has_ended=str(attempt) in spent,
        reason=attributes.get(attr.REASON) or attributes.get(attr.SET_ASIDE) or "",
        objective=objective if state == TrialState.COMPLETE else None,
        started=trial.datetime_start,
        elapsed_s=elapsed_s,
        outside=attr.OUTSIDE in attributes,
        points=tuple(attributes.get(attr.POINTS, ())),
        intermediate_values=intermediate_values(trial),
        spent_s=float(sum(seconds for seconds, _ in spent.values())),
        gpu_s=float(sum(seconds * gpus for seconds, gpus in spent.values())),
        set_aside=not finished and bool(attributes.get(attr.SET_ASIDE)),
        **{name: attributes[name] for name in SAME_NAMES if name in attributes},
    )


def values_of(trial: FrozenTrial) -> dict[str, Any]:
    """Returns the values of a training over the recipe's ``train``."""
    attributes = trial.user_attrs
    seed = {"seed": attributes[attr.SEED]} if attr.SEED in attributes else {}
    return {**attributes.get(attr.VALUES, trial.params), **seed}


def _checked(kind: Kind, trial: FrozenTrial) -> dict[str, Any]:
    """Returns the attributes of a trial, once all that a row takes from it is what it may be."""
    place = f"{COMMITS}/, {kind} {trial.number}"
    attributes = typed.checked(typed.Attributes, trial.user_attrs, place)
    for metrics in (attributes.get(attr.MEASURED, {}), *attributes.get(attr.POINTS, ())):
        typed.check_accuracies(metrics, place)
    seconds = trial.duration.total_seconds() if trial.duration is not None else None
    optunas = {"values": trial.values, "intermediate_values": intermediate_values(trial), "duration": seconds}
    typed.checked(typed.OptunaTrial, {"params": trial.params, **optunas}, place)
    try:
        require_plain([attributes.get(attr.VALUES, {}), trial.params])
    except ValueError as error:
        raise typed.wrong(place, f"values: {error}", None) from error
    is_complete = attributes.get(attr.OUTCOME) == "complete" and trial.state == TrialState.COMPLETE
    if is_complete and attr.MEASURED not in attributes:
        raise typed.wrong(place, "a complete training must have metrics", None)
    return attributes


def intermediate_values(trial: FrozenTrial) -> dict[int, float]:
    """Returns the intermediate values of a trial: percent of its schedule -> objective on the subset."""
    if trial.intermediate_values:
        return dict(trial.intermediate_values)
    named = {key.removeprefix(attr.LOOK): value for key, value in trial.user_attrs.items() if "/" in key}
    return {int(percent): value for percent, value in named.items() if percent.isdigit()}


def stored(storage: JournalStorage, name: str) -> optuna.Study | None:
    """Returns an Optuna study of a log; None while its first search has not made it yet."""
    there = name in optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage) if there else None


@contextlib.contextmanager
def readable(log: Log) -> Iterator[JournalStorage]:
    """Gives Optuna's storage over a log, once; what it raises on a foreign log becomes a ``StorageError``."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with uncollected():
            storage = JournalStorage(log)
        yield storage
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        RecursionError,
    ) as error:
        step = "Restore it from a copy; the results of finished trials are still in trials/."
        cause = f"{type(error).__name__}: {error}"
        raise StorageError(Problem(f"{log}/{COMMITS}", "must be the log of a study", cause, next_step=step)) from error
