"""A study's folder: one search at a time, a journal that opens, and the recipe that it belongs to.

study_dir/{lock, lease.json, manifest.json, study.journal, resolved.yaml, trials/, baselines/, prepared/, stop, _tune/}
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from carft_ray import files
from carft_ray.errors import DataError, Problem, RecipeError, StorageError, UsageError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema import Recipe
from carft_ray.search import provenance
from carft_ray.search.lease import LEASE, Lease, in_use, lease

FORMAT_VERSION = 1
JOURNAL = "study.journal"
MANIFEST = provenance.MANIFEST
LOCK = "lock"
RESOLVED = "resolved.yaml"
PREPARED = "prepared"
STOP = "stop"  # asks running trainings to write a checkpoint and end
# what may change between two searches of one study; everything else is what the study is about
RUNNING_KEYS = (
    "search.trials",
    "search.concurrency",
    "search.keep_checkpoints",
    "resources",
    "budget",
    "storage",
    "data.cache_dir",
)
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks; there the lease must do


@contextlib.contextmanager
def study_lock(study_dir: Path) -> Iterator[Lease]:
    """Holds the study for this process: a lock, which goes when the process does, and a lease for other machines.

    Raises:
        StorageError: Another process holds it, or the folder cannot be written.
    """
    path = study_dir / LOCK
    with files.writing(path):
        study_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            files.patiently(lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip()
            raise StorageError(in_use(study_dir, holder)) from None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise files.storage_error(path, error) from error
        with lease(study_dir) as held:
            with files.writing(path):
                started = datetime.now().astimezone().isoformat(timespec="seconds")
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode(), 0)
            yield held
    finally:
        os.close(handle)


def is_ours(name: str) -> bool:
    """Tells whether a file is one that locking or claiming a folder leaves in it before it belongs to a recipe."""
    return name in (LOCK, LEASE) or name.startswith((f".{MANIFEST}.", f".{LEASE}."))


@contextlib.contextmanager
def gone_if_nothing_began(folder: Path, began: Callable[[], bool]) -> Iterator[None]:
    """Removes a folder when model or data turn out unfit, so that the mended recipe may use the same name.

    Args:
        folder: A claimed folder whose lock is held.
        began: Tells whether a training has begun in it; then it stays.
    """
    try:
        yield
    except (RecipeError, DataError):
        if (folder / MANIFEST).exists() and not began():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def repair_journal(study_dir: Path) -> list[str]:
    """Makes a journal that a crash has left behind fit to be opened and appended to. The lock must be held.

    Removes Optuna's own lock file of a dead process, which would cost 30 s or spin for ever, and moves an incomplete
    last line to ``study.journal.torn``: it could be read, but the first append after it would spoil the study.

    Returns:
        What was done, one sentence each.

    Raises:
        StorageError: The folder cannot be written.
    """
    journal, notes = study_dir / JOURNAL, []
    with files.writing(journal):
        for stale in (journal.with_name(JOURNAL + ".lock"), *study_dir.glob(JOURNAL + ".lock*.rename")):
            if stale.is_symlink() or stale.exists():
                stale.unlink()
                notes.append(f"removed {stale.name}, the lock of a process that is gone")
        content = journal.read_bytes() if journal.exists() else b""
    kept = content[: _whole(content)]
    if len(kept) < len(content):
        torn = journal.with_name(JOURNAL + ".torn")
        before = torn.read_bytes() if torn.exists() else b""
        files.write_bytes(torn, before + content[len(kept) :] + b"\n")
        files.write_bytes(journal, kept)
        notes.append(f"moved an incomplete last line ({len(content) - len(kept)} bytes) to {torn.name}")
    return notes


def _whole(content: bytes) -> int:
    """Returns the length of a journal without its last line when that line is torn."""
    end = content.rfind(b"\n") + 1
    if end == len(content) and end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            json.loads(content[start:end])
        except ValueError:
            return start
    return end


def claim(study_dir: Path, recipe: Recipe, base_dir: Path) -> None:
    """Makes the folder the study of this recipe, or checks that it is. The lock must be held.

    Args:
        study_dir: An empty folder, or a study.
        recipe: The recipe of the search.
        base_dir: Folder from which the recipe's relative paths count.

    Raises:
        RecipeError: It is the study of another recipe; names the keys that differ.
        UsageError: The folder holds something else.
        StorageError: The manifest cannot be read or written.
    """
    path = study_dir / MANIFEST
    wanted = absolute_paths(recipe, base_dir).model_dump(mode="json")
    if not path.exists():
        foreign = sorted(entry.name for entry in study_dir.iterdir() if not is_ours(entry.name))
        if foreign:
            step = "Give the folder of a study, or one that does not exist yet."
            raise UsageError(
                Problem(str(study_dir), "must be a study or empty", ", ".join(foreign[:5]), next_step=step)
            )
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        content = {"format_version": FORMAT_VERSION, "created": created, "recipe": wanted}
        files.write_json(path, {**content, provenance.PROVENANCE: provenance.known_at_once(recipe)})
        return
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        kept = Recipe.model_validate(manifest["recipe"]).model_dump(mode="json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(Problem(str(path), "must be the manifest of a study", str(error))) from error
    if version != FORMAT_VERSION:
        raise StorageError(Problem(str(path), f"must have format_version {FORMAT_VERSION}", str(version)))
    old, new = provenance.leaves(kept), provenance.leaves(wanted)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    step = f"Go on with {study_dir / 'resolved.yaml'}, or give another folder."
    differing = [
        Problem(key, f"must be {json.dumps(old.get(key))} as in {study_dir}", json.dumps(new.get(key)))
        for key in keys
        if not any(key == free or key.startswith(free + ".") for free in RUNNING_KEYS)
    ]
    if differing:
        last = differing.pop()
        raise RecipeError([*differing, Problem(last.place, last.rule, last.value, next_step=step)])
