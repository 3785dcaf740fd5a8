"""Durable files: every write that must survive a crash goes through here.

A *durable operation* is an append, a flush to disk or a rename. Files appear under their name only whole: they are
written under a temporary name, flushed, and renamed. The tests kill the process after every single such operation.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.untrusted import MOST_VALUES, open_regular, parse_json, read_regular, require_plain, visible

# of a network disk or connection that has gone, or of a disk that fails (not every system has each); a full disk or a
# missing permission is not among them: another attempt would meet it again
_MACHINE = """ESTALE EIO ETIMEDOUT ENOTCONN ECONNRESET ECONNREFUSED ECONNABORTED EPIPE EHOSTDOWN EHOSTUNREACH ENETDOWN
ENETUNREACH EREMOTEIO ESHUTDOWN"""
MACHINE_ERRNOS: tuple[int, ...] = tuple(getattr(errno, name) for name in _MACHINE.split() if hasattr(errno, name))
_FREE = "Free some space or choose another folder, then run the same command again."
_OTHER = "Choose a folder that you may write to."
DISK_STEPS = {  # what helps where a disk is full or not to be written
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), then run the same command again.",
    errno.EACCES: _OTHER,
    errno.EROFS: _OTHER,
}
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without locks
MOST_JSON_BYTES = 2**28  # of a file of a study that is read whole
MOST_LINE_BYTES = 2**16  # of a line that is read by itself
RETRY_FOR_S = 5.0  # what a network disk that is away for a moment is given
RETRY_EVERY_S = 0.2
ADDRESS = re.compile(r"([A-Za-z0-9]+)://?(.*)")  # of a bucket; ``s3:/`` is what becomes of ``s3://`` in a path
NEAR_ADDRESS = re.compile(r"(s3|gs|az):([^/].*)")  # a slip of the hand, and no folder of the working directory
REMAINS = ".*.[0-9]*.tmp"  # pattern of temporary names
_ROW = ("step", "epoch", "num_steps", "subset/objective")  # numbers of a row of a training, where it has them

T = TypeVar("T")


def is_address(text: str) -> bool:
    """Tells whether a text is to be an address, and not a path."""
    return any(form.fullmatch(text) for form in (ADDRESS, NEAR_ADDRESS)) and not Path(text).exists()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` of the block into a ``StorageError`` that names the path and the cause."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def retried(path: Path, read: Callable[[], T]) -> T:
    """Returns ``read()``; while a network disk does not answer, it is called again for ``RETRY_FOR_S``.

    Args:
        path: What is read, for the message.
        read: Called at least once; an ``OSError`` that is none of ``MACHINE_ERRNOS`` goes through at once.

    Raises:
        StorageError: The disk did not answer; its cause is the last ``OSError``.
    """
    end = time.monotonic() + RETRY_FOR_S
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in MACHINE_ERRNOS:
                raise
            if time.monotonic() >= end:
                raise storage_error(path, error, "must be readable") from error
        time.sleep(RETRY_EVERY_S)


@contextlib.contextmanager
def passing_faults() -> Iterator[None]:
    """Leaves the block when a network disk does not answer; for what is read again soon in any case."""
    try:
        yield
    except OSError as error:
        if error.errno not in MACHINE_ERRNOS:
            raise


def exists(path: Path) -> bool:
    """Returns whether a file or folder is there; asks again while a network disk does not answer.

    Raises:
        StorageError: As ``retried``.
    """
    return retried(path, lambda: _is_there(path))


def seen(path: Path) -> bool:
    """As ``exists``, but answers at once: False when the disk does not answer. For a file that is checked often."""
    with passing_faults():
        return _is_there(path)
    return False


def _is_there(path: Path) -> bool:
    """``Path.exists`` of some versions of Python takes every fault for a file that is not there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is there: who opens it is told
            raise
    return True


def storage_error(path: Path, error: OSError, rule: str = "must be writable") -> StorageError:
    """Returns the ``StorageError`` for a failed write to ``path``, or for the rule that is broken otherwise."""
    step = "Fix that or choose another folder, then run the same command again."
    step = DISK_STEPS.get(error.errno or 0, step)
    cause = os.strerror(error.errno) if error.errno else str(error)  # libraries wrap it in words of their own
    return StorageError(Problem(str(path), rule, cause, next_step=step))


