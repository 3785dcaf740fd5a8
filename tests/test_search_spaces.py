"""The recipes that users copy, and the tables that explain every key."""

import re
from pathlib import Path
from typing import get_args

import pytest
from recipe_keys import keys

from carft_ray.data.synthetic.sandbox import QUICKSTART_SETS
from carft_ray.recipe.checks.advice import check_searchable, warnings
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.fields import Class, members, not_searched, resume_of
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.schema.parameters import SEARCHABLE
from carft_ray.recipe.schema.sets import SandboxSet, SetSpec

FOLDER = Path(__file__).parents[1] / "search_spaces"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_every_recipe_validates_can_be_searched_has_no_idle_setting_and_stands_in_the_readme():
    readme = (FOLDER / "README.md").read_text()
    for path in RECIPES:
        recipe = load_recipe(path)
        assert (check_searchable(recipe), warnings(recipe)) == ([], []), path
        assert max(map(len, path.read_text().splitlines())) <= 120, path
        assert f"`{path.name}`" in readme


def test_the_folders_recipe_is_the_quickstart_on_the_exported_images():
    quickstart, folders = load_recipe(FOLDER / "quickstart.yaml"), load_recipe(FOLDER / "folders.yaml")
    assert folders.model_copy(update={"data": quickstart.data, "name": "quickstart"}) == quickstart
    assert folders.data.train.domains == ("photo_train",)
    for role in ("train", "id_val", "id_test"):
        assert getattr(quickstart.data, role) == QUICKSTART_SETS[role]["photo"]
    for role in ("ood_val", "ood_test"):
        assert getattr(quickstart.data, role) == QUICKSTART_SETS[role]
        domains = {name: spec.domains for name, spec in getattr(folders.data, role).items()}
        assert domains == {name: (name,) for name in QUICKSTART_SETS[role]}


def test_commented_lines_of_the_folders_recipe_are_valid_when_used(tmp_path):
    written = (FOLDER / "folders.yaml").read_text()
    used = re.sub(r"(?m)^( *)# ((classes|class_names|weight_decay|epochs|decay): )", r"\1\2", written)
    assert used.count("#") == written.count("#") - 5
    (tmp_path / "folders.yaml").write_text(used)
    real = [
        "model={name: ViT-B-16-quickgelu, pretrained: openai}",
        "search.space.learning_rate={low: 3e-7, high: 3e-5, log: true}",
        "search.space.kl_weight={low: 0.01, high: 100, log: true}",
    ]
    for line in real:
        assert line.rpartition("space.")[2].replace("=", ": ") in written
    recipe = load_recipe(tmp_path / "folders.yaml", [*real, "prompts.templates=openai"])
    assert warnings(recipe) == []
    assert set(recipe.search.space) == {"learning_rate", "kl_weight", "weight_decay", "epochs", "decay"}


# ---- the keys, and the tables that explain them


def unique_keys():
    """Returns every key of a recipe, once for each text that explains it."""
    explained = [key for key in keys.documented_keys() if key.field.description]
    return list({(key.name, key.field.description): key for key in reversed(explained)}.values())[::-1]


def key_id(key):
    return f"{key.name}-{source_of(key)}" if key.name.startswith("<set>.") else key.name


# source -> a training set of it, for sources that no recipe of the folder has
SETS: dict[str, str] = {
    "benchmark": "{source: benchmark, name: pacs, path: images, split: in}",
    "corrupted": "{source: corrupted, of: {source: folder, path: images}, severity: 3}",
    "table": "{source: table, path: images.csv}",
    "webdataset": "{source: webdataset, path: shards}",
    "huggingface": "{source: huggingface, path: saved}",
}


def source_of(key):
    """Returns the source of the first kind of set that has a key ``<set>.KEY``, else that of the quickstart."""
    kinds = [kind for kind in members(SetSpec) if issubclass(kind, key.part)]
    return get_args(kinds[0].model_fields["source"].annotation)[0] if kinds else "sandbox"


def first_of(key):
    """Returns what names a sampler or pruner that has a key."""
    if not key.name.startswith(("search.sampler.", "search.pruner.")) or key.name.endswith(".name"):
        return []
    own, shared = key.part.model_fields.get("name"), {"_Cutting": "median"}.get(key.part.__name__, "tpe")
    return [f"{key.name.rpartition('.')[0]}.name={own.default if own else shared}"]


def base_of(key):
    """Returns a recipe that may hold a key, by its name, and what has to be set in it first."""
    source = source_of(key)
    name = {"folder": "folders", **dict.fromkeys(SETS, "folders")}.get(source, "quickstart")
    return name, [f"data.train={SETS[source]}"] if source in SETS else []


@pytest.mark.parametrize("key", unique_keys(), ids=key_id)
def test_the_example_of_every_key_is_valid(key):
    base, first = base_of(key)
    place = key.name.replace("<set>", "data.train").replace("<parameter>", "weight_decay")
    before = ["search.space.weight_decay={low: 1e-5, high: 1}"] if "<parameter>" in key.name else first
    if key.name.endswith(".choices"):
        before = ["search.space.weight_decay={}"]
    if key.name.endswith(".when"):
        before += ["search.space.head_bias={choices: [true, false]}"]
    if key.name == "resources.executor":
        before = ["resources.num_workers=2"]
    options = [*before, *first_of(key), f"{place}={keys.flow(key.field.examples[0])}"]
    recipe = load_recipe(FOLDER / f"{base}.yaml", options)
    assert isinstance(recipe.data.train, SandboxSet) == (base == "quickstart")


@pytest.mark.slow
def test_every_key_says_what_it_means_and_whether_it_may_change():
    rows = [row.split(" | ") for table in keys.key_tables().values() for row in table[2:]]
    meanings = {cells[0]: cells[1] for cells in rows}
    for key in keys.documented_keys():
        assert meanings[f"| `{key.name}`"].strip("* "), key.name
        assert resume_of(key.field).kind in get_args(Class), key.name
        assert resume_of(key.field).why, key.name


def test_only_fields_of_train_say_that_they_cannot_be_searched():
    refused = {key.name for key in keys.documented_keys() if not_searched(key.field)}
    assert refused == {f"train.{name}" for name in TrainConfig.model_fields} - {f"train.{name}" for name in SEARCHABLE}


def test_a_stale_table_is_found_and_written_anew(tmp_path):
    root = FOLDER.parent
    assert keys.main(["--check"]) is None
    names = keys.made(root)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((root / name).read_text().replace("peak learning rate", "learning rate"))
    message = keys.main(["--check"], tmp_path)
    stale = "search_spaces/README.md, search_spaces/carft-ray.schema.json"
    assert message == f"not as the schema has them: {stale}; run: make tables"
    assert keys.main([], tmp_path) is None
    assert all((tmp_path / name).read_text() == (root / name).read_text() for name in names)
    with pytest.raises(ValueError, match=r"must have one place for each of \['a', 'b'\], but got \['a'\]"):
        keys.updated("<!-- keys: a -->\n<!-- end -->\n", {"a": ["x"], "b": ["y"]})
