"""Which trainings of a search or a confirm have the same targets of the frozen model, so that storing these pays.

The targets of a training follow from its views and its scale; two trainings share them where all of ``VIEW_FIELDS``
agree.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.grid import num_trials, num_values
from carft_ray.recipe.spaces.space import apply

VIEW_FIELDS = ("seed", "crop_scale", "context_scale", "precision")
Views = tuple[Any, ...]  # values of these
MOST_VALUES = 1000  # a space with more has no trials that share
DIGITS = 6  # to which values of a step are the same


def views_of(train: TrainConfig) -> Views | None:
    """Returns what must agree; None for a training without a KL term, which has no targets."""
    return _rounded(getattr(train, name) for name in VIEW_FIELDS) if train.kl_weight else None


def shared_views(recipe: Recipe, trainings: Iterable[Mapping[str, Any]] | None = None) -> frozenset[Views]:
    """Returns the views that several trainings have; of trials it is expected, with two for each combination.

    Args:
        recipe: The recipe of a study.
        trainings: Values over ``train`` of all trainings; None: the trials and baselines of a search.
    """
    known = recipe.search.baselines.values() if trainings is None else trainings
    counts = Counter(views_of(apply(recipe, values).train) for values in known)
    if trainings is None and _trials_have_kl(recipe):
        combinations = _combinations(recipe)
        for views in combinations:
            counts[views] += num_trials(recipe) // len(combinations)
    return frozenset(views for views, number in counts.items() if views is not None and number >= 2)


def with_targets(recipe: Recipe, shared: frozenset[Views]) -> Recipe:
    """Returns the recipe of one training with ``resources.targets`` decided: ``stored`` or ``online``."""
    if recipe.resources.targets != "auto":
        return recipe
    mode = "stored" if views_of(recipe.train) in shared else "online"
    return recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"targets": mode})})


def note_of_targets(recipe: Recipe, shared: frozenset[Views], has_kl: bool = True) -> str:
    """Returns what ``targets: auto`` has decided, in one line; empty where there is nothing to say."""
    if recipe.resources.targets != "auto" or not has_kl:
        return ""
    if shared:
        return "targets of the frozen model: stored by the first training that needs them, read by later ones"
    searched = [name for name in VIEW_FIELDS if name in recipe.search.space]
    cause = f"{' and '.join(searched)} in the search space changes them" if searched else "no two trainings share them"
    return f"targets of the frozen model: computed in every training, for {cause}"


def num_stored_visits(recipe: Recipe) -> int:
    """Returns how many visits of the training set the store of a search holds at its end."""
    if recipe.resources.targets == "online":
        return 0
    shared = shared_views(recipe)
    epochs = int(getattr(recipe.search.space.get("epochs"), "high", recipe.train.epochs))
    longest = dict.fromkeys(shared & set(_combinations(recipe)) if _trials_have_kl(recipe) else (), epochs)
    for values in recipe.search.baselines.values():
        train = apply(recipe, values).train
        views = views_of(train)
        if views is not None and (views in shared or recipe.resources.targets == "stored"):
            longest[views] = max(longest.get(views, 0), train.epochs)
    total = sum(longest.values())
    if recipe.resources.targets == "stored" and _trials_have_kl(recipe) and not shared & set(_combinations(recipe)):
        total += num_trials(recipe) * epochs
    return total


def has_targets(recipe: Recipe) -> bool:
    """Returns whether any training of a search has a KL term."""
    baselines = (apply(recipe, values).train for values in recipe.search.baselines.values())
    return _trials_have_kl(recipe) or any(train.kl_weight for train in baselines)


def _trials_have_kl(recipe: Recipe) -> bool:
    return recipe.train.kl_weight > 0 or "kl_weight" in recipe.search.space


def _combinations(recipe: Recipe) -> list[Views]:
    """Returns the views that trials can have; none where there are too many to share."""
    values = [_values(recipe, name) for name in VIEW_FIELDS]
    if math.prod(map(len, values)) > MOST_VALUES:
        return []
    return list(dict.fromkeys(map(_rounded, itertools.product(*values))))


def _values(recipe: Recipe, name: str) -> list[Any]:
    parameter: Parameter | None = recipe.search.space.get(name)
    fixed = [getattr(recipe.train, name)]
    if parameter is None:
        return fixed
    if (number := num_values(parameter)) is None:
        return [math.nan] * (MOST_VALUES + 1)
    inactive = fixed if parameter.when else []
    if isinstance(parameter, CategoricalParameter):
        return [*parameter.choices, *inactive]
    step = parameter.step if isinstance(parameter, IntParameter) else parameter.step or 0.0
    return [*(parameter.low + index * step for index in range(number)), *inactive]


def _rounded(values: Iterable[Any]) -> Views:
    return tuple(round(value, DIGITS) if isinstance(value, float) else value for value in values)
