"""The values of a trial: drawn from a search space, applied to a recipe. Optuna is not needed here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from carft_ray.errors import RecipeError
from carft_ray.recipe.messages import problems_in
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.schema.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.conditions import in_order, is_active


def apply(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe that trains with the given values.

    Args:
        recipe: The recipe of a study.
        values: Values over the fields of ``train``: of a trial or of a baseline.

    Raises:
        RecipeError: A name is no field of ``train``, or a value breaks its rule.
    """
    merged = {**recipe.train.model_dump(), **values}
    try:
        train = TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(problems_in(error, TrainConfig, ("train",))) from None
    return recipe.model_copy(update={"train": train})


def drawn(space: Mapping[str, Parameter], share: Callable[[], float]) -> dict[str, Any]:
    """Returns the values of one trial as random search draws them, without those of inactive parameters.

    Args:
        space: The search space.
        share: Called for each parameter, for example ``rng.uniform``: how far up its range (of the logarithm with
            ``log``) the value lies, in [0, 1).
    """
    values: dict[str, Any] = {}
    for name, parameter in in_order(space).items():
        if is_active(parameter, values):
            values[name] = _value(parameter, share())
    return values


def middle(space: Mapping[str, Parameter]) -> dict[str, Any]:
    """Returns the values of the trial in the middle of a space."""
    return drawn(space, lambda: 0.5)


def _value(parameter: Parameter, share: float) -> Any:
    if isinstance(parameter, CategoricalParameter):
        return parameter.choices[int(share * len(parameter.choices))]
    low, high = parameter.low, parameter.high
    if parameter.log:
        # a whole number n has the range from n - 1/2 to n + 1/2
        half = 0.5 if isinstance(parameter, IntParameter) else 0.0
        bottom, top = math.log(low - half), math.log(high + half)
        value = math.exp(bottom + share * (top - bottom))
        return min(max(round(value), low), high) if isinstance(parameter, IntParameter) else value
    if parameter.step is not None:
        number = round((high - low) / parameter.step) + 1
        value = min(low + int(share * number) * parameter.step, high)  # rounding may lead beyond
        return int(value) if isinstance(parameter, IntParameter) else float(value)
    return low + share * (high - low)
