"""CLIP models by name, file or folder, with their tokenizers and the preprocessing that belongs to them."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

from carft_ray.errors import DataError, Problem, RecipeError, nearest
from carft_ray.learning import hugging_face
from carft_ray.learning.building import build_model, hub, quiet
from carft_ray.learning.catalog import (
    HUB,
    LOCAL_DIR,
    OPEN_CLIP_CONFIG,
    RANDOM,
    SANDBOX,
    activation_problems,
    check_model,
    is_hugging_face_folder,
    tag_in_path,
    tokenizer_files,
)
from carft_ray.learning.weights import fill, is_from_openai, read_folder_weights, read_weights
from carft_ray.recipe.loading import resolve_path
from carft_ray.recipe.schema import ModelPart, PromptsPart

WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = OPEN_CLIP_CONFIG
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
CLIP_VOCABULARY = 49408  # tokens of CLIP's own tokenizer


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model with everything that belongs to it.

    Attributes:
        model: The open_clip model, float32, eval mode, without gradients.
        tokenizer: list of N sentences -> token ids [N, context length].
        image_size: Side of the square input in pixels.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel.
        to_input: Resize and crop of the model's evaluation preprocessing, PIL image -> PIL image.
        input_key: Names ``to_input`` in cache keys.
        logit_scale: s = exp of the learned log-temperature, frozen.
        logit_bias: Shift of all logits that a sigmoid loss has learned (SigLIP), else None. It is left out of the
            class and the context logits: a constant shift changes no softmax.
        config: Content of ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``.
        weights_hash: Hash of all weights, 16 hex digits.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    to_input: Callable[[Image.Image], Image.Image]
    input_key: str
    logit_scale: float
    logit_bias: float | None
    config: dict[str, Any]
    weights_hash: str


def load_clip(part: ModelPart, base_dir: Path) -> Clip:
    """Loads the model that a recipe names.

    Args:
        part: Name and weights.
        base_dir: Folder from which relative paths count.

    Raises:
        RecipeError: open_clip does not know the name or the tag, or the weights belong to another name.
        DataError: The weights cannot be fetched, read or put into the model; or its tokenizer cannot.
    """
    problems = check_model(part, base_dir)
    if problems:
        raise RecipeError(problems)
    if part.name == SANDBOX:
        with resources.as_file(resources.files("carft_ray.learning") / "sandbox_weights") as own:
            return load_folder(own)
    if part.name.startswith(LOCAL_DIR):
        return load_folder(resolve_path(part.name.removeprefix(LOCAL_DIR), base_dir))
    if part.name.startswith(HUB):
        with _fetching("model.name", part.name, part.name.removeprefix(HUB)):
            model = open_clip.create_model(part.name, precision="fp32", device="cpu", require_pretrained=True)
            config, tokenizer = open_clip.get_model_config(part.name), open_clip.get_tokenizer(part.name)
        return wrap_model(model, tokenizer, config)
    name = part.name.replace("/", "-")
    config = open_clip.get_model_config(name)
    state, folder = None, None
    preprocessing: dict[str, Any] = {}
    if part.pretrained not in (None, RANDOM):
        path, preprocessing = _weights_file(name, str(part.pretrained), base_dir)
        state = read_weights(path, "model.pretrained")
        if is_from_openai(state) and (problems := activation_problems(name, True, f"{path.name} (OpenAI's own)")):
            raise RecipeError(problems)
        folder = path.parent
    with _fetching("model.name", f"the text tower of {name}", config["text_cfg"].get("hf_model_name")):
        model = build_model(name)
    if state is not None:
        fill(model, state, path.name, "model.pretrained")
    kept = {key: preprocessing[key] for key in PREPROCESSING if preprocessing.get(key) is not None}
    open_clip.set_model_preprocess_cfg(model, {**preprocess_config(model), **kept})
    return wrap_model(model, _tokenizer(name, config, folder), config)


def load_folder(folder: Path) -> Clip:
    """Loads an open_clip folder (``open_clip_config.json`` and weights), or a CLIPModel folder of Hugging Face.

    Raises:
        RecipeError: It is neither.
        DataError: Its files cannot be read, or do not belong together.
    """
    place, name = "model.name", f"{LOCAL_DIR}{folder.resolve()}"
    if problems := check_model(ModelPart(name=name), Path("/")):
        raise RecipeError(problems)
    state = read_folder_weights(folder, place)
    if is_hugging_face_folder(folder):
        config, preprocessing = hugging_face.read_config(folder, place)
        model: nn.Module = open_clip.CLIP(**config)
        state = hugging_face.convert(state)
        open_clip.set_model_preprocess_cfg(model, {"size": model.visual.image_size, **preprocessing})  # type: ignore[union-attr]  # untyped
        if tokenizer_files(folder) and not _has_clip_tokenizer(folder, config["text_cfg"]["vocab_size"]):
            # open_clip then looks for the tokenizer in the folder, in exports too
            config["text_cfg"]["hf_tokenizer_name"] = str(folder.name)
    else:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
        try:
            with _fetching(place, f"the text tower of {folder.name}", config["text_cfg"].get("hf_model_name")):
                model = build_model(name)
        except (
            TypeError,
            ValueError,
            AssertionError,
            KeyError,
            RuntimeError,
        ) as error:  # open_clip's, of a wrong value
            rule = "model_cfg must be one that open_clip can build"
            raise DataError(Problem(f"{folder / CONFIG_NAME}", rule, f"{type(error).__name__}: {error}")) from error
    fill(model, state, str(folder), place)
    return wrap_model(model, _tokenizer(folder.name, config, folder), config)


def _weights_file(name: str, pretrained: str, base_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file of the weights, fetched where it is a tag, and what is known of their preprocessing."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        known = open_clip.get_pretrained_cfg(name, pretrained)
        if problems := activation_problems(name, bool(known.get("quick_gelu", False)), f"'{pretrained}'"):
            raise RecipeError(problems)
        with _fetching("model.pretrained", f"the weights '{pretrained}' of {name}", known["hf_hub"] or known["url"]):
            return Path(open_clip.download_pretrained(known)), known
    path = resolve_path(pretrained, base_dir)
    if not path.is_file():
        near = nearest(pretrained, tags)
        rule = f"must be a tag of {name}, a weights file, or '{RANDOM}'"
        raise RecipeError(Problem("model.pretrained", rule, repr(pretrained), tuple(tags), near))
    return path, _preprocessing_of(name, path)


def _preprocessing_of(name: str, path: Path) -> dict[str, Any]:
    """Returns the preprocessing of a weights file: what stands beside it, else that of open_clip's own weights."""
    beside = path.parent / CONFIG_NAME
    if beside.is_file():
        found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")).get("preprocess_cfg") or {}
        return found
    tags = open_clip.list_pretrained_tags_by_model(name)
    known: dict[str, dict[str, Any]] = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}
    if (tag := tag_in_path(name, path)) is not None and tag in known:
        return known[tag]
    kinds = {tuple(str(config.get(key)) for key in PREPROCESSING): tag for tag, config in known.items()}
    if len(kinds) > 1:
        logging.getLogger(__name__).warning(
            "model.pretrained: %s does not tell its preprocessing, and open_clip's weights of %s differ in it (such as "
            "%s); mean, std and resizing of CLIP are used. Put the open_clip_config.json of the weights beside the "
            "file.",
            *(path.name, name, ", ".join(kinds.values())),
        )
        return {}
    return next(iter(known.values()), {})


