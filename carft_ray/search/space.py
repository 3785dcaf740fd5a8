"""The recipe's search space and sampler in Optuna's terms."""

import numpy as np
import optuna

from carft_ray.recipe.schema import CategoricalParameter, IntParameter, Parameter, Recipe

Value = bool | int | float | str | None


def suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Value:
    """Returns the value of a parameter in a trial: the one it has already, else a new draw of the study's sampler."""
    if isinstance(parameter, CategoricalParameter):
        choice: Value = trial.suggest_categorical(name, list(parameter.choices))
        return choice
    if isinstance(parameter, IntParameter):
        low, high = parameter.low, parameter.high
        return int(trial.suggest_int(name, low, high, step=parameter.step, log=parameter.log))
    return float(trial.suggest_float(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log))


def draw(study: optuna.Study, trial: optuna.Trial, recipe: Recipe) -> dict[str, Value]:
    """Returns the values of a trial: those that it has already, else new draws.

    Each draw has a generator of its own, seeded by recipe, trial and parameter. So it depends on the trials that are
    told and on nothing else: a search that was killed, even between two parameters, draws what it would have drawn.
    """
    parameters = recipe.search.space
    if not parameters.keys() <= trial.params.keys():
        study.sampler = _sampler(recipe, trial.number, 0)
        _ = trial.relative_params  # what the sampler draws together, of which some may be there already
    values = {}
    for index, (name, parameter) in enumerate(parameters.items(), start=1):
        study.sampler = _sampler(recipe, trial.number, index)
        values[name] = suggest(trial, name, parameter)
    return values


def _sampler(recipe: Recipe, number: int, index: int) -> optuna.samplers.BaseSampler:
    """Returns the recipe's sampler for a draw of the trial with this number."""
    part = recipe.search.sampler
    seed = int(np.random.SeedSequence([part.seed, number, index]).generate_state(1)[0])
    if part.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = part.startup_trials or max(4, recipe.search.trials // 4)
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
