"""The cache of images and heads: entries that one process builds and all processes of the machine share.

An entry is a folder ``<key>/`` with ``set.arrow``, an Arrow file that is mapped into memory, and ``entry.json``, which
says for people what it holds. The key is a hash of what the content depends on; an entry is never changed, only built,
replaced when it is damaged, and removed. Whoever has one open holds a shared lock on ``set.arrow`` for as long as its
arrays live, however the process ends: an entry in use is not removed. When it was last opened is the date of
``entry.json``.

Where a disk has no locks (``files.NO_FLOCK``), each process builds under a name of its own, and the first rename
decides: what two have built is the same. Which entries are in use is not known there, so none is removed automatically.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carft_ray.errors import Problem, StorageError
from carft_ray.files import NO_FLOCK, discard_folder, new_folder, read_json, write_json, writing

FILE = "set.arrow"
ABOUT = "entry.json"
GB = 10**9  # bytes
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.5  # between two attempts to take a lock

_KEY = re.compile(r"[0-9a-f]{32}")
_REMAINS = re.compile(r"\.([0-9a-f]{32})\.[0-9].*\.tmp")
_NOTES = (
    "records-*.arrow",
    "records-*.part",
    "overlap-*.json",
    "index/**/*.arrow",
    "targets/*/visit-*",
)  # of ``data.records`` and others

_log = logging.getLogger(__name__)
_warned: set[int] = set()  # disks without locks that a warning has named
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of an entry without opening it.

    Attributes:
        key: Name of its folder.
        kind: ``decoded``, ``packed`` or ``heads``; ``unknown``, where ``entry.json`` is missing or damaged.
        name: Name of the set for which it was built; the same images may serve others. Of heads, the model.
        source: Kind of the source; of heads, how many sentences.
        num_images: Images; 0 where that is unknown.
        image_size: ``width x height`` in pixels; empty where images differ.
        transform: What was applied to every image.
        created: When it was built, seconds since 1970; 0 where that is unknown.
        last_used: When it was last opened, seconds since 1970.
        num_bytes: Size on disk.
        in_use: Whether a process has it open, or it belongs to another user; None where that is not known, on a
            disk without locks.
    """

    key: str
    kind: str = "unknown"
    name: str = ""
    source: str = ""
    num_images: int = 0
    image_size: str = ""
    transform: str = ""
    created: float = 0.0
    last_used: float
    num_bytes: int
    in_use: bool | None


