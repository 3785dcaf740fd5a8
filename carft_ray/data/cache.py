"""The cache of images and heads: entries that one process builds and all processes of the machine share.

An entry is an Arrow file ``<key>.arrow``, which is mapped into memory; the metadata of its schema say for people what
it holds. The key is a hash of what the content depends on; an entry is never changed, only built, replaced when it is
damaged, and removed. Whoever has one open holds a shared lock on it for as long as its arrays live, however the process
ends: an entry in use is not removed. When it was last opened is its date.

Where a disk has no locks (``files.NO_FLOCK``), each process builds under a name of its own, and the last rename
decides: what they have built is the same. Every entry counts as in use there, so none is removed.

A recipe of a stranger may name any folder as the cache, and its repository may contain links. So only what carft-ray
has made is listed and removed: a regular file with the name and the metadata of an entry, or a folder ``KIND/KEY`` with
``MARKER`` in it. The path of the cache itself may contain links; below it, none is followed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carft_ray.errors import Problem, StorageError
from carft_ray.files import NO_FLOCK, new_file, writing
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.untrusted import parse_json

GB = 10**9  # bytes
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.5  # between two attempts to take a lock

_KEY = re.compile(r"[0-9a-f]{32}")  # of ``key_of``
_ENTRY = re.compile(r"([0-9a-f]{32})\.arrow")
_ABOUT = "about"  # key of the metadata
_TEXTS = ("kind", "name", "source", "image_size")  # in them
_NUMBERS = {"num_images": (int,), "created": (int, float)}
_LARGEST = 1e10  # of a number; of seconds since 1970 it is the year 2286
_ENTRY_BEGINS, _HEAD_BYTES = b"ARROW1", 2**16  # the metadata are in the first bytes of a file
_REMAINS = re.compile(r"\.([0-9a-f]{32})\.arrow\..*\.tmp")
_NOTES = re.compile(r"records-[0-9a-f]{32}(\.arrow|(\.\d+)?\.part)|overlap-[0-9a-f]{32}\.json")  # of ``data.records``
_INDEX, _INDEX_PART = "index", re.compile(r"[0-9a-f]{2}")  # of ``data.file_index``
_TARGETS = "targets"  # of ``training.targets``: folders that may be removed at any time
MARKER = ".carft-ray"  # in a folder of the cache that may be removed whole
_MARKED = b"made by carft-ray, which may remove this folder\n"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # waits for no pipe
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC

_log = logging.getLogger(__name__)
_warned: set[int] = set()  # disks without locks that a warning has named
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of an entry without opening it.

    Attributes:
        key: Name of its file, without the ending; of ``targets`` that of their folder.
        kind: ``decoded``, ``packed``, ``heads`` or ``targets``; ``unknown``, where the file is damaged.
        name: Name of the set for which it was built; the same images may serve others. Of heads, the model.
        source: Kind of the source; of heads, how many sentences.
        num_images: Images; 0 where that is unknown.
        image_size: ``width x height`` in pixels; empty where images differ.
        created: When it was built, seconds since 1970; 0 where that is unknown.
        last_used: When it was last opened, seconds since 1970.
        num_bytes: Size on disk.
        in_use: Whether a process has it open, it belongs to another user, or its disk has no locks.
    """

    key: str
    kind: str = "unknown"
    name: str = ""
    source: str = ""
    num_images: int = 0
    image_size: str = ""
    created: float = 0.0
    last_used: float
    num_bytes: int
    in_use: bool


def key_of(parts: list[Any]) -> str:
    """Returns the name, 32 hex digits, of what is kept in the cache and depends on these values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def about(**known: Any) -> dict[str, str]:
    """Returns the metadata of the schema of an entry.

    Args:
        **known: Attributes of ``Entry``, of those that ``list_entries`` does not find out.
    """
    return {_ABOUT: json.dumps({**known, "created": time.time()})}


def entry(
    cache_dir: Path,
    key: str,
    read: Callable[[Any], T],
    build: Callable[[Path], None],
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
        build: Writes and flushes the file, whose schema has the metadata of ``about``.
        limit_gb: Largest size of the cache in 10^9 bytes. With a new entry, those that were not used for longest go
            until all fit, but none in use; None: no limit. A disk without locks has none.
        on_wait: Called about twice a second while another process builds the entry; may raise to wait no longer.

    Returns:
        What ``read`` returns.

    Raises:
        StorageError: The entry cannot be written.
    """
    path = cache_dir / f"{key}.arrow"
    if (found := _open(path, read)) is not None:
        return found
    with lock(cache_dir / f"{key}.lock", on_wait) as alone:
        if (found := _open(path, read)) is not None:
            return found
        if alone:
            _remove_remains(path)
        with new_file(path) as temporary:
            build(temporary)
            found = _open(temporary, read)  # before others see it: nobody can remove what is open
            if found is None:
                raise StorageError(Problem(str(path), "an entry of the cache must be readable once it is written"))
            if limit_gb is not None and alone:
                _make_room(cache_dir, limit_gb, temporary.stat().st_size)
    return found


