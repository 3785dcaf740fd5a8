"""A store in a folder of a disk, which several machines may share. An object is a file."""

import contextlib
import errno
import fnmatch
import os
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.store.objects import Names, RefusedError, UnknownError, check_name
from carft_ray.untrusted import read_regular, visible

_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # what disks without them answer


class Folder:
    """A ``Store``; its methods are explained there.

    Attributes:
        path: The folder, absolute, links resolved. The first object that is written makes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))

    def __str__(self) -> str:
        return str(self.path)

    def get(self, name: str) -> bytes | None:
        """Returns the content of an object; None when there is none."""
        path = self._path(name)
        try:
            return files.retried(path, lambda: read_regular(path, files.MOST_JSON_BYTES, StorageError))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise files.storage_error(path, error, "must be readable") from error

    def put(self, name: str, data: bytes) -> None:
        """Writes an object, over one that is there."""
        files.write_bytes(self._path_to_write(name), data)

    def put_new(self, name: str, data: bytes) -> None:
        """Creates an object, by a hard link: a rename would replace one that is there."""
        path = self._path_to_write(name)
        temporary = files.temporary_name(path)
        try:
            with files.writing(path):
                files.write_flushed(temporary, [data])
            _link(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str, after: str = "") -> Names:
        """Returns the names under a prefix, without what a dead process has left half written."""
        found: Names = []
        for folder, folders, names in os.walk(self._path(prefix) if prefix else self.path):
            folders[:] = [each for each in folders if not fnmatch.fnmatch(each, files.REMAINS)]
            above = os.path.relpath(folder, self.path)
            whole = (each for each in names if not fnmatch.fnmatch(each, files.REMAINS))
            found += whole if above == "." else (f"{above}/{each}" for each in whole)
        return sorted(name for name in found if name > after)

    def remove(self, prefix: str) -> None:
        """Removes an object and all under its name."""
        files.remove(self._path(prefix))

    def _path(self, name: str) -> Path:
        path = self.path / check_name(name)
        if not Path(leads_to := os.path.realpath(path)).is_relative_to(self.path):
            raise StorageError(Problem(str(path), f"must not lead out of {self}", visible(f"a link to {leads_to}")))
        return path

    def _path_to_write(self, name: str) -> Path:
        path = self._path(name)
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
        if error.errno in files.MACHINE_ERRNOS:
            raise UnknownError(files.storage_error(path, error).problems) from error
        rule = "must lie on a disk with hard links" if error.errno in _NO_HARD_LINKS else "must be writable"
        raise files.storage_error(path, error, rule) from error
    try:
        files.fsync_file(path.parent)
    except OSError as error:
        raise UnknownError(files.storage_error(path, error).problems) from error
    if is_taken:
        raise RefusedError(Problem(str(path), "is there already"))
