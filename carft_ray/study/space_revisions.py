"""A search space that shrinks or grows: the study gets another generation, an Optuna study of its own in the log.

    search, search-2, search-3, ...     names of the Optuna studies of the trials; the manifest names the one that holds

A generation takes all trials of the one before, in their order: number, name and folder of a trial never change.

| an earlier trial | in the new generation |
|---|---|
| inside the new space | as it was, RUNNING ones too: they are recovered |
| outside, finished | FAIL, which no sampler uses; state and values are kept in the attribute ``outside`` |
| outside, not finished | as above, with outcome ``error`` |

Trials outside stay rows of the study, and may be its best: they were trained for the same objective. One that lies
inside again, in a later generation, is to Optuna what it was. What a sampler has kept of its own with a trial is left
behind: it is about the old space.

All is one commit, then the manifest names it. So a kill leaves the old generation or the new one; one that it has left
without a name is made anew by the next change.
"""

from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.grid import place
from carft_ray.study.proposals.samplers import distribution
from carft_ray.study.rows import OUTSIDE, generation_name, state_and_values
from carft_ray.words import counted

ENDED = "outside the search space, which was changed while it ran"


def begin_generation(storage: JournalStorage, generation: int, recipe: Recipe) -> str:
    """Writes the next generation of trials, in an open commit; it holds when the manifest says so.

    Args:
        storage: Of the log.
        generation: The one that holds now.
        recipe: Has the new space.

    Returns:
        What became of the trials, in a sentence.
    """
    old = optuna.load_study(study_name=generation_name(generation), storage=storage)
    name = generation_name(generation + 1)
    if name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=name, storage=storage)
    new = optuna.create_study(study_name=name, storage=storage, directions=old.directions)
    for key, value in old.user_attrs.items():
        new.set_user_attr(key, value)
    for trial in old.get_trials(deepcopy=False):
        new.add_trial(_carried(trial, recipe))
    carried = new.get_trials(deepcopy=False)
    num_inside = sum(OUTSIDE not in trial.user_attrs for trial in carried)
    return f"the search space has changed: {num_inside} of {counted(len(carried), 'earlier trial')} inside the new one"


def placed_trial(
    trial: FrozenTrial, recipe: Recipe, values: dict[str, Any], attributes: dict[str, Any], with_values: bool = True
) -> FrozenTrial:
    """Returns a trial with its state and values, as one of a study with the recipe's space.

    Args:
        trial: The trial.
        recipe: Has the space.
        values: Of the parameters that are drawn, as ``recipe.space.grid.place`` gives them.
        attributes: The user attributes.
        with_values: Whether the intermediate values come along.
    """
    state, objectives = state_and_values(trial)
    made: FrozenTrial = optuna.trial.create_trial(
        state=state,
        values=objectives,
        params=values,
        distributions={name: distribution(recipe.search.space[name]) for name in values},
        user_attrs=attributes,
        intermediate_values=trial.intermediate_values if with_values else {},
        constraints=_constraints(trial),
    )
    return _at_its_time(made, trial)


def _carried(trial: FrozenTrial, recipe: Recipe) -> FrozenTrial:
    attributes = {key: value for key, value in trial.user_attrs.items() if key != OUTSIDE}
    values = attributes.pop("values") if OUTSIDE in trial.user_attrs else trial.params
    placed = place(values, recipe)
    if not isinstance(placed, str):
        return placed_trial(trial, recipe, placed, attributes)
    state, objectives = state_and_values(trial)
    if not state.is_finished():
        attributes |= {"outcome": "error", "reason": ENDED}
        state = TrialState.FAIL
    outside = {"state": state.name, "objectives": objectives, "constraints": _constraints(trial)}
    made: FrozenTrial = optuna.trial.create_trial(
        state=TrialState.FAIL,
        user_attrs={**attributes, "values": values, OUTSIDE: outside},
        intermediate_values=trial.intermediate_values,
    )
    return _at_its_time(made, trial)


def _constraints(trial: FrozenTrial) -> dict[str, float]:
    outside = trial.user_attrs.get(OUTSIDE)
    return dict(outside["constraints"] if outside else trial.constraints)


def _at_its_time(made: FrozenTrial, trial: FrozenTrial) -> FrozenTrial:
    made.datetime_start = trial.datetime_start
    if made.state.is_finished() and trial.datetime_complete is not None:
        made.datetime_complete = trial.datetime_complete
    return made
