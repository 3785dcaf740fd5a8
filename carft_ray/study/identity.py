"""What a study is about, and what may change when it is resumed.

The field of every key of a recipe says its class (``recipe.schema.fields.key``). A space that changes with
``--change-space`` moves the trials to it (``study.space_revisions``).

``manifest.json`` holds an ``id``, which a copy has, too; the recipe of the last search in ``recipe``, with all that is
running; in ``recipes``, oldest first, those before another space, further baselines or moved files. It is written in
one piece: what it says is what holds. ``resolved.yaml`` shows the recipe to people.
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
from carft_ray.data.formats.labels import read_class_names
from carft_ray.errors import DataError, Problem, RecipeError, StorageError
from carft_ray.layout import MANIFEST, RESOLVED
from carft_ray.recipe import loading
from carft_ray.recipe.loading import recipe_of
from carft_ray.recipe.messages import child_type, shown
from carft_ray.recipe.schema.fields import Class, field_of, resume_of
from carft_ray.recipe.schema.fine_tuning import is_weights_path
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sets import CorruptedSet, StoredSet, plain
from carft_ray.recipe.text import KeyPath, dotted
from carft_ray.study import provenance, trust
from carft_ray.study.mirror import named

FORMAT_VERSION = 1
RECIPES = "recipes"  # key of the manifest


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


def claim(study_dir: Path, recipe: Recipe, change_space: bool = False) -> list[Difference] | None:
    """Makes the folder the study of this recipe, or checks that it is. It must be held.

    Of a study nothing is written: ``record_recipe`` does that.

    Args:
        study_dir: As of ``compare``, and so are the others.
        recipe: The recipe.
        change_space: Whether the space may change.

    Raises:
        RecipeError, StorageError: As ``compare``; or the manifest cannot be written.
    """
    found = compare(study_dir, recipe, change_space)
    if found is None:
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"format_version": FORMAT_VERSION, "id": secrets.token_hex(6), "created": created}
        content |= {"recipe": recipe.model_dump(mode="json")}
        files.write_json(study_dir / MANIFEST, {**content, provenance.PROVENANCE: provenance.known_at_once(recipe)})
    return found


def compare(study_dir: Path, recipe: Recipe, change_space: bool = False) -> list[Difference] | None:
    """Returns where a recipe differs from that of the study, all of it allowed; None of a folder that is no study yet.

    Args:
        study_dir: A folder that ``holding.check_fit`` has passed.
        recipe: The recipe of the search.
        change_space: The space may change.

    Raises:
        RecipeError: It is the study of another recipe; names the keys that differ.
        StorageError: The manifest cannot be read.
    """
    if not files.exists(study_dir / MANIFEST):
        return None
    manifest = read_manifest(study_dir)
    kept = Recipe.model_validate(manifest["recipe"])
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
            command = f"carft-ray search RECIPE --study {named(study_dir)} --change-space"
            change = f"To change the search space, give --change-space, here or with: {command}."
            step = f"{change}\n    Trials that lie inside still count for the sampler. Or: {step}"
        raise RecipeError([*problems[:-1], replace(problems[-1], next_step=step)])
    return found


def record_recipe(study_dir: Path, recipe: Recipe, found: Sequence[Difference]) -> None:
    """Makes the recipe of a search that of the study, which must be held.

    Args:
        study_dir: The study directory.
        recipe: The recipe of the search.
        found: Where it differs. With another space, further baselines or moved files, the one before is kept, too.

    Raises:
        StorageError: The manifest cannot be written.
    """
    manifest = files.read_json(study_dir / MANIFEST)
    if any(class_of(one.path) != "running" or one.path[-1] in ("path", "root") for one in found):
        until = datetime.now().astimezone().isoformat(timespec="seconds")
        manifest[RECIPES] = [*manifest.get(RECIPES, []), {"until": until, "recipe": manifest["recipe"]}]
    files.write_json(study_dir / MANIFEST, {**manifest, "recipe": recipe.model_dump(mode="json")})


def read_manifest(study_dir: Path) -> dict[str, Any]:
    """Returns the manifest of a claimed folder, whose ``recipe`` is valid.

    Raises:
        StorageError: It cannot be read, or is of another format.
    """
    path = study_dir / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(files.retried(path, path.read_text))
        version, _ = manifest["format_version"], manifest["id"]
        Recipe.model_validate(manifest["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(Problem(str(path), "must be the manifest of a study", str(error))) from error
    if version != FORMAT_VERSION:
        raise StorageError(Problem(str(path), f"must have format_version {FORMAT_VERSION}", str(version)))
    return manifest


def study_recipe(study_dir: Path) -> Recipe:
    """Returns the recipe of a study's last search, to be shown; ``recipe_for_use`` is for what reads its files.

    Raises:
        RecipeError: It breaks a rule: carft-ray has not written it.
        StorageError: The manifest cannot be read.
    """
    return recipe_of(read_manifest(study_dir)["recipe"], reads=None)


def recipe_for_use(study_dir: Path, command: str, overrides: Sequence[str] = (), trust_paths: bool = False) -> Recipe:
    """Returns the recipe of a study's last search, for a command that reads the files that it names (``study.trust``).

    Args:
        study_dir: The study directory, or the copy of a study in a bucket.
        command: What the user would run, for the message.
        overrides: As of ``load_recipe``.
        trust_paths: The user trusts the paths of the study.

    Raises:
        UsageError: It names files outside of a study in a bucket that this machine has not written.
        RecipeError, StorageError: As ``study_recipe``; or the overrides break a rule.
    """
    kept = study_recipe(study_dir)
    asked = recipe_of(kept.model_dump(mode="json"), overrides) if overrides else kept
    return trust.allowed(study_dir, kept, asked, loading.keys_of(overrides), trust_paths, command)


def is_single(study_dir: Path) -> bool:
    """Tells whether a study is that of `train`: one training, and nothing to search.

    Raises:
        StorageError: The manifest cannot be read.
    """
    return not read_manifest(study_dir)["recipe"]["search"]["space"]


def resume_command(study_dir: Path) -> str:
    """Returns the command that continues a study: its search, or its one training.

    Raises:
        StorageError: The manifest cannot be read.
    """
    folder = shlex.quote(named(study_dir))
    if is_single(study_dir):
        here = shlex.quote(str(study_dir))  # a recipe is a file, where the study is in a bucket, too
        return f"carft-ray train {here}/{RESOLVED} --out {folder} --resume"
    return f"carft-ray resume {folder}"


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
