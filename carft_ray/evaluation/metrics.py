"""Metrics of one model on one set, made from its stored predictions: no images, no model, no torch.

    accuracy, top-k    share of images whose label is the first, or among the first k, of the classes by logit;
                       equal logits are ordered by class index
    NLL                mean of -log p_true, in nats
    Brier              mean of sum_c (p_c - y_c)^2 = 1 - 2 p_true + sum_c p_c^2, from 0 to 2 (Brier 1950)
    ECE                sum_b n_b / N |accuracy_b - confidence_b| over bins of the top-1 confidence (Naeini et al. 2015)

Probabilities are the softmax of the logits as they were evaluated (restricted to a set's classes where they were); no
temperature is fitted, after mixing neither. All values but the NLL are fractions. A metric needs at least one image.

Shape letters: N images, C classes, B bins, K = min(10, C) classes kept of each image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carft_ray.data.source import IntArray
from carft_ray.errors import DataError, Problem
from carft_ray.evaluation import predictions
from carft_ray.evaluation.predictions import BoolArray, FloatArray

NUM_BINS = 15
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said of the N images of one set; every metric is made from it.

    Attributes:
        num_classes: C.
        labels: True classes, int [N].
        true_rank: How many classes stand before the true one, int [N]: 0 is a right answer; K: it was not kept.
        confidence: Probability of the predicted class, float64 [N].
        nll: -log p_true in nats, float64 [N].
        brier: sum_c (p_c - y_c)^2, float64 [N].
    """

    num_classes: int
    labels: IntArray
    true_rank: IntArray
    confidence: FloatArray
    nll: FloatArray
    brier: FloatArray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> BoolArray:
        """Which images are classified right, bool [N]."""
        right: BoolArray = self.true_rank == 0
        return right

    def take(self, indices: IntArray) -> "Answers":
        """Returns the images at these positions, which may repeat."""
        return Answers(
            self.num_classes,
            self.labels[indices],
            self.true_rank[indices],
            self.confidence[indices],
            self.nll[indices],
            self.brier[indices],
        )


def answers(table: pa.Table) -> Answers:
    """Reads the answers of one model on one set, images in the order stored.

    Args:
        table: Predictions of one set at one alpha (``predictions.select``).

    Raises:
        DataError: There is no image.
        ValueError: The table holds several sets or alphas.
    """
    if not len(table):
        raise DataError(Problem("predictions", "a set must have at least one image"))
    found = [(name, alpha) for name in predictions.sets(table) for alpha in predictions.alphas(table, name)]
    if len(found) > 1:
        raise ValueError(f"the table must hold one set at one alpha, but got {found}")
    labels = table["label"].to_numpy().astype(np.int64)
    top_NK = pc.list_flatten(table["top_classes"]).to_numpy().reshape(len(table), -1)
    best_N = pc.list_flatten(table["top_logits"]).to_numpy().reshape(len(table), -1)[:, 0].astype(np.float64)
    is_true_NK = top_NK == labels[:, None]
    log_sum_exp_N = table["log_sum_exp"].to_numpy()
    nll_N = log_sum_exp_N - table["logit_true"].to_numpy().astype(np.float64)
    sum_of_squares_N = np.exp(table["log_sum_exp_2"].to_numpy() - 2 * log_sum_exp_N)
    return Answers(
        predictions.num_classes(table),
        labels,
        np.where(is_true_NK.any(axis=1), is_true_NK.argmax(axis=1), top_NK.shape[1]),
        np.minimum(np.exp(best_N - log_sum_exp_N), 1.0),
        np.maximum(nll_N, 0.0),
        np.maximum(1 - 2 * np.exp(-nll_N) + sum_of_squares_N, 0.0),
    )


def accuracy(given: Answers) -> float:
    """Returns the share of right answers."""
    return float(given.correct.mean())


def top_accuracy(given: Answers, k: int = 5) -> float:
    """Returns the share of images whose label is among the k first classes; 1 where there are no more than k classes.

    Raises:
        ValueError: k is below 1, or above the 10 classes that predictions keep.
    """
    if not 1 <= k <= predictions.NUM_TOP_CLASSES:
        raise ValueError(f"k must lie in 1 .. {predictions.NUM_TOP_CLASSES}, but got {k}")
    return float((given.true_rank < k).mean())


def class_accuracies(given: Answers) -> list[float | None]:
    """Returns the accuracy on the images of each class, in label order; None for a class without images."""
    counts_C = np.bincount(given.labels, minlength=given.num_classes)
    right_C = np.bincount(given.labels[given.correct], minlength=given.num_classes)
    return [float(right / count) if count else None for right, count in zip(right_C, counts_C, strict=True)]


def worst_class(given: Answers) -> tuple[int, float]:
    """Returns index and accuracy of the class with the lowest accuracy, the first of equals; only classes with images.

    With few images per class it is low by chance alone: the minimum of noisy numbers.
    """
    return min(_with_images(given), key=lambda found: found[1])


def mean_class_accuracy(given: Answers) -> float:
    """Returns the unweighted mean of the accuracies of the classes that have images."""
    found = _with_images(given)
    return math.fsum(value for _, value in found) / len(found)


def _with_images(given: Answers) -> list[tuple[int, float]]:
    return [(index, value) for index, value in enumerate(class_accuracies(given)) if value is not None]


def negative_log_likelihood(given: Answers) -> float:
    """Returns the mean of -log p_true in nats."""
    return float(given.nll.mean())


