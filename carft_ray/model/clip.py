"""CLIP models with their tokenizers and the preprocessing that belongs to them."""

import gzip
import hashlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from carft_ray.data.sandbox import CLASSES, TEMPLATES
from carft_ray.errors import DataError, Problem
from carft_ray.model.catalog import MERGES, OPEN_CLIP_CONFIG, SANDBOX, has_tokenizer
from carft_ray.model.pretrained import PREPROCESSING, Opened, fetched, open_model, preprocess_config
from carft_ray.model.weights_files import quiet
from carft_ray.recipe.schema.model import ModelConfig
from carft_ray.untrusted import MOST_TEXT_BYTES

WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = OPEN_CLIP_CONFIG
_NOT_HASHED = ("cache", "tokenizer")  # of a tokenizer: words that it has seen; one of transformers, which has files


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
            A shift of all logits that a sigmoid loss has learned (SigLIP) is left out: it changes no softmax.
        config: Content of ``open_clip_config.json``: ``model_cfg`` and ``preprocess_cfg``.
        weights_hash: Hash of all weights, 16 hex digits.
        captions: Sentences that hold the tokens on which the text tower was trained; empty: it knows all tokens.
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
    captions: tuple[str, ...] = ()


def load_clip(part: ModelConfig) -> Clip:
    """Loads the model that a recipe names.

    Args:
        part: Name and weights.

    Raises:
        RecipeError: open_clip does not know the name or the tag, or the weights belong to another name.
        DataError: The weights or the tokenizer cannot be downloaded, read or loaded into the model.
    """
    opened = open_model(part)
    clip = wrap_model(opened.model, _tokenizer(part.name, opened), opened.config)
    if part.name != SANDBOX:
        return clip
    return replace(clip, captions=tuple(template.format(name) for template in TEMPLATES for name in CLASSES))


def wrap_model(model: nn.Module, tokenizer: Callable[[list[str]], Tensor], model_config: dict[str, Any]) -> Clip:
    """Returns an open_clip model with what belongs to it; the preprocessing is the one that the model carries.

    Args:
        model: Built by open_clip; it is put into eval mode, without gradients.
        tokenizer: Its tokenizer.
        model_config: open_clip's ``model_cfg``, for exports.

    Raises:
        DataError: Its input is no square, its preprocessing is none, or the tokenizer gives tokens that it lacks.
    """
    model.eval().requires_grad_(False)
    preprocess = preprocess_config(model)
    image_size, to_input = input_of(preprocess)
    vocabulary = open_clip.get_model_tokenize_cfg(model).get("vocab_size")
    if vocabulary is not None and (largest := int(tokenizer(["a photo of a cat"]).max())) >= vocabulary:
        rule = f"the tokenizer must be that of the model, which has {vocabulary} tokens"
        raise DataError(Problem("model.name", rule, f"token {largest}"))
    return Clip(
        model=model,
        tokenizer=tokenizer,
        image_size=image_size,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        to_input=to_input,
        input_key=f"{image_size}-{preprocess['interpolation']}-{preprocess['resize_mode']}",
        logit_scale=float(model.logit_scale.detach().exp()),  # type: ignore[operator]  # untyped
        config={"model_cfg": model_config, "preprocess_cfg": {key: preprocess[key] for key in PREPROCESSING}},
        weights_hash=state_hash(model.state_dict()),
    )


def input_of(preprocess: dict[str, Any]) -> tuple[int, Callable[[Image.Image], Image.Image]]:
    """Returns ``image_size`` and ``to_input`` of a ``Clip``.

    Args:
        preprocess: open_clip's ``preprocess_cfg``, with the size.

    Raises:
        DataError: The input is no square, or the preprocessing is none.
    """
    image_size = _image_size(preprocess)
    stock = open_clip.image_transform(image_size, is_train=False, **{key: preprocess[key] for key in PREPROCESSING})
    kept = ("Resize", "CenterCrop", "ResizeKeepRatio", "CenterCropOrPad")
    return image_size, Compose([step for step in stock.transforms if type(step).__name__ in kept])


