"""Recipes: reading, every message about a mistake, values set on the command line, writing back."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sources import absolute_paths

from carft_ray.errors import RecipeError
from carft_ray.recipe import rules
from carft_ray.recipe.loading import apply, dump_recipe, load_recipe, portable_paths, recipe_hash
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import GpSampler, NoPruner
from carft_ray.recipe.schema.train import field_kind
from carft_ray.recipe.written import parse_yaml

BASE = """\
name: base
data:
  train: {source: sandbox, domain: photo, split: train, num_per_class: 4}
  id_val: {source: sandbox, domain: photo, split: val, num_per_class: 4}
  ood_val:
    sketch: {source: sandbox, domain: sketch, split: val, num_per_class: 4}
  ood_test:
    painting: {source: sandbox, domain: painting, split: test, num_per_class: 4}
"""  # 8 lines


def _load(tmp_path, more="", *overrides, base=BASE):
    path = tmp_path / "r.yaml"
    path.write_text(base + more)
    return load_recipe(path, overrides)


def _messages(tmp_path, more="", *overrides, base=BASE):
    """The messages about a recipe, without its folder; a recipe must have some."""
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, more, *overrides, base=base)
    assert caught.value.exit_code == 3
    return [str(problem).replace(f"{tmp_path}{os.sep}", "") for problem in caught.value.problems]


# ---- one mistake, one message: the lines after the base, and how the message begins after the file, or what is in it

ONE_OF = "must be one of the allowed values, but got "
TEMPLATES = "must be the name of a set of templates, file:PATH, or a list of texts with {}, but got "
BRACES = "must contain {} once, for the class, and no other brace, but got "
GPUS = "must be a whole number above 1, and with several workers, but got "
ALPHA_MODE = "search.alpha.mode: must be sample if alpha is in search.space, else profile, but got "
LOWEST = "must be at least search.alpha.lowest, 0.1, but got "
NO_PROBE = "must be left out with function: only the built-in loop has it\n"
CUTS_NOTHING = "search.pruner.name: needs an intermediate value between search.pruner.first and the last epoch"
DEEP = ": must have less nesting and fewer repeated aliases"
TAG = "must be a plain value without a tag, but got tag:yaml.org,2002:"
BENCHMARK = "{source: benchmark, path: x, "
CORRUPTED = "{source: corrupted, of: {source: folder, path: x}, "

BAD = [
    # unknown keys
    ("nmae: x", ":9: nmae: unknown key; did you mean 'name'? (allowed: format_version, name, model, data, "),
    ("learning_rate: 1", ":9: learning_rate: unknown key; did you mean 'train.learning_rate'? (allowed: "),
    ("train: {l2_weight: 1}", ":9: train.l2_weight: unknown key; did you mean 'l2_sp_weight'? (allowed: learning_"),
    ("search: {space: {lipsum_weight: {low: 0, high: 1}}}", "\"lipsum_weight\"; did you mean 'text_weight'? (allowed"),
    # types
    ("train: {learning_rate: '1e-4'}", ':9: train.learning_rate: must be a number, but got "1e-4"'),
    ("train: {epochs: 2.0}", ":9: train.epochs: must be a whole number, but got 2.0"),
    ("train: {head_bias: yes}", ':9: train.head_bias: must be true or false, but got "yes"'),
    ("train: {compile: 1}", ":9: train.compile: must be auto, true or false, but got 1"),
    ("model: {pretrained: 5}", ":9: model.pretrained: must be text, but got 5\n    Write it in quotes."),
    # ranges
    ("train: {learning_rate: 0}", ":9: train.learning_rate: must be greater than 0, but got 0"),
    ("train: {learning_rate: .inf}", ":9: train.learning_rate: must be a finite number, but got .inf"),
    ("train: {kl_weight: -1}", ":9: train.kl_weight: must be at least 0, but got -1"),
    ("train: {function: 'a:b', probe_epochs: 5}", f":9: train.probe_epochs: {NO_PROBE}"),
    ("train: {function: 'a:b'}\nsearch: {space: {probe_epochs: {low: 0, high: 5}}}", f"space.probe_epochs: {NO_PROBE}"),
    ("search: {baselines: {x: {function: 'a:b', probe_epochs: 2}}}", f"baselines.x.probe_epochs: {NO_PROBE}"),
    ("train: {penalty_schedule: linear}", f"{ONE_OF}\"linear\"; did you mean 'linear_to_zero'? (allowed: constant, "),
    ("train: {alpha: 1.5}", ":9: train.alpha: must be at most 1, but got 1.5"),
    # words
    ("train: {decay: matrix}", f":9: train.decay: {ONE_OF}\"matrix\"; did you mean 'matrices'? (allowed: all, "),
    # prompts and classes
    ("prompts: {class_names: 5}", "prompts.class_names: must be the name of a benchmark or a list of texts, but got"),
    ("prompts: {class_names: imagnet}", "but got \"imagnet\"; did you mean 'imagenet'? (allowed: "),
    ("prompts: {templates: 5}", f":9: prompts.templates: {TEMPLATES}5"),
    ("prompts: {templates: openia}", f":9: prompts.templates: {TEMPLATES}\"openia\"; did you mean 'openai'?"),
    ("prompts: {templates: 'a {}'}", '\n    Write one template as a list: ["a {}"].'),
    ("prompts: {templates: []}", ":9: prompts.templates: must not be empty, but got []"),
    ("prompts:\n  templates:\n  - a {}\n  - a photo", f':12: prompts.templates.1: {BRACES}"a photo"'),
    ("prompts: {templates: ['{} {c}']}", f':9: prompts.templates.0: {BRACES}"{{}} {{c}}"'),
    ("prompts: {templates: ['a {}', 'a {}']}", "prompts.templates.1: must not repeat an earlier template, but got "),
    ("prompts: {class_names: [a, '']}", ":9: prompts.class_names: must not contain an empty text, but got "),
    ("  classes: [a, b, a]", ":9: data.classes: must not contain a name twice, but got a"),
    ("  classes: [a, ..]", ':9: data.classes: must be names of folders, not paths, but got ["a", ".."]'),
    ("  classes: [a, b]\nprompts: {class_names: [a]}", "must contain one text per class of data.classes (2), but got"),
    # model
    ("model: {name: ViT-B-32}", ":9: model.pretrained: is required for ViT-B-32: the weights to start "),
    ("model: {pretrained: openai}", ":9: model.pretrained: must be left out for the sandbox, which has its own "),
    # alpha
    ("search: {alpha: {mode: sample}, space: {epochs: {low: 1, high: 2}}}", f":9: {ALPHA_MODE}sample\n"),
    ("search: {alpha: {mode: sample}, space: {alpha: {low: 0, high: 1}}}", f"alpha.low: {LOWEST}0.0"),
    ("search: {alpha: {mode: sample}, space: {alpha: {choices: [1, null]}}}", f"alpha.choices.1: {LOWEST}null"),
    ("search: {alpha: {grid: [0, 0.5]}}", ":9: search.alpha.grid: must rise strictly from 0 to 1, but got [0.0,"),
    # the rest of search, resources
    ("search: {trials: 4, sampler: {startup_trials: 5}}", "must be at most search.trials, 4, but got 5"),
    ("search: {pruner: {name: none, first: 0.5}}", ":9: search.pruner.first: unknown key"),
    ("search: {pruner: {name: successive_halving, first: 0.95}}", f":9: {CUTS_NOTHING}"),
    ("train: {epochs: 1}\nsearch: {pruner: {name: successive_halving}}", f":10: {CUTS_NOTHING}"),
    ("train: {epochs: 5}\nevaluate: {every_epochs: 5}\nsearch: {pruner: {name: median}}", f":11: {CUTS_NOTHING}"),
    ("evaluate: {every_epochs: 0}\nsearch: {pruner: {name: median}}", f":10: {CUTS_NOTHING}"),
    ("search: {baselines: {a: {lr: 1}}}", "search.baselines.a.lr: unknown key; did you mean 'learning_rate'?"),
    ("search: {baselines: {zero_shot: {alpha: 0}}}", "must have another name: zero_shot is always shown, without "),
    ("resources: {executor: inline, num_workers: 2}", ":9: resources.num_workers: must be 1 with executor: inline,"),
    ("resources: {gpus_per_worker: 1.5}", f":9: resources.gpus_per_worker: {GPUS}1.5\n    Write 1, or with "),
    ("resources: {gpus_per_worker: 0, accelerator: H100}", "must be left out with gpus_per_worker: 0, but got H100"),
    ("resources: {gpus_per_worker: 0.00001}", "must be at least 0.0001, the least that Ray counts, but got 1e-05"),
    # the text itself
    ("name: again", ":9: name: must occur once, but is also on line 1"),
    ("train: {epochs: 1", ":10:1: must be valid YAML: expected ',' or '}', but got '<stream end>'"),
    ("train:\n\tepochs: 1", "cannot start any token\n    Indent with spaces, not with tabs."),
    ("---\nname: x", ":9:1: must be valid YAML: but found another document"),
    ("train: !!python/object/apply:os.system [ls]", f":9: train: {TAG}python/object/apply:os.system"),
    ("train: !!int x", f":9: train: {TAG}int"),
    ("? [a]\n: b", ":9: a key must be a word"),
    ("train: &a [*a]", DEEP),
    ("train: " + "[" * 600, DEEP),
    ("name2: \x07", ": must be valid YAML: special characters are not allowed"),
]

# the same of a space
BAD_SPACES = [
    ("learning_rate: {low: 1, high: 0.5}", "low <= high must hold, but got low=1.0, high=0.5"),
    ("kl_weight: {low: 0, high: 3, log: true}", "low > 0 must hold with log: true, but got low=0.0"),
    ("kl_weight: {low: 1, high: 3, log: true, step: 1}", "log: true and step exclude each other"),
    ("kl_weight: {low: 0, high: 0.95, step: 0.1}", "high - low must be a multiple of step, but got "),
    ("kl_weight: {low: 1}", ":9: search.space.kl_weight.high: is required"),
    ("kl_weight: {low: 1, hihg: 2, high: 2}", "kl_weight.hihg: unknown key; did you mean 'high'? "),
    ("kl_weight: {type: floot, low: 1, high: 2}", "(allowed: float, int, categorical)"),
    ("kl_weight: {choices: [1, 1.0]}", "kl_weight.choices: choices must differ, but got [1, 1.0]"),
    ("kl_weight: {choices: [[1]]}", "must be a number, a text, true, false or null, but got [1]"),
    ("seed: {low: 0, high: 9}", "seed: must not be searched\n    A seed is not a hyperparameter: "),
    ("precision: {choices: [fp32, bf16]}", "must not be searched\n    It changes speed and rounding, "),
    ("micro_batch: {low: 1, high: 2}", "must not be searched\n    It changes speed and memory, "),
    ("kl_weigth: {low: 1, high: 2}", 'must be a field of train, but got "kl_weigth"; did you mean'),
    ("label_smoothing: {low: 0, high: 1}", "train.label_smoothing must be less than 1, but got 1.0"),
    ("epochs: {type: float, low: 1, high: 2}", "epochs takes whole numbers only, but got type float\n"),
    ("decay: {low: 1, high: 2}", "\n    Write decay: {choices: [all, matrices]}."),
    ("decay: {choices: [all, none]}", f"decay.choices.1: train.decay {ONE_OF}"),
    ("alpha: {low: 0.2, high: 1}", f":9: {ALPHA_MODE}profile\n    With sample, add search.space.alpha: "),
]

# and of a set
BAD_SETS = [
    (f"b: {BENCHMARK}name: imagenet-q}}", ".b.name: must be the name of a benchmark: "),
    (f"b: {BENCHMARK}name: imagenet}}", ".b.split: is required for imagenet (allowed: train, val)"),
    (f"b: {BENCHMARK}name: dtd, split: tset}}", "must be a split of dtd, but got \"tset\"; did you mean 'test'? "),
    (f"b: {BENCHMARK}name: imagenet-r, split: test}}", ".b.split: must be left out: imagenet-r has no splits, but"),
    (f"b: {BENCHMARK}name: imagenet-r, domains: [art]}}", ".b.domains: must be left out: imagenet-r has no domains,"),
    (f"b: {BENCHMARK}name: pacs, domains: [photo, photo]}}", ".b.domains: must not contain a name twice, but got"),
    (f"b: {CORRUPTED}severity: 1, corruptions: [fogg]}}", f".b.corruptions.0: {ONE_OF}\"fogg\"; did you mean 'fog'?"),
    (f"b: {CORRUPTED}severity: 1, corruptions: [fog, fog]}}", ".b.corruptions: must not contain a name twice"),
    ("b: {source: corrupted, of: {source: corrupted}, severity: 1}", f'.b.of.source: {ONE_OF}"corrupted" (allowed:'),
    (f"b: {{source: corrupted, of: {BENCHMARK}name: pasc}}, severity: 1}}", ".b.of.name: must be the name of a "),
    ("b: {source: web}", f'.b.source: {ONE_OF}"web" (allowed: sandbox, folder, table, webdataset, huggingface, '),
    ("b: {path: x}", ".b.source: is required (allowed: sandbox, folder, "),
    ("b: {source: folder, path: x, domain: [c]}", ".b.domain: unknown key; did you mean 'domains'? (allowed: path,"),
    ("b: {source: folder, path: x, part: [0.5, 0.2]}", ".b.part: must be two fractions [from, to] "),
    ("a b: {source: folder, path: x}", ".a b: a name must begin with a letter or digit "),
    ("train: {source: folder, path: x}", ".train: a set must not have the name of a role"),
    ("sketch: {source: folder, path: x}", ".sketch: must differ from the names in data.ood_val"),
]
ROWS = [(more, f"r.yaml{words}" if words.startswith(":") else "r.yaml", words) for more, words in BAD]
ROWS += [(f"search: {{space: {{{space}}}}}", "r.yaml:9: search.", words) for space, words in BAD_SPACES]
ROWS += [(f"    {one}", "r.yaml:9: data.ood_test.", words) for one, words in BAD_SETS]


@pytest.mark.parametrize(("more", "begin", "words"), ROWS, ids=[row[0][:70] for row in ROWS])
def test_a_mistake_gives_exactly_one_message(tmp_path, more, begin, words):
    [message] = _messages(tmp_path, more + ("\n" if "[[[" not in more else ""))
    assert message.startswith(begin)
    assert words in message


def test_a_recipe_without_data_is_told(tmp_path):
    assert _messages(tmp_path, base="# nothing\n") == ["r.yaml: data: is required"]
    told = ["r.yaml:2: data.train: is required", "r.yaml:2: data.id_val: is required"]
    assert _messages(tmp_path, base="name: x\ndata:\n") == told
    assert _messages(tmp_path, base="- a\n") == ['r.yaml:1: must be a mapping of keys to values, but got ["a"]']
    told = "search.objective is only ID accuracy: data.ood_val has no set"
    assert rules.warnings(_load(tmp_path, "search:\ntrain:\n  # none\n", base=BASE.split("  ood_val")[0])) == [told]


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path):
    more = """\
