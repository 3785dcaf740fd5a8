"""The JSON schema of a recipe, by which editors complete and check: against a validator that is not ours."""

import json
from pathlib import Path

import jsonschema
import pytest
from crash_host import call
from test_init import write_tree

from carft_ray.errors import RecipeError
from carft_ray.recipe import text
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.presets import SCHEMA, SCHEMA_LINE, schema_text

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [*sorted(ROOT.glob("search_spaces/*.yaml")), *sorted(ROOT.glob("examples/*.yaml"))]
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


def test_recipes_fit_the_schema_that_lies_beside_them():
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)
    for path in RECIPES:
        assert refused(path) == (False, False), path
        if path.parent.name == "search_spaces":
            assert path.read_text().startswith(SCHEMA_LINE)
            assert path.with_name(SCHEMA).exists()


def test_init_writes_the_schema_beside_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "tree", ["photo", "art"], images=5)
    for words in ("--preset pacs --hold-out photo --to new/r.yaml", "--from tree --model sandbox --to other/r.yaml"):
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
    "train: {epochs: many}",
    "train: {epochs: 0}",
    "train: {decay: some}",
    "train: {head_bias: 1}",
    "train: {compile: maybe}",
    "train: {checkpoint_every: soon}",
    "train: [1, 2]",
    "budget: {wall_time: 0}",
    "evaluate: {thumbnails: 201}",
    "name: my search",
    "format_version: 2",
    "prompts: {templates: [1, 2]}",
    "search: {space: {lerning_rate: {low: 1e-5, high: 1e-3}}}",
    "search: {space: {learning_rate: {low: 1e-5, hgih: 1e-3}}}",
    "search: {space: {decay: {choices: []}}}",
    "search: {baselines: {plain: {kl_wieght: 0}}}",
    "search: {alpha: {grid: [0, 2]}}",
    "search: {constraints: {id_drop: {zero_shot: 2}}}",
    *(
        f"  id_test: {spec}"
        for spec in (
            "{source: sandbox, domain: photo, split: train}",
            "{source: foldr, path: images}",
            "{path: images}",
            "{source: folder, path: images, part: [0, 1, 2]}",
            "{source: corrupted, of: {source: folder, path: images}, severity: 6}",
        )
    ),
]


@pytest.mark.parametrize(("more", "is_refused"), [(more, more in REFUSED) for more in (*ACCEPTED, *REFUSED)])
def test_the_schema_and_the_package_refuse_the_same(tmp_path, more, is_refused):
    (tmp_path / "r.yaml").write_text(f"{DATA}{more}\n")
    assert refused(tmp_path / "r.yaml") == (is_refused, is_refused)
