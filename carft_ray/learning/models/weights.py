"""Files of CLIP weights: read without unpickling code, compared with a model, and put into it."""

import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from carft_ray.errors import DataError, Problem
from carft_ray.learning.models.building import build_model
from carft_ray.learning.models.catalog import WEIGHTS_ENDINGS
from carft_ray.untrusted import is_name, open_regular, read_text

SAFETENSORS = ".safetensors"
MOST_WEIGHTS_BYTES = 64 * 2**30  # the largest of open_clip, of 5 billion numbers, has 20 GB
# with the tensors in OpenAI's own state: integers of the model's sizes
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")  # open_clip resizes
_MOST_STRETCHED = 64  # rows of position embeddings that are made of one: eight times the side of an image
_NUM_SHOWN = 3  # tensors named in a message
_NUM_CANDIDATES = 12  # models built to see which one the weights fit

Shape = tuple[int, ...]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Misfit:
    """How weights differ from what a model needs.

    Attributes:
        missing: Tensors of the model that are not there.
        extra: Tensors that the model has no place for.
        reshaped: Name -> shape in the file and in the model.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: dict[str, tuple[Shape, Shape]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.reshaped)

    def __str__(self) -> str:
        shapes = [f"{name} {list(found)} in place of {list(need)}" for name, (found, need) in self.reshaped.items()]
        parts = {"missing": self.missing, "more": self.extra, "of another shape": shapes}
        return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in parts.items() if names)


def read_weights(path: Path, place: str) -> State:
    """Reads the tensors of a file: safetensors, or what ``torch.save`` wrote, without running code from it.

    A checkpoint of open_clip's training (``state_dict``) and the prefixes ``module.`` and ``_orig_mod.`` of wrapped
    models are taken off.

    Raises:
        DataError: It cannot be read, holds more than tensors and plain values, or is a TorchScript archive.
    """
    _require_weights(path, place)
    if _is_torch_script(path):
        rule = "must be a file of tensors; a TorchScript archive, such as OpenAI's own .pt files, is a program"
        name = path.name if is_name(path.name) else "FILE"  # the command is one to copy
        step = (
            "Where you trust it, take its tensors out once:\n"
            '    python -c "import torch; from safetensors.torch import save_file; '
            f"state = torch.jit.load('{name}', map_location='cpu').state_dict(); "
            "save_file({k: v.float().contiguous() for k, v in state.items() if v.is_floating_point()}, "
            "'openai.safetensors')\"\n"
            "    and give openai.safetensors, with a model.name that ends in -quickgelu for a ViT or RN of OpenAI."
        )
        raise DataError(Problem(place, rule, str(path), next_step=step))
    try:
        # not by open_clip's loader, which reads again without ``weights_only`` when the first read raises a TypeError
        is_plain = path.suffix == SAFETENSORS
        state: Any = load_file(path) if is_plain else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds; all mean that this is no file of tensors
        raise DataError(_unreadable(path, place, error)) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise DataError(Problem(place, "must hold named tensors, or a checkpoint with state_dict", str(path)))
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}


def read_header(path: Path, place: str) -> State:
    """Reads names and shapes of a weights file, and the values of s and logit_bias; the rest takes no memory.

    Files that are not safetensors have no header and are read whole.
    """
    if path.suffix != SAFETENSORS:
        return read_weights(path, place)
    _require_weights(path, place)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            small = [name for name in names if name.split(".")[-1] in ("logit_scale", "logit_bias")]
            state = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
            return state | {name: file.get_tensor(name) for name in small}
    except Exception as error:  # its own kinds, and OSError
        raise DataError(_unreadable(path, place, error)) from error


def folder_files(folder: Path) -> list[Path]:
    """Returns the weights of a model folder: the file that open_clip would choose, or the shards of an index.

    Shards are searched in the folder alone, whatever the index of Hugging Face says.

    Raises:
        DataError: That index is none.
    """
    order = ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"]
    order += ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"]
    order += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]
    present = sorted(path.name for path in folder.iterdir())
    index = [folder / name for name in present if name.endswith(".index.json")]
    if index and not any(name in present for name in order):
        try:
            shards = json.loads(read_text(index[0]))["weight_map"].values()
            return sorted({folder / Path(shard).name for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            rule = "must be JSON with weight_map, as transformers writes it"
            raise DataError(Problem(str(index[0]), rule, f"{type(error).__name__}: {error}")) from error
    others = [name for ending in WEIGHTS_ENDINGS for name in present if name.endswith(ending)]
    return [folder / next(name for name in (*order, *others) if name in present)]


def is_from_openai(state: Mapping[str, Any]) -> bool:
    """Tells OpenAI's own state, which was trained with QuickGELU, by the sizes that it has with its tensors."""
    return all(name in state for name in OPENAI_SIZES)


def fill(model: nn.Module, state: State, weights: str, place: str) -> None:
    """Puts weights into an open_clip model; nothing may be missing, left over or of another shape.

    Position embeddings for another image size or context length are interpolated, as open_clip does it, with a warning
    that names the model which they fit.

    Args:
        model: Built by open_clip.
        state: As ``read_weights`` gives it.
        weights: What to call them in messages.
        place: Key of the recipe that named them.

    Raises:
        DataError: They do not fit; names the tensors, and the models that they do fit.
    """
    state, stretched = fitted(model, state, weights, place)
    if stretched:
        fitting = fitting_models(shapes_of(state))
        step = f" They fit {', '.join(fitting)} as they are." if fitting else ""
        shown = ", ".join(f"{name} {found[0]} to {need[0]}" for name, (found, need) in stretched.items())
        logging.getLogger(__name__).warning(
            "%s: the position embeddings of %s are interpolated (rows of %s).%s", place, weights, shown, step
        )
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    model.load_state_dict(state, strict=True)


