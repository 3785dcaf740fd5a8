"""The alpha at which a model is delivered and confirmed: nearer to zero-shot where the validation images do not say.

``search.alpha.rule: one_se`` takes the smallest alpha that may be chosen and whose objective is lower than the best
one's by at most the standard error of their difference, paired by image. It is the rule of one standard error of
"Classification and Regression Trees" (Breiman et al. 1984), with the error of the difference in place of that of the
best. The sampler gets the best of the curve whatever the rule is.
"""

from collections.abc import Sequence

import numpy as np

from carft_ray.evaluation.alpha_curve import Point, point_at
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions, sample_ids
from carft_ray.recipe.schema.search import total_violation
from carft_ray.results.statistics.images import with_images
from carft_ray.results.statistics.intervals import ValuesBySet, objective_difference
from carft_ray.study.rows import ZERO_SHOT, predictions_path
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.training import TrialRow, result_of

ROUNDING = 1e-9


def delivered_at(study: Snapshot, trained: Sequence[TrialRow]) -> float:
    """Returns the alpha at which trainings of the same values, or one soup, are delivered.

    Args:
        study: The study.
        trained: Complete; they stand at their best alpha.

    Raises:
        StorageError: A result or predictions are missing or damaged.
        DataError: Predictions lack a set.
    """
    best, search = trained[0].alpha or 0.0, study.recipe.search
    if search.alpha.rule == "best" or trained[0].name == ZERO_SHOT:
        return best
    curves = [result_of(study.study_dir, row).get("curve") or () for row in trained]
    known = [point["alpha"] for point in curves[0] if search.alpha.lowest - ROUNDING <= point["alpha"] < best]
    shared = [alpha for alpha in sorted(known) if all(point_at(curve, alpha) for curve in curves)]
    limit = max(_violation(curve, best) for curve in curves)
    allowed = [alpha for alpha in shared if max(_violation(curve, alpha) for curve in curves) <= limit + ROUNDING]
    if not allowed or not all(point_at(curve, best) for curve in curves):
        return best
    tables = [read_predictions(predictions_path(study.study_dir, row)) for row in trained]
    spec = objective_spec(study.recipe)
    spec = with_images(spec, study.recipe, {name: sample_ids(tables[0], name, best) for name in spec.sets})

    def correct(alpha: float) -> ValuesBySet:
        found: dict[str, BoolArray] = {n: correct_matrix([(table, alpha) for table in tables], n) for n in spec.sets}
        return {name: np.asarray(right, np.float64).mean(axis=0, keepdims=True) for name, right in found.items()}

    at_best = correct(best)
    for alpha in allowed:
        gap = objective_difference(spec, at_best, correct(alpha))
        if gap.mean <= gap.standard_error:
            return float(alpha)
    return best


def _violation(curve: Sequence[Point], alpha: float) -> float:
    return total_violation(point_at(curve, alpha) or {})
