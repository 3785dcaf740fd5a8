"""``search.enqueue``: values of trials that are tried first, by field of ``train``."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from carft_ray.recipe.checks.messages import SYNONYMS, Finding, shown, unlisted
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter, decimal
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.conditions import is_active, same
from carft_ray.recipe.text import KeyPath


def enqueue_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds entries that the search could not try as they are written."""
    search, path = recipe.search, ("search", "enqueue")
    if len(search.enqueue) > search.trials:
        rule = f"must be at most as many as search.trials, {search.trials}"
        yield Finding(path, rule, str(len(search.enqueue)))
    for index, entry in enumerate(search.enqueue):
        yield from _entry((*path, index), entry, search.space)
        earlier = [number for number in range(index) if _equal(search.enqueue[number], entry)]
        if earlier and entry:
            rule = f"must not repeat an earlier entry, search.enqueue.{earlier[0]}"
            yield Finding((*path, index), rule, shown(entry))


def _entry(path: KeyPath, entry: Mapping[str, Any], space: Mapping[str, Parameter]) -> Iterator[Finding]:
    if not entry:
        yield Finding(path, "must hold a value of at least one parameter", "{}", tuple(space))
    for name, value in entry.items():
        place = (*path, name)
        if name not in space:
            yield _unknown(place, name, value, space)
        elif not is_active(space[name], entry):
            when = {other: wanted[0] if len(wanted) == 1 else [*wanted] for other, wanted in space[name].when.items()}
            condition = ", ".join(f"{other}: {shown(wanted)}" for other, wanted in when.items())
            rule = f"{name} is drawn under a condition, which the entry must meet: {condition}"
            yield Finding(place, rule, shown(entry), next_step=f"Add that to the entry, or remove {name}.")
        else:
            yield from _value(place, space[name], value)


def _unknown(place: KeyPath, name: str, value: Any, space: Mapping[str, Parameter]) -> Finding:
    rule = "must be a parameter of search.space"
    if name in TrainConfig.model_fields:
        step = f"A value that all trials share belongs in train: {name}: {shown(value)}."
        return Finding(place, rule, allowed=tuple(space), next_step=step)
    meant = SYNONYMS.get(name)
    found = unlisted(place, rule, name, space)
    return replace(found, nearest=meant) if meant in space else found


def _value(place: KeyPath, parameter: Parameter, value: Any) -> Iterator[Finding]:
    if isinstance(parameter, CategoricalParameter):
        if not any(same(value, choice) for choice in parameter.choices):
            yield unlisted(place, "must be one of the choices", value, parameter.choices)
        return
    whole = isinstance(parameter, IntParameter)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        yield Finding(place, f"must be a {'whole ' if whole else ''}number", shown(value))
    elif not parameter.low <= value <= parameter.high:
        yield Finding(place, f"must be in the range {parameter.low} to {parameter.high}", shown(value))
    elif parameter.step is not None and (decimal(value) - decimal(parameter.low)) % decimal(parameter.step):
        rule = f"must be a whole number of steps of {parameter.step} above {parameter.low}"
        yield Finding(place, rule, shown(value))


def _equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
