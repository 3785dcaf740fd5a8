"""Building open_clip models without their weights, and without their libraries' words on the terminal."""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator

import open_clip
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

MOST_TENSORS = 5_000  # of a model; the largest of open_clip have 1,300


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
