"""One training, whole: loss, optimizer, checkpoints, evaluation of its alphas, ``result.json``.

The public names are loaded when they are first used: the package can be imported without torch.
"""

import importlib
from typing import Any

_HOMES = {
    "RunContext": "training.run_context",
    "context_distribution": "training.car_ft_loss",
    "context_kl": "training.car_ft_loss",
    "fine_tune": "training.loop",
    "load_clip": "model.clip",
    "mix_weights": "model.mixing",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'carft_ray.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"carft_ray.{_HOMES[name]}"), name)
