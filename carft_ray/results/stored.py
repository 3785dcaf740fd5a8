"""Stored validation predictions of a study as arrays, and evidence made of them: no torch, no model, no test set.

Shape letters: r seeds, n images of one set; images are ordered by sample id, the same in every array.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from carft_ray import files
from carft_ray.data.source import IdArray
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import (
    BoolArray,
    alphas,
    correct_matrix,
    read_predictions,
    require_same_images,
    sample_ids,
)
from carft_ray.layout import CONFIRM, SUMMARY
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirm_plan import TRIALS, PlanRow, Stage, whole_rows
from carft_ray.results.evidence import LABELS, Subject, compare, judged
from carft_ray.results.statistics.images import with_images
from carft_ray.study import typed
from carft_ray.study.rows import ZERO_SHOT, predictions_path
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.training import TrialRow

_PARTS = ("rows", "baselines", "others")
Chosen = dict[str, dict[str, BoolArray]]


def read_stored(study_dir: Path, rows: Sequence[TrialRow], recipe: Recipe) -> tuple[ObjectiveSpec, Chosen, int]:
    """Reads the predictions of complete trials and baselines.

    Args:
        study_dir: The study directory.
        rows: Complete trials and baselines, zero-shot among them.
        recipe: The study's recipe.

    Returns:
        The objective with the images of its sets; per row and set its correctness at its alpha, bool [1, n]; how many
        alphas of trained models were evaluated.

    Raises:
        StorageError: Predictions are missing or damaged.
        DataError: They lack a set or an alpha, or are of different images.
    """
    spec, chosen = objective_spec(recipe), Chosen()
    num_alphas, ids = 0, dict[str, IdArray]()
    for row in rows:  # a table is let go before the next one is read: those of many trials together need much memory
        table, alpha = read_predictions(predictions_path(study_dir, row)), row.alpha or 0.0
        for name in spec.sets:
            own = sample_ids(table, name, alpha)
            require_same_images(ids.setdefault(name, own), own, name)
        chosen[row.name] = {name: correct_matrix([(table, alpha)], name) for name in spec.sets}
        num_alphas += sum(alpha > 0 for alpha in alphas(table, spec.id_set)) if row.name != ZERO_SHOT else 0
    return with_images(spec, recipe, ids) if ids else spec, chosen, num_alphas


def row_correct(
    study_dir: Path, spec: ObjectiveSpec, trainings: Sequence[TrialRow], row: PlanRow
) -> dict[str, BoolArray]:
    """Returns per validation set which images a configuration classifies right at its alpha, bool [r, n].

    The zero-shot model has no seeds: r is 1.

    Raises:
        StorageError: Predictions are missing or damaged.
    """
    return correct_at(tables_of(study_dir, trainings), spec, row.alpha)


def tables_of(study_dir: Path, trainings: Sequence[TrialRow]) -> list[pa.Table]:
    """Returns the stored predictions of each training; of none, those of the zero-shot model."""
    return [read_predictions(predictions_path(study_dir, each)) for each in (*trainings,) or (None,)]


def correct_at(tables: Sequence[pa.Table], spec: ObjectiveSpec, alpha: float) -> dict[str, BoolArray]:
    """Returns per validation set which images each of some trainings classifies right at an alpha, bool [r, n]."""
    return {name: correct_matrix([(table, alpha) for table in tables], name) for name in spec.sets}


def trials_of(study: Snapshot, spec: ObjectiveSpec, stage: Stage) -> list[tuple[str, dict[str, BoolArray]]]:
    """Returns the trials of a stage whose trainings with fresh seeds have all finished: name, and ``row_correct``.

    Raises:
        StorageError: Predictions cannot be read.
        DataError: They lack a set or an alpha, or are of different images.
    """
    return [
        (row.name, row_correct(study.study_dir, spec, trainings, row))
        for row, trainings in whole_rows(stage, study.confirmations)
        if row.role in TRIALS
    ]


def read_compared(study_dir: Path, of: str) -> dict[str, Any] | None:
    """Returns the content of the summary of a confirm or of a test; None before there is one.

    Args:
        study_dir: The study directory.
        of: ``layout.CONFIRM``, ``TEST_DIR``, or the folder of one read in it.

    Raises:
        StorageError: The file is damaged.
    """
    path = study_dir / of / SUMMARY
    if not files.exists(path):
        return None
    form = typed.Compared if of == CONFIRM else typed.Tested
    content: dict[str, Any] = typed.checked(form, files.read_json(study_dir, f"{of}/{SUMMARY}"), str(path))
    subject: Subject = "values" if of == CONFIRM or content.get("confirmed") else "model"
    about = {"kind": "confirm" if of == CONFIRM else "test", "seeds": content.get("seeds", [])}
    if model := content.get("model"):
        content["model"] = _told(model, {**about, "subject": "model"}, str(path))
    return _told(content, {**about, "subject": subject}, str(path))


def _told(found: dict[str, Any], about: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a stored document as it is judged now.

    Raises:
        StorageError: The winner, or what it is compared with, is none of the rows.
    """
    roles = {row["name"]: row["role"] for row in found["rows"]}
    if roles.get(found["winner"]) != "winner":
        raise typed.wrong(path, "the winner must be one of the rows", found["winner"])
    if others := [gap["other"] for gap in (*found["baselines"], *found["others"]) if gap["other"] not in roles]:
        raise typed.wrong(path, "each difference must be from one of the rows", others[0])
    names = found["rows"][0]["sets"].keys()
    if not names or any(each["sets"].keys() != names for key in _PARTS for each in found[key]):
        raise typed.wrong(path, "all rows and differences must be of the same sets", None)
    found.setdefault("without_shared_images", None)
    if without := found.get("without_shared_images"):
        found["without_shared_images"] = _told(without, about, path)
    return judged({**found, **about})


def of_search(
    recipe: Recipe, spec: ObjectiveSpec, best: TrialRow, baselines: Sequence[TrialRow], chosen: Chosen
) -> dict[str, Any]:
    """Returns the evidence of a search: its best trial and the complete baselines, each at its own alpha.

    Args:
        recipe: The study's recipe.
        spec: Of ``read_stored``, as ``chosen``.
        best: The best trial.
        baselines: Complete baselines.
        chosen: Correctness of all of them.
    """
    rows = [
        {"name": row.name, "role": "baseline" if row in baselines else "winner", "alpha": row.alpha or 0.0, "seeds": 0}
        for row in (best, *baselines)
    ]
    label = LABELS["search"]
    if recipe.search.objective.kind == "pareto":
        label += f", by {spec.id_weight:g} ID + {1 - spec.id_weight:g} OOD"
    search = recipe.search
    margin = search.objective.id_margin
    return compare("search", "values", spec, rows, chosen, margin, label=label, baselines=search.baselines)
