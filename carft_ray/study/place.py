"""The place of a study, a folder or the address of a bucket, and its copies here: fetched to be read, or pulled.

What is fetched stays in the user's cache, and the next time only what has changed is fetched:

    studies/HASH.txt            the address of the study
    studies/HASH/NAME/          the copy, with the last part of the address as its name
    driven/HASH/                the same, where a search of this machine works (``study.uploads``)

While such a search goes on, whoever wants no more than its state on this machine reads its folder.
"""

import contextlib
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from carft_ray import files
from carft_ray.data.cache import user_cache_dir
from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.files import is_address
from carft_ray.layout import MANIFEST, STOP_REQUESTS
from carft_ray.store.bucket import Bucket, parsed
from carft_ray.store.commit import commit_name
from carft_ray.store.copy import ALL, PER_IMAGE, STATE, Copy, Tell
from carft_ray.store.log import Log, log_of
from carft_ray.study import typed
from carft_ray.study.holding import is_study, require_apart, unbegun
from carft_ray.untrusted import read_text

Place = Path | str  # of a study: its folder, or its address
COPIED_FROM = "copied_from"  # key of the manifest of a copy
FRESH_FOR_S = 5.0  # a copy, for the steps of one command
STUDIES, DRIVEN = "studies", "driven"  # in the cache
_fetched: dict[str, tuple[float, int]] = {}  # by address: when, and what was needed
_brought: dict[tuple[str, str], float] = {}  # by address and name: when


def fetched(place: Place, need: int = PER_IMAGE) -> Path:
    """Returns the folder of a study; of one in a bucket that of a copy, brought up to date.

    Args:
        place: The folder or the address.
        need: Which files of the study.

    Raises:
        UsageError: It is an address, but none of a study.
        StorageError: The bucket cannot be read, or the copy not be written.
    """
    return fetched_with_log(place, need)[0]


def fetched_with_log(place: Place, need: int) -> tuple[Path, Log | None]:
    """Returns what ``fetched`` does, and the log where it was read for that.

    Raises:
        UsageError, StorageError: As ``fetched``.
    """
    text = str(place)
    if not is_address(text):
        return Path(place), None
    if text.startswith("file:"):
        return Path("/" + unquote(text.removeprefix("file:").lstrip("/"))), None
    address = _address(place)
    folder = _place_of(address, STUDIES)
    when, had = _fetched.get(address, (-FRESH_FOR_S, ALL))
    if time.monotonic() - when < FRESH_FOR_S and had >= need and is_study(folder):
        return folder, None
    if need == STATE and (log := _log_driven_now(address)):
        return _path_of(address, DRIVEN), log
    copy = Copy(address, folder)
    _require_study(copy)
    log = copy.read_log()
    copy.fetch(need)
    _fetched[address] = (time.monotonic(), need)
    return folder, log


def bring(folder: Path, names: Sequence[str]) -> None:
    """Has a folder hold some files of its study as they are now, if they exist.

    Args:
        folder: As ``fetched`` gives it; into one that is no copy nothing is brought.
        names: Of the files.

    Raises:
        StorageError: The bucket cannot be read, or the folder not be written.
    """
    address = address_in(folder, STUDIES)
    if address is None or not names:
        return
    bucket = Bucket(address)
    for name in names:
        if time.monotonic() - _brought.get((address, name), -FRESH_FOR_S) >= FRESH_FOR_S:
            bucket.download(name, folder / name)
            _brought[address, name] = time.monotonic()


def _log_driven_now(address: str) -> Log | None:
    """Returns the log in the folder where a search of this machine works on a study now; None: none does."""
    log = log_of(folder) if is_study(folder := _path_of(address, DRIVEN)) else None
    return log if log and log.is_held_here else None


def _address(place: Place) -> str:
    return "://".join(parsed(str(place)))


def _path_of(address: str, root: str) -> Path:
    home = user_cache_dir() / root / blake2b(address.encode(), digest_size=8).hexdigest()
    return home / address.rpartition("/")[2]


def _place_of(address: str, root: str) -> Path:
    """Returns the folder of a study of a bucket in the cache, and writes its address beside it."""
    folder = _path_of(address, root)
    files.write_text(folder.parent.with_suffix(".txt"), address)
    return folder


