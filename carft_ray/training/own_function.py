"""The user's own fine-tuning by its name: ``train.function: MODULE:NAME``, imported from ``train.function_dir``.

Importing runs the module, and so anything: the command line asks for ``--trust`` first (``require_trusted``).
"""

import contextlib
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from carft_ray.errors import MachineError, Problem, RecipeError, UsageError, nearest
from carft_ray.recipe.loading import own_functions
from carft_ray.recipe.schema.recipe import Recipe

OwnFunction = Callable[[dict[str, Any], Any], Any]  # (values, learning.own_training.TrainingContext) -> state

KEY = "train.function"
TRUST = "--trust"
MAIN = "__main__"
_IMPORTING = (__file__, importlib.__file__)


def require_trusted(recipe: Recipe, trusted: bool, baselines: bool = True) -> None:
    """Imports what a recipe names as fine-tunings of the user's own, where it may. Nothing is written.

    Args:
        recipe: The recipe.
        trusted: The user trusts the code that it names.
        baselines: The recipe's baselines will be trained, too.

    Raises:
        UsageError: It is not trusted.
        RecipeError: A function cannot be imported, or is none.
    """
    named = own_functions(recipe, baselines)
    if named and not trusted:
        function, folder = next(iter(named.values())), recipe.train.function_dir
        rule = f"names code that a training would run: {function}{f' in {folder}' if folder else ''}"
        step = f"If you trust it, add {TRUST}."
        raise UsageError(Problem(next(iter(named)), rule, next_step=step))
    for place, function in named.items():
        load_function(function, recipe.train.function_dir, place)


def load_function(name: str, folder: str | None, place: str = KEY) -> OwnFunction:
    """Imports a function, with the folder first on Python's path; it stays there.

    Args:
        name: ``MODULE:NAME``; the name may be dotted, as that of a static method.
        folder: Where its module lies; None: on Python's path as it is.
        place: Key path, for messages.

    Raises:
        RecipeError: There is no such module or name, importing it fails, or it cannot be called with two arguments.
    """
    module_name, _, path = name.partition(":")
    if module_name == MAIN or "<" in path:
        step = "Continue from that script; or write the function into a module and start another study with its name."
        raise RecipeError(Problem(place, "was given from Python and has no module to import", name, next_step=step))
    found: Any = _module(module_name, folder, place)
    for part in path.split("."):
        if not hasattr(found, part):
            names = [one for one, value in vars(found).items() if callable(value) and _is_of(value, module_name)]
            where = getattr(found, "__file__", None) or module_name
            rule = f"must be the name of a function in {where}"
            raise RecipeError(Problem(place, rule, path, tuple(names), nearest(path, names)))
        found = getattr(found, part)
    if not callable(found):
        raise RecipeError(Problem(place, "must be a function", f"{name}, of type {type(found).__name__}"))
    check_signature(found, place, name)
    return found  # type: ignore[no-any-return]  # it can be called


def check_signature(function: Callable[..., Any], place: str, name: str) -> None:
    """Checks that a function can be called with values and context.

    Raises:
        RecipeError: It cannot.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, say
        return
    try:
        signature.bind({}, None)
    except TypeError:
        rule = "must take two arguments, fn(values, context)"
        raise RecipeError(Problem(place, rule, f"{name.rpartition(':')[2]}{signature}")) from None


def source_of(function: OwnFunction) -> str:
    """Returns a hash of the file that holds a function (in a notebook: of its lines), 12 hex digits; '' for none."""
    with contextlib.suppress(OSError, TypeError):
        path = inspect.getsourcefile(function)
        is_file = path is not None and Path(path).is_file()
        source = Path(path).read_bytes() if path and is_file else inspect.getsource(function).encode()
        return hashlib.sha256(source).hexdigest()[:12]
    return ""


def on_node(name: str, folder: str | None) -> OwnFunction:
    """Imports the function of a training on the node where it runs; arguments as ``load_function``.

    Raises:
        MachineError: It cannot be imported here. The driver has imported it before anything was trained.
    """
    try:
        return load_function(name, folder)
    except RecipeError as error:
        raise MachineError(error.problems) from error


def _is_of(value: Any, module_name: str) -> bool:
    return getattr(value, "__module__", None) == module_name and not getattr(value, "__name__", "_").startswith("_")


def _module(name: str, folder: str | None, place: str) -> ModuleType:
    if folder is not None:
        if sys.path[:1] != [folder]:
            sys.path[:] = [folder, *(other for other in sys.path if other != folder)]
        _forget_other(name.partition(".")[0], folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _not_importable(place, name, error) from error
        near = nearest(name, [found.name for found in pkgutil.iter_modules(None if folder is None else [folder])])
        step = f"carft-ray looks for it in train.function_dir ({folder or 'none is given'}) and on Python's path."
        rule = "must be a module that can be imported"
        raise RecipeError(Problem(place, rule, name, nearest=near, next_step=step)) from None
    except (Exception, SystemExit) as error:  # whatever the module does
        raise _not_importable(place, name, error) from error


def _forget_other(root: str, folder: str) -> None:
    """Forgets a module of this name that this process has imported from another folder."""
    here, loaded = PathFinder.find_spec(root, [folder]), sys.modules.get(root)
    if here is None or here.origin is None or loaded is None:
        return
    if getattr(loaded, "__file__", None) not in (None, here.origin):
        for name in [one for one in sys.modules if one == root or one.startswith(f"{root}.")]:
            del sys.modules[name]


def _not_importable(place: str, name: str, error: BaseException) -> RecipeError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _IMPORTING]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    is_placed = not frames or isinstance(error, SyntaxError)  # which says its own file and line
    where = "" if is_placed else f" ({frames[0].filename}, line {frames[0].lineno})"
    first = (str(error).splitlines() or [""])[0]
    value = f"{type(error).__name__}{': ' if first else ''}{first}{where}"
    return RecipeError(Problem(place, f"the module {name} must be importable", value))
