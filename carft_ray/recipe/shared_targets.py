"""Whether several trainings of a search or a confirm have the same targets of the frozen model: then storing them pays.

The targets of a training follow from its views and its scale, that is from ``VIEW_FIELDS``.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space import apply, num_trials, num_values

VIEW_FIELDS = ("seed", "crop_scale", "context_scale", "precision")


def decide_targets(recipe: Recipe, trainings: Iterable[Mapping[str, Any]] | None = None) -> tuple[Recipe, str]:
    """Resolves ``resources.targets: auto``: ``stored`` where trainings share targets, else ``online``.

    Args:
        recipe: The recipe of a study.
        trainings: Values over ``train`` of all trainings; None: the trials and baselines of a search. Of trials two are
            expected to share where there are twice as many as combinations of values.

    Returns:
        The recipe, and a line that says what was decided; no line where it was given, or nothing has a KL term.
    """
    if recipe.resources.targets != "auto":
        return recipe, ""
    given = recipe.search.baselines.values() if trainings is None else trainings
    known = [apply(recipe, values).train for values in given]
    views = [tuple(getattr(train, name) for name in VIEW_FIELDS) for train in known if train.kl_weight]
    trials_have_kl = trainings is None and (recipe.train.kl_weight > 0 or "kl_weight" in recipe.search.space)
    if not views and not trials_have_kl:
        return recipe, ""
    is_shared = len({*views}) < len(views) or (trials_have_kl and num_trials(recipe) >= 2 * num_views(recipe))
    mode = "stored" if is_shared else "online"
    decided = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"targets": mode})})
    if is_shared:
        return decided, "resources.targets: stored, the first training that needs them keeps them for later ones"
    return decided, f"resources.targets: online, since no two trainings have the same {', '.join(VIEW_FIELDS)}"


def num_views(recipe: Recipe) -> float:
    """Returns how many combinations of ``VIEW_FIELDS`` trials can have; infinity where one has no step."""
    searched = [recipe.search.space[name] for name in VIEW_FIELDS if name in recipe.search.space]
    return math.prod(num_values(parameter) or math.inf for parameter in searched)


def num_stored_visits(recipe: Recipe) -> int:
    """Returns how many visits of the training set the trials of a search store."""
    if decide_targets(recipe)[0].resources.targets != "stored":
        return 0
    epochs = int(getattr(recipe.search.space.get("epochs"), "high", recipe.train.epochs))
    return epochs * int(min(num_views(recipe), num_trials(recipe)))
