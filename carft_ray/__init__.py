"""carft-ray: Ray-distributed hyperparameter search for CAR-FT (context-aware robust fine-tuning of CLIP).

``carft_ray.search`` and its like do what the commands of these names do, see ``actions``, ``answers`` and ``trained``
in ``carft_ray.api``; ``carft_ray.open_study`` reads the results of a study, see ``carft_ray.api.studies``. Importing
the package loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from carft_ray import errors as errors

if TYPE_CHECKING:
    from carft_ray.api.actions import confirm, resume, search, soup, train
    from carft_ray.api.answers import report
    from carft_ray.api.checks import load_recipe
    from carft_ray.api.studies import Study, open_study
    from carft_ray.api.trained import evaluate, export, predict

__version__ = "0.1.0"
__all__ = [
    "Study",
    "__version__",
    "confirm",
    "evaluate",
    "export",
    "load_recipe",
    "open_study",
    "predict",
    "report",
    "resume",
    "search",
    "soup",
    "train",
]
_MODULES = {"Study": "studies", "open_study": "studies", "load_recipe": "checks", "report": "answers"}
_MODULES |= dict.fromkeys(("evaluate", "export", "predict"), "trained")  # all others: actions


def __getattr__(name: str) -> Any:
    """Loads the API when it is first asked for."""
    if name in __all__:
        return getattr(importlib.import_module(f"carft_ray.api.{_MODULES.get(name, 'actions')}"), name)
    raise AttributeError(f"module 'carft_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names for completion."""
    return sorted({*globals(), *__all__})