def fitted(model: nn.Module, state: State, weights: str, place: str) -> tuple[State, dict[str, tuple[Shape, Shape]]]:
    """Returns a state ``for_model``, and the position embeddings that must be interpolated; see ``fill``."""
    state = for_model(model, state)
    shapes = shapes_of(state)
    misfit = compare(shapes_of(model.state_dict()), shapes)
    stretched = _only_positions(model, misfit)
    if misfit and not stretched:
        fitting = fitting_models(shapes)
        step = f"They fit {', '.join(fitting)}." if fitting else "No model of open_clip has these tensors."
        rule = f"the tensors of {weights} must be those of the model"
        raise DataError(Problem(place, rule, str(misfit), next_step=step))
    return state, stretched


def for_model(model: nn.Module, state: State) -> State:
    """Returns a state under the names that a model has, as open_clip's own loader makes it.

    Apple's names are translated, an old state is moved to a text tower of its own, integers of OpenAI's and positions
    that transformers no longer keeps are left out, and s and logit_bias get the model's number of dimensions.
    """
    state = {name: value for name, value in state.items() if name not in OPENAI_SIZES}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        needed = getattr(model, name, None)
        if needed is not None and name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(needed.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))  # a shift of all logits: no effect
    return state


def shapes_of(state: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns the shape of each tensor of a state; what is no tensor has none."""
    return {name: tuple(value.shape) if isinstance(value, Tensor) else () for name, value in state.items()}


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> Misfit:
    """Returns how the tensors of a file differ from those of a model."""
    missing = tuple(name for name in expected if name not in found)
    extra = tuple(name for name in found if name not in expected)
    both = {name: (found[name], shape) for name, shape in expected.items() if name in found}
    return Misfit(missing, extra, {name: pair for name, pair in both.items() if pair[0] != pair[1]})


def fitting_models(shapes: Mapping[str, Shape]) -> list[str]:
    """Returns the names of open_clip whose models have exactly these tensors.

    The text tower and the kind of image tower leave few candidates; those are built without memory for their weights.
    """
    bare = {name.removeprefix("text."): shape for name, shape in shapes.items()}
    vocabulary, positions = bare.get("token_embedding.weight"), bare.get("positional_embedding")
    if vocabulary is None or positions is None:
        return []
    is_timm = any(name.startswith("visual.trunk.") for name in shapes)
    is_resnet = "visual.layer1.0.conv1.weight" in shapes
    patch = shapes.get("visual.conv1.weight", ())
    candidates = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        sizes = (text.get("vocab_size", 49408), text.get("width", 512), text.get("context_length", 77))
        # a class token of the text tower takes one more position
        same_text = "hf_model_name" not in text and sizes[:2] == vocabulary
        same_text = same_text and positions[0] - sizes[2] in (0, int(text.get("embed_cls", False)))
        same_kind = is_timm == ("timm_model_name" in vision) and is_resnet == isinstance(vision.get("layers"), list)
        if same_kind and patch and not is_resnet:
            same_kind = patch[0] == vision.get("width", 768) and patch[-1] == vision.get("patch_size", 16)
        if same_text and same_kind:
            candidates.append(name)
    built = {name: build_model(name, "meta").state_dict() for name in candidates[:_NUM_CANDIDATES]}
    return [name for name, state in built.items() if not compare(shapes_of(state), shapes)]


def _only_positions(model: nn.Module, misfit: Misfit) -> dict[str, tuple[Shape, Shape]]:
    """Returns the position embeddings, when they alone differ and in their number of rows alone."""
    if misfit.missing or misfit.extra:
        return {}
    for name, (found, need) in misfit.reshaped.items():
        if name not in _POSITIONS or len(found) != 2 or found[1] != need[1]:
            return {}
        if name == _POSITIONS[0] and not hasattr(model.visual, "grid_size"):
            return {}
        if need[0] > _MOST_STRETCHED * found[0]:
            return {}
    return misfit.reshaped


def _require_weights(path: Path, place: str) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(Problem(place, "must be a weights file that is there", f"{path}: {error.strerror}")) from error
    if size > MOST_WEIGHTS_BYTES:
        raise DataError(Problem(str(path), f"must have at most {MOST_WEIGHTS_BYTES:,} bytes", f"{size:,}"))


def _is_torch_script(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # damaged: torch says so
        return False


def _unreadable(path: Path, place: str, error: Exception) -> Problem:
    with path.open("rb") as file:
        is_pointer = file.read(24).startswith(b"version https://git-lfs")
    if is_pointer:
        return Problem(place, "must be a weights file", f"the Git LFS pointer {path}", next_step="Run: git lfs pull")
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        rule = "must hold tensors and plain values alone; nothing else is unpickled, since that can run any code"
        step = "Where you trust it, save model.state_dict() of what it holds as safetensors, and give that file."
        return Problem(place, rule, str(path), next_step=step)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if reason.startswith("Weights only load failed"):  # then comes the advice to unpickle anything
        reason = "its bytes are not those of a file that torch.save wrote"
    return Problem(place, "must be a weights file that can be read", f"{path}: {reason}")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
