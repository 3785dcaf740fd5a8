"""The user's own fine-tuning, from Python or by ``train.function``: how it comes to the workers.

A function of a module travels by its name, with the folder of the module for Python's path on the node; one of
``__main__`` or inside another function travels by value (cloudpickle). What is trained with it, and what it is given,
is in ``training.run`` and ``training.own_training``.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import cloudpickle

from carft_ray.errors import Problem, UsageError
from carft_ray.launch.workers.runtime import Runner
from carft_ray.launch.workers.worker import RUNNER
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.training.own_function import MAIN, OwnFunction, check_signature
from carft_ray.training.run_context import RunContext

_LIMITS = (
    "train.function replaces the built-in loop: carft-ray promises no exact resume, micro-batches or stored targets. "
    "A stopped or lost training continues from the files that the function keeps in context.checkpoint_dir"
)


def own_notes(recipe: Recipe) -> tuple[str, ...]:
    """Returns what a search says of a recipe whose trials the user's own function trains."""
    return () if recipe.train.function is None else (_LIMITS,)


def with_function(recipe: Recipe, fn: Callable[..., Any]) -> tuple[Recipe, Runner]:
    """Returns the recipe that trains with a function, and the runner that calls it.

    Args:
        recipe: The recipe; ``train.function`` is set to ``MODULE:QUALNAME``.
        fn: ``fn(values, context)``, see ``training.own_training.TrainingContext``. With ``resources.executor: debug``
            this very object is called; Ray moves a function of a module by its name, another one by value.

    Raises:
        RecipeError: It cannot be called with two arguments.
        UsageError: It cannot be sent to Ray's workers.
    """
    module, qualname = getattr(fn, "__module__", None) or MAIN, getattr(fn, "__qualname__", type(fn).__qualname__)
    name = f"{module}:{qualname}"
    check_signature(fn, "train", name)
    if recipe.resources.executor != "debug":
        _pickled(fn)
    folder = _folder_of(module)
    train = recipe.train.model_copy(update={"function": name, "function_dir": folder})
    return recipe.model_copy(update={"train": train}), replace(RUNNER, train=OwnTraining(fn, name, folder))


class OwnTraining:
    """The training of a runner: ``worker.train`` with a function that was given.

    Args:
        function: The function, or what ``cloudpickle`` makes of it.
        name: ``MODULE:QUALNAME``; a baseline with another ``train.function`` (null: the built-in loop) has its own.
        folder: Of its module.
    """

    def __init__(self, function: OwnFunction | bytes, name: str, folder: str | None) -> None:
        self._function = function
        self._name = name
        self._folder = folder

    def __call__(
        self, recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int
    ) -> dict[str, Any]:
        """Runs ``training.run.run_training``, imported where it runs."""
        from carft_ray.training import run

        is_own = recipe.train.function == self._name
        function = self._loaded() if is_own else None
        return run.run_training(recipe, out_dir, prepared_dir, context, attempt, function=function)

    def _loaded(self) -> OwnFunction:
        if isinstance(self._function, bytes):
            if self._folder is not None and self._folder not in sys.path:
                sys.path.insert(0, self._folder)
            self._function = cloudpickle.loads(self._function)
        return self._function  # type: ignore[return-value]  # loaded

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray opens it before the folder is on Python's path: the function stays packed until it is called."""
        return OwnTraining, (_pickled(self._function), self._name, self._folder)


def _pickled(fn: Any) -> bytes:
    if isinstance(fn, bytes):
        return fn
    try:
        return bytes(cloudpickle.dumps(fn))  # type: ignore[no-untyped-call]
    except Exception as error:  # of whatever it holds
        step = "Open files, locks and connections inside it; or use resources.executor: debug, which moves nothing."
        value = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UsageError(
            Problem("train", "must be a function that can be sent to workers", value, next_step=step)
        ) from error


def _folder_of(module: str) -> str | None:
    """Returns the folder from which a module is imported; None for that of a script or a notebook."""
    path = getattr(sys.modules.get(module), "__file__", None)
    if module == MAIN or path is None:
        return None
    place = Path(path).resolve()
    return str(place.parents[module.count(".") + (place.name == "__init__.py")])
