"""Recipes: reading, every message about a mistake, values set on the command line, writing back."""

import copy
import os
import pickle
import random
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from carft_ray.errors import RecipeError
from carft_ray.recipe import text
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.checks import advice
from carft_ray.recipe.checks.rules import TEMPLATE_SETS
from carft_ray.recipe.loading import (
    absolute_paths,
    dump_recipe,
    load_recipe,
    portable_paths,
    recipe_hash,
    resolve_path,
)
from carft_ray.recipe.messages import findings
from carft_ray.recipe.schema.fine_tuning import ModelConfig, TrainConfig, field_kind, is_weights_path
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sampling import GpSampler, NoPruner
from carft_ray.recipe.schema.sets import Corruption
from carft_ray.recipe.trial_values import apply

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


def _write(tmp_path, more="", base=BASE):
    path = tmp_path / "r.yaml"
    path.write_text(base + more)
    return path


def _load(tmp_path, more="", *overrides, base=BASE):
    return load_recipe(_write(tmp_path, more, base), overrides)


def _messages(tmp_path, more="", *overrides, base=BASE):
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, more, *overrides, base=base)
    assert caught.value.exit_code == 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return [str(problem).replace(f"{tmp_path}{os.sep}", "") for problem in caught.value.problems]


# ---- one mistake, one message

RECIPE_KEYS = "format_version, name, model, data, prompts, train, evaluate, search, resources, budget, tracking"
TRAIN_KEYS = ", ".join([*TrainConfig.model_fields][:20]) + ", ..."  # as many as a message lists
SEARCHABLE_KEYS = (
    "learning_rate, kl_weight, alpha, epochs, batch_size, weight_decay, decay, warmup_steps, clip_norm, "
    "label_smoothing, crop_scale, head_bias, head_lr_factor, layer_decay, freeze_layers, lora_rank, lora_alpha, "
    "ema_decay, context_scale"
)
SEED_REASON = (
    "Seeds are no hyperparameters: choosing the luckiest seed is selection on noise. "
    "Remove it; to see the spread, train the best recipe again with other seeds (--set train.seed=1)."
)
SOURCES = "sandbox, folder, table, webdataset, huggingface, benchmark, corrupted"

TEMPLATE_WORDS = ", ".join(TEMPLATE_SETS[:20]) + ", ..."
CORRUPTED = "    b: {source: corrupted, of: {source: folder, path: x}, severity: "

