"""A finished training as it is on disk: result, predictions, and the recipe and provenance of its study. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError, UsageError, require_choice
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.layout import CONFIRM, PREPARATION, PREPARED, RESULT, SOUPS, WEIGHTS
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.results.reading.status_and_ls import placed
from carft_ray.results.reading.study_view import find_row, require_study
from carft_ray.study import typed
from carft_ray.study.place import Place
from carft_ray.study.provenance import provenance_of
from carft_ray.study.recipe_identity import resume_command
from carft_ray.study.rows import ZERO_SHOT, predictions_path, require_finished
from carft_ray.study.snapshot import Snapshot, snapshot
from carft_ray.study.training import TrialRow, file_of, result_of


@dataclass(frozen=True)
class Finished:
    """A finished training, or the zero-shot model of a study.

    Attributes:
        folder: The study directory, absolute.
        name: Name of the trial, of the baseline, ``confirm/NAME`` or ``soups/NAME``.
        base: Recipe of the study.
        recipe: The same with the values of this training.
        result: Content of ``result.json``; a trial of a Pareto search is at its point of the front.
        provenance: Of the study; empty when there is none.
        row: The training.
    """

    folder: Path
    name: str
    base: Recipe
    recipe: Recipe
    result: dict[str, Any]
    provenance: dict[str, Any]
    row: TrialRow

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
        return file_of(self.folder, self.row, WEIGHTS)

    def predictions(self) -> pa.Table:
        """Returns the predictions on the validation sets, of all alphas.

        Raises:
            StorageError: The file is missing, damaged, or not the one that the study has recorded.
        """
        return read_predictions(predictions_path(self.folder, self.row))


def open_finished(place: Place, trial: str | int | None = None, argument: str = "TRIAL") -> Finished:
    """Opens a finished training; nothing is claimed or written.

    Args:
        place: Folder or address of a study.
        trial: Number or name of a trial, name of a baseline, ``confirm/NAME`` or ``soups/NAME``; None: the best trial.
        argument: The argument or option that names the trial, for messages.

    Raises:
        UsageError: The folder is no study, or it has no such trial.
        NoSuccessfulTrialError: The training is not finished, or the study has no finished trial.
        StorageError: Manifest, log or result is damaged.
    """
    folder = require_study(place, "must be a study or the folder of a training")
    study = snapshot(folder)
    base, provenance = study.recipe, provenance_of(study.log)
    name, row = _find(study, trial, argument)
    if name == ZERO_SHOT:
        metrics = typed.checked(typed.Prepared, files.read_json(folder, f"{PREPARED}/{PREPARATION}"), PREPARATION)[
            "metrics"
        ]
        typed.check_accuracies(metrics, PREPARATION)
        if "objective" not in metrics:
            raise typed.wrong(PREPARATION, "metrics must have objective", None)
        result = {"objective": metrics["objective"], "alpha": 0.0, "metrics": metrics}
        return Finished(folder, name, base, base, result, provenance, row)
    if row.outcome != "complete":
        value, step = "an unfinished or failed one", f"Continue it: {resume_command(folder)}"
        raise NoSuccessfulTrialError(Problem(f"{folder}:{name}", "must be a finished training", value, next_step=step))
    found = result_of(folder, row)
    try:
        recipe = base.model_copy(update={"train": TrainConfig.model_validate(found["train"])})
    except (ValueError, KeyError) as error:
        rule, step = "must be the result of a training", "Restore it from a copy; no command changes a finished trial."
        raise StorageError(Problem(str(row.place(folder) / RESULT), rule, str(error), next_step=step)) from error
    return Finished(folder, name, base, recipe, placed(found, row), provenance, row)


def split_target(written: str) -> tuple[Place, str | None]:
    """Returns folder (or address) and trial of ``DIR`` or ``DIR:TRIAL``; a folder's name may have a colon, too."""
    folder, colon, trial = written.rpartition(":")
    if not colon or trial.startswith("/") or Path(written).exists():
        return written, None
    if not folder or not trial:
        raise UsageError(Problem(written, "must be DIR or DIR:TRIAL", repr(written)))
    return folder, trial


def _find(study: Snapshot, trial: str | int | None, place: str) -> tuple[str, TrialRow]:
    """Returns name and row of a training of a study."""
    trial = None if trial is None else str(trial)
    kind, name = (trial or "").partition("/")[0], (trial or "").rstrip("/")
    if "/" in (trial or "") and kind in (CONFIRM, SOUPS):
        known = {row.called: row for row in (*study.confirmations, *study.soups) if row.called.startswith(f"{kind}/")}
        require_choice(place, f"must be a training of {study.study_dir / kind}", name, known)
        return name, known[name]
    trained = [*study.all_baselines, *study.trials]
    row = require_finished(study.study_dir, study.best if trial is None else find_row(trained, trial, place))
    return row.name, row