def _open(path: Path, read: Callable[[Any], T]) -> T | None:
    """Opens an entry; None when it is missing or, after a warning, when it is damaged."""
    with writing(path):
        try:
            handle = os.open(path, _READ)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None  # what is built replaces a link
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
        os.utime(path)
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
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
        if alone:
            _remove_remains(path)
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
            text = "%s: this disk has no locks (flock), so several processes may build the same entry at once, and "
            text += "no set is removed: data.cache_gb and `carft-ray data clean` have no effect"
            _log.warning(text, path.parent)
        return False
    return True


def list_entries(cache_dir: Path) -> list[Entry]:
    """Returns the entries of a cache, last used first. Nothing is written; a folder that is not there has none."""
    found = [_entry(path, key, state) for path, key, state in _files(cache_dir, _ENTRY) if _is_entry(path)]
    for key, (_, *states) in own_folders(cache_dir, _TARGETS).items():
        used = max((time for state in states for time in (state.st_atime, state.st_mtime)), default=0.0)
        size, key = sum(state.st_blocks * 512 for state in states), f"{_TARGETS}/{key}"
        found.append(Entry(key=key, kind="targets", last_used=used, num_bytes=size, in_use=False))
    return sorted(found, key=lambda each: each.last_used, reverse=True)


def notes(cache_dir: Path) -> dict[str, int]:
    """Returns the files that hold what is known of images (hashes, thumbnails, sizes), with their sizes in bytes.

    Their names count from the folder of the cache; ``remove_note`` takes them.
    """
    sizes = {name: state.st_size for name, state in listed(cache_dir).items() if _NOTES.fullmatch(name)}
    for part in filter(_INDEX_PART.fullmatch, listed(cache_dir, _INDEX)):
        there = listed(cache_dir, _INDEX, part).items()
        sizes |= {f"{_INDEX}/{part}/{name}": state.st_size for name, state in there if _ENTRY.fullmatch(name)}
    return sizes


def remove_note(cache_dir: Path, name: str) -> None:
    """Removes a file of ``notes`` that may be gone already.

    Raises:
        StorageError: It cannot be removed.
    """
    *folders, last = name.split("/")
    with writing(cache_dir / name), _below(cache_dir, *folders) as folder, contextlib.suppress(FileNotFoundError):
        os.unlink(last, dir_fd=folder)


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
    """Removes an entry unless it is in use; returns whether it did.

    Raises:
        StorageError: It cannot be removed.
    """
    kind, _, last = key.rpartition("/")
    if kind:  # targets: who reads them computes them again
        return remove_folder(cache_dir, kind, last)
    path = cache_dir / f"{key}.arrow"
    with _alone(path) as free, writing(path):
        if free and _is_entry(path):
            path.unlink(missing_ok=True)  # another process may have been quicker
        return free


def made_folder(cache_dir: Path, name: str) -> Path:
    """Returns a folder below a cache, and makes it if it is missing.

    Raises:
        OSError: It cannot be made, or is a link.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _below(cache_dir, name, makes=True):
        return cache_dir / name


@contextlib.contextmanager
def own_folder(cache_dir: Path, kind: str, key: str) -> Iterator[int]:
    """Gives a descriptor of the folder ``KIND/KEY`` of a cache, which is made and marked as ours if it is missing.

    Raises:
        OSError: It cannot be made, is a link or below one, or contains files without our marker.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _below(cache_dir, kind, key, makes=True) as folder:
        if not _is_marked(folder):
            # asked once more: where another process makes it, files come after the marker
            if not {*os.listdir(folder)} <= {MARKER} and not _is_marked(folder):
                raise OSError(errno.EEXIST, "a folder that carft-ray did not create", str(cache_dir / kind / key))
            _mark(folder)
        yield folder


def own_folders(cache_dir: Path, kind: str) -> dict[str, list[os.stat_result]]:
    """Returns the folders ``KIND/KEY`` that carft-ray has made: of each its own state, and those of what is in it."""
    found = {}
    for key, state in listed(cache_dir, kind).items():
        with contextlib.suppress(OSError), _below(cache_dir, kind, key) as folder:
            if _KEY.fullmatch(key) and _is_marked(folder):
                found[key] = [state, *(of for name, of in listed(cache_dir, kind, key).items() if name != MARKER)]
    return found


def remove_folder(cache_dir: Path, kind: str, key: str) -> bool:
    """Removes a folder that carft-ray has made (``own_folder``), its marker last; returns whether it is gone."""
    with contextlib.suppress(OSError), _below(cache_dir, kind) as home:
        with _below(cache_dir, kind, key) as folder:
            if not _KEY.fullmatch(key) or not _is_marked(folder):
                return False
            for name in {*os.listdir(folder)} - {MARKER}:
                if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                    shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
                else:
                    os.unlink(name, dir_fd=folder)
            os.unlink(MARKER, dir_fd=folder)
            try:
                os.rmdir(key, dir_fd=home)
            except OSError:  # another process has written to it meanwhile: it stays ours
                _mark(folder)
                raise
        return True
    return False


