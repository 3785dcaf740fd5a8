"""What a read of the test sets has found, as data: intervals, paired differences, the headline, lines for a report.

Shape letters: r seeds, n images of one set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray.evaluation.evaluate import metrics_at
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions
from carft_ray.evaluation.run import objective_spec
from carft_ray.recipe.schema import Recipe
from carft_ray.results.compared import Compared, Row
from carft_ray.results.intervals import (
    Interval,
    accuracy_interval,
    crossed,
    headline,
    in_points,
    objective_difference,
    objective_interval,
    paired_differences,
)
from carft_ray.search.folder import PREPARED
from carft_ray.search.ledger import WENT_ON, Entry
from carft_ray.search.study import ZERO_SHOT

FORMAT_VERSION = 1
ID_TEST = "id_test"

Correct = Mapping[str, BoolArray]  # per set, bool [r, n]


def summarise(
    study_dir: Path,
    recipe: Recipe,
    compared: Compared,
    tables: Mapping[str, pa.Table],
    entry: Entry,
    before: Sequence[Entry],
    number: int,
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.
        compared: The rows that were read.
        tables: Predictions on the test sets by the folder of the training, zero-shot by its name.
        entry: The line of this read in the ledger.
        before: The lines that the ledger held when it began.
        number: Which read it is, from 1.
    """
    spec = _test_spec(recipe)
    names = (spec.id_set, *spec.ood_sets)
    correct = {
        row.name: {
            name: correct_matrix(
                [(tables[run.folder], row.alpha) for run in row.runs] or [(tables[ZERO_SHOT], 0.0)], name
            )
            for name in names
        }
        for row in compared.rows
    }
    validation = {row.name: _validation_objective(study_dir, recipe, row) for row in compared.rows}
    baselines = [row.name for row in compared.baselines]
    rival = max(baselines, key=lambda name: validation[name], default=None)
    found = compare(spec, correct, compared.winner.name, baselines, rival)
    num_images = {name: int(correct[compared.winner.name][name].shape[1]) for name in names}
    went_on = [one for one in before if one.purpose == WENT_ON and one.number < entry.number]
    return {
        "format_version": FORMAT_VERSION,
        "read": number,
        "reason": entry.reason,
        "time": entry.time,
        "user": entry.user,
        "ledger_line": entry.number,
        "searches_after_a_read": len(went_on),
        "confirmed": compared.confirmed,
        "seeds": list(compared.seeds),
        "sets": num_images,
        "ood_mean_over": list(spec.ood_sets),
        "objective": {"kind": spec.kind, "id_weight": spec.id_weight},
        "rows": [
            {
                "name": row.name,
                "role": row.role,
                "alpha": row.alpha,
                "num_seeds": len(row.runs),
                "runs": [run.folder for run in row.runs],
                "validation_objective": validation[row.name],
                "test": {name: _plain(interval) for name, interval in found["rows"][row.name].items()},
            }
            for row in compared.rows
        ],
        "differences": {
            name: {what: _plain(interval) for what, interval in intervals.items()}
            for name, intervals in found["differences"].items()
        },
        "baseline": rival,
        "headline": found["headline"],
        "lines": _lines(compared, found, rival, num_images, entry, number, len(went_on)),
    }


def compare(
    spec: ObjectiveSpec, rows: Mapping[str, Correct], winner: str, baselines: Sequence[str], rival: str | None
) -> dict[str, Any]:
    """Returns the intervals of every row, the paired differences of the winner to every baseline, and the headline.

    Args:
        spec: The objective over the sets that were read.
        rows: Per row its correctness per set, bool [r, n]; one training stands for all seeds where r is 1.
        winner: Name of the row that is compared with the others.
        baselines: Names of the rows that it is compared with.
        rival: The baseline of the headline; None: there is none.
    """
    found: dict[str, Any] = {"rows": {}, "differences": {}, "headline": None}
    ood = {name: 1 / len(spec.ood_sets) for name in spec.ood_sets}

    def ood_mean(values: Mapping[str, Any]) -> Interval:
        return crossed({name: values[name] for name in ood}, ood)

    for name, correct in rows.items():
        intervals = {set_name: accuracy_interval(correct[set_name]) for set_name in (spec.id_set, *spec.ood_sets)}
        if ood:
            intervals["ood_mean"] = ood_mean(correct)
        intervals["objective"] = objective_interval(spec, correct)
        found["rows"][name] = intervals
    for name in baselines:
        a, b = _same_seeds(rows[winner], rows[name])
        differences = paired_differences(a, b)
        intervals = {
            "objective": objective_difference(spec, a, b),
            spec.id_set: crossed({spec.id_set: differences[spec.id_set]}, {spec.id_set: 1.0}),
        }
        if ood:
            intervals["ood_mean"] = ood_mean(differences)
        found["differences"][name] = intervals
    if rival is not None:
        found["headline"] = headline(found["differences"][rival]["objective"], rival.replace("_", " "))
    return found