train:
  learning_rate: 0
search:
  space:
    learning_rate: {low: 2, high: 1}
    epochs: {low: 1, high: 0.5}
resources: {executor: inlin, num_workers: 2}
"""
    messages = _messages(tmp_path, more, "search.trials=0", "train.lr=1")
    assert [re.split(": (must|unknown|low) ", message)[0] for message in messages] == [
        "r.yaml:10: train.learning_rate",
        "r.yaml:13: search.space.learning_rate",
        "r.yaml:14: search.space.epochs.high",
        "r.yaml:15: resources.executor",
        "--set search.trials=0",
        "--set train.lr=1",
    ]


def test_files_that_cannot_be_read_are_told_apart(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    for name, message in (
        ("byte.yaml", f"no such recipe; did you mean {str(tmp_path / 'bytes.yaml')!r}?"),
        ("no/r.yaml", "no such recipe; its folder does not exist"),
        ("", "must be a recipe file, but is a folder (allowed: bytes.yaml)"),
        ("bytes.yaml", "must be text in UTF-8, but byte 6 is not"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_yaml_is_version_1_2_and_an_alias_is_plain_repetition(tmp_path):
    more = "train: {learning_rate: 1e-4, kl_weight: 3, weight_decay: .05}\nprompts: {templates: ['on {}']}\n"
    more += "search: {baselines: {a: &a {kl_weight: 0}, b: *a}}"
    recipe = _load(tmp_path, more, base=BASE.replace("base", "on"))
    assert (recipe.train.learning_rate, recipe.train.weight_decay) == (1e-4, 0.05)
    assert type(recipe.train.kl_weight) is float
    assert (recipe.name, recipe.prompts.templates) == ("on", ("on {}",))
    assert recipe.search.baselines == {"a": {"kl_weight": 0}, "b": {"kl_weight": 0}}
    with pytest.raises(ValidationError):
        recipe.train.epochs = 3


def test_the_type_of_a_parameter_follows_from_its_keys_and_its_field(tmp_path):
    space = "epochs: {low: 2, high: 6}, kl_weight: {low: 0, high: 0.9, step: 0.1}, clip_norm: {choices: [1, null]}, "
    space += "weight_decay: {type: int, low: 0, high: 1}, head_bias: {choices: [true]}"
    found = _load(tmp_path, f"search: {{space: {{{space}}}}}").search.space
    kinds = {"epochs": "int", "kl_weight": "float", "clip_norm": "categorical", "weight_decay": "int"}
    assert {name: parameter.type for name, parameter in found.items()} == {**kinds, "head_bias": "categorical"}
    assert found["head_bias"].choices[0] is True
    assert {field_kind(name) for name in ("decay", "precision")} == {str}


def test_templates_come_from_a_file_once_and_stand_in_the_recipe(tmp_path):
    (tmp_path / "mine.txt").write_text("a photo of a {}.\n\n  a drawing of a {}.\n")
    recipe = _load(tmp_path, "prompts: {templates: 'file:mine.txt'}")
    assert recipe.prompts.templates == ("a photo of a {}.", "a drawing of a {}.")
    assert _load(tmp_path, "", f"prompts.templates=file:{tmp_path / 'mine.txt'}") == recipe
    assert Recipe.model_validate(parse_yaml(dump_recipe(recipe), "").value) == recipe
    (tmp_path / "wrong.txt").write_text("a photo of a {}.\na drawing\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    rule = "prompts.templates: must be a file with one template per line, but got"
    for name, told in (
        (
            "wrong.txt",
            'prompts.templates.1: must contain {} once, for the class, and no other brace, but got "a drawing"',
        ),
        ("none.txt", f"{rule} none.txt: No such file or directory"),
        ("bytes.txt", f"{rule} bytes.txt: must be text in UTF-8, but byte 0 is not"),
        ("pipe", f"{rule} pipe: must be a regular file, but got a pipe, device or socket"),
    ):
        assert _messages(tmp_path, f"prompts: {{templates: 'file:{name}'}}") == [f"r.yaml:9: {told}"]


def test_set_wins_over_the_file_a_later_one_over_an_earlier_one_mends_a_mistake_and_makes_missing_parts(tmp_path):
    recipe = _load(tmp_path, "train: {epochs: 3, batch_size: 8}", "train.epochs=4", "train.epochs=5")
    assert (recipe.train.epochs, recipe.train.batch_size) == (5, 8)
    for mistake in ("train: {epochs: 0}", "train: 5"):
        assert _load(tmp_path, mistake, "train.epochs=2").train.epochs == 2
    options = ["search.space.weight_decay={low: .01, high: .2}", "search.space.epochs.low=1"]
    options += ["search.space.epochs.high=2", "data.ood_val.b={source: folder, path: x, domains: [b]}"]
    recipe = _load(tmp_path, "train:\n", *options, "train.clip_norm=", "search.alpha.grid=[0, .5, 1]")
    assert (recipe.search.space["weight_decay"].high, recipe.search.space["epochs"].high) == (0.2, 2)
    assert set(recipe.data.ood_val) == {"sketch", "b"}
    assert (recipe.train.clip_norm, recipe.search.alpha.grid) == (None, (0, 0.5, 1))


def test_the_name_of_another_sampler_takes_the_keys_of_the_one_before_with_it(tmp_path):
    more = "search: {sampler: {seed: 3, n_ei_candidates: 5}, pruner: {name: median, first: 0.2}}"
    changed = _load(tmp_path, more, "search.sampler.name=gp", "search.sampler.deterministic=true")
    assert changed.search.sampler == GpSampler(seed=3, deterministic=True)
    assert changed.search.pruner.first == 0.2
    assert _load(tmp_path, more, "search.pruner.name=none").search.pruner == NoPruner()
    mistyped = more.replace("n_ei_candidates", "n_ei_candidats")
    (message,) = _messages(tmp_path, mistyped, "search.sampler.name=gp")
    assert message.startswith("r.yaml:9: search.sampler.n_ei_candidats: unknown key (allowed: ")


def test_null_takes_out_an_entry_that_the_author_named_and_is_a_value_elsewhere(tmp_path):
    space = "{kl_weight: {low: 1, high: 2}, weight_decay: {low: 0, high: 1}}"
    more = f"search: {{space: {space}, baselines: {{ft: {{kl_weight: 0}}, no: {{kl_weight: 1}}}}}}"
    options = ["search.space.kl_weight=null", "search.baselines.no=", "search.baselines.ft.clip_norm=null"]
    search = _load(tmp_path, more, "search.space.epochs={low: 1, high: 2}", *options).search
    assert [*search.space] == ["weight_decay", "epochs"]
    assert search.baselines == {"ft": {"kl_weight": 0, "clip_norm": None}}


BAD_OPTIONS = [
    ("data.ood_val.scetch=null", "data.ood_val must have scetch, which null removes; did you mean 'sketch'?"),
    ("train.epochs", "must have the form key.path=value"),
    ("train.epochs=[", "must be valid YAML: expected the node content, but found '<stream end>'"),
    ("train.epoch=3", "unknown key; did you mean 'epochs'? (allowed: "),
    ("train.epochs.low=3", 'train.epochs: must be a whole number, but got {"low": 3}'),
    ("search.alpha.grid.0=1", 'search.alpha.grid: must be a list, but got {"0": 1}'),
    ("search.space={seed: {low: 1, high: 2}}", "search.space.seed: must not be searched\n"),
]


@pytest.mark.parametrize(("option", "words"), BAD_OPTIONS, ids=[option for option, _ in BAD_OPTIONS])
def test_a_wrong_option_is_told_with_the_option_as_its_place(tmp_path, option, words):
    [message] = _messages(tmp_path, "", option)
    assert message.startswith(f"--set {option}: {words}")


NO_EFFECT = "has no effect: "
UNWEIGHTED = NO_EFFECT + "kl_weight, class_kl_weight, feature_weight, text_weight are 0"
NOT_PLAIN = "search.baselines.fine_tuning is not plain fine-tuning: add"
WEAK = "search.pruner is weakly informative: a training has "
WARNINGS = [
    ("budget: {gpu_hours: 5}\nresources: {gpus_per_worker: 0}", f"budget.gpu_hours {NO_EFFECT}resources.gpus_per_w"),
    ("  pack: always", f"data.pack {NO_EFFECT}the images of data.train are drawn and kept decoded"),
    ("  resize_short_side: 8", f"data.resize_short_side {NO_EFFECT}the images of data.train are drawn and kept"),
    ("train: {kl_weight: 0, context_scale: 9}", f"train.context_scale {NO_EFFECT}kl_weight is 0"),
    ("train: {kl_weight: 0, context_scale: 9}\nsearch: {space: {kl_weight: {low: 1, high: 2}}}", None),
    (
        "train: {kl_weight: 0, l2_sp_weight: 1, penalty_schedule: linear_to_zero}",
        f"train.penalty_schedule {UNWEIGHTED}",
    ),
    ("train: {kl_weight: 0, text_weight: 1, penalty_schedule: linear_to_zero}", None),
    ("train: {kl_weight: 0, teacher: average}", f"train.teacher {UNWEIGHTED}"),
    ("train: {kl_weight: 0, teacher: average}\nsearch: {space: {feature_weight: {low: 1, high: 2}}}", None),
    ("train: {text_weight: 1}\nsearch: {baselines: {fine_tuning: {kl_weight: 0}}}", f"{NOT_PLAIN} text_weight: 0"),
    ("train: {text_weight: 1}\nsearch: {baselines: {fine_tuning: {kl_weight: 0, text_weight: 0}}}", None),
    ("search: {baselines: {fine_tuning: {learning_rate: 1e-5}}}", f"{NOT_PLAIN} kl_weight: 0"),
    ("prompts: {templates: ['a {}']}", f"train.kl_weight {NO_EFFECT}with one template the KL term is always 0"),
    ("train: {decay: matrices, weight_decay: 0}", f"train.decay {NO_EFFECT}weight_decay is 0"),
    ("train: {decay: matrices, weight_decay: 0}\nsearch: {space: {weight_decay: {low: 0, high: 1}}}", None),
    ("train: {head_bias: true, head_lr_factor: 0}", f"train.head_bias {NO_EFFECT}head_lr_factor is 0, so it stays"),
    ("train: {alpha: 0}", "train.alpha is 0: the result is the zero-shot model, whatever is trained"),
    ("train: {alpha: 0.1}", None),
    ("train: {lora_alpha: 8}", f"train.lora_alpha {NO_EFFECT}lora_rank is null"),
    ("search: {space: {lora_alpha: {low: 1, high: 8}}}", f"search.space.lora_alpha {NO_EFFECT}lora_rank is null"),
    ("train: {ema_decay: 0}", f"train.ema_decay {NO_EFFECT}an average with decay 0 is the last step"),
    ("train: {precision: fp64}", "train.precision fp64 is for checks of the numbers: several times slower, no"),
    ("search: {objective: {kind: harmonic, id_weight: 0.3}}", f"search.objective.id_weight {NO_EFFECT}"),
    ("search: {sampler: {name: qmc, seed: 3, scramble: false}}", f"search.sampler.seed {NO_EFFECT}the sequence is not"),
    ("search: {trials: 8, sampler: {name: nsga2, population_size: 50}}", "search.sampler.name nsga2 draws its first "),
    ("train: {epochs: 12}\nsearch: {pruner: {name: successive_halving}}", None),
    ("train: {epochs: 9}\nsearch: {pruner: {name: successive_halving}}", f"{WEAK}9 epochs"),
    ("search: {pruner: {name: successive_halving}, space: {epochs: {low: 1, high: 4}}}", f"{WEAK}1 epoch"),
    ("evaluate: {every_epochs: 0}\nsearch: {pruner: {name: successive_halving}}", None),
    ("resources: {gpus_per_worker: 4}", "resources.gpus_per_worker takes 4 GPUs for each worker, which "),
    ("model: {name: ViT-B-16-quickgelu, pretrained: openai}", "prompts.templates sandbox describes the sandbox's own"),
    ("    b: {source: sandbox, domain: sketch, split: test, num_per_class: 1}", "data.ood_test.b has other"),
    ("    b: {source: sandbox, domain: photo, split: test, num_per_class: 1}", "data.ood_test.b is not a shift:"),
]


ID_TEST = "data.id_test={source: sandbox, num_per_class: 4, domain: photo, split: test}"


@pytest.mark.parametrize(("more", "words"), WARNINGS, ids=[more[:70] for more, _ in WARNINGS])
def test_a_setting_without_effect_is_named(tmp_path, more, words):
    told = rules.warnings(_load(tmp_path, more, ID_TEST))
    assert [warning[: len(words or "")] for warning in told] == [word for word in [words] if word]


def test_sets_that_no_command_reads_are_named(tmp_path):
    assert rules.warnings(_load(tmp_path)) == ["data.ood_test has no effect: `carft-ray test` needs data.id_test, too"]


def test_imagenet_v2_is_no_ood_validation_set(tmp_path):
    (told,) = rules.warnings(_load(tmp_path, "", ID_TEST, f"data.ood_val={{x: {BENCHMARK}name: imagenet-v2}}}}"))
    assert told.startswith("data.ood_val.x is ImageNet-V2, which ranks models as ID does")


def test_what_only_a_search_minds(tmp_path):
    assert list(map(str, rules.check_searchable(_load(tmp_path, "train: {alpha: 0.5}")))) == [
        "search.space: must contain at least one parameter to search\n"
        "    Add a parameter, for example learning_rate: {low: 1e-6, high: 1e-4, log: true}.",
        "train.alpha: must not be fixed in a search, which finds alpha itself, but got 0.5\n"
        "    Remove train.alpha (--set train.alpha=null).",
    ]
    assert rules.check_searchable(_load(tmp_path, "search: {space: {kl_weight: {low: 1, high: 2}}}")) == []


def test_apply_sets_values_over_train_leaves_the_recipe_and_refuses_what_train_refuses(tmp_path):
    recipe = _load(tmp_path, "train: {epochs: 3}")
    applied = apply(recipe, {"learning_rate": 1e-3, "alpha": 0.4, "batch_size": 8})
    assert (applied.train.learning_rate, applied.train.alpha, applied.train.epochs) == (1e-3, 0.4, 3)
    assert recipe.train.alpha is None
    assert apply(recipe, {}) == recipe
    with pytest.raises(RecipeError) as caught:
        apply(recipe, {"learning_rate": -1, "epoch": 2})
    first, second = caught.value.problems
    assert str(first) == "train.learning_rate: must be greater than 0, but got -1"
    assert (second.place, second.nearest) == ("train.epoch", "epochs")


ODD = ("true", "null", "1e-4", "2020-01-01", "0x10", "é", "it's", "#1", "=", "<<", "1_000", "~", "\u2028", "\u00a0\x85")
WORDS = st.sampled_from((*ODD, "a b", "- a", ": 'x' # y"))
PATHS = st.sampled_from(["../x", "/abs/é", "~/p q", "1", "null"])


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.data())
def test_a_recipe_that_was_written_loads_back_equal(tmp_path_factory, data):
    folder, draw = tmp_path_factory.mktemp("written"), data.draw
    tree = {"source": "folder", "path": draw(PATHS)}
    sets = {"train": tree, "id_val": {**tree, "domains": ["null"]}, "ood_val": {"1": tree, "null-": tree}}
    classes = draw(st.none() | st.lists(WORDS, min_size=2, unique=True))
    templates = draw(st.lists(WORDS.map("{}{{}}".format), min_size=1, unique=True))
    rate, alpha = draw(st.floats(1e-300, 100)), draw(st.floats(0.01, 0.99) | st.none())
    kl_weight, seed = draw(st.sampled_from([0, 5e-324, 1 / 3, 1e17, 123456789.123])), draw(st.integers(0, 2**63 - 1))
    space = {"learning_rate": {"low": rate / 2, "high": rate}, "clip_norm": {"choices": [None, 1, 0.5, 1e-7]}}
    value = {
        "name": "on",
        "model": {"name": "ViT-B-32", "pretrained": "a/b.pt"},
        "data": {**sets, "classes": classes, "cache_dir": draw(PATHS | st.none())},
        "prompts": {"templates": templates},
        "train": {"learning_rate": rate, "kl_weight": kl_weight, "alpha": alpha, "seed": seed},
        "search": {"space": space, "baselines": {"1": {}}, "alpha": {"grid": [0, alpha or 0.5, 1]}},
    }
    recipe = absolute_paths(Recipe.model_validate(value), folder)
    written = dump_recipe(recipe)
    (folder / "written.yaml").write_text(written)
    again = load_recipe(folder / "written.yaml")
    assert again == recipe
    assert (dump_recipe(again), recipe_hash(again)) == (written, recipe_hash(recipe))


def test_the_hash_depends_on_values_and_not_on_how_they_are_written(tmp_path):
    one = _load(tmp_path, "train: {epochs: 10, kl_weight: 1}\nsearch: {baselines: {a: {kl_weight: 2}}}")
    other = _load(tmp_path, "search: {baselines: {a: {kl_weight: 2.0}}}\ntrain: {kl_weight: 1.0}")
    assert (one, recipe_hash(one)) == (other, recipe_hash(other))
    assert recipe_hash(one) != recipe_hash(_load(tmp_path, "train: {kl_weight: 1.0000001}"))


def test_a_recipe_written_elsewhere_means_the_same_files(tmp_path):
    base = """\
