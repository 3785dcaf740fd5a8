"""Corruptions by the published formulas and code, sets under them, and the pictures of the sandbox."""

import hashlib
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from layouts_tables import pictures, write_folder
from PIL import Image
from pydantic import TypeAdapter
from sources import absolute_paths, open_validation, recipe_of, told
from torchvision.transforms.v2 import functional

from carft_ray.data import corruptions as module
from carft_ray.data import sandbox
from carft_ray.data.cache import cache_dir
from carft_ray.data.corruptions import CORRUPTIONS, corrupt, squared
from carft_ray.data.duplicates.shared_images import find_shared
from carft_ray.data.listing import StoredSource
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.sandbox import CLASSES, SandboxSource, export_images, render
from carft_ray.data.sets import open_sets, open_source
from carft_ray.errors import DataError, UsageError
from carft_ray.recipe.schema.data import SetSpec
from carft_ray.study.recipe_identity import class_of
from carft_ray.training.origin import set_contents
from carft_ray.training.shared_inputs import forget_inputs, load_shared_inputs

WITHOUT_DRAWS = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")

# PSNR in dB of ``picture()`` under the package imagecorruptions 1.1.2, whose code is the published one but for motion
# blur (ImageMagick written anew) and elastic_transform (other constants): means over 24 draws, glass_blur over 3
PUBLISHED_PSNR = {
    "gaussian_noise": (22.0, 18.6, 15.3, 12.7, 10.4),
    "shot_noise": (21.2, 17.6, 14.7, 11.5, 9.8),
    "impulse_noise": (20.6, 17.6, 15.8, 13.0, 11.0),
    "defocus_blur": (26.8, 25.9, 24.4, 23.4, 22.5),
    "glass_blur": (25.6, 25.8, 22.7, 23.2, 22.6),
    "motion_blur": (25.5, 23.3, 21.7, 20.4, 19.8),
    "zoom_blur": (22.8, 21.7, 21.4, 20.8, 20.3),
    "snow": (14.7, 10.4, 10.5, 8.8, 7.4),
    "fog": (15.8, 15.0, 14.2, 14.0, 13.8),
    "brightness": (22.3, 16.3, 13.3, 11.5, 10.7),
    "contrast": (18.4, 17.0, 15.9, 14.8, 14.4),
    "pixelate": (29.5, 30.3, 26.9, 26.2, 27.8),
    "jpeg_compression": (28.6, 28.1, 27.7, 26.7, 25.6),
}
DRAWN_FAR_APART = {"fog": 0.8}  # dB; the others agree within 0.3


def picture(height=224, width=224):
    """A synthetic scene of whole-number arithmetic: a sky that fades, a chequered ground, two discs, fine grain."""
    down, right = np.indices((height, width)) * 224 // min(height, width)
    grain = (down * 7 + right * 13 + down * right) % 23
    scene = np.stack([90 + down // 2, 120 + right // 4, 210 - down // 2], axis=-1)
    tiles = (down // 16 + right // 16) % 2 == 0
    scene[down > 130] = [70, 95, 50]
    scene[(down > 130) & tiles] = [150, 130, 90]
    scene[(down - 90) ** 2 + (right - 70) ** 2 < 45**2] = [220, 60, 40]
    scene[(down - 120) ** 2 + (right - 165) ** 2 < 30**2] = [30, 40, 110]
    return (scene + grain[..., None] - 11).clip(0, 255).astype(np.uint8)


def psnr(x, y):
    return 10 * math.log10(255**2 / np.mean((x.astype(float) - y) ** 2))


# of gaussian_noise, shot_noise ...
GOLDEN = (
    "8f174155996e83b5 7a9c38c15405a5e8 7b7905907f835dfa 1e699a535d4db82c ca043b7d13f51d2f 2fda46549ad41d40 "
    "418b31ae18823f8d c5a63911bb501a4b f3692f4a2db01b57 d3bb6a099986ec3d de22a22e350486ec f43ebe39f98b68fc "
    "debeca16bc17c263 3418cf976cdeb557 c21ca63086060b28"
)


@pytest.mark.parametrize(("name", "golden"), list(zip(CORRUPTIONS, GOLDEN.split(), strict=True)))
def test_golden_bytes(name, golden):
    """A change here changes every stored set: raise CORRUPTION_VERSION with it."""
    small, large = picture(40, 48), picture(130, 120)
    images = [corrupt(small, name, severity, 7, 2**63 + 5) for severity in range(1, 6)]
    images += [corrupt(picture(64, 64), name, 4, 7, 11), corrupt(large, name, 3, 2**64 - 1, 11)]
    assert hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16] == golden


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_PSNR)
def test_each_is_as_strong_as_the_published_code(name):
    x, samples = picture(), 1 if name in WITHOUT_DRAWS else 8 if name in DRAWN_FAR_APART else 2
    measured = [
        np.mean([psnr(corrupt(x, name, severity, 0, sample), x) for sample in range(samples)])
        for severity in range(1, 6)
    ]
    np.testing.assert_allclose(measured, PUBLISHED_PSNR[name], atol=DRAWN_FAR_APART.get(name, 0.3))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 90), (32, 32), (33, 47), (119, 120), (160, 224)])
