"""Names of open_clip, for which torch is loaded, and local folders: what ``validate`` needs to know about a model."""

import json
import re
from pathlib import Path
from typing import Any

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.rules import model_problems
from carft_ray.recipe.schema.model import LOCAL_DIR, ModelConfig, is_weights_path
from carft_ray.untrusted import parse_json, read_text

SANDBOX = "sandbox"
RANDOM = "random"  # value of `pretrained` that asks for untrained weights
HUB = "hf-hub:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGING_FACE_CONFIG = "config.json"
WEIGHTS_ENDINGS = (".safetensors", ".bin", ".pth")  # of files that open_clip reads in a folder
TOKENIZER_NAMES = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"}
TOKENIZER_NAMES |= {"spiece.model", "sentencepiece.bpe.model"}
# what a configuration may ask of its tokenizer: what open_clip's own ask. All else would reach transformers as it is.
TOKENIZER_OPTIONS: dict[str, tuple[Any, ...]] = {
    "clean": ("canonicalize", "lower", "whitespace"),
    "strip_sep_token": (False, True),
}
MERGES = "bpe_path"  # the one more: merges of the weights' own for CLIP's tokenizer, a file in their folder
_WITHOUT = "The tokenizer may work without it: remove the key in a copy of the folder, and compare tokens."
_NUM_SHOWN = 100  # characters of a value
_PAGE = r"\w[\w.-]*(/\w[\w.-]*)?"
QUICK = "-quickgelu"  # ending of the open_clip names that compute QuickGELU


def _open_clip() -> Any:
    """Returns open_clip, whose import loads torch: for the names and tags that it knows."""
    import open_clip

    return open_clip


def computes_quick_gelu(name: str) -> bool:
    """Returns whether open_clip computes QuickGELU under a name that it knows."""
    return bool(_open_clip().get_model_config(name).get("quick_gelu", False))


