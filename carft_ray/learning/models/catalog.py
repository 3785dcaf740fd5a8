"""Names of models, without loading torch: what ``validate`` needs to know about open_clip and local folders."""

import ast
import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.fine_tuning import ModelConfig, TrainConfig
from carft_ray.recipe.loading import LOCAL_DIR, is_weights_path
from carft_ray.recipe.schema import Recipe

SANDBOX = "sandbox"
RANDOM = "random"  # value of `pretrained` that asks for untrained weights
HUB = "hf-hub:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGING_FACE_CONFIG = "config.json"
WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pth")  # that open_clip looks for in a folder
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
NUM_TAGS_LISTED = 6
# fields of `train` that an image tower may be unable to follow, alone or together
TOWER_FIELDS = ("freeze_layers", "lora_rank", "recalibrate_batches", "grad_checkpointing", "head_lr_factor")
TOWER_DEFAULTS = {name: TrainConfig.model_fields[name].default for name in TOWER_FIELDS}
QUICK = "-quickgelu"  # ending of the open_clip names that compute QuickGELU


@functools.cache
def model_names() -> tuple[str, ...]:
    """Returns all names that open_clip can build, sorted, and 'sandbox'."""
    folder = _open_clip()
    configs = folder.glob("model_configs/*.json") if folder is not None else ()
    return (SANDBOX, *sorted(path.stem for path in configs))


def pretrained_tags(name: str) -> tuple[str, ...] | None:
    """Returns the tags of weights that open_clip offers for a model, or None when its list cannot be read."""
    known = _all_tags()
    return known.get(name, ()) if known else None


def computes_quick_gelu(name: str) -> bool | None:
    """Returns whether open_clip computes QuickGELU under a name, or None for a name that it does not know."""
    folder = _open_clip()
    path = folder / "model_configs" / f"{name}.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    return bool(json.loads(path.read_text(encoding="utf-8")).get("quick_gelu", False))


@functools.cache
def _all_tags() -> dict[str, tuple[str, ...]]:
    """Returns the tags of weights for each name; those trained with QuickGELU stand under ``NAME-quickgelu`` too."""
    tags = {name: tuple(found) for name, found in _tags_with_activation().items()}
    quick = {
        name + QUICK: with_quick
        for name, found in _tags_with_activation().items()
        if (with_quick := tuple(tag for tag, is_quick in found.items() if is_quick))
    }
    return {**tags, **quick}


@functools.cache
def _tags_with_activation() -> dict[str, dict[str, bool]]:
    """Reads open_clip's list of weights from its source, since to import it is to import torch.

    A test compares it with what open_clip itself says. A list of another form is no list: ``load_clip`` checks again.

    Returns:
        Name -> tag -> whether the weights were trained with QuickGELU.
    """
    folder = _open_clip()
    path = folder / "pretrained.py" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    calls: dict[str, ast.expr] = {}
    models: dict[str, ast.expr] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        variable, value = node.targets[0].id, node.value
        calls[variable] = value
        if variable == "_PRETRAINED" and isinstance(value, ast.Dict):
            names = [key.value for key in value.keys if isinstance(key, ast.Constant)]
            models = dict(zip(map(str, names), value.values, strict=False))
    tags: dict[str, dict[str, bool]] = {}
    for name, found in models.items():
        value = calls.get(found.id, found) if isinstance(found, ast.Name) else found
        if not isinstance(value, ast.Call) or any(keyword.arg is None for keyword in value.keywords):
            return {}
        tags[name] = {str(keyword.arg): _is_quick(keyword.value) for keyword in value.keywords}
    return tags


def _is_quick(value: ast.expr) -> bool:
    keywords = value.keywords if isinstance(value, ast.Call) else []
    given = [k.value.value for k in keywords if k.arg == "quick_gelu" and isinstance(k.value, ast.Constant)]
    return bool(given and given[0])


