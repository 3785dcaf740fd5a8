"""Metrics of one model on one set, made from its stored predictions: no images, no model, no torch.

    accuracy, top-5    share of images whose label is the first, or among the first five, of the classes by logit;
                       equal logits are ordered by class index
    NLL                mean of -log p_true, in nats
    Brier              mean of sum_c (p_c - y_c)^2 = 1 - 2 p_true + sum_c p_c^2, from 0 to 2 (Brier 1950)
    ECE                sum_b n_b / N |accuracy_b - confidence_b| over bins of the top-1 confidence (Naeini et al. 2015)

Probabilities are the softmax of the logits as they were evaluated (restricted to a set's classes where they were); no
temperature is fitted, after mixing neither. All values but the NLL are fractions. A metric needs at least one image.

Shape letters: N images, C classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy  # its modules load when they are first used

from carft_ray.data.source import IntArray
from carft_ray.evaluation.predictions import BoolArray, FloatArray

NUM_BINS = 15
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said of the N images of one set; every metric is made from it.

    Attributes:
        labels: True classes, int [N].
        rank: Place of the true class, int [N]: 1 is a right answer, 0 is none of the first five.
        confidence: Probability of the predicted class, float64 [N].
        nll: -log p_true in nats, float64 [N].
        brier: sum_c (p_c - y_c)^2, float64 [N].
    """

    labels: IntArray
    rank: IntArray
    confidence: FloatArray
    nll: FloatArray
    brier: FloatArray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> BoolArray:
        """Which images are classified right, bool [N]."""
        return np.asarray(self.rank == 1)


def answers(table: pa.Table) -> Answers:
    """Reads the answers of one model on one set, images in the order stored.

    Args:
        table: Predictions of one set at one alpha, with at least one image (``predictions.select``).
    """
    labels_N, rank_N = (table[name].to_numpy() for name in ("label", "rank"))
    confidence_N, nll_N, sum_p2_N = (table[name].to_numpy().astype(float) for name in ("confidence", "nll", "sum_p2"))
    return Answers(labels_N, rank_N, confidence_N, nll_N, np.maximum(1 - 2 * np.exp(-nll_N) + sum_p2_N, 0.0))


def class_accuracies(given: Answers) -> dict[int, float]:
    """Returns the accuracy on the images of each class that has any, by its index, in label order."""
    counts_C = np.bincount(given.labels)
    right_C = np.bincount(given.labels[given.correct], minlength=len(counts_C))
    return {index: float(right_C[index] / counts_C[index]) for index in np.flatnonzero(counts_C).tolist()}


def equal_width_bins(confidence: FloatArray, num_bins: int = NUM_BINS) -> IntArray:
    """Returns the bin of each confidence, 0 .. num_bins - 1, [N].

    Bin b holds b / num_bins < confidence <= (b + 1) / num_bins, as in Guo et al. 2017; a confidence on an edge belongs
    to the lower bin, and 0 to the first. Both are compared in float32, in which confidences are stored.
    """
    edges = (np.arange(num_bins + 1) / num_bins).astype(np.float32)
    return (np.searchsorted(edges, confidence.astype(np.float32), side="left") - 1).clip(0)


def expected_calibration_error(given: Answers, num_bins: int = NUM_BINS) -> float:
    """Returns the ECE over bins of equal width."""
    found = reliability(given, num_bins)
    return math.fsum(one["num_images"] * abs(one["accuracy"] - one["confidence"]) for one in found) / len(given)


def reliability(given: Answers, num_bins: int = NUM_BINS) -> list[dict[str, Any]]:
    """Returns the reliability diagram: of every bin with images its mean confidence, its accuracy and their number."""
    bins_N = equal_width_bins(given.confidence, num_bins)
    found = []
    for index in np.unique(bins_N):
        inside = bins_N == index
        means = {"confidence": float(given.confidence[inside].mean()), "accuracy": float(given.correct[inside].mean())}
        found.append({**means, "num_images": int(inside.sum())})
    return found


