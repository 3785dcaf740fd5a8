"""The rows that are compared, each one configuration with its alpha: the winner, its rivals, the baselines.

They come from a finished confirm (several fresh seeds) where there is one, else from the search itself (one training
each). Nothing is evaluated here, and no torch is loaded.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError
from carft_ray.recipe.schema import Recipe
from carft_ray.results.overview import folder_of
from carft_ray.search.outcome import RESULT
from carft_ray.search.study import ZERO_SHOT, baselines, best_row, trials

CONFIRM, PLAN = "confirm", "plan.json"

Role = Literal["winner", "candidate", "baseline"]


@dataclass(frozen=True)
class Run:
    """One training of a row.

    Attributes:
        seed: Of data order and views.
        folder: Its folder, relative to the study directory.
    """

    seed: int
    folder: str


@dataclass(frozen=True)
class Row:
    """One configuration with its alpha, which is never chosen again.

    Attributes:
        name: Unique among the rows.
        role: ``winner`` (exactly one), ``candidate`` or ``baseline``.
        alpha: Mixing coefficient, 0 for zero-shot.
        runs: Its trainings, in the order of the seeds that all rows share; none for zero-shot.
    """

    name: str
    role: Role
    alpha: float
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Compared:
    """All rows of a study.

    Attributes:
        rows: The winner first, then candidates, then baselines.
        confirmed: Whether they were trained on fresh seeds after the search.
    """

    rows: tuple[Row, ...]
    confirmed: bool

    @property
    def winner(self) -> Row:
        """The row with that role."""
        return next(row for row in self.rows if row.role == "winner")

    @property
    def baselines(self) -> tuple[Row, ...]:
        """Rows with that role."""
        return tuple(row for row in self.rows if row.role == "baseline")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings."""
        return tuple(run.seed for run in self.winner.runs)


def compared_rows(study_dir: Path, recipe: Recipe) -> Compared:
    """Returns the rows of a study: of its confirm, else of its search.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.

    Raises:
        NoSuccessfulTrialError: The search has no finished trial, or a confirm was begun and is not finished.
        StorageError: The study or the plan of its confirm is damaged.
    """
    if (study_dir / CONFIRM / PLAN).exists():
        return _of_confirm(study_dir)
    best = best_row(trials(study_dir))
    if best is None:
        step = f"Go on with the search: carft-ray resume {shlex.quote(str(study_dir))}"
        raise NoSuccessfulTrialError(Problem(str(study_dir), "must have a finished trial", "none", next_step=step))
    rows: list[Row] = []
    for row in (best, *baselines(study_dir)):
        if row.outcome != "complete" or row.alpha is None:
            continue
        folder = folder_of(study_dir, row).relative_to(study_dir).as_posix()
        runs = () if row.name == ZERO_SHOT else (Run(recipe.train.seed, folder),)
        rows.append(Row(row.name, "winner" if row is best else "baseline", row.alpha, runs))
    return Compared(tuple(rows), confirmed=False)


def _of_confirm(study_dir: Path) -> Compared:
    plan = files.read_json(study_dir / CONFIRM / PLAN)
    try:
        rows = [_planned(row, plan["seeds"]) for row in plan["rows"]]
        if [row.role for row in rows].count("winner") != 1:
            raise ValueError("it must have one row with role winner")
    except (KeyError, TypeError, ValueError) as error:
        path = study_dir / CONFIRM / PLAN
        raise StorageError(Problem(str(path), "must be the plan of a confirm", str(error))) from error
    left = {run.folder for row in rows for run in row.runs if not (study_dir / run.folder / RESULT).is_file()}
    if left:
        folder = shlex.quote(str(study_dir))
        value = f"{len(left)} trainings without a result, {min(left)} among them"
        step = f"Finish it: carft-ray confirm {folder}\n    "
        step += f"Or move {study_dir / CONFIRM} away, and one training of each is compared."
        raise NoSuccessfulTrialError(
            Problem(str(study_dir / CONFIRM), "a confirm that was begun must be finished", value, next_step=step)
        )
    order = ("winner", "candidate", "baseline")
    return Compared(tuple(sorted(rows, key=lambda row: order.index(row.role))), confirmed=True)


def _planned(row: dict[str, Any], seeds: list[int]) -> Row:
    training, role = row["training"], row["role"]
    if role not in ("winner", "candidate", "baseline"):
        raise ValueError(f"role must be winner, candidate or baseline, but got {role!r}")
    runs = () if training is None else tuple(Run(seed, f"{CONFIRM}/{training}-seed{seed}") for seed in seeds)
    return Row(row["name"], role, float(row["alpha"]), runs)
