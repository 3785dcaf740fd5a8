"""The alpha curve: choosing the mixing coefficient from evaluations on a grid.

The curve J(alpha) is the objective of the weights (1 - alpha) zero_shot + alpha fine_tuned. Neighbouring points differ
by less than their noise, so the raw maximum is too high; an *anchored cubic*

    J(alpha) = J(0) + c1 alpha + c2 alpha^2 + c3 alpha^3        (least squares over the grid points with alpha > 0)

is fitted and the trial's objective is the fitted value at its best alpha. Where the curve is no cubic, by the rule of
``choose_alphas``, the highest measured objective counts as it is. There, and where the best measured alpha is an end of
the curve, the points ``between`` it and its neighbours are measured, too. All objectives are fractions.

Constraints are part of the choice. Of the alphas that may be chosen only those count that miss the constraints least,
by the sum of the positive parts of their violations: where any meets them all, only alphas that do. Between evaluated
points violations are interpolated linearly. A chosen alpha between them is evaluated, and given up for the best
evaluated point when it then misses more than that one (``stepped_back``).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carft_ray.errors import CarftError, DataError, Problem
from carft_ray.evaluation import predictions
from carft_ray.evaluation.constraints import Limit, violation_curve
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray, FloatArray

STEP = 0.05  # of the grid on which the fit is maximised
MIN_POINTS = 4  # grid points, alpha = 0 included
MAX_SD = 1.5  # of the residuals, in paired standard errors of neighbouring points
MAX_RESIDUAL = 3.0  # of any one, in its own paired standard errors


@dataclass(frozen=True)
class AlphaChoice:
    """The chosen alpha.

    Attributes:
        alpha: Chosen mixing coefficient, never below the lowest one allowed.
        value: Objective there: of the fit, or measured when there is no fit.
        fitted: Whether ``value`` is of the fit.
        reason: Why there is no fit; empty with a fit.
    """

    alpha: float
    value: float
    fitted: bool
    reason: str = ""


@dataclass(frozen=True, eq=False)
class AlphaProfile:
    """A whole alpha curve of one training and what was chosen from it.

    Attributes:
        alphas: Those that were evaluated, rising.
        accuracies: Per set its accuracy per alpha.
        objectives: Objective per alpha.
        noise_AA: Covariance of the objectives over images (``objective_covariance``), [A, A].
        choice: Alpha and objective of the trial.
        violations_KA: Per constraint its violation per alpha, [K, A]; None without constraints.
    """

    alphas: tuple[float, ...]
    accuracies: dict[str, list[float]]
    objectives: tuple[float, ...]
    noise_AA: FloatArray
    choice: AlphaChoice
    violations_KA: FloatArray | None = None


def partial_alphas(result: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the alphas of a training's curve at which a part of the images was evaluated (``curve``), rising.

    Args:
        result: Content of its ``result.json``.
    """
    return tuple(point["alpha"] for point in result.get("curve", ()) if "evaluated" in point)