def brier_score(given: Answers) -> float:
    """Returns the mean of sum_c (p_c - y_c)^2, from 0 to 2."""
    return float(given.brier.mean())


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability curve; means are None where it has no image.

    Attributes:
        low: Lower end, not in the bin; equal mass: the lowest confidence in it.
        high: Upper end, in the bin; equal mass: the highest confidence in it.
        count: n_b.
        confidence: Mean top-1 confidence.
        accuracy: Share of right answers.
    """

    low: float | None
    high: float | None
    count: int
    confidence: float | None
    accuracy: float | None


def reliability(
    confidence: FloatArray, correct: BoolArray, num_bins: int = NUM_BINS, equal_mass: bool = False
) -> list[Bin]:
    """Returns the reliability curve: accuracy against confidence, bin by bin.

    Equal width: bin b holds b / B < confidence <= (b + 1) / B, as in Guo et al. 2017; a confidence on an edge
    belongs to the lower bin, and 0 to the first. Equal mass: an image than which i images have less confidence goes to
    bin floor(B i / N), so equal confidences share a bin, and without ties the counts differ by at most one.

    Args:
        confidence: Top-1 confidence, [N], each from 0 to 1.
        correct: Whether the answer is right, [N].
        num_bins: B.
        equal_mass: Bins of equal counts instead of equal width.

    Raises:
        DataError: There is no image.
        ValueError: No bin, arrays of different lengths, or a confidence that is none.
    """
    confidence = np.asarray(confidence, np.float64)
    if num_bins < 1 or confidence.shape != np.shape(correct) or confidence.ndim != 1:
        raise ValueError(f"bins >= 1 and two arrays [N] must be given, got {num_bins}, {confidence.shape}")
    if not len(confidence):
        raise DataError(Problem("predictions", "a set must have at least one image"))
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("every confidence must lie in 0 .. 1")
    edges = np.arange(num_bins + 1) / num_bins
    if equal_mass:
        num_below_N = np.searchsorted(np.sort(confidence), confidence, side="left")
        bins_N = num_bins * num_below_N // len(confidence)
    else:
        bins_N = equal_width_bins(confidence, num_bins)
    curve = []
    for b in range(num_bins):
        inside, right = confidence[bins_N == b], np.asarray(correct)[bins_N == b]
        ends: tuple[float | None, float | None] = (float(edges[b]), float(edges[b + 1]))
        if equal_mass:
            ends = (float(inside.min()), float(inside.max())) if len(inside) else (None, None)
        means = (float(inside.mean()), float(right.mean())) if len(inside) else (None, None)
        curve.append(Bin(*ends, len(inside), *means))
    return curve


def equal_width_bins(confidence: FloatArray, num_bins: int = NUM_BINS) -> IntArray:
    """Returns the bin of equal width, 0 .. B - 1, of each confidence, [N]; see ``reliability``."""
    edges = np.arange(num_bins + 1) / num_bins
    bins_N: IntArray = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    return bins_N


def expected_calibration_error(given: Answers, num_bins: int = NUM_BINS, equal_mass: bool = False) -> float:
    """Returns the ECE over the bins of ``reliability``."""
    curve = reliability(given.confidence, given.correct, num_bins, equal_mass)
    gaps = [
        each.count * abs(each.accuracy - each.confidence)
        for each in curve
        if each.accuracy is not None and each.confidence is not None
    ]
    return math.fsum(gaps) / len(given)


def set_metrics(given: Answers) -> dict[str, Any]:
    """Returns the metrics of one set as plain data."""
    index, lowest = worst_class(given)
    return {
        "num_images": len(given),
        "accuracy": accuracy(given),
        "top5": top_accuracy(given, 5),
        "mean_class_accuracy": mean_class_accuracy(given),
        "worst_class": {"index": index, "accuracy": lowest},
        "nll": negative_log_likelihood(given),
        "brier": brier_score(given),
        "ece": expected_calibration_error(given),
        "ece_equal_mass": expected_calibration_error(given, equal_mass=True),
    }


def is_above_chance(value: float, num_classes: int, num_images: int) -> bool:
    """Tells whether an accuracy is above 1/C by more than the images' luck, with 97.5 % confidence.

    It is where value > 1/C + 1.96 sqrt(1/C (1 - 1/C) / n), which is where the interval of Wilson lies above 1/C.

    Args:
        value: The accuracy.
        num_classes: C.
        num_images: n.
    """
    chance = 1 / num_classes
    return value > chance + 1.96 * math.sqrt(chance * (1 - chance) / num_images)


def alpha_area(alphas: Sequence[float], values: Sequence[float]) -> float:
    """Returns the area under an alpha curve by the trapezoid rule: the mean of the metric over alpha in [0, 1].

    Args:
        alphas: Where it was evaluated: rising strictly from 0 to 1.
        values: The metric at each.

    Raises:
        ValueError: The alphas do not rise from 0 to 1, or a value is missing or not finite.
    """
    a, v = np.asarray(alphas, np.float64), np.asarray(values, np.float64)
    if a.shape != v.shape or len(a) < 2 or a[0] != 0 or a[-1] != 1 or (np.diff(a) <= 0).any():
        raise ValueError(f"alphas must rise strictly from 0 to 1 with a value each, but got {list(alphas)}")
    if not np.isfinite(v).all():
        raise ValueError(f"every value of the curve must be finite, but got {list(values)}")
    return float((np.diff(a) * (v[1:] + v[:-1]) / 2).sum())


def wilson(num_correct: int, num_images: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927); (0, 1) without images.

    Unlike p +- z sqrt(p (1 - p) / n) it has a width where p is 0 or 1.
    """
    from scipy.stats import binomtest  # takes half a second, and few commands need it

    if num_images == 0:
        return 0.0, 1.0
    low, high = binomtest(num_correct, num_images).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)
