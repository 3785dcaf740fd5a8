"""What a study's numbers are worth (`report`): the best as measured and expected, the headline, tables.

Everything is read from stored validation predictions; no test set is opened. The tables may be written as CSV files.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from carft_ray import files
from carft_ray.data.duplicates.shared_images import read_shared, shared_counts, shared_lines
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.layout import CONFIRM, TEST_DIR
from carft_ray.recipe.loading import own_functions
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import violations
from carft_ray.results.confirm_numbers import confirm_lines
from carft_ray.results.confirm_plan import last_stage
from carft_ray.results.delivered import STANDING, delivered, soups_of
from carft_ray.results.evidence import headline_lines, later_best, row_lines
from carft_ray.results.reading.status_and_ls import expected_data, expected_lines, front_data, front_lines
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.statistics.selection_bias import correct_best, ranking_noise
from carft_ray.results.stored import Chosen, of_search, read_compared, read_stored
from carft_ray.results.test_summary import read_lines
from carft_ray.study.best import constraint_lines
from carft_ray.study.place import named
from carft_ray.study.rows import ZERO_SHOT, require_finished
from carft_ray.study.training import TrialRow
from carft_ray.study.warm_start import num_test_reads
from carft_ray.untrusted import csv_cell
from carft_ray.words import counted, times

OWN_CHOICES = (
    "Your own trainer sees the labelled validation sets: its own choices on them (a checkpoint, when to stop) are not "
    "counted, and no number here is corrected for them."
)
_OF_SETS = pa.schema(
    [
        ("evidence", pa.string()),  # test sets, validation sets with fresh seeds, or the search
        ("name", pa.string()),  # of the configuration; of a difference, "winner - baseline"
        ("role", pa.string()),  # best, winner, baseline, ..., difference
        ("alpha", pa.float64()),
        ("set", pa.string()),  # or ood_mean, objective
        ("mean", pa.float64()),
        ("low", pa.float64()),  # 95 % interval, where there is one
        ("high", pa.float64()),
    ]
)


def study_report(view: Overview) -> dict[str, Any]:
    """Returns the report as plain data; ``lines`` is its text.

    Raises:
        NoSuccessfulTrialError: No trial has finished.
        HoldOutError: The ledger was changed, so how often the test sets were read is not known.
        StorageError, DataError: Stored predictions are missing, damaged or of different images.
    """
    best, recipe, study_dir = require_finished(view.study_dir, view.best), view.recipe, view.study_dir
    front, shared = front_data(recipe, view.trials), read_shared(study_dir)
    trials, baselines = (
        [row for row in rows if row.outcome == "complete" and row.objective is not None]
        for rows in (view.trials, view.baselines)
    )
    spec, chosen, num_alphas = read_stored(study_dir, [*trials, *baselines], recipe)
    data, worth = _by_one_number(view, best, trials, spec, chosen) if front is None else _by_front(best, front)
    model = _model(view, trials, data["noise"])
    ended = [row for row in (*view.trials, *view.all_baselines) if row.outcome != "running" and row.name != ZERO_SHOT]
    devices = Counter(
        device for row in ended if (device := view.result(row).get("environment", {}).get("device")) is not None
    )
    counts = {
        "trials": view.counts(),
        "devices": dict(devices.most_common()),
        "trainings": len(ended),
        "alphas": num_alphas,
        "test_reads": num_test_reads(study_dir, view.log),
    }
    evidence = of_search(recipe, spec, best, baselines, chosen)
    headline = headline_lines(evidence)
    return {
        "study": named(study_dir),
        "name": recipe.name,
        "counts": counts,
        "shared_images": shared_counts(shared),
        "best": {
            "name": best.name,
            "alpha": best.alpha,
            "objective": best.objective,
            "violations": violations(best.metrics),
        },
        "front": front,
        **data,
        "model": model,
        "evidence": evidence,
        "lines": [
            *_count_lines(recipe, counts),
            *shared_lines(shared),
            "",
            *worth,
            *constraint_lines(best),
            model["words"],
            *(["", *headline] if headline else []),
            *_later_lines(study_dir, best.name),
        ],
    }


def _later_lines(study_dir: Path, best: str) -> list[str]:
    """Returns what a confirm and a read of the test sets have found, as text, and whether the best trial is in it."""
    lines = []
    for folder, told in ((CONFIRM, confirm_lines), (TEST_DIR, read_lines)):
        if found := read_compared(study_dir, folder):
            parts = filter(None, (found, found["without_shared_images"]))
            rows = [line for part in parts for line in row_lines(part)]
            lines += ["", *rows, *told(found), *later_best(found, best)]
    return lines


def _by_one_number(
    view: Overview, best: TrialRow, trials: Sequence[TrialRow], spec: ObjectiveSpec, chosen: Chosen
) -> tuple[dict[str, Any], list[str]]:
    """Returns what the best values are expected to measure, and the noise of the images, as data and as text.

    ``noise`` is that of the trials that compete: those that miss constraints do so only where no trial meets them.
    """
    competing = [row for row in trials if row.violation <= best.violation]
    objectives = [row.objective or 0.0 for row in competing]
    correct = {name: np.concatenate([chosen[row.name][name] for row in competing]) for name in spec.sets}
    expected = expected_data(view)
    return (
        {"noise": ranking_noise(spec, objectives, correct)[0], "expected": expected},
        expected_lines(expected),
    )


def _model(view: Overview, rows: Sequence[TrialRow], noise: float | None) -> dict[str, Any]:
    """Returns the model that `export` writes.

    It was chosen by its objective, among all trainings and alphas that were tried: ``corrected`` is without the bias of
    that choice. A file keeps its seed, so the noise is that of the images. None in a Pareto search.
    """
    model, standing = delivered(view)
    stage = last_stage(view.study_dir)
    fresh = [row for row in view.confirmations if stage and row.name.startswith(f"{stage.winner}-seed")]
    soups = soups_of(view, (*view.trials, *fresh))
    results = [view.result(row) for row in (*rows, *fresh, *soups)]
    tried = [point["objective"] for result in results for point in result.get("curve") or () if point["alpha"]]
    tried += [each["objective"] for result in results for each in result.get("soup", {}).get("tried", ())]
    corrected = None
    text = f"Model of `export`: {model['name']} at alpha {model['alpha']:.2f}, {STANDING[standing]}. Its objective is "
    text += f"{100 * model['objective']:.1f} % on the images that chose it"
    if noise is not None:
        optimism = correct_best(tried, noise)["optimism"]
        corrected = {"value": model["objective"] - optimism, "optimism": optimism, "num_tried": len(tried)}
        of = f"{counted(len(tried), 'value')}, each training{' and soup' * bool(soups)} at each alpha"
        text += f", {100 * corrected['value']:.1f} % without the selection bias of the best of {of}"
    return {**model, "standing": standing, "corrected": corrected, "words": f"{text}."}


def _by_front(best: TrialRow, front: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns what is known of the best point of a front; the expected objective belongs to a choice by one number."""
    pair = f"ID {100 * best.metrics['id_accuracy']:.1f} %, OOD {100 * best.metrics['ood_accuracy']:.1f} %"
    return (
        {"noise": None, "expected": None},
        [
            *front_lines(front),
            f"Best as measured: {best.name} at alpha {best.alpha or 0:.2f}, {pair}. It was chosen by these numbers, so "
            "they are too high; a confirm measures them again.",
        ],
    )


