"""The recipes that users copy; every key: its example, its table, its schema, whether it may change in a study."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from crash_host import call
from layouts import make_layout
from logs import kept
from recipe_keys import keys
from short_training import write_model
from sources import absolute_paths
from stand_in import make_recipe
from study_steps import run_search, searching
from test_init import write_tree

from carft_ray import files
from carft_ray.errors import RecipeError
from carft_ray.launch.cluster.doctor import examine
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.loading import dump_recipe, load_recipe, resolve_path
from carft_ray.recipe.presets import SCHEMA, SCHEMA_LINE, schema_text
from carft_ray.recipe.rules import check_searchable, named_sets, warnings
from carft_ray.recipe.schema.data import BenchmarkSet, FolderSet, SandboxSet, SetSpec, plain
from carft_ray.recipe.schema.fields import Class, members, not_searched, resume_of
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import SEARCHABLE
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.recipe.written import parse_yaml
from carft_ray.store.log import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.snapshot import snapshot

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
    stale = "docs/recipe_train.md, search_spaces/carft-ray.schema.json"
    assert keys.main(["--check"], tmp_path) == f"not as the schema has them: {stale}; run: make tables"
    assert keys.main([], tmp_path) is None
    assert all((tmp_path / name).read_text() == (root / name).read_text() for name in names)
    with pytest.raises(ValueError, match=r"must have one place for each of \['a', 'b'\], but got \['a'\]"):
        keys.updated({"c": "<!-- keys: a -->\n<!-- end -->\n"}, {"a": ["x"], "b": ["y"]})


VALIDATOR = jsonschema.Draft202012Validator(json.loads(schema_text()))
DATA = """\
data:
  train: {source: sandbox, domain: photo, split: train, num_per_class: 4}
  id_val: {source: sandbox, domain: photo, split: val, num_per_class: 4}
"""


def refusals(path):
    """Tells whether the schema, and whether the package, refuses a recipe."""
    by_schema = not VALIDATOR.is_valid(parse_yaml(path.read_text(), "r.yaml").value)
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
        assert refusals(path) == (False, False), path
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
        assert refusals(path) == (False, False)
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
    assert refusals(tmp_path / "r.yaml") == (is_refused, is_refused)


# ---- what may change when a study goes on: every key, through the open study

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
    for source in recipe.search.warm_start:  # a search refuses what is no study before it writes anything
        run_search(Path(source), old)
    if kind == "space":  # the others change nothing in the study
        study_dir = Path(shutil.copytree(study_dir, tmp_path / "study"))
    before = kept(study_dir, "recipe")
    if kind == "running":
        assert go_on(study_dir, recipe) == recipe
        assert study_recipe(study_dir, log_of(study_dir)).search.space == old.search.space
        return
    place = place_of(key.name)
    top = place.rsplit(".", 1)[0] if key.name.endswith((".type", ".source", ".name")) else place
    message = refused(study_dir, recipe, re.escape(top))
    assert f"as in {study_dir}" in message
    assert ("--change-space" in message) == (kind == "space")
    if kind == "space":
        assert go_on(study_dir, recipe, True) == recipe
        assert study_recipe(study_dir, log_of(study_dir)).search.space == recipe.search.space
    else:
        refused(study_dir, recipe, re.escape(top), True)
        assert kept(study_dir, "recipe") == before


def test_a_baseline_may_be_added_and_is_trained_next(tmp_path):
    study_dir = tmp_path / "study"
    run_search(study_dir, make_recipe(2))
    more = {"plain": {"kl_weight": 0}, "strong": {"kl_weight": 9}}
    assert [spec.name for spec in run_search(study_dir, make_recipe(2, baselines=more))] == ["strong"]
    assert [row.name for row in snapshot(study_dir).baselines] == ["plain", "strong"]
    assert set(study_recipe(study_dir, log_of(study_dir)).search.baselines) == {"plain", "strong"}
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
    for name, lines in {"same.txt": "cat\ndog\n", "other.txt": "dog\ncat\n"}.items():
        (tmp_path / name).write_text(lines)

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
    assert study_recipe(new / "study", log_of(new / "study")).data.id_test.path == str(new / "images")
    paths = [one["data"]["train"]["path"] for one in kept(new / "study", "recipe")]
    assert paths == [str(old / "images"), str(new / "images")]


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


# in place of each recipe's own model a tiny one, whose tower is plain; the tiny sets are smaller than a batch
TINY = (
    "model={name: 'local-dir:clip'}",
    "prompts.templates=['a photo of a {}', 'a sketch of a {}', 'a dark {}']",
    "train.batch_size=2",
    "train.micro_batch=null",
    "train.grad_checkpointing=false",
    "resources.gpus_per_worker=0",
)

OFTEN = ("quickstart", "folders", "pacs", "fmow")  # the others in `make test-whole`


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
        per_class = 4 if len(BENCHMARKS[benchmark].classes) <= 110 else 1
        make_layout(benchmark, Path(resolve_path(folder, path)), per_class=per_class)
    for tree in {spec.path for spec in specs if isinstance(spec, FolderSet)}:
        domains = {domain for spec in specs if spec.path == tree for domain in spec.domains}
        write_tree(Path(resolve_path(folder, tree)), sorted(domains), ("cat", "dog", "hen"), images=160)
    found = examine(recipe, num_images=50)
    assert [str(problem) for problem in found.errors] == []
    assert set(found.zero_shot) == {"id_val", *recipe.data.ood_val}
    assert set(found.sets) == {".".join(path) for path in named_sets(recipe)}
    assert found.pairs[0] == [] or name == "quickstart"
