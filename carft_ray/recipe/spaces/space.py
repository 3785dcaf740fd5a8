"""The search space as plain values: what a trial's values mean for a recipe. Optuna is not needed here."""

from collections.abc import Mapping
from typing import Any

from carft_ray.errors import RecipeError
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.rules import batch_findings, train_findings
from carft_ray.recipe.schema import Recipe
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