def set_metrics(given: Answers) -> dict[str, Any]:
    """Returns the metrics of one set as plain data."""
    by_class = class_accuracies(given)
    worst = min(by_class, key=lambda index: by_class[index])  # the first of equals; with few images low by chance alone
    return {
        "num_images": len(given),
        "accuracy": float(given.correct.mean()),
        "top5": float((given.rank > 0).mean()),
        "mean_class_accuracy": math.fsum(by_class.values()) / len(by_class),
        "worst_class": {"index": worst, "accuracy": by_class[worst]},
        "nll": float(given.nll.mean()),
        "brier": float(given.brier.mean()),
        "ece": expected_calibration_error(given),
    }


def chance(labels_N: IntArray, predictions_N: IntArray) -> float:
    """Returns the accuracy that the same answers have on average when they are dealt to the images at random.

    It is sum_c l_c a_c / n^2 with l_c labels and a_c answers of class c: 1/C where the classes are equally often.
    """
    by_class_2C = _counts(labels_N, predictions_N)
    return float((by_class_2C[0] * by_class_2C[1]).sum() / max(1, len(labels_N)) ** 2)


def is_at_most_chance(labels_N: IntArray, predictions_N: IntArray) -> bool:
    """Tells whether no more answers are right than ``chance`` says; in whole numbers, so that equal is equal."""
    by_class_2C, labels_N = _counts(labels_N, predictions_N), np.asarray(labels_N)
    return bool(
        len(labels_N) * (labels_N == np.asarray(predictions_N)).sum() <= (by_class_2C[0] * by_class_2C[1]).sum()
    )


def is_above_chance(labels_N: IntArray, predictions_N: IntArray) -> bool:
    """Tells whether answers are shown to depend on the image: more are right than luck explains, 97.5 % confidence.

    False is no proof of the contrary: few images show nothing.

    Dealt to the images at random, the same n answers give T right ones with mean S / n and variance

        (S - sum_c l_c a_c (l_c + a_c) / n + S^2 / n^2) / (n - 1),    S = sum_c l_c a_c

    with l_c labels and a_c answers of class c (Hoeffding 1951, "A combinatorial central limit theorem"; it is the test
    that Cohen's kappa is above 0, Fleiss, Cohen and Everitt 1969). The answers depend on the image where T is more than
    1.96 standard deviations above the mean. One class alone as the answer, however common it is, gives T its mean.

    Args:
        labels_N: True classes.
        predictions_N: Answers.
    """
    number = len(labels_N)
    if number < 2:
        return False
    labels_C, answers_C = _counts(labels_N, predictions_N)
    both_C, right = labels_C * answers_C, int((np.asarray(labels_N) == np.asarray(predictions_N)).sum())
    total, weighted = int(both_C.sum()), int((both_C * (labels_C + answers_C)).sum())
    # times n, and its variance times n^2, in whole numbers: for one class both are exactly 0
    variance = (number * number * total - number * weighted + total * total) / (number - 1)
    return number * right - total > 1.96 * math.sqrt(max(0.0, variance))


def _counts(labels_N: IntArray, predictions_N: IntArray) -> IntArray:
    """Returns how often each class is the label and the answer, [2, C]."""
    both = [np.asarray(labels_N, np.int64), np.asarray(predictions_N, np.int64)]
    num_classes = 1 + max((int(each.max()) for each in both if len(each)), default=0)
    return np.stack([np.bincount(each, minlength=num_classes) for each in both])


def wilson(num_correct: int, num_images: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a proportion (Wilson 1927); (0, 1) without images.

    Unlike p +- z sqrt(p (1 - p) / n) it has a width where p is 0 or 1.
    """
    if num_images == 0:
        return 0.0, 1.0
    low, high = scipy.stats.binomtest(num_correct, num_images).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)
