"""Conditional parameters, ``search.space.X.when``. An inactive one is not drawn: its field is as in ``train``."""

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from carft_ray.errors import Problem
from carft_ray.recipe.messages import at, unlisted
from carft_ray.recipe.schema.parameters import CategoricalParameter, Parameter
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.text import KeyPath


def same(left: Any, right: Any) -> bool:
    """Returns whether two values of a recipe are one: 1 is 1.0, and true is no number."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def is_active(parameter: Parameter, values: Mapping[str, Any]) -> bool:
    """Returns whether a parameter is drawn in addition to these values; a parent without a value meets no condition."""
    return all(
        name in values and any(same(values[name], wanted) for wanted in allowed)
        for name, allowed in parameter.when.items()
    )


def in_order(space: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Returns the space with every parameter after those that its conditions name, else in the order of the recipe.

    Raises:
        CycleError: Conditions form a circle, which the rules refuse.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(space, ()))
    for name, parameter in space.items():
        sorter.add(name, *(other for other in parameter.when if other in space))
    return {name: space[name] for name in sorter.static_order()}


def active_values(space: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a trial without those of inactive parameters, in the order of ``in_order``."""
    active: dict[str, Any] = {}
    for name, parameter in in_order(space).items():
        if name in values and is_active(parameter, active):
            active[name] = values[name]
    return active


def condition_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds conditions that cannot hold: on no parameter, on a number, on a value that is no choice, in a circle."""
    space = recipe.search.space
    for name, parameter in space.items():
        path: KeyPath = ("search", "space", name, "when")
        if name == "alpha" and parameter.when:
            step = "Trials without an alpha of their own would take the best of their curve, which is not comparable."
            yield at(path, "alpha must be drawn in every trial", next_step=step)
        for other, allowed in parameter.when.items():
            yield from _condition((*path, other), name, other, allowed, space)
    try:
        in_order(space)
    except CycleError as error:
        circle = error.args[1][::-1]  # from a parameter along its conditions
        yield at(("search", "space", circle[0], "when"), "conditions must not form a cycle", " -> ".join(circle))


def _condition(
    path: KeyPath, name: str, other: str, allowed: tuple[Any, ...], space: Mapping[str, Parameter]
) -> Iterator[Problem]:
    parents = tuple(key for key, each in space.items() if isinstance(each, CategoricalParameter) and key != name)
    parent = space.get(other)
    if not isinstance(parent, CategoricalParameter):
        yield unlisted(path, "must be a categorical parameter of search.space", other, parents)
    else:
        for value in allowed:
            if not any(same(value, choice) for choice in parent.choices):
                yield unlisted(path, f"must be among the choices of {other}", value, parent.choices)
