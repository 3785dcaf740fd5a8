"""The rows that are compared, each one configuration with its alpha: the winner, its rivals, the baselines.

They come from a finished confirm (several fresh seeds) where there is one, else from the search itself (one training
each). Nothing is evaluated here, and no torch is loaded.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.layout import CONFIRM, SUMMARY
from carft_ray.recipe.schema import Recipe
from carft_ray.results.confirmation.plan import Role, Stage, last_stage
from carft_ray.results.confirmation.summary import whole_rows
from carft_ray.results.reading.overview import folder_of
from carft_ray.study.rows import ZERO_SHOT, baselines, best_row, require_finished, trials

ROLES: tuple[Role, ...] = ("winner", "candidate", "baseline")


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
        objective: On the validation sets, in the search: what chose it.
        runs: Its trainings, in the order of the seeds that all rows share; none for zero-shot.
    """

    name: str
    role: Role
    alpha: float
    objective: float
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
    stage = last_stage(study_dir)
    if stage is not None:
        return _of_confirm(study_dir, stage)
    best = require_finished(study_dir, best_row(trials(study_dir)))
    rows: list[Row] = []
    for row in (best, *baselines(study_dir)):
        if row.objective is None or row.alpha is None:
            continue
        folder = folder_of(study_dir, row).relative_to(study_dir).as_posix()
        runs = () if row.name == ZERO_SHOT else (Run(recipe.train.seed, folder),)
        rows.append(Row(row.name, "winner" if row is best else "baseline", row.alpha, row.objective, runs))
    return Compared(tuple(rows), confirmed=False)


def _of_confirm(study_dir: Path, stage: Stage) -> Compared:
    """Returns the rows that have a mean over all seeds, as the summary of the confirm has them."""
    path = study_dir / CONFIRM / SUMMARY
    summary = files.read_json(path) if path.exists() else {}
    failed = {line.split(":")[0] for line in summary.get("failed", ())}
    whole = whole_rows(study_dir, stage)
    unfinished = [row.name for row in stage.rows if row not in whole and not failed & {*stage.names(row)}]
    has_winner = any(row.role == "winner" for row in whole)
    if unfinished or not has_winner or summary.get("seeds") != list(stage.seeds):
        step = f"Finish it: carft-ray confirm {shlex.quote(str(study_dir))}\n    "
        step += f"Or move {study_dir / CONFIRM} away, and one training of each is compared."
        value = f"one without all seeds of {', '.join(unfinished)}" if unfinished else "one without its summary"
        rule = "a confirm that was begun must be finished"
        raise NoSuccessfulTrialError(Problem(str(study_dir / CONFIRM), rule, value, next_step=step))
    rows = []
    for row in whole:
        names = stage.names(row)  # none of the zero-shot model
        runs = tuple(Run(seed, f"{CONFIRM}/{name}") for seed, name in zip(stage.seeds, names, strict=False))
        rows.append(Row(row.name, row.role, row.alpha, row.objective, runs))
    return Compared(tuple(sorted(rows, key=lambda row: ROLES.index(row.role))), confirmed=True)
