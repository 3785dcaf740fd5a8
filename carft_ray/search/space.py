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


def sampler(recipe: Recipe, num_trials: int) -> optuna.samplers.BaseSampler:
    """Returns the recipe's sampler for a study that holds ``num_trials`` trials.

    The seed is derived from both: with the same seed a resumed search would draw the same values again.
    """
    part = recipe.search.sampler
    seed = int(np.random.SeedSequence([part.seed, num_trials]).generate_state(1)[0])
    if part.name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = part.startup_trials or max(4, recipe.search.trials // 4)
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
