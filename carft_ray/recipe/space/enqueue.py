"""``search.enqueue``: values of trials that are tried first, by field of ``train``."""

from collections.abc import Iterator, Mapping
from typing import Any

from carft_ray.errors import Problem
from carft_ray.recipe.messages import at, nearest_key, shown, unlisted
from carft_ray.recipe.schema.parameters import CategoricalParameter, Parameter
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.conditions import is_active
from carft_ray.recipe.space.grid import contains
from carft_ray.recipe.text import KeyPath


def enqueue_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds entries that the search could not try as they are written."""
    search, path = recipe.search, ("search", "enqueue")
    if len(search.enqueue) > search.trials:
        rule = f"must be at most as many as search.trials, {search.trials}"
        yield at(path, rule, str(len(search.enqueue)))
    for index, entry in enumerate(search.enqueue):
        yield from _entry((*path, index), entry, search.space)


def _entry(path: KeyPath, entry: Mapping[str, Any], space: Mapping[str, Parameter]) -> Iterator[Problem]:
    if not entry:
        yield at(path, "must contain a value of at least one parameter", "{}", tuple(space))
    for name, value in entry.items():
        place = (*path, name)
        if name not in space:
            rule, allowed = "must be a parameter of search.space", tuple(space)
            yield at(place, rule, shown(name), allowed, nearest_key(name, allowed))
        elif not is_active(space[name], entry):
            when = {other: wanted[0] if len(wanted) == 1 else [*wanted] for other, wanted in space[name].when.items()}
            condition = ", ".join(f"{other}: {shown(wanted)}" for other, wanted in when.items())
            rule = f"{name} is drawn under a condition, which the entry must meet: {condition}"
            yield at(place, rule, shown(entry), next_step=f"Add that to the entry, or remove {name}.")
        elif not contains(space[name], value):
            yield _unfit(place, space[name], value)


def _unfit(place: KeyPath, parameter: Parameter, value: Any) -> Problem:
    if isinstance(parameter, CategoricalParameter):
        return unlisted(place, "must be one of the choices", value, parameter.choices)
    steps = "" if parameter.step is None else f" in steps of {parameter.step}"
    return at(place, f"must be a number from {parameter.low} to {parameter.high}{steps}", shown(value))
