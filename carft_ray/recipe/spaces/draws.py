"""Values drawn from a search space as random search draws them, to know what a trial costs on average."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.spaces.conditions import in_order, is_active


def drawn(space: Mapping[str, Parameter], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the values of one trial: uniform between the ends (of the logarithm with ``log``), conditions heeded."""
    return at_shares(space, lambda: float(rng.uniform()))


def middle(space: Mapping[str, Parameter]) -> dict[str, Any]:
    """Returns the values of the trial in the middle of a space."""
    return at_shares(space, lambda: 0.5)


def at_shares(space: Mapping[str, Parameter], share: Any) -> dict[str, Any]:
    """Returns the values of a trial.

    Args:
        space: The search space.
        share: Called for each parameter; returns how far up its range the value lies, in [0, 1).
    """
    values: dict[str, Any] = {}
    for name, parameter in in_order(space).items():
        if is_active(parameter, values):
            values[name] = _value(parameter, share())
    return values


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
        value = low + int(share * number) * parameter.step
        return int(value) if isinstance(parameter, IntParameter) else float(value)
    return low + share * (high - low)
