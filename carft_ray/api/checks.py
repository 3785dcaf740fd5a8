"""What comes before every command: versions of libraries, and a recipe that is checked together with its folders."""

import contextlib
import functools
import logging
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from carft_ray import environment
from carft_ray.errors import DataError, HoldOutError, RecipeError, UsageError
from carft_ray.recipe import loading
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import quoted
from carft_ray.ui import notebook

P = ParamSpec("P")
R = TypeVar("R")
RecipeLike = str | Path | Mapping[str, Any] | Recipe
Overrides = Mapping[str, Any] | Sequence[str]

logger = logging.getLogger(__name__)
_runs = ContextVar("runs", default=False)  # a command runs, in this thread: what it calls is no other one
_num_running, _counting = 0, threading.Lock()  # commands of all threads


@contextlib.contextmanager
def command() -> Iterator[None]:
    """What surrounds a command: libraries that are too old are refused, and each tree of images is listed once.

    What it has opened is forgotten when no command runs any more: images may change before the next one.

    Raises:
        UsageError: A library is older than its range.
    """
    global _num_running
    if _runs.get():
        yield
        return
    require_versions()
    notebook.without_bars_of_others()
    from carft_ray.data.sets import listing_once

    token = _runs.set(True)
    with _counting:
        _num_running += 1
    try:
        with listing_once():
            yield
    finally:
        _runs.reset(token)
        opened = sys.modules.get("carft_ray.training.shared_inputs")  # None: nothing was
        with _counting:
            _num_running -= 1
            if opened is not None and not _num_running:
                opened.forget_inputs()


def require_versions(extra: str = "") -> None:
    """Warns of every library that is newer than its range in pyproject.toml.

    Args:
        extra: Check the libraries of this extra.

    Raises:
        UsageError: A library is older than its range.
    """
    older, newer = environment.outside_ranges(extra)
    if older:
        raise UsageError(older)
    for problem in newer:
        logger.warning("%s", problem)


def as_command(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function run as a command (``command``)."""

    @functools.wraps(function)
    def run(*given: P.args, **named: P.kwargs) -> R:
        with command():
            return function(*given, **named)

    return run


@as_command
def load_recipe(recipe: RecipeLike, overrides: Overrides = (), trust_paths: bool = False) -> Recipe:
    """Reads a recipe and checks it and its folders without loading weights. Logs warnings.

    Torch is loaded only for a model name of open_clip.

    Args:
        recipe: A YAML file; a dictionary with its content, whose relative paths start at the working directory; or a
            recipe, which is checked again.
        overrides: Values by key, ``{"train.epochs": 3}``, or texts as in ``--set``.
        trust_paths: If the recipe is in this machine's copy of a study in a bucket: read the files that it names,
            although this machine has not written the study.

    Returns:
        The recipe; all paths are absolute.

    Raises:
        UsageError: It is in such a copy and names files outside of it.
        RecipeError: It breaks rules; the message lists all of them.
        HoldOutError: Two roles share a set.
        DataError: Images or class lists are missing.
    """
    value = _read(recipe, override_words(overrides), trust_paths)
    return check_recipe(value, warns=not isinstance(recipe, Recipe))  # else its warnings were told when it was loaded


def check_recipe(value: Recipe, warns: bool = True) -> Recipe:
    """Checks a recipe that keeps the rules with its folders, and returns it.

    Args:
        value: The recipe.
        warns: Log its warnings.

    Raises:
        CarftError: Same as in ``load_recipe``.
    """
    from carft_ray.data.role_checks import check_roles, check_sets
    from carft_ray.model.catalog import check_model, model_warnings
    from carft_ray.recipe.rules import warnings

    if problems := check_model(value.model):
        raise RecipeError(problems)
    if problems := check_roles(value):
        raise HoldOutError(problems)
    if problems := check_sets(value):
        raise DataError(problems)
    for text in (*warnings(value), *model_warnings(value.model)) if warns else ():
        logger.warning("%s", text)
    return value


def _read(recipe: RecipeLike, overrides: Sequence[str], trust_paths: bool) -> Recipe:
    if isinstance(recipe, str | Path):
        return read_recipe(Path(recipe), overrides, trust_paths)
    value = recipe.model_dump(mode="json", exclude_unset=True) if isinstance(recipe, Recipe) else recipe
    return loading.recipe_of(value, overrides)


def read_recipe(
    path: Path, overrides: Sequence[str] = (), trust_paths: bool = False, reads: loading.Reads = loading.reads_any
) -> Recipe:
    """Reads a recipe file; one in this machine's copy of a study in a bucket is the study's, not the user's.

    Args:
        path: The file.
        overrides: Texts as in ``--set``.
        trust_paths: Same as in ``load_recipe``.
        reads: Same as in ``loading.load_recipe``.

    Raises:
        RecipeError: It breaks rules.
        UsageError: Same as in ``load_recipe``.
    """
    from carft_ray.study import trust  # loads Optuna, which a notebook must not meet before ``without_bars_of_others``

    folder = trust.copy_around(path)
    if folder is None:
        return loading.load_recipe(path, overrides, reads)
    kept = loading.load_recipe(path, reads=None)
    asked = loading.load_recipe(path, overrides, reads) if overrides else kept
    command = "resume {}" if kept.search.space else f"train {shlex.quote(str(path))} --out {{}} --resume"
    return trust.allowed(folder, kept, asked, loading.keys_of(overrides), trust_paths, command)


def override_words(overrides: Overrides) -> list[str]:
    """Returns overrides as the texts of ``--set``."""
    if isinstance(overrides, Mapping):
        return [f"{key}={quoted(value)}" for key, value in overrides.items()]
    return several(overrides)


def several(given: Sequence[Any] | Path) -> list[Any]:
    """Returns what stands in a list; a text or path by itself is the only one, not a list of its letters."""
    return [given] if isinstance(given, str | Path) else list(given)
