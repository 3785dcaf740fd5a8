"""A model's weights, configuration and preprocessing, where a recipe says that they are; reaching the hub.

No code of a page runs. A hub that cannot be reached is one message.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from huggingface_hub import constants
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg
from torch import nn

from carft_ray.errors import CarftError, DataError, Problem, RecipeError
from carft_ray.model import catalog, hugging_face
from carft_ray.model.weights_files import (
    State,
    build_model,
    few_tensors,
    fitted,
    folder_files,
    is_from_openai,
    quiet,
    read_weights,
)
from carft_ray.recipe.schema.model import LOCAL_DIR, ModelConfig

SANDBOX_WEIGHTS = Path(__file__).with_name("sandbox_weights")
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
# of open_clip and torch, for configurations of which no model can be built
BUILD_ERRORS = (TypeError, ValueError, AssertionError, LookupError, RuntimeError, AttributeError, ArithmeticError)
CLIP_VOCABULARY = 49408  # tokens of CLIP's own tokenizer
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model with its weights.

    Attributes:
        model: Built by open_clip, with its preprocessing.
        config: open_clip's ``model_cfg``.
        folder: Of the weights; it may hold the tokenizer's files.
    """

    model: nn.Module
    config: dict[str, Any]
    folder: Path | None


def open_model(part: ModelConfig) -> Opened:
    """Builds the model that a recipe names, with its weights.

    Args:
        part: Name and weights.

    Raises:
        RecipeError: open_clip does not know the name or the tag, or the weights belong to another name.
        DataError: The weights cannot be fetched or read, or do not fit.
    """
    if problems := catalog.check_model(part):
        raise RecipeError(problems)
    if (folder := _folder(part)) is not None:
        return _open_folder(folder)
    if part.name.startswith(catalog.HUB):
        page = part.name.removeprefix(catalog.HUB)

        def download() -> Path:
            path = download_pretrained_from_hf(page, filename=catalog.OPEN_CLIP_CONFIG)
            download_pretrained_from_hf(page)  # into the same folder of the hub's cache
            return Path(path).parent

        return _open_folder(fetched("model.name", part.name, page, download))
    name = part.name.replace("/", "-")
    config = open_clip.get_model_config(name)

    def build(device: str) -> nn.Module:
        return _build(name, name, config, device)

    if part.pretrained == catalog.RANDOM:
        model, folder, preprocessing = build("cpu"), None, _usual_preprocessing(name)
    else:
        path, preprocessing = _find_weights(name, str(part.pretrained))
        state, folder = read_weights(path, "model.pretrained"), path.parent
        if is_from_openai(state):
            _require_activation(name, True, f"{path.name} (OpenAI's own)")
        model = _built(build, state, path.name, "model.pretrained")
    set_preprocessing(model, preprocessing)
    return Opened(model, config, folder)


def _folder(part: ModelConfig) -> Path | None:
    """Returns the folder that has a model; None for a model of open_clip or of the hub."""
    if part.name == catalog.SANDBOX:
        return SANDBOX_WEIGHTS
    return Path(part.name.removeprefix(LOCAL_DIR)) if part.name.startswith(LOCAL_DIR) else None


def _folder_config(folder: Path) -> dict[str, Any]:
    """Returns what open_clip builds the model of a folder from.

    Raises:
        RecipeError: As ``catalog.folder_problems``.
    """
    if catalog.is_hugging_face_folder(folder):
        return hugging_face.read_config(folder)[0]
    if problems := catalog.folder_problems(folder):
        raise RecipeError(problems)
    config: dict[str, Any] = catalog.read_json(folder / catalog.OPEN_CLIP_CONFIG)["model_cfg"]
    if options := config["text_cfg"].get("tokenizer_kwargs"):
        options |= {key: str(folder / Path(options[key]).name) for key in options if key == catalog.MERGES}
    return config


def preprocess_config(model: nn.Module) -> dict[str, Any]:
    """Returns the preprocessing that an open_clip model carries, with open_clip's defaults for what it leaves out."""
    return {**vars(PreprocessCfg()), **open_clip.get_model_preprocess_cfg(model)}