def _count_lines(recipe: Recipe, counts: dict[str, Any]) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in counts["trials"].items() if count)
    kinds = ", ".join(f"{count} on {device}" for device, count in counts["devices"].items())
    mixed = [f"They ran on different devices, which round differently: {kinds}."] if len(counts["devices"]) > 1 else []
    return [
        f"{recipe.name}: trials: {states}.",
        *mixed,
        f"{counted(counts['trainings'], 'training')} and {counted(counts['alphas'], 'evaluated alpha')} were compared "
        f"on these validation images; test sets were read {times(counts['test_reads'])}.",
        *([OWN_CHOICES] if own_functions(recipe) else []),
    ]


def curves_table(view: Overview) -> pa.Table:
    """Returns the alpha curves of all finished trials and baselines, a row per measured point.

    Columns: ``kind``, ``name``, ``alpha``, ``chosen``, then every metric of the points.
    """
    rows = [
        {"kind": row.kind, "name": row.name, "chosen": point["alpha"] == row.alpha, **point}
        for row in (*view.trials, *view.all_baselines)
        for point in view.result(row).get("curve") or ()
    ]
    own = {"kind": pa.string(), "name": pa.string(), "alpha": pa.float64(), "chosen": pa.bool_()}
    names = dict.fromkeys([*own, *(name for row in rows for name in row)])
    return pa.table({name: pa.array([row.get(name) for row in rows], own.get(name, pa.float64())) for name in names})


def sets_table(tables: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns accuracies per set with their intervals, and the differences to the baselines, a row per number.

    Args:
        tables: Of ``page.data.set_tables``, the best evidence first.
    """
    rows = [
        {"evidence": table["label"], "role": "difference", "alpha": None, **row, "set": name, **cell}
        for table in tables
        for row in (*table["rows"], *table["differences"])
        for name, cell in zip(table["sets"], row["cells"], strict=True)
        if cell
    ]
    return pa.table({each.name: pa.array([row.get(each.name) for row in rows], each.type) for each in _OF_SETS})


def write_tables(tables: Mapping[str, pa.Table], folder: Path) -> list[Path]:
    """Writes each table as ``NAME.csv``; returns the paths.

    Raises:
        StorageError: A file cannot be written.
    """
    paths = {folder / f"{name}.csv": table for name, table in tables.items()}
    for path, table in paths.items():
        files.write_bytes(path, _csv(table))
    return [*paths]


def _csv(table: pa.Table) -> bytes:
    for index, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_string(column.type):
            cells = pa.array([None if text is None else csv_cell(text) for text in column.to_pylist()], pa.string())
            table = table.set_column(index, name, cells)
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table.rename_columns([*map(csv_cell, table.column_names)]), buffer)
    return buffer.getvalue()