BAD = [
    # unknown keys
    ("nmae: x", f"r.yaml:9: nmae: unknown key; did you mean 'name'? (allowed: {RECIPE_KEYS})"),
    (
        "learning_rate: 1",
        f"r.yaml:9: learning_rate: unknown key; did you mean 'train.learning_rate'? (allowed: {RECIPE_KEYS})",
    ),
    ("zzz: 1", f"r.yaml:9: zzz: unknown key (allowed: {RECIPE_KEYS})"),
    ("storage: s3://x", f"r.yaml:9: storage: unknown key (allowed: {RECIPE_KEYS})"),
    ("train: {lr: 1}", f"r.yaml:9: train.lr: unknown key; did you mean 'learning_rate'? (allowed: {TRAIN_KEYS})"),
    (
        "train: {trials: 1}",
        f"r.yaml:9: train.trials: unknown key; did you mean 'search.trials'? (allowed: {TRAIN_KEYS})",
    ),
    # types
    ("train:\n  learning_rate: fast", 'r.yaml:10: train.learning_rate: must be a number, but got "fast"'),
    ("train: {learning_rate: '1e-4'}", 'r.yaml:9: train.learning_rate: must be a number, but got "1e-4"'),
    ("train: {kl_weight: true}", "r.yaml:9: train.kl_weight: must be a number, but got true"),
    ("train: {epochs: 1.5}", "r.yaml:9: train.epochs: must be a whole number, but got 1.5"),
    ("train: {epochs: 2.0}", "r.yaml:9: train.epochs: must be a whole number, but got 2.0"),
    ("train: {epochs: null}", "r.yaml:9: train.epochs: must be a whole number, but got null"),
    ("train: {seed: true}", "r.yaml:9: train.seed: must be a whole number, but got true"),
    ("train: {head_bias: yes}", 'r.yaml:9: train.head_bias: must be true or false, but got "yes"'),
    ("model: {pretrained: 5}", "r.yaml:9: model.pretrained: must be text, but got 5\n    Write it in quotes."),
    ("train: 5", "r.yaml:9: train: must be a mapping of keys to values, but got 5"),
    ("train: [1]", "r.yaml:9: train: must be a mapping of keys to values, but got [1]"),
    ("search: {space: 5}", "r.yaml:9: search.space: must be a mapping of keys to values, but got 5"),
    (
        "search: {space: {kl_weight: 5}}",
        "r.yaml:9: search.space.kl_weight: must be a mapping of keys to values, but got 5",
    ),
    (
        "prompts: {class_names: 5}",
        "r.yaml:9: prompts.class_names: must be the name of a benchmark or a list of texts, but got 5",
    ),
    (
        "prompts: {templates: 5}",
        "r.yaml:9: prompts.templates: must be the name of a set of templates, file:PATH, or a list of texts with {}, "
        "but got 5",
    ),
    # ranges
    ("train: {learning_rate: 0}", "r.yaml:9: train.learning_rate: must be greater than 0, but got 0"),
    ("train: {learning_rate: .inf}", "r.yaml:9: train.learning_rate: must be a finite number, but got .inf"),
    ("train: {learning_rate: .nan}", "r.yaml:9: train.learning_rate: must be a finite number, but got .nan"),
    ("train: {kl_weight: -1}", "r.yaml:9: train.kl_weight: must be at least 0, but got -1"),
    ("train: {alpha: 1.5}", "r.yaml:9: train.alpha: must be at most 1, but got 1.5"),
    ("train: {label_smoothing: 1}", "r.yaml:9: train.label_smoothing: must be less than 1, but got 1"),
    ("train: {layer_decay: 0}", "r.yaml:9: train.layer_decay: must be greater than 0, but got 0"),
    ("train: {layer_decay: 1.5}", "r.yaml:9: train.layer_decay: must be at most 1, but got 1.5"),
    ("train: {freeze_layers: -1}", "r.yaml:9: train.freeze_layers: must be at least 0, but got -1"),
    ("train: {freeze_layers: 1.5}", "r.yaml:9: train.freeze_layers: must be a whole number, but got 1.5"),
    ("train: {lora_rank: 0}", "r.yaml:9: train.lora_rank: must be at least 1, but got 0"),
    ("train: {lora_alpha: 0}", "r.yaml:9: train.lora_alpha: must be greater than 0, but got 0"),
    ("train: {ema_decay: 1}", "r.yaml:9: train.ema_decay: must be less than 1, but got 1"),
    ("train: {compile: 1}", "r.yaml:9: train.compile: must be auto, true or false, but got 1"),
    ("train: {crop_scale: 0.0}", "r.yaml:9: train.crop_scale: must be greater than 0, but got 0.0"),
    ("train: {batch_size: 0}", "r.yaml:9: train.batch_size: must be at least 1, but got 0"),
    # words
    (
        "train: {decay: matrix}",
        "r.yaml:9: train.decay: must be one of the allowed values, but got \"matrix\"; did you mean 'matrices'? "
        "(allowed: all, matrices)",
    ),
    (
        "format_version: 2",
        "r.yaml:9: format_version: must be one of the allowed values, but got 2 (allowed: 1)",
    ),
    (
        "prompts: {templates: openia}",
        "r.yaml:9: prompts.templates: must be the name of a set of templates, file:PATH, or a list of texts with {}, "
        "but got \"openia\"; did you mean 'openai'? "
        f"(allowed: {TEMPLATE_WORDS})",
    ),
    (
        "prompts: {templates: 'a {}'}",
        "r.yaml:9: prompts.templates: must be the name of a set of templates, file:PATH, or a list of texts with {}, "
        f'but got "a {{}}" (allowed: {TEMPLATE_WORDS})\n    Write one template as a list: ["a {{}}"].',
    ),
    # prompts and classes
    ("prompts: {templates: []}", "r.yaml:9: prompts.templates: must not be empty, but got []"),
    (
        "prompts:\n  templates:\n  - a {}\n  - a photo",
        'r.yaml:12: prompts.templates.1: must hold {} once, for the class, and no other brace, but got "a photo"',
    ),
    (
        "prompts: {templates: ['{} {}']}",
        'r.yaml:9: prompts.templates.0: must hold {} once, for the class, and no other brace, but got "{} {}"',
    ),
    (
        "prompts: {templates: ['{} {c}']}",
        'r.yaml:9: prompts.templates.0: must hold {} once, for the class, and no other brace, but got "{} {c}"',
    ),
    (
        "prompts: {templates: ['a {}', 'a {}']}",
        'r.yaml:9: prompts.templates.1: must not repeat an earlier template, but got "a {}"',
    ),
    (
        "prompts: {class_names: [a, '']}",
        'r.yaml:9: prompts.class_names: must not hold an empty text, but got ["a", ""]',
    ),
    (
        "prompts: {class_names: imagnet}",
        "r.yaml:9: prompts.class_names: must be the name of a benchmark or a list of texts, "
        f"but got \"imagnet\"; did you mean 'imagenet'? (allowed: {', '.join([*BENCHMARKS][:20])}, ...)",
    ),
    ("  classes: [a, b, a]", "r.yaml:9: data.classes: must not hold a name twice, but got a"),
    ("  classes: [a]", 'r.yaml:9: data.classes: must hold at least 2 values, but got ["a"]'),
    ("  classes: [a, ..]", 'r.yaml:9: data.classes: must be names of folders, not paths, but got ["a", ".."]'),
    (
        "  classes: [a, b]\nprompts: {class_names: [a, b, c]}",
        "r.yaml:10: prompts.class_names: must hold one text per class of data.classes (2), but got 3",
    ),
    # sets
    (
        "    b: {source: benchmark, path: x, name: imagenet-q}",
        "r.yaml:9: data.ood_test.b.name: must be the name of a benchmark: "
        f"{', '.join(BENCHMARKS)}, but got \"imagenet-q\"; did you mean 'imagenet-r'?",
    ),
    (
        "    b: {source: benchmark, path: x, name: imagenet}",
        "r.yaml:9: data.ood_test.b.split: is required for imagenet (allowed: train, val)",
    ),
    (
        "    b: {source: benchmark, path: x, name: dtd, split: tset}",
        "r.yaml:9: data.ood_test.b.split: must be a split of dtd, but got \"tset\"; did you mean 'test'? "
        "(allowed: train, val, test)",
    ),
    (
        "    b: {source: benchmark, path: x, name: imagenet-r, split: test}",
        'r.yaml:9: data.ood_test.b.split: must be left out: imagenet-r has no splits, but got "test"',
    ),
    (
        "    b: {source: benchmark, path: x, name: imagenet-r, domains: [art]}",
        'r.yaml:9: data.ood_test.b.domains: must be left out: imagenet-r has no domains, but got ["art"]',
    ),
    (
        "    b: {source: benchmark, path: x, name: pacs, domains: [photo, photo]}",
        "r.yaml:9: data.ood_test.b.domains: must not hold a name twice, but got photo",
    ),
    (
        "    b: {source: benchmark, path: x, name: pacs, trial_seed: -1}",
        "r.yaml:9: data.ood_test.b.trial_seed: must be at least 0, but got -1",
    ),
    (f"{CORRUPTED}6}}", "r.yaml:9: data.ood_test.b.severity: must be at most 5, but got 6"),
    (
        f"{CORRUPTED}1, corruptions: [fogg]}}",
        'r.yaml:9: data.ood_test.b.corruptions.0: must be one of the allowed values, but got "fogg"; '
        f"did you mean 'fog'? (allowed: {', '.join(get_args(Corruption))})",
    ),
    (
        f"{CORRUPTED}1, corruptions: [fog, fog]}}",
        "r.yaml:9: data.ood_test.b.corruptions: must not hold a name twice, but got fog",
    ),
    (
        "    b: {source: corrupted, of: {source: corrupted}, severity: 1}",
        'r.yaml:9: data.ood_test.b.of.source: must be one of the allowed values, but got "corrupted" '
        "(allowed: sandbox, folder, table, webdataset, huggingface, benchmark)",
    ),
    (
        "    b: {source: corrupted, of: {source: benchmark, path: x, name: pasc}, severity: 1}",
        "r.yaml:9: data.ood_test.b.of.name: must be the name of a benchmark: "
        f"{', '.join(BENCHMARKS)}, but got \"pasc\"; did you mean 'pacs'?",
    ),
    (
        "    b: {source: web}",
        f'r.yaml:9: data.ood_test.b.source: must be one of the allowed values, but got "web" (allowed: {SOURCES})',
    ),
    ("    b: {path: x}", f"r.yaml:9: data.ood_test.b.source: is required (allowed: {SOURCES})"),
    ("    b: {source: folder, domains: [c]}", "r.yaml:9: data.ood_test.b.path: is required"),
    (
        "    b: {source: folder, path: x, domains: []}",
        "r.yaml:9: data.ood_test.b.domains: must not be empty, but got []",
    ),
    (
        "    b: {source: folder, path: x, domains: [c, c]}",
        "r.yaml:9: data.ood_test.b.domains: must not hold a name twice, but got c",
    ),
    (
        "    b: {source: folder, path: x, domain: [c], domains: [c]}",
        "r.yaml:9: data.ood_test.b.domain: unknown key; did you mean 'domains'? "
        "(allowed: path, part, shots, shots_seed, classes, on_bad_image, max_pixels, exclude, source, domains)",
    ),
    (
        "    b: {source: folder, path: x, part: [0.5, 0.2]}",
        "r.yaml:9: data.ood_test.b.part: must be two fractions [from, to] with 0 <= from < to <= 1, but got [0.5, 0.2]",
    ),
    ("    b: 5", "r.yaml:9: data.ood_test.b: must be a mapping of keys to values, but got 5"),
    (
        "    a b: {source: folder, path: x, domains: [c]}",
        "r.yaml:9: data.ood_test.a b: a name must begin with a letter or digit and hold only letters, digits, _ and -, "
        'at most 100, but got "a b"',
    ),
    (
        "    train: {source: folder, path: x, domains: [c]}",
        "r.yaml:9: data.ood_test.train: a set must not have the name of a role",
    ),
    (
        "    sketch: {source: folder, path: x, domains: [c]}",
        "r.yaml:9: data.ood_test.sketch: must differ from the names in data.ood_val",
    ),
    # model
    (
        "model: {name: ViT-B-32}",
        "r.yaml:9: model.pretrained: is required for ViT-B-32: the weights to start from\n"
        "    Give a tag of open_clip such as openai, or the path of a weights file.",
    ),
    (
        "model: {pretrained: openai}",
        "r.yaml:9: model.pretrained: must be left out for the sandbox, which brings its own weights, "
        'but got "openai"\n    Remove it, or give the model that it belongs to as model.name.',
    ),
    # search space
    (
        "search:\n  space:\n    learning_rate: {low: 1, high: 0.5}",
        "r.yaml:11: search.space.learning_rate: low <= high must hold, but got low=1.0, high=0.5",
    ),
    (
        "search: {space: {kl_weight: {low: 0, high: 3, log: true}}}",
        "r.yaml:9: search.space.kl_weight: low > 0 must hold with log: true, but got low=0.0",
    ),
    (
        "search: {space: {kl_weight: {low: 1, high: 3, log: true, step: 1}}}",
        "r.yaml:9: search.space.kl_weight: log: true and step exclude each other, but got step=1.0",
    ),
    (
        "search: {space: {kl_weight: {low: 0, high: 0.95, step: 0.1}}}",
        "r.yaml:9: search.space.kl_weight: high - low must be a multiple of step, but got low=0.0, high=0.95, step=0.1",
    ),
    (
        "search: {space: {kl_weight: {low: 0, high: 1, step: 2}}}",
        "r.yaml:9: search.space.kl_weight: high - low must be a multiple of step, but got low=0.0, high=1.0, step=2.0",
    ),
    ("search: {space: {kl_weight: {low: 1}}}", "r.yaml:9: search.space.kl_weight.high: is required"),
    (
        "search: {space: {kl_weight: {low: 1, hihg: 2, high: 2}}}",
        "r.yaml:9: search.space.kl_weight.hihg: unknown key; did you mean 'high'? "
        "(allowed: type, low, high, log, step, when)",
    ),
    (
        "search: {space: {kl_weight: {type: floot, low: 1, high: 2}}}",
        'r.yaml:9: search.space.kl_weight.type: must be one of the allowed values, but got "floot"; '
        "did you mean 'float'? (allowed: float, int, categorical)",
    ),
    (
        "search: {space: {kl_weight: {choices: []}}}",
        "r.yaml:9: search.space.kl_weight.choices: must not be empty, but got []",
    ),
    (
        "search: {space: {kl_weight: {choices: [1, 1.0]}}}",
        "r.yaml:9: search.space.kl_weight.choices: choices must differ, but got [1, 1.0]",
    ),
    (
        "search: {space: {kl_weight: {choices: [[1]]}}}",
        "r.yaml:9: search.space.kl_weight.choices.0: must be a number, a text, true, false or null, but got [1]",
    ),
    (
        "search: {space: {seed: {low: 0, high: 9}}}",
        f"r.yaml:9: search.space.seed: must not be searched\n    {SEED_REASON}",
    ),
    (
        "search: {space: {precision: {choices: [fp32, bf16]}}}",
        "r.yaml:9: search.space.precision: must not be searched\n"
        "    It changes speed and rounding, not the method. Choose one for all trials.",
    ),
    (
        "search: {space: {micro_batch: {low: 1, high: 2}}}",
        "r.yaml:9: search.space.micro_batch: must not be searched\n"
        "    It changes speed and memory, not the gradient. Choose one for all trials.",
    ),
    (
        "search: {space: {kl_weigth: {low: 1, high: 2}}}",
        'r.yaml:9: search.space.kl_weigth: must be a field of train, but got "kl_weigth"; '
        f"did you mean 'kl_weight'? (allowed: {SEARCHABLE_KEYS})",
    ),
    (
        "search: {space: {train.lr: {low: 1, high: 2}}}",
        'r.yaml:9: search.space.train.lr: must be a field of train, but got "train.lr"; '
        f"did you mean 'learning_rate'? (allowed: {SEARCHABLE_KEYS})",
    ),
    (
        "search: {space: {label_smoothing: {low: 0, high: 1}}}",
        "r.yaml:9: search.space.label_smoothing.high: train.label_smoothing must be less than 1, but got 1.0",
    ),
    (
        "search: {space: {learning_rate: {low: 0, high: 1}}}",
        "r.yaml:9: search.space.learning_rate.low: train.learning_rate must be greater than 0, but got 0.0",
    ),
    (
        "search: {space: {epochs: {type: float, low: 1, high: 2}}}",
        "r.yaml:9: search.space.epochs: epochs takes whole numbers only, but got type float\n"
        "    Write type: int, or leave the type out.",
    ),
    (
        "search: {space: {epochs: {low: 1.5, high: 2}}}",
        "r.yaml:9: search.space.epochs.low: must be a whole number, but got 1.5",
    ),
    (
        "search: {space: {epochs: {low: 0, high: 2}}}",
        "r.yaml:9: search.space.epochs.low: train.epochs must be at least 1, but got 0",
    ),
    (
        "search: {space: {decay: {low: 1, high: 2}}}",
        "r.yaml:9: search.space.decay: decay is no number and needs choices, but got float\n"
        "    Write decay: {choices: [all, matrices]}.",
    ),
    (
        "search: {space: {head_bias: {low: 0, high: 1}}}",
        "r.yaml:9: search.space.head_bias: head_bias is no number and needs choices, but got float\n"
        "    Write head_bias: {choices: [true, false]}.",
    ),
    (
        "search: {space: {decay: {choices: [all, none]}}}",
        'r.yaml:9: search.space.decay.choices.1: train.decay must be one of the allowed values, but got "none" '
        "(allowed: all, matrices)",
    ),
    # alpha
    (
        "search: {space: {alpha: {low: 0.2, high: 1}}}",
        "r.yaml:9: search.alpha.mode: must be sample where alpha is in search.space, else profile, but got profile\n"
        "    With sample, add search.space.alpha: {low: 0.1, high: 1}; with profile, remove it: every trial tries the "
        "whole curve.",
    ),
    (
        "search: {alpha: {mode: sample}, space: {kl_weight: {low: 1, high: 2}}}",
        "r.yaml:9: search.alpha.mode: must be sample where alpha is in search.space, else profile, but got sample\n"
        "    With sample, add search.space.alpha: {low: 0.1, high: 1}; with profile, remove it: every trial tries the "
        "whole curve.",
    ),
    (
        "search: {alpha: {mode: sample}, space: {alpha: {low: 0, high: 1}}}",
        "r.yaml:9: search.space.alpha.low: must be at least search.alpha.lowest, 0.1, but got 0.0\n"
        "    alpha near 0 is the zero-shot model, which is a baseline and no trial.",
    ),
    (
        "search: {alpha: {mode: sample}, space: {alpha: {choices: [1, null]}}}",
        "r.yaml:9: search.space.alpha.choices.1: must be at least search.alpha.lowest, 0.1, but got null\n"
        "    alpha near 0 is the zero-shot model, which is a baseline and no trial.",
    ),
    (
        "search: {alpha: {mode: sample}, space: {alpha: {low: 0.5, high: 2}}}",
        "r.yaml:9: search.space.alpha.high: train.alpha must be at most 1, but got 2.0",
    ),
    (
        "search: {alpha: {grid: [0, 0.5]}}",
        "r.yaml:9: search.alpha.grid: must rise strictly from 0 to 1, but got [0.0, 0.5]",
    ),
    ("search: {alpha: {grid: [0]}}", "r.yaml:9: search.alpha.grid: must hold at least 2 values, but got [0]"),
    ("search: {alpha: {lowest: 0}}", "r.yaml:9: search.alpha.lowest: must be greater than 0, but got 0"),
    # the rest of search, resources
    (
        "search: {trials: 4, sampler: {startup_trials: 5}}",
        "r.yaml:9: search.sampler.startup_trials: must be at most search.trials, 4, but got 5",
    ),
    (
        "search: {baselines: {a: {lr: 1}}}",
        f"r.yaml:9: search.baselines.a.lr: unknown key; did you mean 'learning_rate'? (allowed: {TRAIN_KEYS})",
    ),
    (
        "search: {baselines: {a: {kl_weight: -1}}}",
        "r.yaml:9: search.baselines.a.kl_weight: must be at least 0, but got -1",
    ),
    (
        "search: {baselines: {zero_shot: {alpha: 0}}}",
        "r.yaml:9: search.baselines.zero_shot: must have another name: zero_shot is always shown, without training",
    ),
    ("search: {baselines: {a: 5}}", "r.yaml:9: search.baselines.a: must be a mapping of keys to values, but got 5"),
    (
        "resources: {executor: inline, num_workers: 2}",
        "r.yaml:9: resources.num_workers: must be 1 with executor: inline, but got 2\n"
        "    Write executor: ray-train, or leave the executor out.",
    ),
    (
        "resources: {gpus_per_worker: 1.5}",
        "r.yaml:9: resources.gpus_per_worker: must be a whole number above 1, and with several workers, but got 1.5\n"
        "    Write 1, or with num_workers: 1 a share of one GPU, such as 0.5.",
    ),
    (
        "resources: {gpus_per_worker: 0.5, num_workers: 2}",
        "r.yaml:9: resources.gpus_per_worker: must be a whole number above 1, and with several workers, but got 0.5\n"
        "    Write 1, or with num_workers: 1 a share of one GPU, such as 0.5.",
    ),
    (
        "resources: {gpus_per_worker: 0, accelerator: H100}",
        "r.yaml:9: resources.accelerator: must be left out with gpus_per_worker: 0, but got H100",
    ),
    (
        "resources: {gpus_per_worker: 0.00001}",
        "r.yaml:9: resources.gpus_per_worker: must be at least 0.0001, the least that Ray counts, but got 1e-05",
    ),
    (
        "resources: {cpus_per_worker: 0.00001}",
        "r.yaml:9: resources.cpus_per_worker: must be at least 0.0001, the least that Ray counts, but got 1e-05",
    ),
    # the text itself
    ("name: again", "r.yaml:9: name: must stand once, but stands on line 1 too"),
    ("train: {epochs: 1, epochs: 2}", "r.yaml:9: train.epochs: must stand once, but stands on line 9 too"),
    ("train: {epochs: 1", "r.yaml:10:1: must be valid YAML: expected ',' or '}', but got '<stream end>'"),
    ("train: a: b", "r.yaml:9:9: must be valid YAML: mapping values are not allowed here"),
    (
        "train:\n\tepochs: 1",
        "r.yaml:10:1: must be valid YAML: found character '\\t' that cannot start any token\n"
        "    Indent with spaces, not with tabs.",
    ),
    ("train: *t", "r.yaml:9:8: must be valid YAML: found undefined alias 't'"),
    ("---\nname: x", "r.yaml:9:1: must be valid YAML: but found another document"),
    (
        "train: !!python/object/apply:os.system [ls]",
        "r.yaml:9: train: must be a plain value without a tag, but got tag:yaml.org,2002:python/object/apply:os.system",
    ),
    ("train: !!int x", "r.yaml:9: train: must be a plain value without a tag, but got tag:yaml.org,2002:int"),
    ("? [a]\n: b", "r.yaml:9: a key must be a word"),
    ("train: &a [*a]", "r.yaml: must not be nested so deeply, nor repeat itself by aliases so often"),
    ("train: " + "[" * 600, "r.yaml: must not be nested so deeply, nor repeat itself by aliases so often"),
    ("name2: \x07", "r.yaml: must be valid YAML: special characters are not allowed"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[more[:60] for more, _ in BAD])
def test_a_mistake_gives_exactly_one_message(tmp_path, more, message):
    assert _messages(tmp_path, more + ("\n" if "[[[" not in more else "")) == [message]


@pytest.mark.parametrize(
    ("base", "messages"),
    [
        ("", ["r.yaml: data: is required"]),
        ("# nothing\n", ["r.yaml: data: is required"]),
        ("name: x\n", ["r.yaml:1: data: is required"]),
        ("name: x\ndata:\n", ["r.yaml:2: data.train: is required", "r.yaml:2: data.id_val: is required"]),
        ("- a\n", ['r.yaml:1: must be a mapping of keys to values, but got ["a"]']),
        ("hello\n", ['r.yaml:1: must be a mapping of keys to values, but got "hello"']),
    ],
)
def test_a_recipe_without_data(tmp_path, base, messages):
    assert _messages(tmp_path, base=base) == messages


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path):
    more = """\
train:
  learning_rate: 0
  decay: al
search:
  space:
    learning_rate: {low: 2, high: 1}
    epochs: {low: 1, high: 0.5}
resources: {executor: inlin}
"""
    messages = _messages(tmp_path, more, "search.trials=0", "train.lr=1", "train.seed=-1")
    assert [re.split(": (must|unknown|low) ", message)[0] for message in messages] == [
        "r.yaml:10: train.learning_rate",
        "r.yaml:11: train.decay",
        "r.yaml:14: search.space.learning_rate",
        "r.yaml:15: search.space.epochs.high",
        "r.yaml:16: resources.executor",
        "--set search.trials=0",
        "--set train.lr=1",
        "--set train.seed=-1",
    ]


