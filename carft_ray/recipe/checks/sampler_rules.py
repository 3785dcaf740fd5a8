"""What a sampler cannot do of what a recipe asks, and how many trials it draws at random. ``docs/samplers.md`` has all.

The verdicts were read in Optuna 5.0 and are held by a test each. ``study/proposals/samplers.py`` makes the samplers.
"""

from collections.abc import Iterator

from carft_ray.errors import Problem
from carft_ray.recipe.messages import at
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sampling import NsgaSampler, QmcSampler
from carft_ray.recipe.space import grid_size, num_values
from carft_ray.words import counted

LARGEST_POPULATION = 50  # Optuna's default
# what a sampler does with conditional parameters; all of them learn nothing from a pruned trial
UNLEARNED = {"gp": "not modelled", "nsga2": "not inherited"}


def population_size(recipe: Recipe) -> int:
    """Returns the trials of a generation of nsga2."""
    sampler = recipe.search.sampler
    chosen = sampler.population_size if isinstance(sampler, NsgaSampler) else None
    return chosen or min(LARGEST_POPULATION, max(4, recipe.search.trials // 4))


def startup_trials(recipe: Recipe) -> int:
    """Returns the random trials before tpe and gp."""
    return getattr(recipe.search.sampler, "startup_trials", None) or max(4, recipe.search.trials // 4)


def sampler_problems(recipe: Recipe) -> Iterator[Problem]:
    """Finds too many random trials, and parameters without a step for the grid."""
    sampler, trials = recipe.search.sampler, recipe.search.trials
    startup = getattr(sampler, "startup_trials", None)
    if startup is not None and startup > trials:
        yield at(("search", "sampler", "startup_trials"), f"must be at most search.trials, {trials}", str(startup))
    for name, parameter in recipe.search.space.items():
        if sampler.name == "grid" and num_values(parameter) is None:
            step = f"Give {name} a step, or choices: [...], or another sampler than grid."
            yield at(("search", "space", name), "must have a step for the grid", next_step=step)


def sampler_advice(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields advice on a valid sampler: the key, and what about it."""
    search, sampler = recipe.search, recipe.search.sampler
    if sampler.name in UNLEARNED and search.pruner.name != "none":
        yield "search.sampler.name", f"{sampler.name} with a pruner: it learns nothing from a pruned trial"
    if sampler.name in UNLEARNED and any(parameter.when for parameter in search.space.values()):
        why = f"conditional parameters are drawn at random, {UNLEARNED[sampler.name]}"
        yield "search.sampler.name", f"{sampler.name} with conditional parameters: {why}"
    if isinstance(sampler, QmcSampler) and not sampler.scramble and sampler.seed:
        yield "search.sampler.seed", "has no effect: the sequence is not scrambled"
    if sampler.name == "nsga2" and search.trials <= population_size(recipe):
        what = f"nsga2 draws its first generation of {population_size(recipe)} at random, of only"
        yield "search.sampler.name", f"{what} {counted(search.trials, 'trial')}"
    size = grid_size(search.space) if sampler.name == "grid" else None
    if search.space and size is not None and size < search.trials:
        there = counted(size, "point")
        yield "search.trials", f"is {search.trials}, but the grid has {there}: the search ends after {size}"