def test_every_size_is_corrupted_and_changed(size):
    x, flat = picture(*size), np.full((*size, 3), 255, dtype=np.uint8)
    for name in CORRUPTIONS:
        y = corrupt(x, name, 5, 0, 0)
        assert (y.shape, y.dtype) == (x.shape, np.uint8), name
        assert min(size) < 32 or 3 < psnr(y, x) < 40, name
        assert corrupt(flat, name, 5, 0, 0).shape == x.shape


# ---- sets under corruptions


SANDBOX = {"source": "sandbox", "domain": "photo", "split": "val", "num_per_class": 4}


def corrupted(of, **keys):
    return {"source": "corrupted", "of": of, "severity": 3, **keys}


def opened(spec):
    return open_source(TypeAdapter(SetSpec).validate_python(spec), "x", None)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Four folders, each with three classes of six images."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("train", "val", "test", "other")):
        write_folder(tmp_path / name, pictures(6, seed=seed))
    return tmp_path


def strict_recipe(**sets):
    """A recipe of which no two roles may share images."""
    return recipe_of({"train": folder("train"), "id_val": folder("val"), "shared_images": "fail", **sets})


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


def test_the_identity_and_the_contents_hold_all_that_is_seen_and_not_the_order_of_the_names():
    spec = corrupted(SANDBOX, corruptions=["fog", "snow"])
    first = opened(spec)
    assert first.identity.startswith(f"corrupted-{module.CORRUPTION_VERSION}/fog,snow/3/0/224/sandbox-")
    assert opened({**spec, "corruptions": ["snow", "fog"]}).identity == first.identity
    changes = [{"severity": 2}, {"seed": 1}, {"size": 64}, {"corruptions": ["fog"]}]
    changes.append({"of": {**SANDBOX, "split": "test"}})
    found = [first, *(opened({**spec, **change}) for change in changes)]
    assert len({other.identity for other in found}) == len({other.content(0) for other in found}) == 6


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
    recipe = strict_recipe(**sets)
    problems = check_roles(recipe)
    if shared is None:
        assert problems == check_sets(recipe) == []
        find_shared(recipe, tree / "cache")
    else:
        assert [f"must not share images with {shared}" in str(problem) for problem in problems] == [True]


def test_keys_and_paths_of_the_images_are_those_below_of(tree):
    recipe = strict_recipe(ood_val={"x": corrupted(folder("none"))}, ood_test={"y": corrupted(folder("nowhere"))})
    assert [problem.place for problem in check_sets(recipe)] == ["data.ood_val.x.of", "data.ood_test.y.of"]
    assert "the root of the image tree must be a folder" in told(open_validation, recipe)
    recipe = absolute_paths(strict_recipe(ood_val={"x": corrupted(folder("val"))}), tree)
    assert recipe.data.ood_val["x"].of.path == str(tree / "val")
    assert class_of(("data", "ood_val", "x", "of", "path")) == "running"
    assert class_of(("data", "train", "of", "domains")) == "identity"
    assert class_of(("data", "ood_val", "x", "of")) == class_of(("data", "ood_val", "x", "severity")) == "identity"


