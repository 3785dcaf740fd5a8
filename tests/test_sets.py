"""From roles to sets: what the checks say, one role per image, and test sets that nobody touches."""

import time
from pathlib import Path

import pytest
from layouts_tables import pictures, write_folder
from sources import open_train, open_validation

from carft_ray.data.cache import cache_dir
from carft_ray.data.class_names import class_names
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.errors import DataError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe

ROLES = ("train", "id_val", "sketch_val", "id_test", "sketch_test")


def write_tree(root, classes=("bird", "fire_truck")):
    """One domain per role, three images per class."""
    for seed, domain in enumerate(ROLES):
        write_folder(root / domain, pictures(3, classes, seed))


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


def sandbox_recipe(data=None, **parts):
    def drawn(domain, split):
        return {"source": "sandbox", "domain": domain, "split": split, "num_per_class": 2}

    tests = {"id_test": drawn("photo", "test"), "ood_test": {"other": drawn("cartoon", "test")}}
    sets = {"train": drawn("photo", "train"), "id_val": drawn("photo", "val"), **tests}
    return recipe_of({**sets, "ood_val": {"sketch": drawn("sketch", "val")}, **(data or {})}, **parts)


def recipe_of(data, **parts):
    recipe = Recipe.model_validate({"data": data, "train": {"batch_size": 4}, **parts})
    return absolute_paths(recipe, Path.cwd())


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images")
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


def test_words_for_the_prompts(base):
    assert class_names(folder_recipe()) == ("bird", "fire truck")
    assert class_names(folder_recipe(prompts={"class_names": ["a", "b"]})) == ("a", "b")
    with pytest.raises(DataError, match=r"prompts\.class_names: there must be one text per class"):
        class_names(folder_recipe(prompts={"class_names": ["a"]}))


def test_cache_dir_is_absolute_and_follows_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir(sandbox_recipe()) == tmp_path / ".cache" / "carft-ray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_dir(sandbox_recipe()) == tmp_path / "other" / "carft-ray"
    assert cache_dir(sandbox_recipe({"cache_dir": "decoded"})) == tmp_path / "decoded"


def test_check_compares_with_data_classes_where_training_folders_are_missing(base):
    recipe = folder_recipe({"train": folder_set("trian"), "classes": ["bird", "lorry"]})
    found = texts(check_sets(recipe))
    assert [text.split(":")[0] for text in found] == ["data.train", *["data.id_val"] * 2, *["data.ood_val.sketch"] * 2]


def test_check_refuses_a_batch_larger_than_the_training_set_wherever_it_stands(base):
    baselines = {"big": {"batch_size": 64}, "plain": {"kl_weight": 0.0}}
    space = {"batch_size": {"type": "categorical", "choices": [2, 8]}}
    recipe = folder_recipe(train={"batch_size": 7}, search={"space": space, "baselines": baselines})
    rule = "must be at most the size of the training set, {} images, in train, search.space and baselines, but got"
    assert texts(check_sets(recipe)) == [f"batch_size: {rule.format(6)} 64"]
    assert texts(check_sets(sandbox_recipe(train={"batch_size": 33}))) == [f"batch_size: {rule.format(32)} 33"]


def test_check_refuses_words_that_do_not_go_with_the_classes_and_a_single_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "images", classes=("bird",))
    words, single = texts(check_sets(folder_recipe(prompts={"class_names": ["a", "b"]}, train={"batch_size": 2})))
    assert words.startswith("prompts.class_names: there must be one text per class, in label order (1: bird")
    assert single.startswith("data.train: there must be at least two classes, but got 1")


def test_sets_without_common_images_and_two_sets_of_one_role_pass(base):
    assert check_roles(folder_recipe()) == check_roles(sandbox_recipe()) == []
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


def shard_recipe(folder, number, **other):
    """Three sets of so many shards each; no shard is opened."""
    sets = {}
    for name in ("train", "id_val", "id_test"):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            (folder / name / f"{index}.tar").touch()
        sets[name] = {"source": "webdataset", "path": str(folder / name)}
    return Recipe.model_validate({"data": {**sets, **other}, "train": {"batch_size": 4}})


def test_roles_of_many_shards_are_compared_by_set_and_not_each_shard_with_each(tmp_path):
    recipe, before = shard_recipe(tmp_path, 1000), time.process_time()
    assert check_roles(recipe) == []
    assert time.process_time() - before < 2  # each with each: 3 million pairs of paths


def test_shards_in_two_roles_are_told_once_for_two_sets_with_their_number(tmp_path):
    again = {"source": "webdataset", "path": str(tmp_path / "a" / "train" / "{1,3,4}.tar")}
    (problem,) = check_roles(shard_recipe(tmp_path / "a", 5, id_val=again))
    assert (problem.place, problem.value) == ("data.id_val", f"{tmp_path}/a/train/1.tar and 2 more")
    inner = shard_recipe(tmp_path / "b", 5, id_test={"source": "folder", "path": str(tmp_path / "b")})
    assert [problem.place for problem in check_roles(inner)] == ["data.id_test"] * 2
    first = shard_recipe(tmp_path / "c", 5, train={"source": "folder", "path": str(tmp_path / "c")})
    assert [problem.place for problem in check_roles(first)] == ["data.id_val", "data.id_test"]
