"""Which values lie in a search space, and whether one space lies in another. Plain values; Optuna is not needed here.

A parameter that is not drawn (not in the space, or its ``when`` does not hold) has its value of ``train``. So a space
is a set of values over all fields of ``train``, and two spaces can be compared although they name other parameters.
"""

from collections.abc import Mapping
from typing import Any, Literal

from carft_ray.recipe.checks.rules import SEARCHABLE
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter, decimal
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.conditions import active_values, same
from carft_ray.recipe.spaces.grid import contains, num_values

Direction = Literal["narrow", "widen"]
DIRECTIONS: tuple[Direction, ...] = ("narrow", "widen")
_MOST_POINTS = 10_000  # of a parameter whose values are compared one by one


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


def directions(old: Parameter | None, new: Parameter | None, own: Any) -> frozenset[Direction]:
    """Returns how a parameter of the space may be called that has changed: both for the same values in another form.

    Args:
        old: The parameter before; None: not in the space.
        new: The parameter now.
        own: The value of its field in ``train``, which it has where it is not drawn.
    """
    covers: dict[Direction, bool] = {"narrow": _covers(old, new, own), "widen": _covers(new, old, own)}
    return frozenset(direction for direction, holds in covers.items() if holds)


def _covers(outer: Parameter | None, inner: Parameter | None, own: Any) -> bool:
    """Returns whether each value that ``inner`` may have, ``outer`` may have in the same place."""
    if outer is None or inner is None:
        return (inner is None or _only(inner, own)) and (outer is None or contains(outer, own))
    if not _within(inner, outer):
        return False
    if not _implies(inner.when, outer.when) and not _only(inner, own):  # drawn where the outer has its own value
        return False
    return _implies(outer.when, inner.when) or contains(outer, own)  # its own value where the outer is drawn


def _within(inner: Parameter, outer: Parameter) -> bool:
    """Returns whether all values of one parameter are values of another."""
    points = _points(inner)
    if points is not None:
        return all(contains(outer, point) for point in points)
    if isinstance(outer, CategoricalParameter) or isinstance(inner, CategoricalParameter):
        return False
    if not (contains(outer, inner.low) and contains(outer, inner.high)):
        return False
    return outer.step is None or (inner.step is not None and decimal(inner.step) % decimal(outer.step) == 0)


def _points(parameter: Parameter) -> list[Any] | None:
    """Returns the values of a parameter that has few."""
    if isinstance(parameter, CategoricalParameter):
        return list(parameter.choices)
    if parameter.low == parameter.high:
        return [parameter.low]
    count = num_values(parameter)
    if parameter.step is None or count is None or count > _MOST_POINTS:
        return None
    kind = int if isinstance(parameter, IntParameter) else float
    return [kind(decimal(parameter.low) + index * decimal(parameter.step)) for index in range(count)]


def _only(parameter: Parameter, value: Any) -> bool:
    points = _points(parameter)
    return points is not None and all(same(point, value) for point in points)


def _implies(one: Mapping[str, tuple[Any, ...]], other: Mapping[str, tuple[Any, ...]]) -> bool:
    """Returns whether a condition holds nowhere where another one does not."""
    return all(name in one and all(any(same(v, w) for w in other[name]) for v in one[name]) for name in other)