def test_rules_between_keys_are_told_all_at_once_when_every_key_is_right_by_itself(tmp_path):
    more = """\
train:
  epochs: 7.5
search:
  space:
    seed: {low: 1, high: 2}
resources: {executor: inline, num_workers: 2}
"""
    assert _messages(tmp_path, more) == ["r.yaml:10: train.epochs: must be a whole number, but got 7.5"]
    messages = _messages(tmp_path, more.replace("7.5", "7"))
    assert [re.split(": must ", message)[0] for message in messages] == [
        "r.yaml:13: search.space.seed",
        "r.yaml:14: resources.num_workers",
    ]


@pytest.mark.slow
def test_no_message_speaks_pydantic(tmp_path):
    """Puts a wrong value of each kind at every key of a complete recipe."""
    complete = text.parse(dump_recipe(_load(tmp_path, "search: {space: {kl_weight: {low: 1, high: 2}}}")), "x").value
    values = [None, True, -3, 2.5, float("nan"), "zz", [], ["zz", "zz"], [[1]], {}, {"zz": 1}]
    said = {}
    for keys in _paths(complete):
        for value in values:
            broken = copy.deepcopy(complete)
            holder = broken
            for key in keys[:-1]:
                holder = holder[key]
            holder[keys[-1]] = value
            try:
                Recipe.model_validate(broken)
            except ValidationError as error:
                found = findings(error)
                assert found
                for finding in found:
                    shorter = min(len(finding.path), len(keys))
                    assert finding.path[:shorter] == keys[:shorter], (keys, value, finding)
                said |= {finding.rule: (keys, value) for finding in found}
    for rule, where in said.items():
        for word in ("Input", "input", "valid dictionary", "tagged", "instance", "pydantic", "form that is not", "{"):
            assert word not in rule.replace("with {}", ""), where
    assert len(said) > 15