def _same_seeds(a: Correct, b: Correct) -> tuple[Correct, Correct]:
    """Repeats the one model of a row that has no seeds (zero-shot) for every seed of the other."""
    num_seeds = max(len(next(iter(values.values()))) for values in (a, b))

    def repeated(values: Correct) -> Correct:
        return {name: np.repeat(x, num_seeds, axis=0) if len(x) == 1 else x for name, x in values.items()}

    return repeated(a), repeated(b)


def _test_spec(recipe: Recipe) -> ObjectiveSpec:
    """Returns the objective of a recipe over its test sets."""
    part = recipe.search.objective
    return ObjectiveSpec(part.kind, ID_TEST, tuple(recipe.data.ood_test), part.id_weight)


def _validation_objective(study_dir: Path, recipe: Recipe, row: Row) -> float:
    """Returns the mean objective of a row on the validation sets, at its alpha."""
    folders = [study_dir / run.folder / "predictions" / "validation.parquet" for run in row.runs]
    tables = [read_predictions(path) for path in folders or [study_dir / PREPARED / "zero_shot.parquet"]]
    spec = objective_spec(recipe)
    return float(np.mean([metrics_at(table, spec, row.alpha)["objective"] for table in tables]))


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "interval": list(interval.images_random),
        "over": interval.words,
        "interval_these_images": None if interval.images_fixed is None else list(interval.images_fixed),
        "num_seeds": interval.num_seeds,
        "notes": list(interval.notes),
    }


def _lines(
    compared: Compared,
    found: Mapping[str, Any],
    rival: str | None,
    num_images: Mapping[str, int],
    entry: Entry,
    number: int,
    num_went_on: int,
) -> list[str]:
    """Returns what a report says of a read, a sentence or two per line."""
    winner = compared.winner
    ood = [name for name in num_images if name != ID_TEST]
    reason = f"; reason: {entry.reason}" if entry.reason else ""
    lines = [f"Test read {number}, {entry.time} by {entry.user}{reason}."]
    if num_went_on:
        lines.append(f"The search went on {_times(num_went_on)} after a test read.")
    sets = f"ID test: {ID_TEST} ({num_images[ID_TEST]} images)."
    if ood:
        sets += f" OOD mean: over {', '.join(f'{name} ({num_images[name]})' for name in ood)}."
    lines.append(sets)
    objective = in_points(found["rows"][winner.name]["objective"])
    lines.append(f"{winner.name} at alpha {winner.alpha:.2f}: test objective, points: {objective}.")
    if rival is not None:
        words = found["differences"][rival]["objective"].words
        lines.append(f"On the test sets: {found['headline']}; 95 %, {words}.")
        lines.append(f"{rival.replace('_', ' ')} is the best baseline by its validation objective.")
    named = {"objective": "objective", ID_TEST: "ID test", "ood_mean": "OOD mean"}
    for name, intervals in found["differences"].items():
        for what, interval in intervals.items():
            lines.append(f"{winner.name} - {name}, {named[what]}, points: {in_points(interval, signed=True)}.")
    notes = dict.fromkeys(note for row in found["rows"].values() for note in row["objective"].notes)
    notes.pop("one training: seeds not covered", None)  # each interval says so itself
    return [*lines, *(f"Note: {note}." for note in notes)]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
