"""A search space that shrinks or grows: the trials move to it, in one commit, in their order.

Number, name and folder of a trial never change. The commit also holds the recipe with the new space.

| an earlier trial | in the new space |
|---|---|
| inside it | as it was, RUNNING ones too: they are recovered |
| outside, finished | FAIL, which no sampler uses; state and values are kept in the attribute ``outside`` |
| outside, not finished | as above, with outcome ``error`` |

Trials outside stay rows of the study, and may be its best: they were trained for the same objective. One that lies
inside again, in a later space, is to Optuna what it was. What a sampler has kept of its own with a trial is left
behind: it is about the old space.
"""

from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space import place
from carft_ray.study.attributes import OUTCOME, OUTSIDE, REASON, VALUES
from carft_ray.study.proposals.optuna_samplers import distribution
from carft_ray.study.rows import STUDY_NAMES, state_and_values
from carft_ray.words import counted

ENDED = "outside the search space, which was changed while it ran"


def move_trials(storage: JournalStorage, recipe: Recipe) -> list[str]:
    """Moves the trials to the space of a recipe, within an open commit.

    Returns:
        What became of them, in a sentence; nothing where there are none.
    """
    old = optuna.load_study(study_name=STUDY_NAMES["trial"], storage=storage)
    trials, attributes, directions = old.get_trials(deepcopy=False), old.user_attrs, old.directions
    if not trials:
        return []
    optuna.delete_study(study_name=old.study_name, storage=storage)
    new = optuna.create_study(study_name=old.study_name, storage=storage, directions=directions)
    for key, value in attributes.items():
        new.set_user_attr(key, value)
    moved = [_moved(trial, recipe) for trial in trials]
    new.add_trials(moved)
    num_inside = sum(OUTSIDE not in trial.user_attrs for trial in moved)
    return [f"the search space has changed: {num_inside} of {counted(len(moved), 'earlier trial')} inside the new one"]


def placed_trial(
    trial: FrozenTrial, recipe: Recipe, values: dict[str, Any], attributes: dict[str, Any], with_values: bool = True
) -> FrozenTrial:
    """Returns a trial with its state and values, as one of a study with the recipe's space.

    Args:
        trial: The trial.
        recipe: Has the space.
        values: Of the parameters that are drawn, as ``recipe.space.place`` gives them.
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


def _moved(trial: FrozenTrial, recipe: Recipe) -> FrozenTrial:
    attributes = {key: value for key, value in trial.user_attrs.items() if key != OUTSIDE}
    values = attributes.pop(VALUES) if OUTSIDE in trial.user_attrs else trial.params
    placed = place(values, recipe)
    if not isinstance(placed, str):
        return placed_trial(trial, recipe, placed, attributes)
    state, objectives = state_and_values(trial)
    if not state.is_finished():
        attributes |= {OUTCOME: "error", REASON: ENDED}
        state = TrialState.FAIL
    outside = {"state": state.name, "objectives": objectives, "constraints": _constraints(trial)}
    made: FrozenTrial = optuna.trial.create_trial(
        state=TrialState.FAIL,
        user_attrs={**attributes, VALUES: values, OUTSIDE: outside},
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
