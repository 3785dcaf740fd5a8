"""Figures, which stand degenerate input, and the pictures that a training keeps of images whose answers change."""

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import short_sealed
from from_logits import predictions_table
from PIL import Image

from carft_ray.data.source import ImageSet
from carft_ray.errors import StorageError
from carft_ray.evaluation.predictions import concat, read_predictions, sets
from carft_ray.layout import PREDICTIONS, THUMBNAILS
from carft_ray.results.figure import Curve, Dot, id_ood_figure, write
from carft_ray.study.rows import trials
from carft_ray.training.thumbnails import SIDE, changed, read_thumbnails, write_thumbnails

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BASELINES = {"zero-shot": (0.725, 0.575), "plain fine-tuning": (0.781, 0.491), "paper's setting": (0.774, 0.542)}
ALONG = np.array(GRID)
CURVE = Curve(GRID, 0.725 + 0.05 * ALONG, 0.575 + 0.05 * ALONG - 0.06 * ALONG**2, 0.4, 0.745, 0.585, 0.009, None)
SAME = Curve(GRID, [0.7] * 6, [0.6] * 6, 0.1, 0.7, 0.6, 0, 0)
DOTS = [Dot(0.75 + 0.01 * k, 0.55 + 0.03 * (k % 3), 10 ** (k / 3 - 1)) for k in range(9)]
WITHOUT_KL = [Dot(0.7, 0.6, None), Dot(0.8, 0.5, 0.0, meets=False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "baselines", "best", "kind"),
    [
        pytest.param(DOTS, BASELINES, CURVE, "harmonic", id="search"),
        pytest.param([Dot(0.7, 0.6, 1.0)] * 5, {"zero-shot": (0.7, 0.6)}, SAME, "worst_domain", id="identical"),
        pytest.param(WITHOUT_KL, BASELINES, None, "weighted_mean", id="no kl_weight"),
        pytest.param([Dot(0, 0, 1e-3), Dot(1, 1, 1e3), Dot(np.nan, 0.5, 1)], {}, None, "weighted_mean", id="extremes"),
        pytest.param([], {}, None, "weighted_mean", id="nothing"),
    ],
)
def test_id_ood_figure_stands_any_points(tmp_path, points, baselines, best, kind):
    png, svg = tmp_path / "out" / "f.png", tmp_path / "out" / "f.svg"
    write(id_ood_figure(points, baselines, best, "Search", kind=kind), png, svg)
    with Image.open(png) as image:
        assert image.size == (1600, 1200)
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert pixels.std() > 3  # not blank
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert {*png.parent.iterdir()} == {png, svg}


@pytest.mark.slow
def test_the_same_study_gives_the_same_bytes_and_titles_say_synthetic_only_when_told(tmp_path):
    import matplotlib

    found = []
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        for number, synthetic in enumerate((False, False, True)):
            png, svg = tmp_path / f"{number}.png", tmp_path / f"{number}.svg"
            write(id_ood_figure(DOTS, BASELINES, CURVE, "Search", synthetic=synthetic), png, svg)
            assert ("Search (synthetic images)" in svg.read_text()) == synthetic
            found.append((png.read_bytes(), svg.read_bytes()))
    assert found[0] == found[1]
    for text in ("best trial, alpha 0.4", "plain fine-tuning", "OOD accuracy", "0.5 ID + 0.5 OOD"):
        assert text in svg.read_text()


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    taken = tmp_path / "f.png"
    taken.mkdir()
    with pytest.raises(StorageError, match=rf"{taken}: must be writable"):
        write(id_ood_figure([], {}, None, "Search"), taken, tmp_path / "f.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]


# images whose answers change

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
    for alphas, patterns, expected in (
        (ALPHAS, ["000", "111", "010", "011", "010", "100"], {"010": [2, 4], "011": [3], "100": [5]}),
        ((0.0, 1.0), ["01", "10", "11"], {"01": [0], "10": [1]}),
    ):
        found = changed(table_of("id_val", patterns, alphas), "id_val", list(alphas))
        assert {pattern: ids.tolist() for pattern, ids in found.items()} == expected


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
