"""Per-image results: what a table holds, merging of parts, accuracies derived from it, and the file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from from_logits import predictions_table

from carft_ray.errors import CarftError, DataError, StorageError
from carft_ray.evaluation import predictions
from carft_ray.evaluation.predictions import (
    accuracy,
    alphas,
    concat,
    correct,
    correct_matrix,
    read_predictions,
    sample_ids,
    select,
    sets,
    write_predictions,
)


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
    assert accuracy(table) == (logits.argmax(1) == labels).mean()


def test_equal_logits_are_ordered_by_class_index():
    rows = [[0, 7, 7, 7], [1, 1, 1, 1], [7, 7, 0, 7]]
    table = predictions_table("s", 0.0, np.arange(3, dtype=np.uint64), [2, 0, 3], rows)
    assert table["rank"].to_pylist() == [2, 1, 3]
    assert table["prediction"].to_pylist() == [1, 0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_counts_the_images(value):
    ids, labels, logits = random_set()
    logits[3, 1] = value
    with pytest.raises(CarftError, match=r"id_val at alpha 0\.4: class logits must be finite, but those of 1 of 37"):
        predictions_table("id_val", 0.4, ids, labels, logits)


def test_rows_by_set_and_alpha():
    parts = [table_of(name, alpha, seed=i) for i, name in enumerate(("id_val", "noisy")) for alpha in (1.0, 0.0, 0.6)]
    table = concat(parts)
    assert sets(table) == ["id_val", "noisy"]
    assert alphas(table, "noisy") == [0.0, 0.6, 1.0]
    assert select(table, "id_val", 0.6).to_pylist() == parts[2].to_pylist()


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
    assert table.schema.equals(predictions.SCHEMA)
    names = "set alpha sample_id label prediction rank confidence nll sum_p2"
    assert " ".join(predictions.SCHEMA.names) == names


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
