"""The search space as plain values: what a trial's values mean for a recipe. Optuna is not needed here."""

from collections.abc import Mapping, Sequence
from typing import Any

from carft_ray.errors import RecipeError
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.rules import batch_findings, train_findings
from carft_ray.recipe.schema import ObjectiveConfig, Recipe
from carft_ray.recipe.text import dotted


def apply(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe that trains with the given values.

    Args:
        recipe: The recipe of a study.
        values: Values over the fields of ``train``: of a trial or of a baseline.

    Raises:
        RecipeError: A name is no field of ``train``, or a value breaks its rule.
    """
    merged = {**recipe.train.model_dump(), **values}
    found = train_findings(merged, ("train",))
    if not found:
        applied = recipe.model_copy(update={"train": TrainConfig.model_validate(merged)})
        found = list(batch_findings(applied))
    if found:
        raise RecipeError([finding.at(dotted(finding.path)) for finding in found])
    return applied


def objective_weights(
    objective: ObjectiveConfig, ood_names: Sequence[str], id_name: str = "id_val"
) -> dict[str, float]:
    """Returns the weight of each set's accuracy in a weighted mean: w for ID, (1 - w) / m for each of m OOD sets.

    Args:
        objective: The objective; its kind must be ``weighted_mean``.
        ood_names: Names of the OOD sets. Without any, ID has weight 1.
        id_name: Name of the ID set.

    Raises:
        ValueError: The objective is no weighted mean, so it has no constant weights.
    """
    if objective.kind != "weighted_mean":
        raise ValueError(f"constant weights exist for weighted_mean only, but got {objective.kind}")
    if not ood_names:
        return {id_name: 1.0}
    each = (1 - objective.id_weight) / len(ood_names)
    return {id_name: objective.id_weight, **dict.fromkeys(ood_names, each)}
