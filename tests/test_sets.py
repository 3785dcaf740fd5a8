"""From roles to sets: what the checks say, one role per image, and test sets that nobody touches."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import open_train, open_validation

from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_folders, class_names
from carft_ray.data.open_source import open_source
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.synthetic import sandbox
from carft_ray.errors import DataError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe

ROLES = ("train", "id_val", "sketch_val", "id_test", "sketch_test")


def write_tree(root, classes=("fire_truck", "bird")):
    """One domain per role, three images per class."""
    for number, domain in enumerate(ROLES):
        for label, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((4, 5, 3), 40 * number + 10 * label + i, dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )


def folder_set(*domains, path="images"):
    return {"source": "folder", "path": path, "domains": list(domains)}


def sandbox_set(domain="photo", split="train", num_per_class=2):
    return {"source": "sandbox", "domain": domain, "split": split, "num_per_class": num_per_class}


def folder_recipe(data=None, **parts):
    sets = {
        "train": folder_set("train"),
        "id_val": folder_set("id_val"),
        "ood_val": {"sketch": folder_set("sketch_val")},
        "id_test": folder_set("id_test"),
        "ood_test": {"other": folder_set("sketch_test")},
    }
    recipe = Recipe.model_validate({"data": sets | (data or {}), "train": {"batch_size": 4}, **parts})
    return absolute_paths(recipe, Path.cwd())


def sandbox_recipe(data=None, **parts):
    sets = {
        "train": sandbox_set(),
        "id_val": sandbox_set(split="val"),
        "ood_val": {"sketch": sandbox_set("sketch", "val")},
        "id_test": sandbox_set(split="test"),
        "ood_test": {"other": sandbox_set("cartoon", "test")},
    }
    recipe = Recipe.model_validate({"data": sets | (data or {}), "train": {"batch_size": 4}, **parts})
    return absolute_paths(recipe, Path.cwd())


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images")
    return tmp_path


def texts(problems):
    return [str(problem) for problem in problems]


# opening


def test_folders_open_with_the_classes_of_train(base):
    recipe = folder_recipe()
    assert check_sets(recipe) == []
    train = open_train(recipe)
    id_val, ood_val = open_validation(recipe)
    assert (train.name, id_val.name, list(ood_val)) == ("train", "id_val", ["sketch"])
    for source in (train, id_val, *ood_val.values()):
        assert source.class_names == ("bird", "fire_truck")
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.pixels(0)[0, 0].tolist() == [10, 10, 10]


def test_data_classes_gives_the_label_order(base):
    recipe = folder_recipe({"classes": ["fire_truck", "bird"]})
    assert check_sets(recipe) == []
    assert open_train(recipe).class_names == ("fire_truck", "bird")
    assert open_validation(recipe)[0].labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_sandbox_sets_open(tmp_path):
    recipe = sandbox_recipe()
    assert check_sets(recipe) == []
    id_val, ood_val = open_validation(recipe)
    assert len(open_train(recipe)) == len(id_val) == len(ood_val["sketch"]) == 2 * len(sandbox.CLASSES)
    assert class_folders(recipe) == id_val.class_names == sandbox.CLASSES


def test_sandbox_pictures_saved_as_a_tree_are_the_sandbox_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = sandbox.sandbox_source("sketch", "val", 2, "ood_val")
    for index in range(len(drawn)):
        folder = tmp_path / "images" / "sketch" / drawn.class_names[drawn.labels[index]]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(drawn.pixels(index))
        image.convert("RGBA" if index % 2 else "RGB").save(folder / f"{index:04d}.png")
    Image.new("L", (32, 32), 77).save(folder / "grey.png")
    read = open_source(folder_recipe({"train": folder_set("sketch")}).data.train, "train", None)
    assert read.class_names == drawn.class_names == sandbox.CLASSES
    assert read.labels.tolist() == [*drawn.labels.tolist(), len(sandbox.CLASSES) - 1]
    for index in range(len(drawn)):
        np.testing.assert_array_equal(read.pixels(index), drawn.pixels(index))
    np.testing.assert_array_equal(read.pixels(len(drawn)), np.full((32, 32, 3), 77))


def test_words_for_the_prompts(base):
    assert class_names(folder_recipe()) == ("bird", "fire truck")
    assert class_names(folder_recipe(prompts={"class_names": ["a", "b"]})) == ("a", "b")
    with pytest.raises(DataError, match=r"prompts\.class_names: there must be one text per class"):
        class_names(folder_recipe(prompts={"class_names": ["a"]}))


def test_an_absolute_path_and_the_home_folder_are_understood(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base))
    for path in (str(base / "images"), "~/images"):
        source = open_source(folder_recipe({"train": folder_set("train", path=path)}).data.train, "train", None)
        assert len(source) == 6


def test_cache_dir_is_absolute_and_follows_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir(sandbox_recipe()) == tmp_path / ".cache" / "carft-ray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_dir(sandbox_recipe()) == tmp_path / "other" / "carft-ray"
    assert cache_dir(sandbox_recipe({"cache_dir": "decoded"})) == tmp_path / "decoded"


# check_sets: everything at once, each with its key path


def test_check_names_every_missing_folder_at_once(base):
    recipe = folder_recipe(
        {
            "id_val": folder_set("id_vall"),
            "ood_val": {"sketch": folder_set("sketch_val", path="nowhere")},
            "ood_test": {"other": folder_set("none")},
        }
    )
    missing_domain, missing_root, missing_test = texts(check_sets(recipe))
    assert missing_domain.startswith("data.id_val: a domain must be a folder of")
    assert "'id_vall'; did you mean 'id_val'?" in missing_domain
    assert missing_root.startswith(f"data.ood_val.sketch: the root of the image tree must be a folder, but got {base}")
    assert missing_test.startswith("data.ood_test.other: a domain must be a folder of")


def test_check_compares_the_class_folders_of_every_set(base):
    (base / "images" / "id_val" / "bird").rename(base / "images" / "id_val" / "birds")
    unknown, missing = texts(check_sets(folder_recipe()))
    assert unknown.startswith(
        "data.id_val: every class of a set must be in the class list, but got 'birds'; did you mean 'bird'"
    )
    assert missing.startswith("data.id_val: every class must be there in every set, but got none for 'bird'")


def test_check_without_training_folders_does_not_compare_classes(base):
    (problem,) = texts(check_sets(folder_recipe({"train": folder_set("trian")})))
    assert problem.startswith("data.train: a domain must be a folder")


def test_check_compares_with_data_classes_where_training_folders_are_missing(base):
    recipe = folder_recipe({"train": folder_set("trian"), "classes": ["bird", "lorry"]})
    found = texts(check_sets(recipe))
    assert [text.split(":")[0] for text in found] == ["data.train", *["data.id_val"] * 2, *["data.ood_val.sketch"] * 2]


def test_check_refuses_a_batch_larger_than_the_training_set_wherever_it_stands(base):
    recipe = folder_recipe(
        train={"batch_size": 7},
        search={
            "space": {"batch_size": {"type": "categorical", "choices": [2, 8]}},
            "baselines": {"big": {"batch_size": 64}, "plain": {"kl_weight": 0.0}},
        },
    )
    found = texts(check_sets(recipe))
    rule = "must be at most the size of the training set, {} images, in train, search.space and baselines, but got"
    assert found == [f"batch_size: {rule.format(6)} 64"]
    assert texts(check_sets(sandbox_recipe(train={"batch_size": 33}))) == [f"batch_size: {rule.format(32)} 33"]


def test_check_names_an_unknown_sandbox_domain_with_the_nearest(tmp_path):
    recipe = sandbox_recipe(
        {"ood_val": {"sketch": sandbox_set("skech", "val")}, "id_test": sandbox_set("foto", "test")}
    )
    first, second = texts(check_sets(recipe))
    assert first.startswith("data.ood_val.sketch.domain: must be a domain of the sandbox, but got 'skech'")
    assert "did you mean 'sketch'?" in first
    assert second.startswith("data.id_test.domain: ")


def test_check_refuses_other_classes_for_sandbox_sets(tmp_path):
    recipe = sandbox_recipe({"classes": ["hart", *sandbox.CLASSES[1:]]})
    found = texts(check_sets(recipe))
    assert len(found) == 5
    assert "so the class list must be that too, but got" in found[0]
    with pytest.raises(DataError, match="so the class list must be that too, but got hart"):
        open_train(recipe)


def test_check_refuses_words_that_do_not_go_with_the_classes_and_a_single_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images", classes=("bird",))
    words, single = texts(check_sets(folder_recipe(prompts={"class_names": ["a", "b"]}, train={"batch_size": 2})))
    assert words.startswith("prompts.class_names: there must be one text per class, in label order (1: bird")
    assert single.startswith("data.train: there must be at least two classes, but got 1")


def test_what_the_checks_let_through_opens_and_what_opens_not_they_report(base):
    """The checks and ``open_...`` agree: the same folders, damaged one at a time."""
    images = base / "images"
    damages = [
        lambda: (images / "train" / "bird" / "0.png").unlink(),
        lambda: (images / "id_val" / "cat").mkdir(),
        lambda: (images / "sketch_val" / "bird").rename(images / "gone"),
    ]
    recipe, outcomes = folder_recipe(), []
    for damage in damages:
        damage()
        try:
            open_train(recipe)
            open_validation(recipe)
            opened = True
        except DataError:
            opened = False
        outcomes.append(opened)
        assert opened == (check_sets(recipe) == [])
    assert outcomes == [True, False, False]


# one role per image


def test_sets_without_common_images_pass(base):
    assert check_roles(folder_recipe()) == []
    assert check_roles(sandbox_recipe()) == []


@pytest.mark.parametrize("path", ["images", "images/../images", "linked"])
def test_a_folder_in_two_roles_is_told_however_it_is_written(base, path):
    (base / "linked").symlink_to(base / "images")
    recipe = folder_recipe({"ood_test": {"again": folder_set("sketch_val", path=path)}})
    (problem,) = texts(check_roles(recipe))
    assert problem.startswith(
        "data.ood_test.again: a set has one role and must not share images with data.ood_val.sketch"
    )
    assert str(base / "images" / "sketch_val") in problem


def test_a_link_to_a_domain_is_the_domain(base):
    (base / "images" / "fresh").symlink_to(base / "images" / "train")
    (problem,) = texts(check_roles(folder_recipe({"id_val": folder_set("fresh")})))
    assert problem.startswith("data.id_val: a set has one role and must not share images with data.train")


def test_a_sandbox_split_in_two_roles_is_told(base):
    recipe = sandbox_recipe({"id_test": sandbox_set(split="val", num_per_class=9), "id_val": sandbox_set()})
    (problem,) = texts(check_roles(recipe))
    assert "data.id_val: a set has one role" in problem
    assert "sandbox domain photo, split train" in problem
    recipe = sandbox_recipe({"id_test": sandbox_set(split="val", num_per_class=9)})
    assert len(check_roles(recipe)) == 1


def test_two_sets_of_one_role_may_share_images(base):
    recipe = folder_recipe({"ood_val": {"one": folder_set("sketch_val"), "both": folder_set("sketch_val")}})
    assert check_roles(recipe) == []


# test roles


OPENS_ALL_BUT_TESTS = """
import os
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sets import *
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[0]))) if event in EVENTS else None)
os.chdir(sys.argv[2])
recipe = folder_recipe()
print(check_roles(recipe), check_sets(recipe))
train = open_train(recipe)
id_val, ood_val = open_validation(recipe)
class_names(recipe)
for source in (train, id_val, *ood_val.values()):
    source.fingerprint
    for index in range(len(source)):
        source.pixels(index)
