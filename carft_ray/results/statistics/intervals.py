"""Intervals over seeds and images, crossed.

Every seed is evaluated on the same images, so seeds and images are two crossed random effects (the multi-bootstrap of
MultiBERTs, arXiv 2106.16163, in closed form). An interval is over new seeds and new images, and printed with these
words, ``OVER_SEEDS_AND_IMAGES``; of one training it is ``OVER_IMAGES``. Not covered: another training set.

Shape letters: r seeds, n images of one set. All values are fractions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # its modules load when they are first used

from carft_ray.evaluation.metrics import LEVEL, wilson
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics.images import ImagesBySet, joined_width, parts

OVER_SEEDS_AND_IMAGES = "over seeds and images"
OVER_IMAGES = "over images; one training: seeds not covered"
_ZERO = 1e-12  # fractions below this are rounding
_SMALLEST_P = 1e-300  # the rule of three takes no smaller one
FloatArray = npt.NDArray[np.float64]
# correctness (bool), or differences of correctness or of weighted correctness: [r, n] per set
ValuesBySet = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: m, the mean over seeds.
        num_seeds: r.
        seed_variance: V_seed, of the mean; 0 with one seed.
        residual_variance: V_res, of the mean; what V_seed is at least in expectation; 0 with one seed.
        image_variance: V_image, of the mean.
        ends: Of the interval.
        dof: Its degrees of freedom.
        p_value: Two-sided, of mean = 0; meant for differences.
        notes: What limits the interval, in words.
    """

    mean: float
    num_seeds: int
    seed_variance: float
    residual_variance: float
    image_variance: float
    ends: tuple[float, float]
    dof: float
    p_value: float
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What the interval is over."""
        return OVER_SEEDS_AND_IMAGES if self.num_seeds > 1 else OVER_IMAGES

    @property
    def standard_error(self) -> float:
        """sqrt(max(V_seed, V_res) + V_image)."""
        return math.sqrt(max(self.seed_variance, self.residual_variance) + self.image_variance)

    def data(self) -> dict[str, Any]:
        """Returns it as JSON; ``over`` says what it is over."""
        return {**vars(self), "ends": [*self.ends], "notes": [*self.notes], "over": self.words}


def crossed(
    values: ValuesBySet,
    weights: Mapping[str, float],
    seed_values: Sequence[float] | None = None,
    images: ImagesBySet | None = None,
) -> Interval:
    """Returns the mean over seeds of sum_j w_j mean_k x_jqk with its 95 % interval.

    With y_q the weighted mean of seed q and m their mean:

        V_seed  = var_q(y_q, ddof=1) / r
        MS_I_j  = r sum_k (x_j.k - x_j..)^2 / (n_j - 1)
        MS_E_j  = sum_qk (x_jqk - x_jq. - x_j.k + x_j..)^2 / ((n_j - 1)(r - 1))
        V_image = sum_j w_j^2 max(0, (MS_I_j - MS_E_j) / r) / n_j
        V_res   = sum_j w_j^2 MS_E_j / (r n_j)
        V       = V_s + V_image,  interval  m +- t(0.975, dof) sqrt(V),
        dof     = V^2 / (V_s^2 / d + V_image^2 / (min_j n_j - 1)),  p = 2 (1 - T_dof(|m| / sqrt(V)))

    each with V_s = V_seed, d = r - 1, and where V_seed < V_res also with V_s = V_res, d = (r - 1)(min_j n_j - 1): the
    widest interval and the largest p-value count. V_res is a part of what V_seed estimates, so V_seed falls below it
    by chance only: without it, few seeds whose means agree by chance would give a point. The interval is never narrower
    than with V_image = 0 (new seeds, these images): where V_seed is small by chance, ``dof`` is too large, and two or
    three seeds would cover 88 to 92 % (`python -m benchmarks.statistics`).

    Sets that share images are no independent samples: they are one part of all these sums (``images.parts``). The rule
    of three below adds up what they may change together.

    One seed: V_image = sum_j w_j^2 var_k(x_jk, ddof=1) / n_j and dof = min_j n_j - 1, images only. On 5 to 50 images
    that shows a difference that does not exist in at most 6 % of the comparisons; the normal distribution would in up
    to 11 % (`python -m benchmarks.statistics`).

    A set on which nothing varies is not certain: the rule of three (Hanley and Lippman-Hand 1983) says that of N_j
    images (V_image = 0: (r - 1) n_j pairs of seed and image) without any change, the rate of changes is at most
    -log(0.05) / N_j, about 3 / N_j, with 95 % confidence. So max_j |w_j| 3 / N_j over these sets is a half-width of its
    own, joined with that of the others by sqrt(a^2 + b^2) (as MOVER does, Zou and Donner 2008). The p-value is that of
    the widest interval that leaves 0 out; if nothing varies at all, exp(-|m| / max_j(|w_j| / N_j)).

    Args:
        values: Per set j an array [r, n_j] of numbers from -1 to 1: correctness of one configuration, or paired
            differences of two (same images, seeds paired by index).
        weights: w_j per set, the same sets; sets of weight 0 change nothing.
        seed_values: y_q for an objective that is not linear in the accuracies; ``weights`` are then its derivatives
            at the mean accuracies.
        images: Per set an id of each image, [n_j]; equal ids are one image. None: no two sets share one.
    """
    arrays = {name: np.asarray(array, np.float64) for name, array in values.items()}
    num_seeds = next(iter(arrays.values())).shape[0]
    weighted: list[FloatArray] = [weights[name] * array.mean(axis=1) for name, array in arrays.items()]
    y = np.sum(weighted, axis=0) if seed_values is None else np.asarray(seed_values, np.float64)
    mean = float(y.mean())
    used = {name: array for name, array in arrays.items() if weights[name] != 0}
    notes = [f"{name} has one image: its image variance is not covered" for name in used if used[name].shape[1] == 1]
    apart = parts(used, weights, images)
    image_variance = _or_zero(sum(weight**2 * _image_variance(array) for _, weight, array in apart))
    # of one image in N without any change, also between seeds alone: what a mean may be off by
    shares = {name: abs(weights[name]) / array.shape[1] for name, array in used.items()}
    still = [name for name, array in used.items() if array.min() == array.max()]
    if len(still) < len(used):
        still = [name for name in still if used[name].shape[1] > 1]  # of one image a note says it
    alike = [name for name, array in used.items() if (array == array[0]).all()]
    per_image, per_pair = (
        max((sum(shares[name] for name in group if name in them) for group, _, _ in apart), default=0.0)
        for them in (still, alike)
    )
    image_dof = max(1, min((array.shape[1] for array in used.values()), default=2) - 1)
    if num_seeds == 1:
        half, p_value = _half_and_p(mean, image_variance, image_dof, per_image)
        notes.append("one training: seeds not covered")
        return Interval(mean, 1, 0.0, 0.0, image_variance, _around(mean, half), float(image_dof), p_value, tuple(notes))
    if num_seeds == 2:
        notes.append("two seeds: the intervals over seeds are very wide (9 standard deviations on each side)")
    seed_variance = _or_zero(float(y.var(ddof=1)) / num_seeds)
    residuals = (weight**2 * _residual_mean_square(x) / (num_seeds * x.shape[1]) for _, weight, x in apart)
    residual_variance = _or_zero(sum(residuals))
    sources = [(seed_variance, float(num_seeds - 1))]
    if seed_variance < residual_variance:
        sources.append((residual_variance, float((num_seeds - 1) * image_dof)))
    fixed, dof_fixed, p_fixed = _widest(mean, sources, 0.0, image_dof, per_pair / (num_seeds - 1))
    half, dof, p_value = _widest(mean, sources, image_variance, image_dof, per_image)
    if half < fixed:
        half, dof = fixed, dof_fixed
    ends, p_value = _around(mean, half), max(p_fixed, p_value)
    return Interval(mean, num_seeds, seed_variance, residual_variance, image_variance, ends, dof, p_value, tuple(notes))


def _residual_mean_square(array_rn: npt.NDArray[np.generic]) -> float:
    """Returns MS_E, the residual of the two-way layout rows x images; 0 with one row or one image."""
    values = np.asarray(array_rn, np.float64)
    num_rows, num_images = int(values.shape[0]), int(values.shape[1])
    if num_rows == 1 or num_images == 1:
        return 0.0
    residual: FloatArray = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    return float((residual**2).sum()) / ((num_images - 1) * (num_rows - 1))


def residual_variance(spec: ObjectiveSpec, correct: ValuesBySet) -> float:
    """Returns sum_j w_j^2 MS_E_j / n_j of rows x images, over parts without common images."""
    weights = spec.weights(mean_accuracies(correct))
    used: dict[str, Any] = {name: correct[name] for name, weight in weights.items() if weight}
    apart = parts(used, weights, spec.images)
    return float(sum(weight**2 * _residual_mean_square(x) / x.shape[1] for _, weight, x in apart))


def paired_differences(values_a: ValuesBySet, values_b: ValuesBySet) -> dict[str, FloatArray]:
    """Returns a - b per set, [r, n_j]; correctness of two configurations on the same images, seeds paired by index."""
    return {name: np.asarray(values_a[name], np.float64) - np.asarray(values_b[name], np.float64) for name in values_a}


def objective_interval(spec: ObjectiveSpec, correct: ValuesBySet) -> Interval:
    """Returns the interval of the objective of one configuration.

    Args:
        spec: The objective and its sets.
        correct: Correctness per set, bool [r, n_j].
    """
    correct = {name: correct[name] for name in spec.sets}
    weights = spec.weights(mean_accuracies(correct))
    interval = _within_unit(crossed(correct, weights, values_by_seed(spec, correct), spec.images))
    return replace(interval, notes=(*interval.notes, *worst_domain_notes(spec, correct)))


def values_by_seed(spec: ObjectiveSpec, correct: ValuesBySet) -> list[float]:
    """Returns the objective of every seed, r numbers; correctness per set [r, n_j]."""
    per_seed = {name: np.asarray(array, np.float64).mean(axis=1) for name, array in correct.items()}
    num_seeds = len(per_seed[spec.id_set])
    return [spec.value({name: float(values[q]) for name, values in per_seed.items()}) for q in range(num_seeds)]


def accuracy_interval(correct: ValuesBySet, images: ImagesBySet | None = None) -> Interval:
    """Returns the interval of the mean accuracy of sets (one or more), correct [r, n] per set.

    With one seed, or without any variation, each set gets the interval of Wilson, also one whose images are all right;
    those of m sets are joined by the distances of their ends from the accuracies (MOVER, Zou and Donner 2008):

        m^-1 sqrt(sum_j (a_j - low_j)^2)  below the mean,    m^-1 sqrt(sum_j (high_j - a_j)^2)  above it

    Sets that share ``images`` (as of ``crossed``) are joined by their correlation (``images.joined_width``).
    """
    interval = crossed(correct, dict.fromkeys(correct, 1 / len(correct)), images=images)
    if interval.num_seeds > 1 and interval.standard_error > 0:
        return _within_unit(interval)
    arrays = {name: np.asarray(array, np.float64) for name, array in correct.items()}
    accuracies = {name: float(array[0].mean()) for name, array in arrays.items()}
    ends = {name: wilson(int(array[0].sum()), array.shape[1]) for name, array in arrays.items()}
    below, above = (
        joined_width({name: abs(a - ends[name][side]) for name, a in accuracies.items()}, arrays, images) / len(arrays)
        for side in (0, 1)
    )
    return _within_unit(replace(interval, ends=(interval.mean - below, interval.mean + above)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation (ties get their mean rank), or None where it is not defined.

    Not defined: fewer than two pairs, or one of the lists constant.
    """
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(scipy.stats.spearmanr(a, b).statistic)


