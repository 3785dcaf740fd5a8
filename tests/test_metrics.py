"""Metrics against their oracles (scikit-learn, torchmetrics, SciPy), with ties, edges of bins and empty classes."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch

from carft_ray.errors import DataError
from carft_ray.evaluation import metrics
from carft_ray.evaluation.metrics import answers, reliability
from carft_ray.evaluation.predictions import concat, predictions_table, select
from carft_ray.results.statistics.intervals import wilson

CASES = ("random", "ties", "empty classes", "two classes", "confident")


def answers_of_logits(labels, logits):
    ids = np.arange(len(labels), dtype=np.uint64)
    return answers(predictions_table("set", 1.0, ids, labels, logits))


def case(name):
    """Labels [N] and logits [N, C] of one kind."""
    rng = np.random.default_rng(CASES.index(name))
    num_classes = {"two classes": 2, "empty classes": 24}.get(name, 16)
    labels = rng.integers(0, num_classes, 900)
    logits = (3 * rng.normal(size=(900, num_classes))).astype(np.float32)
    logits[np.arange(900), labels] += 2
    if name == "ties":
        logits = np.round(logits / 4) * 4  # one image in three has several largest logits
    if name == "empty classes":
        labels = labels // 2 * 2  # no odd class
    if name == "confident":
        logits *= 30
    return labels, logits.astype(np.float32)


@pytest.fixture(params=CASES)
def both(request):
    """The answers, and what the oracles take: labels, logits and probabilities in float64."""
    labels, logits = case(request.param)
    return answers_of_logits(labels, logits), labels, logits, scipy.special.softmax(logits.astype(np.float64), axis=1)


def same(value):
    return pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize(("num_classes", "num_images"), [(2, 10), (5, 15), (16, 2000), (1000, 5000)])
def test_an_accuracy_is_above_chance_where_the_interval_of_wilson_is(num_classes, num_images):
    counts = range(min(num_images, num_images // num_classes + 80) + 1)  # as far as chance, and well beyond
    above = [metrics.is_above_chance(k / num_images, num_classes, num_images) for k in counts]
    assert above == [wilson(k, num_images)[0] > 1 / num_classes for k in counts]
    assert above == sorted(above)
    assert not above[num_images // num_classes]


def test_ties_are_among_the_cases():
    _, logits = case("ties")
    top = np.sort(logits, axis=1)
    assert (top[:, -1] == top[:, -2]).mean() > 0.2
    assert len(np.unique(answers_of_logits(*case("ties")).confidence)) < 800


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_top_k_accuracy_equals_that_of_scikit_learn(both, k):
    given, labels, logits, _ = both
    num_classes = logits.shape[1]
    if k >= num_classes:
        assert metrics.top_accuracy(given, k) == 1
        return
    # of equal logits scikit-learn takes the last class first, so it is shown the classes in reverse
    reversed_scores = logits[:, ::-1] if num_classes > 2 else logits[:, 0]
    classes = np.arange(num_classes)
    oracle = sklearn.metrics.top_k_accuracy_score(num_classes - 1 - labels, reversed_scores, k=k, labels=classes)
    if num_classes > 2:
        assert metrics.top_accuracy(given, k) == same(oracle)
    else:
        assert metrics.top_accuracy(given, k) == same(sklearn.metrics.accuracy_score(labels, logits.argmax(1)))
    if k == 1:
        assert metrics.accuracy(given) == metrics.top_accuracy(given, 1)


def test_accuracies_by_class_equal_those_of_scikit_learn(both):
    given, labels, logits, _ = both
    num_classes, guesses = logits.shape[1], logits.argmax(1)
    found = metrics.class_accuracies(given)
    has_images = np.bincount(labels, minlength=num_classes) > 0
    assert [value is not None for value in found] == has_images.tolist()
    recall = sklearn.metrics.recall_score(
        labels, guesses, labels=np.arange(num_classes), average=None, zero_division=np.nan
    )
    for value, one, present in zip(found, recall, has_images, strict=True):
        assert not present or value == same(one)
    index, lowest = metrics.worst_class(given)
    assert (index, lowest) == (int(np.nanargmin(recall)), same(np.nanmin(recall)))
    assert metrics.mean_class_accuracy(given) == same(np.nanmean(recall))


def test_negative_log_likelihood_equals_that_of_torch_and_scipy(both):
    given, labels, logits, _ = both
    oracle = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert metrics.negative_log_likelihood(given) == same(oracle)
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    np.testing.assert_allclose(given.nll, -log_p, atol=1e-11)


def test_brier_score_equals_that_of_scikit_learn(both):
    given, labels, _, probabilities = both
    classes = np.arange(probabilities.shape[1])
    oracle = sklearn.metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)
    assert metrics.brier_score(given) == same(oracle)
    one_hot = np.eye(len(classes))[labels]
    np.testing.assert_allclose(given.brier, ((probabilities - one_hot) ** 2).sum(axis=1), atol=1e-12)


def guo(confidence, correct, num_bins):
    """ECE as Guo et al. 2017 compute it: lower edge out, upper edge in."""
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_calibration_error_equals_that_of_guo(both, num_bins):
    given, _, _, probabilities = both
    found = metrics.expected_calibration_error(given, num_bins)
    assert found == same(guo(given.confidence, given.correct, num_bins))
    np.testing.assert_allclose(given.confidence, probabilities.max(axis=1), atol=1e-12)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_metrics_equal_those_of_torchmetrics(both):
    from torchmetrics.functional import classification

    given, labels, logits, probabilities = both
    num_classes, labels_N = logits.shape[1], torch.from_numpy(labels)
    guesses_N = torch.from_numpy(logits.argmax(1))
    by_class = classification.multiclass_accuracy(guesses_N, labels_N, num_classes, average="none").tolist()
    for value, other in zip(metrics.class_accuracies(given), by_class, strict=True):
        assert value is None or value == same(other)
    correct_N = torch.from_numpy(given.correct.astype(np.int64))
    for num_bins in (1, 7, 15):  # an upper edge is out there, and edges are float32: images on one are left out
        edges = np.arange(num_bins + 1) / num_bins
        inner = np.flatnonzero(~np.isclose(given.confidence[:, None], edges, atol=1e-6).any(axis=1))
        found = metrics.expected_calibration_error(given.take(inner), num_bins)
        confidence = torch.from_numpy(given.confidence[inner])  # as of two classes: no rule orders equal logits there
        assert found == same(classification.binary_calibration_error(confidence, correct_N[inner], num_bins))
        if len(inner) == len(given) and len(np.unique(logits)) > 100:
            oracle = classification.multiclass_calibration_error(
                torch.from_numpy(probabilities), labels_N, num_classes, n_bins=num_bins
            )
            assert found == same(oracle)


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    confidence = np.array([0.0, 0.25, 0.25, 0.26, 0.5, 0.75, 1.0, 1.0])
    correct = np.array([0, 1, 0, 1, 0, 1, 1, 0], bool)
    curve = reliability(confidence, correct, 4)
    assert [each.count for each in curve] == [3, 2, 1, 2]
    assert [(each.low, each.high) for each in curve] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    shares, confidences = sklearn.calibration.calibration_curve(correct, confidence, n_bins=4)  # has the same rule
    assert [each.accuracy for each in curve] == pytest.approx(shares, abs=1e-12)
    assert [each.confidence for each in curve] == pytest.approx(confidences, abs=1e-12)


def test_every_edge_of_fifteen_bins_belongs_to_the_lower_bin():
    edges = np.arange(1, 16) / 15
    assert [each.count for each in reliability(edges, np.ones(15, bool))] == [1] * 15
    above = np.nextafter(edges[:-1], 1)
    assert [each.count for each in reliability(above, np.ones(14, bool))] == [0] + [1] * 14


def test_a_bin_without_images_has_no_means():
    (first, *_, last) = reliability(np.array([0.9, 0.95]), np.array([True, False]), 2)
    assert (first.count, first.confidence, first.accuracy) == (0, None, None)
    assert (last.count, last.accuracy) == (2, 0.5)


@pytest.mark.parametrize("num_bins", [1, 3, 15])
def test_bins_of_equal_mass_equal_those_of_scikit_learn(num_bins):
    rng = np.random.default_rng(5)
    confidence = rng.uniform(0.1, 1, 30 * num_bins)
    correct = rng.uniform(size=len(confidence)) < confidence
    curve = reliability(confidence, correct, num_bins, equal_mass=True)
    assert [each.count for each in curve] == [30] * num_bins
    shares, confidences = sklearn.calibration.calibration_curve(
        correct, confidence, n_bins=num_bins, strategy="quantile"
    )
    assert [each.accuracy for each in curve] == pytest.approx(shares, abs=1e-12)
    assert [each.confidence for each in curve] == pytest.approx(confidences, abs=1e-12)


def test_bins_of_equal_mass_keep_equal_confidences_together_and_do_not_depend_on_the_order(both):
    given, *_ = both
    ranks = scipy.stats.rankdata(given.confidence, method="min") - 1
    bins = (15 * ranks // len(given)).astype(int)
    total = sum(
        (bins == b).mean() * abs(given.correct[bins == b].mean() - given.confidence[bins == b].mean())
        for b in np.unique(bins)
    )
    assert metrics.expected_calibration_error(given, equal_mass=True) == same(total)
    shuffled = given.take(np.random.default_rng(1).permutation(len(given)))
    assert metrics.expected_calibration_error(shuffled, equal_mass=True) == pytest.approx(total, abs=1e-12)


def test_everything_of_a_set_at_once_is_plain_and_finite(both):
    given, *_ = both
    found = metrics.set_metrics(given)
    assert found["worst_class"] == dict(zip(("index", "accuracy"), metrics.worst_class(given), strict=True))
    numbers = [value for value in found.values() if not isinstance(value, dict)]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    assert 0 <= found["brier"] <= 2
    assert 0 <= found["ece"] <= 1


def test_metrics_of_a_table_are_those_of_its_logits():
    labels, logits = case("random")
    ids = np.arange(len(labels), dtype=np.uint64)
    table = concat([predictions_table(name, 0.6, ids, labels, logits) for name in ("id_val", "noisy")])
    assert metrics.set_metrics(answers(select(table, "noisy", 0.6))) == metrics.set_metrics(
        answers_of_logits(labels, logits)
    )
    with pytest.raises(ValueError, match=r"one set at one alpha, but got .*'id_val', 0\.6.*'noisy', 0\.6"):
        answers(table)
    with pytest.raises(DataError, match="at least one image"):
        answers(table.slice(0, 0))


def test_huge_logits_give_finite_metrics():
    given = answers_of_logits(np.array([0, 1, 1]), np.array([[3e4, -3e4], [3e4, -3e4], [-3e4, -3e4]], np.float32))
    assert given.confidence.tolist() == pytest.approx([1, 1, 0.5], abs=1e-11)
    assert given.nll.tolist() == [0, 6e4, pytest.approx(math.log(2), abs=1e-10)]
    assert given.brier.tolist() == pytest.approx([0, 2, 0.5], abs=1e-10)


def test_wrong_arguments_are_refused():
    given = answers_of_logits(*case("random"))
    with pytest.raises(ValueError, match=r"k must lie in 1 \.\. 10, but got 11"):
        metrics.top_accuracy(given, 11)
    with pytest.raises(ValueError, match=r"every confidence must lie in 0 \.\. 1"):
        reliability(np.array([math.nan]), np.array([True]))
    with pytest.raises(ValueError, match="two arrays"):
        reliability(np.array([0.5]), np.array([True, False]))
    with pytest.raises(DataError, match="at least one image"):
        reliability(np.array([]), np.array([], bool))


def test_area_under_the_alpha_curve_equals_that_of_scipy():
    rng = np.random.default_rng(3)
    alphas = [0.0, 0.2, 0.35, 0.4, 0.8, 1.0]
    values = rng.uniform(size=6)
    assert metrics.alpha_area(alphas, values) == pytest.approx(scipy.integrate.trapezoid(values, alphas), abs=1e-15)
    assert metrics.alpha_area([0, 1], [0.6, 0.6]) == 0.6
    for bad in ([0.2, 1], [0, 0.9], [0, 0], [1, 0]):
        with pytest.raises(ValueError, match="rise strictly from 0 to 1"):
            metrics.alpha_area(bad, [0.5, 0.5])
    with pytest.raises(ValueError, match="must be finite"):
        metrics.alpha_area([0, 1], [0.5, math.nan])
