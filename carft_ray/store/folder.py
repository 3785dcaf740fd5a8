"""A store in a folder of a disk, which several machines may share: named objects, such as ``log/00000001``.

An object is a file, and appears whole or not at all. A name has pieces, joined by ``/``; what begins with the pieces of
a name lies under it.
"""

import contextlib
import errno
import fnmatch
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import COMMITS
from carft_ray.untrusted import visible

PROBE = "probe-"  # how the name of an object begins that ``probe`` makes and removes
Names = list[str]  # in a class with a method ``list``, that word means the method
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # what disks without them answer


class RefusedError(StorageError):
    """An object was not created: its name already exists."""


class UnknownError(StorageError):
    """It is not known whether an object was written: the answer is missing, and it may still appear."""


class Store(Protocol):
    """Where a log lies: ``Folder``, or ``bucket.Bucket``. ``str`` gives its address, for messages.

    From ``took`` on: what a search says of the files of its study. It means something in a bucket alone, whose files
    come from a folder (``study.uploads``).

    Attributes:
        has_packs: Whether what is small is slow to read.
        meanwhile: What the one thread that commits does while it waits for ``keep_files``.
        order: What asks the holder of the log to stop, where that is kept in the store; empty while nothing does.
    """

    has_packs: bool
    meanwhile: Callable[[], None] = staticmethod(lambda: None)
    order: str = ""

    def get(self, name: str) -> bytes | None:
        """As of ``Folder``, and so are the others."""

    def look(self, name: str) -> bytes | None: ...

    def written(self, name: str) -> float | None: ...

    def put_new(self, name: str, data: bytes) -> None: ...

    def put(self, name: str, data: bytes) -> None: ...

    def list(self, prefix: str, after: str = "") -> Names: ...

    def remove(self, prefix: str) -> None: ...

    def took(self, name: str, data: bytes) -> None:
        """Called with each commit that the log has read or written."""
        return

    def keep_files(self) -> None:
        """Called before a commit that names files of the study; where it is not in a folder, they must be kept first.

        What takes long is done in a thread of its own; ``meanwhile`` is called again and again until it has ended.

        Raises:
            StorageError: They cannot be.
        """
        return

    def has_ended(self, place: str) -> None:
        """Called once a training is complete, before ``keep_files``: a copy elsewhere gets its result from now on.

        Args:
            place: Folder of its last attempt, below the study.
        """
        return

    def forget_files(self, name: str) -> None:
        """Called before the search removes a file or folder of the study: a copy elsewhere loses it, or never gets it.

        Args:
            name: Below the study.
        """
        return

    def learn(self, names: Iterable[str]) -> None:
        """Called with files of the study that a node has put into the bucket of the log itself."""
        return

    def known(self, name: str) -> Iterable[str]:
        """Returns the files at or below a name that the bucket of the log has, as far as it is known."""
        return ()

    def bring(self, name: str, need: int) -> None:
        """Has the folder of the study hold what its bucket has.

        Args:
            name: A file or folder below the study.
            need: Which files of it (``store.copy.NUMBERS`` to ``ALL``).

        Raises:
            StorageError: The bucket cannot be read, or the folder not be written.
        """
        return


class Folder(Store):
    """A store. ``str`` gives its address, for messages.

    All methods raise a ``StorageError`` for a name that could lead out of the folder (``check_name``), and when it
    cannot be read or written.

    Attributes:
        path: The folder, absolute, links resolved. The first object that is written makes it.
    """

    has_packs = False

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str) -> bytes | None:
        """Returns the content of an object; None when there is none."""
        path = self.path_of(name)
        try:
            return files.read_whole(self.path, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise files.storage_error(path, error, "must be readable") from error

    def look(self, name: str) -> bytes | None:
        """As ``get``; in a bucket, by one short request."""
        return self.get(name)

    def written(self, name: str) -> float | None:
        """Returns when an object was written, in seconds since 1970 by the clock of the disk; None: there is none."""
        path = self.path_of(name)
        with files.writing(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return path.stat().st_mtime
        return None

    def put_new(self, name: str, data: bytes) -> None:
        """Creates an object, by a hard link: a rename would replace one that is there. Of several that try at once, one
        does. Durable when this returns.

        Raises:
            RefusedError: The name is there; whose it is, its content tells.
            UnknownError: The answer is missing; ask again.
            StorageError: It was not created.
        """
        path = self._path_to_write(name)
        temporary = files.temporary_name(path)
        try:
            with files.writing(path):
                files.write_flushed(temporary, data)
            _link(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, over what is there. Durable when this returns."""
        files.write_bytes(self._path_to_write(name), data)

    def list(self, prefix: str, after: str = "") -> Names:
        """Returns the names one piece longer than another one, in order, without what dead processes left half written.

        They are there, others may be too.

        Args:
            prefix: The other name.
            after: A name: only those that sort after it. Empty for all.
        """
        folder = self.path_of(prefix)
        try:
            found = files.retried(folder, lambda: os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise files.storage_error(folder, error, "must be readable") from error
        whole = (f"{prefix}/{name}" for name in found if not fnmatch.fnmatch(name, files.REMAINS))
        return sorted(name for name in whole if name > after)

    def remove(self, prefix: str) -> None:
        """Removes an object and all under its name."""
        files.remove(self.path_of(prefix))

    def path_of(self, name: str) -> Path:
        """Returns where an object lies."""
        return files.inside(self.path, check_name(name))

    def _path_to_write(self, name: str) -> Path:
        path = self.path_of(name)
        with files.writing(path):
            files.make_folder(path.parent)
        return path


def _link(temporary: Path, path: Path) -> None:
    """Gives a flushed file its name, for good."""
    is_taken = False
    try:
        os.link(temporary, path)
    except FileExistsError:
        is_taken = True  # perhaps by this file: the answer to an earlier link may have been lost
    except OSError as error:
        if error.errno in (*files.MACHINE_ERRNOS, errno.ENOENT):  # who holds the study has removed it with remains
            raise UnknownError(files.storage_error(path, error).problems) from error
        rule = "must be on a disk with hard links" if error.errno in _NO_HARD_LINKS else "must be writable"
        raise files.storage_error(path, error, rule) from error
    try:
        files.fsync_file(path.parent)
    except OSError as error:
        raise UnknownError(files.storage_error(path, error).problems) from error
    if is_taken:
        raise RefusedError(Problem(str(path), "already exists"))


def check_name(name: str) -> str:
    """Returns a name that is one of an object.

    Raises:
        StorageError: It could lead out of the store, or is one of the temporary names of ``files``.
    """
    is_plain = visible(name) == name and not set(name) & set("\\\n\t")  # no control characters, no halves of surrogates
    pieces = name.split("/")
    if not is_plain or any(each in ("", ".", "..") or fnmatch.fnmatch(each, files.REMAINS) for each in pieces):
        raise StorageError(Problem(visible(name), "must be a name of an object, such as log/00000001"))
    return name


def probe(store: Store) -> None:
    """Checks that a store refuses to create what is there; leaves nothing behind.

    Raises:
        StorageError: It does not, or cannot be written.
    """
    name = f"{COMMITS}/{PROBE}{secrets.token_hex(8)}"
    try:
        store.put_new(name, b"first")
        store.put_new(name, b"second")
    except RefusedError:
        return
    finally:
        store.remove(name)
    rule = "must refuse to overwrite an object, so that two searches cannot damage one study"
    raise StorageError(Problem(str(store), rule, "one that overwrites it", next_step="Give another folder or bucket."))
