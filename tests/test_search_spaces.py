"""The recipes that users copy, and the README that explains every key."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic_core import PydanticUndefined

from carft_ray.data.sandbox import QUICKSTART_SETS
from carft_ray.recipe import text
from carft_ray.recipe.advice import check_searchable, warnings
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.recipe.messages import keys_of
from carft_ray.recipe.rules import SEARCHABLE
from carft_ray.recipe.schema import Part, Recipe, SandboxSet, TrainPart, core_type

FOLDER = Path(__file__).parents[1] / "search_spaces"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_validates_can_be_searched_and_has_no_idle_setting(path):
    recipe = load_recipe(path)
    assert check_searchable(recipe) == []
    assert warnings(recipe) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_has_short_lines_and_stands_in_the_readme(path):
    assert max(map(len, path.read_text().splitlines())) <= 120
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


def test_the_quickstart_has_the_sets_that_the_sandbox_exports():
    data = load_recipe(FOLDER / "quickstart.yaml").data
    assert data.train == QUICKSTART_SETS["train"]["photo"]
    assert data.id_val == QUICKSTART_SETS["id_val"]["photo"]
    assert data.id_test == QUICKSTART_SETS["id_test"]["photo"]
    assert data.ood_val == QUICKSTART_SETS["ood_val"]
    assert data.ood_test == QUICKSTART_SETS["ood_test"]


def test_the_folders_recipe_is_the_quickstart_on_the_exported_images():
    quickstart, folders = load_recipe(FOLDER / "quickstart.yaml"), load_recipe(FOLDER / "folders.yaml")
    assert folders.model_copy(update={"data": quickstart.data, "name": "quickstart"}) == quickstart
    assert folders.data.train.domains == ("photo_train",)
    for role in ("ood_val", "ood_test"):
        specs = getattr(folders.data, role)
        assert set(specs) == set(QUICKSTART_SETS[role])
        assert all(spec.domains == (name,) for name, spec in specs.items())


def test_commented_lines_of_the_folders_recipe_are_valid_when_used(tmp_path):
    written = (FOLDER / "folders.yaml").read_text()
    used = re.sub(r"(?m)^( *)# ((classes|class_names|weight_decay|epochs|decay): )", r"\1\2", written)
    assert used.count("#") == written.count("#") - 5
    path = tmp_path / "folders.yaml"
    path.write_text(used)
    real = [
        "model={name: ViT-B-16-quickgelu, pretrained: openai}",
        "prompts.templates=openai",
        "search.space.learning_rate={low: 3e-7, high: 3e-5, log: true}",
        "search.space.kl_weight={low: 0.01, high: 100, log: true}",
    ]
    for line in (
        "model: {name: ViT-B-16-quickgelu, pretrained: openai}",
        *(line.split("space.")[1] for line in real[2:]),
    ):
        assert line.replace("=", ": ") in written
    recipe = load_recipe(path, real)
    assert warnings(recipe) == []
    assert set(recipe.search.space) == {"learning_rate", "kl_weight", "weight_decay", "epochs", "decay"}


# ---- README: one table row per key


def _rows():
    rows = {}
    for line in (FOLDER / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 6 and cells[0].startswith("`"):
            assert cells[0] not in rows, "a key stands twice"
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def _fields(part=Recipe, prefix=""):
    """Yields every key of the schema as the README writes it, with its field."""
    for key, field in part.model_fields.items():
        kind = core_type(field.annotation)
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from _fields(kind, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field
    if part is Recipe:
        for union, pattern in (("train", "<set>."), (None, "search.space.<parameter>.")):
            kind = Recipe.model_fields["data"].annotation.model_fields[union].annotation if union else _parameter()
            members = [member for member in get_args(core_type(kind)) if issubclass(member, Part)]
            for key in keys_of(kind):
                yield f"{pattern}{key}", next(m.model_fields[key] for m in members if key in m.model_fields)


def _parameter():
    return get_args(core_type(Recipe.model_fields["search"].annotation.model_fields["space"].annotation))[1]


def test_the_readme_has_a_row_for_every_key_and_for_no_other():
    assert sorted(_rows()) == sorted(key for key, _ in _fields())


def test_the_readme_gives_the_defaults_of_the_schema():
    for key, field in _fields():
        written = _rows()[key][2].strip("`")
        if key == "search.space.<parameter>.type":
            assert written == "from the keys and the field"
        elif field.default is PydanticUndefined:
            assert written == "required", key
        else:
            assert text.parse(written, key).value == json.loads(json.dumps(field.default)), key


def test_the_readme_marks_the_fields_that_may_be_searched():
    marked = {key for key, cells in _rows().items() if key.startswith("train.") and cells[0].startswith("* ")}
    assert marked == {f"train.{key}" for key in SEARCHABLE}
    assert set(SEARCHABLE) < set(TrainPart.model_fields)


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
    members = get_args(core_type(Recipe.model_fields["data"].annotation.model_fields["train"].annotation))
    having = [m for m in members if issubclass(m, Part) and key.removeprefix("<set>.") in m.model_fields]
    sources = [get_args(core_type(m.model_fields["source"].annotation))[0] for m in having]
    return sources[0] if key.startswith("<set>.") else "sandbox"


def base_of(key):
    """Returns a recipe that may hold a key, by its name, and what has to be set in it first."""
    source = source_of(key)
    name = {"folder": "folders", **dict.fromkeys(SETS, "folders")}.get(source, "quickstart")
    return name, [f"data.train={SETS[source]}"] if source in SETS else []


@pytest.mark.parametrize("key", sorted(_rows()))
def test_every_example_of_the_readme_is_valid(key):
    example = _rows()[key][4].strip("`")
    assert example, "an example is missing"
    base, first = base_of(key)
    place = key.replace("<set>", "data.train").replace("<parameter>", "weight_decay")
    before = ["search.space.weight_decay={low: 1e-5, high: 1}"] if "<parameter>" in key else first
    if key.endswith(".choices"):
        before = ["search.space.weight_decay={}"]
    if key.endswith(".when"):
        before += ["search.space.head_bias={choices: [true, false]}"]
    if key == "resources.executor":
        before = ["resources.num_workers=2"]
    recipe = load_recipe(FOLDER / f"{base}.yaml", [*before, f"{place}={example}"])
    assert isinstance(recipe.data.train, SandboxSet) == (base == "quickstart")
    path = FOLDER / "x.yaml"
    assert text.parse(dump_recipe(recipe), str(path)).problems == []