def _has_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Tells CLIP's own tokenizer, which open_clip brings along, from another one in a Hugging Face folder."""
    path = folder / "tokenizer_config.json"
    kind = (
        json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class", "") if path.is_file() else "CLIPTokenizer"
    )
    return vocab_size == CLIP_VOCABULARY and kind.startswith("CLIPTokenizer")


def _tokenizer(name: str, config: dict[str, Any], folder: Path | None) -> Callable[[list[str]], Tensor]:
    """Returns the tokenizer of a model: open_clip's, or one of Hugging Face from the weights' folder or the hub."""
    text = config["text_cfg"]
    context_length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    wanted = text.get("hf_tokenizer_name")
    if not wanted:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=context_length, **options)
        return tokenizer
    is_local = folder is not None and bool(tokenizer_files(folder))
    try:
        with quiet() if is_local else _fetching("model.name", f"the tokenizer of {name}", wanted):
            tokenizer = HFTokenizer(
                str(folder) if is_local else wanted,
                context_length=context_length,
                tokenizer_mode=text.get("tokenizer_mode"),
                **options,
            )
    except ImportError as error:
        rule = f"the tokenizer of {name} ({wanted}) needs the package transformers"
        step = "Install it: pip install 'carft-ray[hf]'"
        raise DataError(Problem("model.name", rule, str(error).splitlines()[0], next_step=step)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"the tokenizer files of {name} ({wanted}) must be readable by transformers"
        raise DataError(Problem("model.name", rule, f"{folder}: {str(error).splitlines()[0]}")) from error
    return tokenizer


@contextlib.contextmanager
def _fetching(place: str, what: str, page: str | None) -> Iterator[None]:
    """Says in one message what could not be fetched, and the ways without a network; nothing when page is None."""
    if page is None:
        yield
        return
    is_reached = True
    try:
        with hub() as is_reached:
            yield
    except ImportError:
        raise
    except Exception as error:  # open_clip, its hub's client and transformers raise many kinds
        step = (
            "Without a network: model.pretrained: a weights file (.safetensors, or .pt of open_clip), or model.name: "
            "local-dir:FOLDER with a folder of open_clip or of Hugging Face, with its tokenizer files; or copy the "
            "hub's cache (HF_HOME) from a machine that has them."
        )
        rule = f"{what} must be in the hub's cache or fetched ({page.strip('/')})"
        reason = (
            f"{type(error).__name__}: {error}".splitlines()[0]
            if is_reached
            else "not in the cache, and no connection to the hub"
        )
        raise DataError(Problem(place, rule, reason, next_step=step)) from error


def templates(prompts: PromptsPart, sandbox_templates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the sentences with ``{}`` that a recipe's prompts name.

    'openai' are the 80 ImageNet templates of CLIP, 'simple' the 7 of its notebook, both as open_clip has them.
    """
    if not isinstance(prompts.templates, str):
        return prompts.templates
    named = {
        "sandbox": sandbox_templates,
        "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
        "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    }
    return named[prompts.templates]


def wrap_model(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], model_config: dict[str, Any]) -> Clip:
    """Returns an open_clip model with what belongs to it; the preprocessing is the one that the model carries.

    Args:
        model: Built by open_clip; it is put into eval mode, without gradients.
        tokenizer: Its tokenizer.
        model_config: open_clip's ``model_cfg``, for exports.

    Raises:
        DataError: Its input is no square, or the tokenizer gives tokens that it does not have.
    """
    model.eval().requires_grad_(False)
    preprocess = preprocess_config(model)
    image_size = square_size(preprocess)
    stock = open_clip.image_transform(image_size, is_train=False, **{key: preprocess[key] for key in PREPROCESSING})
    kept = ("Resize", "CenterCrop", "ResizeKeepRatio", "CenterCropOrPad")
    steps = [step for step in stock.transforms if type(step).__name__ in kept]

    def to_input(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    vocabulary = open_clip.get_model_tokenize_cfg(model).get("vocab_size")
    if vocabulary is not None and (largest := int(tokenizer(["a photo of a cat"]).max())) >= vocabulary:
        rule = f"the tokenizer must be that of the model, which has {vocabulary} tokens"
        raise DataError(Problem("model.name", rule, f"token {largest}"))
    bias = getattr(model, "logit_bias", None)
    return Clip(
        model=model,
        tokenizer=tokenizer,
        image_size=image_size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        to_input=to_input,
        input_key=f"{image_size}-{preprocess['interpolation']}-{preprocess['resize_mode']}",
        logit_scale=float(model.logit_scale.detach().exp()),  # type: ignore[operator]  # untyped
        logit_bias=None if bias is None else float(bias),
        config={"model_cfg": model_config, "preprocess_cfg": {key: preprocess[key] for key in PREPROCESSING}},
        weights_hash=state_hash(model.state_dict()),
    )


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """Returns the preprocessing that an open_clip model carries, with open_clip's defaults for what it leaves out."""
    return {**vars(PreprocessCfg()), **open_clip.get_model_preprocess_cfg(model)}


def square_size(preprocess: dict[str, Any]) -> int:
    """Returns the side of a model's input in pixels.

    Raises:
        DataError: Its input is no square.
    """
    size = preprocess["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if sides[0] != sides[1]:
        raise DataError(Problem("model.name", "the model must take square images", f"{sides[0]} x {sides[1]} pixels"))
    return int(sides[0])


def state_hash(state: dict[str, Tensor]) -> str:
    """Returns a hash of names, types, shapes and bytes of a state, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
