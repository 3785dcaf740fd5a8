"""Models without weights, and files of CLIP weights: read without unpickling code, compared, and put into a model."""

import contextlib
import io
import itertools
import logging
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from carft_ray.errors import DataError, Problem
from carft_ray.model.catalog import WEIGHTS_ENDINGS
from carft_ray.untrusted import MOST_TEXT_BYTES, open_regular, parse_json, read_text

MOST_TENSORS = 5_000  # of a model; the largest of open_clip have 1,300
SAFETENSORS = ".safetensors"
MOST_WEIGHTS_BYTES = 64 * 2**30  # the largest of open_clip, of 5 billion numbers, has 20 GB
# with the tensors in OpenAI's own state: integers of the model's sizes
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")  # open_clip resizes
_MOST_STRETCHED = 64  # rows of position embeddings that are made of one: eight times the side of an image
_NUM_CHARACTERS = 600  # of torch's message about weights that do not fit
_ZIP = b"PK\x03\x04"  # begins what torch has written since its release 1.6
_NUM_PICKLES = 5  # of older files: a magic number, the version, the system, the state, the names of its storages
_MOST_REPEATED = 100  # parts of all objects of a pickle, per byte; torch.save writes 2 at most
_KNOWN = re.compile(
    r"collections (OrderedDict|Counter)|torch ([a-z0-9_]+|\w+Storage|Size)|torch\.storage UntypedStorage"
    r"|torch\._utils _rebuild_\w+|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    r"|(builtins|__builtin__) (set|complex)"
)
# operations of a pickle that change an object on its stack; others make one
_CHANGING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_Part = list[Any]  # an object of a pickle, as the list of its parts
_LEAF: _Part = []  # a number, a text, a class
_MARK: _Part = []
State = dict[str, Tensor]


def build_model(name: str, device: str = "cpu") -> nn.Module:
    """Returns an open_clip model with untrained weights, float32.

    They are the same in every process, so that the workers of a training begin with one model; the state of the random
    generator stays as it was.

    Args:
        name: A model name of open_clip, or 'local-dir:FOLDER'.
        device: 'cpu', or 'meta' for a model that takes no memory and has shapes alone.
    """
    with quiet(), torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        options = {"load_weights": False, "pretrained_text": False, "precision": "fp32", "device": device}
        return open_clip.create_model(name, **options)  # type: ignore[no-any-return]  # open_clip is untyped


@contextlib.contextmanager
def few_tensors() -> Iterator[None]:
    """Ends the building of a model, with a ``ValueError``, that has more than ``MOST_TENSORS``: layers may be any."""
    numbers = itertools.count(1)

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(numbers) > MOST_TENSORS:
            raise ValueError(f"more than {MOST_TENSORS:,} tensors")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries' warnings and logs off the terminal: open_clip uses the root logger, the hub's client its own."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # a call on the root logger adds one where there is none


def read_weights(path: Path, place: str) -> State:
    """Reads the tensors of a file: safetensors, or what ``torch.save`` wrote, without running code from it.

    A checkpoint of open_clip's training (``state_dict``) and the prefixes ``module.`` and ``_orig_mod.`` of wrapped
    models are taken off.

    Raises:
        DataError: It cannot be read, holds more than tensors and plain values, is a TorchScript archive, or takes far
            more memory than its size.
    """
    _require_weights(path, place)
    try:
        # not by open_clip's loader, which reads again without ``weights_only`` when the first read raises a TypeError
        is_plain = path.suffix == SAFETENSORS
        if not is_plain:
            _require_plain(path)
        with quiet():
            state: Any = load_file(path) if is_plain else torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if isinstance(state, dict):
            _require_own_numbers(state, path.stat().st_size)
    except Exception as error:  # torch and safetensors raise many kinds; all mean that this is no file of tensors
        raise DataError(_unreadable(path, place, error)) from error
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise DataError(Problem(place, "must contain named tensors, or a checkpoint with state_dict", str(path)))
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in state.items()}


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
            shards = parse_json(read_text(index[0]))["weight_map"].values()
            return sorted({folder / Path(shard).name for shard in shards})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            rule = "must be JSON with weight_map, as transformers writes it"
            raise DataError(Problem(str(index[0]), rule, f"{type(error).__name__}: {error}")) from error
    others = [name for ending in WEIGHTS_ENDINGS for name in present if name.endswith(ending)]
    return [folder / next(name for name in (*order, *others) if name in present)]