@pytest.mark.slow
def test_the_provenance_holds_what_is_seen_and_what_was_skipped(tree, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    (tree / "val" / "cat" / "3.png").write_bytes(b"no image")
    skipping = folder("val", on_bad_image="skip")
    seen = {"weak": corrupted(skipping, severity=1), "strong": corrupted(skipping, severity=5)}
    recipe, names = strict_recipe(id_val=skipping, ood_val=seen), ("id_val", "weak", "strong")
    found = set_contents(recipe)
    assert [found[name]["num_skipped"] for name in names] == [1, 1, 1]
    assert len({found[name]["digest"] for name in names}) == 3
    sources = open_sets(recipe)
    find_shared(recipe, cache_dir(recipe))
    monkeypatch.setattr(StoredSource, "content", None)  # the same without reading a file
    assert set_contents(recipe, SimpleNamespace(validation=(), sources=sources)) == found


def test_a_training_set_under_corruptions_is_made_once_and_smaller_if_asked(tree, monkeypatch):
    train = corrupted(folder("train"))
    sets = {"train": train, "id_val": folder("val"), "cache_dir": str(tree / "cache")}
    plain = load_shared_inputs(recipe_of({**sets, "pack": "never"})).train
    expected = [plain.pixels(index) for index in range(len(plain))]
    load_shared_inputs(recipe_of(sets))
    forget_inputs()
    with monkeypatch.context() as patched:
        patched.setattr("carft_ray.data.corruptions.corrupt", None)
        found = load_shared_inputs(recipe_of(sets)).train
        for index, pixels in enumerate(expected):
            np.testing.assert_array_equal(found.pixels(index), pixels)
    short_side = min(expected[0].shape[:2]) // 2
    smaller = load_shared_inputs(recipe_of({**sets, "resize_short_side": short_side, "pack": "never"})).train
    assert min(smaller.pixels(0).shape[:2]) == short_side


@pytest.mark.slow
def test_pictures_that_are_drawn_are_known_by_what_is_shown(tmp_path):
    sets = {"train": {**SANDBOX, "split": "train"}, "id_val": SANDBOX, "cache_dir": str(tmp_path)}
    recipe = recipe_of(sets)
    found = set_contents(recipe, load_shared_inputs(recipe))
    assert [found[name]["num_images"] for name in ("train", "id_val")] == [4 * len(CLASSES)] * 2
    assert found["train"]["digest"] != found["id_val"]["digest"]
    assert set_contents(recipe) == {}  # they would have to be drawn


# ---- the sandbox


def test_pictures_keep_their_attributes_between_versions():
    shown = render("photo", "train", "fish", 0)[1]
    assert (shown.figure_colour, shown.ground_colour, shown.mirrored) == ("blue", "red", False)
    assert (shown.scale, shown.angle) == pytest.approx((0.5166689684507908, -37.77741321207112), abs=1e-9)
    assert SandboxSource("photo", "train", 1, "train").sample_ids[0] == 1211625063335572033  # of an arrow


def test_a_longer_set_begins_with_the_pictures_of_a_shorter_one_and_has_all_classes_alike():
    short, long = (SandboxSource("photo", "train", count, "train") for count in (2, 5))
    np.testing.assert_array_equal(short.pixels(3), long.pixels(6))
    assert short.sample_ids[3] == long.sample_ids[6]
    assert short.identity != long.identity
    assert list(long.class_names) == sorted(long.class_names)
    assert np.bincount(long.labels).tolist() == [5] * len(CLASSES)
    assert (long.labels.dtype, long.sample_ids.dtype) == (np.int64, np.uint64)


@pytest.mark.slow
def test_no_sample_id_or_picture_is_shared_by_two_sets():
    ids, pictures = [], set()
    for domain in sandbox.DOMAINS:
        for split in sandbox.SPLITS:
            source = SandboxSource(domain, split, 20, domain)
            ids += source.sample_ids.tolist()
            pictures |= {source.pixels(i).tobytes() for i in range(0, len(source), 20)}
    assert len(set(ids)) == len(ids)
    assert len(pictures) == len(sandbox.DOMAINS) * len(sandbox.SPLITS) * len(CLASSES)


def test_an_unknown_domain_and_another_class_list_are_reported_at_once_with_the_nearest():
    spec = TypeAdapter(SetSpec).validate_python({**SANDBOX, "domain": "sketsh"})
    with pytest.raises(DataError) as caught:
        open_source(spec, "ood_val/sketch", ("sqare", *CLASSES[1:]))
    first, second = caught.value.problems
    assert (first.nearest, second.allowed) == ("sketch", CLASSES)


def test_export_writes_one_folder_per_set_with_the_pictures_of_the_source(tmp_path, monkeypatch):
    small = {
        role: {name: spec.model_copy(update={"num_per_class": 2}) for name, spec in sets.items()}
        for role, sets in sandbox.QUICKSTART_SETS.items()
    }
    monkeypatch.setattr(sandbox, "QUICKSTART_SETS", small)
    seen = []
    export_images(tmp_path / "images", lambda done, total: seen.append((done, total)))
    photos = {"photo_train", "photo_id_val", "photo_id_test"}
    folders = {path.name for path in (tmp_path / "images").iterdir()}
    assert folders == photos | set(small["ood_val"]) | set(small["ood_test"])
    for name in folders:
        assert {path.name for path in (tmp_path / "images" / name).iterdir()} == set(CLASSES)
    assert seen[-1] == (12 * 16 * 2, 12 * 16 * 2)
    path = tmp_path / "images" / "painting" / CLASSES[1] / "0001.png"
    drawn = SandboxSource("painting", "val", 2, "painting")
    np.testing.assert_array_equal(Image.open(path), drawn.pixels(3))
    files = folder(str(tmp_path / "images"), domains=["painting"])
    spec = {**SANDBOX, "domain": "painting", "num_per_class": 2}
    shared = find_shared(recipe_of({"train": files, "id_val": spec, "shared_images": "keep"}), tmp_path / "cache")
    assert {row.other_sample_id for row in shared} == {*drawn.sample_ids.tolist()}  # each picture is known in its file
    with pytest.raises(UsageError):  # the folder is not empty
        export_images(tmp_path)
    monkeypatch.setattr(sandbox, "QUICKSTART_SETS", {"ood_val": {"painting": small["ood_val"]["painting"]}})
    export_images(tmp_path / "silent")
    assert (tmp_path / "silent" / path.relative_to(tmp_path / "images")).read_bytes() == path.read_bytes()