def _paths(value, prefix=()):
    for key, child in value.items():
        yield (*prefix, key)
        if isinstance(child, dict):
            yield from _paths(child, (*prefix, key))


# ---- files that cannot be read


def test_a_missing_recipe_names_the_nearest_file_of_the_folder(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(BASE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "quikstart.yaml")
    meant = str(tmp_path / "quickstart.yaml")
    assert str(caught.value) == f"{tmp_path / 'quikstart.yaml'}: no such recipe; did you mean {meant!r}?"


def test_a_missing_folder_a_folder_and_bytes_are_told_apart(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    for name, message in (
        ("no/r.yaml", "no such recipe; its folder does not exist"),
        ("", "must be a recipe file, but is a folder (allowed: bytes.yaml)"),
        ("bytes.yaml", "must be text in UTF-8, but byte 6 is not"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {message}"


# ---- what is accepted


def test_yaml_is_version_1_2(tmp_path):
    recipe = _load(
        tmp_path, "train: {learning_rate: 1e-4, kl_weight: 3, weight_decay: .05}\nprompts: {templates: ['on {}']}"
    )
    assert recipe.train.learning_rate == 1e-4
    assert type(recipe.train.kl_weight) is float
    assert recipe.train.weight_decay == 0.05
    assert recipe.prompts.templates == ("on {}",)
    assert _load(tmp_path, "", base=BASE.replace("base", "on")).name == "on"


def test_a_part_with_nothing_in_it_keeps_its_defaults(tmp_path):
    more = "train:\n  # epochs: 3\nsearch:\n  space:\n  baselines:\nbudget:\n"
    base = BASE.replace("  ood_test:\n    painting", "  ood_test:\n    # painting")
    recipe = _load(tmp_path, more, base=base)
    assert recipe.train == TrainConfig()
    assert recipe.data.ood_test == {}
    assert recipe.search.space == {}


def test_anchors_and_aliases_are_plain_repetition(tmp_path):
    more = "search: {baselines: {a: &a {kl_weight: 0}, b: *a}}"
    assert _load(tmp_path, more).search.baselines == {"a": {"kl_weight": 0}, "b": {"kl_weight": 0}}


def test_the_type_of_a_parameter_follows_from_its_keys_and_its_field(tmp_path):
    more = "search: {space: {epochs: {low: 2, high: 6}, warmup_steps: {low: 1, high: 9}, kl_weight: {low: 1, high: 2}, \
clip_norm: {choices: [1, null]}, weight_decay: {type: int, low: 0, high: 1}}}"
    kinds = {name: parameter.type for name, parameter in _load(tmp_path, more).search.space.items()}
    assert kinds == {
        "epochs": "int",
        "warmup_steps": "int",
        "kl_weight": "float",
        "clip_norm": "categorical",
        "weight_decay": "int",
    }
    assert {field_kind(name) for name in ("decay", "precision")} == {str}


def test_choices_keep_their_kind(tmp_path):
    choices = (
        _load(tmp_path, "search: {space: {head_bias: {choices: [true, false]}}}").search.space["head_bias"].choices
    )
    assert choices == (True, False)
    assert all(type(choice) is bool for choice in choices)


def test_a_recipe_is_frozen(tmp_path):
    with pytest.raises(ValidationError):
        _load(tmp_path).train.epochs = 3


def test_templates_come_from_a_file_once_and_stand_in_the_recipe(tmp_path):
    (tmp_path / "mine.txt").write_text("a photo of a {}.\n\n  a drawing of a {}.\n")
    recipe = _load(tmp_path, "prompts: {templates: 'file:mine.txt'}")
    assert recipe.prompts.templates == ("a photo of a {}.", "a drawing of a {}.")
    assert _load(tmp_path, "", f"prompts.templates=file:{tmp_path / 'mine.txt'}") == recipe
    assert Recipe.model_validate(text.parse(dump_recipe(recipe), "").value) == recipe
    (tmp_path / "mine.txt").write_text("a photo of a {}.\na drawing\n")
    message = 'r.yaml:9: prompts.templates.1: must hold {} once, for the class, and no other brace, but got "a drawing"'
    assert _messages(tmp_path, "prompts: {templates: 'file:mine.txt'}") == [message]
    rule = "r.yaml:9: prompts.templates: must be a file with one template per line, but got"
    assert _messages(tmp_path, "prompts: {templates: 'file:none.txt'}") == [
        f"{rule} none.txt: No such file or directory"
    ]
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe")
    assert _messages(tmp_path, "prompts: {templates: 'file:mine.txt'}") == [
        f"{rule} mine.txt: must be text in UTF-8, but byte 0 is not"
    ]
    os.mkfifo(tmp_path / "pipe")
    (message,) = _messages(tmp_path, "prompts: {templates: 'file:pipe'}")
    assert message == f"{rule} pipe: must be a regular file, but got a pipe, device or socket"


def test_class_names_may_repeat_as_imagenet_s_do(tmp_path):
    recipe = _load(tmp_path, "  classes: [n1, n2]\nprompts: {class_names: [missile, missile]}")
    assert recipe.prompts.class_names == ("missile", "missile")


def test_steps_are_compared_in_decimals(tmp_path):
    assert (
        _load(tmp_path, "search: {space: {kl_weight: {low: 0, high: 0.9, step: 0.1}}}").search.space["kl_weight"].step
    )


# ---- --set


def test_set_wins_over_the_file_and_a_later_one_over_an_earlier_one(tmp_path):
    recipe = _load(tmp_path, "train: {epochs: 3, batch_size: 8}", "train.epochs=4", "train.epochs=5")
    assert (recipe.train.epochs, recipe.train.batch_size) == (5, 8)


def test_set_makes_missing_parts(tmp_path):
    recipe = _load(
        tmp_path,
        "train:\n",
        "search.space.weight_decay={low: .01, high: .2}",
        "search.space.epochs.low=1",
        "search.space.epochs.high=2",
        "data.id_test={source: folder, path: x, domains: [a]}",
        "data.ood_val.b={source: folder, path: x, domains: [b]}",
        "train.alpha=null",
        "train.clip_norm=",
        "search.baselines.ft.kl_weight=0",
        "search.alpha.grid=[0, .5, 1]",
    )
    assert recipe.search.space["weight_decay"].high == 0.2
    assert recipe.search.space["epochs"].high == 2
    assert recipe.data.id_test.domains == ("a",)
    assert set(recipe.data.ood_val) == {"sketch", "b"}
    assert recipe.train.clip_norm is None
    assert recipe.search.baselines == {"ft": {"kl_weight": 0}}
    assert recipe.search.alpha.grid == (0, 0.5, 1)


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
    search = _load(tmp_path, more, *options).search
    assert [*search.space] == ["weight_decay"]
    assert search.baselines == {"ft": {"kl_weight": 0, "clip_norm": None}}
    assert [*_load(tmp_path, more, "search.space.epochs={low: 1, high: 2}", *options[:1]).search.space] == [
        "weight_decay",
        "epochs",
    ]


BAD_OPTIONS = [
    (
        "data.ood_val.scetch=null",
        "--set data.ood_val.scetch=null: data.ood_val must hold scetch, which null takes out; "
        "did you mean 'sketch'? (allowed: sketch)",
    ),
    ("train.epochs=0", "--set train.epochs=0: must be at least 1, but got 0"),
    ("train.epochs", "--set train.epochs: must have the form key.path=value"),
    ("=3", "--set =3: must have the form key.path=value"),
    ("train..epochs=3", "--set train..epochs=3: must have the form key.path=value"),
    ("train.epochs=[", "--set train.epochs=[: must be valid YAML: expected the node content, but found '<stream end>'"),
    (
        "train.epoch=3",
        f"--set train.epoch=3: unknown key; did you mean 'epochs'? (allowed: {TRAIN_KEYS})",
    ),
    (
        "epochs=3",
        f"--set epochs=3: unknown key; did you mean 'train.epochs'? (allowed: {RECIPE_KEYS})",
    ),
    (
        "trian.epochs=3",
        f"--set trian.epochs=3: trian: unknown key; did you mean 'train'? (allowed: {RECIPE_KEYS})",
    ),
    ("train.epochs.low=3", '--set train.epochs.low=3: train.epochs: must be a whole number, but got {"low": 3}'),
    ("search.alpha.grid.0=1", '--set search.alpha.grid.0=1: search.alpha.grid: must be a list, but got {"0": 1}'),
    (
        "data.train.domian=x",
        "--set data.train.domian=x: unknown key; did you mean 'domain'? "
        "(allowed: source, domain, split, num_per_class)",
    ),
    (
        "search.space.kl_weight={low: 2, high: 1}",
        "--set search.space.kl_weight={low: 2, high: 1}: low <= high must hold, but got low=2.0, high=1.0",
    ),
    (
        "search.space.kl_weight={low: 2}",
        "--set search.space.kl_weight={low: 2}: search.space.kl_weight.high: is required",
    ),
    (
        "search.space={seed: {low: 1, high: 2}}",
        f"--set search.space={{seed: {{low: 1, high: 2}}}}: search.space.seed: must not be searched\n    {SEED_REASON}",
    ),
]


@pytest.mark.parametrize(("option", "message"), BAD_OPTIONS, ids=[option for option, _ in BAD_OPTIONS])
def test_a_wrong_option_is_told_with_the_option_as_its_place(tmp_path, option, message):
    assert _messages(tmp_path, "", option) == [message]


def test_set_mends_a_mistake_of_the_file(tmp_path):
    assert _load(tmp_path, "train: {epochs: 0}", "train.epochs=2").train.epochs == 2
    assert _load(tmp_path, "train: 5", "train.epochs=2").train.epochs == 2


# ---- warnings, and what a search needs

WARNINGS = [
    (
        "budget: {gpu_hours: 5}\nresources: {gpus_per_worker: 0}",
        "budget.gpu_hours has no effect: resources.gpus_per_worker is 0",
    ),
    ("train: {kl_weight: 0, context_scale: 9}", "train.context_scale has no effect: kl_weight is 0"),
    (
        "train: {kl_weight: 0}\nsearch: {space: {context_scale: {low: 1, high: 2}}}",
        "search.space.context_scale has no effect: kl_weight is 0",
    ),
    (
        "prompts: {templates: ['a {}']}",
        "train.kl_weight has no effect: with one template the KL term is always 0",
    ),
    ("train: {decay: matrices, weight_decay: 0}", "train.decay has no effect: weight_decay is 0"),
    (
        "train: {head_bias: true, head_lr_factor: 0}",
        "train.head_bias has no effect: head_lr_factor is 0, so it stays 0",
    ),
    ("train: {lora_alpha: 8}", "train.lora_alpha has no effect: lora_rank is null"),
    (
        "search: {space: {lora_alpha: {low: 1, high: 8}}}",
        "search.space.lora_alpha has no effect: lora_rank is null",
    ),
    (
        "train: {ema_decay: 0}",
        "train.ema_decay has no effect: an average with decay 0 is the last step; null says the same",
    ),
    ("train: {precision: fp64}", "train.precision fp64 is for checks of the numbers: several times slower, no better"),
    (
        "search: {objective: {kind: harmonic, id_weight: 0.3}}",
        "search.objective.id_weight has no effect: the objective is harmonic",
    ),
    (
        "resources: {gpus_per_worker: 4}",
        "resources.gpus_per_worker takes 4 GPUs for each worker, which computes on one; write 1, and num_workers: 4 to "
        "train on all of them",
    ),
    (
        "model: {name: ViT-B-16-quickgelu, pretrained: openai}",
        "prompts.templates sandbox describes the sandbox's own pictures; for ViT-B-16-quickgelu try openai",
    ),
    (
        "    b: {source: sandbox, domain: sketch, split: test, num_per_class: 1}",
        "data.ood_test.b shows other images of a shift that data.ood_val.sketch has shown to the selection",
    ),
    (
        "    b: {source: sandbox, domain: photo, split: test, num_per_class: 1}",
        "data.ood_test.b is no shift: data.train has the same domain",
    ),
]


@pytest.mark.parametrize(("more", "warning"), WARNINGS, ids=[more[:40] for more, _ in WARNINGS])
def test_a_setting_without_effect_is_named(tmp_path, more, warning):
    assert advice.warnings(_load(tmp_path, more)) == [warning]


def test_a_recipe_without_ood_sets_is_told_what_its_objective_is(tmp_path):
    recipe = _load(tmp_path, base=BASE.split("  ood_val")[0])
    assert advice.warnings(recipe) == ["search.objective is ID accuracy alone: data.ood_val holds no set"]


@pytest.mark.parametrize(
    "more",
    [
        "",
        "train: {kl_weight: 0, context_scale: 9}\nsearch: {space: {kl_weight: {low: 1, high: 2}}}",
        "train: {kl_weight: 0}\nprompts: {templates: ['a {}']}",
        "train: {decay: matrices, weight_decay: 0}\nsearch: {space: {weight_decay: {low: 0, high: 1}}}",
    ],
)
def test_a_setting_with_an_effect_is_not(tmp_path, more):
    assert advice.warnings(_load(tmp_path, more)) == []


def test_imagenet_v2_is_no_ood_validation_set(tmp_path):
    recipe = load_recipe(_write(tmp_path), ["data.ood_val={x: {source: benchmark, name: imagenet-v2, path: p}}"])
    assert advice.warnings(recipe) == [
        "data.ood_val.x is ImageNet-V2, which ranks models as ID does and is no OOD validation set"
    ]


@pytest.mark.parametrize("name", ["quickstart", "folders"])
def test_the_recipes_that_come_along_are_given_no_warning(name):
    assert advice.warnings(load_recipe(Path(__file__).parent.parent / "search_spaces" / f"{name}.yaml")) == []


def test_what_only_a_search_minds(tmp_path):
    assert list(map(str, advice.check_searchable(_load(tmp_path, "train: {alpha: 0.5}")))) == [
        "search.space: must hold at least one parameter to search\n"
        "    Add a parameter, for example learning_rate: {low: 1e-6, high: 1e-4, log: true}.",
        "train.alpha: must not be fixed in a search, which finds alpha itself, but got 0.5\n"
        "    Remove train.alpha (--set train.alpha=null).",
    ]
    assert advice.check_searchable(_load(tmp_path, "search: {space: {kl_weight: {low: 1, high: 2}}}")) == []


# ---- values over a recipe


def test_apply_sets_values_over_train_and_leaves_the_recipe(tmp_path):
    recipe = _load(tmp_path, "train: {epochs: 3}")
    applied = apply(recipe, {"learning_rate": 1e-3, "alpha": 0.4, "batch_size": 8})
    assert (applied.train.learning_rate, applied.train.alpha, applied.train.epochs) == (1e-3, 0.4, 3)
    assert recipe.train.alpha is None
    assert apply(recipe, {}) == recipe


def test_apply_refuses_values_that_break_the_rules_of_train(tmp_path):
    with pytest.raises(RecipeError) as caught:
        apply(_load(tmp_path), {"learning_rate": -1, "epoch": 2})
    first, second = caught.value.problems
    assert str(first) == "train.learning_rate: must be greater than 0, but got -1"
    assert (second.place, second.nearest) == ("train.epoch", "epochs")


# ---- writing back


def _random_recipe(rng):
    """A valid recipe with random values at many keys, odd texts included."""
    texts = [
        "a {}",
        "on {}",
        "{}: 'x' # y",
        'é {} "q"',
        " {} ",
        "~ {}",
        "-\n{}\t",
        "1e-4{}",
        "{}\u2028",
        "\u00a0{}\x85",
    ]
    words = ["true", "null", "1e-4", "2020-01-01", "0x10", "a b", "é", "it's", "#1", "- a", "=", "<<", "1_000"]
    classes = rng.sample(words, rng.randint(2, 6))

    def folder(*domains):
        return {"source": "folder", "path": rng.choice(["../x", "/abs/é", "~/p q", "1", "null"]), "domains": domains}

    space = {
        "learning_rate": {
            "low": 10 ** rng.uniform(-7, -5),
            "high": 10 ** rng.uniform(-4, -1),
            "log": rng.random() < 0.5,
        },
        "epochs": {"low": 1, "high": rng.randint(1, 9)},
        "clip_norm": {"choices": rng.sample([None, 1, 0.5, 1e-7], 3)},
        "decay": {"choices": ["all", "matrices"]},
    }
    return {
        "name": rng.choice(["on", "1e3", "x-_1"]),
        "model": rng.choice([{}, {"name": "ViT-B-32", "pretrained": rng.choice(["openai", "a/b.pt"])}]),
        "data": {
            "train": {"source": "sandbox", "domain": "photo", "split": "train", "num_per_class": rng.randint(1, 10**9)},
            "id_val": folder("v", "null"),
            "ood_val": {"1": folder("w"), "null-": folder("x y")},
            "id_test": rng.choice([None, folder("t")]),
            "classes": classes,
            "cache_dir": rng.choice([None, "c", "/c"]),
        },
        "prompts": {
            "templates": rng.choice(["simple", rng.sample(texts, rng.randint(1, len(texts)))]),
            "class_names": rng.choice([None, [rng.choice(words) for _ in classes]]),
        },
        "train": {
            "learning_rate": 10 ** rng.uniform(-300, 2),
            "kl_weight": rng.choice([0, 5e-324, 1 / 3, 1e17, 123456789.123]),
            "alpha": rng.choice([None, 0, 1, rng.random()]),
            "batch_size": rng.randint(1, 9999),
            "head_bias": rng.random() < 0.5,
            "seed": rng.randrange(2**63),
        },
        "search": {
            "space": {key: space[key] for key in rng.sample(list(space), rng.randint(0, 4))},
            "baselines": {"ft": {"kl_weight": rng.choice([0, 0.0])}, "1": {}},
            "alpha": {"grid": [0, rng.random(), 1]},
        },
    }


@pytest.mark.slow
def test_a_recipe_that_was_written_loads_back_equal(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "written.yaml"
    hashes = set()
    for _ in range(40):
        recipe = absolute_paths(Recipe.model_validate(_random_recipe(rng)), tmp_path)
        written = dump_recipe(recipe)
        path.write_text(written)
        again = load_recipe(path)
        assert again == recipe
        assert dump_recipe(again) == written
        assert recipe_hash(again) == recipe_hash(recipe)
        hashes.add(recipe_hash(recipe))
    assert len(hashes) == 40


def test_the_written_keys_stand_in_the_order_of_the_schema(tmp_path):
    value = text.parse(dump_recipe(_load(tmp_path)), "x").value
    assert list(value) == list(Recipe.model_fields)
    assert list(value["train"]) == list(TrainConfig.model_fields)
    assert list(value["data"]["ood_val"]) == ["sketch"]


def test_the_hash_depends_on_values_and_not_on_how_they_are_written(tmp_path):
    one = _load(tmp_path, "train: {epochs: 10, kl_weight: 1}\nsearch: {baselines: {a: {kl_weight: 2}}}")
    other = _load(tmp_path, "search: {baselines: {a: {kl_weight: 2.0}}}\ntrain: {kl_weight: 1.0}")
    assert one == other
    assert recipe_hash(one) == recipe_hash(other)
    assert len(recipe_hash(one)) == 64
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
  ood_test: {e: {source: sandbox, domain: photo, split: test, num_per_class: 1}}
"""
    recipe = _load(tmp_path, base=base)
    folder = (tmp_path / "r.yaml").resolve().parent
    path = tmp_path / "deep" / "best.yaml"
    path.parent.mkdir()
    path.write_text(dump_recipe(recipe))
    best = load_recipe(path)
    assert best == recipe
    assert best.data.train.path == str(folder.parent / "png")
    assert best.data.id_val.path == "/abs/png"
    assert best.data.ood_val["c"].path == str(folder / "png")
    assert best.data.id_test.path == str(Path.home() / "png")
    assert best.data.ood_test == recipe.data.ood_test
    assert best.data.cache_dir == str(folder / "cache")
    assert best.model.name == f"local-dir:{folder.parent / 'm'}"
    assert absolute_paths(best, tmp_path / "deep") == best


def test_weights_files_are_told_from_tags():
    assert not any(map(is_weights_path, ("openai", "laion2b_s34b_b79k", "datacomp_xl_s13b_b90k", "webli")))
    assert all(map(is_weights_path, ("w.pt", "a/b", "w.safetensors")))
    assert resolve_path(Path("/r"), "w.pt") == "/r/w.pt"


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
    tagged = recipe.model_copy(update={"model": ModelConfig(name="ViT-B-32", pretrained="openai")})
    assert portable_paths(tagged).model == tagged.model
    (tmp_path / "recipe.yaml").write_text(dump_recipe(found))
    assert load_recipe(tmp_path / "recipe.yaml") == absolute_paths(found, tmp_path.resolve())
