"""Conditional parameters, ``search.space.X.when``. An inactive one is not drawn: its field is as in ``train``."""

from collections.abc import Iterator, Mapping
from typing import Any

from carft_ray.errors import nearest
from carft_ray.recipe.messages import Finding, shown
from carft_ray.recipe.parameters import CategoricalParameter, Parameter
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.text import KeyPath


def same(left: Any, right: Any) -> bool:
    """Tells whether two values of a recipe are one: 1 is 1.0, and true is no number."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def is_active(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Tells whether a parameter is drawn beside these values; a parent that is not drawn fulfils no condition."""
    return all(
        name in values and any(same(values[name], wanted) for wanted in allowed)
        for name, allowed in parameter.when.items()
    )


def in_order(space: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Returns the space with every parameter after those that its conditions name, else in the order of the recipe."""
    left, ordered = dict(space), dict[str, Parameter]()
    while left:
        free = [name for name, parameter in left.items() if not parameter.when.keys() & left.keys()]
        for name in free or list(left):  # in a circle, which the rules refuse, none is free
            ordered[name] = left.pop(name)
    return ordered


def active_values(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a trial without those of inactive parameters, in the order of ``in_order``."""
    active: dict[str, Any] = {}
    for name, parameter in in_order(space).items():
        if name in values and is_active(parameter, active):
            active[name] = values[name]
    return active


def condition_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds conditions that cannot be: on no parameter, on a number, on a value that is no choice, in a circle."""
    space = recipe.search.space
    categorical = tuple(name for name, parameter in space.items() if isinstance(parameter, CategoricalParameter))
    told: set[str] = set()
    for name, parameter in space.items():
        path: KeyPath = ("search", "space", name, "when")
        if name == "alpha" and parameter.when:
            step = (
                "A trial without its own alpha would take the best of its curve, and others not: they do not compare."
            )
            yield Finding(path, "alpha must be drawn in every trial", next_step=step)
        for other, allowed in parameter.when.items():
            yield from _condition((*path, other), name, other, allowed, space, categorical)
        circle = _circle(space, name)
        if circle and not told & {*circle}:
            told |= {*circle}
            yield Finding(path, "conditions must not form a circle", " -> ".join([*circle, name]))


def _condition(
    path: KeyPath,
    name: str,
    other: str,
    allowed: tuple[Any, ...],
    space: Mapping[str, Parameter],
    categorical: tuple[str, ...],
) -> Iterator[Finding]:
    reads: tuple[KeyPath, ...] = (("search", "space", other),)
    others = tuple(known for known in categorical if known != name)
    parent = space.get(other)
    if parent is None:
        rule = "must be a categorical parameter of search.space"
        yield Finding(path, rule, shown(other), others, nearest(other, others), reads=(("search", "space"), *reads))
    elif not isinstance(parent, CategoricalParameter):
        rule = f"must be a categorical parameter, and {other} has no choices"
        yield Finding(path, rule, allowed=others, reads=reads)
    else:
        choices = tuple(shown(choice) for choice in parent.choices)
        for value in allowed:
            if not any(same(value, choice) for choice in parent.choices):
                rule = f"must be among the choices of {other}"
                near = nearest(shown(value), choices)
                yield Finding(path, rule, shown(value), choices, near, reads=reads)


def _circle(space: Mapping[str, Parameter], name: str) -> list[str]:
    """Returns the names on a way from a parameter along its conditions back to itself, or nothing."""
    ways = [[name]]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for parent in space[way[-1]].when:
            if parent == name:
                return way
            if parent in space and parent not in seen:
                seen.add(parent)
                ways.append([*way, parent])
    return []
