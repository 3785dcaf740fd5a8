"""The recipes that users copy, the tables that explain every key, and the JSON schema by which editors check both."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from crash_host import call
from layouts import make_layout
from recipe_keys import keys
from short_training import write_model
from test_init import write_tree

from carft_ray.data.benchmarks.facts import load_facts
from carft_ray.errors import RecipeError
from carft_ray.recipe import text
from carft_ray.recipe.checks.advice import check_searchable, warnings
from carft_ray.recipe.checks.rules import named_sets
from carft_ray.recipe.loading import load_recipe, resolve_path
from carft_ray.recipe.presets import SCHEMA, SCHEMA_LINE, schema_text
from carft_ray.recipe.schema.fields import Class, members, not_searched, resume_of
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.schema.parameters import SEARCHABLE
from carft_ray.recipe.schema.sets import BenchmarkSet, FolderSet, SandboxSet, SetSpec, plain
from carft_ray.training.doctor import examine

FOLDER = Path(__file__).parents[1] / "search_spaces"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_commented_lines_of_the_folders_recipe_are_valid_when_used(tmp_path):
    written = (FOLDER / "folders.yaml").read_text()
    used = re.sub(r"(?m)^( *)# ((classes|class_names|weight_decay|epochs|decay): )", r"\1\2", written)
    assert used.count("#") == written.count("#") - 5
    (tmp_path / "folders.yaml").write_text(used)
    real = ["search.space.learning_rate={low: 3e-7, high: 3e-5, log: true}"]
    real += ["search.space.kl_weight={low: 0.01, high: 100, log: true}"]
    real += ["model={name: ViT-B-16-quickgelu, pretrained: openai}"]
    assert all(line.rpartition("space.")[2].replace("=", ": ") in written for line in real)
    recipe = load_recipe(tmp_path / "folders.yaml", [*real, "prompts.templates=openai"])
    assert warnings(recipe) == []
    assert set(recipe.search.space) == {"learning_rate", "kl_weight", "weight_decay", "epochs", "decay"}


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


def test_every_key_says_what_it_means_whether_it_may_change_and_one_of_train_whether_it_may_be_searched():
    rows = [row.split(" | ") for table in keys.key_tables().values() for row in table[2:]]
    meanings = {cells[0]: cells[1] for cells in rows}
    for key in keys.documented_keys():
        assert meanings[f"| `{key.name}`"].strip("* "), key.name
        assert resume_of(key.field).kind in get_args(Class), key.name
        assert resume_of(key.field).why, key.name
    refused = {key.name for key in keys.documented_keys() if not_searched(key.field)}
    assert refused == {f"train.{name}" for name in TrainConfig.model_fields} - {f"train.{name}" for name in SEARCHABLE}


def test_a_stale_table_is_found_and_written_anew(tmp_path):
    root = FOLDER.parent
    assert keys.main(["--check"]) is None
    names = keys.made(root)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((root / name).read_text().replace("peak learning rate", "learning rate"))
    stale = "search_spaces/README.md, search_spaces/carft-ray.schema.json"
    assert keys.main(["--check"], tmp_path) == f"not as the schema has them: {stale}; run: make tables"
    assert keys.main([], tmp_path) is None
    assert all((tmp_path / name).read_text() == (root / name).read_text() for name in names)
    with pytest.raises(ValueError, match=r"must have one place for each of \['a', 'b'\], but got \['a'\]"):
        keys.updated("<!-- keys: a -->\n<!-- end -->\n", {"a": ["x"], "b": ["y"]})


VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))
DATA = """\
data:
  train: {source: sandbox, domain: photo, split: train, num_per_class: 4}
  id_val: {source: sandbox, domain: photo, split: val, num_per_class: 4}
