"""What each sampler can do and how it can be set, as data: ``validate`` enforces it, ``docs/samplers.md`` shows it.

The verdicts were read in Optuna 5.0 and are held by a test each. ``study/proposals/samplers.py`` makes the samplers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from carft_ray.errors import nearest
from carft_ray.recipe.checks.messages import Finding, unlisted
from carft_ray.recipe.constraints import constraint_names
from carft_ray.recipe.parameters import CategoricalParameter
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.grid import grid_size, num_values
from carft_ray.recipe.text import KeyPath
from carft_ray.words import counted

NAME: KeyPath = ("search", "sampler", "name")
SPACE: KeyPath = ("search", "space")
OPTIONS_PATH: KeyPath = ("search", "sampler", "options")
LARGEST_POPULATION = 50  # Optuna's default


@dataclass(frozen=True)
class Option:
    """An option of a sampler.

    Attributes:
        kind: What it holds; int and float are numbers, and true is none.
        default: What null means, in words.
        meaning: What it does.
        low: Least value of a number.
        high: Largest value of a number.
        above: A number must be larger than ``low`` rather than at least that.
        choices: The words of a text.
    """

    kind: type
    default: str
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return "one of the allowed values"
        kind = "a whole number" if self.kind is int else "a number"
        ends = f" {'>' if self.above else '>='} {self.low:g}" if math.isfinite(self.low) else ""
        return kind + ends + (f" and <= {self.high:g}" if math.isfinite(self.high) else "")

    def takes(self, value: Any) -> bool:
        """Returns whether a value is allowed; null always is, and means the default."""
        if value is None:
            return True
        if self.kind in (bool, str):
            return isinstance(value, self.kind) and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        return self.low < value <= self.high if self.above else self.low <= value <= self.high


_GENETIC = {
    "population_size": Option(int, "a quarter of the trials, 4 to 50", "trials of a generation", low=2),
    "mutation_prob": Option(float, "1 / parameters", "probability that a parameter is drawn at random", low=0, high=1),
    "crossover_prob": Option(float, "0.9", "probability that a child has two parents", low=0, high=1),
    "swapping_prob": Option(float, "0.5", "probability that a parameter is of the other parent", low=0, high=1),
}
OPTIONS: dict[str, dict[str, Option]] = {
    "tpe": {
        "multivariate": Option(bool, "true with one objective, false with two", "draws the parameters together"),
        "group": Option(bool, "false", "with conditions: draws together what is drawn in the same trials"),
        "constant_liar": Option(bool, "true", "avoids the values of running trials"),
        "n_ei_candidates": Option(int, "24", "candidates of which the best is taken", low=1),
    },
    "gp": {"deterministic": Option(bool, "false", "assumes an objective without noise")},
    "nsga2": {
        "population_size": Option(int, "a quarter of the trials, 4 to 50", "trials of a generation", low=2),
        "mutation_prob": Option(
            float, "1 / parameters", "probability that a parameter is drawn at random", low=0, high=1
        ),
        "crossover_prob": Option(float, "0.9", "probability that a child has two parents", low=0, high=1),
        "swapping_prob": Option(float, "0.5", "probability that a parameter is of the other parent", low=0, high=1),
    },
    "qmc": {
        "type": Option(str, "sobol", "the sequence", choices=("sobol", "halton")),
        "scramble": Option(bool, "true", "random shift by the seed; false begins in a corner of the space"),
    },
    "random": {},
    "grid": {},
}
STARTUP_SAMPLERS = ("tpe", "gp")  # those with random trials first

Verdict = Literal["ok", "warns"]
Feature = Literal["pruning", "constraints", "conditional", "categorical", "pareto", "resume", "many at a time"]


class Cell(NamedTuple):
    """How a sampler handles a feature.

    Attributes:
        verdict: ok, or ``validate`` warns.
        why: Half a sentence.
    """

    verdict: Verdict
    why: str


class Use(NamedTuple):
    """How a recipe uses a feature of a sampler.

    Attributes:
        words: What it uses.
        applies: Whether a recipe does.
    """

    words: str
    applies: Callable[[Recipe], bool]


# every search may be resumed, and may run several trials at a time
USES: dict[Feature, Use] = {
    "pruning": Use("a pruner", lambda recipe: recipe.search.pruner.name != "none"),
    "constraints": Use("constraints", lambda recipe: bool(constraint_names(recipe.search.constraints))),
    "conditional": Use("conditional parameters", lambda recipe: any(one.when for one in recipe.search.space.values())),
    "categorical": Use("categorical parameters", lambda recipe: bool(categorical_names(recipe))),
    "pareto": Use("a Pareto search", lambda recipe: recipe.search.objective.kind == "pareto"),
    "resume": Use("a resumed search", lambda recipe: True),
    "many at a time": Use("several trials at a time", lambda recipe: recipe.search.max_concurrent_trials != 1),
}

_INDEPENDENT = Cell("ok", "its draws do not depend on results")
_UNSEEN: dict[Feature, Cell] = {"pruning": _INDEPENDENT, "constraints": _INDEPENDENT, "pareto": _INDEPENDENT}
_DISTINCT = "the draw depends on seed and trial alone"
_COMPLETE = "it learns nothing from a pruned trial"
CELLS: dict[str, dict[Feature, Cell]] = {
    "tpe": {
        "pruning": Cell("ok", "pruned trials rank by step and last value"),
        "constraints": Cell("ok", "trials that violate one count as bad"),
        "conditional": Cell("ok", "a parameter learns from the trials that have it"),
        "categorical": Cell("ok", "a weight per choice"),
        "pareto": Cell("ok", "good trials are the first fronts"),
        "resume": Cell("ok", "it has no state but the trials"),
        "many at a time": Cell("ok", "running trials count as bad, so it avoids them"),
    },
    "gp": {
        "pruning": Cell("warns", _COMPLETE),
        "constraints": Cell("ok", "a process for each; all finished trials need the same"),
        "conditional": Cell("warns", "conditional parameters are drawn at random, not modelled"),
        "categorical": Cell("ok", "its kernel counts the choices that differ"),
        "pareto": Cell("ok", "expected gain of hypervolume"),
        "resume": Cell("ok", "it has no state but the trials, and is fitted again for each"),
        "many at a time": Cell("ok", "expected gain given the running trials"),
    },
    "nsga2": {
        "pruning": Cell("warns", _COMPLETE),
        "constraints": Cell("ok", "a trial that violates one ranks below one that meets it"),
        "conditional": Cell("warns", "conditional parameters are drawn at random, not inherited"),
        "categorical": Cell("ok", "a child has the choice of one of its parents"),
        "pareto": Cell("ok", "designed for it"),
        "resume": Cell("ok", "generations and parents are kept in the study"),
        "many at a time": Cell("ok", "trials that end after their generation is full have no children"),
    },
    "qmc": {
        **_UNSEEN,
        "conditional": Cell("ok", "an inactive parameter leaves its coordinate unused"),
        "categorical": Cell("ok", "a coordinate is cut into as many parts as choices"),
        "resume": Cell("ok", "its place in the sequence is the number of trials before"),
        "many at a time": Cell("ok", _DISTINCT),
    },
    "random": {
        **_UNSEEN,
        "conditional": Cell("ok", "each parameter is drawn alone"),
        "categorical": Cell("ok", "each choice is as likely"),
        "resume": Cell("ok", _DISTINCT),
        "many at a time": Cell("ok", _DISTINCT),
    },
    "grid": {
        **_UNSEEN,
        "pruning": Cell("ok", "a pruned trial counts as tried"),
        "conditional": Cell("ok", "the grid is a tree: an inactive parameter does not multiply it"),
        "categorical": Cell("ok", "a branch per choice"),
        "resume": Cell("ok", "what is tried is read from the trials"),
        "many at a time": Cell("ok", "running trials count as tried"),
    },
}


def categorical_names(recipe: Recipe) -> list[str]:
    """Returns the names of the categorical parameters."""
    return [name for name, each in recipe.search.space.items() if isinstance(each, CategoricalParameter)]


def population_size(recipe: Recipe) -> int:
    """Returns the trials of a generation of nsga2."""
    chosen = recipe.search.sampler.options.get("population_size")
    return int(chosen) if chosen else min(LARGEST_POPULATION, max(4, recipe.search.trials // 4))


def startup_trials(recipe: Recipe) -> int:
    """Returns the random trials before tpe and gp."""
    return recipe.search.sampler.startup_trials or max(4, recipe.search.trials // 4)


def sampler_findings(recipe: Recipe) -> Iterator[Finding]:
    """Finds options that the sampler does not have, and parameters without a step for the grid."""
    yield from _options(recipe)
    if recipe.search.sampler.name != "grid":
        return
    for name, parameter in recipe.search.space.items():
        if num_values(parameter) is None:
            step = f"Give {name} a step, or choices: [...], or another sampler than grid."
            yield Finding((*SPACE, name), "must have a step for the grid", next_step=step, reads=(NAME,))


def sampler_advice(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields advice on a valid sampler: the key, and what about it."""
    search, sampler, options = recipe.search, recipe.search.sampler, recipe.search.sampler.options
    for feature, cell in CELLS[sampler.name].items():
        if cell.verdict == "warns" and USES[feature].applies(recipe):
            yield "search.sampler.name", f"{sampler.name} with {USES[feature].words}: {cell.why}"
    if sampler.name not in STARTUP_SAMPLERS and sampler.startup_trials is not None:
        yield "search.sampler.startup_trials", f"has no effect: the sampler is {sampler.name}"
    if sampler.name == "qmc" and options.get("scramble") is False and sampler.seed:
        yield "search.sampler.seed", "has no effect: the sequence is not scrambled"
    if sampler.name == "nsga2" and search.trials <= population_size(recipe):
        what = f"nsga2 draws its first generation of {population_size(recipe)} at random, of only"
        yield "search.sampler.name", f"{what} {counted(search.trials, 'trial')}"
    size = grid_size(search.space) if sampler.name == "grid" else None
    if search.space and size is not None and size < search.trials:
        there = counted(size, "point")
        yield "search.trials", f"is {search.trials}, but the grid has {there}: the search ends after {size}"


def _options(recipe: Recipe) -> Iterator[Finding]:
    name, given = recipe.search.sampler.name, recipe.search.sampler.options
    known = OPTIONS[name]
    reads: tuple[KeyPath, ...] = (NAME, OPTIONS_PATH)
    for key, value in given.items():
        path: KeyPath = (*OPTIONS_PATH, key)
        option = known.get(key)
        if option is None:
            owners = [other for other, options in OPTIONS.items() if key in options]
            step = f"It is an option of {' and '.join(owners)}." if owners else ""
            rule = f"{name} has no such option" if known else f"{name} has no options"
            yield Finding(path, rule, allowed=tuple(known), nearest=nearest(key, known), next_step=step, reads=(NAME,))
        elif not option.takes(value):
            yield unlisted(path, f"must be {option.range}", value, option.choices, NAME)
    if name == "tpe" and given.get("group") is True and given.get("multivariate") is False:
        yield Finding((*OPTIONS_PATH, "group"), "group needs multivariate: true", reads=reads)