def _image_size(preprocess: dict[str, Any]) -> int:
    """Returns the side of a model's input in pixels; raises a ``DataError`` where its preprocessing is none."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise DataError(Problem("model.name", "the model must take square images", f"{height} x {width} pixels"))
    for key, low in (("mean", -1e6), ("std", 1e-6)):
        numbers = preprocess[key] if isinstance(preprocess[key], list | tuple) else ()
        if len(numbers) != 3 or not all(type(one) in (int, float) and low <= one <= 1e6 for one in numbers):
            rule = f"the preprocessing of the weights must have three numbers as {key}, for pixels from 0 to 1"
            raise DataError(Problem("model.name", rule, str(preprocess[key])[:100]))
    known = {"interpolation": ("bilinear", "bicubic"), "resize_mode": ("shortest", "longest", "squash")}
    for key, allowed in known.items():
        if preprocess[key] not in allowed:
            rule = f"the preprocessing of the weights must have a known {key}"
            raise DataError(Problem("model.name", rule, str(preprocess[key])[:100], allowed))
    return int(height)


def write_tokenizer(clip: Clip, folder: Path) -> None:
    """Writes the files of a model's tokenizer, without which a folder does not open; CLIP's own has none."""
    options = clip.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    if MERGES in options:
        shutil.copy(options[MERGES], folder)
    if hasattr(clip.tokenizer, "save_pretrained"):
        clip.tokenizer.save_pretrained(str(folder))


def model_key(clip: Clip) -> list[Any]:
    """Returns what decides what a model computes, but for the libraries.

    Neither the architecture's options nor its modules hold everything: an activation may be in one of them alone.
    """
    return [clip.weights_hash, clip.config["model_cfg"], re.sub(" at 0x[0-9a-f]+", "", repr(clip.model))]


def tokenizer_hash(clip: Clip) -> str:
    """Returns a hash of all that decides which tokens a sentence gets, but for the libraries: 32 hex digits."""
    tokenizer, digest = clip.tokenizer, hashlib.blake2b(digest_size=16)
    fields = {name: value for name, value in sorted(vars(tokenizer).items()) if name not in _NOT_HASHED}
    digest.update(f"{type(tokenizer).__qualname__} {re.sub(' at 0x[0-9a-f]+', '', repr(fields))}".encode())
    if isinstance(tokenizer, HFTokenizer):
        with tempfile.TemporaryDirectory() as folder, quiet():
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                digest.update(f"{path.name} ".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def known_tokens(clip: Clip) -> npt.NDArray[np.int64]:
    """Returns the ids of the tokens on which a text tower was trained, those of start, end and filling among them."""
    if clip.captions:
        return np.unique(clip.tokenizer(list(clip.captions)).numpy())
    inner = getattr(clip.tokenizer, "tokenizer", clip.tokenizer)  # Hugging Face's within open_clip's
    sizes = (open_clip.get_model_tokenize_cfg(clip.model).get("vocab_size"), getattr(inner, "vocab_size", None))
    return np.arange(min(filter(None, sizes)))


def _tokenizer(name: str, opened: Opened) -> Callable[[list[str]], Tensor]:
    """Returns the tokenizer of a model: CLIP's own, or one of Hugging Face from the weights' folder or the hub."""
    text, folder = opened.config["text_cfg"], opened.folder
    context_length, options = text.get("context_length", 77), {**(text.get("tokenizer_kwargs") or {})}
    wanted = text.get("hf_tokenizer_name")
    if not wanted:
        try:
            if MERGES in options:
                with gzip.open(options[MERGES]) as file:  # which unpacks to a thousand times its size
                    if len(file.read(MOST_TEXT_BYTES + 1)) > MOST_TEXT_BYTES:
                        raise ValueError(f"more than {MOST_TEXT_BYTES:,} bytes, unpacked")
            return open_clip.SimpleTokenizer(context_length=context_length, **options)  # type: ignore[no-any-return]
        except (OSError, EOFError, zlib.error, ValueError, LookupError) as error:  # of merges that come with weights
            rule, said = "the merges of the tokenizer must be readable", f"{options.get(MERGES)}: {error}"
            raise DataError(Problem("model.name", rule, said)) from error
    is_local = folder is not None and has_tokenizer(folder)
    options |= {"tokenizer_mode": text.get("tokenizer_mode"), "trust_remote_code": False}
    if is_local:
        options["local_files_only"] = True

    def get() -> Callable[[list[str]], Tensor]:
        with quiet():
            tokenizer = HFTokenizer(str(folder) if is_local else wanted, context_length, **options)
            tokenizer(["a photo"])  # what opens may still lack what a sentence needs
        return tokenizer  # type: ignore[no-any-return]  # open_clip is untyped

    try:
        return fetched("model.name", f"the tokenizer of {name}", None if is_local else wanted, get)
    except ImportError as error:
        rule = f"the tokenizer of {name} ({wanted}) needs the package transformers"
        step = "Install it: pip install 'carft-ray[hf]'"
        raise DataError(Problem("model.name", rule, _said(error), next_step=step)) from error
    except Exception as error:  # transformers and tokenizers raise many kinds, Exception itself among them
        if isinstance(error, DataError):
            raise
        rule = f"the tokenizer files of {name} ({wanted}) must be readable by transformers"
        raise DataError(Problem("model.name", rule, f"{folder}: {_said(error)}")) from error


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def state_hash(state: dict[str, Tensor]) -> str:
    """Returns a hash of names, types, shapes and bytes of a state, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
