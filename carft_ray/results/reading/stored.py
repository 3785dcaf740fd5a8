"""Stored validation predictions of a study as arrays: no torch, no model, no test set.

Shape letters: A alphas, r seeds, n images of one set; images are ordered by sample id, the same in every array.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.evaluation.constraints import Limit, calibration_gaps
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray, alphas, correct_matrix, read_predictions
from carft_ray.layout import ANALYSIS_SUMMARY, PREDICTIONS, PREPARED, SUMMARY, TEST_DIR, ZERO_SHOT_TABLE
from carft_ray.recipe.schema import Recipe
from carft_ray.results.confirmation.plan import read_plan
from carft_ray.results.confirmation.summary import is_whole, row_correct
from carft_ray.results.reading.overview import folder_of
from carft_ray.results.statistics.bootstrap import Candidate
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
    """Returns where the validation predictions of a trial or baseline lie."""
    if row.name == ZERO_SHOT:
        return study_dir / PREPARED / ZERO_SHOT_TABLE
    return folder_of(study_dir, row) / PREDICTIONS


def read_stored(
    study_dir: Path,
    recipe: Recipe,
    trials: Sequence[TrialRow],
    baselines: Sequence[TrialRow],
    spec: ObjectiveSpec,
    bounds: Sequence[Limit] = (),
) -> Stored:
    """Reads the predictions of complete trials and baselines.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.
        trials: Complete trials, in the order of the search.
        baselines: Complete baselines, zero-shot among them.
        spec: The objective.
        bounds: The constraints; what their calibration errors are made of is read with the candidates.

    Raises:
        StorageError: Predictions are missing or damaged.
        DataError: They lack a set or an alpha, or are of different images.
    """
    rows = [*trials, *baselines]
    tables = [read_predictions(predictions_path(study_dir, row)) for row in rows]
    stored = [alphas(table, spec.id_set) for table in tables]
    results = {row.name: read_result(folder_of(study_dir, row)) or {} for row in trials}
    among = [
        _choices(recipe, row, found, results[row.name]) if row.kind == "trial" else ()
        for row, found in zip(rows, stored, strict=True)
    ]
    asked = [
        (table, alpha)
        for row, table, choices in zip(rows, tables, among, strict=True)
        for alpha in (*choices, row.alpha or 0.0)
    ]
    matrices = {name: correct_matrix(asked, name) for name in (spec.id_set, *spec.ood_sets)}
    calibrated = [limit.set_name for limit in bounds if limit.measure == "ece"]
    gaps = {name: calibration_gaps(asked, name) for name in calibrated}

    def part(name: str, of_alphas: tuple[float, ...], first: int) -> Candidate:
        taken = slice(first, first + len(of_alphas))
        correct = {each: matrix[taken] for each, matrix in matrices.items()}
        return Candidate(name, of_alphas, correct, {each: found.take(taken) for each, found in gaps.items()})

    candidates, chosen, start = [], {}, 0
    for row, choices in zip(rows, among, strict=True):
        if choices:
            candidates.append(part(row.name, choices, start))
        chosen[row.name] = part(row.name, (row.alpha or 0.0,), start + len(choices))
        start += len(choices) + 1
    trained = [found for row, found in zip(rows, stored, strict=True) if row.name != ZERO_SHOT]
    moved = {name: float(result["moved"]) for name, result in results.items() if "moved" in result}
    return Stored(tuple(candidates), chosen, sum(alpha > 0 for found in trained for alpha in found), moved)


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
        row_correct(study_dir, spec, row, stage.seeds)
        for stage in read_plan(study_dir) or ()
        if stage is not None
        for row in stage.rows
        if row.role != "baseline" and is_whole(study_dir, row, stage.seeds)
    ]


def found_beside(study_dir: Path, step: str, details: bool = True) -> list[str]:
    """Returns the ``row_lines`` and ``lines`` of ``<step>/summary.json``; none without it.

    Args:
        study_dir: The study directory.
        step: ``confirm`` or ``test``.
        details: False: its ``brief``, where it has one.

    Raises:
        StorageError: The file is damaged.
    """
    path = study_dir / step / SUMMARY
    if not path.exists():
        return []
    content: Any = files.read_json(path)
    lines = content.get("lines") if isinstance(content, dict) else None
    if not isinstance(lines, list):
        raise StorageError(f"{path}: must have a list 'lines'")
    rows, short = content.get("row_lines", []), content.get("brief")
    if short is not None and not details:
        rows, lines = short["rows"], short["lines"]
    return [str(line) for line in [*rows, *lines]]


def found_analysis(study_dir: Path) -> dict[str, Any] | None:
    """Returns what the newest `test --all-trials` has found; None before there is one.

    Raises:
        StorageError: The file is damaged.
    """
    path = study_dir / TEST_DIR / ANALYSIS_SUMMARY
    if not path.exists():
        return None
    content: Any = files.read_json(path)
    if not isinstance(content, dict) or not {"rules", "lines"} <= content.keys():
        raise StorageError(Problem(str(path), "must have 'rules' and 'lines'"))
    return content


def _choices(recipe: Recipe, row: TrialRow, found: Sequence[float], result: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the alphas that a trial's alpha was chosen from; one that was fixed or sampled stands alone.

    In a Pareto search they are all points of the training that may be on the front.
    """
    if recipe.search.objective.kind == "pareto":
        return tuple(alpha for alpha in found if alpha >= recipe.search.alpha.lowest - 1e-9)
    if "alpha" in row.values or recipe.train.alpha is not None:
        return (row.alpha or 0.0,)
    return tuple(result.get("chosen_from", [alpha for alpha in found if alpha in recipe.search.alpha.measured]))
