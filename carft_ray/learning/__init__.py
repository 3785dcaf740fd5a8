"""Training of one model: loss, optimizer, checkpoints, mixing of weights; in ``models`` the models themselves.

The public names are loaded when they are first used, so that ``models.catalog`` can be read without torch.
"""

import importlib
from typing import Any

_HOMES = {
    "RunContext": "context",
    "context_distribution": "losses",
    "context_kl": "losses",
    "fine_tune": "loop",
    "load_clip": "models.clip",
    "mix_weights": "mixing",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'carft_ray.learning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"carft_ray.learning.{_HOMES[name]}"), name)
