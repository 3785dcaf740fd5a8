"""Where the numbers of a study come from: records of its log, of which the newest holds all.

seeds, code, versions, hardware, test_sets          with the first recipe
data, classes, class_names, templates, model,       after the preparation, which has read data and model;
augmentation, hardware of the preparation,          says what every training of the folder starts from
shared_images
history                                             later searches on other code, versions or hardware
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray import environment
from carft_ray.data.copies.shared_images import read_shared, shared_counts
from carft_ray.errors import DataError, Problem
from carft_ray.layout import COMMITS
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import TEST_ROLES
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import dotted, shown
from carft_ray.store.log import Log
from carft_ray.study import typed
from carft_ray.untrusted import require_plain

PROVENANCE = "provenance"  # kind of its records
CHANGING = ("code", "versions", "hardware")  # may change between two searches of one study; kept in the history
_COMPARED = (  # besides the sets: place, what it is, its keys in the provenance, next step
    ("data.classes", "the classes", ("classes",), "Restore their names and order"),
    ("model", "the weights", ("model", "weights_hash"), "Restore the weights"),
    ("train.compile", "the meaning of auto", ("preparation", "compile"), "Restore the study's folder prepared"),
    (
        "code",
        "the training views",
        ("augmentation", "view_version"),
        "Run the code of the study (its commit is recorded there)",
    ),
)


def known_at_once(recipe: Recipe) -> dict[str, Any]:
    """Returns the provenance that needs neither data nor model. Of test sets it holds the specification only."""
    tests = {dotted(path[1:]): spec for path, spec in named_sets(recipe).items() if path[1] in TEST_ROLES}
    return {
        "seeds": {"sampler": recipe.search.sampler.seed, "train": recipe.train.seed},
        "code": environment.code(),
        "versions": environment.versions(),
        "hardware": {**environment.hardware(), "threads": recipe.resources.threads_per_worker},
        "test_sets": {name: spec.model_dump(mode="json", exclude_defaults=True) for name, spec in tests.items()},
    }


def record_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a provenance."""
    return {"kind": PROVENANCE, "provenance": provenance}


def provenance_of(log: Log) -> dict[str, Any]:
    """Returns the provenance of a study, as far as its log was read; empty when there is none."""
    found = [record.get("provenance") for _, record in log.records if record.get("kind") == PROVENANCE]
    if not found:
        return {}
    place = f"{log}/{COMMITS}"
    try:
        content: dict[str, Any] = typed.checked(typed.Provenance, require_plain(found[-1]), place)
    except ValueError as error:
        raise typed.wrong(place, f"provenance: {error}", None) from error
    return content


def record_provenance(folder: Path, log: Log, recipe: Recipe, found: dict[str, Any] | None) -> None:
    """Completes the provenance of a study (or training) after its preparation.

    The first search writes; a later one adds what has changed to ``history``.

    Args:
        folder: The claimed folder.
        log: By which it is held.
        recipe: The recipe of this search.
        found: What the preparation has found of data, model and its machine; None: nothing to record.

    Raises:
        DataError: Data or model are not those of the study.
        StorageError: The log cannot be written.
    """
    if found is None:
        return
    before = provenance_of(log)
    now = known_at_once(recipe)
    now = {**now, **found, "hardware": {**now["hardware"], **found.get("hardware", {})}}
    now["shared_images"] = {"policy": recipe.data.shared_images, "counts": shared_counts(read_shared(folder))}
    if "data" in before:
        if problems := identity_problems(before, now):
            raise DataError(problems)
        latest = (before.get("history") or [before])[-1]
        if not differences({key: latest.get(key) for key in CHANGING}, {key: now[key] for key in CHANGING}):
            return
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"at": at, **{key: now[key] for key in CHANGING}}
        now = {**before, "history": [*before.get("history", []), entry]}
    log.write(record_of(now))


def identity_problems(before: dict[str, Any], now: dict[str, Any]) -> list[Problem]:
    """Returns a problem for every set, for the model, and for the views, that are not what the provenance says.

    Args:
        before: A complete provenance.
        now: What was found now; a set that it does not name is not compared.
    """
    problems = []
    for name, kept in before["data"].items():
        found = now.get("data", {}).get(name)
        if found is None or found == kept:
            continue
        place = f"data.{name}" if name in ("train", "id_val") else f"data.ood_val.{name}"
        rule = f"the contents of this set must be those of the study, digest {kept['digest'][:12]}"
        value = f"digest {found['digest'][:12]} now"
        if found["num_images"] != kept["num_images"]:
            value += f", {found['num_images']} images instead of {kept['num_images']}"
        step = "Restore the images, or start again in another folder: results on two data sets cannot be mixed."
        problems.append(Problem(place, rule, value, next_step=step))
    for place, what, keys, step in _COMPARED:
        kept, found = (_at(each, keys) for each in (before, now))
        if None not in (kept, found) and kept != found:
            rule = f"{what} must be as in the study, {shown(kept)}"
            problems.append(Problem(place, rule, shown(found), next_step=f"{step}, or start again in another folder."))
    return problems


def _at(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dictionaries by dotted key; lists are leaves."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, child in value.items():
        found |= leaves(child, f"{prefix}.{key}" if prefix else key)
    return found


def differences(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Returns ``(dotted key, before, now)`` for every leaf that differs; None where one side has none."""
    old, new = leaves(json.loads(json.dumps(before))), leaves(json.loads(json.dumps(now)))
    return [(key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)]
