"""A finished training as it is on disk: result, predictions, and the manifest that it belongs to. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError, UsageError, nearest
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.layout import CONFIRM, PREDICTIONS, PREPARATION, PREPARED, RESULT, WEIGHTS, ZERO_SHOT_TABLE
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.pareto import placed
from carft_ray.results.reading.study_view import find_row, require_study
from carft_ray.study import identity
from carft_ray.study.outcome import TrialRow, read_result
from carft_ray.study.provenance import PROVENANCE
from carft_ray.study.rows import ZERO_SHOT, baselines, best_row, require_finished, trials


@dataclass(frozen=True)
class Finished:
    """A finished training, or the zero-shot model of a study.

    Attributes:
        folder: The study directory, absolute.
        name: Name of the trial, of the baseline, or ``confirm/NAME``.
        base: Recipe of the study as its manifest has it.
        recipe: The same with the values of this training.
        result: Content of ``result.json``; a trial of a Pareto search is at its point of the front.
        provenance: Of the manifest; empty when there is none.
        run_dir: Folder of the training.
    """

    folder: Path
    name: str
    base: Recipe
    recipe: Recipe
    result: dict[str, Any]
    provenance: dict[str, Any]
    run_dir: Path

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing was trained for it."""
        return self.name == ZERO_SHOT

    @property
    def title(self) -> str:
        """Its name in messages: ``quickstart:t0007-3f9c``."""
        return f"{self.folder.name}:{self.name}"

    @property
    def weights_path(self) -> Path:
        """The fine-tuned weights; a study keeps those of its best trials."""
        return self.run_dir / WEIGHTS

    def predictions(self) -> pa.Table:
        """Returns the predictions on the validation sets, of all alphas.

        Raises:
            StorageError: The file is missing or damaged.
        """
        return read_predictions(self.run_dir / (ZERO_SHOT_TABLE if self.is_zero_shot else PREDICTIONS))


def open_finished(folder: Path, trial: str | None = None, place: str = "TRIAL") -> Finished:
    """Opens a finished training; nothing is claimed or written.

    Args:
        folder: A study.
        trial: Number or name of a trial, name of a baseline, or ``confirm/NAME``; None: the best trial.
        place: The argument or option that names the trial, for messages.

    Raises:
        UsageError: The folder is no study, or it has no such trial.
        NoSuccessfulTrialError: The training is not finished, or the study has no finished trial.
        StorageError: Manifest, log or result is damaged.
    """
    folder = require_study(folder, "must be a study or the folder of a training")
    base, provenance = read_manifest(folder)
    name, run_dir, row = _find(folder, trial, place)
    if name == ZERO_SHOT:
        metrics = files.read_json(folder / PREPARED / PREPARATION)["metrics"]
        result = {"objective": metrics["objective"], "alpha": 0.0, "metrics": metrics}
        return Finished(folder, name, base, base, result, provenance, folder / PREPARED)
    if not (run_dir / RESULT).is_file():
        value, step = "an unfinished or failed one", f"Go on with it: {identity.resume_command(folder)}"
        raise NoSuccessfulTrialError(Problem(str(run_dir), "must be a finished training", value, next_step=step))
    found = read_result(run_dir)
    try:
        if found is None:
            raise ValueError("no objective, or another format")
        recipe = base.model_copy(update={"train": TrainConfig.model_validate(found["train"])})
    except (ValueError, KeyError) as error:
        rule, step = "must be the result of a training", "Restore it from a copy; no command changes a finished trial."
        raise StorageError(Problem(str(run_dir / RESULT), rule, str(error), next_step=step)) from error
    return Finished(folder, name, base, recipe, placed(found, row), provenance, run_dir)


def read_manifest(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Returns recipe and provenance of a claimed folder.

    Raises:
        StorageError: The manifest is missing, damaged or of another format.
    """
    manifest = identity.read_manifest(folder)
    return Recipe.model_validate(manifest["recipe"]), manifest.get(PROVENANCE) or {}


def split_target(written: str) -> tuple[Path, str | None]:
    """Returns folder and trial of ``DIR`` or ``DIR:TRIAL``; an existing folder may have a colon in its name."""
    folder, colon, trial = written.rpartition(":")
    if not colon or Path(written).exists():
        return Path(written), None
    if not folder or not trial:
        raise UsageError(Problem(written, "must be DIR or DIR:TRIAL", repr(written)))
    return Path(folder), trial


def _find(study_dir: Path, trial: str | None, place: str) -> tuple[str, Path, TrialRow | None]:
    """Returns name, folder and row of a training of a study; one of a confirm has no row here."""
    if trial is not None and trial.startswith(f"{CONFIRM}/"):
        name = trial.rstrip("/")
        allowed = tuple(f"{CONFIRM}/{path.name}" for path in sorted((study_dir / CONFIRM).glob("*/")))
        if name not in allowed:
            rule = f"must be a training of {study_dir / CONFIRM}"
            raise UsageError(Problem(place, rule, repr(trial), allowed, nearest(trial, allowed)))
        return name, study_dir / name, None
    rows = trials(study_dir)
    row = best_row(rows) if trial is None else find_row([*baselines(study_dir), *rows], trial, place)
    row = require_finished(study_dir, row)
    return row.name, row.folder(study_dir), row
