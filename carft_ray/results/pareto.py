"""The front of a Pareto search as data and text. Nothing is evaluated."""

from collections.abc import Mapping, Sequence
from typing import Any

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.front import front_of, front_rule, points_of
from carft_ray.study.rows import best_row
from carft_ray.study.training import TrialRow
from carft_ray.words import counted


def front_data(recipe: Recipe, rows: Sequence[TrialRow]) -> dict[str, Any] | None:
    """Returns the front of a Pareto search as plain data; None where the search has one objective.

    Args:
        recipe: The study's.
        rows: Its trials, with their standing.

    Returns:
        ``rule`` (``best``, ``tolerance``, ``words``), ``num_trainings`` and ``num_points`` over which the front is,
        ``points`` by rising ID accuracy: ``name``, ``alpha``, ``id_accuracy``, ``ood_accuracy``, ``best``.
    """
    rule, best = front_rule(recipe.search), best_row(rows)
    if rule is None:
        return None
    complete = [row for row in rows if row.outcome == "complete"]
    return {
        "rule": {"best": rule.best, "tolerance": rule.tolerance, "words": rule.words},
        "num_trainings": len(complete),
        "num_points": len(points_of(complete)),
        "points": [
            {
                "name": point.name,
                "alpha": point.alpha,
                "id_accuracy": point.pair[0],
                "ood_accuracy": point.pair[1],
                "best": best is not None and (point.name, point.alpha) == (best.name, best.alpha),
            }
            for point in front_of(complete)
        ],
    }


def front_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Returns the front as lines of text, by rising ID accuracy; none without a front."""
    if found is None or not found["points"]:
        return []
    points, trainings = counted(found["num_points"], "point"), counted(found["num_trainings"], "training")
    count = f"{len(found['points'])} of {points} (alphas) of {trainings}"
    lines = [f"Front of ID and OOD accuracy: {count}; the best by the rule {found['rule']['words']}."]
    for point in found["points"]:
        pair = f"ID {100 * point['id_accuracy']:.1f} %, OOD {100 * point['ood_accuracy']:.1f} %"
        lines.append(f"    {point['name']} at alpha {point['alpha']:.2f}: {pair}{'  <- best' if point['best'] else ''}")
    return lines


def placed(result: dict[str, Any], row: TrialRow | None) -> dict[str, Any]:
    """Returns the content of a training's ``result.json`` at the point of the front that its row has."""
    if row is None or not row.standing:
        return result
    return {**result, "alpha": row.alpha, "objective": row.objective, "metrics": dict(row.metrics)}
