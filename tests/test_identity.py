"""What may change when a study goes on: every key of a recipe, through the open study and the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from recipe_keys import keys
from stand_in import make_recipe
from study_steps import run_search, searching
from test_search_spaces import FOLDER, base_of, first_of, key_id, source_of, unique_keys

from carft_ray import files
from carft_ray.errors import RecipeError
from carft_ray.recipe.loading import absolute_paths, dump_recipe, load_recipe
from carft_ray.recipe.schema.fields import resume_of
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.identity import study_recipe
from carft_ray.study.opening import open_study
from carft_ray.study.rows import baselines

KEYS = [key for key in unique_keys() if key.name != "format_version"]  # which has one value
# where the example of the schema is what the quickstart has already, or is refused for another reason
VALUES = {
    "model.name": "[model={name: ViT-B-32, pretrained: openai}]",
    "model.pretrained": "[model={name: ViT-B-32, pretrained: openai}]",
    "data.train": "{source: sandbox, domain: photo, split: train, num_per_class: 31}",
    "data.id_val": "{source: sandbox, domain: photo, split: val, num_per_class: 124}",
    "data.id_test": "{source: sandbox, domain: photo, split: test, num_per_class: 124}",
    "data.classes": "[arrow, star]",
    "<set>.source": "[data.train={source: folder, path: images, domains: [photo]}]",
    "<set>.domain": "sketch",
    "<set>.path": "elsewhere",
    "<set>.domains": "[other]",
    "prompts.class_names": "[a, b]",
    "train.kl_weight": "5.0",
    "train.batch_size": "32",
    "train.alpha": "0.5",
    "train.clip_norm": "2.0",
    "search.space": "{learning_rate: {low: 1e-4, high: 5e-3}}",
    "search.space.<parameter>.type": "[search.space.weight_decay={type: categorical, choices: [0.05, 0.1]}]",
    "search.space.<parameter>.low": "1e-3",
    "search.space.<parameter>.high": "0.5",
    "search.space.<parameter>.log": "true",
    "search.space.<parameter>.step": "[search.space.weight_decay={low: 0.1, high: 0.9, step: 0.2}]",
    "search.space.<parameter>.choices": "[search.space.decay={choices: [all]}]",
    "search.space.<parameter>.when": "{head_bias: true}",
    "search.alpha.mode": "[search.alpha.mode=sample, 'search.space.alpha={low: 0.5, high: 1}']",
    "search.objective.kind": "harmonic",
    "search.sampler.name": "random",
    "search.baselines": "{fine_tuning: {kl_weight: 0, epochs: 2}}",
    "resources.num_workers": "2",
}
BEFORE = [
    "search.space.weight_decay={low: 0.01, high: 1.0}",
    "search.space.head_bias={choices: [true, false]}",
    "search.space.decay={choices: [all, matrices]}",
    "search.baselines={fine_tuning: {kl_weight: 0}}",
]


def place_of(name):
    parameter = "decay" if name.endswith(".choices") else "weight_decay"
    return name.replace("<set>", "data.train").replace("<parameter>", parameter)


def changed(key, base):
    """Returns the recipe at ``base`` with another value of a key."""
    written = VALUES.get(key.name) or keys.flow(key.field.examples[0])
    if written.startswith(("[model=", "[data.", "[search.")):
        overrides = [word.strip(" '") for word in re.split(r", (?='?search\.space)", written[1:-1])]
    else:
        overrides = [*first_of(key), f"{place_of(key.name)}={written}"]
    return load_recipe(base, overrides)


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Gives per source of ``data.train`` a recipe and a study of it."""
    folder = tmp_path_factory.mktemp("studies")
    found = {}
    for key in KEYS:
        (name, first), source = base_of(key), source_of(key)
        if source not in found:
            path = folder / f"{source}.yaml"
            path.write_text(dump_recipe(load_recipe(FOLDER / f"{name}.yaml", BEFORE if source == "sandbox" else first)))
            recipe = load_recipe(path)
            go_on(folder / source, recipe)
            found[source] = (path, recipe, folder / source)
    return found


def go_on(study_dir, recipe, *change_space):
    """Opens a study, as a search does that finds nothing to do; returns its recipe."""
    with open_study(study_dir, recipe, *change_space) as study:
        return study.recipe


def refused(study_dir, recipe, match, *change_space):
    with pytest.raises(RecipeError, match=match) as caught:
        go_on(study_dir, recipe, *change_space)
    return str(caught.value)


@pytest.mark.parametrize("key", KEYS, ids=key_id)
def test_a_key_changes_as_its_class_says(key, studies, tmp_path):
    path, old, study_dir = studies[source_of(key)]
    recipe, kind = changed(key, path), resume_of(key.field).kind
    assert recipe != old
    if kind == "space":  # the others change nothing in the study
        study_dir = Path(shutil.copytree(study_dir, tmp_path / "study"))
    before = (study_dir / "manifest.json").read_bytes()
    if kind == "running":
        assert go_on(study_dir, recipe) == recipe
        assert study_recipe(study_dir).search.space == old.search.space
        return
    place = place_of(key.name)
    top = place.rsplit(".", 1)[0] if key.name.endswith((".type", ".source", ".name")) else place
    message = refused(study_dir, recipe, re.escape(top))
    assert f"as in {study_dir}" in message
    assert ("--change-space" in message) == (kind == "space")
    if kind == "space":
        assert go_on(study_dir, recipe, True) == recipe
        assert study_recipe(study_dir).search.space == recipe.search.space
    else:
        refused(study_dir, recipe, re.escape(top), True)
        assert (study_dir / "manifest.json").read_bytes() == before


