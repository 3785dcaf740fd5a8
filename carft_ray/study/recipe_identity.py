"""What a study is about, and what may change when it is resumed.

The field of every key of a recipe says its class (``recipe.schema.fields.key``). A space that changes with
``--change-space`` moves the trials to it (``study.space_revisions``).

The recipe is a record of the log. The process that has claimed an empty log writes ``manifest.json``, then commits the
recipe: from that commit on, the folder is the study of this recipe. Each search with another recipe commits its own,
and the newest one holds. A log without a recipe is continued only if it holds nothing but claims. ``resolved.yaml``
shows the recipe to people.

``manifest.json`` holds ``format_version``, ``id`` (a copy has the same), ``created``, in a copy ``copied_from``
(``study.place``), and ``ledger`` (``study.ledger``).
"""

import contextlib
import json
import os
import secrets
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.formats.folder import read_class_names
from carft_ray.errors import DataError, Problem, RecipeError, StorageError
from carft_ray.layout import COMMITS, MANIFEST, RESOLVED
from carft_ray.recipe import loading
from carft_ray.recipe.loading import recipe_of, trust_word
from carft_ray.recipe.schema.data import CorruptedSet, StoredSet, plain
from carft_ray.recipe.schema.fields import Class, field_of, resume_of
from carft_ray.recipe.schema.model import is_weights_path
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import KeyPath, child_type, dotted, shown
from carft_ray.store.folder import Folder, RefusedError
from carft_ray.store.log import Log, log_of
from carft_ray.study import provenance, trust, typed
from carft_ray.study.holding import unbegun
from carft_ray.study.place import named
from carft_ray.study.records import RECIPE, last_of

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Difference:
    """A key whose value differs between two recipes; ``MISSING`` where one has no such key."""

    path: KeyPath
    old: Any
    new: Any


MISSING = object()  # stands for a key that is not there


def class_of(path: KeyPath) -> Class:
    """Returns the class of a key path of a recipe, or of one below it: that of the last key that says one."""
    kind: Any = Recipe
    found: Class = "identity"
    for piece in path:
        field = field_of(kind, piece)
        resume = None if field is None else resume_of(field)
        found = found if resume is None else resume.kind
        kind = child_type(kind, piece)
    return found


def claim(study_dir: Path, log: Log, recipe: Recipe) -> None:
    """Makes a folder that is no study yet the study of a recipe.

    Args:
        study_dir: The folder.
        log: By which it is held.
        recipe: The recipe.

    Raises:
        StorageError: The manifest or the log cannot be written.
    """
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    content = {"format_version": FORMAT_VERSION, "id": secrets.token_hex(6), "created": created}
    with contextlib.suppress(RefusedError):  # of a search that was killed before it had committed its recipe
        Folder(study_dir).put_new(MANIFEST, json.dumps(content, indent=2).encode())
    trust.note_written(study_dir, recipe)  # a kill from here on leaves a study that this machine has written
    log.store.keep_files()
    log.write(recipe_record(recipe), provenance.record_of(provenance.known_at_once(recipe)))


def compare(
    study_dir: Path, log: Log, recipe: Recipe, change_space: bool = False
) -> tuple[Recipe | None, list[Difference]]:
    """Returns the recipe of a study, and where another one differs from it, all of it allowed.

    Args:
        study_dir: A folder that ``holding.check_fit`` has passed.
        log: Its log, read to its end.
        recipe: The recipe of the search.
        change_space: The space may change.

    Returns:
        The recipe, None of a folder that is no study yet, and the differences.

    Raises:
        RecipeError: It is the study of another recipe; names the keys that differ.
        StorageError: The log has no recipe and holds more than claims, or the manifest cannot be read.
    """
    kept = recorded_recipe(study_dir, log)
    if kept is None:
        return None, []
    found = list(_differences(kept.model_dump(mode="json"), recipe.model_dump(mode="json")))
    reads = trust.address_of(study_dir) is None or trust.is_written(study_dir, kept)
    refused = [one for one in found if not _is_free(one, reads) and class_of(one.path) == "identity"]
    refused += list(_moved_apart(kept, recipe))
    space = [one for one in found if class_of(one.path) == "space"]
    unasked = [] if change_space else space
    if refused or unasked:
        problems = [_problem(one, study_dir) for one in (*refused, *unasked)]
        step = f"Continue with {study_dir / RESOLVED}, or give another folder."
        if not refused:
            command = f"carft-ray search RECIPE --study {shlex.quote(named(study_dir))} --change-space"
            change = f"To change the search space, give --change-space in this command or use: {command}."
            step = f"{change}\n    Trials inside the new space still count for the sampler. Or: {step}"
        raise RecipeError([*problems[:-1], replace(problems[-1], next_step=step)])
    return kept, found


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """Returns the record that makes a recipe that of the study."""
    return {"kind": RECIPE, "recipe": recipe.model_dump(mode="json")}


