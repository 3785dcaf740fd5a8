"""The values of a trial: asked of Optuna's samplers as a recipe asks for them, or given by the recipe's points.

What each sampler can do is in ``recipe/rules.py``.

A sampler is made anew for each draw, with a generator of its own: see ``draw``. What it knows comes from the study, so
three of Optuna's need care. GP counts a trial whose draw a kill has cut off as another running one. QMC counts its
draws in the study, and a kill would skip one. The grid fails on trials of another space.
"""

import json
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, BruteForceSampler, GPSampler, QMCSampler, RandomSampler
from optuna.trial import TrialState

from carft_ray.recipe.rules import population_size, startup_trials
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.space import grid_index, grid_size, in_order, is_active
from carft_ray.study.attributes import NAME, POINT, REPEAT_OF
from carft_ray.study.proposals.optuna_private import frozen_trial, on_one_thread, running_trial
from carft_ray.study.rows import is_training, trainings

GP_DRAW = "gp:relative_params:0"  # attribute of a trial in which Optuna's GP keeps what it has drawn together
OPTUNA_NAMES = {"deterministic": "deterministic_objective", "type": "qmc_type"}  # our options that it calls otherwise
Value = bool | int | float | str | None


def make_sampler(recipe: Recipe, number: int, index: int = 0) -> BaseSampler:
    """Returns the recipe's sampler for one draw.

    Args:
        recipe: The recipe; its rules hold.
        number: Of the trial.
        index: Which draw of the trial: 0 for what is drawn together, then each parameter by its place in the space.
    """
    part = recipe.search.sampler
    seed = int(np.random.SeedSequence([part.seed, number, index]).generate_state(1)[0])
    chosen = part.model_dump(exclude={"name", "seed", "startup_trials", "population_size"}, exclude_none=True)
    options = {OPTUNA_NAMES.get(key, key): value for key, value in chosen.items()}
    with warnings.catch_warnings():  # a contract test holds what we use of Optuna, experimental or not
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return _make(recipe, number, seed, options)


def _make(recipe: Recipe, number: int, seed: int, options: dict[str, Any]) -> BaseSampler:
    startup = startup_trials(recipe)
    match recipe.search.sampler.name:
        case "tpe":
            # what ``group`` implies; without it Optuna warns of two objectives
            together = {"multivariate": True} if options.get("group") else {}
            return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, **{**together, **options})
        case "gp":
            return _GP(n_startup_trials=startup, seed=seed, warn_independent_sampling=False, **options)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population_size(recipe), **options)
        case "qmc":
            # one sequence: the seed must be the same for every draw
            own = recipe.search.sampler.seed % 2**32
            return _QMC(recipe.search.space, number, RandomSampler(seed=seed), seed=own, **options)
        case "grid":
            return _Grid(recipe.search.space, seed)
        case _:
            return RandomSampler(seed=seed)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Returns a parameter as Optuna describes it."""
    if isinstance(parameter, CategoricalParameter):
        return CategoricalDistribution(list(parameter.choices))
    if isinstance(parameter, IntParameter):
        return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


class _GP(GPSampler):
    """GP that draws once per trial, whatever cuts it off, on one thread."""

    def sample_relative(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        drawn = trial.system_attrs.get(GP_DRAW)
        if drawn is not None:
            return {name: value for name, value in json.loads(drawn).items() if name in search_space}
        with on_one_thread():  # trials on the same machine need the cores
            values: dict[str, Any] = super().sample_relative(study, trial, search_space)
        return values


class _QMC(QMCSampler):
    """QMC over the recipe's space from the first trial on; a trial's place in the sequence is how many were before."""

    def __init__(self, space: Mapping[str, Parameter], number: int, rest: BaseSampler, **options: Any) -> None:
        super().__init__(independent_sampler=rest, warn_independent_sampling=False, **options)
        self._space = {name: distribution(parameter) for name, parameter in sorted(space.items())}
        self._number = number

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {name: each for name, each in self._space.items() if not each.single()}

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        drawn = [trial for trial in study.get_trials(deepcopy=False) if NAME in trial.user_attrs and _is_new(trial)]
        return sum(trial.number < self._number for trial in drawn)


class _Grid(BruteForceSampler):
    """Each point of the space once. What has no values, is of another space or no training here is none of them."""

    def __init__(self, space: Mapping[str, Parameter], seed: int) -> None:
        super().__init__(seed=seed)
        self._space = {name: distribution(parameter) for name, parameter in in_order(space).items()}

    # a static method there, which could not know the space
    def _populate_tree(  # type: ignore[override]
        self, tree: Any, trials: list[optuna.trial.FrozenTrial], params: dict[str, Any]
    ) -> None:
        fit = [
            trial
            for trial in trials
            if trial.params
            and is_training(trial)
            and _is_new(trial)
            and trial.distributions.items() <= self._space.items()
        ]
        for number, trial in enumerate(fit):  # Optuna's tree wants one order, which a recipe may have changed
            fit[number] = copy(trial)
            fit[number].distributions = {name: one for name, one in self._space.items() if name in trial.distributions}
        super()._populate_tree(tree, fit, params)


def _is_new(trial: optuna.trial.FrozenTrial) -> bool:
    return REPEAT_OF not in trial.user_attrs


def suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Value:
    """Returns the value of a parameter in a trial: the one it has already, else a new draw of the study's sampler."""
    if isinstance(parameter, CategoricalParameter):
        choice: Value = trial.suggest_categorical(name, list(parameter.choices))
        return choice
    if isinstance(parameter, IntParameter):
        return int(trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log))
    return float(trial.suggest_float(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log))


