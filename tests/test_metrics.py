"""Metrics against their oracles, with ties, edges of bins and empty classes; their table."""

import itertools
import math
import operator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.special
import sklearn.metrics
import torch
from from_logits import predictions_table

from carft_ray.errors import CarftError, DataError, StorageError
from carft_ray.evaluation import metrics
from carft_ray.evaluation.metrics import answers, equal_width_bins
from carft_ray.evaluation.predictions import (
    accuracy,
    concat,
    correct,
    correct_matrix,
    read_predictions,
    sample_ids,
    write_predictions,
)

CASES = ("random", "ties", "empty classes", "two classes", "confident")


def case(name):
    """Labels [N] and logits [N, C] of one kind."""
    num_classes = {"two classes": 2, "empty classes": 24}.get(name, 16)
    _, labels, logits = random_set(900, num_classes, seed=CASES.index(name), scale=3)
    logits[np.arange(900), labels] += 2
    if name == "ties":
        logits = np.round(logits / 4) * 4  # one image in three has several largest logits
    if name == "empty classes":
        labels = labels // 2 * 2  # no odd class
    if name == "confident":
        logits *= 30
    return labels, logits


@pytest.fixture(params=CASES)
def both(request):
    """The answers, and what the oracles take: labels, logits and probabilities in float64."""
    labels, logits = case(request.param)
    given = answers(predictions_table("set", 1.0, np.arange(len(labels), dtype=np.uint64), labels, logits))
    return given, labels, logits, scipy.special.softmax(logits.astype(np.float64), axis=1)


def same(value):
    return pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.97, 0.01, 0.01, 0.01)])
def test_one_class_as_the_only_answer_is_at_chance_however_common_it_is(shares):
    labels = np.repeat(np.arange(len(shares)), [round(share * 1000) for share in shares])
    for answer in range(len(shares)):
        assert not metrics.is_above_chance(labels, np.full(len(labels), answer))
    assert metrics.is_above_chance(labels, labels)
    for few in (0, 1):  # no image and one tell nothing
        assert not metrics.is_above_chance(np.zeros(few, int), np.zeros(few, int))
    assert metrics.chance(np.zeros(0, int), np.zeros(0, int)) == 0


@pytest.mark.parametrize(
    ("labels", "given"),
    [("00011222", "00112222"), ("0011", "0011"), ("01234", "01234"), ("0001", "0011"), ("012", "012")],
)
def test_luck_is_that_of_answers_dealt_out_at_random(labels, given):
    """Against all orders of a few answers."""
    labels, given = np.array([*map(int, labels)]), np.array([*map(int, given)])
    right = [sum(map(operator.eq, labels, order)) for order in itertools.permutations(given)]
    limit = np.mean(right) + 1.96 * np.std(right)
    assert metrics.chance(labels, given) == pytest.approx(np.mean(right) / len(labels))
    for order in itertools.islice(itertools.permutations(given), 0, None, 97 if len(labels) > 5 else 1):
        is_above = sum(map(operator.eq, labels, order)) > limit
        assert metrics.is_above_chance(labels, np.array(order)) == is_above


def test_accuracies_by_class_equal_those_of_scikit_learn(both):
    given, labels, logits, _ = both
    classes, found = np.arange(logits.shape[1]), metrics.class_accuracies(given)
    assert list(found) == sorted(set(labels.tolist()))
    recall = sklearn.metrics.recall_score(labels, logits.argmax(1), labels=classes, average=None, zero_division=np.nan)
    assert all(value == same(recall[index]) for index, value in found.items())
    of_set = metrics.set_metrics(given)
    assert of_set["worst_class"] == {"index": int(np.nanargmin(recall)), "accuracy": same(np.nanmin(recall))}
    assert of_set["mean_class_accuracy"] == same(np.nanmean(recall))
    numbers = [value for value in of_set.values() if not isinstance(value, dict)]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers)


