"""The one doorway to open_clip: models, tokenizers and the preprocessing that belongs to them."""

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from carft_ray.data.facts import load_facts
from carft_ray.errors import DataError, Problem, RecipeError, nearest
from carft_ray.learning.catalog import LOCAL_DIR, RANDOM, SANDBOX, check_model
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.loading import resolve_path
from carft_ray.recipe.schema import ModelPart, PromptsPart

WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"


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
    config: dict[str, Any]
    weights_hash: str


def load_clip(part: ModelPart, base_dir: Path) -> Clip:
    """Loads the model that a recipe names.

    Args:
        part: Name and weights.
        base_dir: Folder from which relative paths count.

    Raises:
        RecipeError: open_clip does not know the name or the tag.
        DataError: The weights cannot be fetched or read.
    """
    problems = check_model(part, base_dir)
    if problems:
        raise RecipeError(problems)
    if part.name == SANDBOX:
        folder = resources.files("carft_ray.learning") / "sandbox_weights"
        with resources.as_file(folder) as path:
            return _load(f"{LOCAL_DIR}{path}", None)
    if part.name.startswith(LOCAL_DIR):
        return _load(f"{LOCAL_DIR}{base_dir / part.name.removeprefix(LOCAL_DIR)}", None)
    name = part.name.replace("/", "-")
    if part.pretrained is None or part.pretrained == RANDOM:
        return _load(name, None)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if part.pretrained in tags:
        _check_activation(name, part.pretrained)
        return _load(name, part.pretrained)
    path = resolve_path(part.pretrained, base_dir)
    if not path.is_file():
        near = nearest(part.pretrained, tags)
        rule = f"must be a tag of {part.name}, a weights file, or '{RANDOM}'"
        raise RecipeError(Problem("model.pretrained", rule, repr(part.pretrained), tuple(tags), near))
    return _load(name, str(path))


def _check_activation(name: str, tag: str) -> None:
    """Refuses weights that were trained with QuickGELU under a name that computes GELU, and the reverse."""
    trained = bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
    computed = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if trained != computed:
        fitting = name.removesuffix("-quickgelu") if computed else f"{name}-quickgelu"
        used, given = ("QuickGELU", "GELU") if trained else ("GELU", "QuickGELU")
        rule = f"must compute the activation that '{tag}' was trained with ({used}), or every number is wrong"
        raise RecipeError(Problem("model.name", rule, f"{name} ({given})", next_step=f"Write model.name: {fitting}"))


def load_folder(folder: Path) -> Clip:
    """Loads an open_clip folder (``open_clip_config.json`` and weights)."""
    return load_clip(ModelPart(name=f"{LOCAL_DIR}{folder.resolve()}"), Path("/"))


def templates(prompts: PromptsPart, sandbox_templates: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the sentences with ``{}`` that a recipe's prompts name.

    'openai' are the 80 ImageNet templates of CLIP, 'simple' the 7 of its notebook, both as open_clip has them; the name
    of a benchmark means its own.
    """
    if not isinstance(prompts.templates, str):
        return prompts.templates
    if prompts.templates in BENCHMARKS:
        return load_facts(prompts.templates).templates or ()
    named = {
        "sandbox": sandbox_templates,
        "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
        "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    }
    return named[prompts.templates]


def _load(name: str, pretrained: str | None) -> Clip:
    schema_folder = Path(name.removeprefix(LOCAL_DIR)) if name.startswith(LOCAL_DIR) else None
    try:
        with _quiet():
            model = open_clip.create_model(
                name, pretrained, device="cpu", precision="fp32", require_pretrained=schema_folder is not None
            )
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises RuntimeError, OSError, ValueError and the hub client's own errors
        step = "Without a network: give a weights file as model.pretrained, or model.name: local-dir:FOLDER."
        value = f"{type(error).__name__}: {error}"
        place = "model.name" if schema_folder else "model.pretrained"
        raise DataError(Problem(place, f"the weights of {name} must load", value, next_step=step)) from error
    config = None
    if schema_folder:
        config = json.loads((schema_folder / CONFIG_NAME).read_text())["model_cfg"]
    return wrap_model(model, tokenizer, config or open_clip.get_model_config(name))


def wrap_model(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], model_config: dict[str, Any]) -> Clip:
    """Returns an open_clip model with what belongs to it; the preprocessing is the one that the model carries.

    Args:
        model: Built by open_clip; it is put into eval mode, without gradients.
        tokenizer: Its tokenizer.
        model_config: open_clip's ``model_cfg``, for exports.
    """
    model.eval().requires_grad_(False)
    preprocess: dict[str, Any] = dict(model.visual.preprocess_cfg)  # type: ignore[union-attr,arg-type]  # untyped
    size = preprocess["size"]
    image_size = size if isinstance(size, int) else size[0]
    stock = open_clip.image_transform(
        image_size,
        is_train=False,
        mean=preprocess["mean"],
        std=preprocess["std"],
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
    )
    kept = ("Resize", "CenterCrop", "ResizeKeepRatio", "CenterCropOrPad")
    steps = [step for step in stock.transforms if type(step).__name__ in kept]

    def to_input(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return Clip(
        model=model,
        tokenizer=tokenizer,
        image_size=image_size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        to_input=to_input,
        input_key=f"{image_size}-{preprocess['interpolation']}-{preprocess['resize_mode']}",
        logit_scale=float(model.logit_scale.detach().exp()),  # type: ignore[operator]  # untyped
        config={
            "model_cfg": model_config,
            "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")},
        },
        weights_hash=state_hash(model.state_dict()),
    )


def state_hash(state: dict[str, Tensor]) -> str:
    """Returns a hash of names, types, shapes and bytes of a state, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs through the root logger and warns of what we check ourselves; keeps both off the terminal."""
    root = logging.getLogger()
    level = root.level
    handlers = list(root.handlers)
    root.setLevel(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries; the error tells what failed
    if not handlers:
        root.addHandler(logging.NullHandler())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
