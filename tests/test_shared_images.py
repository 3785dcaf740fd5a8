"""Images that stand in two roles: who leaves, what is refused, the list of a study, and `exclude`."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import open_train, open_validation

from carft_ray import words
from carft_ray.data.copies.shared_images import (
    find_shared,
    read_shared,
    shared_counts,
    shared_lines,
    shared_of_study,
    without_shared,
    write_shared,
)
from carft_ray.data.listing import StoredSource, sample_id
from carft_ray.data.open_source import open_source
from carft_ray.data.readers import excluded_ids
from carft_ray.data.role_checks import check_sets
from carft_ray.errors import DataError, HoldOutError, StorageError
from carft_ray.layout import SHARED_IMAGES
from carft_ray.recipe.loading import load_recipe

CLASSES = ("cat", "dog")
RECIPE = """
format_version: 1
name: shared
model: {name: sandbox}
data:
  train: {source: folder, path: images, domains: [train]}
  id_val: {source: folder, path: images, domains: [val]}
  ood_val: {sketch: {source: folder, path: images, domains: [sketch]}}
  id_test: {source: folder, path: images, domains: [test]}
  ood_test: {paint: {source: folder, path: images, domains: [paint]}}
train: {batch_size: 4}
"""
NUM = {"train": 24, "val": 20, "sketch": 20, "test": 20, "paint": 20}  # images per class


def picture(seed, side=40):
    """Smooth hills of colour, as a photo has."""
    hills = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return hills.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for number, (domain, count) in enumerate(NUM.items()):
        for label, name in enumerate(CLASSES):
            (folder / "images" / domain / name).mkdir(parents=True)
            for index in range(count):
                picture([number, label, index]).save(folder / "images" / domain / name / f"{index}.png")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "here")
    return tmp_path / "here"


def copy(here, source, target, again=False):
    """Copies an image, or saves it again as JPEG."""
    path, there = here / "images" / source, here / "images" / target
    if again:
        Image.open(path).save(there.with_suffix(".jpg"), quality=90)
    else:
        shutil.copy(path, there)


def loaded(here, *options):
    return load_recipe(here / "recipe.yaml", list(options))


def found(here, *options):
    return find_shared(loaded(here, *options), here / "cache")


def leaving(rows):
    """Returns set and name of every image that leaves."""
    names = [(row.set, row.image, row.done) for row in rows]
    names += [(row.other_set, row.other_image, row.other_done) for row in rows]
    return sorted({(place, "/".join(Path(image).parts[-3:])) for place, image, done in names if done == "leaves"})


@pytest.mark.slow
def test_an_image_stays_in_the_role_nearest_to_the_test(here):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    copy(here, "test/dog/1.png", "val/dog/b.png", again=True)
    copy(here, "val/cat/3.png", "train/cat/c.png", again=True)
    copy(here, "sketch/cat/4.png", "val/cat/d.png")
    rows = found(here)
    assert leaving(rows) == [
        ("data.id_val", "val/cat/d.png"),
        ("data.id_val", "val/dog/b.jpg"),
        ("data.train", "train/cat/a.png"),
        ("data.train", "train/cat/c.jpg"),
    ]
    assert shared_counts(rows) == {"data.id_val": {"leaves": 2}, "data.train": {"leaves": 2}}
    assert shared_lines(rows) == [
        "data.id_val: 2 images left out, also in data.id_test and data.ood_val.sketch",
        "data.train: 2 images left out, also in data.id_test and data.id_val",
    ]
    assert {row.found_by for row in rows} == {"same bytes", "same picture"}


@pytest.mark.slow
def test_a_chain_over_three_roles_is_one_thing(here):
    """A in train is re-encoded in val, B; its bytes are C in the test: both leave, whichever pairs were found."""
    copy(here, "test/cat/5.png", "val/cat/b.png")
    copy(here, "val/cat/b.png", "train/cat/a.png", again=True)
    assert leaving(found(here)) == [("data.id_val", "val/cat/b.png"), ("data.train", "train/cat/a.jpg")]


@pytest.mark.slow
def test_every_copy_in_a_set_leaves(here):
    for name in ("a", "b", "c"):
        copy(here, "val/cat/0.png", f"train/cat/{name}.png")
    copy(here, "val/cat/0.png", "val/cat/again.png")
    copy(here, "val/cat/0.png", "train/dog/d.png", again=True)
    assert [name for _, name in leaving(found(here, "data.shared_limit=0.1"))] == [
        "train/cat/a.png",
        "train/cat/b.png",
        "train/cat/c.png",
        "train/dog/d.jpg",
    ]


@pytest.mark.slow
def test_test_sets_lose_no_image(here):
    copy(here, "test/cat/0.png", "paint/cat/x.png")
    rows = found(here)
    assert leaving(rows) == []
    assert shared_counts(rows) == {"data.id_test": {"stays": 1}, "data.ood_test.paint": {"stays": 1}}


@pytest.mark.slow
def test_pairs_are_found_once_and_what_takes_long_tells_the_time_left(here, monkeypatch):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    copy(here, "test/dog/1.png", "val/dog/b.png", again=True)
    monkeypatch.setattr(words, "FIRST_AFTER_S", 0)
    monkeypatch.setattr(words, "THEN_EVERY_S", 0)
    said = []
    rows = find_shared(loaded(here), here / "cache", said.append)
    assert len(rows) == 2
    for name, count in {"train": 49, "id_val": 41, "ood_val.sketch": 40, "id_test": 40}.items():
        begin = f"reading the images of data.{name}: 32 of {count}, about "
        assert any(line.startswith(begin) and line.endswith(" s left") for line in said)
    monkeypatch.setattr(StoredSource, "content", lambda *index: pytest.fail("an image was read again"))
    assert find_shared(loaded(here), here / "cache", said.append) == rows


@pytest.mark.slow
def test_a_corrupted_set_may_show_id_val_and_both_stay(here):
    copy(here, "val/cat/0.png", "train/cat/x.png")
    noise = "{source: corrupted, of: {source: folder, path: images, domains: [val]}, severity: 1, corruptions: [fog]}"
    recipe = loaded(here, f"data.ood_val={{noise: {noise}}}")
    rows = find_shared(recipe, here / "cache")
    assert leaving(rows) == [("data.train", "train/cat/x.png")]
    smaller = without_shared(recipe, rows)
    assert smaller.data.ood_val == recipe.data.ood_val
    assert len(open_train(smaller)) == 48


@pytest.mark.slow
def test_corrupted_images_leave_the_set_that_is_shown(here):
    copy(here, "test/cat/0.png", "val/cat/x.png")
    noise = "{source: corrupted, of: {source: folder, path: images, domains: [val]}, severity: 1, corruptions: [fog]}"
    recipe = loaded(here, f"data.ood_val={{noise: {noise}}}")
    smaller = without_shared(recipe, find_shared(recipe, here / "cache"))
    id_val, ood_val = open_validation(smaller)
    assert len(id_val) == len(ood_val["noise"]) == 40


@pytest.mark.slow
def test_keep_leaves_all_and_fail_refuses(here):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    rows = found(here, "data.shared_images=keep")
    assert leaving(rows) == []
    assert shared_lines(rows) == [
        "data.id_test: 1 image kept, also in data.train",
        "data.train: 1 image kept, also in data.id_test",
    ]
    with pytest.raises(HoldOutError, match=r"data\.id_test: .* must not share images with data\.train"):
        found(here, "data.shared_images=fail")


@pytest.mark.slow
def test_so_many_shared_images_mean_wrong_roles(here):
    shutil.copytree(here / "images" / "sketch", here / "images" / "same")
    with pytest.raises(HoldOutError, match=r"data\.train: at most 5 % .* 40 of 40 images") as error:
        found(here, "data.train.domains=[same]")
    assert "data.shared_images: keep" in str(error.value)
    assert "--pairs" in str(error.value)


@pytest.mark.slow
def test_a_test_set_without_images_is_passed_over_with_a_warning(here, caplog):
    for path in (here / "images" / "test").glob("*/*.png"):
        path.unlink()
    copy(here, "paint/cat/0.png", "train/cat/a.png")
    assert leaving(found(here)) == [("data.train", "train/cat/a.png")]
    assert "data.id_test: must have an image" in caplog.text


@pytest.mark.slow
def test_a_class_of_which_all_images_would_leave_is_refused(here):
    for path in sorted((here / "images" / "train" / "cat").glob("*.png"))[1:]:
        path.unlink()
    copy(here, "train/cat/0.png", "val/cat/x.png")
    with pytest.raises(HoldOutError, match=r"data\.train: every class must .* none in 'cat'"):
        found(here, "data.shared_limit=0.5")


@pytest.mark.slow
def test_parts_come_first(here):
    """A pair of which one image is outside the part of its set is none."""
    copy(here, "val/cat/0.png", "train/cat/x.png")
    fraction = sample_id("train/cat/x.png") / 2**64
    outside = f"[0, {fraction}]" if fraction > 0.5 else f"[{fraction + 1e-9}, 1]"
    assert found(here, f"data.train.part={outside}") == []


@pytest.mark.slow
def test_the_list_is_made_once_and_decides_what_is_opened(here, tmp_path):
    study, recipe = tmp_path / "study", loaded(here)
    study.mkdir()
    copy(here, "val/cat/0.png", "train/cat/x.png")
    told = []
    write_shared(study, shared_of_study(recipe, here / "cache", study, told.append))
    assert told[-1] == "data.train: 1 image left out, also in data.id_val"
    rows = read_shared(study)
    smaller = without_shared(recipe, rows)
    before, after = open_train(recipe), open_train(smaller)
    assert set(before.sample_ids.tolist()) - set(after.sample_ids.tolist()) == {sample_id("train/cat/x.png")}
    assert before.fingerprint != after.fingerprint
    assert not check_sets(smaller)
    copy(here, "val/cat/1.png", "train/cat/y.png")
    assert shared_of_study(recipe, here / "cache", study) == rows
    with (study / SHARED_IMAGES).open() as file:
        assert [row["found_by"] for row in csv.DictReader(file)] == ["same bytes"]


@pytest.mark.slow
def test_a_study_without_shared_images_keeps_an_empty_list(here, tmp_path):
    (tmp_path / "study").mkdir()
    write_shared(tmp_path / "study", shared_of_study(loaded(here), here / "cache", tmp_path / "study"))
    assert (tmp_path / "study" / SHARED_IMAGES).exists()
    assert read_shared(tmp_path / "study") == read_shared(tmp_path) == []


@pytest.mark.parametrize("text", ["set,image\na,b\n", "\x00", "set,image,sample_id,distance\na,b,c,d\n"])
def test_a_damaged_list_is_named(tmp_path, text):
    (tmp_path / SHARED_IMAGES).write_text(text)
    with pytest.raises(StorageError, match=f"{SHARED_IMAGES}: must be the list of shared images"):
        read_shared(tmp_path)


# exclude


@pytest.mark.slow
def test_excluded_images_leave_after_part_and_shots(here):
    ids = [sample_id("train/cat/0.png"), sample_id("train/dog/3.png")]
    (here / "list.txt").write_text(f"{ids[0]}\n\n{ids[1]}\n")
    (here / "list.csv").write_text(f"why,sample_id\nblurred,{ids[0]}\ntwice,{ids[1]}\n")
    for written in (f"[{ids[0]}, {ids[1]}]", "list.txt", "list.csv"):
        source = open_train(loaded(here, f"data.train.exclude={written}"))
        assert set(open_train(loaded(here)).sample_ids.tolist()) - set(source.sample_ids.tolist()) == set(ids)
    all_shots = open_train(loaded(here, "data.train.shots=24", "data.train.exclude=list.txt"))
    assert len(all_shots) == 46


def test_what_is_wrong_with_exclude_is_told(here):
    (here / "words.txt").write_text("train/cat/0.png\n")
    for written, message in {
        "[7]": r"train\.exclude: must name images of the set by their sample ids, but got 1, such as 7",
        "nowhere.txt": r"train\.exclude: must be a text file .* No such file",
        "words.txt": r"words.txt: every line must hold a sample id, a whole number .* 'train/cat/0.png'",
    }.items():
        recipe = loaded(here, f"data.train.exclude={written}")
        with pytest.raises(DataError, match=message):
            open_source(recipe.data.train, "data.train", None)
    assert excluded_ids((3, 4), "x").tolist() == [3, 4]