def _image_variance(array_rn: FloatArray) -> float:
    """Returns max(0, (MS_I - MS_E) / r) / n, with one seed var_k / n; 0 with one image."""
    num_seeds, num_images = int(array_rn.shape[0]), int(array_rn.shape[1])
    if num_images == 1:
        return 0.0
    per_image = array_rn.mean(axis=0)
    grand = float(per_image.mean())
    ms_image = num_seeds * float(((per_image - grand) ** 2).sum()) / (num_images - 1)
    return max(0.0, (ms_image - _residual_mean_square(array_rn)) / num_seeds) / num_images


def _widest(
    mean: float,
    sources: Sequence[tuple[float, float]],
    image_variance: float,
    image_dof: int,
    per_image: float,
) -> tuple[float, float, float]:
    """Returns the largest half-width over the V_s and d given, its degrees of freedom, and the largest p-value."""
    found = []
    for variance, dof in [each for each in sources if each[0] + image_variance > 0] or sources[:1]:
        total = variance + image_variance
        if total > 0:
            dof = 1 / ((variance / total) ** 2 / dof + (image_variance / total) ** 2 / image_dof)
        found.append((*_half_and_p(mean, total, dof, per_image), dof))
    half, _, dof = max(found)
    return half, dof, max(p for _, p, _ in found)


