"""Which values lie in a search space, and its points where it is finite: of choices, whole numbers and steps.

A parameter that is not drawn (not in the space, or its ``when`` does not hold) has its value of ``train``. So a space
is a set of values over all fields of ``train``.
"""

import itertools
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from carft_ray.recipe.schema.parameters import SEARCHABLE, CategoricalParameter, IntParameter, Parameter, decimal
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.conditions import active_values, in_order, is_active, same

TOLERANCE = Decimal("1e-8")  # of a step, by which a drawn value may miss the grid; Optuna's own


def num_values(parameter: Parameter) -> int | None:
    """Returns how many values a parameter can have; None when they cannot be counted."""
    if isinstance(parameter, CategoricalParameter):
        return len(parameter.choices)
    if isinstance(parameter, IntParameter):
        return (parameter.high - parameter.low) // parameter.step + 1
    if parameter.step is None:
        return None
    return int((decimal(parameter.high) - decimal(parameter.low)) / decimal(parameter.step)) + 1


def grid_size(space: Mapping[str, Parameter]) -> int | None:
    """Returns the number of different trials of a space; None when a parameter has no step.

    Only parameters that a condition names are enumerated; the others multiply.
    """
    sizes = {name: num_values(parameter) for name, parameter in space.items()}
    if None in sizes.values():
        return None
    ordered = in_order(space)
    named = {other for parameter in space.values() for other in parameter.when}
    parents = {name: each for name, each in ordered.items() if name in named and isinstance(each, CategoricalParameter)}
    total, seen = 0, set()
    for choices in itertools.product(*(parent.choices for parent in parents.values())):
        values = active_values(parents, dict(zip(parents, choices, strict=True)))
        if (key := repr(sorted(values.items()))) not in seen:
            seen.add(key)
            free = (sizes[name] or 0 for name, each in space.items() if name not in parents and is_active(each, values))
            total += math.prod(free)
    return total


def grid_index(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> tuple[tuple[str, int], ...] | None:
    """Returns which point of the grid a trial is: a number per active parameter; None when it is none of them."""
    active = active_values(space, values)
    wanted = [name for name, parameter in in_order(space).items() if is_active(parameter, active)]
    if list(active) != wanted or active.keys() != values.keys():
        return None
    numbers = {name: _number(space[name], value) for name, value in active.items()}
    return None if None in numbers.values() else tuple((name, number or 0) for name, number in numbers.items())


def contains(parameter: Parameter, value: Any) -> bool:
    """Returns whether a parameter may have a value."""
    return _number(parameter, value) is not None


def _number(parameter: Parameter, value: Any) -> int | None:
    """Returns which of a parameter's values a value is (0 for any of a range without steps); None when it is none."""
    if isinstance(parameter, CategoricalParameter):
        return next((index for index, choice in enumerate(parameter.choices) if same(choice, value)), None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not parameter.low <= value <= parameter.high:
        return None
    if parameter.step is None:
        return 0
    steps = (decimal(value) - decimal(parameter.low)) / decimal(parameter.step)
    return round(steps) if abs(steps - round(steps)) <= TOLERANCE else None


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


def num_trials(recipe: Recipe) -> int:
    """Returns how many trials a search makes: ``search.trials``, or the points of the grid where they are fewer."""
    search = recipe.search
    size = grid_size(search.space) if search.sampler.name == "grid" else None
    return search.trials if size is None else min(search.trials, size)
