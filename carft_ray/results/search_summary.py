"""What a search has found, as data: rows for tables and JSON."""

from collections.abc import Mapping
from typing import Any

from carft_ray.launch.command import Ran
from carft_ray.layout import BEST, FIGURE_PNG
from carft_ray.recipe.space import num_trials
from carft_ray.results.evidence import headline_lines
from carft_ray.results.reading.status_and_ls import (
    expected_data,
    expected_lines,
    front_data,
    front_lines,
    pruner_quality,
)
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.soup_lines import soup_lines
from carft_ray.results.stored import of_search, read_stored
from carft_ray.study.best import constraint_lines
from carft_ray.study.place import named
from carft_ray.study.rows import best_first, require_finished
from carft_ray.study.snapshot import Snapshot
from carft_ray.words import counted


def search_summary(ran: Ran) -> dict[str, Any]:
    """Returns counts, rows (baselines, then trials from the best down) and the lines that sum a search up."""
    study = ran.study
    view, recipe = Overview.from_snapshot(study), study.recipe
    rows = [view.data(row) for row in (*view.all_baselines, *best_first(view.trials))]
    expected = expected_data(study)
    return {
        "study": named(study.study_dir),
        "trials": view.counts(),
        "pruner": pruner_quality(recipe.search.pruner, study.trials),
        "new_trials": ran.num_new,
        "elapsed_s": round(ran.elapsed_s, 1),
        "best": next(row for row in rows if row["best"]),
        "rows": rows,
        "front": front_data(recipe, study.trials),
        "expected": expected,
        "lines": _lines(study, expected),
        "soups": [view.data(row) for row in view.soups],
        "budget": {"used_up": bool(ran.out_of_budget), "line": budget_line(ran)},
        "best_recipe": str(study.study_dir / BEST),
        "figure": str(study.study_dir / FIGURE_PNG),
    }


def budget_line(ran: Ran) -> str:
    """Returns what a search that its budget has ended leaves unfinished, in a sentence; empty when it was not."""
    if not ran.out_of_budget:
        return ""
    begun = [row.name for row in ran.study.searched if row.outcome == "running"]
    wanted, finished = num_trials(ran.study.recipe), ran.study.num_finished
    stopped = f", {counted(len(begun), 'trial')} stopped ({', '.join(begun)}): resume continues them" if begun else ""
    done = f"{finished} of {counted(wanted, 'trial')} finished{stopped}"
    return f"The search has ended early: {ran.out_of_budget}. {done}."


def _lines(study: Snapshot, expected: Mapping[str, Any] | None) -> list[str]:
    recipe, best = study.recipe, require_finished(study.study_dir, study.best)
    front = front_data(recipe, study.trials)
    lines = expected_lines(expected)
    if front is not None:
        pair = f"ID {100 * best.metrics['id_accuracy']:.1f} % and OOD {100 * best.metrics['ood_accuracy']:.1f} %"
        lines = [f"Best: {best.name}, {pair} at alpha {best.alpha or 0:.2f}."]
    rivals = [row for row in study.baselines if row.objective is not None]
    spec, chosen, _ = read_stored(study.study_dir, [best, *rivals], recipe)
    return [
        *front_lines(front),
        *constraint_lines(best),
        *lines,
        *soup_lines(study),
        *headline_lines(of_search(recipe, spec, best, rivals, chosen)),
        "Measured numbers of the best trial helped to choose it, so they are too high; none is from a test set.",
        *([] if recipe.data.ood_val else ["Selected on ID only: the recipe has no ood_val."]),
    ]