def test_negative_log_likelihood_and_brier_score_equal_those_of_torch_and_scikit_learn(both):
    given, labels, logits, probabilities = both
    found, classes = metrics.set_metrics(given), np.arange(logits.shape[1])
    oracle = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert found["nll"] == same(oracle)
    oracle = sklearn.metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)
    assert found["brier"] == same(oracle)
    squares = ((probabilities - np.eye(len(classes))[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(given.brier, squares, atol=2**-22)


def guo(confidence, correct, num_bins):
    """ECE as Guo et al. 2017 compute it: lower edge out, upper edge in."""
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > np.float32(b / num_bins)) & (confidence <= np.float32((b + 1) / num_bins))
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_calibration_error_equals_that_of_guo(both, num_bins):
    given = both[0]
    found = metrics.expected_calibration_error(given, num_bins)
    assert found == same(guo(given.confidence, given.correct, num_bins))


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    assert equal_width_bins(np.array([0.0, 0.25, 0.25, 0.26, 0.5, 0.75, 1.0]), 4).tolist() == [0, 0, 0, 1, 1, 2, 3]
    edges = (np.arange(1, 16) / 15).astype(np.float32)
    assert equal_width_bins(edges).tolist() == list(range(15))
    assert equal_width_bins(np.nextafter(edges[:-1], np.float32(1))).tolist() == list(range(1, 15))


def test_huge_logits_give_finite_metrics():
    given = answers(predictions_table("s", 1.0, [1, 2, 3], [0, 1, 1], [[3e4, -3e4], [3e4, -3e4], [-3e4, -3e4]]))
    assert given.confidence.tolist() == [1, 1, 0.5]
    assert given.nll.tolist() == [0, 6e4, np.float32(math.log(2))]
    assert given.brier.tolist() == pytest.approx([0, 2, 0.5], abs=1e-7)


def random_set(num_samples=37, classes=16, seed=0, scale=8.0):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(num_samples, dtype=np.uint64) * np.uint64(2**57 + 1) + np.uint64(2**63))
    labels = rng.integers(0, classes, num_samples)
    logits = (scale * rng.normal(size=(num_samples, classes))).astype(np.float32)
    return ids, labels, logits


def table_of(set_name="id_val", alpha=1.0, **kwargs):
    return predictions_table(set_name, alpha, *random_set(**kwargs))


@pytest.mark.parametrize("classes", [1, 3, 16, 300])
def test_table_agrees_with_numpy(classes):
    ids, labels, logits = random_set(classes=classes)
    table = predictions_table("id_val", 0.6, ids, labels, logits)
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    place = 1 + np.flatnonzero(order == labels[:, None]) % classes
    assert table["rank"].to_pylist() == np.where(place <= 5, place, 0).tolist()
    assert table["prediction"].to_pylist() == order[:, 0].tolist()
    odds = np.exp(logits.astype(np.float64))
    p = odds / odds.sum(1, keepdims=True)
    of_label = -np.log(p[np.arange(len(p)), labels])
    for name, expected in (("confidence", p.max(1)), ("nll", of_label), ("sum_p2", (p**2).sum(1))):
        np.testing.assert_allclose(table[name].to_numpy(), expected, rtol=2**-24, atol=1e-12)
    assert table["sample_id"].to_numpy().tolist() == ids.tolist()
    found = metrics.set_metrics(answers(table))
    assert accuracy(table) == found["accuracy"] == np.mean(place == 1)
    assert found["top5"] == np.mean(place <= 5)


def test_equal_logits_are_ordered_by_class_index():
    rows = [[0, 7, 7, 7], [1, 1, 1, 1], [7, 7, 0, 7]]
    table = predictions_table("s", 0.0, np.arange(3, dtype=np.uint64), [2, 0, 3], rows)
    assert table["rank"].to_pylist() == [2, 1, 3]
    assert table["prediction"].to_pylist() == [1, 0, 0]


def test_a_group_of_classes_scores_its_largest_logit_and_is_named_by_its_first_class():
    groups, (ids, labels, logits) = ((4, 1), (0, 2, 3)), random_set(classes=6)
    labels = np.where(labels % 2, 4, 0)
    found = predictions_table("s", 1.0, ids, labels, logits, groups)
    largest = np.stack([logits[:, list(group)].max(axis=1) for group in groups], axis=1)
    plain = predictions_table("s", 1.0, ids, (labels == 0).astype(int), largest)
    assert found["prediction"].to_pylist() == [groups[index][0] for index in plain["prediction"].to_pylist()]
    for name in ("rank", "confidence", "nll", "sum_p2"):
        assert found[name].equals(plain[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_counts_the_images(value):
    ids, labels, logits = random_set()
    logits[3, 1] = value
    with pytest.raises(CarftError, match=r"id_val at alpha 0\.4: class logits must be finite, but those of 1 of 37"):
        predictions_table("id_val", 0.4, ids, labels, logits)


def test_correctness_does_not_depend_on_the_order_of_the_rows():
    ids, labels, logits = random_set()
    order = np.random.default_rng(5).permutation(37)
    a = predictions_table("s", 1.0, ids, labels, logits)
    b = predictions_table("s", 1.0, ids[order], labels[order], logits[order])
    assert correct(a, "s", 1.0).tolist() == correct(b, "s", 1.0).tolist()
    by_id = dict(zip(ids.tolist(), (logits.argmax(1) == labels).tolist(), strict=True))
    assert correct(a, "s", 1.0).tolist() == [by_id[i] for i in sorted(by_id)]
    assert sample_ids(b, "s", 1.0).tolist() == sorted(by_id)
    assert correct_matrix([(a, 1.0), (b, 1.0)], "s").shape == (2, 37)


def test_results_of_other_images_or_of_no_evaluation_are_an_error():
    with pytest.raises(DataError, match="must be of the same images"):
        correct_matrix([(table_of(), 1.0), (table_of(num_samples=36), 1.0)], "id_val")
    with pytest.raises(DataError, match=r"but got noisy at 0.5 \(allowed: id_val at 1\)"):
        correct(table_of(), "noisy", 0.5)


def test_file_gives_back_the_same_table_in_the_published_format(tmp_path):
    table = concat([table_of("id_val"), table_of("noisy", 0.6, seed=1)])
    path = tmp_path / "predictions" / "t.parquet"
    write_predictions(path, table)
    assert read_predictions(path).equals(table)
    assert [file.name for file in path.parent.iterdir()] == ["t.parquet"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert " ".join(table.schema.names) == "set alpha sample_id label prediction rank confidence nll sum_p2"


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    path, table = tmp_path / "t.parquet", table_of()
    for broken in (b"", b"nonsense"):
        path.write_bytes(broken)
        with pytest.raises(StorageError, match=rf"{path}: must be a readable Parquet file"):
            read_predictions(path)
    with pytest.raises(StorageError, match="No such file"):
        read_predictions(tmp_path / "none.parquet")
    for foreign, message in (
        (pa.table({"a": [1]}), "format_version of predictions must be 4, but got none"),
        (table.replace_schema_metadata({"format_version": "3"}), "must be 4, but got 3\n    Evaluate the model again"),
        (table.drop_columns(["label"]), r"must have the columns set, alpha, .*, but got set, alpha, sample_id, pred"),
    ):
        pq.write_table(foreign, path)
        with pytest.raises(StorageError, match=message):
            read_predictions(path)