def require_new(folder: Path, option: str, ours: Callable[[str], bool] = lambda name: False) -> None:
    """Refuses a folder for new files that is there already, unless it is empty.

    Args:
        folder: The folder.
        option: The option that names it, for the message.
        ours: Whether a name in it does not count.

    Raises:
        UsageError: It is a file, or holds something.
    """
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir() if not ours(entry.name))
        value = f"one that contains {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
    else:
        value = "a file" if folder.exists() else ""
    if value:
        step = f"Give another folder with {option}."
        raise UsageError(Problem(str(folder), "must be a new folder", value, next_step=step))


def fsync_file(path: Path) -> None:
    """Flushes a file that a library has written, or a folder, so that a rename inside it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder and those that it lies in, where they are missing, so that they survive a power failure."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        fsync_file(path.parent)


def temporary_name(path: Path) -> Path:
    """Returns a name beside a file that no other thread or process has: in containers most have the same number."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name for a file that takes the name ``path`` when the block ends well, and vanishes otherwise.

    The block writes and flushes it.

    Raises:
        StorageError: The file cannot be written; nothing is left under its name that was not there before.
    """
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
            fsync_file(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file: temporary name, flush, rename, flush of the folder.

    Raises:
        StorageError: As ``new_file``.
    """
    with new_file(path) as temporary:
        write_flushed(temporary, data)


def write_flushed(path: Path, data: bytes) -> None:
    """Writes a file under this name at once and flushes it: for temporary names."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` for a value that JSON can hold; not-a-number and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def append_line(path: Path, line: str, is_flushed: bool = True) -> None:
    """Appends one line. An incomplete last line, which a crash has left, is removed first.

    Args:
        path: The file.
        line: Without its end.
        is_flushed: The line survives a power failure, once this returns.

    Raises:
        StorageError: The line cannot be written, or the incomplete one has more than ``MOST_JSON_BYTES``.
    """
    with writing(path), open(path, "a+b") as file:
        size = whole = file.seek(0, os.SEEK_END)
        while whole and os.pread(file.fileno(), 1, whole - 1) != b"\n":
            if size - whole > MOST_JSON_BYTES:
                rule = f"must have lines of at most {MOST_JSON_BYTES:,} bytes"
                raise StorageError(Problem(str(path), rule, "a longer one", next_step="Remove it, or restore it."))
            begin = max(0, whole - MOST_LINE_BYTES)
            whole = begin + os.pread(file.fileno(), whole - begin, begin).rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        if is_flushed:
            os.fsync(file.fileno())


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of a study; every reader of a study gets it here, or reads through what follows.

    Args:
        folder: The study; it may be a link itself.
        name: From there, with ``/``.

    Raises:
        StorageError: A link leads out of the study.
    """
    place, is_link = str(folder), False
    for piece in name.split("/"):
        place = f"{place}/{piece}"
        is_link = is_link or os.path.islink(place)  # a third of the time of ``realpath``
    if is_link and not Path(leads_to := os.path.realpath(place)).is_relative_to(os.path.realpath(folder)):
        raise StorageError(Problem(visible(place), f"must not lead out of {folder}", visible(f"a link to {leads_to}")))
    return Path(place)


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Opens a file of a study; never waits for a writer.

    Raises:
        StorageError: As ``inside``; or it is a folder, pipe, device or socket.
        OSError: It is missing or cannot be read.
    """
    return open_regular(inside(folder, name), StorageError)


def read_whole(folder: Path, name: str) -> bytes:
    """Returns the content of a file of a study.

    Raises:
        StorageError: As ``open_inside``; or it has more than ``MOST_JSON_BYTES``, or a disk does not answer.
        OSError: As there.
    """
    path = inside(folder, name)
    return retried(path, lambda: read_regular(path, MOST_JSON_BYTES, StorageError))


def first_line(folder: Path, name: str) -> str:
    """Returns the beginning of the first line of a file of a study; empty if it is missing or cannot be read.

    Raises:
        StorageError: As ``open_inside``.
    """
    with contextlib.suppress(OSError), open_inside(folder, name) as file:
        return file.readline(MOST_LINE_BYTES).decode(errors="replace").strip()
    return ""


def read_json(folder: Path, name: str) -> Any:
    """Reads a file of a study that ``write_json`` has written.

    Args:
        folder: As of ``inside``, and so is the other.
        name: The file.

    Raises:
        StorageError: It is missing or damaged, or cannot be read.
    """
    try:
        return require_plain(parse_json(read_whole(folder, name)))
    except FileNotFoundError:
        value = "no such file"
    except OSError as error:
        value = error.strerror or str(error)
    except ValueError as error:
        value = f"a damaged one ({error})"
    step = "Restore it from a copy, or give another folder and begin again."
    raise StorageError(Problem(str(folder / name), "must be a whole JSON file", value, next_step=step))


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """Reads a JSON object of a study once; None where the file is missing or holds anything else.

    Raises:
        OSError: A network disk does not answer.
    """
    try:
        path = inside(folder, name)
        content = require_plain(parse_json(read_regular(path, MOST_JSON_BYTES, StorageError)))
    except (FileNotFoundError, ValueError, StorageError):
        return None
    return content if isinstance(content, dict) else None


def read_json_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Reads a file of JSON lines of a study; an incomplete last line (a crash while it was appended) is left out.

    Raises:
        StorageError: As ``read_whole``; or it has more than ``untrusted.MOST_VALUES``.
    """
    try:
        content = read_whole(folder, name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    if sum(map(content.count, (b"\n", b",", b"[", b"{"))) > MOST_VALUES:
        rule = f"must have at most {MOST_VALUES:,} values"
        raise StorageError(Problem(str(folder / name), rule, "more", next_step="Restore it from a copy."))
    return _whole_rows(content)


def _whole_rows(content: bytes) -> list[dict[str, Any]]:
    """Returns the objects of JSON lines; an incomplete last line and what is no row of a training are left out."""
    rows = []
    for line in content.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):  # half a line, where another file of more bytes took the name
            rows.append(require_plain(parse_json(line)))
    return [row for row in rows if isinstance(row, dict) and all(type(row.get(key, 0)) in (int, float) for key in _ROW)]