def test_a_baseline_may_be_added_and_is_trained_next(tmp_path):
    study_dir = tmp_path / "study"
    run_search(study_dir, make_recipe(2))
    more = {"plain": {"kl_weight": 0}, "strong": {"kl_weight": 9}}
    assert [spec.name for spec in run_search(study_dir, make_recipe(2, baselines=more))] == ["strong"]
    assert [row.name for row in baselines(study_dir)] == ["plain", "strong"]
    assert set(study_recipe(study_dir).search.baselines) == {"plain", "strong"}
    for other in ({"strong": {"kl_weight": 9}}, {**more, "strong": {"kl_weight": 8}}):
        refused(study_dir, make_recipe(2, baselines=other), r"search\.baselines\.(plain|strong)")


def test_compile_auto_is_what_the_study_has_and_nothing_else_takes_its_place(tmp_path):
    def with_compile(value):
        return make_recipe(2, train={"compile": value})

    for begun in (True, False, "auto"):
        go_on(tmp_path / f"{begun}", with_compile(begun))
        assert go_on(tmp_path / f"{begun}", with_compile("auto")) == with_compile("auto")
    for other in (True, False):
        refused(tmp_path / "auto", with_compile(other), r"train\.compile: must be \"auto\" as in")


def test_class_names_may_move_between_the_recipe_and_a_file_that_has_the_same(tmp_path):
    """As `submit` does, which sends what it has read."""
    for name, text in {"same.txt": "cat\ndog\n", "other.txt": "dog\ncat\n"}.items():
        (tmp_path / name).write_text(text)

    def recipe(names):
        names = str(tmp_path / names) if isinstance(names, str) else names
        images = {"source": "webdataset", "path": "/far", "label": "cls", "class_names": names}
        base = make_recipe(2).model_dump(mode="json")
        return Recipe.model_validate({**base, "data": {"train": images, "id_val": images}})

    go_on(tmp_path / "study", recipe("same.txt"))
    go_on(tmp_path / "study", recipe(["cat", "dog"]))
    for other in (["dog", "cat"], None, "other.txt", "gone.txt"):
        refused(tmp_path / "study", recipe(other), "class_names")


def folder_recipe(base, **data):
    domains = {"train": "train", "id_val": "val", "id_test": "test"}
    sets = {role: {"source": "folder", "path": "images", "domains": [name]} for role, name in domains.items()}
    return absolute_paths(Recipe.model_validate({**make_recipe(2).model_dump(), "data": {**sets, **data}}), base)


def test_a_project_that_was_moved_goes_on_and_so_does_a_copy_of_the_study_alone(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("train", "val", "test"):
        for word in ("fish", "bird"):
            files.write_bytes(old / "images" / name / word / "1.png", f"{name} {word}".encode())
    run_search(old / "study", folder_recipe(old))
    (old / "study" / "resolved.yaml").write_text(dump_recipe(folder_recipe(old)))
    copy = Path(shutil.copytree(old / "study", tmp_path / "copy"))
    with searching(copy, load_recipe(copy / "resolved.yaml")) as study:
        assert study.done()
    old.rename(new)
    recipe = folder_recipe(new).model_copy(update={"search": make_recipe(3).search})
    assert [spec.number for spec in run_search(new / "study", recipe)] == [2]
    assert study_recipe(new / "study").data.id_test.path == str(new / "images")
    kept = json.loads((new / "study" / "manifest.json").read_text())["recipes"]
    assert [one["recipe"]["data"]["train"]["path"] for one in kept] == [str(old / "images")]


def test_test_images_move_only_together_with_the_training_images(tmp_path):
    study_dir = tmp_path / "study"
    go_on(study_dir, folder_recipe(tmp_path))
    other = {"source": "folder", "path": "others", "domains": ["test"]}
    refused(study_dir, folder_recipe(tmp_path, id_test=other), r"data\.id_test\.path: must be .*images")
    study_dir = tmp_path / "table"
    spec = {"source": "table", "path": "images/test.csv", "class_names": "images/names.txt"}
    go_on(study_dir, folder_recipe(tmp_path, id_test=spec))
    for key, place in (("class_names", "other/names.txt"), ("root", "images"), ("path", "test.csv")):
        changed = folder_recipe(tmp_path, id_test={**spec, key: place})
        refused(study_dir, changed, rf"^data\.id_test\.{key}: must be ")
    (tmp_path / "moved").mkdir()
    go_on(study_dir, folder_recipe(tmp_path / "moved", id_test=spec))
    changed = folder_recipe(tmp_path / "moved", id_test={**spec, "class_names": ["a", "b"]})
    refused(study_dir, changed, r"data\.id_test\.class_names: must be ")


def test_a_refusal_names_all_keys_at_once_and_the_way_out(tmp_path):
    recipe, study_dir = load_recipe(FOLDER / "quickstart.yaml"), tmp_path / "first"
    go_on(study_dir, recipe)
    other = load_recipe(FOLDER / "quickstart.yaml", ["train.epochs=9", "evaluate.subset=9", "search.trials=9"])
    told = refused(study_dir, other, "evaluate.subset: must be ")
    assert told.startswith(f"train.epochs: must be {recipe.train.epochs} as in {study_dir}, but got 9\n")
    assert f"Continue with {study_dir / 'resolved.yaml'}, or give another folder." in told
