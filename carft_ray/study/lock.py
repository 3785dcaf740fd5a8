"""A study's folder: one search at a time, a journal that opens, and the recipe that it belongs to.

study_dir/{lock, lease.json, manifest.json, study.journal, token, resolved.yaml, trials/, baselines/, prepared/, stop,
_tune/}
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from carft_ray import files, untrusted
from carft_ray.errors import ClusterError, DataError, HoldOutError, Problem, RecipeError, StorageError, UsageError
from carft_ray.layout import JOURNAL, LEASE, LOCK, MANIFEST, PREPARED
from carft_ray.study.lease import Lease, in_use, lease
from carft_ray.study.lease import holder as live_holder
from carft_ray.words import counted

FORMAT_VERSION = 1
LOCK_ATTEMPTS = 50
BUDGET_STOP = "budget: "  # how its text begins when the search asks itself; what follows is the limit


@contextlib.contextmanager
def study_lock(study_dir: Path) -> Iterator[Lease]:
    """Holds the study for this process: a lock, which goes when the process does, and a lease for other machines.

    Raises:
        StorageError: Another process holds it, the folder cannot be written (a new one is gone then), or a link leads
            out of it.
        UsageError: The folder holds something and is no study.
    """
    path = study_dir / LOCK
    is_new = not files.exists(study_dir)
    check_free_or_claimed(study_dir)
    require_nothing_outside(study_dir)
    with files.writing(path):
        study_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _take(handle, study_dir)
        except BlockingIOError:
            raise StorageError(in_use(study_dir, live_holder(study_dir) or "another process")) from None
        except OSError as error:
            if error.errno not in files.NO_FLOCK:  # else the lease must do
                raise files.storage_error(path, error) from error
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(lease(study_dir))
            except StorageError:
                if is_new:
                    shutil.rmtree(study_dir, ignore_errors=True)
                raise
            yield held
    finally:
        os.close(handle)


def require_nothing_outside(study_dir: Path) -> None:
    """Raises a ``StorageError`` when a link leads out of a study, or one of its files is a pipe, device or socket."""
    with files.writing(study_dir):  # Optuna's lock is a link, to the journal of where the study lay then
        untrusted.require_nothing_outside(study_dir, StorageError, passed_over=f"{JOURNAL}.lock")


def _take(handle: int, study_dir: Path) -> None:
    """Takes the lock; waits a moment for that of a killed process, whose threads end a little after it."""
    for _ in range(LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if live_holder(study_dir) is not None:
            break
        time.sleep(0.02)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_ours(name: str) -> bool:
    """Tells whether a file is one that locking or claiming a folder leaves in it before it belongs to a recipe."""
    return name in (LOCK, LEASE) or name.startswith((f".{MANIFEST}.", f".{LEASE}."))


def check_free_or_claimed(folder: Path) -> None:
    """Raises a ``UsageError`` when a folder is a file, or holds something and is no study; before a lock is left."""
    step = "Give the folder of a study, or one that does not exist yet."
    if files.exists(folder) and not folder.is_dir():
        raise UsageError(Problem(str(folder), "must be a folder", "a file", next_step=step))
    with files.writing(folder):
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if not is_ours(name)]
    if foreign and MANIFEST not in names:
        raise UsageError(Problem(str(folder), "must be a study or empty", ", ".join(foreign[:5]), next_step=step))


@contextlib.contextmanager
def gone_if_nothing_began(folder: Path, is_new: bool, began: Callable[[], bool]) -> Iterator[None]:
    """Removes a folder that this call has made when model or data turn out unfit: the mended recipe may use its name.

    So when Ray does not start. When Ray ends during the preparation, what is prepared stays for the same command.

    Args:
        folder: A claimed folder whose lock is held.
        is_new: Whether this call has claimed it; another one stays.
        began: Tells whether a training has begun in it; then it stays.
    """
    try:
        yield
    except (RecipeError, DataError, HoldOutError, ClusterError) as error:
        stays = isinstance(error, ClusterError) and files.exists(folder / PREPARED)
        if is_new and not stays and not began():
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
        content = journal.read_bytes() if files.exists(journal) else b""
    kept = content[: _whole(content)]
    if len(kept) < len(content):
        torn = journal.with_name(JOURNAL + ".torn")
        before = torn.read_bytes() if files.exists(torn) else b""
        files.write_bytes(torn, before + content[len(kept) :] + b"\n")
        files.write_bytes(journal, kept)
        notes.append(f"moved an incomplete last line ({counted(len(content) - len(kept), 'byte')}) to {torn.name}")
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
