"""Stored validation predictions of a study as arrays: no torch, no model, no test set.

Shape letters: A alphas, r seeds, n images of one set; images are ordered by sample id, the same in every array.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.source import IdArray
from carft_ray.errors import Problem, StorageError
from carft_ray.evaluation.constraints import Limit, calibration_gaps
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import (
    BoolArray,
    alphas,
    correct_matrix,
    read_predictions,
    require_same_images,
    sample_ids,
)
from carft_ray.layout import PREDICTIONS, PREPARED, ZERO_SHOT_TABLE
from carft_ray.recipe.schema import Recipe
from carft_ray.results.confirmation.plan import read_plan
from carft_ray.results.confirmation.summary import row_correct, whole_rows
from carft_ray.results.reading.overview import folder_of
from carft_ray.results.statistics.bootstrap import Candidate
from carft_ray.results.statistics.intervals import headline, in_points, objective_difference
from carft_ray.study.outcome import TrialRow, read_result
from carft_ray.study.rows import ZERO_SHOT


@dataclass(frozen=True, eq=False)
class Stored:
    """A study's predictions.

    Attributes:
        candidates: Per trial what its alpha was chosen from.
        chosen: Per trial and baseline its correctness at its alpha: a candidate with that alpha alone.
        num_alphas: Alphas of trained models that were evaluated, over trials and baselines.
        moved: ``moved`` of the trials' results, by name, where it is known.
    """

    candidates: tuple[Candidate, ...]
    chosen: dict[str, Candidate]
    num_alphas: int
    moved: dict[str, float]


def predictions_path(study_dir: Path, row: TrialRow) -> Path:
    """Returns the path of the validation predictions of a trial or baseline."""
    if row.name == ZERO_SHOT:
        return study_dir / PREPARED / ZERO_SHOT_TABLE
    return folder_of(study_dir, row) / PREDICTIONS


def read_stored(
    study_dir: Path, recipe: Recipe, rows: Sequence[TrialRow], spec: ObjectiveSpec, bounds: Sequence[Limit] = ()
) -> Stored:
    """Reads the predictions of complete trials and baselines.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.
        rows: Complete trials, in the order of the search, then baselines, zero-shot among them.
        spec: The objective.
        bounds: The constraints; what their calibration errors are made of is read with the candidates.

    Raises:
        StorageError: Predictions are missing or damaged.
        DataError: They lack a set or an alpha, or are of different images.
    """
    measured = {limit.set_name for limit in bounds if limit.measure == "ece"}
    candidates: list[Candidate] = []
    chosen: dict[str, Candidate] = {}
    moved: dict[str, float] = {}
    num_alphas, ids = 0, dict[str, IdArray]()
    for row in rows:  # a table is let go before the next one is read: those of many trials together need much memory
        table = read_predictions(predictions_path(study_dir, row))
        found = alphas(table, spec.id_set)
        choices: tuple[float, ...] = ()
        if row.kind == "trial":
            result = read_result(folder_of(study_dir, row)) or {}
            choices = _choices(recipe, row, found, result)
            moved |= {row.name: float(result["moved"])} if "moved" in result else {}
        points = [(table, alpha) for alpha in (*choices, row.alpha or 0.0)]  # its own alpha comes last
        for name in spec.sets:
            own = sample_ids(table, name, points[0][1])
            require_same_images(ids.setdefault(name, own), own, name)
        correct = {name: correct_matrix(points, name) for name in spec.sets}
        gaps = {name: calibration_gaps(points, name) for name in measured}
        several = Candidate(row.name, tuple(alpha for _, alpha in points), correct, gaps)
        if choices:
            candidates.append(_part(several, slice(None, -1)))
        chosen[row.name] = _part(several, slice(-1, None))
        num_alphas += sum(alpha > 0 for alpha in found) if row.name != ZERO_SHOT else 0
    return Stored(tuple(candidates), chosen, num_alphas, moved)


def _part(candidate: Candidate, taken: slice) -> Candidate:
    """Returns a candidate with some of its alphas."""
    correct = {name: matrix[taken] for name, matrix in candidate.correct.items()}
    gaps = {name: each.take(taken) for name, each in candidate.gaps.items()}
    return Candidate(candidate.name, candidate.alphas[taken], correct, gaps)


def confirmed(study_dir: Path, spec: ObjectiveSpec) -> list[dict[str, BoolArray]]:
    """Returns the trials whose trainings with fresh seeds have all finished, of both stages of a confirm.

    Args:
        study_dir: The study directory.
        spec: The objective over the validation sets.

    Returns:
        Per trial and stage its correctness by set, bool [r, n]; empty before there is a confirm.

    Raises:
        StorageError: The plan or predictions cannot be read.
        DataError: Predictions lack a set or an alpha, or are of different images.
    """
    return [
        row_correct(study_dir, spec, stage, row)
        for stage in read_plan(study_dir) or ()
        if stage is not None
        for row in whole_rows(study_dir, stage)
        if row.role != "baseline"
    ]


def against_baseline(
    recipe: Recipe, best: TrialRow, baselines: Sequence[TrialRow], stored: Stored
) -> dict[str, Any] | None:
    """Returns the best trial against the baseline with the highest objective, as JSON; None without a baseline.

    Args:
        recipe: The study's recipe.
        best: The best trial.
        baselines: Complete baselines.
        stored: Predictions of all of them.
    """
    if not baselines:
        return None
    rival = max(baselines, key=lambda row: row.objective or 0.0)
    one, other = (stored.chosen[row.name].correct for row in (best, rival))
    difference = objective_difference(objective_spec(recipe), one, other)
    sentence, of = headline(difference, rival.name, is_measured_again=False), ""
    if recipe.search.objective.kind == "pareto":
        weight = recipe.search.objective.id_weight
        of = f" by {weight:g} ID + {1 - weight:g} OOD"
    measured = f"Measured at their alphas{of}, on the images that chose"
    return {
        "baseline": rival.name,
        "mean": difference.mean,
        "images_random": difference.images_random,
        "words": difference.words,
        "sentence": sentence,
        "lines": [
            f"{measured}: {best.name}: {sentence}; 95 %, {difference.words}.",
            f"    {best.name} - {rival.name}: {in_points(difference, signed=True)}",
        ],
    }


def read_summary(path: Path, *keys: str) -> dict[str, Any] | None:
    """Returns the content of the summary of a confirm or of a test; None before there is one.

    Args:
        path: The file.
        keys: What must be in it.

    Raises:
        StorageError: The file is damaged.
    """
    if not path.exists():
        return None
    content: Any = files.read_json(path)
    if not isinstance(content, dict) or not {*keys} <= content.keys():
        raise StorageError(Problem(str(path), f"must have {', '.join(keys)}"))
    return content


def _choices(recipe: Recipe, row: TrialRow, found: Sequence[float], result: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the alphas that a trial's alpha was chosen from; only that one where it was fixed or sampled.

    In a Pareto search they are all points of the training that may be on the front.
    """
    if recipe.search.objective.kind == "pareto":
        return tuple(alpha for alpha in found if alpha >= recipe.search.alpha.lowest - 1e-9)
    if "alpha" in row.values or recipe.train.alpha is not None:
        return (row.alpha or 0.0,)
    return tuple(result.get("chosen_from", [alpha for alpha in found if alpha in recipe.search.alpha.measured]))