"""


def refused(path):
    """Tells whether the schema, and whether the package, refuses a recipe."""
    by_schema = not VALIDATOR.is_valid(text.parse(path.read_text(), "r.yaml").value)
    try:
        load_recipe(path)
    except RecipeError:
        return by_schema, True
    return by_schema, False


def test_every_recipe_fits_the_schema_beside_it_can_be_searched_has_no_idle_setting_and_stands_in_the_readme():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    assert (FOLDER / SCHEMA).exists()
    readme = (FOLDER / "README.md").read_text()
    for path in [*RECIPES, *FOLDER.parent.glob("examples/*.yaml")]:
        assert refused(path) == (False, False), path
        if path in RECIPES:
            assert (check_searchable(load_recipe(path)), warnings(load_recipe(path))) == ([], []), path
            assert path.read_text().startswith(SCHEMA_LINE)
            assert f"`{path.name}`" in readme


def test_init_writes_the_schema_beside_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "tree", ["photo", "art"], images=5)
    preset = "--preset pacs --hold-out photo --json --to new/r.yaml"
    for words in (preset, "--from tree --model sandbox --to other/r.yaml"):
        path = tmp_path / words.split()[-1]
        path.parent.mkdir()
        assert call(["init", *words.split()]) == 0
        assert path.read_text().startswith(SCHEMA_LINE)
        assert path.with_name(SCHEMA).read_text() == schema_text()
        assert refused(path) == (False, False)
    capsys.readouterr()
    assert call(["schema"]) == 0
    assert capsys.readouterr().out == schema_text()


ACCEPTED = [
    "budget: {wall_time: 8h}\ntrain: {checkpoint_every: 15m}\nresources: {wait_for_nodes: 90s}",
    "budget: {wall_time: 60}\ntrain: {checkpoint_every: null, compile: false}",
    "search:\n  space:\n  baselines:\ntrain:\nevaluate:",
    "search: {space: {learning_rate: {low: 1e-5, high: 1e-3, log: true}, epochs: {low: 1, high: 4}}}",
    "search: {space: {decay: {choices: [all, matrices]}, weight_decay: {low: 0, high: 1, when: {decay: matrices}}}}",
    "search: {baselines: {plain: {kl_weight: 0}, same: }}",
    "prompts: {templates: ['a photo of a {}.'], class_names: imagenet}",
]
REFUSED = [
    "trainn: {epochs: 2}",
    "train: {lerning_rate: 1e-4}",
    "train: {decay: some}",
    "train: {checkpoint_every: soon}",
    "train: [1, 2]",
    "budget: {wall_time: 0}",
    "evaluate: {thumbnails: 201}",
    "name: my search",
    "format_version: 2",
    "search: {space: {lerning_rate: {low: 1e-5, high: 1e-3}}}",
    "search: {space: {decay: {choices: []}}}",
    "search: {baselines: {plain: {kl_wieght: 0}}}",
    "search: {alpha: {grid: [0, 2]}}",
    "search: {constraints: {id_drop: {zero_shot: 2}}}",
    "  id_test: {source: sandbox, domain: photo, split: train}",
    "  id_test: {source: foldr, path: images}",
    "  id_test: {path: images}",
    "  id_test: {source: folder, path: images, part: [0, 1, 2]}",
    "  id_test: {source: corrupted, of: {source: folder, path: images}, severity: 6}",
]


@pytest.mark.parametrize(("more", "is_refused"), [(more, more in REFUSED) for more in (*ACCEPTED, *REFUSED)])
def test_the_schema_and_the_package_refuse_the_same(tmp_path, more, is_refused):
    (tmp_path / "r.yaml").write_text(f"{DATA}{more}\n")
    assert refused(tmp_path / "r.yaml") == (is_refused, is_refused)


# ---- the doctor, on sets in the true layouts, with a tiny model in place of each recipe's own

# the tiny model's tower is plain, the tiny sets are smaller than a batch, and eighty templates take their time
TINY = (
    "model={name: 'local-dir:clip'}",
    "prompts.templates=['a photo of a {}', 'a sketch of a {}', 'a dark {}']",
    "train.batch_size=2",
    "train.micro_batch=null",
    "train.grad_checkpointing=false",
    "resources.gpus_per_worker=0",
)

OFTEN = ("quickstart", "folders", "pacs", "fmow")  # the others in `make test-all`


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(path.stem, marks=[] if path.stem in OFTEN else pytest.mark.whole) for path in RECIPES]
)
def test_every_recipe_passes_the_doctor_on_its_layouts(tmp_path, monkeypatch, name):
    folder = shutil.copytree(FOLDER, tmp_path / "search_spaces")  # as in a checkout
    write_model(folder / "clip")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = load_recipe(folder / f"{name}.yaml", () if name == "quickstart" else TINY)
    specs = [plain(spec) for spec in named_sets(recipe).values()]
    for benchmark, path in {(spec.name, spec.path) for spec in specs if isinstance(spec, BenchmarkSet)}:
        per_class = 4 if len(load_facts(benchmark).classes) <= 110 else 1
        make_layout(benchmark, Path(resolve_path(folder, path)), per_class=per_class)
    for tree in {spec.path for spec in specs if isinstance(spec, FolderSet)}:
        domains = {domain for spec in specs if spec.path == tree for domain in spec.domains}
        write_tree(Path(resolve_path(folder, tree)), sorted(domains), ("cat", "dog", "hen"), images=160)
    found = examine(recipe, num_images=50)
    assert [str(problem) for problem in found.errors] == []
    assert set(found.zero_shot) == {"id_val", *recipe.data.ood_val}
    assert set(found.sets) == {".".join(path) for path in named_sets(recipe)}
    assert found.pairs == [] or name == "quickstart"
