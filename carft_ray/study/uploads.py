"""The folder in which a driver works on a study in a bucket, and how its files get there.

The log and the files in the bucket are the study. A commit is created there first. Before one that says how a training
ended, the files of the study are uploaded; checkpoints and the rest follow every ``UPLOAD_EVERY_S``, and all at the
end. After a kill the folder may be behind the bucket or ahead of it: who has claimed the log makes it equal.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import MANIFEST, RAY_LOG, STEP, STOP, STOP_REQUESTS
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.study.mirror import ALL, DRIVEN, Kept, Through, address_in, fetch_files, files_in, stop_request

UPLOAD_EVERY_S = 10.0
_Version = tuple[int, int, int]  # of a file: bytes, time in ns, inode


class _Mirrored(Through):
    """The bucket of a study, for its driver: files get there from the folder."""

    def __init__(self, address: str, here: Folder) -> None:
        super().__init__(address, here)
        self._known: dict[str, _Version] = {}  # files as the bucket has them
        self._locks = (threading.Lock(), threading.Lock())  # of files, and of checkpoints

    def begin(self, own_request: str) -> None:
        """Makes the folder equal to the bucket, and drops what asked earlier holders to stop."""
        self.delete([name for name in self.list(STOP_REQUESTS) if name != own_request])
        there = fetch_files(self, self.here.path, ALL)
        self._known = {name: _version(path) for name in there if (path := self.here.path / name).exists()}

    def upload_new(self, checkpoints: bool) -> None:
        """Uploads files that are new or have changed, and removes those that are gone; checkpoints, or the others.

        Raises:
            StorageError: A file cannot be read, or the bucket not be written.
        """
        with self._locks[checkpoints]:
            there = files_in(self.here.path)
            if MANIFEST not in there and self._known:  # what was cleared here must not be cleared there
                step = "Run the same command again: it goes on from what is in the bucket."
                problem = Problem(str(self.here), "must stay while a search works in it", "cleared", next_step=step)
                raise StorageError(problem)
            names = [name for name in there if name not in (RAY_LOG, STOP)] if MANIFEST in there else []
            names = [name for name in names if _is_checkpoint(name) == checkpoints]
            names.sort(key=lambda name: name != MANIFEST)  # files without one are no study
            for name in names:
                self._upload(name, self.here.path / name)
            gone = [name for name in self._known if _is_checkpoint(name) == checkpoints and name not in set(names)]
            self.delete(gone)
            for name in gone:
                del self._known[name]

    def _upload(self, name: str, path: Path) -> None:
        try:
            if (version := _version(path)) == self._known.get(name):
                return
            self.upload(name, path)
            self._known[name], there = version, self.stat(name)
            if there is not None and _version(path) == version:  # it has not changed since
                os.utime(path, ns=(there.stamp_ns, there.stamp_ns))  # by which ``fetch_files`` knows it
                self._known[name] = (there.num_bytes, there.stamp_ns, version[2])
        except (StorageError, FileNotFoundError):
            if path.exists():
                raise


class _Uploading(Kept):
    def __init__(self, store: _Mirrored) -> None:
        super().__init__(store)
        self.store = store

    def keep_files(self) -> None:
        self.store.upload_new(checkpoints=False)


def open_log(study_dir: Path) -> Log:
    """Returns the log of a study that is to be claimed: in its folder, or in the bucket that the folder belongs to."""
    address = address_in(study_dir, DRIVEN)
    return Log(Folder(study_dir)) if address is None else _Uploading(_Mirrored(address, Folder(study_dir)))


@contextlib.contextmanager
def uploading(log: Log) -> Iterator[None]:
    """Within the block, the files of a claimed study get into its bucket, if it is in one; at its end, all.

    Raises:
        StorageError: The bucket cannot be read; or it lacks files of a study that is well otherwise.
    """
    if not isinstance(log, _Uploading):
        yield
        return
    request = stop_request(log)
    log.store.begin(request)
    left = threading.Event()

    def upload() -> None:
        while not left.wait(UPLOAD_EVERY_S):
            with contextlib.suppress(StorageError):  # the next commit tells
                if log.store.get(request) is not None:
                    files.write_text(log.store.here.path / STOP, f"asked by {request}\n")
                all_files()

    def all_files() -> None:
        if not log.is_lost:
            log.store.upload_new(checkpoints=False)
            log.store.upload_new(checkpoints=True)

    thread = threading.Thread(target=upload, name="upload", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        left.set()
        thread.join()
        with contextlib.suppress(StorageError):
            if log.is_abandoned:
                log.store.delete(list(log.store.all()))
            else:
                all_files()
        raise
    left.set()
    thread.join()
    all_files()


def _is_checkpoint(name: str) -> bool:
    return any(piece.startswith(STEP) for piece in name.split("/"))


def _version(path: Path) -> _Version:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
