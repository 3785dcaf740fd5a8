"""Ranking the trials of a study again under another objective, from their stored validation predictions.

No image, GPU or torch is needed, and nothing in the study changes: the alpha curve, the choice of alpha and the
objective are made anew from ``predictions/validation.parquet`` of every finished trial, and so is what its values are
expected to measure. With the recipe's own objective they are exactly those of the study.

Constraints of the recipe hold here as in the search. In a Pareto search every trial has a whole alpha curve, and alpha
is chosen from its grid as in mode ``profile``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from carft_ray.errors import HoldOutError, Problem, UsageError, nearest
from carft_ray.evaluation.alpha_curve import Limit, choose_point, curve_points, limits
from carft_ray.evaluation.objective import ObjectiveKind, ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import violations
from carft_ray.results.reading.study_view import Overview
from carft_ray.study.attributes import ROUNDING
from carft_ray.study.expected import expectation, stand
from carft_ray.study.place import named
from carft_ray.study.rows import best_first, predictions_path, require_finished
from carft_ray.study.training import TrialRow, result_of
from carft_ray.study.typed import FAILED

NOTE = (
    "The study was not changed. Its own objective guided the sampler and chose the best trial. Each ranking by another "
    "objective is one more selection on the same validation images."
)


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
            rule = "must be validation sets: no selection may use a test set"
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
        StorageError, DataError: As ``rescore_row``.
    """
    finished = require_finished(view.study_dir, [row for row in view.trials if row.outcome == "complete"])
    references = result_of(view.study_dir, finished[0]).get("references", {})  # the same for all trials
    bounds = limits(view.recipe.search.constraints, references)
    trials = [rescore_row(view, row, spec, bounds) for row in finished]
    baselines = [rescore_row(view, row, spec) for row in view.all_baselines if row.outcome == "complete"]
    if view.expected is not None:
        failed = [row for row in view.trials if row.outcome in FAILED]
        found = expectation(view.recipe, [*trials, *failed], baselines)
        trials, baselines = stand(trials, found), stand(baselines, found)
    old: dict[str, tuple[int | None, TrialRow]] = {row.name: (None, row) for row in view.baselines}
    old |= {row.name: (rank, row) for rank, row in enumerate(best_first(finished), start=1)}
    return {
        "study": named(view.study_dir),
        "objective": _words(spec),
        "own_objective": {**_words(objective_spec(view.recipe)), "kind": view.recipe.search.objective.kind},
        "constraints": [limit.name for limit in bounds],
        "note": NOTE,
        "study_changed": False,
        "baselines": [_data(row, *old[row.name]) for row in baselines if not row.repeat_of],
        "trials": [_data(row, *old[row.name], rank) for rank, row in enumerate(best_first(trials), start=1)],
        "unfinished": len(view.trials) - len(finished),
    }


def _data(row: TrialRow, old_rank: int | None, old: TrialRow, new_rank: int | None = None) -> dict[str, Any]:
    return {
        "name": row.name,
        "values": row.values,
        "old_rank": old_rank,
        "new_rank": new_rank,
        "old_alpha": old.alpha,
        "old_objective": old.objective,
        "alpha": row.alpha,
        "id_accuracy": row.metrics["id_accuracy"],
        "ood_accuracy": row.metrics.get("ood_accuracy"),
        "objective": row.objective,
        "expected": row.expected,
        "violations": violations(row.metrics),
    }


def rescore_row(view: Overview, row: TrialRow, spec: ObjectiveSpec, bounds: Sequence[Limit] = ()) -> TrialRow:
    """Returns a finished trial or baseline under an objective, at the alpha that is chosen the way its training did.

    A fixed alpha (of the recipe, of a baseline, or drawn by the search) stays.

    Args:
        view: The study.
        row: A complete trial or baseline.
        spec: The objective, over validation sets of the study.
        bounds: The constraints; a baseline has none.

    Raises:
        StorageError, DataError: Its predictions are missing, damaged, or lack a set or an alpha.
    """
    table, alpha = read_predictions(predictions_path(view.study_dir, row)), view.recipe.search.alpha
    fixed = apply(view.recipe, row.values).train.alpha
    is_free = fixed is None or (row.kind == "trial" and view.recipe.search.objective.kind == "pareto")
    points = curve_points(dict.fromkeys(alpha.measured if is_free else [fixed or 0.0], table), spec, bounds)
    chosen = choose_point(points, alpha.lowest) if is_free else points[0]
    allowed = tuple(point for point in points if point["alpha"] >= alpha.lowest - ROUNDING)
    metrics = {name: value for name, value in chosen.items() if name not in ("alpha", "objective")}
    now = replace(row, alpha=chosen["alpha"], objective=chosen["objective"], metrics=metrics, points=allowed)
    return replace(now, standing=0, order=None, expected=None)


def _words(spec: ObjectiveSpec) -> dict[str, Any]:
    weight = spec.id_weight if spec.kind == "weighted_mean" else None
    return {"kind": spec.kind, "id_weight": weight, "id_set": spec.id_set, "ood_sets": list(spec.ood_sets)}