def _open_clip() -> Path | None:
    """Returns the folder of the installed open_clip; to find it does not import it."""
    spec = importlib.util.find_spec("open_clip")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def check_model(model: ModelConfig) -> list[Problem]:
    """Returns what is wrong with ``model`` as far as names and local files tell; nothing is loaded.

    Args:
        model: The recipe's model.
    """
    if model.name.startswith((LOCAL_DIR, HUB)) and model.pretrained is not None:
        rule = f"must be left out for a model.name that begins with {model.name.split(':')[0]}:, which has its weights"
        return [Problem("model.pretrained", rule, repr(model.pretrained))]
    if model.name.startswith(LOCAL_DIR):
        return _check_folder(Path(model.name.removeprefix(LOCAL_DIR)))
    if model.name.startswith(HUB):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model.name.removeprefix(HUB)):
            return []
        return [Problem("model.name", "hf-hub: needs the owner and the name of a page", repr(model.name))]
    if model.name == SANDBOX:
        if model.pretrained is not None:
            return [Problem("model.pretrained", "the sandbox has its own weights; leave the key out", model.pretrained)]
        return []
    name = model.name.replace("/", "-")
    if name not in model_names():
        rule = "must be 'sandbox', 'local-dir:FOLDER', 'hf-hub:OWNER/NAME' or a model name of open_clip"
        return [Problem("model.name", rule, repr(model.name), nearest=nearest(name, model_names()))]
    if model.pretrained is None:
        rule = "must name the weights: a tag of open_clip, a weights file, or 'random' for untrained weights"
        return [Problem("model.pretrained", rule, "nothing")]
    tags = pretrained_tags(name)
    if model.pretrained == RANDOM:
        return []
    if tags is not None and model.pretrained in tags:
        trained = _tags_with_activation()[name.removesuffix(QUICK) if name not in _tags_with_activation() else name]
        return activation_problems(name, trained[model.pretrained], f"'{model.pretrained}'")
    path = Path(model.pretrained)
    if path.is_file():
        beside = _read_json(path.parent / OPEN_CLIP_CONFIG).get("model_cfg")
        if not isinstance(beside, dict):
            return []
        return activation_problems(
            name, bool(beside.get("quick_gelu", False)), f"{path} ({OPEN_CLIP_CONFIG} beside it)"
        )
    if path.is_dir():
        step = f"Write model.name: {LOCAL_DIR}{model.pretrained}, and leave model.pretrained out."
        return [Problem("model.pretrained", "must be a weights file", f"the folder {path}", next_step=step)]
    if is_weights_path(model.pretrained):
        siblings = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        rule = "must be a weights file that is there"
        return [Problem("model.pretrained", rule, str(path), nearest=nearest(str(path), siblings))]
    if tags is None:
        return []
    rule = f"must be a tag of {model.name}, a weights file, or '{RANDOM}'"
    near = nearest(model.pretrained, (*tags, RANDOM))
    listed = [*dict.fromkeys((RANDOM, *([near] if near else ()), *tags))]
    more = len(listed) - NUM_TAGS_LISTED
    allowed = (*listed[:NUM_TAGS_LISTED], *([f"{more} more"] if more > 0 else ()))
    step = f"All tags of it: carft-ray model {model.name}"
    return [Problem("model.pretrained", rule, repr(model.pretrained), allowed, near, step)]


def activation_problems(name: str, trained_quick: bool, weights: str) -> list[Problem]:
    """Refuses weights that were trained with QuickGELU under a name that computes GELU, and the reverse.

    Args:
        name: Model name of open_clip.
        trained_quick: Whether the weights were trained with QuickGELU.
        weights: What to call them.
    """
    if computes_quick_gelu(name) in (None, trained_quick):
        return []
    used, given = ("QuickGELU", "GELU") if trained_quick else ("GELU", "QuickGELU")
    rule = f"must compute the activation that {weights} was trained with ({used}), or every number is wrong"
    other = _other_activation(name)
    step = f"Write model.name: {other}" if other else f"Give weights that were trained with {given}."
    return [Problem("model.name", rule, f"{name} ({given})", next_step=step)]