model: {name: "local-dir:../m"}
data:
  cache_dir: cache
  train: {source: folder, path: ../png, domains: [a]}
  id_val: {source: folder, path: /abs/png, domains: [b]}
  ood_val: {c: {source: folder, path: png, domains: [c]}}
  id_test: {source: folder, path: ~/png, domains: [d]}
"""
    recipe, here = _load(tmp_path, base=base), tmp_path.resolve()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "best.yaml").write_text(dump_recipe(recipe))
    best = load_recipe(tmp_path / "deep" / "best.yaml")
    assert best == recipe
    paths = [spec.path for spec in (best.data.train, best.data.id_val, best.data.ood_val["c"], best.data.id_test)]
    assert paths == [str(each) for each in (here.parent / "png", "/abs/png", here / "png", Path.home() / "png")]
    assert best.data.cache_dir == str(here / "cache")
    assert best.model.name == f"local-dir:{here.parent / 'm'}"
    assert absolute_paths(best, tmp_path / "deep") == best


def test_a_portable_recipe_names_files_and_folders_without_the_machine(tmp_path):
    """What lies inside another folder stays inside; two of one name are told apart; the cache is the machine's."""
    sets = {
        "train": {"source": "folder", "path": "/a/pacs"},
        "id_val": {"source": "folder", "path": "/a/pacs/photo"},
        "ood_val": {"one": {"source": "folder", "path": "/b/val"}, "two": {"source": "folder", "path": "/c/d/val"}},
        "ood_test": {"x": {"source": "table", "path": "/e/x.csv", "root": "/a/pacs/sketch"}},
        "cache_dir": "/cache",
    }
    value = {"format_version": 1, "name": "x", "model": {"name": "local-dir:/m/tiny"}, "data": sets}
    recipe = Recipe.model_validate({**value, "search": {"warm_start": ["/studies/old"]}})
    found = portable_paths(recipe)
    assert found.model.name == "local-dir:tiny"
    assert (found.data.train.path, found.data.id_val.path) == ("pacs", "pacs/photo")
    assert {name: spec.path for name, spec in found.data.ood_val.items()} == {"one": "b/val", "two": "d/val"}
    assert (found.data.ood_test["x"].path, found.data.ood_test["x"].root) == ("x.csv", "pacs/sketch")
    assert (found.data.cache_dir, found.search.warm_start) == (None, ("old",))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(found))
    assert load_recipe(tmp_path / "recipe.yaml") == absolute_paths(found, tmp_path.resolve())