def choose_alpha(
    alphas: Sequence[float],
    objectives: Sequence[float],
    lowest: float,
    noise_AA: FloatArray | None,
    violations_KA: FloatArray | None = None,
    evaluated_only: bool = False,
) -> AlphaChoice:
    """Chooses alpha of one curve by the rule of ``choose_alphas`` and says why there is no fit.

    Args:
        alphas: Evaluated alphas, different from each other, any order.
        objectives: Objective at each.
        lowest: Lowest alpha that may be chosen; alpha = 0 is a baseline and never a trial's objective.
        noise_AA: Covariance of the objectives over images, [A, A]; None skips the check of the residuals.
        violations_KA: Violation of each of K constraints at each alpha, [K, A]; None: no constraint.
        evaluated_only: Only an evaluated alpha may be chosen, with its fitted value where there is a fit.

    Raises:
        CarftError: An objective is not finite, or no alpha from ``lowest`` on was evaluated.
        ValueError: The lists have different lengths, or an alpha comes twice.
    """
    if len(alphas) != len(objectives) or len(set(alphas)) != len(alphas):
        raise ValueError(f"alphas must be different and have one objective each, but got {alphas}, {objectives}")
    bad = [(alpha, value) for alpha, value in zip(alphas, objectives, strict=True) if not math.isfinite(value)]
    if bad:
        rule = "the objective must be finite"
        raise CarftError([Problem(f"alpha {alpha:g}", rule, f"{value}") for alpha, value in bad])
    order = np.argsort(alphas)
    points, values = np.asarray(alphas, np.float64)[order], np.asarray(objectives, np.float64)[order]
    if not (points >= lowest - 1e-9).any():
        shown = ", ".join(f"{alpha:g}" for alpha in points)
        raise CarftError(Problem("alpha", f"at least one evaluated alpha must be {lowest:g} or more", shown))
    noise = None if noise_AA is None else noise_AA[np.ix_(order, order)][None]
    violations = None if violations_KA is None else violations_KA[None, :, order]
    found = choose_alphas(points.tolist(), values[None], lowest, noise, violations, evaluated_only)
    fitted = bool(found.fitted[0])
    reason = "" if fitted else _no_fit_reason(points, values, lowest, noise)
    return AlphaChoice(float(found.alphas[0]), float(found.values[0]), fitted, reason)


def between(profile: AlphaProfile, lowest: float) -> tuple[float, ...]:
    """Returns the alphas, at most two, that are to be measured in addition to those of a profile.

    Where there is no fit, or the best measured alpha is an end of those that may be chosen, they are the midpoints
    between it and its neighbours, none below ``lowest`` and none in a gap of 0.05 or less; else none. More points
    everywhere would add bias: the best of noisy values is too high.

    Args:
        profile: Of the grid.
        lowest: Lowest alpha that may be chosen.
    """
    points = np.asarray(profile.alphas)
    allowed = np.flatnonzero(points >= lowest - 1e-9)
    totals = _totals(None if profile.violations_KA is None else profile.violations_KA[None], points, points[allowed])
    best = int(allowed[_first_best(np.asarray(profile.objectives)[None, allowed], totals)[0]])
    if profile.choice.fitted and best not in (allowed[0], allowed[-1]):
        return ()
    around = points[max(0, best - 1) : best + 2].tolist()
    middles = [round((a + b) / 2, 9) for a, b in itertools.pairwise(around) if b - a > STEP + 1e-9]
    return tuple(middle for middle in middles if middle >= lowest - 1e-9)


def stepped_back(profile: AlphaProfile, measured: Mapping[str, float], lowest: float) -> AlphaChoice:
    """Returns the choice of a profile after its alpha, which is no point of the profile, was evaluated.

    The choice stays unless it misses the constraints by more than the best point does; then that one is chosen.

    Args:
        profile: With its choice.
        measured: Violations at the chosen alpha, by any names; empty without constraints.
        lowest: Lowest alpha that may be chosen.
    """
    missed, violations_KA = sum(max(0.0, value) for value in measured.values()), profile.violations_KA
    if missed == 0 or violations_KA is None:
        return profile.choice
    back = choose_alpha(profile.alphas, profile.objectives, lowest, profile.noise_AA, violations_KA, True)
    there = float(np.maximum(violations_KA[:, profile.alphas.index(back.alpha)], 0).sum())
    return back if there < missed else profile.choice


@dataclass(frozen=True, eq=False)
class AlphaChoices:
    """Choices of ``choose_alphas`` for B curves over the same A alphas.

    Attributes:
        alphas: [B].
        values: Objective of each choice, [B].
        readers: How each value is read off its curve, [B, A]: ``values = (readers * objectives).sum(axis=1)``. The same
            row reads another curve at the alpha chosen here: from its fit after a fit, else as measured.
        missed: By how much each choice misses the constraints in all, [B]; between evaluated points as interpolated.
        fitted: Whether each value is of the fit, [B].
    """

    alphas: FloatArray
    values: FloatArray
    readers: FloatArray
    missed: FloatArray
    fitted: BoolArray


