"""The values of a trial: asked of the recipe's sampler, or given by the recipe's points."""

from typing import Any

import optuna
from optuna.trial import TrialState

from carft_ray.recipe.schema.parameters import CategoricalParameter, IntParameter, Parameter
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.conditions import in_order, is_active
from carft_ray.recipe.space.grid import grid_index, grid_size
from carft_ray.study.attributes import POINT
from carft_ray.study.proposals.optuna_private import frozen_trial, running_trial
from carft_ray.study.proposals.samplers import make_sampler
from carft_ray.study.rows import trainings

Value = bool | int | float | str | None


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
    entered = [trial.user_attrs.get(POINT) for trial in study.get_trials(deepcopy=False)]
    waiting = [point for point in recipe.search.enqueue if point not in entered]
    if not waiting:
        return study.ask()
    fixed = {"fixed_params": waiting[0]}  # as ``Study.enqueue_trial`` has it
    state, attributes = TrialState.RUNNING, {POINT: waiting[0]}
    study.add_trial(optuna.trial.create_trial(state=state, user_attrs=attributes, system_attrs=fixed))
    return running_trial(study, study.get_trials(deepcopy=False)[-1])


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
