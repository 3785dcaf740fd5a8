"""Reaching the hub of models and weights: one message where it cannot be reached; no code of a page runs."""

import contextlib
import importlib.util
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants

from carft_ray.errors import CarftError, DataError, Problem
from carft_ray.model.building import quiet

_REACH_S = 5.0  # the hub's own client tries for most of a minute before it gives up


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


@contextlib.contextmanager
def fetching(place: str, what: str, page: str | None) -> Iterator[None]:
    """Reports in one message what could not be fetched from the hub, and the ways without a network.

    Where the hub cannot be reached, its client uses its cache alone, and answers at once.

    Args:
        place: Key of the recipe.
        what: What is fetched, in words.
        page: Its page; None: nothing is fetched.

    Raises:
        DataError: It is neither in the cache nor fetched.
    """
    if page is None:
        yield
        return
    is_reached = not constants.HF_HUB_OFFLINE and _is_reachable(constants.ENDPOINT)
    try:
        with offline(not is_reached), quiet():
            yield
    except (ImportError, CarftError):
        raise
    except Exception as error:  # open_clip, its hub's client and transformers raise many kinds
        step = (
            "Without a network, set model.pretrained to a weights file (.safetensors, or .pt of open_clip), or "
            "model.name to local-dir:FOLDER, a folder of open_clip or Hugging Face with its tokenizer files. Or copy "
            "the hub's cache (HF_HOME) from a machine that has them."
        )
        rule = f"{what} must be in the hub's cache or be downloaded ({page.strip('/')})"
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = said if is_reached else "not in the cache, and no connection to the hub"
        raise DataError(Problem(place, rule, reason, next_step=step)) from error


@contextlib.contextmanager
def offline(is_offline: bool) -> Iterator[None]:
    """Says for a block whether the hub's client, and with it open_clip and transformers, uses its cache alone."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = is_offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_reachable(address: str) -> bool:
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REACH_S):  # by the proxy of the environment, if any
            return True
    except urllib.error.HTTPError:
        return True
    except OSError as error:  # an answer, too, where the certificate is wrong: the hub's client may have others
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
