"""Torch: the doorway to open_clip, heads, losses, mixing, checkpoints and the training loop.

The names below are imported on first use, so that ``learning.models.catalog`` can be read without loading torch.
"""

import importlib
from typing import Any

_EXPORTS = {
    "build_heads": "heads",
    "context_distribution": "losses",
    "context_kl": "losses",
    "fine_tune": "loop",
    "load_clip": "models.clip",
    "mix_weights": "mixing",
    "RunContext": "context",
}

__all__ = [
    "RunContext",
    "build_heads",
    "context_distribution",
    "context_kl",
    "fine_tune",
    "load_clip",
    "mix_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'carft_ray.learning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"carft_ray.learning.{_EXPORTS[name]}"), name)
