"""The pictures that a training keeps of images whose answers change."""

import io

import numpy as np
import pytest
import short_sealed
from from_logits import predictions_table
from PIL import Image

from carft_ray.data.source import ImageSet
from carft_ray.evaluation.predictions import concat, read_predictions, sets
from carft_ray.layout import PREDICTIONS, THUMBNAILS
from carft_ray.study.rows import trials
from carft_ray.training.thumbnails import SIDE, changed, read_thumbnails, write_thumbnails

ALPHAS = (0.0, 0.4, 1.0)


def table_of(set_name, patterns, alphas=ALPHAS):
    """Predictions with these patterns: image i is right at the alphas at which pattern i has a 1."""
    ids, labels, tables = np.arange(len(patterns), dtype=np.uint64), np.arange(len(patterns)) % 3, []
    for place, alpha in enumerate(alphas):
        right = np.array([pattern[place] == "1" for pattern in patterns])
        logits = np.zeros((len(patterns), 3), np.float32)
        logits[np.arange(len(patterns)), np.where(right, labels, (labels + 1) % 3)] = 1
        tables.append(predictions_table(set_name, alpha, ids, labels, logits))
    return concat(tables)


def images_of(set_name, count, height=200, width=300):
    """Images of one grey level each, their number."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3))
    return ImageSet(set_name, pixels, np.arange(count) % 3, np.arange(count, dtype=np.uint64))


@pytest.mark.parametrize(
    ("alphas", "patterns", "found"),
    [
        (ALPHAS, ["000", "111", "010", "011", "010", "100"], {"010": [2, 4], "011": [3], "100": [5]}),
        ((0.0, 1.0), ["01", "10", "11"], {"01": [0], "10": [1]}),
    ],
)
def test_images_are_sorted_by_where_they_are_right(alphas, patterns, found):
    told = changed(table_of("id_val", patterns, alphas), "id_val", list(alphas))
    assert {pattern: ids.tolist() for pattern, ids in told.items()} == found


def test_sets_and_patterns_take_turns_and_each_picture_is_that_of_its_image(tmp_path):
    many = ["011"] * 50 + ["100"] * 2
    table = concat([table_of("id_val", many), table_of("sketch", ["111", "010"])])
    path = tmp_path / "predictions" / "thumbnails.parquet"
    opened = [images_of("id_val", len(many)), images_of("sketch", 2, 32, 32)]
    write_thumbnails(path, table, 0.4, opened, 7)
    rows = read_thumbnails(path).to_pylist()
    first, second = [("id_val", 0), ("id_val", 50), ("sketch", 1)], [("id_val", 1), ("id_val", 51)]
    assert [(row["set"], row["sample_id"]) for row in rows] == [*first, *second, ("id_val", 2), ("id_val", 3)]
    for row in rows:
        with Image.open(io.BytesIO(row["jpeg"])) as picture:
            assert picture.size == ((SIDE, SIDE * 2 // 3) if row["set"] == "id_val" else (32, 32))  # never enlarged
            assert np.abs(np.asarray(picture).astype(int) - row["sample_id"]).max() <= 2  # JPEG rounds


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no more"])
def test_pictures_that_are_missing_or_damaged_are_none(tmp_path, content):
    write_thumbnails(tmp_path / "t.parquet", table_of("id_val", ["010"]), 0.4, [images_of("id_val", 1)], 0)
    assert not list(tmp_path.iterdir())  # with zero nothing is written
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    assert read_thumbnails(tmp_path / "t.parquet").num_rows == 0


@pytest.mark.slow
def test_trainings_keep_pictures_of_what_has_changed(tmp_path_factory):
    study_dir = short_sealed.shared(tmp_path_factory) / "study"
    for row in trials(study_dir):
        place = row.place(study_dir)
        kept, table = read_thumbnails(place / THUMBNAILS), read_predictions(place / PREDICTIONS)
        alphas = sorted({0.0, row.alpha, 1.0})
        found = {
            (name, one) for name in sets(table) for ids in changed(table, name, alphas).values() for one in ids.tolist()
        }
        assert {(each["set"], each["sample_id"]) for each in kept.to_pylist()} == found
