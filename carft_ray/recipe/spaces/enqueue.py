"""``search.enqueue``: values of trials that are tried first. An entry may be written flat or under ``train``."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from carft_ray.recipe.checks.messages import SYNONYMS, Finding, shown, unlisted
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter, decimal
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.conditions import is_active, same
from carft_ray.recipe.text import KeyPath

NESTED = "train"


def flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry by field of ``train``: ``{train: {learning_rate: 1e-4}}`` is ``{learning_rate: 1e-4}``."""
    return {path[-1]: value for path, value in _values(entry)}


def _values(entry: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the values of an entry, each with its keys in the recipe."""
    nested = entry.get(NESTED)
    if not isinstance(nested, Mapping):
        return [((name,), value) for name, value in entry.items()]
    outer = [((name,), value) for name, value in entry.items() if name != NESTED]
    return outer + [((NESTED, name), value) for name, value in nested.items()]


def enqueue_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds entries that the search could not try as they are written."""
    search, path = recipe.search, ("search", "enqueue")
    entries = [flat(entry) for entry in search.enqueue]
    if len(entries) > search.trials:
        rule, reads = f"must be at most as many as search.trials, {search.trials}", (("search", "trials"),)
        yield Finding(path, rule, str(len(entries)), reads=reads)
    for index, entry in enumerate(search.enqueue):
        for finding in _entry((*path, index), entry, search.space):
            yield replace(finding, reads=_read(finding.path[-1], search.space))
        earlier = [number for number in range(index) if _equal(entries[number], entries[index])]
        if earlier and entry:
            rule = f"must not repeat an earlier entry, search.enqueue.{earlier[0]}"
            yield Finding((*path, index), rule, shown(entries[index]))


def _read(name: str | int, space: Mapping[str, Parameter]) -> tuple[KeyPath, ...]:
    """Returns the parameters that a rule about a value has read."""
    parents = space[str(name)].when if name in space else ()
    return ("search", "space"), *(("search", "space", each) for each in (name, *parents))


def _entry(path: KeyPath, entry: Mapping[str, Any], space: Mapping[str, Parameter]) -> Iterator[Finding]:
    values = _values(entry)
    if not values:
        yield Finding(path, "must hold a value of at least one parameter", "{}", tuple(space))
    names = [keys[-1] for keys, _ in values]
    for keys, value in values:
        name, place = keys[-1], (*path, *keys)
        if len(keys) > 1 and names.count(name) > 1:
            yield Finding(place, f"must stand once, but {name} stands next to train, too")
        elif name not in space:
            yield _unknown(place, name, value, space)
        elif not is_active(space[name], flat(entry)):
            when = {other: wanted[0] if len(wanted) == 1 else [*wanted] for other, wanted in space[name].when.items()}
            condition = ", ".join(f"{other}: {shown(wanted)}" for other, wanted in when.items())
            rule = f"{name} is drawn under a condition, which the entry must meet: {condition}"
            yield Finding(place, rule, shown(flat(entry)), next_step=f"Add that to the entry, or remove {name}.")
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
