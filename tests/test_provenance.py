"""The manifest says where a study's numbers come from: at once what is known, later data and model, never less."""

import json
import os
import shutil
import subprocess

import pytest
import short_study
import short_training
from sources import folder_source

from carft_ray import environment
from carft_ray.data import content
from carft_ray.errors import DataError
from carft_ray.launch.runs.single import train_once
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.study.identity import claim
from carft_ray.study.provenance import differences, identity_problems, record_provenance
from carft_ray.training.shared_inputs import load_shared_inputs


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with model, images, a secret test set, recipe, a training ``run`` and a study ``study``."""
    folder = tmp_path_factory.mktemp("here")
    path = short_training.make(folder)
    for label, name in enumerate(short_training.CLASSES):
        short_training.write_image(folder / "images" / "secret" / name / "0.png", label, 900)
    always = ["data.id_test={source: folder, path: images, domains: [secret]}", "train.epochs=1", "search.trials=1"]
    recipe = load_recipe(path, [f"data.cache_dir={folder / 'cache'}", "search.sampler.seed=11", *always])
    train_once(recipe, folder / "run", False, "", *3 * [lambda *words: None])
    short_study.search(folder / "study", recipe)
    return folder, recipe


@pytest.mark.slow
def test_a_claimed_folder_says_at_once_what_needs_no_data(here, tmp_path):
    folder, recipe = here
    claim(tmp_path, recipe)
    found = manifest(tmp_path)["provenance"]
    assert found["seeds"] == {"sampler": 11, "train": 0}
    assert found["code"] == environment.code()
    assert found["versions"] == environment.versions()
    assert found["hardware"]["threads"] == 1
    secret = {"source": "folder", "path": str(folder / "images"), "domains": ["secret"]}
    assert found["test_sets"] == {"id_test": secret}
    assert "data" not in found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "study"])
def test_after_the_preparation_the_manifest_says_data_and_model(here, name):
    folder, recipe = here
    found = manifest(folder / name)["provenance"]
    expected = {}
    for set_name, domain in (("train", "photo"), ("id_val", "photo_val"), ("sketch", "sketch")):
        source = folder_source(folder / "images", (domain,), None, set_name)
        expected[set_name] = {"digest": content.set_digest(source), "num_images": len(source)}
    assert found["data"] == expected
    assert found["classes"] == found["class_names"] == list(short_training.CLASSES)
    assert found["templates"] == list(recipe.prompts.templates)
    assert found["model"] == {"weights_hash": load_shared_inputs(recipe).clip.weights_hash}
    assert (found["augmentation"]["image_size"], found["augmentation"]["crop_scale"]) == (16, [0.9, 1.0])
    assert found["preparation"] == {"device": "cpu", "threads": environment.usable_cores(), "compile": False}
    assert found["hardware"]["gpus"] == []
    [path] = (folder / name / "trials").glob("*/*/result.json")
    made_on = json.loads(path.read_text())["environment"]
    assert made_on["source"] == environment.source_digest()
    assert (made_on["device"], made_on["threads"], made_on["num_workers"], made_on["compile"]) == ("cpu", 1, 1, False)


@pytest.mark.slow
def test_a_later_search_adds_other_versions_to_the_history_and_keeps_the_first(here, monkeypatch):
    folder, recipe = here
    study_dir = short_study.search(folder / "moved", recipe, num_attempts=0)
    first = manifest(study_dir)["provenance"]
    record_provenance(study_dir, recipe, None)  # without findings
    short_study.search(study_dir, recipe, num_attempts=0)
    assert manifest(study_dir)["provenance"] == first
    for number, version in enumerate(("9.8", "9.8", "9.9"), start=1):
        monkeypatch.setattr(environment, "versions", lambda version=version: {**first["versions"], "torch": version})
        short_study.search(study_dir, recipe, num_attempts=0)
        history = manifest(study_dir)["provenance"]["history"]
        assert [entry["versions"]["torch"] for entry in history] == ["9.8", "9.9"][: max(1, number - 1)]
    now = manifest(study_dir)["provenance"]
    now.pop("history")
    assert now == first


def test_a_study_does_not_go_on_where_names_views_or_what_auto_means_are_others():
    """Labels that are numbers have the names of their classes from elsewhere: the contents of the sets do not tell."""
    known = {"data": {}, "model": 1}
    known |= {"classes": ["cat", "dog"], "augmentation": {"view_version": 1}, "preparation": {"compile": True}}
    assert identity_problems(known, dict(known)) == []
    for part, now, told in (
        ("classes", ["dog", "cat"], 'data.classes: the classes must be as in the manifest, ["cat", "dog"], but got ['),
        ("augmentation", {"view_version": 2}, "code: the training views must be as in the manifest, 1, but got 2"),
        ("preparation", {"compile": False}, "train.compile: the meaning of auto must be as in the manifest, true, but"),
    ):
        (problem,) = identity_problems(known, {**known, part: now})
        assert str(problem).startswith(told)
    assert identity_problems({"data": {}, "model": 1}, {"data": {}}) == []  # of a test set, which has no views


@pytest.mark.slow
def test_images_may_move_or_be_touched_and_are_no_others(here):
    folder, recipe = here
    study_dir = short_study.search(folder / "moving", recipe, num_attempts=1)
    before, prepared = manifest(study_dir), (study_dir / "prepared" / "prepared.json").read_bytes()
    os.utime(folder / "images" / "photo" / "star" / "0.png")
    shutil.copytree(folder / "images", folder / "another")

    def among(images, cache):
        """The recipe with another cache: a process keeps what it has loaded for one, and this must look again."""
        text = dump_recipe(recipe).replace(f"{folder}/images", f"{folder}/{images}")
        (folder / "moved.yaml").write_text(text)
        return load_recipe(folder / "moved.yaml", [f"data.cache_dir={folder / cache}"])

    short_study.search(study_dir, among("images", "cache3"), num_attempts=0)
    assert (study_dir / "prepared" / "prepared.json").read_bytes() != prepared
    assert manifest(study_dir)["provenance"] == before["provenance"]
    short_study.search(study_dir, among("another", "cache4"), num_attempts=0)
    assert manifest(study_dir)["recipe"]["data"]["train"]["path"] == str(folder / "another")
    short_training.write_image(folder / "another" / "photo_val" / "star" / "0.png", 4, 12345)
    with pytest.raises(DataError, match=r"data\.id_val: the contents"):
        short_study.search(study_dir, among("another", "cache5"))


def test_git_state_tells_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.git_state(package) == (None, None)
    git("init")
    assert environment.git_state(package) == (None, None)  # not tracked: an installation inside somebody's checkout
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = environment.git_state(package)
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "notes.txt").write_text("beside the package")
    assert environment.git_state(package) == (commit, False)
    (package / "more.py").write_text("")
    assert environment.git_state(package) == (commit, True)
    monkeypatch.setenv("PATH", "")  # where there is no git
    assert environment.git_state(package) == (None, None)


def test_the_digest_of_the_code_changes_with_every_file(tmp_path):
    digests = [environment.source_digest(tmp_path)]
    for name, text in (("a.py", ""), ("b/c.py", "1"), ("b/c.py", "2"), ("b/d.py", "2")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        digests.append(environment.source_digest(tmp_path))
    (tmp_path / "readme.md").write_text("")
    assert environment.source_digest(tmp_path) == digests[-1]
    assert len(set(digests)) == 5


def test_differences_are_leaves_by_their_dotted_keys():
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 2, "c": (1, 2)}, "e": "x"}
    assert differences(before, now) == [("a.b", 1, 2), ("e", None, "x")]
