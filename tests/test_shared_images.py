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


def copy(here, source, target):
    """Copies an image; as JPEG it is saved again."""
    path, there = here / "images" / source, here / "images" / target
    if there.suffix == ".jpg":
        Image.open(path).save(there, quality=90)
    else:
        shutil.copy(path, there)


def loaded(here, *options):
    return load_recipe(here / "recipe.yaml", list(options))


def found(here, *options):
    return find_shared(loaded(here, *options), here / "cache")


def leaving(rows):
    """Returns every image that leaves its set."""
    images = [(row.image, row.done) for row in rows] + [(row.other_image, row.other_done) for row in rows]
    return sorted({"/".join(Path(image).parts[-3:]) for image, done in images if done == "leaves"})


NOISE = "{source: corrupted, of: {source: folder, path: images, domains: [val]}, severity: 1, corruptions: [fog]}"
FRACTION = sample_id("train/cat/x.png") / 2**64  # where the image stands in its set
OUTSIDE = f"[0, {FRACTION}]" if FRACTION > 0.5 else f"[{FRACTION + 1e-9}, 1]"
# copies, as JPEG of the same picture alone; a setting; what leaves: an image stays in the role nearest to the test
ROLES = {
    "test and train": ("test/cat/0.png train/cat/a.png", "", "train/cat/a.png"),
    "test and validation": ("test/dog/1.png val/dog/b.jpg", "", "val/dog/b.jpg"),
    "validation and train": ("val/cat/3.png train/cat/c.jpg", "", "train/cat/c.jpg"),
    "two of validation": ("sketch/cat/4.png val/cat/d.png", "", "val/cat/d.png"),
    "two of test": ("test/cat/0.png paint/cat/x.png", "", ""),
    # A in train is re-encoded in val, B; its bytes are C in the test: both leave, whichever pairs were found
    "a chain": ("test/cat/5.png val/cat/b.png val/cat/b.png train/cat/a.jpg", "", "train/cat/a.jpg val/cat/b.png"),
    "every copy": (
        "val/cat/0.png train/cat/a.png val/cat/0.png train/cat/b.png val/cat/0.png val/cat/c.png "
        "val/cat/0.png train/dog/d.jpg",
        "data.shared_limit=0.1",
        "train/cat/a.png train/cat/b.png train/dog/d.jpg",
    ),
    "outside the part": ("val/cat/0.png train/cat/x.png", f"data.train.part={OUTSIDE}", ""),
    "shown under a corruption": ("val/cat/0.png train/cat/x.png", f"data.ood_val={{n: {NOISE}}}", "train/cat/x.png"),
    "kept": ("test/cat/0.png train/cat/a.png", "data.shared_images=keep", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "setting", "leave"), ROLES.values(), ids=ROLES)
def test_an_image_stays_in_the_role_nearest_to_the_test(here, copies, setting, leave):
    names = copies.split()
    for source, target in zip(names[::2], names[1::2], strict=True):
        copy(here, source, target)
    assert leaving(found(here, *filter(None, [setting]))) == leave.split()


@pytest.mark.slow
def test_what_leaves_or_is_kept_is_counted_and_told_by_set(here):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    copy(here, "test/dog/1.png", "val/dog/b.jpg")
    rows = found(here)
    assert shared_counts(rows) == {"data.id_val": {"leaves": 1}, "data.train": {"leaves": 1}}
    assert shared_lines(rows) == [
        "data.id_val: 1 image left out, also in data.id_test",
        "data.train: 1 image left out, also in data.id_test",
    ]
    assert {row.found_by for row in rows} == {"same bytes", "same picture"}
    (here / "images" / "val" / "dog" / "b.jpg").unlink()
    assert shared_lines(found(here, "data.shared_images=keep")) == [
        "data.id_test: 1 image kept, also in data.train",
        "data.train: 1 image kept, also in data.id_test",
    ]


@pytest.mark.slow
def test_corrupted_images_leave_the_set_that_is_shown(here):
    copy(here, "test/cat/0.png", "val/cat/x.png")
    recipe = loaded(here, f"data.ood_val={{noise: {NOISE}}}")
    smaller = without_shared(recipe, find_shared(recipe, here / "cache"))
    assert smaller.data.train == recipe.data.train
    id_val, ood_val = open_validation(smaller)
    assert len(id_val) == len(ood_val["noise"]) == 40


@pytest.mark.slow
def test_pairs_are_found_once_and_what_takes_long_tells_the_time_left(here, monkeypatch):
    copy(here, "test/cat/0.png", "train/cat/a.png")
    monkeypatch.setattr(words, "FIRST_AFTER_S", 0)
    monkeypatch.setattr(words, "THEN_EVERY_S", 0)
    said = []
    rows = find_shared(loaded(here), here / "cache", said.append)
    assert len(rows) == 1
    for name, count in {"train": 49, "id_val": 40, "ood_val.sketch": 40, "id_test": 40}.items():
        begin = f"reading the images of data.{name}: 32 of {count}, about "
        assert any(line.startswith(begin) and line.endswith(" s left") for line in said)
    monkeypatch.setattr(StoredSource, "content", lambda *index: pytest.fail("an image was read again"))
    assert find_shared(loaded(here), here / "cache", said.append) == rows


@pytest.mark.slow
def test_what_cannot_be_left_out_is_refused(here):
    shutil.copytree(here / "images" / "sketch", here / "images" / "same")
    shutil.copytree(here / "images" / "train", here / "images" / "few")
    for path in sorted((here / "images" / "few" / "cat").glob("*.png"))[1:]:
        path.unlink()
    copy(here, "few/cat/0.png", "val/cat/x.png")
    for setting, limit, message in (
        ("data.train.domains=[same]", 0.05, r"data\.train: at most 5 % .* 40 of 40 images"),
        ("data.train.domains=[few]", 0.5, r"data\.train: every class must .* none in 'cat'"),
        ("data.shared_images=fail", 0.05, r"data\.id_val: .* must not share images with data\.train"),
    ):
        with pytest.raises(HoldOutError, match=message) as error:
            found(here, setting, f"data.shared_limit={limit}")
    assert "--pairs" in str(error.value)


@pytest.mark.slow
def test_a_test_set_without_images_is_passed_over_with_a_warning(here, caplog):
    for path in (here / "images" / "test").glob("*/*.png"):
        path.unlink()
    copy(here, "paint/cat/0.png", "train/cat/a.png")
    assert leaving(found(here)) == ["train/cat/a.png"]
    assert "data.id_test: must have an image" in caplog.text


@pytest.mark.slow
def test_the_list_is_made_once_and_decides_what_is_opened(here, tmp_path):
    study, recipe, told = tmp_path / "study", loaded(here), []
    study.mkdir()
    write_shared(study, shared_of_study(recipe, here / "cache", study))
    assert (study / SHARED_IMAGES).exists()
    assert read_shared(study) == read_shared(tmp_path) == []
    (study / SHARED_IMAGES).unlink()
    copy(here, "val/cat/0.png", "train/cat/x.png")
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


@pytest.mark.parametrize("text", ["set,image\na,b\n", "\x00", "set,image,sample_id,distance\na,b,c,d\n"])
def test_a_damaged_list_is_named(tmp_path, text):
    (tmp_path / SHARED_IMAGES).write_text(text)
    with pytest.raises(StorageError, match=f"{SHARED_IMAGES}: must be the list of shared images"):
        read_shared(tmp_path)


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
