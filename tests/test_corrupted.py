"""Sets under corruptions: the same pictures everywhere, roles that may share images, and nothing else changed."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import crash_host
import numpy as np
import pytest
from PIL import Image
from sources import absolute_set, open_validation
from strict_roles import check_overlap
from torchvision.transforms.v2 import functional

from carft_ray.data.cache import cache_dir
from carft_ray.data.listed_sets import open_sets
from carft_ray.data.listing import StoredSource
from carft_ray.data.open_source import open_source
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.synthetic.corrupted import squared
from carft_ray.data.synthetic.corruptions import CORRUPTION_VERSION, CORRUPTIONS, corrupt
from carft_ray.data.synthetic.sandbox import CLASSES
from carft_ray.errors import DataError, HoldOutError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.identity import class_of
from carft_ray.training.origin import set_contents

SANDBOX = {"source": "sandbox", "domain": "photo", "split": "val", "num_per_class": 4}
NAMES = ("bird", "cat", "dog")


def corrupted(of, **keys):
    return {"source": "corrupted", "of": of, "severity": 3, **keys}


def opened(spec, base_dir=Path("/"), classes=None):
    return open_source(absolute_set(spec, base_dir), "x", classes)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Four folders, each with three classes of six images."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("train", "val", "test", "other"):
        for name in NAMES:
            (tmp_path / folder / name).mkdir(parents=True)
            for index in range(6):
                low = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(low).resize((40, 32), 0).save(tmp_path / folder / name / f"{index}.png")
    return tmp_path


def recipe_of(**sets):
    data = {"train": folder("train"), "id_val": folder("val"), **sets}
    return absolute_paths(Recipe.model_validate({"data": data, "train": {"batch_size": 4}}), Path.cwd())


def folder(name, **keys):
    return {"source": "folder", "path": name, **keys}


def test_a_picture_is_the_corruption_of_the_picture_without_and_nothing_else_changes():
    plain, shown = opened(SANDBOX), opened(corrupted(SANDBOX, seed=5))
    assert len(shown) == len(plain) == 4 * len(CLASSES)
    np.testing.assert_array_equal(shown.sample_ids, plain.sample_ids)
    np.testing.assert_array_equal(shown.labels, plain.labels)
    assert shown.class_names == plain.class_names
    for index in (7, 3, 60):
        name, sample = shown.corruption(index), int(plain.sample_ids[index])
        np.testing.assert_array_equal(shown.pixels(index), corrupt(plain.pixels(index), name, 3, 5, sample))
        assert shown.place(index).endswith(f" under {name}")


def test_every_corruption_is_drawn_about_equally_often_and_by_the_seed():
    many = {**SANDBOX, "num_per_class": 125}
    first, second = (opened(corrupted(many, seed=seed)) for seed in (0, 1))
    drawn = [first.corruption(index) for index in range(len(first))]
    counts = Counter(drawn)
    assert set(counts) == set(CORRUPTIONS)
    assert sum((count - 2000 / 15) ** 2 / (2000 / 15) for count in counts.values()) < 36.1  # 14 df, p = .001
    assert 0.04 < np.mean([second.corruption(index) == name for index, name in enumerate(drawn)]) < 0.1
    only = opened(corrupted(many, corruptions=["fog"]))
    assert {only.corruption(index) for index in range(50)} == {"fog"}


def test_the_fingerprint_and_the_contents_hold_all_that_is_seen_and_not_the_order_of_the_names():
    spec = corrupted(SANDBOX, corruptions=["fog", "snow"])
    first = opened(spec)
    assert first.fingerprint.startswith(f"corrupted-{CORRUPTION_VERSION}/fog,snow/3/0/224/sandbox-")
    assert opened({**spec, "corruptions": ["snow", "fog"]}).fingerprint == first.fingerprint
    changes = [{"severity": 2}, {"seed": 1}, {"size": 64}, {"corruptions": ["fog"]}]
    changes.append({"of": {**SANDBOX, "split": "test"}})
    found = [first, *(opened({**spec, **change}) for change in changes)]
    assert len({other.fingerprint for other in found}) == len({other.content(0) for other in found}) == 6


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 300), (257, 800), (225, 240)])
def test_large_images_are_resized_and_cropped_as_imagenet_c_was(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = functional.center_crop(functional.resize(Image.fromarray(pixels), [256]), [224])
    np.testing.assert_array_equal(squared(pixels, 224), np.asarray(theirs))
    assert squared(pixels[:224], 224).shape == (224, width, 3)  # no large image


# sets of a recipe, and the set with which one shares images though it must not
SHARED = [
    ({"ood_val": {"noise": corrupted(folder("val")), "fog": corrupted(folder("val"), corruptions=["fog"])}}, None),
    ({"ood_val": {"noise": corrupted(folder("other"))}}, None),
    ({"id_val": corrupted(folder("val")), "ood_val": {"plain": folder("val")}}, None),
    ({"id_test": folder("test"), "ood_test": {"noise": corrupted(folder("test"))}}, None),
    ({"ood_val": {"noise": corrupted(folder("train"))}}, "data.train"),
    ({"id_val": corrupted(folder("train"))}, "data.train"),
    ({"ood_val": {"noise": corrupted(folder("test"))}, "id_test": folder("test")}, "data.ood_val.noise"),
    ({"ood_test": {"noise": corrupted(folder("val"))}}, "data.id_val"),
    ({"ood_test": {"noise": corrupted(folder("train"))}}, "data.train"),
    ({"ood_val": {"plain": folder("val")}}, "data.id_val"),
]


@pytest.mark.parametrize(("sets", "shared"), SHARED)
def test_only_validation_with_validation_and_test_with_test_may_share_images(sets, shared, tree):
    recipe = recipe_of(**sets)
    problems = check_roles(recipe)
    if shared is None:
        assert problems == check_sets(recipe) == []
        check_overlap(recipe, tree / "cache")
    else:
        assert [f"must not share images with {shared}" in str(problem) for problem in problems] == [True]


@pytest.mark.slow
def test_copies_are_found_below_a_corruption(tree):
    shutil.copy(tree / "train" / "cat" / "0.png", tree / "val" / "dog" / "9.png")
    sets = {"id_val": folder("other"), "ood_val": {"noise": corrupted(folder("val"))}}
    with pytest.raises(HoldOutError, match=r"data\.ood_val\.noise\.of: .* must not share images with data\.train"):
        check_overlap(recipe_of(**sets), tree / "cache")
    shutil.copy(tree / "other" / "cat" / "0.png", tree / "val" / "dog" / "9.png")
    check_overlap(recipe_of(**sets), tree / "cache")
    with pytest.raises(HoldOutError, match=r"data\.ood_val\.x: .* must not share images with data\.id_val"):
        check_overlap(recipe_of(id_val=folder("other"), ood_val={"x": folder("val")}), tree / "cache")


def test_keys_and_paths_of_the_images_are_those_below_of(tree):
    recipe = recipe_of(ood_val={"x": corrupted(folder("none"))}, ood_test={"y": corrupted(folder("nowhere"))})
    assert [problem.place for problem in check_sets(recipe)] == ["data.ood_val.x.of", "data.ood_test.y.of"]
    with pytest.raises(DataError, match="the root of the image tree must be a folder"):
        open_validation(recipe)
    recipe = absolute_paths(recipe_of(ood_val={"x": corrupted(folder("val"))}), tree)
    assert recipe.data.ood_val["x"].of.path == str(tree / "val")
    assert class_of(("data", "ood_val", "x", "of", "path")) == "running"
    assert class_of(("data", "train", "of", "domains")) == "identity"
    assert class_of(("data", "ood_val", "x", "of")) == class_of(("data", "ood_val", "x", "severity")) == "identity"


@pytest.mark.slow
def test_the_manifest_holds_what_is_seen_and_what_was_skipped(tree, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    (tree / "val" / "cat" / "3.png").write_bytes(b"no image")
    skipping = folder("val", on_bad_image="skip")
    seen = {"weak": corrupted(skipping, severity=1), "strong": corrupted(skipping, severity=5)}
    recipe, names = recipe_of(id_val=skipping, ood_val=seen), ("id_val", "weak", "strong")
    found = set_contents(recipe)
    assert [found[name]["num_skipped"] for name in names] == [1, 1, 1]
    assert len({found[name]["digest"] for name in names}) == 3
    sources = open_sets(recipe)
    check_overlap(recipe, cache_dir(recipe))
    monkeypatch.setattr(StoredSource, "content", None)  # the same without reading a file
    assert set_contents(recipe, SimpleNamespace(validation=(), sources=sources)) == found


@pytest.mark.slow
def test_a_training_is_validated_on_the_corruptions_of_its_id_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    seen = {name: corrupted(SANDBOX, severity=severity) for name, severity in (("weak", 1), ("strong", 5))}
    data = {"train": {**SANDBOX, "split": "train"}, "id_val": SANDBOX, "ood_val": seen}
    recipe = {"data": data, "train": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3}}
    Path("noise.yaml").write_text(json.dumps(recipe))
    assert crash_host.call(["train", "noise.yaml", "--out", "run", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert {"accuracy/id_val", "accuracy/weak", "accuracy/strong"} <= set(metrics)
    assert metrics["accuracy/strong"] < metrics["accuracy/weak"] + 0.05