def named(folder: Place) -> str:
    """Returns by what a user calls a study: the address of which a folder is the copy, or the folder."""
    path = Path(folder)
    return (address_in(path, STUDIES) or address_in(path, DRIVEN)) or str(folder)


def address_in(folder: Path, root: str) -> str | None:
    """Returns the address of the study that a folder of the cache belongs to; None of another folder."""
    home = folder.resolve().parent
    with contextlib.suppress(FileNotFoundError):
        if home.parent == (user_cache_dir() / root).resolve():
            return read_text(home.with_suffix(".txt"))
    return None


def in_bucket(place: Place) -> bool:
    """Tells whether a place is an address of a bucket."""
    return is_address(str(place)) and not str(place).startswith("file:")


def absolute(place: Place) -> str:
    """Returns a place as another machine would name it: the address, or the absolute path."""
    return _address(place) if in_bucket(place) else str(fetched(place).absolute())


def log_at(place: Place) -> Log:
    """Returns the log of a study, read to its end: that of the folder, or as it is in the bucket.

    Raises:
        UsageError: It is an address, but none of a study.
        StorageError: The log is damaged, or cannot be read.
    """
    if not in_bucket(place):
        return log_of(fetched(place))
    address = _address(place)
    if driven := _log_driven_now(address):
        return driven
    copy = Copy(address, _place_of(address, STUDIES))
    _require_study(copy)
    return copy.read_log()


def stop_request(log: Log) -> str:
    """Returns the name of the object that asks the holder of a log to stop; another holder has another."""
    return f"{STOP_REQUESTS}/{log.claimed:08d}"


def own_folder(place: Place, need: int | None = PER_IMAGE) -> Path:
    """Returns the folder of a study that a command changes; of one in a bucket the one where this machine works on it.

    Args:
        place: The folder or the address.
        need: What the folder gets of the bucket; where a search of another machine holds it, the manifest alone.
            None: nothing.

    Raises:
        UsageError: The bucket has files there, but no study; or a new one would lie inside another.
        StorageError: The bucket cannot be read, or the folder not be written; or a process works in it, and the bucket
            has another study.
    """
    if not in_bucket(place):
        return fetched(place)
    address = _address(place)
    folder = _place_of(address, DRIVEN)
    _fetched.pop(address, None)  # what follows changes the study
    if need is not None:
        copy = Copy(address, folder)
        log = copy.read_log()
        if not log.number:
            require_apart(address, _study_above(copy))
        if log.holder() is None:
            copy.fetch(need, removes=False)
        elif not log.is_held_here:  # it may fall silent; what is asked before the claim needs this
            copy.download(MANIFEST, folder / MANIFEST)
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
        copy = Copy(str(bucket), temporary)
        log = copy.read_log()
        found = copy.fetch(ALL, tell=tell)
        files.write_bytes(temporary / MANIFEST, before)
        found_there = typed.checked(typed.Manifest, files.read_json(temporary, MANIFEST), MANIFEST)
        source = {"place": str(bucket), "commit": log.number, "digest": log.digest}
        files.write_json(temporary / MANIFEST, {**found_there, COPIED_FROM: source})
    numbers = {"commits": log.number, "files": len(found), "num_bytes": sum(each.num_bytes for each in found.values())}
    return {"study": str(folder), "address": str(bucket), **numbers}


def _require_study(bucket: Bucket) -> bytes:
    if (manifest := bucket.get(MANIFEST)) is None:
        log = Log(bucket)
        log.follow()
        value, step = f"one without {MANIFEST}", ""
        if log.number and log.holds_only_claims:
            value, step = unbegun(log, str(bucket))
        raise UsageError(Problem(str(bucket), "must be the address of a study", value, next_step=step))
    return manifest


def _study_above(bucket: Bucket) -> str | None:
    """Returns the address of the study around an address; None if there is none, or the keys do not reach there."""
    pieces = str(bucket).split("/")
    for each in (Bucket("/".join(pieces[:number])) for number in range(len(pieces) - 1, 2, -1)):
        with contextlib.suppress(StorageError):
            if each.stat(MANIFEST) and each.stat(commit_name(1)):
                return str(each)
    return None
