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


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_renders_every_class_by_its_names_alone_and_shows_something(domain):
    for class_name in CLASSES:
        pixels, shown = render(domain, "train", class_name, 0)
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        assert pixels.std() > 2
        assert (shown.domain, shown.class_name) == (domain, class_name)
    again, same = render(domain, "train", class_name, 0)
    np.testing.assert_array_equal(again, pixels)
    assert same == shown


def test_pictures_keep_their_attributes_between_versions():
    shown = render("photo", "train", "fish", 0)[1]
    assert (shown.figure_colour, shown.ground_colour, shown.mirrored) == ("blue", "red", False)
    assert (shown.scale, shown.angle) == pytest.approx((0.5166689684507908, -37.77741321207112), abs=1e-9)
    assert sandbox_source("photo", "train", 1, "train").sample_ids[0] == 1211625063335572033  # of an arrow


def test_a_longer_set_begins_with_the_pictures_of_a_shorter_one_and_has_all_classes_alike():
    short, long = (sandbox_source("photo", "train", count, "train") for count in (2, 5))
    np.testing.assert_array_equal(short.pixels(3), long.pixels(6))
    assert short.sample_ids[3] == long.sample_ids[6]
    assert short.fingerprint != long.fingerprint
    assert list(long.class_names) == sorted(long.class_names)
    assert np.bincount(long.labels).tolist() == [5] * len(CLASSES)
    assert (long.labels.dtype, long.sample_ids.dtype) == (np.int64, np.uint64)


@pytest.mark.slow
def test_no_sample_id_or_picture_is_shared_by_two_sets_and_all_have_colours_and_sizes_alike():
    ids, pictures = [], set()
    for domain in DOMAINS:
        for split in sandbox.SPLITS:
            source = sandbox_source(domain, split, 20, domain)
            ids += source.sample_ids.tolist()
            pictures |= {source.pixels(i).tobytes() for i in range(0, len(source), 20)}
        shown = [render(domain, "train", name, index)[1] for name in CLASSES for index in range(8)]
        assert all(each.figure_colour != each.ground_colour for each in shown)
        assert min(Counter(each.figure_colour for each in shown).values()) > 4  # 16 expected
        assert 40 < sum(each.scale <= sandbox.SMALL_SCALES[1] for each in shown) < 88  # 64 expected
        assert 40 < sum(abs(each.angle) <= sandbox.UPRIGHT_DEGREES for each in shown) < 88
    assert len(set(ids)) == len(ids)
    assert len(pictures) == len(DOMAINS) * len(sandbox.SPLITS) * len(CLASSES)


def test_an_unknown_domain_and_another_class_list_are_reported_at_once_with_the_nearest():
    spec = SandboxSet(source="sandbox", domain="sketsh", split="val", num_per_class=1)
    with pytest.raises(DataError) as caught:
        open_source(spec, "ood_val/sketch", ("sqare", *CLASSES[1:]))
    first, second = caught.value.problems
    assert (first.nearest, second.allowed) == ("sketch", CLASSES)


def test_export_writes_one_folder_per_set_with_the_pictures_of_the_source(tmp_path, monkeypatch):
    small = {
        role: {name: spec.model_copy(update={"num_per_class": 2}) for name, spec in sets.items()}
        for role, sets in QUICKSTART_SETS.items()
    }
    monkeypatch.setattr(sandbox, "QUICKSTART_SETS", small)
    seen = []
    export_images(tmp_path / "images", lambda done, total: seen.append((done, total)))
    photos = {"photo_train", "photo_id_val", "photo_id_test"}
    folders = {path.name for path in (tmp_path / "images").iterdir()}
    assert folders == photos | set(small["ood_val"]) | set(small["ood_test"])
    for folder in folders:
        assert {path.name for path in (tmp_path / "images" / folder).iterdir()} == set(CLASSES)
    assert seen[-1] == (12 * 16 * 2, 12 * 16 * 2)
    path = tmp_path / "images" / "painting" / CLASSES[1] / "0001.png"
    np.testing.assert_array_equal(Image.open(path), sandbox_source("painting", "val", 2, "painting").pixels(3))
    with pytest.raises(UsageError):  # the folder is not empty
        export_images(tmp_path)


@pytest.mark.slow
def test_packaged_weights_open_in_stock_open_clip_and_know_the_shapes():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{WEIGHTS}")
    head = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, CLASSES, [t.format for t in TEMPLATES])
    for domain in ("photo", "sketch"):
        source = sandbox_source(domain, "val", 5, domain)
        images = torch.stack([preprocess(Image.fromarray(source.pixels(i))) for i in range(len(source))])
        with torch.no_grad():
            predictions = (F.normalize(model.encode_image(images), dim=-1) @ head).argmax(dim=1)
        assert (predictions.numpy() == source.labels).mean() > 0.4  # chance is .0625