def set_preprocessing(model: nn.Module, preprocessing: dict[str, Any]) -> None:
    """Gives a model mean, std, interpolation and resize mode; its size is that of its tower."""
    known = {key: preprocessing[key] for key in PREPROCESSING if preprocessing.get(key) is not None}
    open_clip.set_model_preprocess_cfg(model, {**preprocess_config(model), **known})


def _open_folder(folder: Path) -> Opened:
    place = "model.name"
    state: State = {}
    for path in folder_files(folder):
        state |= read_weights(path, place)
    if catalog.is_hugging_face_folder(folder):
        config, preprocessing = hugging_face.read_config(folder)

        def build_clip(device: str) -> nn.Module:
            with torch.device(device):
                model: nn.Module = open_clip.CLIP(**config)
            return model

        model = _built(build_clip, hugging_face.convert(state), str(folder), place)
        set_preprocessing(model, preprocessing)
        if catalog.has_tokenizer(folder) and not _has_clip_tokenizer(folder, config["text_cfg"]["vocab_size"]):
            # open_clip then searches the tokenizer in the folder, in exports too
            config["text_cfg"]["hf_tokenizer_name"] = folder.name
        return Opened(model, config, folder)
    config = _folder_config(folder)
    if is_from_openai(state) and not config.get("quick_gelu", False):
        rule = "model_cfg must have quick_gelu: true for OpenAI's own weights, or every number is wrong"
        raise DataError(Problem(f"{folder / catalog.OPEN_CLIP_CONFIG}", rule))

    def build(device: str) -> nn.Module:
        return _build(f"{LOCAL_DIR}{folder.resolve()}", folder.name, config, device)

    return Opened(_built(build, state, str(folder), place), config, folder)


def _built(build: Callable[[str], nn.Module], state: State, weights: str, place: str) -> nn.Module:
    """Builds a model with its weights: first without memory, to see that its sizes are those of the weights.

    Raises:
        DataError: open_clip cannot build it, or the weights are those of another model.
    """
    try:
        with few_tensors():
            shapes = build("meta")
        state = fitted(shapes, state, weights, place)
        model = build("cpu")
    except BUILD_ERRORS as error:
        rule = "must be of a model that open_clip can build"
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(Problem(f"{place}: {weights}", rule, said)) from error
    model.load_state_dict(state)
    return model


def _build(address: str, name: str, config: dict[str, Any], device: str) -> nn.Module:
    """Builds a model; the configuration of a text tower of the hub, which another may have named, runs no code."""
    page, what = config["text_cfg"].get("hf_model_name"), f"the text tower of {name}"

    def build() -> nn.Module:
        if page:
            require_no_code(page, what)
        return build_model(address, device)

    return fetched("model.name", what, page, build)


def _find_weights(name: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """Returns the file of the weights, and what is known of their preprocessing."""
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        known: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained)
        page = known.get("hf_hub") or known.get("url")
        what = f"the weights '{pretrained}' of {name}"
        file = fetched("model.pretrained", what, page, lambda: open_clip.download_pretrained(known))
        return Path(file), known
    path = Path(pretrained)
    if (tag := _released_as(name, path)) is not None:
        known = open_clip.get_pretrained_cfg(name.removesuffix(catalog.QUICK), tag)
        _require_activation(name, bool(known.get("quick_gelu", False)), f"{path.name} ('{tag}' by its hash)")
        return path, known
    return path, _preprocessing_of(name, path)


def _require_activation(name: str, trained_quick: bool, weights: str) -> None:
    if problems := catalog.activation_problems(name, trained_quick, weights):
        raise RecipeError(problems)


def _released_as(name: str, path: Path) -> str | None:
    """Returns the tag of a file that open_clip has released, whose address ends in the start of its SHA-256."""
    addresses = {tag: open_clip.get_pretrained_url(name.removesuffix(catalog.QUICK), tag) for tag in _tags(name)}
    hashes = {found[1]: tag for tag, url in addresses.items() if (found := re.search(r"-([0-9a-f]{8})\.pt$", url))}
    if not hashes or path.suffix != ".pt":
        return None
    with path.open("rb") as file:
        return hashes.get(hashlib.file_digest(file, "sha256").hexdigest()[:8])


