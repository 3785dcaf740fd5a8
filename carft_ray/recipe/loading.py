"""Recipe files: read, check, write.

All problems of a file are reported at once, each with file, line, key path, rule, value and nearest match; those of
rules between keys once each key by itself is right.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from carft_ray.errors import DataError, Problem, RecipeError, nearest
from carft_ray.files import is_address
from carft_ray.recipe.methods import METHOD, with_method
from carft_ray.recipe.rules import broken_rules
from carft_ray.recipe.schema.fields import Config, PathIn, path_in
from carft_ray.recipe.schema.model import LOCAL_DIR, is_weights_path
from carft_ray.recipe.schema.recipe import Recipe, with_keys
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.recipe.written import (
    KeyPath,
    Places,
    apply_overrides,
    at,
    dotted,
    dump_yaml,
    parse_yaml,
    problems_in,
    shown,
)
from carft_ray.untrusted import read_text, visible

MOST_RECIPE_BYTES = 2**22  # a recipe has kilobytes; long lists stand in files of their own
MOST_PATH_BYTES, MOST_NAME_BYTES = 4095, 255  # of Linux
Part = TypeVar("Part", bound=Config)
Reads = Callable[[Path], object] | None
_LISTS = ("class_names", "exclude")  # of the paths of a set, those of lists


def reads_any(path: Path) -> None:
    """Lets a recipe of the user's own become complete by any file that it names."""


def load_recipe(path: Path, overrides: Sequence[str] = (), reads: Reads = reads_any) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: The YAML file.
        overrides: Texts ``key.path=value`` (value in YAML) that are set over the file, later ones last; or
            ``method=NAME``, the keys of a method (``recipe.methods``).
        reads: Called before a file of templates is read, which becomes part of the recipe; may refuse it. None: no file
            is read, because only a recipe of the user's own names them.

    Returns:
        The recipe, with absolute paths: relative ones count from the folder of the file.

    Raises:
        RecipeError: The file is missing or unreadable, or breaks rules; holds all problems, in the order of the file.
    """
    return parse_recipe(_read(path), path, overrides, reads)


def parse_recipe(written: str, path: Path, overrides: Sequence[str] = (), reads: Reads = reads_any) -> Recipe:
    """As ``load_recipe``, for the text that a file has or is to have."""
    document = parse_yaml(written, str(path))
    if document.problems:
        raise RecipeError(document.problems)
    return _checked(document.value, Places(str(path), document.lines), overrides, path.resolve().parent, reads)


def recipe_of(value: Mapping[str, Any], overrides: Sequence[str] = (), reads: Reads = reads_any) -> Recipe:
    """Checks a recipe that was written in Python.

    Args:
        value: What a YAML file would hold: dictionaries, lists, texts and numbers; also tuples and paths.
        overrides: As of ``load_recipe``.
        reads: As of ``load_recipe``.

    Returns:
        The recipe, with absolute paths: relative ones count from the working directory.

    Raises:
        RecipeError: It breaks rules; holds all problems, each with its key path.
    """
    return _checked(_plain(value), Places("", {}), overrides, Path.cwd(), reads)


def apply(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe that trains with the given values.

    Args:
        recipe: The recipe of a study.
        values: Values over the fields of ``train``: of a trial or of a baseline.

    Raises:
        RecipeError: A name is no field of ``train``, or a value breaks its rule.
    """
    merged = {**recipe.train.model_dump(), **values}
    try:
        train = TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(problems_in(error, TrainConfig, ("train",))) from None
    return recipe.model_copy(update={"train": train})


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Returns the key paths that overrides set."""
    return [written.partition("=")[0].strip() for written in overrides]


def _plain(value: Any) -> Any:
    """Returns what YAML would give."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _checked(value: Any, places: Places, overrides: Sequence[str], base_dir: Path, reads: Reads) -> Recipe:
    """Returns a recipe that keeps all rules, its relative paths counted from a folder."""
    named = [text for text in overrides if keys_of([text]) == [METHOD]]
    overrides = [text for text in overrides if text not in named]
    raw, problems = apply_overrides(value, places, overrides)
    if named:  # after them, so that baselines of --set keep what they train without the method, too
        raw = with_method(raw, str(parse_yaml(named[-1].partition("=")[2], "--method").value), overrides)
    if unwritable := list(_unwritable(raw, ())):
        raise RecipeError(places.placed(unwritable))
    try:
        recipe = Recipe.model_validate(raw, context=reads and partial(_template_lines, base_dir, reads))
    except ValidationError as error:
        raise RecipeError(places.placed(problems_in(error)) + problems) from None
    recipe = _visited(recipe, lambda path, written: resolve_path(base_dir, written, places.place(path)))
    if problems := places.placed(broken_rules(recipe)) + problems:
        raise RecipeError(problems)
    if not own_functions(recipe) or recipe.train.function_dir is not None:
        return recipe
    return with_keys(recipe, train={"function_dir": str(base_dir)})


