"""carft-ray: Ray-distributed hyperparameter search for CAR-FT (context-aware robust fine-tuning of CLIP).

``carft_ray.open_study`` reads the results of a study; see ``carft_ray.api``. To import the package loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carft_ray.api import Study, open_study

__version__ = "0.1.0"
__all__ = ["Study", "__version__", "open_study"]


def __getattr__(name: str) -> Any:
    """Loads the API when it is first asked for."""
    if name in ("Study", "open_study"):
        return getattr(importlib.import_module("carft_ray.api"), name)
    raise AttributeError(f"module 'carft_ray' has no attribute {name!r}")