def key_of(parts: list[Any]) -> str:
    """Returns the name, 32 hex digits, of what is kept in the cache and depends on these values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def entry(
    cache_dir: Path,
    key: str,
    read: Callable[[Any], T],
    build: Callable[[Path], dict[str, Any]],
    limit_gb: float | None = None,
    on_wait: Callable[[], None] | None = None,
) -> T:
    """Opens an entry, building it first where it is missing or damaged.

    Several processes may ask at once: one builds, the others wait for it. A build that dies leaves nothing under the
    entry's name.

    Args:
        cache_dir: Folder of all entries; made when missing.
        key: Name of the entry, 32 hex digits.
        read: Gets the ``RecordBatchFileReader`` of the file, whose buffers are views of it. Raises ``ValueError`` for
            a file that is not what it should be.
        build: Writes and flushes the file, and returns what ``entry.json`` says.
        limit_gb: Largest size of the cache in 10^9 bytes. With a new entry, those that were not used for longest go
            until all fit, but none in use; None: no limit. A disk without locks has none.
        on_wait: Called about twice a second while another process builds the entry; may raise to wait no longer.

    Returns:
        What ``read`` returns.

    Raises:
        StorageError: The entry cannot be written.
    """
    folder = cache_dir / key
    if (found := _open(folder, read)) is not None:
        return found
    with lock(cache_dir / f"{key}.lock", on_wait) as alone:
        if (found := _open(folder, read)) is not None:
            return found
        _remove_remains(folder, alone)
        try:
            with new_folder(folder) as temporary:
                about = build(temporary / FILE)
                write_json(temporary / ABOUT, {"format_version": 1, **about, "created": time.time()})
                found = _open(temporary, read)  # before others see it: nobody can remove what is open
                if found is None:
                    rule = "an entry of the cache must be readable once it is written"
                    raise StorageError(Problem(str(folder), rule))
                if limit_gb is not None and alone:
                    _make_room(cache_dir, limit_gb, (temporary / FILE).stat().st_size)
        except StorageError:
            if alone or (found := _open(folder, read)) is None:
                raise  # else another process was quicker
    return found


def _open(folder: Path, read: Callable[[Any], T]) -> T | None:
    """Opens an entry; None when it is missing or, after a warning, when it is damaged."""
    path = folder / FILE
    with writing(path):
        try:
            handle = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            _flock(handle, fcntl.LOCK_SH, path)
            if not os.fstat(handle).st_nlink:
                return None  # it was removed while this process waited
            content = mmap.mmap(handle, 0, access=mmap.ACCESS_READ) if os.fstat(handle).st_size else b""
        finally:
            os.close(handle)  # the map keeps the file open, and with it the lock
    try:
        found = read(pa.ipc.open_file(pa.py_buffer(content)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("The entry %s of the cache is damaged and will be built again: %s", path, error)
        return None
    with contextlib.suppress(OSError):  # of another user, or on a disk that is only read
        os.utime(folder / ABOUT)
    return found


@contextlib.contextmanager
def lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Holds an exclusive flock; it ends with the process, however that ends. The empty lock file stays.

    Gives False on a disk without locks: others may do the same at once, and must not lose what they are writing.

    Args:
        path: The lock file; made when it is missing.
        on_wait: Called about twice a second while another process holds it; may raise to wait no longer.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        pause_s = FIRST_PAUSE_S
        while True:
            with writing(path), contextlib.suppress(BlockingIOError):
                alone = _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
                break
            if on_wait is not None:
                on_wait()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        yield alone
    finally:
        os.close(handle)


def made_once(path: Path, lock_path: Path, read: Callable[[Path], T | None], make: Callable[[], T]) -> T:
    """Returns what a file of the cache has, or makes it: by one of the processes that ask for it, the others wait.

    Args:
        path: The file.
        lock_path: Its lock file; made when it is missing.
        read: Reads the file; None: it is missing or damaged.
        make: Writes the file, and returns what it has.

    Raises:
        StorageError: The lock file cannot be written.
    """
    if (found := read(path)) is not None:
        return found
    with lock(lock_path) as alone:
        for left in path.parent.glob(f".{path.stem}.*.tmp") if alone else ():
            left.unlink(missing_ok=True)  # of the file or a part of it, by a process that was killed
        return make() if (found := read(path)) is None else found


def _flock(handle: int, operation: int, path: Path) -> bool:
    """Takes a lock; returns False, after one warning, on a disk without locks."""
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        device = os.fstat(handle).st_dev
        if device not in _warned:
            _warned.add(device)
            text = "%s: this disk has no locks (flock), so several processes may build the same at once, data.cache_gb "
            text += "has no effect, and only `carft-ray data clean --older-than` removes sets"
            _log.warning(text, path.parent)
        return False
    return True


def list_entries(cache_dir: Path) -> list[Entry]:
    """Returns the entries of a cache, last used first. Nothing is written; a folder that is not there has none."""
    found = [_entry(path) for path in _folders(cache_dir, _KEY)]
    return sorted(found, key=lambda each: each.last_used, reverse=True)


def notes(cache_dir: Path) -> dict[Path, int]:
    """Returns the files that hold what is known of images (hashes, thumbnails, sizes), with their sizes in bytes."""
    return {path: path.stat().st_size for pattern in _NOTES for path in sorted(cache_dir.glob(pattern))}


def surplus(entries: Sequence[Entry], max_bytes: float) -> list[Entry]:
    """Returns the entries that must go so that the others have at most ``max_bytes``: those not used for longest.

    Entries in use stay, so that may not be enough.
    """
    size, gone = sum(each.num_bytes for each in entries), []
    for each in sorted(entries, key=lambda each: each.last_used):
        if size > max_bytes and each.in_use is False:
            gone.append(each)
            size -= each.num_bytes
    return gone


def remove(cache_dir: Path, key: str, unknown: bool = False) -> bool:
    """Removes an entry unless it is in use; returns whether it did.

    Args:
        cache_dir: Folder of all entries.
        key: Name of the entry.
        unknown: Remove it, too, where a disk without locks leaves open whether it is in use.

    Raises:
        StorageError: It cannot be removed.
    """
    folder = cache_dir / key
    with _alone(folder / FILE) as free:
        if goes := free or (free is None and unknown):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                discard_folder(folder)
        return goes


def remove_dead(cache_dir: Path, before: float | None = None) -> int:
    """Removes what builds that died have left; returns their number. A build that runs is left alone.

    Args:
        cache_dir: Folder of all entries.
        before: On a disk without locks, what was begun before it goes, seconds since 1970; None: nothing does.

    Raises:
        StorageError: Something cannot be removed.
    """
    count = 0
    for path in _folders(cache_dir, _REMAINS):
        key = path.name.split(".")[1]
        with _alone(cache_dir / f"{key}.lock") as free:
            if free or (free is None and before is not None and path.stat().st_mtime < before):
                with writing(path), contextlib.suppress(FileNotFoundError):  # somebody else does the same
                    shutil.rmtree(path)
                count += 1
    return count


def _make_room(cache_dir: Path, limit_gb: float, num_bytes: int) -> None:
    """Removes entries so that one more of ``num_bytes`` fits; a warning where those in use and that are too large."""
    remove_dead(cache_dir)
    for each in surplus(list_entries(cache_dir), limit_gb * GB - num_bytes):
        remove(cache_dir, each.key)
    size = num_bytes + sum(each.num_bytes for each in list_entries(cache_dir))
    if size > limit_gb * GB:
        text = "The cache %s holds %.3g GB, more than data.cache_gb: %g, and all of it is in use"
        _log.warning(text, cache_dir, size / GB, limit_gb)


def _folders(cache_dir: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not cache_dir.is_dir():
        return []
    return sorted(path for path in cache_dir.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def _entry(folder: Path) -> Entry:
    known: dict[str, Any] = {}
    last_used, num_bytes = 0.0, 0
    with contextlib.suppress(StorageError, OSError):
        about = read_json(folder / ABOUT)
        known = {each.name: about[each.name] for each in fields(Entry) if each.name in about}
        last_used = (folder / ABOUT).stat().st_mtime
    with contextlib.suppress(OSError):
        num_bytes = (folder / FILE).stat().st_size
        last_used = last_used or (folder / FILE).stat().st_mtime
    with _alone(folder / FILE) as free:
        in_use = None if free is None else not free
    return Entry(key=folder.name, last_used=last_used, num_bytes=num_bytes, in_use=in_use, **known)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool | None]:
    """Returns whether nobody else holds a lock on a file, and holds it meanwhile. A file that is missing is free.

    Gives None on a disk without locks.
    """
    handle: int | None = None
    free: bool | None
    try:
        try:
            handle = os.open(path, os.O_RDWR)
            free = _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, path) or None
        except FileNotFoundError:
            free = True
        except OSError:  # held by somebody, or not ours to write
            free = False
        yield free
    finally:
        if handle is not None:
            os.close(handle)


def _remove_remains(folder: Path, alone: bool) -> None:
    """Removes a damaged entry, and what builds that died have left: that only the holder of the lock may."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp") if alone else ():
        with writing(path):
            shutil.rmtree(path)
    with contextlib.suppress(FileNotFoundError):  # another process did the same
        if folder.exists():
            discard_folder(folder)