@contextlib.contextmanager
def new_folder(path: Path, temporary_as: str = "") -> Iterator[Path]:
    """Gives a temporary folder that takes the name ``path`` when the block ends well, and vanishes otherwise.

    Files written inside must be flushed by the block (``fsync_file``).

    Args:
        path: The folder.
        temporary_as: The temporary name: what a kill has left under it is removed. Empty: a name that nobody else has.

    Raises:
        StorageError: A file cannot be written.
    """
    temporary = path.with_name(temporary_as) if temporary_as else temporary_name(path)
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            fsync_file(temporary)
            os.rename(temporary, path)
            fsync_file(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, StorageError):
            raise
        # of a file inside: it is known by its last name
        named = [dataclasses.replace(p, place=p.place.replace(str(temporary), str(path))) for p in error.problems]
        raise StorageError(named) from error


def remove(path: Path) -> None:
    """Removes a file or folder that may be gone already.

    Raises:
        StorageError: It cannot be removed.
    """
    with writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def whole_files(folder: Path, without: str = "") -> Iterator[Path]:
    """Gives the files below a folder, without what is half written, and without those in one folder right below it."""
    for place, folders, names in os.walk(folder):
        top = without if Path(place) == folder else ""
        folders[:] = [name for name in folders if name != top and not fnmatch.fnmatch(name, REMAINS)]
        yield from (Path(place, name) for name in names if not fnmatch.fnmatch(name, REMAINS))


def remove_remains(folder: Path) -> None:
    """Removes what writes that were killed have left anywhere in a folder. Only who holds it may.

    Raises:
        StorageError: Something cannot be removed.
    """
    with writing(folder):
        remains: list[Path] = []
        for place, folders, names in os.walk(folder):  # a third of the time of rglob, where there are 10,000 trials
            remains += [Path(place, name) for name in fnmatch.filter([*folders, *names], REMAINS)]
        for path in remains:
            remove(path)  # it may have been in a folder that is gone