def choose_alphas(
    alphas: Sequence[float],
    objectives_BA: FloatArray,
    lowest: float,
    noise_BAA: FloatArray | None,
    violations_BKA: FloatArray | None = None,
    evaluated_only: bool = False,
) -> AlphaChoices:
    """Chooses alpha of many curves by the anchored cubic, or by the raw maximum where the cubic cannot be trusted.

    The fit is maximised over the multiples of 0.05 from ``lowest`` to the largest alpha evaluated; of equal values
    (within 1e-12) the smaller alpha wins. The raw maximum over the evaluated alphas from ``lowest`` on is taken when
    there are fewer than four points (alpha = 0 counted), when alpha = 0 is missing, when the residual sd, sqrt(RSS /
    (number of points with alpha > 0 - 3)), exceeds 1.5 paired standard errors of neighbouring points (root mean
    square), or when the residual at any point exceeds three paired standard errors of its own. With four points the
    cubic goes through all of them and nothing is left to check. With constraints the evaluated alphas from ``lowest``
    on may be chosen after a fit, too, and the least violating alphas alone take part.

    Args:
        alphas: Evaluated alphas, rising, the same for all curves; at least one is ``lowest`` or more.
        objectives_BA: Objectives, [B, A], finite.
        lowest: Lowest alpha that may be chosen.
        noise_BAA: Covariance of the objectives over images per curve, [B, A, A]; None skips the check of the residuals.
        violations_BKA: Violation of each of K constraints per curve and alpha, [B, K, A]; None: no constraint.
        evaluated_only: Only an evaluated alpha may be chosen, with its fitted value where there is a fit.
    """
    points = np.asarray(alphas, np.float64)
    allowed = np.flatnonzero(points >= lowest - 1e-9)
    totals = _totals(violations_BKA, points, points[allowed])
    best_B = _first_best(objectives_BA[:, allowed], totals)
    raw_B, missed = allowed[best_B], _picked(totals, best_B)
    chosen, readers = points[raw_B], np.eye(len(points))[raw_B]
    fitted_B: BoolArray = np.zeros(len(objectives_BA), np.bool_)
    fine = points[allowed] if evaluated_only else _fine(points, lowest, violations_BKA)
    if _may_fit(points) and len(fine):
        fitted_B = ~_Residuals(points, objectives_BA, noise_BAA).rejected_B
        fit_readers, totals = _fit_readers(points, fine), _totals(violations_BKA, points, fine)
        best_B = _first_best(objectives_BA @ fit_readers.T, totals)
        chosen = np.where(fitted_B, fine[best_B], chosen)
        readers = np.where(fitted_B[:, None], fit_readers[best_B], readers)
        missed = np.where(fitted_B, _picked(totals, best_B), missed)
    return AlphaChoices(chosen, (readers * objectives_BA).sum(axis=1), readers, missed, fitted_B)


def fitted_curve(
    alphas: Sequence[float] | FloatArray, objectives: Sequence[float] | FloatArray, at: Sequence[float] | FloatArray
) -> FloatArray:
    """Returns the anchored cubic of the points (alpha = 0 is the first) at the alphas ``at``."""
    return np.asarray(_fit_readers(np.asarray(alphas, np.float64), np.asarray(at, np.float64)) @ objectives)


