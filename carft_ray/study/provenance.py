"""Where the numbers of a study come from: records of its log, of which the newest holds all.

seeds, code, versions, hardware, test_sets          with the first recipe
data, classes, class_names, templates, model,       after the preparation, which has read data and model;
augmentation, hardware of the preparation,          says what every training of the folder starts from
shared_images
history                                             later searches on other code, versions or hardware
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray import environment
from carft_ray.data.duplicates.shared_images import read_shared, shared_counts
from carft_ray.layout import COMMITS
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import TEST_ROLES
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import dotted
from carft_ray.store.log import Log
from carft_ray.study import typed
from carft_ray.study.records import PROVENANCE, last_of
from carft_ray.untrusted import require_plain

CHANGING = ("code", "versions", "hardware")  # may change between two searches of one study; kept in the history


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
    found = last_of(log, PROVENANCE)
    if found is None:
        return {}
    place = f"{log}/{COMMITS}"
    try:
        content: dict[str, Any] = typed.checked(typed.Provenance, require_plain(found["provenance"]), place)
    except ValueError as error:
        raise typed.wrong(place, f"provenance: {error}", None) from error
    return content


def made_of(log: Log) -> dict[str, Any]:
    """Returns what a study was made of (``data.same_as_study``): its provenance; empty before its first preparation."""
    known = provenance_of(log)
    return known if "data" in known else {}


def record_provenance(folder: Path, log: Log, recipe: Recipe, found: dict[str, Any] | None) -> None:
    """Completes the provenance of a study (or training) after its preparation.

    The first search writes; a later one adds what has changed to ``history``.

    Args:
        folder: The claimed folder.
        log: By which it is held.
        recipe: The recipe of this search.
        found: What the preparation has found of data and model, compared with what the study was made of, and of its
            machine; None: nothing to record.

    Raises:
        StorageError: The log cannot be written.
    """
    if found is None:
        return
    before = provenance_of(log)
    now = known_at_once(recipe)
    now = {**now, **found, "hardware": {**now["hardware"], **found.get("hardware", {})}}
    now["shared_images"] = {"policy": recipe.data.shared_images, "counts": shared_counts(read_shared(folder))}
    if "data" in before:
        latest = (before.get("history") or [before])[-1]
        if not differences({key: latest.get(key) for key in CHANGING}, {key: now[key] for key in CHANGING}):
            return
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        entry = {"at": at, **{key: now[key] for key in CHANGING}}
        now = {**before, "history": [*before.get("history", []), entry]}
    log.write(record_of(now))


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
