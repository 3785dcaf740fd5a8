"""What the study tells of a finished training, from its result alone. Nothing here is read or written."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from carft_ray.recipe.constraints import VIOLATION, violations
from carft_ray.study.front import spread_points

ROUNDING = 1e-9  # alphas are sums of steps: one that is the lowest but for rounding is within


def constraint_values(outcome: str, metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Returns all constraints of a finished trial for the sampler; values above 0 are not met.

    Args:
        outcome: Of the training.
        metrics: Of a complete one: its violations are among them.
        names: Of the recipe's constraints.

    Returns:
        ``trained``, and one for each name: what was measured of a complete trial, else 0.
    """
    measured = violations(metrics) if outcome == "complete" else {}
    trained = 1.0 if outcome in ("diverged", "error") else -1.0
    return {"trained": trained, **{name: measured.get(name, 0.0) for name in names}}


def missing_metrics(metrics: Mapping[str, float], constraints: Sequence[str], pareto: bool) -> tuple[list[str], str]:
    """Returns which metrics a trial of a study must have and has not, and the rule that it breaks."""
    wanted = [VIOLATION + name for name in constraints]
    wanted += ["id_accuracy", "ood_accuracy"] if pareto else []
    rule = f"the metrics of a trial of this study must have {', '.join(wanted)}"
    return [name for name in wanted if name not in metrics], rule


def result_attributes(result: Mapping[str, Any], lowest: float | None = None) -> dict[str, Any]:
    """Returns what is kept of a result with its trial.

    Args:
        result: Content of a ``result.json``.
        lowest: Of a trial of a Pareto search, the lowest alpha that may be chosen; then all points of its curve that
            may be on the front are kept, too, the trial's own among them.
    """
    found = {
        "outcome": "complete",
        "alpha": result.get("alpha"),
        "fitted": bool(result.get("alpha_choice", {}).get("fitted", False)),
        "at_chance": bool(result.get("at_chance", False)),
        "metrics": result["metrics"],
        "elapsed_s": result.get("elapsed_s"),
    }
    if lowest is None:
        return found
    curve = [point for point in result.get("curve", []) if point["alpha"] >= lowest - ROUNDING]
    if all(point["alpha"] != result["alpha"] for point in curve):
        curve.append({"alpha": result["alpha"], **result["metrics"]})
    return {**found, "objective": result["objective"], "points": curve}


def further_points(
    points: Sequence[dict[str, float]], alpha: float, there: Collection[float], within: Callable[[float], bool]
) -> list[dict[str, float]]:
    """Returns the points of a training that the sampler is still to be told of.

    Args:
        points: All of the training.
        alpha: That of the training itself, which is told as itself.
        there: Alphas of the points that it has been told of already.
        within: Tells whether an alpha is in the search space: the sampler takes no other.
    """
    return [point for point in spread_points(points, alpha) if point["alpha"] not in there and within(point["alpha"])]