def objective_covariance(correct: Mapping[str, BoolArray], spec: ObjectiveSpec) -> FloatArray:
    """Returns the covariance of the objectives of A models that saw the same images, luck of the images alone, [A, A].

    C_ab = sum_j cov_k(w_aj x_ajk, w_bj x_bjk) / n_j with ddof = 1, w_aj the derivative of the objective at the
    accuracies of a. So C_aa + C_bb - 2 C_ab is the squared paired standard error of J(a) - J(b). A set of one image
    adds nothing.

    Args:
        correct: Per set the correctness of the models, bool [A, n_j].
        spec: The objective.
    """
    slopes = spec.slopes({name: correct[name].mean(axis=1) for name in spec.sets})
    covariance = np.zeros((len(correct[spec.id_set]),) * 2)
    for name, slope_A in slopes.items():
        weighted = slope_A[:, None] * correct[name]
        if (num_images := weighted.shape[1]) > 1:
            centred = weighted - weighted.mean(axis=1, keepdims=True)
            covariance += centred @ centred.T / (num_images - 1) / num_images
    return covariance


def neighbour_se(noise_BAA: FloatArray) -> FloatArray:
    """Returns the paired standard error of neighbouring points, root mean square over the pairs, [B].

    Args:
        noise_BAA: Covariance of the objectives, alphas rising, [B, A, A]; at least two alphas.
    """
    variances = np.diagonal(noise_BAA, axis1=-2, axis2=-1)
    covariances = np.diagonal(noise_BAA, 1, axis1=-2, axis2=-1)
    pairs = np.maximum(variances[..., :-1] + variances[..., 1:] - 2 * covariances, 0)
    found: FloatArray = np.sqrt(pairs.mean(axis=-1))
    return found


def alpha_profile(table: pa.Table, spec: ObjectiveSpec, lowest: float, bounds: Sequence[Limit] = ()) -> AlphaProfile:
    """Makes the alpha curve of one training from its predictions and chooses alpha.

    Args:
        table: Predictions of all sets of the objective at all alphas of the curve (``predictions``).
        spec: The objective.
        lowest: Lowest alpha that may be chosen.
        bounds: The constraints. A chosen alpha that is no such point must be evaluated, then ``stepped_back`` asked.

    Raises:
        DataError: The sets were not all evaluated at the same alphas.
        CarftError: See ``choose_alpha``.
    """
    alphas = predictions.alphas(table, spec.id_set)
    for name in spec.ood_sets:
        if predictions.alphas(table, name) != alphas:
            rule = f"must have been evaluated at the alphas of {spec.id_set}, {alphas}"
            raise DataError(Problem(f"predictions of {name}", rule, f"{predictions.alphas(table, name)}"))
    matrices = {name: predictions.correct_matrix([(table, alpha) for alpha in alphas], name) for name in spec.sets}
    noise_AA = objective_covariance(matrices, spec)
    accuracies: dict[str, list[float]] = {name: matrices[name].mean(axis=1).tolist() for name in spec.sets}
    objectives = tuple(spec.value({name: accuracies[name][i] for name in spec.sets}) for i in range(len(alphas)))
    violations_KA = violation_curve(table, bounds, alphas) if bounds else None
    choice = choose_alpha(alphas, objectives, lowest, noise_AA, violations_KA)
    return AlphaProfile(tuple(alphas), accuracies, objectives, noise_AA, choice, violations_KA)


class _Residuals:
    """Of the fits of B curves: ``rest`` per point [B, A], ``sd`` [B], the standard errors that limit them, a verdict.

    ``rejected_B`` are the fits that do not describe their curve; none without noise, or with no point left to check.
    """

    def __init__(self, points: FloatArray, objectives_BA: FloatArray, noise_BAA: FloatArray | None) -> None:
        unfitted = np.eye(len(points)) - _fit_readers(points, points)
        self.rest, dof = objectives_BA @ unfitted.T, len(points) - 1 - 3
        self.rejected_B: BoolArray = np.zeros(len(self.rest), np.bool_)
        if noise_BAA is not None and dof >= 1:
            self.sd = np.sqrt((self.rest**2).sum(axis=1) / dof)
            self.neighbour_se = neighbour_se(noise_BAA)
            variances = np.einsum("ia,bac,ic->bi", unfitted, noise_BAA, unfitted)
            self.rest_se = np.sqrt(np.maximum(variances, 0))
            self.is_wide_B = self.sd > MAX_SD * self.neighbour_se + 1e-12
            one_too_large = (np.abs(self.rest) > MAX_RESIDUAL * self.rest_se + 1e-12).any(axis=1)
            self.rejected_B = self.is_wide_B | one_too_large


