"""Reaching the hub of models and weights: one message where it cannot be reached; no code of a page runs."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import constants

from carft_ray.errors import CarftError, DataError, Problem
from carft_ray.model.building import quiet

T = TypeVar("T")


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
