"""The copy of a study in a bucket: a folder that gets of the bucket what is needed, and what has changed."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carft_ray import files
from carft_ray.errors import Problem, StorageError, UsageError
from carft_ray.layout import (
    COMMITS,
    CONFIRM,
    MANIFEST,
    OWN,
    PREDICTIONS,
    RAY_LOG,
    STEP,
    STOP,
    STOP_REQUESTS,
    TEST_DIR,
    WEIGHTS,
)
from carft_ray.store.bucket import Bucket, Listed
from carft_ray.store.commit import commit_name
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log, log_of

Tell = Callable[[int, int], None]  # bytes that are done, of all
# what is needed: log, ledger and summaries; no predictions; no weights; no checkpoints; all
STATE, NUMBERS, PER_IMAGE, MODELS, ALL = range(5)
THREADS = 16
_OF_PROCESSES = (RAY_LOG, STOP)  # that run in a study: no copy has them


class Copy(Bucket):
    """A study in a bucket, and a folder that gets of it what is needed: commits as they are read or written, and files.

    Args:
        address: Of the study.
        folder: The folder.
    """

    def __init__(self, address: str, folder: Path) -> None:
        super().__init__(address)
        self.here = Folder(folder)

    def get(self, name: str) -> bytes | None:
        """As of ``Bucket``; a commit that the folder has is read there."""
        if not name.startswith(f"{COMMITS}/"):
            return super().get(name)
        first = self.here.get(name.replace("pack-", ""))  # of a pack
        return super().get(name) if first is None else first if "pack-" not in name else None

    def took(self, name: str, data: bytes) -> None:
        """As of ``Store``."""
        if self.here.get(name) is None:
            self.here.put(name, data)

    def read_log(self) -> Log:
        """Fetches the commits that the folder does not have; returns the log as it is in the bucket.

        Raises:
            StorageError: The log is damaged, or cannot be read; or the bucket has another study now, and a process
                works in the folder.
        """
        folder, last = self.here.path, self.here.list(COMMITS)[-1:]
        if last and _has_another(self, last[0], self.here.get(last[0])):
            _require_free(folder, self)
            files.remove(folder)
        log = Log(self)
        log.follow()
        if there := self.stat(commit_name(log.number)) if log.number else None:
            with files.writing(folder):  # a reader of the copy goes by the clock of the bucket, too
                os.utime(folder / commit_name(log.number), ns=(there.stamp_ns, there.stamp_ns))
        return log

    def fetch(self, need: int, removes: bool = True, tell: Tell = lambda done, total: None) -> dict[str, Listed]:
        """Fetches the files that are needed, and of those that the folder has the ones that have changed.

        Args:
            need: Which files.
            removes: Files of the folder that the bucket has not go.
            tell: Told how many bytes are done, of how many.

        Returns:
            All files of the study in the bucket, also those not needed; for its state, those beside the trainings.

        Raises:
            UsageError: There are files, but no study.
            StorageError: The bucket cannot be read, or the folder not be written.
        """
        found = self._state() if need == STATE else self.all(without=COMMITS)
        there = {name: each for name, each in found.items() if is_needed(name, ALL)}
        if there and MANIFEST not in there:
            raise UsageError(Problem(str(self), "must be a study or an empty address", _holds(there)))
        folder = self.here.path
        kept = {name for name, each in there.items() if seen(folder / name) == (each.num_bytes, each.stamp_ns)}
        here = files_in(folder)
        wanted = (name for name in there if name not in kept and (name in here or is_needed(name, need)))
        new = {name: there[name].num_bytes for name in wanted}
        for name in here - there.keys() if removes and need != STATE else ():
            if self.stat(name) is None:  # a listing may lack what is there
                files.remove(folder / name)
        done, total = 0, sum(new.values())
        with ThreadPoolExecutor(THREADS) as pool:
            for name, _ in zip(new, pool.map(lambda name: self.download(name, folder / name), new), strict=True):
                done += new[name]
                tell(done, total)
        return there

    def _state(self) -> dict[str, Listed]:
        found = {**self.all(TEST_DIR), **self.all(CONFIRM)}
        manifest = self.stat(MANIFEST)
        return found if manifest is None else {MANIFEST: manifest, **found}


def seen(path: Path) -> tuple[int, int] | None:
    """Returns the size of a file and the time of its last change (ns since 1970); None: it is not there."""
    with contextlib.suppress(OSError):
        state = path.stat()
        return state.st_size, state.st_mtime_ns
    return None


def _has_another(bucket: Bucket, name: str, commit: bytes | None) -> bool:
    """Tells whether an address has another study now, or none: by its commit of a number, or two answers without it."""
    found = Bucket.get(bucket, name)  # not the folder's
    return name not in bucket.list(COMMITS) if found is None else found != commit


def _require_free(folder: Path, bucket: Bucket) -> None:
    """Raises a ``StorageError`` when a process of this machine works in a folder, or that cannot be found out."""
    log = log_of(folder)
    if log.is_held_here:
        rule = f"must be the study at {bucket}, which is now another one"
        step = f"Wait until {log.holder()} ends, or stop it; then run the same command again."
        raise StorageError(Problem(str(folder), rule, f"one that {log.holder()} is using", next_step=step))


def is_needed(name: str, need: int) -> bool:
    """Tells whether a file of a study is one of those that are needed."""
    pieces = name.split("/")
    if pieces[0] == STOP_REQUESTS or name in _OF_PROCESSES:
        return False
    if need == ALL:
        return True
    if need == STATE:
        return name == MANIFEST or (pieces[0] in (CONFIRM, TEST_DIR) and name.endswith(".json") and len(pieces) == 2)
    if OWN in pieces or any(piece.startswith(STEP) for piece in pieces):
        return False
    if pieces[-1] == WEIGHTS:
        return need >= MODELS
    return need >= PER_IMAGE or PREDICTIONS.partition("/")[0] not in pieces


def files_in(folder: Path) -> set[str]:
    """Returns the names of the files of a study, without the log and what is half written."""
    found = set()
    with files.writing(folder):
        for path in files.whole_files(folder, COMMITS):
            with contextlib.suppress(FileNotFoundError):  # it is gone by now
                if stat.S_ISREG(path.lstat().st_mode):
                    found.add(path.relative_to(folder).as_posix())
    return found


def _holds(names: Iterable[str]) -> str:
    first = list(names)[:4]
    return f"one that contains {', '.join(first[:3])}{', ...' if len(first) > 3 else ''}"
