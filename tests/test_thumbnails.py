"""The pictures that a training keeps of images whose answers change."""

import io

import numpy as np
import pytest
import short_training
from from_logits import predictions_table
from PIL import Image

from carft_ray.data.source import ImageSet
from carft_ray.evaluation.predictions import concat, read_predictions, sets
from carft_ray.launch.runs.single import train_once
from carft_ray.layout import PREDICTIONS, THUMBNAILS
from carft_ray.recipe.loading import load_recipe
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


def test_images_are_sorted_by_where_they_are_right():
    patterns = ["000", "111", "010", "011", "010", "100"]
    found = changed(table_of("id_val", patterns), "id_val", ALPHAS)
    assert {pattern: ids.tolist() for pattern, ids in found.items()} == {"010": [2, 4], "011": [3], "100": [5]}


def test_of_two_alphas_there_are_two_patterns():
    table = table_of("id_val", ["01", "10", "11"], (0.0, 1.0))
    found = changed(table, "id_val", [0.0, 1.0])
    assert {pattern: ids.tolist() for pattern, ids in found.items()} == {"01": [0], "10": [1]}


def test_sets_and_patterns_take_turns_and_each_picture_is_that_of_its_image(tmp_path):
    many = ["011"] * 50 + ["100"] * 2
    table = concat([table_of("id_val", many), table_of("sketch", ["111", "010"])])
    opened = [images_of("id_val", len(many)), images_of("sketch", 2)]
    path = tmp_path / "predictions" / "thumbnails.parquet"
    write_thumbnails(path, table, 0.4, opened, 7)
    found = [(row["set"], row["sample_id"]) for row in read_thumbnails(path).to_pylist()]
    first, second = [("id_val", 0), ("id_val", 50), ("sketch", 1)], [("id_val", 1), ("id_val", 51)]
    assert found == [*first, *second, ("id_val", 2), ("id_val", 3)]
    for row in read_thumbnails(path).to_pylist():
        with Image.open(io.BytesIO(row["jpeg"])) as picture:
            assert picture.size == (SIDE, SIDE * 2 // 3)
            assert np.abs(np.asarray(picture).astype(int) - row["sample_id"]).max() <= 2  # JPEG rounds


def test_a_small_image_is_kept_in_its_own_size(tmp_path):
    write_thumbnails(tmp_path / "t.parquet", table_of("id_val", ["010"]), 0.4, [images_of("id_val", 1, 32, 32)], 1)
    [row] = read_thumbnails(tmp_path / "t.parquet").to_pylist()
    with Image.open(io.BytesIO(row["jpeg"])) as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no more"])
def test_pictures_that_are_missing_or_damaged_are_none(tmp_path, content):
    if content is not None:
        (tmp_path / "t.parquet").write_bytes(content)
    assert read_thumbnails(tmp_path / "t.parquet").num_rows == 0


def test_with_zero_nothing_is_written(tmp_path):
    write_thumbnails(tmp_path / "t.parquet", table_of("id_val", ["010"]), 0.4, [images_of("id_val", 1)], 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_training_keeps_pictures_of_what_has_changed_and_none_when_it_is_told_so(tmp_path):
    recipe = load_recipe(short_training.make(tmp_path), [f"data.cache_dir={tmp_path / 'cache'}"])
    nothing = (str, lambda row: None, lambda row: None)
    for number in (recipe.evaluate.thumbnails, 0):
        evaluate = recipe.evaluate.model_copy(update={"thumbnails": number})
        out = tmp_path / str(number)
        result, _ = train_once(recipe.model_copy(update={"evaluate": evaluate}), out, False, "", *nothing)
        out = short_training.place_in(out)
        assert (out / THUMBNAILS).exists() == bool(number)
        kept, table = read_thumbnails(out / THUMBNAILS), read_predictions(out / PREDICTIONS)
        alphas = sorted({0.0, result["alpha"], 1.0})
        found = {
            (name, one) for name in sets(table) for ids in changed(table, name, alphas).values() for one in ids.tolist()
        }
        assert len(kept) == min(number, len(found))
        assert {(row["set"], row["sample_id"]) for row in kept.to_pylist()} <= found
