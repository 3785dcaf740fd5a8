"""Ranking the trials of a study again under another objective, from their stored validation predictions.

No image, GPU or torch is needed, and nothing in the study changes: the alpha curve, the choice of alpha and the
objective are made anew from ``predictions/validation.parquet`` of every finished trial. With the recipe's own objective
they are exactly those that the search stored.

Constraints of the recipe hold here as in the search. In a Pareto search every trial has a whole alpha curve, and alpha
is chosen from its grid as in mode ``profile``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from carft_ray.errors import CarftError, HoldOutError, Problem, StorageError, UsageError, nearest
from carft_ray.evaluation import predictions
from carft_ray.evaluation.alpha import AlphaChoice, alpha_profile, fitted_curve, partial_alphas, stepped_back
from carft_ray.evaluation.constraints import Limit, violations_at
from carft_ray.evaluation.objective import ObjectiveKind, ObjectiveSpec, mean_ood_accuracy, objective_spec
from carft_ray.recipe.constraints import VIOLATION, total_violation, violations
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.space import apply
from carft_ray.results.pareto import study_limits
from carft_ray.results.reading.overview import Overview
from carft_ray.results.reading.stored import predictions_path
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import best_first, require_finished

NOTE = (
    "Nothing in the study was changed. The trials were proposed and their best chosen under the study's own objective; "
    "each ranking by another one is one more selection on the same validation images."
)


@dataclass(frozen=True)
class Rescored:
    """One training under an objective; all values but alpha are fractions.

    Attributes:
        choice: Alpha and objective.
        accuracies: At that alpha, by set.
        violations: ``violation/<name>`` of every constraint at that alpha, interpolated where it is not measured.
        measured: The accuracies were measured at that alpha on all images; False: on a part of them, or read from the
            fitted curves, since no predictions at it are stored.
    """

    choice: AlphaChoice
    accuracies: dict[str, float]
    violations: dict[str, float]
    measured: bool = True


def asked_objective(
    recipe: Recipe, kind: str | None = None, id_weight: float | None = None, sets: str | None = None
) -> ObjectiveSpec:
    """Returns the objective that a user asks for; what is left out is as in the recipe.

    Args:
        recipe: The study's recipe.
        kind: Kind of objective.
        id_weight: w of ``weighted_mean``, from 0 to 1.
        sets: Names of OOD validation sets, separated by commas; ``id_val`` is always in.

    Raises:
        HoldOutError: A test set is named.
        UsageError: A name or the weight is none.
    """
    own, problems = objective_spec(recipe), []
    kinds = get_args(ObjectiveKind)
    if kind is not None and kind not in kinds:
        problems.append(Problem("--objective", "must be a kind of objective", repr(kind), kinds, nearest(kind, kinds)))
    if id_weight is not None and not 0 <= id_weight <= 1:  # not-a-number too
        problems.append(Problem("--id-weight", "must be a number from 0 to 1", f"{id_weight:g}"))
    names = own.ood_sets
    if sets is not None:
        asked = [name for name in (part.strip() for part in sets.split(",")) if name]
        test_sets = {"id_test", "ood_test", *recipe.data.ood_test}
        if hidden := [name for name in asked if name not in own.ood_sets and name in test_sets]:
            rule = "must be validation sets: no choice may see a test set"
            raise HoldOutError(Problem("--sets", rule, ", ".join(hidden), own.ood_sets))
        if not asked:
            problems.append(Problem("--sets", "must name an OOD validation set", repr(sets), own.ood_sets))
        rule = "must be OOD validation sets of the study; id_val is always in"
        for name in dict.fromkeys(asked):
            if name not in own.ood_sets:
                near = nearest(name, own.ood_sets)
                problems.append(Problem("--sets", rule, repr(name), own.ood_sets or ("none",), near))
        names = tuple(name for name in own.ood_sets if name in asked)
    if problems:
        raise UsageError(problems)
    weight = own.id_weight if id_weight is None else id_weight
    return replace(own, kind=kind or own.kind, ood_sets=names, id_weight=weight)  # type: ignore[arg-type]


def rescore(view: Overview, spec: ObjectiveSpec) -> dict[str, Any]:
    """Ranks the finished trials again and returns what `rescore` reports, as JSON.

    Args:
        view: The study.
        spec: The objective; its sets are validation sets of the study (``asked_objective``).

    Returns:
        ``baselines`` in their order and ``trials`` by new rank, each with old and new rank (trials alone have them),
        alpha and objective; ``unfinished``: how many trials are not among them.

    Raises:
        NoSuccessfulTrialError: No trial is finished.
        StorageError: Predictions of a finished trial are missing or damaged; names them all.
    """
    finished = require_finished(view.study_dir, [row for row in view.trials if row.outcome == "complete"])
    baselines = [row for row in view.baselines if row.outcome == "complete"]
    found: dict[str, Rescored] = {}
    problems: list[Problem] = []
    bounds = study_limits(view.recipe, view.baselines)
    for row in (*baselines, *finished):
        try:
            found[row.kind + row.name] = rescore_row(view, row, spec, bounds if row.kind == "trial" else ())
        except CarftError as error:
            problems += error.problems
    if problems:
        raise StorageError(problems)
    old = {row.number: rank for rank, row in enumerate(best_first(finished), start=1)}

    def order(row: TrialRow) -> tuple[float, float, int]:
        each = found[row.kind + row.name]
        return total_violation(each.violations), -each.choice.value, row.number

    def data(row: TrialRow, new_rank: int | None = None) -> dict[str, Any]:
        each = found[row.kind + row.name]
        ood = {name: each.accuracies[name] for name in spec.ood_sets}
        return {
            "name": row.name,
            "values": row.values,
            "old_rank": old[row.number] if row.kind == "trial" else None,
            "new_rank": new_rank,
            "old_alpha": row.alpha,
            "old_objective": row.objective,
            "alpha": each.choice.alpha,
            "fitted": each.choice.fitted,
            "id_accuracy": each.accuracies[spec.id_set],
            "ood_accuracy": mean_ood_accuracy(ood) if ood else None,
            "measured": each.measured,
            "objective": each.choice.value,
            "violations": violations(each.violations),
        }

    return {
        "study": str(view.study_dir),
        "objective": _words(spec),
        "own_objective": {**_words(objective_spec(view.recipe)), "kind": view.recipe.search.objective.kind},
        "constraints": [limit.name for limit in bounds],
        "note": NOTE,
        "study_changed": False,
        "baselines": [data(row) for row in baselines],
        "trials": [data(row, rank) for rank, row in enumerate(sorted(finished, key=order), start=1)],
        "unfinished": len(view.trials) - len(finished),
    }


def rescore_row(view: Overview, row: TrialRow, spec: ObjectiveSpec, bounds: Sequence[Limit] = ()) -> Rescored:
    """Returns one finished trial or baseline under an objective, the way its training chose alpha.

    A fixed alpha (of the recipe, of a baseline, or drawn by the search) stays; else the alphas decide that the training
    chose from. Predictions at a chosen alpha between them, which the training added, are no point of the curve.

    Args:
        view: The study.
        row: A complete trial or baseline.
        spec: The objective, over validation sets of the study.
        bounds: The constraints; a baseline has none.

    Raises:
        StorageError, DataError: Its predictions are missing, damaged, or lack a set or an alpha.
    """
    table = predictions.read_predictions(predictions_path(view.study_dir, row))
    fixed = apply(view.recipe, row.values).train.alpha
    if fixed is not None and not (row.kind == "trial" and view.recipe.search.objective.kind == "pareto"):
        by_set = _accuracies(table, spec, fixed)
        choice = AlphaChoice(fixed, spec.value(by_set), False, "alpha is fixed")
        return Rescored(choice, by_set, violations_at(table, bounds, fixed))
    lowest, measured = view.recipe.search.alpha.lowest, view.recipe.search.alpha.measured
    result = {} if fixed is not None else view.result(row)
    among = table.filter(np.isin(table["alpha"].to_numpy(), result.get("chosen_from", measured)))
    profile = alpha_profile(among, spec, lowest, bounds)
    choice = profile.choice
    stored = set.intersection(*({*predictions.alphas(table, name)} for name in spec.sets))
    if choice.alpha in stored:
        if choice.alpha not in profile.alphas:
            choice = stepped_back(profile, violations_at(table, bounds, choice.alpha), lowest)
        by_set, missed = _accuracies(table, spec, choice.alpha), violations_at(table, bounds, choice.alpha)
        return Rescored(choice, by_set, missed, choice.alpha not in partial_alphas(result))
    missed = {
        VIOLATION + limit.name: float(np.interp(choice.alpha, profile.alphas, along))
        for limit, along in zip(bounds, () if profile.violations_KA is None else profile.violations_KA, strict=True)
    }
    by_set = {
        name: float(np.clip(fitted_curve(profile.alphas, curve, [choice.alpha])[0], 0, 1))
        for name, curve in profile.accuracies.items()
    }
    return Rescored(choice, by_set, missed, measured=False)


def _accuracies(table: Any, spec: ObjectiveSpec, alpha: float) -> dict[str, float]:
    return {name: predictions.accuracy(predictions.select(table, name, alpha)) for name in spec.sets}


def _words(spec: ObjectiveSpec) -> dict[str, Any]:
    weight = spec.id_weight if spec.kind == "weighted_mean" else None
    return {"kind": spec.kind, "id_weight": weight, "id_set": spec.id_set, "ood_sets": list(spec.ood_sets)}