def model_warnings(model: ModelConfig) -> list[str]:
    """Returns what may be wrong with a weights file, which carries no word of the activation it was trained with.

    Args:
        model: The recipe's model, without problems.
    """
    name = model.name.replace("/", "-")
    other, quick = _other_activation(name), computes_quick_gelu(name)
    if other is None or model.pretrained in (None, RANDOM, *(pretrained_tags(name) or ())):
        return []
    path = Path(str(model.pretrained))
    if (path.parent / OPEN_CLIP_CONFIG).is_file():
        return []
    known, tag = _tags_with_activation().get(name.removesuffix(QUICK), {}), tag_in_path(name, path)
    if tag is not None:
        said, trained = f"looks like '{tag}'", known[tag]
    elif "quickgelu" in path.name.lower().replace("_", "").replace("-", ""):
        said, trained = "has QuickGELU in its name", True
    else:
        said, trained = "", None
    if trained == quick:
        return []
    computed, asked = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    start = f"model.pretrained: {path.name} "
    if said:
        text = f"{said}, which was trained with {asked}, but {name} computes {computed}: every number would be wrong."
        return [f"{start}{text} If it is so, write model.name: {other}."]
    of_the_other = ", ".join(tag for tag, is_quick in known.items() if is_quick != quick)
    return [
        f"{start}does not tell which activation it was trained with. {name} computes {computed}; weights trained with "
        f"{asked} (of open_clip's: {of_the_other}) need model.name: {other}, or every number is wrong."
    ]


def tag_in_path(name: str, path: Path) -> str | None:
    """Returns the tag of open_clip's weights for a model that a file or its folders are named after, if any."""
    words = "/".join(path.parts[-4:]).lower().replace("-", "_")
    tags = sorted(_tags_with_activation().get(name.removesuffix(QUICK), {}), key=len, reverse=True)
    return next((tag for tag in tags if re.search(rf"(?<![a-z0-9]){tag}(?![a-z0-9])", words)), None)


def asks_of_tower(recipe: Recipe) -> bool:
    """Tells whether a training of the recipe asks of the image tower what some towers cannot do."""
    given = (recipe.train.model_dump(), recipe.search.space, *recipe.search.baselines.values())
    fields = [name for name in TOWER_FIELDS if name != "head_lr_factor"]  # which changes nothing by itself
    return any(name in each and each[name] != TOWER_DEFAULTS[name] for each in given for name in fields)


def is_hugging_face_folder(folder: Path) -> bool:
    """Tells a folder that transformers wrote from one of open_clip."""
    return (folder / HUGGING_FACE_CONFIG).is_file() and not (folder / OPEN_CLIP_CONFIG).is_file()


def tokenizer_files(folder: Path) -> list[str]:
    """Returns the names of the tokenizer files in a folder."""
    return [name for name in TOKENIZER_NAMES if (folder / name).is_file()]


def _other_activation(name: str) -> str | None:
    """Returns the name of the same model with the other activation, where open_clip has both."""
    other = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    return other if other in model_names() and name in model_names() else None


def _check_folder(folder: Path) -> list[Problem]:
    if is_hugging_face_folder(folder):
        config = _read_json(folder / HUGGING_FACE_CONFIG)
        kind = config.get("model_type")
        if kind != "clip" or "vision_config" not in config:
            rule = f"a Hugging Face folder must hold a CLIPModel ({HUGGING_FACE_CONFIG} with model_type: clip)"
            step = f"For other models give an open_clip folder: {OPEN_CLIP_CONFIG}, weights and tokenizer files."
            return [Problem("model.name", rule, f"model_type: {kind} in {folder}", next_step=step)]
    elif not (folder / OPEN_CLIP_CONFIG).is_file():
        rule = f"local-dir: needs a folder with {OPEN_CLIP_CONFIG}, or one with a CLIPModel of Hugging Face"
        return [Problem("model.name", rule, str(folder))]
    if not any(path.suffix in WEIGHTS_ENDINGS for path in folder.iterdir()):
        rule = "local-dir: needs a folder with weights"
        return [Problem("model.name", rule, f"none in {folder} that end in {', '.join(WEIGHTS_ENDINGS)}")]
    if is_hugging_face_folder(folder):
        return []
    model_config = _read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg")
    if not isinstance(model_config, dict) or not isinstance(model_config.get("text_cfg"), dict):
        rule = f"{OPEN_CLIP_CONFIG} must be JSON with model_cfg, as open_clip writes it"
        return [Problem("model.name", rule, str(folder / OPEN_CLIP_CONFIG))]
    tokenizer = model_config["text_cfg"].get("hf_tokenizer_name")
    if tokenizer and not tokenizer_files(folder):
        rule = f"local-dir: needs the files of its tokenizer ({tokenizer}) in the folder"
        step = f"Copy tokenizer.json and tokenizer_config.json of {tokenizer} into it."
        return [Problem("model.name", rule, f"none in {folder}", next_step=step)]
    return []


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, or an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