@contextlib.contextmanager
def _below(cache_dir: Path, *names: str, makes: bool = False) -> Iterator[int]:
    """Gives a descriptor of a folder below a cache, and follows no link on the way there.

    Raises:
        OSError: One of the names is missing, a link or a file.
    """
    handle = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            if makes:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=handle)
            above, handle = handle, os.open(name, _FOLDER, dir_fd=handle)
            os.close(above)
        yield handle
    finally:
        os.close(handle)


def listed(cache_dir: Path, *names: str) -> dict[str, os.stat_result]:
    """Returns what is in a folder of a cache, without links; nothing if a link is on the way."""
    found = {}
    with contextlib.suppress(OSError), _below(cache_dir, *names) as folder:
        for name in sorted(os.listdir(folder)):
            with contextlib.suppress(OSError):  # another process may be removing it
                state = os.lstat(name, dir_fd=folder)
                if not stat.S_ISLNK(state.st_mode):
                    found[name] = state
    return found


def _mark(folder: int) -> None:
    """Marks a folder as made by carft-ray."""
    with open(os.open(MARKER, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=folder), "wb") as file:
        file.write(_MARKED)


def _is_marked(folder: int) -> bool:
    """Tells whether carft-ray has made a folder."""
    with contextlib.suppress(OSError):
        marker = os.open(MARKER, _READ, dir_fd=folder)
        try:
            return os.read(marker, len(_MARKED) + 1) == _MARKED
        finally:
            os.close(marker)
    return False


def _is_entry(path: Path) -> bool:
    """Tells whether a file is an entry that carft-ray has written, which may be damaged behind its beginning."""
    with contextlib.suppress(OSError):
        handle = os.open(path, _READ)
        try:
            begin = os.pread(handle, _HEAD_BYTES, 0)
            return begin.startswith(_ENTRY_BEGINS) and b'"created": ' in begin
        finally:
            os.close(handle)
    return False


def remove_dead(cache_dir: Path) -> int:
    """Removes what builds that died have left; returns their number. A build that runs is left alone.

    Raises:
        StorageError: Something cannot be removed.
    """
    count = 0
    for path, key, _ in _files(cache_dir, _REMAINS):
        with _alone(cache_dir / f"{key}.lock") as free, writing(path):
            if free:
                path.unlink(missing_ok=True)
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


def _files(cache_dir: Path, pattern: re.Pattern[str]) -> list[tuple[Path, str, os.stat_result]]:
    """Returns the files whose names a pattern matches, each with its group, the key of an entry, and its state."""
    regular = [(name, state) for name, state in listed(cache_dir).items() if stat.S_ISREG(state.st_mode)]
    return [(cache_dir / name, found[1], state) for name, state in regular if (found := pattern.fullmatch(name))]


def _entry(path: Path, key: str, state: os.stat_result) -> Entry:
    known: dict[str, Any] = {}
    with (
        contextlib.suppress(OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError),
        pa.memory_map(str(path)) as file,
    ):
        about = parse_json(pa.ipc.open_file(file).schema.metadata[_ABOUT.encode()])
        known = {name: about[name] for name in _TEXTS if isinstance(about.get(name), str)}
        known |= {name: about[name] for name, kinds in _NUMBERS.items() if _is_number(about.get(name), kinds)}
    with _alone(path) as free:
        return Entry(key=key, last_used=state.st_mtime, num_bytes=state.st_size, in_use=not free, **known)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and bool(0 <= value <= _LARGEST)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Returns whether nobody else holds a lock on a file, and holds it meanwhile. A file that is missing is free."""
    handle: int | None = None
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            free = _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
        except FileNotFoundError:
            free = True
        except OSError:  # held by somebody, or not ours to write
            free = False
        yield free
    finally:
        if handle is not None:
            os.close(handle)


def _remove_remains(path: Path) -> None:
    """Removes what processes that were killed have left of a file or its parts: only the holder of its lock may."""
    for left in path.parent.glob(f".{path.stem}.*.tmp"):
        with writing(left):
            left.unlink(missing_ok=True)


def user_cache_dir() -> Path:
    """Returns the absolute path of this user's own cache folder, which no recipe can move; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "carft-ray"


def cache_dir(recipe: Recipe) -> Path:
    """Returns the absolute path of the folder for decoded sets; it need not exist.

    Args:
        recipe: The recipe; without ``data.cache_dir`` the user's cache folder is taken.
    """
    return user_cache_dir() if recipe.data.cache_dir is None else Path(recipe.data.cache_dir)
