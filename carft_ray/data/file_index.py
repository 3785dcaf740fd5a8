"""Indexes of large files: what one reading of a file has found, kept in the user's cache folder until the file changes.

An entry is one Arrow file ``index/<two digits>/<key>.arrow``; its key is a hash of what was searched for and of the
place, size and dates of the file. Entries appear whole, and may be deleted at any time.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from carft_ray.data.cache import key_of, made_once, user_cache_dir
from carft_ray.data.decode_images import unreadable
from carft_ray.errors import DataError
from carft_ray.files import fsync_file, new_file
from carft_ray.untrusted import open_regular

FORMAT_VERSION = 1  # rises when another thing is found in the same file
_END = 1 << 16  # bytes


def file_stamp(path: Path) -> str:
    """Returns a text that changes when a file may have changed: its size, the date of its contents, its change time.

    A program can set the date (`rsync -t`, `cp -p`), and not the change time, which the system sets: of BMP files,
    for example, all pictures have one size. New rights or a hard link change it, too.

    Raises:
        OSError: It has vanished.
    """
    state = path.stat()
    return f"{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}"


def container_stamp(path: Path) -> str:
    """Returns a text that changes when a file of many images may have changed, and differs between two such files.

    ``file_stamp`` after a hash of its first and last bytes: fewer files than images are there to differ in size.

    Raises:
        OSError: It has vanished or cannot be read.
    """
    with open_regular(path) as file:
        digest = hashlib.blake2b(file.read(_END), digest_size=16)
        file.seek(max(0, path.stat().st_size - _END))
        digest.update(file.read(_END))
    return f"{digest.hexdigest()}\0{file_stamp(path)}"


def of_any_copy(stamp: str) -> str:
    """Returns a stamp without the change time, which a copy on another machine has otherwise."""
    return stamp.rpartition("\0")[0]


def checked_stamp(path: Path, stamp: Callable[[Path], str] = file_stamp) -> str:
    """Returns the stamp of a file of images.

    Raises:
        DataError: It has vanished or cannot be read.
    """
    try:
        return stamp(path)
    except OSError as error:
        raise DataError(unreadable(str(path), error)) from error


def kept_index(path: Path, what: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Returns the index of a file, from the cache or made now by one of the processes that ask.

    Args:
        path: The file.
        what: Names completely what is searched for.
        make: Reads the file.

    Raises:
        OSError: The file has vanished.
        StorageError: The cache cannot be written.
    """
    key = key_of([FORMAT_VERSION, what, os.path.realpath(path), file_stamp(path)])
    entry = user_cache_dir() / "index" / key[:2] / f"{key}.arrow"  # few in a folder: each one made lists its folder

    def write() -> pa.Table:
        made = make()
        write_table(entry, made)
        return made

    return made_once(entry, entry.parent.with_suffix(".lock"), open_table, write)


def required(**columns: pa.DataType) -> list[pa.Field]:
    """Returns columns of a schema in which no value is missing."""
    return [pa.field(name, kind, nullable=False) for name, kind in columns.items()]


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table as an Arrow file that appears whole.

    Raises:
        StorageError: It cannot be written.
    """
    with new_file(path) as temporary:
        write_file(temporary, table)


def write_file(path: Path, table: pa.Table) -> None:
    """Writes a table as an Arrow file and flushes it."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    fsync_file(path)


def open_table(path: Path) -> pa.Table | None:
    """Maps an Arrow file into memory; None when it is missing, damaged or no regular file."""
    try:
        open_regular(path).close()  # Arrow would wait for the writer of a pipe
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, DataError, pa.ArrowException):
        return None