def ask(study: optuna.Study, recipe: Recipe) -> optuna.Trial:
    """Begins a trial: of the recipe's next point, in their order, else one that is drawn whole.

    A point is entered with its trial, in one write: once, however often the search is killed.
    """
    waiting = points_left(study, recipe)
    if not waiting:
        return study.ask()
    fixed = {"fixed_params": waiting[0]}  # as ``Study.enqueue_trial`` has it
    state, attributes = TrialState.RUNNING, {POINT: waiting[0]}
    study.add_trial(optuna.trial.create_trial(state=state, user_attrs=attributes, system_attrs=fixed))
    return running_trial(study, study.get_trials(deepcopy=False)[-1])


def points_left(study: optuna.Study, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the recipe's points (``search.enqueue``) that no trial has tried, in their order."""
    entered = [trial.user_attrs.get(POINT) for trial in study.get_trials(deepcopy=False)]
    waiting = []
    for point in recipe.search.enqueue:  # equal ones are tried as often as they are written
        if point in entered:
            entered.remove(point)
        else:
            waiting.append(point)
    return waiting


def draw(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> dict[str, Value]:
    """Returns the values of a trial: those that it has already, else new draws; none of an inactive parameter.

    Each draw has a generator of its own, seeded by recipe, trial and parameter. So it depends on the
    finished trials alone: a search that was killed draws what it would have drawn.
    """
    parameters = recipe.search.space
    places = {name: place for place, name in enumerate(parameters, start=1)}
    values: dict[str, Value] = {}
    usual = study.sampler
    try:
        if recipe.search.sampler.name == "nsga2":
            _choose_parents(study, trial, recipe)
        study.sampler = make_sampler(recipe, trial.number)
        _ = trial.relative_params  # draws what the sampler draws at once; Optuna's trial keeps it
        for name, parameter in in_order(parameters).items():
            if is_active(parameter, values):
                study.sampler = make_sampler(recipe, trial.number, places[name])
                values[name] = suggest(trial, name, parameter)
    finally:
        study.sampler = usual  # with ours, ``Study.tell`` would end the study of a grid
    return {name: values[name] for name in parameters if name in values}


def used_up(study: optuna.Study, recipe: Recipe) -> bool:
    """Tells whether every point of the grid has a trial of this study, where the sampler is the grid."""
    if recipe.search.sampler.name != "grid":
        return False
    parameters, size = recipe.search.space, grid_size(recipe.search.space)
    points = {grid_index(parameters, trial.params) for trial in trainings(study)} - {None}
    return size is not None and len(points) >= size


def _choose_parents(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> None:
    """Writes the parents of a generation: nsga2 reads them back in another order than that in which it chooses them."""
    sampler: Any = make_sampler(recipe, trial.number)
    sampler.get_parent_population(study, sampler.get_trial_generation(study, frozen_trial(trial)))
