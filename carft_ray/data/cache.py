"""The cache of images and heads: entries that one process builds and all processes of the machine share.

An entry is a folder ``<key>/`` with ``set.arrow``, an Arrow file that is mapped into memory, and ``entry.json``, which
says for people what it holds. The key is a hash of what the content depends on; an entry is never changed, only built,
replaced when it is damaged, and removed. Whoever has one open holds a shared lock on ``set.arrow`` for as long as its
arrays live, however the process ends: an entry in use is not removed. When it was last opened is the date of
``entry.json``.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carft_ray.errors import Problem, StorageError
from carft_ray.files import discard_folder, new_folder, read_json, write_json, writing

FILE = "set.arrow"
ABOUT = "entry.json"
GB = 10**9  # bytes

_KEY = re.compile(r"[0-9a-f]{32}")
_REMAINS = re.compile(r"\.([0-9a-f]{32})\.[0-9].*\.tmp")
_NOTES = ("records-*.arrow", "records-*.part", "overlap-*.json", "index/*.arrow")  # of ``data.records`` and others

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
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
        in_use: Whether a process has it open, or it belongs to another user.
    """

    key: str
    kind: str
    name: str
    source: str
    num_images: int
    image_size: str
    transform: str
    created: float
    last_used: float
    num_bytes: int
    in_use: bool


def key_of(parts: list[Any]) -> str:
    """Returns the name, 32 hex digits, of what is kept in the cache and depends on these values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def entry(
    cache_dir: Path,
    key: str,
    read: Callable[[Any], T],
    build: Callable[[Path], dict[str, Any]],
    limit_gb: float | None = None,
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
            until all fit, but none in use; None: no limit.

    Returns:
        What ``read`` returns.

    Raises:
        StorageError: The entry cannot be written.
    """
    folder = cache_dir / key
    if (found := _open(folder, read)) is not None:
        return found
    with lock(cache_dir / f"{key}.lock"):
        if (found := _open(folder, read)) is not None:
            return found
        _remove_remains(folder)
        with new_folder(folder) as temporary:
            about = build(temporary / FILE)
            write_json(temporary / ABOUT, {"format_version": 1, **about, "created": time.time()})
            found = _open(temporary, read)  # before others see it: nobody can remove what is open
            if found is None:
                raise StorageError(Problem(str(folder), "an entry of the cache must be readable once it is written"))
            if limit_gb is not None:
                _make_room(cache_dir, limit_gb, (temporary / FILE).stat().st_size)
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
            fcntl.flock(handle, fcntl.LOCK_SH)
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
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive flock; it ends with the process, however that ends. The empty lock file stays."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
        if size > max_bytes and not each.in_use:
            gone.append(each)
            size -= each.num_bytes
    return gone


def remove(cache_dir: Path, key: str) -> bool:
    """Removes an entry unless it is in use; tells whether it did.

    Raises:
        StorageError: It cannot be removed.
    """
    folder = cache_dir / key
    with _alone(folder / FILE) as free:
        if free:
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                discard_folder(folder)
        return free


def remove_dead(cache_dir: Path) -> int:
    """Removes what builds that died have left; returns their number. A build that runs is left alone.

    Raises:
        StorageError: Something cannot be removed.
    """
    count = 0
    for path in _folders(cache_dir, _REMAINS):
        key = path.name.split(".")[1]
        with _alone(cache_dir / f"{key}.lock") as free:
            if free:
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
    about: dict[str, Any] = {}
    last_used, num_bytes = 0.0, 0
    with contextlib.suppress(StorageError, OSError):
        about = read_json(folder / ABOUT)
        last_used = (folder / ABOUT).stat().st_mtime
    with contextlib.suppress(OSError):
        num_bytes = (folder / FILE).stat().st_size
        last_used = last_used or (folder / FILE).stat().st_mtime
    with _alone(folder / FILE) as free:
        return Entry(
            folder.name,
            about.get("kind", "unknown"),
            about.get("name", ""),
            about.get("source", ""),
            about.get("num_images", 0),
            about.get("image_size", ""),
            about.get("transform", ""),
            about.get("created", 0.0),
            last_used,
            num_bytes,
            not free,
        )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Tells whether nobody else holds a lock on a file, and holds it meanwhile. A file that is missing is free."""
    handle = None
    try:
        try:
            handle = os.open(path, os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            free = True
        except OSError:  # held by somebody, or not ours to write
            free = False
        else:
            free = True
        yield free
    finally:
        if handle is not None:
            os.close(handle)


def _remove_remains(folder: Path) -> None:
    """Removes a damaged entry and what builds that died have left. Only the holder of the lock may."""
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        with writing(path):
            shutil.rmtree(path)
    if folder.exists():
        discard_folder(folder)
