"""Which values lie in a search space. Plain values; Optuna is not needed here.

A parameter that is not drawn (not in the space, or its ``when`` does not hold) has its value of ``train``. So a space
is a set of values over all fields of ``train``.
"""

from collections.abc import Mapping
from typing import Any

from carft_ray.recipe.parameters import SEARCHABLE
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.conditions import active_values, same
from carft_ray.recipe.spaces.grid import contains


def place(values: Mapping[str, Any], recipe: Recipe) -> dict[str, Any] | str:
    """Places values in the search space of a recipe.

    Args:
        values: Values over ``train``; a field that is left out has the recipe's own value.
        recipe: The recipe.

    Returns:
        The values of the parameters that are drawn for them; or the first field that is outside.
    """
    own = recipe.train.model_dump(mode="json")
    whole, space = {**own, **values}, recipe.search.space
    drawn = active_values(space, whole)
    for name in SEARCHABLE:
        inside = contains(space[name], whole[name]) if name in drawn else same(whole[name], own[name])
        if not inside:
            return name
    return {name: drawn[name] for name in space if name in drawn}