def is_from_openai(state: Mapping[str, Any]) -> bool:
    """Tells OpenAI's own state, which was trained with QuickGELU, by the sizes that it has with its tensors."""
    return all(name in state for name in OPENAI_SIZES)


def fitted(model: nn.Module, state: State, weights: str, place: str) -> State:
    """Returns weights as an open_clip model loads them; nothing may be missing, left over or of another shape.

    Position embeddings for another image size or context length are interpolated, as open_clip does it, with a warning.

    Args:
        model: Built by open_clip, on the device 'meta'.
        state: As ``read_weights`` gives it.
        weights: What to call them in messages.
        place: Key of the recipe that named them.

    Raises:
        DataError: They do not fit; names the tensors.
    """
    state = for_model(model, state)
    stretched = _stretched(model, state)
    with quiet():
        if stretched:  # in float32: on a CPU torch interpolates no half precision
            state |= {name: state[name].float() for name in _POSITIONS if name in state}
            resize_pos_embed(state, model)
            resize_text_pos_embed(state, model)
        try:
            model.load_state_dict(state)  # nothing but shapes, on the device 'meta'
        except RuntimeError as error:
            said = " ".join(line.strip() for line in str(error).splitlines()[1:])
            rule = f"the tensors of {weights} must be those of the model"
            raise DataError(Problem(place, rule, said[:_NUM_CHARACTERS])) from error
    if stretched:
        text = "%s: the position embeddings of %s are interpolated (rows of %s)."
        logging.getLogger(__name__).warning(text, place, weights, ", ".join(stretched))
    return state


def _stretched(model: nn.Module, state: State) -> list[str]:
    """Returns which position embeddings are interpolated, in words; none where one differs in more than its rows."""
    needed, found = model.state_dict(), []
    for name in _POSITIONS:
        if isinstance(state.get(name), Tensor) and name in needed and state[name].shape != needed[name].shape:
            have, need = state[name].shape, needed[name].shape
            if len(have) != 2 or have[1] != need[1] or need[0] > _MOST_STRETCHED * have[0]:
                return []
            found.append(f"{name} {have[0]} to {need[0]}")
    return found


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


def _require_weights(path: Path, place: str) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(Problem(place, "must be an existing weights file", f"{path}: {error.strerror}")) from error
    if size > MOST_WEIGHTS_BYTES:
        raise DataError(Problem(str(path), f"must have at most {MOST_WEIGHTS_BYTES:,} bytes", f"{size:,}"))


def _require_plain(path: Path) -> None:
    """Checks a file of ``torch.save`` before torch reads it, which may fill the memory for a file of a kilobyte.

    Raises:
        Exception: It is damaged or compressed, has other objects than tensors and plain values, or is a program.
    """
    with open_regular(path) as file:
        if file.read(len(_ZIP)) != _ZIP:
            file.seek(0)
            head = io.BytesIO(file.read(MOST_TEXT_BYTES))
            for _ in range(_NUM_PICKLES):
                _require_known(head)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(each.filename.endswith("/constants.pkl") for each in entries):
                raise ValueError("TorchScript")
            is_stored = all(each.compress_type == zipfile.ZIP_STORED for each in entries)
            if not is_stored or sum(each.file_size for each in entries) > path.stat().st_size:
                raise ValueError("a compressed archive, which torch.save does not write")
            for each in entries:
                if each.filename.lower().endswith(".pkl"):
                    with archive.open(each) as entry:
                        _require_known(io.BytesIO(entry.read(MOST_TEXT_BYTES)))