touched = [path for _, path in seen]
print(sum("train" in Path(p).parts for p in touched) > 6)
print([p for p in touched if {"id_test", "sketch_test"} & set(Path(p).parts)])
"""
EVENTS = ("open", "os.listdir", "os.scandir")


@pytest.mark.slow
def test_no_file_of_a_test_role_is_opened(base):
    """Neither opened nor listed: an unreadable image, wrong classes and a closed folder there do no harm."""
    (base / "images" / "id_test" / "bird" / "0.png").write_bytes(b"no image")
    (base / "images" / "sketch_test" / "no_class").mkdir()
    (base / "images" / "sketch_test").chmod(0o000)
    try:
        command = [sys.executable, "-c", OPENS_ALL_BUT_TESTS, str(Path(__file__).parent), str(base)]
        environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "HOME": str(base)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    finally:
        (base / "images" / "sketch_test").chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[] []", "True", "[]"]


def test_a_test_role_behind_a_closed_folder_is_not_a_problem(base):
    hidden = base / "hidden"
    (base / "images").rename(hidden)
    write_tree(base / "images")
    recipe = folder_recipe({"ood_test": {"other": folder_set("sketch_test", path="hidden")}})
    hidden.chmod(0o000)
    try:
        assert check_sets(recipe) == []
    finally:
        hidden.chmod(0o700)


# many shards


def shard_recipe(folder, number, *patterns):
    """Three sets of so many shards each; no shard is opened."""
    specs = []
    for name in ("train", "id_val", "id_test"):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            (folder / name / f"{index}.tar").touch()
        specs.append({"source": "webdataset", "path": str(folder / name)})
    roles = dict(zip(("train", "id_val", "id_test"), specs, strict=True))
    return Recipe.model_validate({"data": roles | dict(patterns), "train": {"batch_size": 4}})


def calls(work):
    """Returns how many functions are called."""
    found = 0

    def count(frame, event, arg):
        nonlocal found
        found += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


def test_roles_of_many_shards_are_compared_by_set_and_not_each_shard_with_each(tmp_path):
    few, many = (shard_recipe(tmp_path / str(number), number) for number in (20, 60))
    assert check_roles(few) == check_roles(many) == []
    assert calls(lambda: check_roles(many)) < 4 * calls(lambda: check_roles(few))


def test_shards_in_two_roles_are_told_once_for_two_sets_with_their_number(tmp_path):
    again = {"source": "webdataset", "path": str(tmp_path / "a" / "train" / "{1,3,4}.tar")}
    (problem,) = check_roles(shard_recipe(tmp_path / "a", 5, ("id_val", again)))
    assert (problem.place, problem.value) == ("data.id_val", f"{tmp_path}/a/train/1.tar and 2 more")
    outer = {"source": "folder", "path": str(tmp_path / "b")}
    inner = shard_recipe(tmp_path / "b", 5, ("id_test", outer))
    assert [problem.place for problem in check_roles(inner)] == ["data.id_test"] * 2
    first = shard_recipe(tmp_path / "c", 5, ("train", {"source": "folder", "path": str(tmp_path / "c")}))
    assert [problem.place for problem in check_roles(first)] == ["data.id_val", "data.id_test"]