def _may_fit(points: FloatArray) -> bool:
    return len(points) >= MIN_POINTS and points[0] == 0


def _no_fit_reason(points: FloatArray, values: FloatArray, lowest: float, noise: FloatArray | None) -> str:
    """Returns why a curve has no fit; it has none."""
    if not _may_fit(points):
        return f"fewer than {MIN_POINTS} points" if len(points) < MIN_POINTS else "alpha 0 was not evaluated"
    found = _Residuals(points, values[None], noise)
    if not found.rejected_B[0]:
        return f"no multiple of {STEP:g} from {lowest:g} to {points[-1]:g}"
    limit = "above {:g} paired standard errors of {:.4f}"
    if found.is_wide_B[0]:
        return f"residual sd {found.sd[0]:.4f} {limit.format(MAX_SD, found.neighbour_se[0])}"
    at = int((np.abs(found.rest[0]) - MAX_RESIDUAL * found.rest_se[0]).argmax())
    beyond = limit.format(MAX_RESIDUAL, found.rest_se[0, at])
    return f"residual {abs(found.rest[0, at]):.4f} at alpha {points[at]:g} {beyond}"


def _powers(alphas: FloatArray) -> FloatArray:
    return np.stack([alphas, alphas**2, alphas**3], axis=1)


def _fit_readers(points: FloatArray, at: FloatArray) -> FloatArray:
    """Returns the matrix [at, points] that maps objectives at the points (the first is 0) to their anchored cubic."""
    of_rest = _powers(at) @ np.linalg.pinv(_powers(points[1:]))
    return np.concatenate([1 - of_rest.sum(axis=1, keepdims=True), of_rest], axis=1)


def _fine(points: FloatArray, lowest: float, violations: FloatArray | None) -> FloatArray:
    """Returns the alphas that a fit is maximised over; with constraints the evaluated ones are among them."""
    fine: FloatArray = np.arange(round(1 / STEP) + 1) / round(1 / STEP)
    if violations is not None:
        fine = np.union1d(fine, points)
        fine = fine[np.append(True, np.diff(fine) > 1e-9)]
    return np.asarray(fine[(fine >= lowest - 1e-9) & (fine <= points[-1] + 1e-9)])


def _totals(violations_BKA: FloatArray | None, points: FloatArray, at: FloatArray) -> FloatArray:
    """Returns by how much the alphas ``at`` miss the constraints in all, [B, at], interpolated between the points."""
    if violations_BKA is None:
        return np.zeros((1, len(at)))
    between = np.stack([np.interp(at, points, unit) for unit in np.eye(len(points))])
    return np.asarray(np.maximum(violations_BKA @ between, 0).sum(axis=1))


def _first_best(values_BA: FloatArray, totals_BA: FloatArray) -> npt.NDArray[np.int64]:
    """Returns the index of the largest value among those with the smallest total, the first of equals, [B]."""
    least = totals_BA <= totals_BA.min(axis=1, keepdims=True) + 1e-12
    values_BA = np.where(least, values_BA, -np.inf)
    return np.asarray((values_BA >= values_BA.max(axis=1, keepdims=True) - 1e-12).argmax(axis=1))


def _picked(totals_BA: FloatArray, best_B: npt.NDArray[np.int64]) -> FloatArray:
    """Returns the totals of the picks, [B]."""
    each_BA = np.broadcast_to(totals_BA, (len(best_B), totals_BA.shape[1]))
    return np.take_along_axis(each_BA, best_B[:, None], axis=1)[:, 0]
