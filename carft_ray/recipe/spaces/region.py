"""Which values lie in a search space, and whether one space lies in another. Plain values; Optuna is not needed here.

A parameter that is not drawn (not in the space, or its ``when`` does not hold) has its value of ``train``. So a space
is a set of values over all fields of ``train``, and two spaces can be compared although they name other parameters.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.rules import SEARCHABLE
from carft_ray.recipe.schema import Recipe

Direction = Literal["narrow", "widen"]
DIRECTIONS: tuple[Direction, ...] = ("narrow", "widen")
_MOST_POINTS = 10_000  # of a grid that is looked at point by point
_CLOSE = Decimal("1e-8")  # of a step: how far a float may lie beside its grid


def contains(parameter: Parameter, value: Any) -> bool:
    """Tells whether a parameter may have a value."""
    if isinstance(parameter, CategoricalParameter):
        return any(_same(choice, value) for choice in parameter.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(parameter, IntParameter) and value != int(value):
        return False
    return parameter.low <= value <= parameter.high and _on_grid(parameter, value)


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
    placed: dict[str, Any] = {}
    for name in SEARCHABLE:
        value = whole[name]
        drawn = _is_drawn(name, space, whole)
        if drawn and contains(space[name], value):
            placed[name] = value
        elif drawn or not _same(value, own[name]):
            return name
    return {name: placed[name] for name in space if name in placed}


def directions(old: Parameter | None, new: Parameter | None, own: Any) -> frozenset[Direction]:
    """Returns how a parameter of the space may be called that has changed: both for the same values in another form.

    Args:
        old: The parameter before; None: not in the space.
        new: The parameter now.
        own: The value of its field in ``train``, which it has where it is not drawn.
    """
    found: set[Direction] = set()
    if _covers(old, new, own):
        found.add("narrow")
    if _covers(new, old, own):
        found.add("widen")
    return frozenset(found)


def _covers(outer: Parameter | None, inner: Parameter | None, own: Any) -> bool:
    """Tells whether each value that ``inner`` may have, ``outer`` may have in the same place."""
    if outer is None or inner is None:
        return (inner is None or _only(inner, own)) and (outer is None or contains(outer, own))
    if not _within(inner, outer):
        return False
    if not _implies(inner.when, outer.when) and not _only(inner, own):  # drawn where the outer has its own value
        return False
    return _implies(outer.when, inner.when) or contains(outer, own)  # its own value where the outer is drawn


def _within(inner: Parameter, outer: Parameter) -> bool:
    """Tells whether all values of one parameter are values of another."""
    points = _points(inner)
    if points is not None:
        return all(contains(outer, point) for point in points)
    if isinstance(outer, CategoricalParameter) or isinstance(inner, CategoricalParameter):
        return False
    if not (contains(outer, inner.low) and contains(outer, inner.high)):
        return False
    if outer.step is None:
        return True
    return inner.step is not None and Decimal(str(inner.step)) % Decimal(str(outer.step)) == 0


def _points(parameter: Parameter) -> list[Any] | None:
    """Returns the values of a parameter that has few."""
    if isinstance(parameter, CategoricalParameter):
        return list(parameter.choices)
    if parameter.low == parameter.high:
        return [parameter.low]
    if parameter.step is None:
        return None
    low, step = Decimal(str(parameter.low)), Decimal(str(parameter.step))
    count = int((Decimal(str(parameter.high)) - low) / step) + 1
    if count > _MOST_POINTS:
        return None
    kind = int if isinstance(parameter, IntParameter) else float
    return [kind(low + index * step) for index in range(count)]


def _only(parameter: Parameter, value: Any) -> bool:
    points = _points(parameter)
    return points is not None and all(_same(point, value) for point in points)


def _on_grid(parameter: Any, value: float) -> bool:
    if parameter.step is None:
        return True
    steps = (Decimal(str(value)) - Decimal(str(parameter.low))) / Decimal(str(parameter.step))
    return abs(steps - round(steps)) <= _CLOSE


def _is_drawn(name: str, space: Mapping[str, Parameter], values: Mapping[str, Any]) -> bool:
    """Tells whether a parameter is drawn beside these values; one that is not drawn fulfils no condition."""
    return name in space and all(
        _is_drawn(other, space, values) and any(_same(one, values[other]) for one in wanted)
        for other, wanted in space[name].when.items()
    )


def _implies(one: Mapping[str, tuple[Any, ...]], other: Mapping[str, tuple[Any, ...]]) -> bool:
    """Tells whether a condition holds nowhere where another one does not."""
    return all(name in one and all(any(_same(v, w) for w in other[name]) for v in one[name]) for name in other)


def _same(a: Any, b: Any) -> bool:
    """Tells whether two plain values are one; 1 and 1.0 are, 1 and true are not."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
