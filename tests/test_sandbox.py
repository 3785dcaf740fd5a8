"""The sandbox: pictures are a pure function of their names, sets are fair, the packaged model opens in open_clip."""

from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from carft_ray import model as models
from carft_ray.data.open_source import open_source
from carft_ray.data.synthetic import sandbox
from carft_ray.data.synthetic.sandbox import (
    CLASSES,
    DOMAINS,
    QUICKSTART_SETS,
    TEMPLATES,
    export_images,
    render,
    sandbox_source,
)
from carft_ray.errors import DataError, UsageError
from carft_ray.recipe.schema.sets import SandboxSet

WEIGHTS = Path(models.__file__).parent / "sandbox_weights"


@pytest.fixture
def small_sets(monkeypatch):
    """The quickstart's sets with two images per class."""
    small = {
        role: {name: spec.model_copy(update={"num_per_class": 2}) for name, spec in sets.items()}
        for role, sets in QUICKSTART_SETS.items()
    }
    monkeypatch.setattr(sandbox, "QUICKSTART_SETS", small)
    return small


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_renders_every_class_and_shows_something(domain):
    for class_name in CLASSES:
        pixels, shown = render(domain, "train", class_name, 0)
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 2
        assert (shown.domain, shown.class_name) == (domain, class_name)


def test_a_picture_depends_on_its_four_names_only():
    first = render("sketch", "val", "key", 7)
    render("photo", "train", "fish", 3)
    second = render("sketch", "val", "key", 7)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


def test_pictures_keep_their_attributes_between_versions():
    shown = render("photo", "train", "fish", 0)[1]
    assert (shown.figure_colour, shown.ground_colour, shown.mirrored) == ("blue", "red", False)
    assert (shown.scale, shown.angle) == pytest.approx((0.5166689684507908, -37.77741321207112), abs=1e-9)
    assert sandbox_source("photo", "train", 1, "train").sample_ids[0] == 1211625063335572033  # of an arrow


def test_a_longer_set_begins_with_the_pictures_of_a_shorter_one():
    short, long = (sandbox_source("photo", "train", count, "train") for count in (2, 5))
    np.testing.assert_array_equal(short.pixels(3), long.pixels(6))
    assert short.sample_ids[3] == long.sample_ids[6]
    assert short.fingerprint != long.fingerprint


def test_classes_are_equally_frequent_and_in_the_order_of_folders():
    source = sandbox_source("cartoon", "val", 5, "cartoon")
    assert len(source) == 80
    assert list(source.class_names) == sorted(source.class_names)
    assert set(Counter(source.labels.tolist()).values()) == {5}
    assert source.labels.dtype == np.int64
    assert source.sample_ids.dtype == np.uint64


@pytest.mark.slow
def test_no_sample_id_or_picture_is_shared_by_two_sets():
    ids, pictures = [], set()
    for domain in DOMAINS:
        for split in sandbox.SPLITS:
            source = sandbox_source(domain, split, 20, domain)
            ids += source.sample_ids.tolist()
            pictures |= {source.pixels(i).tobytes() for i in range(0, len(source), 20)}
    assert len(set(ids)) == len(ids)
    assert len(pictures) == len(DOMAINS) * len(sandbox.SPLITS) * len(CLASSES)


@pytest.mark.slow
def test_colours_sizes_and_tilts_have_one_distribution_in_every_domain():
    for domain in DOMAINS:
        shown = [sandbox._attributes(_rng(domain, i), domain, "star") for i in range(600)]
        colours = Counter(s.figure_colour for s in shown)
        assert min(colours.values()) > 40  # 75 expected
        assert 240 < sum(s.scale <= sandbox.SMALL_SCALES[1] for s in shown) < 360
        assert 240 < sum(abs(s.angle) <= sandbox.UPRIGHT_DEGREES for s in shown) < 360
        assert all(s.figure_colour != s.ground_colour for s in shown)


def test_there_are_31_distinct_templates_with_one_place_for_the_class():
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 31
    assert all(template.count("{}") == 1 for template in TEMPLATES)


def test_the_quickstart_sets_have_the_sizes_that_give_usable_standard_errors():
    sizes = {
        role: [spec.num_per_class * len(CLASSES) for spec in sets.values()] for role, sets in QUICKSTART_SETS.items()
    }
    assert sizes == {
        "train": [512],
        "id_val": [2000],
        "ood_val": [1008] * 4,
        "id_test": [2000],
        "ood_test": [1008] * 5,
    }
    assert not set(QUICKSTART_SETS["ood_val"]) & set(QUICKSTART_SETS["ood_test"])


def test_an_unknown_domain_and_another_class_list_are_reported_at_once_with_the_nearest():
    spec = SandboxSet(source="sandbox", domain="sketsh", split="val", num_per_class=1)
    with pytest.raises(DataError) as caught:
        open_source(spec, "ood_val/sketch", ("sqare", *CLASSES[1:]))
    first, second = caught.value.problems
    assert (first.nearest, second.allowed) == ("sketch", CLASSES)


@pytest.mark.slow
def test_export_writes_one_folder_per_set_with_the_pictures_of_the_source(tmp_path, small_sets):
    seen = []
    export_images(tmp_path / "images", lambda done, total: seen.append((done, total)))
    folders = {path.name for path in (tmp_path / "images").iterdir()}
    photos = {"photo_train", "photo_id_val", "photo_id_test"}
    assert folders == photos | set(small_sets["ood_val"]) | set(small_sets["ood_test"])
    for folder in folders:
        assert {path.name for path in (tmp_path / "images" / folder).iterdir()} == set(CLASSES)
    assert seen[-1] == (12 * 16 * 2, 12 * 16 * 2)
    source = sandbox_source("painting", "val", 2, "painting")
    path = tmp_path / "images" / "painting" / CLASSES[1] / "0001.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), source.pixels(3))


def test_export_refuses_a_folder_that_is_not_empty(tmp_path, small_sets):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UsageError):
        export_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.slow
def test_packaged_weights_open_in_stock_open_clip_and_know_the_shapes():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{WEIGHTS}")
    model.eval()
    head = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, [t.format for t in TEMPLATES])
    accuracies = {}
    for domain in ("photo", "sketch"):
        source = sandbox_source(domain, "val", 5, domain)
        images = torch.stack([preprocess(Image.fromarray(source.pixels(i))) for i in range(len(source))])
        with torch.no_grad():
            predictions = (F.normalize(model.encode_image(images), dim=-1) @ head).argmax(dim=1)
        accuracies[domain] = float((predictions.numpy() == source.labels).mean())
    assert all(accuracy > 0.4 for accuracy in accuracies.values()), accuracies  # chance is .0625


def _rng(domain, index):
    return np.random.Generator(np.random.Philox(key=sandbox._key(domain, "train", "star", index)))
