"""A study in a bucket and its copies in folders: fetched to be read, or pulled.

What is fetched stays in the user's cache, and the next time only what has changed is fetched:

    studies/HASH.txt            the address of the study
    studies/HASH/NAME/          the copy, with the last part of the address as its name
    driven/HASH/                the same, where a search of this machine works (``study.uploads``)
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from carft_ray import files
from carft_ray.data.cache import user_cache_dir
from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.files import is_address
from carft_ray.layout import (
    COMMITS,
    MANIFEST,
    OWN,
    PREDICTIONS,
    RAY_LOG,
    STEP,
    STOP,
    STOP_REQUESTS,
    WEIGHTS,
)
from carft_ray.store.bucket import Bucket, Listed, parsed
from carft_ray.store.folder import Folder
from carft_ray.store.log import Commit, Log, commit_name
from carft_ray.study import typed
from carft_ray.study.holding import is_study, log_of, require_apart
from carft_ray.untrusted import read_text

Place = Path | str  # of a study: its folder, or its address
Tell = Callable[[int, int], None]  # bytes that are done, of all
NUMBERS, IMAGES, MODELS, ALL = 0, 1, 2, 3  # what is needed: no predictions, no weights, no checkpoints, all
COPIED_FROM = "copied_from"  # key of the manifest of a copy
FRESH_FOR_S = 5.0  # a copy, for the steps of one command
THREADS = 16
STUDIES, DRIVEN = "studies", "driven"  # in the cache
_OF_PROCESSES = (RAY_LOG, STOP)  # that run in a study: no copy has them
_fetched: dict[str, tuple[float, int]] = {}  # by address: when, and what was needed


def fetched(place: Place, need: int = IMAGES) -> Path:
    """Returns the folder of a study; of one in a bucket that of a copy, brought up to date.

    Args:
        place: The folder or the address.
        need: Which files of the study.

    Raises:
        UsageError: It is an address, but none of a study.
        StorageError: The bucket cannot be read, or the copy not be written.
    """
    text = str(place)
    if not is_address(text):
        return Path(place)
    if text.startswith("file:"):
        return Path("/" + unquote(text.removeprefix("file:").lstrip("/")))
    bucket = Bucket(text)
    address, folder = str(bucket), _place_of(bucket, STUDIES)
    when, had = _fetched.get(address, (-FRESH_FOR_S, ALL))
    if time.monotonic() - when < FRESH_FOR_S and had >= need and is_study(folder):
        return folder
    _require_study(bucket)
    _fetch_log(bucket, folder)
    fetch_files(bucket, folder, need)
    _fetched[address] = (time.monotonic(), need)
    return folder


def _place_of(bucket: Bucket, root: str) -> Path:
    """Returns the folder of a study of a bucket in the cache, and writes its address beside it."""
    home = user_cache_dir() / root / blake2b(str(bucket).encode(), digest_size=8).hexdigest()
    files.write_text(home.with_suffix(".txt"), str(bucket))
    return home / str(bucket).rpartition("/")[2]


def named(folder: Place) -> str:
    """Returns by what a user calls a study: the address of which a folder is the copy, or the folder."""
    path = Path(folder)
    return (address_in(path, STUDIES) or address_in(path, DRIVEN)) or str(folder)


def address_in(folder: Path, root: str) -> str | None:
    """Returns the address of the study that a folder of the cache belongs to; None of another folder."""
    home = folder.resolve().parent
    return read_text(home.with_suffix(".txt")) if home.parent == (user_cache_dir() / root).resolve() else None


def in_bucket(place: Place) -> bool:
    """Tells whether a place is an address of a bucket."""
    return is_address(str(place)) and not str(place).startswith("file:")


def absolute(place: Place) -> str:
    """Returns a place as another machine would name it: the address, or the absolute path."""
    return "://".join(parsed(str(place))) if in_bucket(place) else str(fetched(place).absolute())


def log_at(place: Place) -> Log:
    """Returns the log of a study, read to its end: that of the folder, or as it is in the bucket.

    Raises:
        UsageError: It is an address, but none of a study.
        StorageError: The log is damaged, or cannot be read.
    """
    if not in_bucket(place):
        return log_of(fetched(place))
    bucket = Bucket(str(place))
    _require_study(bucket)
    return _fetch_log(bucket, _place_of(bucket, STUDIES))


def stop_request(log: Log) -> str:
    """Returns the name of the object that asks the holder of a log to stop; another holder has another."""
    return f"{STOP_REQUESTS}/{log.claimed:08d}"


def own_folder(place: Place, brings: bool = True) -> Path:
    """Returns the folder of a study that a command changes; of one in a bucket the one where this machine works on it.

    Args:
        place: The folder or the address.
        brings: The folder gets what the bucket has; where a search of another machine holds it, the manifest alone.

    Raises:
        UsageError: The bucket has files there, but no study; or a new one would lie inside another.
        StorageError: The bucket cannot be read, or the folder not be written; or a process works in it, and the bucket
            has another study.
    """
    if not in_bucket(place):
        return fetched(place)
    bucket = Bucket(str(place))
    folder = _place_of(bucket, DRIVEN)
    if brings:
        log = _fetch_log(bucket, folder)
        if not log.number:
            require_apart(str(bucket), _study_above(bucket))
        if log.holder() is None:
            fetch_files(bucket, folder, ALL, removes=False)
        elif not log.is_held_here:  # it may fall silent; what is asked before the claim needs this
            bucket.download(MANIFEST, folder / MANIFEST)
    return folder


def pull(address: str, folder: Path, tell: Tell = lambda done, total: None) -> dict[str, Any]:
    """Copies a study from a bucket: the log first, then all files but those of processes that run in it.

    The manifest of the copy says where it comes from.

    Args:
        address: Of the study.
        folder: The copy: new, or empty.
        tell: Told how many bytes are done.

    Returns:
        ``study``, ``address``, ``commits``, ``files`` and ``num_bytes``.

    Raises:
        UsageError: There is no study, or the folder holds something.
        StorageError: The bucket cannot be read, or the folder not be written; nothing is left then. A kill leaves a
            hidden folder, which the next call removes.
    """
    files.require_new(folder, "DIR")
    bucket, folder = Bucket(address), folder.absolute()
    before = _require_study(bucket)  # of the ledger, the manifest may be a line behind the log, never ahead
    with contextlib.suppress(OSError):
        folder.rmdir()  # it is empty
    with files.new_folder(folder, f".{folder.name}.0-pull.tmp") as temporary:
        log = _fetch_log(bucket, temporary)
        found = fetch_files(bucket, temporary, ALL, tell)
        files.write_bytes(temporary / MANIFEST, before)
        found_there = typed.checked(typed.Manifest, files.read_json(temporary, MANIFEST), MANIFEST)
        source = {"place": str(bucket), "commit": log.number, "digest": log.digest}
        files.write_json(temporary / MANIFEST, {**found_there, COPIED_FROM: source})
    numbers = {"commits": log.number, "files": len(found), "num_bytes": sum(each.num_bytes for each in found.values())}
    return {"study": str(folder), "address": str(bucket), **numbers}


def _holds(names: Iterable[str]) -> str:
    first = list(names)[:4]
    return f"one that contains {', '.join(first[:3])}{', ...' if len(first) > 3 else ''}"


def _require_study(bucket: Bucket) -> bytes:
    if (manifest := bucket.get(MANIFEST)) is None:
        raise UsageError(Problem(str(bucket), "must be the address of a study", f"one without {MANIFEST}"))
    return manifest


class Through(Bucket):
    """A bucket to read a log from; commits that a folder has are read there."""

    def __init__(self, address: str, here: Folder) -> None:
        super().__init__(address)
        self.here = here

    def get(self, name: str) -> bytes | None:
        first = self.here.get(name.replace("pack-", ""))  # of a pack
        return super().get(name) if first is None else first if "pack-" not in name else None


class Kept(Log):
    """A log whose commits get into a folder as they are read or written."""

    def __init__(self, store: Through) -> None:
        super().__init__(store)
        self.here = store.here

    def _take(self, commit: Commit, data: bytes) -> None:
        super()._take(commit, data)
        if self.here.get(name := commit_name(self.number)) is None:
            self.here.put(name, data)


def _fetch_log(bucket: Bucket, folder: Path) -> Log:
    """Fetches the commits that a folder does not have; returns the log as it is in the bucket."""
    here = Folder(folder)
    last = here.list(COMMITS)[-1:]
    if last and _has_another(bucket, last[0], here.get(last[0])):
        _require_free(folder, bucket)
        files.remove(folder)
    log = Kept(Through(str(bucket), Folder(folder)))
    log.follow()
    if there := bucket.stat(commit_name(log.number)) if log.number else None:
        with files.writing(folder):  # a reader of the copy goes by the clock of the bucket, too
            os.utime(folder / commit_name(log.number), ns=(there.stamp_ns, there.stamp_ns))
    return log


def _has_another(bucket: Bucket, name: str, commit: bytes | None) -> bool:
    """Tells whether an address has another study now, or none: by its commit of a number, or two answers without it."""
    found = bucket.get(name)
    return name not in bucket.list(COMMITS) if found is None else found != commit


def _study_above(bucket: Bucket) -> str | None:
    """Returns the address of the study around an address; None if there is none, or the keys do not reach there."""
    pieces = str(bucket).split("/")
    for each in (Bucket("/".join(pieces[:number])) for number in range(len(pieces) - 1, 2, -1)):
        with contextlib.suppress(StorageError):
            if each.stat(MANIFEST) and each.stat(commit_name(1)):
                return str(each)
    return None


def _require_free(folder: Path, bucket: Bucket) -> None:
    """Raises a ``StorageError`` when a process of this machine works in a folder, or that cannot be found out."""
    log = log_of(folder)
    if log.is_held_here:
        rule = f"must be the study at {bucket}, which is now another one"
        step = f"Wait until {log.holder()} ends, or stop it; then run the same command again."
        raise StorageError(Problem(str(folder), rule, f"one that {log.holder()} is using", next_step=step))


def fetch_files(
    bucket: Bucket, folder: Path, need: int, tell: Tell = lambda done, total: None, removes: bool = True
) -> dict[str, Listed]:
    """Fetches the files that are needed and have changed; with ``removes``, others that a folder has go.

    Returns:
        Those needed.

    Raises:
        UsageError: There are files, but no study.
        StorageError: The bucket cannot be read, or the folder not be written.
    """
    there = bucket.all(without=COMMITS)
    needed = {name: each for name, each in there.items() if _is_needed(name, need)}
    if needed and MANIFEST not in needed:
        raise UsageError(Problem(str(bucket), "must be a study or an empty address", _holds(needed)))
    new = {}
    for name, each in needed.items():
        with contextlib.suppress(OSError):
            seen = (folder / name).stat()
            if (seen.st_size, seen.st_mtime_ns) == (each.num_bytes, each.stamp_ns):
                continue
        new[name] = each.num_bytes
    for name in files_in(folder).keys() - there.keys() if removes else ():
        if bucket.stat(name) is None:  # a listing may lack what is there
            files.remove(folder / name)
    _each(lambda name: bucket.download(name, folder / name), new, tell)
    return needed


def _is_needed(name: str, need: int) -> bool:
    pieces = name.split("/")
    if pieces[0] == STOP_REQUESTS or name in _OF_PROCESSES:
        return False
    if need == ALL:
        return True
    if OWN in pieces or any(piece.startswith(STEP) for piece in pieces):
        return False
    if pieces[-1] == WEIGHTS:
        return need >= MODELS
    return need >= IMAGES or PREDICTIONS.partition("/")[0] not in pieces


def files_in(folder: Path) -> dict[str, int]:
    """Returns names and sizes of the files of a study, without the log and what is half written."""
    found = {}
    with files.writing(folder):
        for path in files.whole_files(folder, COMMITS):
            with contextlib.suppress(FileNotFoundError):  # it is gone by now
                if stat.S_ISREG((seen := path.lstat()).st_mode):
                    found[path.relative_to(folder).as_posix()] = seen.st_size
    return found


def _each(work: Callable[[Any], object], sizes: Mapping[Any, int], tell: Tell = lambda done, total: None) -> None:
    """Does the keys of ``sizes``, some at a time; tells of the sums of their sizes."""
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(THREADS) as pool:
        for key, _ in zip(sizes, pool.map(work, sizes), strict=True):
            done += sizes[key]
            tell(done, total)
