"""What a search has found, as data: rows for tables and JSON."""

from typing import Any

from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions
from carft_ray.launch.runs.search import SearchResult
from carft_ray.layout import BEST, FIGURE_PNG
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.grid import num_trials
from carft_ray.results.pareto import front_data, front_lines, mean_words
from carft_ray.results.reading.overview import STATES, own_values, row_dict, state_at_rest
from carft_ray.results.reading.stored import predictions_path
from carft_ray.results.statistics.intervals import headline, objective_difference
from carft_ray.results.statistics.pruner_quality import pruner_quality
from carft_ray.study.best import constraint_lines
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import best_first
from carft_ray.words import counted


def study_summary(recipe: Recipe, result: SearchResult) -> dict[str, Any]:
    """Returns counts, rows (baselines, then trials from the best down) and the lines that sum the search up."""
    best = result.best
    trials = best_first(result.trials)
    states = [state_at_rest(row) for row in result.trials]
    own = own_values(recipe, [*result.baselines, *trials])
    rows = [row_dict(row, best, result.study_dir, own) for row in (*result.baselines, *trials)]
    return {
        "study": str(result.study_dir),
        "trials": {name: states.count(name) for name in STATES},
        "pruner": None if recipe.search.pruner.name == "none" else pruner_quality(recipe.search.pruner, result.trials),
        "new_trials": result.num_new,
        "elapsed_s": round(result.elapsed_s, 1),
        "best": next(row for row in rows if row["best"]),
        "rows": rows,
        "front": front_data(recipe, result.trials),
        "lines": _lines(recipe, result),
        "budget": {"used_up": bool(result.out_of_budget), "line": budget_line(recipe, result)},
        "best_recipe": str(result.study_dir / BEST),
        "figure": str(result.study_dir / FIGURE_PNG),
    }


def budget_line(recipe: Recipe, result: SearchResult) -> str:
    """Returns what a search that its budget has ended leaves unfinished, in a sentence; empty when it was not."""
    if not result.out_of_budget:
        return ""
    begun = [row.name for row in result.trials if row.outcome == "running"]
    wanted, finished = num_trials(recipe), len(result.trials) - len(begun)
    stopped = f", {counted(len(begun), 'trial')} stopped ({', '.join(begun)}): resume goes on" if begun else ""
    done = f"{finished} of {counted(wanted, 'trial')} finished{stopped}"
    return f"The search has ended early: {result.out_of_budget}. {done}."


def _lines(recipe: Recipe, result: SearchResult) -> list[str]:
    best, front = result.best, front_data(recipe, result.trials)
    value = f"objective {100 * (best.objective or 0):.1f} %{' (fitted)' if best.fitted else ''}"
    if front is not None:
        pair = (best.metrics["id_accuracy"], best.metrics["ood_accuracy"])
        value = f"ID {100 * pair[0]:.1f} % and OOD {100 * pair[1]:.1f} %"
    lines = [*front_lines(front), *constraint_lines(best)]
    lines.append(f"Best: {best.name}, {value} at alpha {best.alpha or 0:.2f}.")
    rivals = [row for row in result.baselines if row.objective is not None]
    if rivals:
        rival = max(rivals, key=lambda row: row.objective or 0)
        difference = objective_difference(
            objective_spec(recipe), _correct(recipe, result, best), _correct(recipe, result, rival)
        )
        text = headline(difference, rival.name.replace("_", " "))
        of = f", by {mean_words(recipe)}" if front is not None else ""
        lines.append(f"Measured at their alphas{of}: {text}; 95 %, {difference.words}.")
    lines.append("These numbers chose the best trial, so they flatter it; test sets were not read.")
    if not recipe.data.ood_val:
        lines.append("Selected on ID only: the recipe has no ood_val.")
    return lines


def _correct(recipe: Recipe, result: SearchResult, row: TrialRow) -> dict[str, BoolArray]:
    """Returns per validation set which images a row classifies right at its alpha, bool [1, N]."""
    table, spec = read_predictions(predictions_path(result.study_dir, row)), objective_spec(recipe)
    return {name: correct_matrix([(table, row.alpha or 0.0)], name) for name in (spec.id_set, *spec.ood_sets)}
