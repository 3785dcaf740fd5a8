"""``search.enqueue``: values that are tried first. A point may be written flat or under ``train``."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from carft_ray.errors import nearest
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.messages import SYNONYMS, Finding, shown
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.conditions import is_active, same
from carft_ray.recipe.spaces.grid import decimal
from carft_ray.recipe.text import KeyPath

NESTED = "train"


def flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a point by field of ``train``: ``{train: {learning_rate: 1e-4}}`` is ``{learning_rate: 1e-4}``."""
    return {path[-1]: value for path, value in _entries(point)}


def _entries(point: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the values of a point, each with its keys in the recipe."""
    nested = point.get(NESTED)
    below = nested if isinstance(nested, Mapping) else {}
    outer = [((name,), value) for name, value in point.items() if name != NESTED or not isinstance(nested, Mapping)]
    return outer + [((NESTED, name), value) for name, value in below.items()]


def point_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds points that the search could not try as they are written."""
    search = recipe.search
    if len(search.enqueue) > search.trials:
        yield Finding(
            ("search", "enqueue"),
            f"must be at most as many as search.trials, {search.trials}",
            str(len(search.enqueue)),
            reads=(("search", "trials"),),
        )
    for index, point in enumerate(search.enqueue):
        path: KeyPath = ("search", "enqueue", index)
        for finding in _point(path, point, search.space):
            yield replace(finding, reads=_read(finding.path[-1], search.space))
        earlier = [number for number in range(index) if _equal(flat(search.enqueue[number]), flat(point))]
        if earlier and point:
            yield Finding(path, f"must not repeat an earlier point, search.enqueue.{earlier[0]}", shown(flat(point)))


def _read(name: str | int, space: Mapping[str, Parameter]) -> tuple[KeyPath, ...]:
    """Returns the parameters that a rule about a value of a point has looked at."""
    parents = space[str(name)].when if name in space else ()
    return ("search", "space"), *(("search", "space", each) for each in (name, *parents))


def _point(path: KeyPath, point: Mapping[str, Any], space: Mapping[str, Parameter]) -> Iterator[Finding]:
    entries = _entries(point)
    if not entries:
        yield Finding(path, "must hold a value of at least one parameter", "{}", tuple(space))
    values = flat(point)
    for keys, value in entries:
        name, place = keys[-1], (*path, *keys)
        if sum(other[-1] == name for other, _ in entries) > 1 and len(keys) > 1:
            yield Finding(place, f"must stand once, but {name} stands beside train, too")
        elif name not in space:
            yield _stranger(place, name, value, space)
        elif not is_active(space[name], values):
            wanted = ", ".join(f"{other}: {_alternatives(allowed)}" for other, allowed in space[name].when.items())
            rule = f"{name} is drawn under a condition, which the point must fulfil: {wanted}"
            yield Finding(place, rule, shown(dict(values)), next_step=f"Add that to the point, or remove {name}.")
        else:
            yield from _value(place, space[name], value)


def _stranger(place: KeyPath, name: str, value: Any, space: Mapping[str, Parameter]) -> Finding:
    meant = SYNONYMS.get(name, name).removeprefix("train.")
    if name in TrainConfig.model_fields:
        step = f"A value that all trials share belongs into train: {name}: {shown(value)}."
        return Finding(place, "must be a parameter of search.space", allowed=tuple(space), next_step=step)
    near = meant if meant in space else nearest(meant, tuple(space))
    return Finding(place, "must be a parameter of search.space", shown(name), tuple(space), near)


def _value(place: KeyPath, parameter: Parameter, value: Any) -> Iterator[Finding]:
    if isinstance(parameter, CategoricalParameter):
        if not any(same(value, choice) for choice in parameter.choices):
            choices = tuple(shown(choice) for choice in parameter.choices)
            yield Finding(place, "must be one of the choices", shown(value), choices, nearest(shown(value), choices))
        return
    whole = isinstance(parameter, IntParameter)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        yield Finding(place, f"must be a {'whole ' if whole else ''}number", shown(value))
    elif not parameter.low <= value <= parameter.high:
        yield Finding(place, f"must be in the range {parameter.low} to {parameter.high}", shown(value))
    elif parameter.step is not None and (decimal(value) - decimal(parameter.low)) % decimal(parameter.step):
        rule = f"must be a whole number of steps of {parameter.step} above {parameter.low}"
        yield Finding(place, rule, shown(value))


def _alternatives(allowed: tuple[Any, ...]) -> str:
    return shown(allowed[0]) if len(allowed) == 1 else shown(list(allowed))


def _equal(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(same(value, right[name]) for name, value in left.items())
