"""A training's schedule: its learning rate and warm-up; steps, epochs, images and percent."""

import math
from collections.abc import Sequence
from typing import Any

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import AnyPruner, CategoricalParameter, FloatParameter, HalvingPruner, NoPruner

END = 100  # percent of a schedule


def num_warmup_steps(asked: int | None, num_steps: int) -> int:
    """Returns the warm-up length: what was asked for, else ``min(500, 10 % of the steps)``, never all steps."""
    warmup = min(500, num_steps // 10) if asked is None else asked
    return min(warmup, max(num_steps - 1, 0))


def learning_rate_at(step: int, peak: float, warmup: int, num_steps: int) -> float:
    """Returns the learning rate of update ``step`` (from 0): linear warm-up, then a cosine to 0.

    ``peak * (step + 1) / warmup`` while ``step < warmup``, then
    ``peak * (1 + cos(pi * (step - warmup) / (num_steps - warmup))) / 2`` (as coded in wise-ft, `src/models/utils.py`).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


def percent(epoch: int, epochs: int) -> int:
    """Returns how much of its schedule a training of ``epochs`` epochs has done at the end of an epoch, 0 to 100.

    Trainings of different length are compared at the same percent.
    """
    return round(END * epoch / epochs)


def first_percent(pruner: AnyPruner) -> int:
    """Returns the percent before which no training is cut."""
    return END if isinstance(pruner, NoPruner) else max(1, round(END * pruner.first))


def rungs(pruner: AnyPruner) -> tuple[int, ...]:
    """Returns where halving compares, in percent: ``first * factor**k``, as far as it is under 1; none for others."""
    if not isinstance(pruner, HalvingPruner):
        return ()
    found: list[int] = []
    share, rung = pruner.first, first_percent(pruner)
    while share < 1 - 1e-9 and rung < END:
        found.append(rung)
        share, rung = share * pruner.factor, rung * pruner.factor
    return tuple(found)


def has_intermediate_value(every_epochs: int | None, pruner: AnyPruner, epoch: int, epochs: int) -> bool:
    """Returns whether a training is evaluated on the subset at the end of an epoch.

    It is every ``every_epochs`` epochs (0: never; None: each where there is a pruner), and at the end of every rung:
    the first epoch that reaches it.
    """
    if every_epochs is None:
        every_epochs = 0 if isinstance(pruner, NoPruner) else 1
    before, now = percent(epoch - 1, epochs), percent(epoch, epochs)
    reached = any(before < rung <= now for rung in rungs(pruner))
    return reached or bool(every_epochs and epoch % every_epochs == 0)


def can_cut(recipe: Recipe, num_images: int | None = None) -> bool:
    """Returns whether the recipe's pruner could cut any of the trainings that the search space holds.

    It cuts at an evaluation from ``search.pruner.first`` on, after the warm-up and before the last epoch.

    Args:
        recipe: A recipe with a pruner.
        num_images: Size of the training set; None: not known, and no evaluation is in the warm-up.
    """
    pruner, every = recipe.search.pruner, recipe.evaluate.every_epochs
    steps = 0 if num_images is None else math.ceil(num_images / min(possible_values(recipe, "batch_size")))
    warmups = possible_values(recipe, "warmup_steps")
    return any(
        percent(epoch, epochs) >= first_percent(pruner)
        and has_intermediate_value(every, pruner, epoch, epochs)
        and epoch * steps >= min(num_warmup_steps(asked, epochs * steps) for asked in warmups)
        for epochs in possible_values(recipe, "epochs")
        for epoch in range(1, epochs)
    )


def possible_values(recipe: Recipe, name: str) -> Sequence[Any]:
    """Returns the values, whole numbers or None, that such a field of ``train`` can have in the trials of a search."""
    parameter, fixed = recipe.search.space.get(name), getattr(recipe.train, name)
    if parameter is None or isinstance(parameter, FloatParameter):  # the latter is refused elsewhere
        return (fixed,)
    if isinstance(parameter, CategoricalParameter):
        values = [choice for choice in parameter.choices if choice is None or type(choice) is int]
        return [*values, fixed] if parameter.when or not values else values
    searched = range(parameter.low, parameter.high + 1, parameter.step)
    return [*searched, fixed] if parameter.when else searched