def _half_and_p(mean: float, variance: float, dof: float, per_image: float) -> tuple[float, float]:
    """Returns half-width and p-value of mean = 0: Student's t, joined with the rule of three of sets without change."""
    error, off = math.sqrt(variance), abs(mean)

    def half(t: float) -> float:
        log_p = math.log(max(2 * float(scipy.stats.t.sf(t, dof)), _SMALLEST_P))
        return math.hypot(t * error, -log_p * per_image)

    width = half(float(scipy.stats.t.isf((1 - LEVEL) / 2, dof)))
    if off < _ZERO or (not error and not per_image):
        return width, 1.0
    if not error:
        return width, math.exp(-off / per_image)
    t = scipy.optimize.brentq(lambda t: half(t) - off, 0.0, off / error, xtol=_ZERO) if per_image else off / error
    return width, 2 * float(scipy.stats.t.sf(t, dof))


def _or_zero(variance: float) -> float:
    """Returns the variance, or 0 where it is rounding."""
    return variance if variance > _ZERO**2 else 0.0


def _around(mean: float, half: float) -> tuple[float, float]:
    return float(mean - half), float(mean + half)


def _within_unit(interval: Interval) -> Interval:
    """Returns the interval of a number from 0 to 1, its ends no further."""
    low, high = interval.ends
    return replace(interval, ends=(max(0.0, low), min(1.0, high)))


