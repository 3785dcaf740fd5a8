"""The search space of a recipe: which values lie in it, its points where it is finite, and the values of a trial.

A parameter with a condition (``search.space.X.when``) that does not hold is inactive: it is not drawn. A parameter that
is not drawn, or not in the space, has its value of ``train``. So a space is a set of values over all fields of
``train``. Optuna is not needed here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from typing import Any

from carft_ray.errors import Problem
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import SEARCHABLE, CategoricalParameter, IntParameter, Parameter, decimal
from carft_ray.recipe.written import KeyPath, at, nearest_key, shown, unlisted

TOLERANCE = Decimal("1e-8")  # of a step, by which a drawn value may miss the grid; Optuna's own


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
    active = active_values(space, whole)
    for name in SEARCHABLE:
        inside = contains(space[name], whole[name]) if name in active else same(whole[name], own[name])
        if not inside:
            return name
    return {name: active[name] for name in space if name in active}


def num_trials(recipe: Recipe) -> int:
    """Returns how many trials a search makes: ``search.trials``, or the points of the grid where they are fewer.

    Repeats count: of a grid they come on top of its points.
    """
    search = recipe.search
    size = grid_size(search.space) if search.sampler.name == "grid" else None
    # rounded as in ``proposals.repeats``: 3 / (1 - 0.8) is a little more than 15
    return search.trials if size is None else min(search.trials, math.ceil(round(size / (1 - search.repeats), 9)))


def drawn(space: Mapping[str, Parameter], share: Callable[[], float]) -> dict[str, Any]:
    """Returns the values of one trial as random search draws them, without those of inactive parameters.

    Args:
        space: The search space.
        share: Called for each parameter, for example ``rng.uniform``: how far up its range (of the logarithm with
            ``log``) the value lies, in [0, 1).
    """
    values: dict[str, Any] = {}
    for name, parameter in in_order(space).items():
        if is_active(parameter, values):
            values[name] = _value(parameter, share())
    return values


def middle(space: Mapping[str, Parameter]) -> dict[str, Any]:
    """Returns the values of the trial in the middle of a space."""
    return drawn(space, lambda: 0.5)


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
        value = min(low + int(share * number) * parameter.step, high)  # rounding may lead beyond
        return int(value) if isinstance(parameter, IntParameter) else float(value)
    return low + share * (high - low)


def condition_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds conditions that cannot hold: on no parameter, on a number, on a value that is no choice, in a circle."""
    space = recipe.search.space
    for name, parameter in space.items():
        path: KeyPath = ("search", "space", name, "when")
        if name == "alpha" and parameter.when:
            step = "Trials without an alpha of their own would take the best of their curve, which is not comparable."
            yield at(path, "alpha must be drawn in every trial", next_step=step)
        for other, allowed in parameter.when.items():
            parent = space.get(other)
            if not isinstance(parent, CategoricalParameter):
                parents = [key for key, each in space.items() if isinstance(each, CategoricalParameter) and key != name]
                yield unlisted((*path, other), "must be a categorical parameter of search.space", other, parents)
            else:
                for value in (each for each in allowed if not contains(parent, each)):
                    yield unlisted((*path, other), f"must be among the choices of {other}", value, parent.choices)
    try:
        in_order(space)
    except CycleError as error:
        circle = error.args[1][::-1]  # from a parameter along its conditions
        yield at(("search", "space", circle[0], "when"), "conditions must not form a cycle", " -> ".join(circle))


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
