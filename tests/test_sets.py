"""From roles to sets: what the checks say, one role per image; which images of a tree belong to a set."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts_tables import CLASSES, pictures, write_folder
from sources import open_set, open_train, open_validation, recipe_of, told

from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_names
from carft_ray.data.duplicates.find_duplicates import digests_of_tests
from carft_ray.data.duplicates.shared_images import find_shared
from carft_ray.data.records import without_bad_images
from carft_ray.data.role_checks import check_roles, check_sets


def folder_set(*domains, path="images"):
    return {"source": "folder", "path": path, "domains": list(domains)}


def folder_recipe(data=None, **parts):
    sets = {
        "train": folder_set("train"),
        "id_val": folder_set("id_val"),
        "ood_val": {"sketch": folder_set("sketch_val")},
        "id_test": folder_set("id_test"),
        "ood_test": {"other": folder_set("sketch_test")},
    }
    return recipe_of({**sets, **(data or {})}, **parts)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, domain in enumerate(("train", "id_val", "sketch_val", "id_test", "sketch_test")):
        write_folder(tmp_path / "images" / domain, pictures(3, ("bird", "fire_truck"), seed))
    return tmp_path


def texts(problems):
    return [str(problem) for problem in problems]


def test_folders_open_with_the_classes_of_train_or_those_of_the_recipe(base):
    recipe = folder_recipe()
    assert check_sets(recipe) == []
    train = open_train(recipe)
    id_val, ood_val = open_validation(recipe)
    assert (train.name, id_val.name, list(ood_val)) == ("train", "id_val", ["sketch"])
    for source in (train, id_val, *ood_val.values()):
        assert source.class_names == ("bird", "fire_truck")
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    recipe = folder_recipe({"classes": ["fire_truck", "bird"]})
    assert open_train(recipe).class_names == ("fire_truck", "bird")
    assert open_validation(recipe)[0].labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert class_names(recipe) == ("fire truck", "bird")  # words for the prompts
    assert class_names(folder_recipe(prompts={"class_names": ["a", "b"]})) == ("a", "b")


def test_cache_dir_is_absolute_and_follows_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir(folder_recipe()) == tmp_path / ".cache" / "carft-ray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_dir(folder_recipe()) == tmp_path / "other" / "carft-ray"
    assert cache_dir(folder_recipe({"cache_dir": "decoded"})) == tmp_path / "decoded"


def test_check_compares_with_data_classes_where_training_folders_are_missing(base):
    recipe = folder_recipe({"train": folder_set("trian"), "classes": ["bird", "lorry"]})
    places = ["data.train", *["data.id_val"] * 2, *["data.ood_val.sketch"] * 2]
    assert [problem.place for problem in check_sets(recipe)] == places


def test_check_refuses_a_batch_larger_than_the_training_set_wherever_it_stands(base):
    baselines = {"big": {"batch_size": 64}, "plain": {"kl_weight": 0.0}}
    space = {"batch_size": {"type": "categorical", "choices": [2, 8]}}
    recipe = folder_recipe(train={"batch_size": 7}, search={"space": space, "baselines": baselines})
    rule = "must be at most the size of the training set, {} images, in train, search.space and baselines, but got"
    assert texts(check_sets(recipe)) == [f"batch_size: {rule.format(6)} 64"]


def test_check_refuses_words_that_do_not_go_with_the_classes_and_a_single_class(base):
    for folder in base.glob("images/*/fire_truck"):
        shutil.rmtree(folder)
    words, single = texts(check_sets(folder_recipe(prompts={"class_names": ["a", "b"]}, train={"batch_size": 2})))
    assert words.startswith("prompts.class_names: there must be one text per class, in label order (1: bird")
    assert single.startswith("data.train: there must be at least two classes, but got 1")


def test_sets_without_common_images_and_two_sets_of_one_role_pass(base):
    assert check_roles(folder_recipe()) == []
    both = {"one": folder_set("sketch_val"), "both": folder_set("sketch_val")}
    assert check_roles(folder_recipe({"ood_val": both})) == []


@pytest.mark.parametrize("path", ["images", "images/../images", "linked", "images/fresh/.."])
def test_a_folder_in_two_roles_is_told_however_it_is_written(base, path):
    (base / "linked").symlink_to(base / "images")
    (base / "images" / "fresh").symlink_to(base / "images" / "sketch_val")
    recipe = folder_recipe({"ood_test": {"again": folder_set("fresh", path=path)}})
    (problem,) = texts(check_roles(recipe))
    rule = "data.ood_test.again: a set has one role and must not share images with data.ood_val.sketch"
    assert problem.startswith(rule)
    assert str(base / "images" / "sketch_val") in problem


def test_a_test_role_behind_a_closed_folder_is_not_a_problem(base, monkeypatch):
    plain = Path.stat

    def stat(path, **more):
        if "hidden" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, **more)

    monkeypatch.setattr(Path, "stat", stat)  # no folder is closed to root
    assert check_sets(folder_recipe({"ood_test": {"other": folder_set("sketch_test", path="hidden")}})) == []


def test_shards_in_two_roles_are_told_once_for_two_sets_with_their_number(tmp_path):
    sets = {}
    for name in ("train", "id_val", "id_test"):
        (tmp_path / name).mkdir()
        for index in range(5):
            (tmp_path / name / f"{index}.tar").touch()  # which is not opened
        sets[name] = {"source": "webdataset", "path": str(tmp_path / name)}
    again = {"source": "webdataset", "path": str(tmp_path / "train" / "{1,3,4}.tar")}
    (problem,) = check_roles(recipe_of({**sets, "id_val": again}))
    assert (problem.place, problem.value) == ("data.id_val", f"{tmp_path}/train/1.tar and 2 more")
    above = {"source": "folder", "path": str(tmp_path)}
    for name, places in (("id_test", ["data.id_test"] * 2), ("train", ["data.id_val", "data.id_test"])):
        assert [problem.place for problem in check_roles(recipe_of({**sets, name: above}))] == places


# ---- which images of a tree belong to a set


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Three classes of forty images, without domains."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "images", pictures(40))
    return tmp_path


def chosen(tree, names=None, **selection):
    return open_set(names, base_dir=tree, source="folder", path="images", **selection)


def recipe_of_parts(tree, **sets):
    whole = {"source": "folder", "path": "images"}
    parts = {"train": {**whole, "part": [0.3, 1]}, "id_val": {**whole, "part": [0, 0.3]}}
    return recipe_of({**parts, "shared_images": "fail", **sets})


def test_parts_and_shots_are_disjoint_nested_and_drawn_by_their_seed(tree):
    whole = chosen(tree)
    assert (whole.class_names, whole.listing.names[0]) == (CLASSES, "bird/0.png")
    assert np.bincount(whole.labels).tolist() == [40, 40, 40]
    parts = [chosen(tree, part=part) for part in ([0, 0.25], [0.25, 0.6], [0.6, 1])]
    ids = [set(part.sample_ids.tolist()) for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 120
    assert [len(part) for part in parts] == [24, 50, 46]  # 30, 42 and 48 are expected
    one, five, other = (chosen(tree, shots=k, shots_seed=seed) for k, seed in ((1, 0), (5, 0), (5, 1)))
    assert np.bincount(five.labels).tolist() == [5, 5, 5]
    assert set(one.sample_ids.tolist()) < set(five.sample_ids.tolist())
    assert set(five.sample_ids.tolist()) != set(other.sample_ids.tolist())
    assert set(chosen(tree, part=[0, 0.25], shots=3).sample_ids.tolist()) < ids[0]


def test_a_set_of_some_classes_is_told_apart_between_those(tree):
    names = ("ant", "bird", "cat", "cow", "dog")
    source = chosen(tree, names, classes="some")
    assert source.groups == ((1,), (2,), (4,))
    assert sorted(set(source.labels.tolist())) == [1, 2, 4]
    assert "write classes: some" in told(chosen, tree, names)
    rule = "every class of a set must be in the class list, but got 'dog'"
    assert rule in told(chosen, tree, names[:4], classes="some")


def test_one_tree_may_be_cut_into_roles_by_parts_that_share_no_image(tree):
    recipe = recipe_of_parts(tree)
    assert check_roles(recipe) == check_sets(recipe) == []
    assert find_shared(recipe, tree / "cache") == []
    assert len(open_train(recipe)) + len(open_validation(recipe)[0]) == 120
    for other in ({"part": [0.2, 0.4]}, {"part": [0.3, 1]}, {}, {"shots": 2}, {"path": "images/bird"}):
        (problem,) = check_roles(recipe_of_parts(tree, id_val={"source": "folder", "path": "images", **other}))
        assert f"must not share images with data.train, but got {tree / other.get('path', 'images')}\n" in str(problem)


def test_a_set_without_images_and_more_shots_than_images_are_refused(tree):
    assert "at least one image, but got none of 120 in the part" in told(chosen, tree, part=[0, 1e-9])
    assert "every class must have 41 images, as shots says, but got 40 in 'bird'" in told(chosen, tree, shots=41)
    for path in tree.glob("images/*/*"):
        path.write_bytes(b"no image")
    text = told(without_bad_images, chosen(tree, on_bad_image="skip"), tree / "cache")
    assert "at least one image that can be decoded, but got none of 120" in text


def test_images_that_cannot_be_decoded_are_left_out_counted_and_found_once(tree, caplog, monkeypatch):
    sound = chosen(tree, on_bad_image="skip")
    assert without_bad_images(sound, tree / "cache") is sound
    for index in range(3):
        (tree / "images" / "cat" / f"{index}.png").write_bytes(b"no image")
    (tree / "images" / "dog" / "11.png").write_bytes((tree / "images" / "dog" / "12.png").read_bytes()[:60])
    source = chosen(tree, on_bad_image="skip")
    left = without_bad_images(source, tree / "cache")
    assert len(left) == 116
    assert [name.rsplit("images/")[1] for name in left.skipped] == [*(f"cat/{i}.png" for i in range(3)), "dog/11.png"]
    (line,) = caplog.messages
    assert "train: 4 of 120 images cannot be decoded and are left out (on_bad_image: skip): " in line
    assert line.count("must be a readable image") == 3  # the first ones
    assert "; carft-ray doctor RECIPE --json lists all in training and validation sets" in line
    assert len(without_bad_images(chosen(tree, on_bad_image="skip"), tree / "cache")) == 116
    assert caplog.messages == [line]
    assert left.identity != source.identity
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # test sets, too, are known in the cache of the recipe
    tested = {"source": "folder", "path": "images", "on_bad_image": "skip"}
    assert digests_of_tests(recipe_of_parts(tree, cache_dir="cache", id_test=tested), Path("cache")).keys() == {
        "id_test"
    }