def mean_accuracies(correct: ValuesBySet) -> dict[str, float]:
    """Returns the accuracy of every set, over seeds and images."""
    return {name: float(np.asarray(array, np.float64).mean()) for name, array in correct.items()}


def worst_domain_notes(spec: ObjectiveSpec, correct: ValuesBySet) -> list[str]:
    """Returns a warning where the lowest OOD set is not clearly the lowest (another one within one SE)."""
    if spec.kind != "worst_domain" or len(spec.ood_sets) < 2:
        return []
    accuracies = mean_accuracies(correct)
    lowest = min(spec.ood_sets, key=lambda name: accuracies[name])
    pairs = [{name: correct[name], lowest: correct[lowest]} for name in spec.ood_sets if name != lowest]
    gaps = [crossed(pair, {name: 1.0 - 2 * (name == lowest) for name in pair}, images=spec.images) for pair in pairs]
    if any(gap.mean <= gap.standard_error for gap in gaps):
        return ["worst_domain: approximate, another OOD set is within one standard error of the lowest"]
    return []


def objective_difference(spec: ObjectiveSpec, correct_a: ValuesBySet, correct_b: ValuesBySet) -> Interval:
    """Returns the paired interval of the objective of configuration a minus that of b.

    For a linear objective this is ``crossed`` on the differences of correctness. Otherwise the images enter as
    (w_aj x_ajqk - w_bj x_bjqk) / w_j with the derivatives at each configuration's own mean accuracies and w_j the
    larger of the two.

    Args:
        spec: The objective and its sets.
        correct_a: Correctness of a per set, bool [r, n_j].
        correct_b: Correctness of b, the same images in the same order, seeds paired by index.
    """
    weights_a, weights_b = (spec.weights(mean_accuracies(correct)) for correct in (correct_a, correct_b))
    weights = {name: max(w, weights_b[name]) for name, w in weights_a.items() if w or weights_b[name]}
    differences = {
        name: weights_a[name] / w * np.asarray(correct_a[name], np.float64)
        - weights_b[name] / w * np.asarray(correct_b[name], np.float64)
        for name, w in weights.items()
    }
    pairs = zip(values_by_seed(spec, correct_a), values_by_seed(spec, correct_b), strict=True)
    interval = crossed(differences, weights, [a - b for a, b in pairs], spec.images)
    notes = dict.fromkeys([*worst_domain_notes(spec, correct_a), *worst_domain_notes(spec, correct_b)])
    return replace(interval, notes=(*interval.notes, *notes))
