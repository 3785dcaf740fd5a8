"""The tables of a study: its trials as rows, read from the journal without a lock and without writing."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.search.folder import JOURNAL
from carft_ray.search.outcome import Kind, TrialRow
from carft_ray.search.spent import gpu_seconds_of, seconds_of

STUDY_NAMES: dict[Kind, str] = {"trial": "search", "baseline": "baselines", "confirm": "confirm"}
ZERO_SHOT = "zero_shot"


def trials(study_dir: Path) -> list[TrialRow]:
    """Reads a study's trials without locking or writing; ``running`` ones may run, wait, or belong to a dead search.

    Raises:
        StorageError: There is no study, or its journal is damaged.
    """
    return _read_rows(study_dir, "trial")


def baselines(study_dir: Path) -> list[TrialRow]:
    """Reads a study's baselines as ``trials`` does, the zero-shot model among them."""
    return _read_rows(study_dir, "baseline")


def confirmations(study_dir: Path) -> list[TrialRow]:
    """Reads the trainings with fresh seeds as ``trials`` does; none before a confirm has begun."""
    return _read_rows(study_dir, "confirm")


def best_first(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Returns rows from the largest objective down, the earlier of equals first; those without one come last."""
    return sorted(rows, key=lambda row: (row.objective is None, -(row.objective or 0.0), row.number))


def best_row(rows: Iterable[TrialRow]) -> TrialRow | None:
    """Returns the complete row with the largest objective, the earliest of equals."""
    complete = [row for row in rows if row.outcome == "complete" and row.objective is not None]
    return next(iter(best_first(complete)), None)


def rows_of(kind: Kind, study: optuna.Study) -> list[TrialRow]:
    """Returns the trials of an Optuna study as rows."""
    return [row_of(kind, trial) for trial in study.get_trials(deepcopy=False)]


def row_of(kind: Kind, trial: FrozenTrial) -> TrialRow:
    """Returns a trial of an Optuna study as a row."""
    attributes = trial.user_attrs
    finished = trial.state.is_finished()
    elapsed_s = attributes.get("elapsed_s")
    if elapsed_s is None and trial.duration is not None:
        elapsed_s = trial.duration.total_seconds()
    return TrialRow(
        kind=kind,
        number=trial.number,
        name=attributes.get("name", f"t{trial.number:04d}"),
        values=dict(attributes.get("values", trial.params)),
        outcome=attributes.get("outcome", "error") if finished else "running",
        attempt=attributes.get("attempt", 0),
        reason=attributes.get("reason", ""),
        objective=trial.value if trial.state == TrialState.COMPLETE else None,
        alpha=attributes.get("alpha"),
        metrics=attributes.get("metrics", {}),
        started=trial.datetime_start,
        elapsed_s=elapsed_s,
        spent_s=seconds_of(attributes),
        gpu_s=gpu_seconds_of(attributes),
    )


def storage_of(study_dir: Path) -> JournalStorage:
    """Returns the storage of a study's journal; Optuna's own lock spins for ever on a relative path."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(study_dir.resolve() / JOURNAL)))


@contextlib.contextmanager
def readable(study_dir: Path) -> Iterator[None]:
    """Turns what Optuna raises on a damaged or foreign journal into a ``StorageError``."""
    path = study_dir / JOURNAL
    try:
        yield
    except OSError as error:
        raise files.storage_error(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        step = "Restore the file from a copy; the results of finished trials are still in trials/."
        cause = f"{type(error).__name__}: {error}"
        raise StorageError(Problem(str(path), "must be an Optuna journal", cause, next_step=step)) from error


def _read_rows(study_dir: Path, kind: Kind) -> list[TrialRow]:
    if not (study_dir / JOURNAL).exists():
        raise StorageError(Problem(str(study_dir), "must be a study", f"no {JOURNAL} in it"))
    with readable(study_dir):
        storage = storage_of(study_dir)
        if STUDY_NAMES[kind] not in optuna.get_all_study_names(storage):  # its first search is just making it
            return []
        return rows_of(kind, optuna.load_study(storage=storage, study_name=STUDY_NAMES[kind]))