def _tags(name: str) -> list[str]:
    return list(open_clip.list_pretrained_tags_by_model(name.removesuffix(catalog.QUICK)))


def _preprocessing_of(name: str, path: Path) -> dict[str, Any]:
    """Returns the preprocessing of a weights file: of the configuration next to it, else of open_clip's weights."""
    config = path.parent / catalog.OPEN_CLIP_CONFIG
    if config.is_file():
        given = catalog.read_json(config).get("preprocess_cfg")
        return given if isinstance(given, dict) else {}
    usual = _usual_preprocessing(name)
    if not usual and _tags(name):
        logging.getLogger(__name__).warning(
            "model.pretrained: %s does not record its preprocessing, and open_clip's weights of %s differ in it; mean, "
            "std and resizing of CLIP are used. Put the %s of the weights next to the file.",
            *(path.name, name, catalog.OPEN_CLIP_CONFIG),
        )
    return usual


def _usual_preprocessing(name: str) -> dict[str, Any]:
    """Returns the preprocessing that all of open_clip's weights of a model share, or nothing."""
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    kinds = {json.dumps(kind): kind for each in known for kind in [{key: each.get(key) for key in PREPROCESSING}]}
    return next(iter(kinds.values())) if len(kinds) == 1 else {}


def _has_clip_tokenizer(folder: Path, vocab_size: int) -> bool:
    """Tells CLIP's own tokenizer, which open_clip brings along, from another one in a Hugging Face folder."""
    path, own = folder / "tokenizer_config.json", "CLIPTokenizer"
    kind = hugging_face.read_object(path).get("tokenizer_class", own) if path.is_file() else own
    return vocab_size == CLIP_VOCABULARY and str(kind).startswith(own)


def require_no_code(page: str, what: str) -> None:
    """Refuses a configuration of transformers that names code: open_clip opens it without a word about trust.

    transformers would ask on the terminal whether to run that code, and take any line of the input for an answer.

    Args:
        page: A page of the hub, or a folder.
        what: What it is of, in words.

    Raises:
        DataError: It names code of its own.
        Exception: It cannot be read; of many kinds.
    """
    if importlib.util.find_spec("transformers") is None:
        return  # open_clip says that it is needed
    from transformers import PretrainedConfig

    if "auto_map" in PretrainedConfig.get_config_dict(page)[0]:
        rule = "must be a model of transformers itself: code that comes with weights is never run"
        raise DataError(Problem("model.name", f"{what} ({page}) {rule}", "a configuration with auto_map"))


def fetched(place: str, what: str, page: str | None, get: Callable[[], T]) -> T:
    """Returns what is in the hub's cache of this machine, and asks the hub only for what the cache lacks.

    Args:
        place: Key of the recipe.
        what: What is fetched, in words.
        page: Its page; None: nothing is fetched.
        get: Opens it; called again with a connection, where it raises without one.

    Raises:
        DataError: It is neither in the cache nor fetched; has what the hub said, and the ways without a network.
    """
    if page is None:
        return get()
    with quiet():
        for is_offline in dict.fromkeys((True, constants.HF_HUB_OFFLINE)):
            try:
                with offline(is_offline):
                    return get()
            except (ImportError, CarftError):
                raise
            except Exception as error:  # open_clip, its hub's client and transformers raise many kinds
                said = error
    step = (
        "Without a network, set model.pretrained to a weights file (.safetensors, or .pt of open_clip), or "
        "model.name to local-dir:FOLDER, a folder of open_clip or Hugging Face with its tokenizer files. Or copy "
        "the hub's cache (HF_HOME) from a machine that has them."
    )
    rule = f"{what} must be in the hub's cache or be downloaded ({page.strip('/')})"
    reason = f"{type(said).__name__}: {said}".splitlines()[0]
    raise DataError(Problem(place, rule, reason, next_step=step)) from said


@contextlib.contextmanager
def offline(is_offline: bool) -> Iterator[None]:
    """Says for a block whether the hub's client, and with it open_clip and transformers, uses its cache alone."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = is_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
