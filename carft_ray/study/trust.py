"""Which files a study's recipe may name: those of a study that this machine has written, and no others unasked.

The recipe of a study in a bucket may be a stranger's, and what a training reads comes back in the study: the names of
classes, thumbnails of images. So a command takes from it only paths inside the study; the others need
``--trust-paths``, a recipe of the user's own, or a note that a search of this machine has used these very paths there:

    written/HASH        in the user's cache, of the study's id, its address, and the paths and sets of its recipe

A study that this machine has not written, also one in a folder, decides neither where the cache is nor its size.
"""

import json
import logging
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from carft_ray import environment, files
from carft_ray.data.cache import key_of, user_cache_dir
from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.layout import MANIFEST
from carft_ray.recipe.loading import paths_by_key
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.place import DRIVEN, STUDIES, address_in

WRITTEN = "written"  # in the cache
OPTION = "--trust-paths"
_CACHE_KEYS = ("data.cache_dir", "data.cache_gb")
_UP = re.compile(r"(^|[/{},])\.{1,2}($|[/{},])")  # in a pattern (``data.formats.webdataset``): ``{..,..}`` may lead up

logger = logging.getLogger(__name__)


def address_of(folder: Path) -> str | None:
    """Returns the address of the study in a bucket of which a folder is this machine's copy; None of another folder."""
    return address_in(folder, STUDIES) or address_in(folder, DRIVEN)


def copy_around(path: Path) -> Path | None:
    """Returns the copy of a study in a bucket that contains a file: its recipe is the study's, not the user's."""
    return next((folder for folder in path.resolve().parents if address_of(folder) is not None), None)


def is_written(study_dir: Path, recipe: Recipe) -> bool:
    """Tells whether a search of this machine has used the paths of this recipe in this study."""
    return _note(study_dir, recipe, paths_by_key(recipe)).exists()


def note_written(study_dir: Path, recipe: Recipe) -> None:
    """Notes that a search of this machine uses a recipe in a study that it holds."""
    paths = paths_by_key(recipe)
    note = _note(study_dir, recipe, paths)
    if (paths or recipe.data.cache_gb is not None) and not note.exists():
        try:
            files.write_text(note, f"{address_of(study_dir) or study_dir}\n")
        except StorageError as error:  # the next command asks for the option
            logger.warning("This machine could not record that it has written this study: %s", error)


def to_record(study_dir: Path, kept: Recipe, recipe: Recipe) -> Recipe:
    """Returns a search's recipe as its study records it: where the machines keep images that have written it, it says.

    Args:
        study_dir: The folder of the study.
        kept: The study's recipe before.
        recipe: That of the search, which has no such keys where ``allowed`` has left them out.
    """
    if address_of(study_dir) is not None or is_written(study_dir, kept):
        return recipe
    names = [key.removeprefix("data.") for key in _CACHE_KEYS]
    left = {name: getattr(kept.data, name) for name in names if getattr(recipe.data, name) is None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=left)})


def _note(study_dir: Path, recipe: Recipe, paths: Mapping[str, str]) -> Path:
    number = (files.read_object(study_dir, MANIFEST) or {}).get("id")
    used: list[Any] = [number, address_of(study_dir), recipe.data.model_dump(mode="json"), paths]
    return user_cache_dir() / WRITTEN / key_of([json.dumps(used, sort_keys=True)])


def allowed(
    study_dir: Path, kept: Recipe, asked: Recipe, given: Iterable[str], trust_paths: bool, command: str
) -> Recipe:
    """Returns the recipe of a study for a command that reads what it names.

    Args:
        study_dir: The folder of the study, or the copy of one in a bucket.
        kept: The study's recipe.
        asked: The same with what the user has set over it.
        given: Keys that the user has set.
        trust_paths: The user trusts the paths of the study.
        command: What the user would run, for the message; ``{}`` stands for the address of the study.

    Raises:
        UsageError: It names files outside of a study in a bucket that this machine has not written, and the user has
            named neither them nor the option.
    """
    if trust_paths or is_written(study_dir, kept):
        return asked
    own = tuple(given)
    _require_inside(
        study_dir, {key: path for key, path in paths_by_key(asked).items() if not _is_below(key, own)}, command
    )
    return _in_own_cache(asked, [key for key in _CACHE_KEYS if not _is_below(key, own)])


def require_written(study_dir: Path, recipe: Recipe, command: str) -> None:
    """Refuses a recipe as ``allowed`` does, for a command that keeps no image in its cache.

    Raises:
        UsageError: As ``allowed``.
    """
    if not is_written(study_dir, recipe):
        _require_inside(study_dir, paths_by_key(recipe), command)


def _require_inside(study_dir: Path, paths: Mapping[str, str], command: str) -> None:
    """Refuses paths by key that lead out of a study in a bucket; that of the cache counts for nothing.

    Raises:
        UsageError: As ``allowed``.
    """
    address, home = address_of(study_dir), study_dir.resolve()
    inside = {key for key, path in paths.items() if Path(path).resolve().is_relative_to(home) and not _UP.search(path)}
    outside = {key: path for key, path in paths.items() if key not in inside}
    strange = [(key, path) for key, path in outside.items() if key not in _CACHE_KEYS]
    if address is None or not strange:
        return
    rule = f"must be inside {address}, a study that this machine has not written"
    is_this = environment.is_program and sys.argv[1:2] == command.split()[:1]  # with all its options
    fitted = shlex.join(sys.argv[1:]) if is_this else command.replace("{}", shlex.quote(address), 1)
    step = f"If you trust this study to name these files: carft-ray {fitted} {OPTION}"
    steps = [""] * (len(strange) - 1) + [step]
    raise UsageError(
        [Problem(key, rule, path, next_step=step) for (key, path), step in zip(strange, steps, strict=True)]
    )


def _is_below(key: str, others: Collection[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in others)


def _in_own_cache(recipe: Recipe, keys: Iterable[str]) -> Recipe:
    """Returns a recipe without these keys of the cache; a line says which had a value."""
    names = [key.removeprefix("data.") for key in keys]
    if ignored := {name: value for name in names if (value := getattr(recipe.data, name)) is not None}:
        said = " and ".join(f"data.{name}: {value}" for name, value in ignored.items())
        text = "%s of the study has no effect, because this machine has not written the study: "
        text += "images are kept in %s. With %s they are kept where the study says."
        logger.warning(text, said, user_cache_dir(), OPTION)
    data = recipe.data.model_copy(update=dict.fromkeys(ignored))
    return recipe.model_copy(update={"data": data}) if ignored else recipe
