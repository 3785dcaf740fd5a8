"""A mean of the weights of finished trainings, made and measured as a training without steps. No code of the user's.

    out_dir/attempt-N/{fine_tuned.safetensors, predictions/validation.parquet, result.json}

| kind | the weights |
|---|---|
| ``mean`` | the mean of all members |
| ``model_stock`` | between that mean and the zero-shot weights, tensor by tensor (``model.soups``) |
| ``greedy`` | the mean of the members that were added, one by one, as the objective rose ("Model soups", recipe 1) |

Of ``mean`` and ``model_stock`` a member is left out if a barrier lies between it and the first one: half of both
measures less than the worse of the two, by more than a standard error over images. All tries are measured at one alpha.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from carft_ray import files, layout
from carft_ray.errors import Problem, StorageError
from carft_ray.evaluation.objective import ObjectiveSpec, metrics_at, objective_spec
from carft_ray.evaluation.predictions import select
from carft_ray.model.soups import Mean
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.attempt_files import sha256
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.ranks import on_all_ranks
from carft_ray.training.run import Training, finish, open_training
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import SharedInputs


def run_soup(
    soup: Mapping[str, Any],
    recipe: Recipe,
    out_dir: Path,
    prepared_dir: Path,
    context: RunContext,
    attempt: int = 1,
    opened: SharedInputs | None = None,
    study_dir: Path | None = None,
) -> dict[str, Any]:
    """Makes a soup, measures its alpha curve on the validation sets, and returns the content of ``result.json``.

    Args:
        soup: ``kind``, ``members`` (``name``, the folder of an attempt in the study; ``sha256`` of its weights;
            ``objective`` at ``alpha``, or None) and ``alpha``, at which tries are measured (``study.soups``).
        recipe: ``recipe.train`` holds the values of the first member.
        out_dir, prepared_dir, context, attempt, opened: As of ``training.run.run_training``.
        study_dir: Folder in which the members are; None: that of ``prepared_dir``.

    Returns:
        As ``run_training``, with ``soup``: ``kind``, ``members`` that are in it, ``left_out``, and ``tried``: names and
        objectives of what was measured on the way.

    Raises:
        StorageError: Weights of a member are gone, are not those that the study has recorded, or do not fit the others.
        CarftError: As ``run_training``.
    """
    started = time.perf_counter()
    training = open_training(recipe, out_dir, prepared_dir, context, attempt, opened)
    state, said = _made(training, soup, study_dir or prepared_dir.parent)
    return finish(training, state, prepared_dir, started, soup={"kind": soup["kind"], **said})


def _made(training: Training, soup: Mapping[str, Any], study_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights, and which members are in them."""
    spec, alpha, kind = objective_spec(training.recipe), soup["alpha"], soup["kind"]
    mean = Mean(training.mixtures.zero_shot if kind == "model_stock" else None)
    tried, left_out, best, first = list[dict[str, Any]](), list[str](), -math.inf, dict[str, Tensor]()

    def measured(name: str, state: dict[str, Tensor]) -> tuple[float, pa.Table]:
        with training.looks(lambda: state, training.inputs.validation) as at:
            table = at(alpha)
        objective = metrics_at(table, spec, alpha)["objective"]
        tried.append({"member": name, "objective": objective})
        return objective, table

    for index, member in enumerate(soup["members"]):
        name = member["name"]
        state = on_all_ranks(training.context, lambda name=name, member=member: _weights(study_dir, name, member))  # type: ignore[misc]  # a default of a lambda
        if odd := mean.differing(state):
            rule = "the members of a soup must have tensors of the same names, shapes and types"
            raise StorageError(Problem(f"{study_dir}/{name}", rule, f"others of {', '.join(odd[:5])}"))
        alone = member["objective"]
        if len(soup["members"]) > 1 and alone is None:
            alone = measured(name, state)[0]
        if index == 0:
            best, first = alone, state if kind != "greedy" else first
        elif kind == "greedy":
            objective, _ = measured(name, mean.with_state(state))
            if objective <= best:
                left_out.append(name)
                continue
            best = objective
        else:
            pair = Mean()
            pair.add(first)
            objective, table = measured(name, pair.with_state(state))
            if objective < min(best, alone) - standard_error(table, spec, alpha):
                left_out.append(name)
                continue
        mean.add(state)
    found = mean.stock() if kind == "model_stock" else mean.mean()
    members = [member["name"] for member in soup["members"] if member["name"] not in left_out]
    return found, {"members": members, "left_out": left_out, "tried": tried}


def _weights(study_dir: Path, name: str, member: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the weights of a member, which must be those that the study has recorded."""
    path = files.inside(study_dir, f"{name}/{layout.WEIGHTS}")
    if files.exists(path) and sha256(path) != member["sha256"]:
        raise StorageError(Problem(str(path), "must be the file that the study has recorded", "another one"))
    return load_tensors(path)


def standard_error(table: pa.Table, spec: ObjectiveSpec, alpha: float) -> float:
    """Returns the standard error of an objective over images: sqrt(sum_j w_j^2 p_j (1 - p_j) / n_j).

    Args:
        table: Predictions.
        spec: The objective; w_j is its slope by the accuracy p_j of set j, of n_j images.
        alpha: Which rows.
    """
    metrics = metrics_at(table, spec, alpha)
    accuracies = {name: metrics[f"accuracy/{name}"] for name in spec.sets}
    numbers = {name: len(select(table, name, alpha)) for name in spec.sets}
    parts = (
        weight**2 * accuracies[name] * (1 - accuracies[name]) / numbers[name]
        for name, weight in spec.weights(accuracies).items()
    )
    return math.sqrt(sum(parts))