def recorded_recipe(study_dir: Path, log: Log) -> Recipe | None:
    """Returns the recipe of a study; None where its log holds nothing but claims.

    Raises:
        StorageError: The log holds more than claims and no recipe, or one that carft-ray has not written; the manifest
            is missing or of another format.
    """
    place, step = f"{log}/{COMMITS}", f"Restore {COMMITS}/ from a copy of the study, or give another folder."
    found = last_of(log, RECIPE)
    if found or files.exists(study_dir / MANIFEST):
        read_manifest(study_dir)
    if not found:
        if log.holds_only_claims:
            return None
        rule = "must contain the recipe of its study: carft-ray does not continue trials of an unknown recipe"
        raise StorageError(Problem(place, rule, "a log without one", next_step=step))
    try:
        return recipe_of(found["recipe"], reads=None)
    except RecipeError as error:
        rule = "must contain a valid recipe"
        raise StorageError(Problem(place, rule, str(error), next_step=step)) from error


def read_manifest(study_dir: Path) -> dict[str, Any]:
    """Returns the manifest of a study.

    Raises:
        StorageError: It cannot be read, or is of another format.
    """
    content, place = files.read_json(study_dir, MANIFEST), str(study_dir / MANIFEST)
    require_format(content, place)  # other formats have other fields
    manifest: dict[str, Any] = typed.checked(typed.Manifest, content, place)
    return manifest


def require_format(manifest: Any, place: str) -> None:
    """Raises a ``StorageError`` if the manifest of a study, at a place, is one of another format than today's."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        step = "Another release of carft-ray wrote this study. Read it with that release, or search in another folder."
        rule = f"must have format_version {FORMAT_VERSION}"
        raise StorageError(Problem(place, rule, shown(version), next_step=step))


def study_recipe(study_dir: Path, log: Log) -> Recipe:
    """Returns the recipe of a study's last search, to be shown; ``recipe_for_use`` is for what reads its files.

    Args:
        study_dir: The study directory.
        log: Its log.

    Raises:
        StorageError: The log has none, or one that carft-ray has not written; or it cannot be read.
    """
    recipe = recorded_recipe(study_dir, log)
    if recipe is None:
        value, step = unbegun(log, named(study_dir))
        raise StorageError(Problem(f"{log}/{COMMITS}", "must contain the recipe of its study", value, next_step=step))
    return recipe


def recipe_for_use(
    study_dir: Path, kept: Recipe, command: str, overrides: Sequence[str] = (), trust_paths: bool = False
) -> Recipe:
    """Returns the recipe of a study's last search, for a command that reads the files that it names (``study.trust``).

    Args:
        study_dir: The study directory, or the copy of a study in a bucket.
        kept: The recipe, as ``study_recipe`` returns it.
        command: What the user would run, for the message.
        overrides: As of ``load_recipe``.
        trust_paths: The user trusts the paths of the study.

    Raises:
        UsageError: It names files outside of a study in a bucket that this machine has not written.
        RecipeError: The overrides break a rule.
    """
    asked = recipe_of(kept.model_dump(mode="json"), overrides) if overrides else kept
    return trust.allowed(study_dir, kept, asked, loading.keys_of(overrides), trust_paths, command)


def resume_command(study_dir: Path) -> str:
    """Returns the command that continues a study: its search, or its one training.

    Raises:
        StorageError: As ``study_recipe``.
    """
    folder, recipe = shlex.quote(named(study_dir)), study_recipe(study_dir, log_of(study_dir))
    if not recipe.search.space:
        here = shlex.quote(str(study_dir))  # a recipe is a file, where the study is in a bucket, too
        return f"carft-ray train {here}/{RESOLVED} --out {folder} --resume{trust_word(recipe)}"
    return f"carft-ray resume {folder}{trust_word(recipe)}"


def _differences(old: Any, new: Any, path: KeyPath = ()) -> Iterator[Difference]:
    """Yields every key that differs between two recipes as JSON holds them, of nested mappings too."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            yield Difference(path, old, new)
        return
    for key in {**old, **new}:
        yield from _differences(old.get(key, MISSING), new.get(key, MISSING), (*path, key))


