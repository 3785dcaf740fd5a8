"""What the constraints of a search are called, and how a violation is told. Nothing is measured here.

A violation is a difference of fractions: 0 or less where the constraint is met. Measured ones stand among the metrics
of a training under ``violation/<name>``.
"""

from collections.abc import Mapping

from carft_ray.recipe.schema import ConstraintsConfig, Recipe

VIOLATION = "violation/"  # before the name of a constraint, in metrics
ID_DROP, ECE = "id_drop", "ece"
# in the folder of the preparation: ID accuracy of the baselines under which a trial may fall only so far


def constraint_names(constraints: ConstraintsConfig) -> tuple[str, ...]:
    """Returns the names of all constraints: ``id_drop/<baseline>``, then ``ece/<set>``."""
    drops = [f"{ID_DROP}/{name}" for name in constraints.id_drop]
    return (*drops, *(f"{ECE}/{name}" for name in constraints.ece))


def violations(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the measured violations among metrics, by the name of the constraint."""
    return {name.removeprefix(VIOLATION): value for name, value in metrics.items() if name.startswith(VIOLATION)}


def total_violation(metrics: Mapping[str, float]) -> float:
    """Returns the sum of the positive parts of the violations among metrics; 0 means that all constraints are met."""
    return sum(max(0.0, value) for value in violations(metrics).values())


def violation_words(metrics: Mapping[str, float]) -> str:
    """Returns which constraints are missed and by how much: ``violates id_drop zero_shot by 0.6 points``; else ''."""
    missed = [(name.replace("/", " "), 100 * value) for name, value in violations(metrics).items() if value > 0]
    words = [
        f"{name} by {value:.1f} points" if value >= 0.1 else f"{name} by {value:.1g} points" for name, value in missed
    ]
    return "violates " + " and ".join(words) if words else ""


def alone(recipe: Recipe) -> Recipe:
    """Returns the recipe of a training that is no trial (a baseline, a fresh seed): free of constraints, one number."""
    objective = recipe.search.objective
    if objective.kind == "pareto":
        objective = objective.model_copy(update={"kind": "weighted_mean"})
    search = recipe.search.model_copy(update={"constraints": ConstraintsConfig(), "objective": objective})
    return recipe.model_copy(update={"search": search})