def _require_known(stream: io.BytesIO) -> None:
    """Raises ``ValueError`` for a pickle that is damaged, names other objects than those of tensors, or is entangled.

    torch also takes some that grow without end: ``bytearray`` of any size, ``encode`` of what was encoded.
    """
    begin, stack, memo, made = stream.tell(), list[_Part](), dict[Any, _Part](), [_LEAF, _MARK]
    try:
        for code, value, _ in pickletools.genops(stream):
            if code.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not _KNOWN.fullmatch(str(value)):
                raise ValueError(f"Unsupported global: {value}")
            if code.name == "MEMOIZE" or code.name.endswith("PUT"):
                memo[len(memo) if value is None else value] = stack[-1]
            elif code.name.endswith("GET"):
                stack.append(memo[value])
            else:
                _apply(code, stack, made)
    except (LookupError, StopIteration):
        raise ValueError("a damaged pickle") from None
    _require_few_parts(made, _MOST_REPEATED * (stream.tell() - begin))


def _apply(code: pickletools.OpcodeInfo, stack: list[_Part], made: list[_Part]) -> None:
    """Does to a stack what an operation of a pickle does to objects: what it takes becomes part of what it leaves."""
    takes, leaves = code.stack_before, code.stack_after
    changed = code.name in _CHANGING
    if pickletools.markobject in takes:
        begin = len(stack) - 1 - next(n for n, each in enumerate(reversed(stack)) if each is _MARK)
        taken = stack[begin + 1 :]
        del stack[begin:]
    else:
        taken = [stack.pop() for _ in range(len(takes) - changed)]
    if changed and (stack[-1] is _LEAF or stack[-1] is _MARK):
        raise LookupError
    if changed:
        stack[-1].extend(taken)
    elif pickletools.markobject in leaves:
        stack.append(_MARK)
    elif leaves and (takes or code.name.startswith("EMPTY")):
        stack += [taken for _ in leaves]
        made.append(taken)
    elif leaves:
        stack.append(_LEAF)


def _require_few_parts(made: list[_Part], most: int) -> None:
    """Raises ``ValueError`` for objects that share parts at so many levels that to hash or print one never ends.

    Args:
        made: All objects of a pickle, each with its parts.
        most: How many parts they may have together, where a part of a part counts for each.
    """
    parts = {id(one): [id(each) for each in one] for one in made}
    sizes, total = dict[int, int](), 0
    try:
        for one in TopologicalSorter(parts).static_order():
            sizes[one] = 1 + sum(sizes[each] for each in parts[one])
            total += sizes[one]
            if total > most:
                raise ValueError("objects that share parts again and again, which torch.save does not write")
    except CycleError:
        raise ValueError("an object that contains itself, which torch.save does not write") from None


def _require_own_numbers(state: Mapping[str, Any], size: int) -> None:
    """Raises ``ValueError`` for tensors that repeat their numbers by a stride of 0, or have none; two may share them.

    Args:
        state: The tensors, and other values.
        size: Of their file, in bytes.
    """
    total = 0
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"{name} must be a dense tensor")
            num_bytes = value.numel() * value.element_size()
            total += num_bytes
            if num_bytes > value.untyped_storage().nbytes() or total > 2 * size:
                raise ValueError(f"{name} has more numbers than the file contains")


def _unreadable(path: Path, place: str, error: Exception) -> Problem:
    with path.open("rb") as file:
        is_pointer = file.read(24).startswith(b"version https://git-lfs")
    if is_pointer:
        return Problem(place, "must be a weights file", f"the Git LFS pointer {path}", next_step="Run: git lfs pull")
    if "TorchScript" in str(error):
        rule = "must be a file of tensors; a TorchScript archive, such as OpenAI's own .pt files, is a program"
        step = "If you trust it, save the tensors of torch.jit.load(FILE).state_dict() as safetensors (docs/models.md)."
        return Problem(place, rule, str(path), next_step=step)
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        rule = (
            "must contain only tensors and plain values; carft-ray unpickles nothing else, since that can run any code"
        )
        step = "If you trust it, save model.state_dict() of its model as safetensors, and use that file."
        return Problem(place, rule, str(path), next_step=step)
    reason = str(error).partition("\n")[0] or type(error).__name__
    if reason.startswith("Weights only load failed"):  # then comes the advice to unpickle anything
        reason = "its bytes are not those of a file that torch.save wrote"
    return Problem(place, "must be a weights file that can be read", f"{path}: {reason}")