def _is_free(found: Difference, reads: bool) -> bool:
    """Tells whether a difference of identity is one in words only: a file that has moved, a baseline that is added.

    Args:
        found: The difference.
        reads: Whether files that the study names may be read.
    """
    if found.path[:2] == ("search", "baselines"):
        return len(found.path) == 3 and found.old is MISSING
    if found.path == ("train", "compile") and found.new == "auto":
        return True  # what it means is decided once, and kept with the preparation
    if found.path == ("model", "pretrained"):
        return all(isinstance(value, str) and is_weights_path(value) for value in (found.old, found.new))
    if found.path[-1] in ("class_names", "exclude") and found.path[0] == "data":
        written = (found.old, found.new)
        are_files = all(isinstance(value, str) for value in written)
        may_read = reads or not isinstance(found.old, str)
        return are_files or (found.path[-1] == "class_names" and may_read and _alike(*written))
    if found.path == ("model", "name"):
        return all(str(value).startswith("local-dir:") for value in (found.old, found.new))
    return False


def _alike(*written: Any) -> bool:
    """Tells whether class names are the same, whether in the recipe or in a file: `submit` sends what it has read."""
    if not all(isinstance(one, str | list) for one in written):
        return False
    with contextlib.suppress(DataError):
        return len({read_class_names(one if isinstance(one, str) else tuple(one), "") for one in written}) == 1
    return False


def _moved_apart(old: Recipe, new: Recipe) -> Iterator[Difference]:
    """Yields the paths of test sets that have not moved as ``data.train`` has: their contents are never read."""
    train = [plain(recipe.data.train) for recipe in (old, new)]
    sets: dict[KeyPath, Any] = {("data", "id_test"): (old.data.id_test, new.data.id_test)}
    names = old.data.ood_test.keys() & new.data.ood_test.keys()
    sets |= {("data", "ood_test", name): (old.data.ood_test[name], new.data.ood_test[name]) for name in sorted(names)}
    for path, pair in sets.items():
        before, now = (plain(spec) for spec in pair)
        if not (isinstance(before, StoredSet) and isinstance(now, StoredSet)):
            continue
        inner = ("of",) if isinstance(pair[0], CorruptedSet) else ()
        for key in before.path_keys:
            places = [getattr(spec, key, None) for spec in (before, now)]
            if places[0] == places[1] or any(isinstance(place, tuple) for place in places):
                continue
            together = [
                os.path.relpath(place, root.path) if place and isinstance(root, StoredSet) else place
                for place, root in zip(places, train, strict=True)
            ]
            if together[0] != together[1]:
                yield Difference((*path, *inner, key), *places)


def _problem(found: Difference, study_dir: Path) -> Problem:
    there = "left out" if found.old is MISSING else shown(found.old)
    value = "none" if found.new is MISSING else shown(found.new)
    return Problem(dotted(found.path), f"must be {there} as in {study_dir}", value)