def _template_lines(base_dir: Path, reads: Callable[[Path], object], written: str) -> tuple[str, ...]:
    """Returns the templates in a file that a recipe names."""
    path = Path(resolve_path(base_dir, written))
    reads(path)
    try:
        return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except (OSError, DataError) as error:
        why = f"{path}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        raise ValueError(f"must be a file with one template per line, but got {why}") from error


def _read(path: Path) -> str:
    place = visible(str(path))
    if path.is_dir():
        names = sorted(other.name for other in path.glob("*.y*ml"))
        raise RecipeError(Problem(place, "must be a recipe file, but is a folder", allowed=tuple(names)))
    try:
        return read_text(path, MOST_RECIPE_BYTES, RecipeError)
    except FileNotFoundError:
        folder = path.parent
        names = [other.name for other in folder.glob("*.y*ml")] if folder.is_dir() else []
        name = nearest(path.name, names)
        rule = "no such recipe" if folder.is_dir() else "no such recipe; its folder does not exist"
        raise RecipeError(Problem(place, rule, nearest=name and str(folder / name))) from None
    except OSError as error:
        raise RecipeError(Problem(place, "must be readable", error.strerror or str(error))) from None


def _unwritable(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Yields a problem for each text that no file and no path can hold: with NUL, or half of a surrogate pair."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _unwritable(key, path)
            yield from _unwritable(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _unwritable(child, (*path, index))
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        rule = "must be text without NUL characters and without unpaired surrogates"
        yield at(path, rule, visible(shown(value)))


def resolve_path(base_dir: Path, written: str, place: str = "a path of the recipe") -> str:
    """Returns a path of a recipe as an absolute one; ``~`` is the user's home.

    Raises:
        RecipeError: No system has so long a path, or a name in one.
    """
    path = os.path.realpath(base_dir / os.path.expanduser(written))  # of unknown users as it is written
    encoded = os.fsencode(path)
    if len(encoded) > MOST_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MOST_NAME_BYTES:
        rule = f"must have at most {MOST_PATH_BYTES:,} bytes, and each name in it {MOST_NAME_BYTES}"
        raise RecipeError(Problem(place, rule, shown(written)))
    return path


def portable_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe without a path of this machine: each file and folder by its name, next to the recipe.

    What is inside another folder of the recipe stays there. Two of one name get names of folders around them until
    they differ. ``data.cache_dir`` is left out: it is the machine's.

    Args:
        recipe: The recipe, with absolute paths.
    """
    recipe = with_keys(recipe, data={"cache_dir": None})
    paths = [Path(written) for written in dict.fromkeys(_paths(recipe).values())]
    names: dict[Path, Path] = {}
    for root in paths:
        others = [path for path in paths if path != root and root not in path.parents]
        if not any(path in root.parents for path in others):
            endings = (Path(*root.parts[-length:]) for length in range(1, len(root.parts)))
            names[root] = next(
                (end for end in endings if not any(_ends(path, end) for path in others)), Path(root.name)
            )

    def portable(text: str) -> str:
        path = Path(text)
        root = next(root for root in (path, *path.parents) if root in names)
        return str(names[root] / path.relative_to(root))

    return with_paths(recipe, portable)


def _ends(path: Path, end: Path) -> bool:
    return path.parts[-len(end.parts) :] == end.parts


def named_paths(recipe: Recipe) -> tuple[dict[str, str], list[str]]:
    """Returns the paths of a recipe: lists of its sets with the key that names each, and the rest, each once.

    The lists are class names and sample ids (``exclude``); the rest is images, weights, other studies and the cache.
    """
    paths = _paths(recipe)
    lists = {written: last for key, written in paths.items() if (last := key.rpartition(".")[2]) in _LISTS}
    return lists, [written for written in dict.fromkeys(paths.values()) if written not in lists]


def paths_by_key(recipe: Recipe) -> dict[str, str]:
    """Returns all that a recipe names outside of itself, files, folders and other studies, by key path."""
    studies = enumerate(recipe.search.warm_start)
    return {**_paths(recipe), **{f"search.warm_start.{number}": place for number, place in studies}}


def _paths(recipe: Recipe) -> dict[str, str]:
    """Returns the paths of a recipe by key path."""
    found: dict[str, str] = {}
    _visited(recipe, lambda path, written: found.setdefault(dotted(path), written))
    return found


def with_paths(part: Part, change: Callable[[str], Any]) -> Part:
    """Returns a recipe, or a part of one, with another text for each of its paths (``path_in`` of their fields).

    ``change`` may give class names themselves for the path of their list.
    """
    return _visited(part, lambda path, written: change(written))


def _visited(part: Part, change: Callable[[KeyPath, str], Any], path: KeyPath = ()) -> Part:
    """Returns a recipe, or a part of one, with what ``change`` gives for the key path and the text of each path."""

    def visited(value: Any, place: KeyPath, kind: PathIn) -> Any:
        if isinstance(value, Config):
            return _visited(value, change, place)
        if isinstance(value, dict):
            return {key: visited(child, (*place, key), "") for key, child in value.items()}
        if isinstance(value, tuple) and kind == "study":
            return tuple(visited(child, (*place, index), kind) for index, child in enumerate(value))
        start = _start(value, kind) if isinstance(value, str) else None
        if start is None:
            return value
        other = change(place, value[start:])
        return f"{value[:start]}{other}" if start else other

    old = {name: getattr(part, name) for name in type(part).model_fields}
    new = {name: visited(old[name], (*path, name), path_in(field)) for name, field in type(part).model_fields.items()}
    return part.model_copy(update={name: value for name, value in new.items() if value != old[name]})


def _start(written: str, kind: PathIn) -> int | None:
    """Returns where the path begins in a text; None if the text contains none."""
    if kind == "model":
        return len(LOCAL_DIR) if written.startswith(LOCAL_DIR) else None
    is_path = {"path": True, "study": not is_address(written), "weights": is_weights_path(written)}
    return 0 if is_path.get(kind) else None


def own_functions(recipe: Recipe, baselines: bool = True) -> dict[str, str]:
    """Returns the fine-tunings of the user's own that a recipe names, ``MODULE:NAME``, by their key paths.

    Args:
        recipe: The recipe.
        baselines: Those of the search's baselines, too.
    """
    named = {"train.function": recipe.train.function}
    if baselines:
        named |= {f"search.baselines.{n}.function": v.get("function") for n, v in recipe.search.baselines.items()}
    return {path: function for path, function in named.items() if function is not None}


def trust_word(recipe: Recipe) -> str:
    """Returns what a command that trains needs for a recipe with such functions, with a space before it; else ''."""
    return " --trust" if own_functions(recipe) else ""


def dump_recipe(recipe: Recipe) -> str:
    """Returns the complete recipe as YAML, every key in the order of the schema; it loads back to an equal value."""
    return dump_yaml(recipe.model_dump(mode="json"))


def dump_given(recipe: Recipe) -> str:
    """Returns the keys of a recipe that were set, as YAML; it loads back to an equal value."""
    return dump_yaml(recipe.model_dump(mode="json", exclude_unset=True))


def recipe_hash(recipe: Recipe) -> str:
    """Returns 64 hexadecimal digits (SHA-256) that are equal for equal recipes."""
    value = _numbers_as_floats(recipe.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _numbers_as_floats(value: Any) -> Any:
    """Makes 10 and 10.0 one number; both may stand in a free place such as a baseline."""
    if isinstance(value, dict):
        return {key: _numbers_as_floats(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_numbers_as_floats(child) for child in value]
    return float(value) if type(value) is int and abs(value) < 2**53 else value
