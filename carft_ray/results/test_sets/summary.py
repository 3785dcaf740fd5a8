"""What a read of the test sets has found, as data: intervals, paired differences, the headline, lines for a report."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray.data.shared.shared_images import SharedRow, shared_counts, shared_lines
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import correct_matrix, sample_ids
from carft_ray.recipe.schema import Recipe
from carft_ray.results.reading.configurations import Compared
from carft_ray.results.statistics.intervals import Interval
from carft_ray.results.statistics.paired import Difference, brief, compare, comparison_lines, row_lines
from carft_ray.results.statistics.paired import Row as ComparedRow
from carft_ray.study.ledger import WENT_ON, Entry
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.words import counted, times

FORMAT_VERSION = 1
ID_TEST = "id_test"


def summarise(
    recipe: Recipe,
    compared: Compared,
    shared: Sequence[SharedRow],
    tables: Mapping[str, pa.Table],
    entry: Entry,
    before: Sequence[Entry],
    number: int,
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        recipe: Of the study.
        compared: The rows that were read.
        shared: The study's list of images in two roles: where test images stand among them, the numbers are given
            without these, too.
        tables: Predictions on the test sets by the folder of the training, zero-shot by its name.
        entry: The line of this read in the ledger.
        before: The lines that the ledger held when it began.
        number: Which read it is, from 1.
    """
    part = recipe.search.objective
    spec = replace(objective_spec(recipe), id_set=ID_TEST, ood_sets=tuple(recipe.data.ood_test))
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
    rival = max(compared.baselines, key=lambda row: row.objective, default=None)
    compare_rows = functools.partial(
        compare,
        spec,
        winner=compared.winner.name,
        baselines=[row.name for row in compared.baselines],
        headline_baseline=None if rival is None else rival.name,
        id_margin=part.id_margin,
    )
    comparison = compare_rows(correct=correct, label="test sets")
    any_row = compared.rows[0]
    table, alpha = (tables[any_row.runs[0].folder], any_row.alpha) if any_row.runs else (tables[ZERO_SHOT], 0.0)
    alone = {name: ~np.isin(sample_ids(table, name, alpha), _shared_ids(shared, name)) for name in names}
    without = None
    if not all(mask.all() for mask in alone.values()) and all(mask.any() for mask in alone.values()):
        fewer = {row: {name: by_set[name][:, alone[name]] for name in names} for row, by_set in correct.items()}
        without = compare_rows(correct=fewer, label="test sets without images that stand in other roles")
    num_images = {name: int(correct[compared.winner.name][name].shape[1]) for name in names}
    read = of_read(entry, before, number)
    begin = [*_lines(compared, num_images, entry, number, read["searches_after_a_read"]), *shared_lines(shared)]
    short = brief(comparison)
    return {
        "format_version": FORMAT_VERSION,
        **read,
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
                "validation_objective": row.objective,
                "test": _row_data(found),
            }
            for row, found in zip(compared.rows, comparison.rows, strict=True)
        ],
        "differences": {each.other: _difference_data(each) for each in comparison.baselines},
        "baseline": comparison.headline_baseline,
        "headline": comparison.headline,
        "shared_images": shared_counts(shared),
        "without_shared_images": None
        if without is None
        else {
            "sets": {name: int(mask.sum()) for name, mask in alone.items()},
            "rows": {row.name: _row_data(row) for row in without.rows},
            "differences": {each.other: _difference_data(each) for each in without.baselines},
            "headline": without.headline,
        },
        "row_lines": row_lines(comparison) + ([] if without is None else row_lines(without)),
        "lines": [
            *begin,
            *([] if without is None else comparison_lines(without)),
            *comparison_lines(comparison),
        ],
        "brief": {
            "rows": short["rows"],
            "lines": [*begin, *([] if without is None else brief(without)["lines"]), *short["lines"]],
        },
    }


def _shared_ids(shared: Sequence[SharedRow], name: str) -> list[int]:
    """Returns the sample ids of a test set's images that stand in other roles too."""
    places = {f"data.{role}" for role in (name, f"{name}.of", f"ood_test.{name}", f"ood_test.{name}.of")}
    return [image[1] for row in shared for image in row.images if image[0] in places and row.done == row.other_done]


def of_read(entry: Entry, before: Sequence[Entry], number: int) -> dict[str, Any]:
    """Returns what a summary says of the read itself; the arguments are those of ``summarise``."""
    return {
        "read": number,
        "reason": entry.reason,
        "time": entry.time,
        "user": entry.user,
        "ledger_line": entry.number,
        "searches_after_a_read": sum(one.purpose == WENT_ON and one.number < entry.number for one in before),
    }


def _row_data(row: ComparedRow) -> dict[str, Any]:
    found = {**row.sets, "objective": row.objective}
    if row.ood_accuracy is not None:
        found["ood_mean"] = row.ood_accuracy
    return {name: _plain(interval) for name, interval in found.items()}


def _difference_data(difference: Difference) -> dict[str, Any]:
    return {
        "objective": {**_plain(difference.objective), "p_holm": difference.p_holm},
        "sets": {
            name: {**_plain(interval), "p_holm": difference.sets_p_holm[name]}
            for name, interval in difference.sets.items()
        },
        "keeps_id": difference.keeps_id,
    }


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "interval": list(interval.images_random),
        "over": interval.words,
        "interval_these_images": None if interval.images_fixed is None else list(interval.images_fixed),
        "num_seeds": interval.num_seeds,
        "notes": list(interval.notes),
    }


def _lines(compared: Compared, num_images: Mapping[str, int], entry: Entry, number: int, num_went_on: int) -> list[str]:
    """Returns what a report says of a read before the numbers."""
    ood = [name for name in num_images if name != ID_TEST]
    reason = f"; reason: {entry.reason}" if entry.reason else ""
    lines = [f"Test read {number}, {entry.time} by {entry.user}{reason}."]
    if num_went_on:
        lines.append(f"The search went on {times(num_went_on)} after a test read.")
    sets = f"ID: {ID_TEST} ({counted(num_images[ID_TEST], 'image')})."
    if ood:
        sets += f" OOD mean: over {', '.join(f'{name} ({num_images[name]})' for name in ood)}."
    lines.append(sets)
    seeds = f"{len(compared.seeds)} fresh seeds" if compared.confirmed else "one training each"
    return [*lines, f"{seeds}; alphas and the baseline of the headline were chosen on the validation sets."]