def check_model(model: ModelConfig) -> list[Problem]:
    """Returns what is wrong with ``model`` as far as names and local files show; no weights are loaded.

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
        return list(model_problems(model))
    name = model.name.replace("/", "-")
    if _open_clip().get_model_config(name) is None:
        rule = "must be 'sandbox', 'local-dir:FOLDER', 'hf-hub:OWNER/NAME' or a model name of open_clip"
        near = nearest(name, (SANDBOX, *_open_clip().list_models()))
        return [Problem("model.name", rule, repr(model.name), nearest=near)]
    return list(model_problems(model)) or _check_pretrained(name, model.name, str(model.pretrained))


def _check_pretrained(name: str, written: str, pretrained: str) -> list[Problem]:
    """Returns what is wrong with the weights given for an open_clip name, which the recipe has as ``written``."""
    place, tags, path = "model.pretrained", _open_clip().list_pretrained_tags_by_model(name), Path(pretrained)
    if pretrained == RANDOM:
        return []
    if pretrained in tags:
        trained = _open_clip().get_pretrained_cfg(name, pretrained)
        return activation_problems(name, bool(trained.get("quick_gelu", False)), f"'{pretrained}'")
    if path.is_file() and is_weights_path(pretrained):  # else no path of the recipe, and not seen by ``study.trust``
        config = read_json(path.parent / OPEN_CLIP_CONFIG).get("model_cfg")
        if not isinstance(config, dict):
            return []
        weights = f"{path} (by its {OPEN_CLIP_CONFIG})"
        return activation_problems(name, bool(config.get("quick_gelu", False)), weights)
    if path.is_dir():
        step = f"Write model.name: {LOCAL_DIR}{pretrained}, and leave model.pretrained out."
        return [Problem(place, "must be a weights file", f"the folder {path}", next_step=step)]
    if is_weights_path(pretrained):
        return [Problem(place, "must be an existing weights file", str(path), nearest=_near(path))]
    rule, allowed = f"must be a tag of {written}, a weights file, or '{RANDOM}'", (RANDOM, *tags)
    step = f"Write the file as ./{pretrained}" if path.is_file() else ""
    return [Problem(place, rule, repr(pretrained), allowed, nearest(pretrained, allowed), step)]


def activation_problems(name: str, trained_quick: bool, weights: str) -> list[Problem]:
    """Refuses weights that were trained with QuickGELU under a name that computes GELU, and the reverse.

    Args:
        name: Model name of open_clip.
        trained_quick: Whether the weights were trained with QuickGELU.
        weights: What to call them.
    """
    if computes_quick_gelu(name) is trained_quick:
        return []
    used, given = ("QuickGELU", "GELU") if trained_quick else ("GELU", "QuickGELU")
    rule = f"must compute the activation that {weights} was trained with ({used}), or every number is wrong"
    other = _other_activation(name)
    step = f"Write model.name: {other}" if other else f"Give weights that were trained with {given}."
    return [Problem("model.name", rule, f"{name} ({given})", next_step=step)]


def model_warnings(model: ModelConfig) -> list[str]:
    """Returns what may be wrong with a weights file, which does not record the activation it was trained with.

    Args:
        model: The recipe's model, without problems.
    """
    if model.pretrained in (None, RANDOM):
        return []
    name, path = model.name.replace("/", "-"), Path(model.pretrained)
    other, known = _other_activation(name), _tags_of_both(name)
    if other is None or model.pretrained in known or (path.parent / OPEN_CLIP_CONFIG).is_file():
        return []
    quick, words = computes_quick_gelu(name), path.name.lower().replace("_", "").replace("-", "")
    if quick and "quickgelu" in words:
        return []
    computed, asked = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
    of_the_other = ", ".join(tag for tag, is_quick in known.items() if is_quick != quick)
    return [
        f"model.pretrained: {path.name} does not record which activation it was trained with. {name} computes "
        f"{computed}; weights trained with {asked} (of open_clip's: {of_the_other}) need model.name: {other}, or every "
        "number is wrong."
    ]


def _tags_of_both(name: str) -> dict[str, bool]:
    """Returns the tags of a model under the names of both activations: whether each was trained with QuickGELU."""
    known, base = _open_clip(), name.removesuffix(QUICK)
    tags = known.list_pretrained_tags_by_model(base)
    return {tag: bool(known.get_pretrained_cfg(base, tag).get("quick_gelu", False)) for tag in tags}


def is_hugging_face_folder(folder: Path) -> bool:
    """Tells a folder that transformers wrote from one of open_clip."""
    return (folder / HUGGING_FACE_CONFIG).is_file() and not (folder / OPEN_CLIP_CONFIG).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Tells whether a folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_NAMES)


def _other_activation(name: str) -> str | None:
    """Returns the name of the same model with the other activation, where open_clip has both."""
    other = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    return other if {name, other} <= {*_open_clip().list_models()} else None


def _near(path: Path) -> str | None:
    """Returns the path of a file or folder next to one that is missing, with a similar name."""
    return nearest(str(path), map(str, path.parent.glob("*")))  # of none, where there is no such folder


def _check_folder(folder: Path) -> list[Problem]:
    if is_hugging_face_folder(folder):
        config = read_json(folder / HUGGING_FACE_CONFIG)
        kind = config.get("model_type")
        if kind != "clip" or "vision_config" not in config:
            rule = f"a Hugging Face folder must contain a CLIPModel ({HUGGING_FACE_CONFIG} with model_type: clip)"
            step = f"For other models give an open_clip folder: {OPEN_CLIP_CONFIG}, weights and tokenizer files."
            return [Problem("model.name", rule, f"model_type: {kind} in {folder}", next_step=step)]
    elif not folder.is_dir():
        rule = "local-dir: must be followed by a folder that exists"
        return [Problem("model.name", rule, str(folder), nearest=_near(folder))]
    elif not (folder / OPEN_CLIP_CONFIG).is_file():
        rule = f"local-dir: needs a folder with {OPEN_CLIP_CONFIG}, or one with a CLIPModel of Hugging Face"
        return [Problem("model.name", rule, str(folder))]
    if not any(path.suffix in WEIGHTS_ENDINGS for path in folder.iterdir()):
        rule = "local-dir: needs a folder with weights"
        return [Problem("model.name", rule, f"none in {folder} that end in {', '.join(WEIGHTS_ENDINGS)}")]
    if is_hugging_face_folder(folder):
        return []
    if problems := folder_problems(folder):
        return problems
    tokenizer = read_json(folder / OPEN_CLIP_CONFIG)["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    if tokenizer and not has_tokenizer(folder):
        rule = f"local-dir: needs the files of its tokenizer ({tokenizer}) in the folder"
        step = f"Copy tokenizer.json and tokenizer_config.json of {tokenizer} into it."
        return [Problem("model.name", rule, f"none in {folder}", next_step=step)]
    return []


def folder_problems(folder: Path) -> list[Problem]:
    """Returns what a folder of open_clip asks for that a stranger's may not: other code, other places.

    open_clip refuses keys that it does not know; it passes ``tokenizer_kwargs`` on to transformers, to which
    ``trust_remote_code`` means to run a file of the folder, and names to timm and transformers, for which some are
    addresses.

    Args:
        folder: It has an ``open_clip_config.json``.
    """
    config = read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg")
    text = config.get("text_cfg") if isinstance(config, dict) else None
    vision = config.get("vision_cfg", {}) if isinstance(config, dict) else None
    options = (text.get("tokenizer_kwargs") or {}) if isinstance(text, dict) else None
    if not isinstance(vision, dict) or not isinstance(text, dict) or not isinstance(options, dict):
        rule = f"{OPEN_CLIP_CONFIG} must be JSON with model_cfg, as open_clip writes it"
        return [Problem("model.name", rule, str(folder / OPEN_CLIP_CONFIG))]
    problems = []

    def refuse(key: str, rule: str, value: Any, allowed: tuple[str, ...] = (), next_step: str = "") -> None:
        place = f"{folder / OPEN_CLIP_CONFIG}: model_cfg.{key}"
        problems.append(Problem(place, rule, json.dumps(value)[:_NUM_SHOWN], allowed, next_step=next_step))

    for key, value in options.items():
        option = f"text_cfg.tokenizer_kwargs.{key}"
        if key == MERGES:
            if not isinstance(value, str) or not (folder / Path(value).name).is_file():
                refuse(option, "must name a file in the folder", value)
        elif key not in TOKENIZER_OPTIONS:
            rule, step = "must be left out: open_clip's own models have no such key", _WITHOUT
            refuse(option, rule, value, (*TOKENIZER_OPTIONS, MERGES), step)
        elif value not in TOKENIZER_OPTIONS[key]:
            refuse(option, "must be a value of open_clip", value, tuple(map(json.dumps, TOKENIZER_OPTIONS[key])))
    page, whole = (f'"{_PAGE}"', "must be the name of a page of the hub"), (r"\d+", "must be a whole number")
    # what JSON must have under a key; building the model finds all else of which none can be built
    known = {
        "vision_cfg.timm_model_name": (r'"[\w.-]+"', "must be a model name of timm"),
        "vision_cfg.pos_embed_type": ('"learnable"', "must be learnable: the weights have the embeddings"),
        "vision_cfg.head_width": whole,
        "vision_cfg.attn_pooler_heads": whole,
        "text_cfg.heads": whole,
        "text_cfg.hf_model_name": page,
    }
    if not has_tokenizer(folder):  # else that is read, whatever the name
        known["text_cfg.hf_tokenizer_name"] = page
    for key, (pattern, rule) in known.items():
        tower, _, name = key.partition(".")
        value = {"vision_cfg": vision, "text_cfg": text}[tower].get(name)
        if value and not re.fullmatch(pattern, json.dumps(value)):
            refuse(key, rule, value)
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, or an empty one where there is none.

    Raises:
        DataError: It is no regular file, is too large, or holds no text.
    """
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
