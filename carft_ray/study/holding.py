"""Holding the folder of a study for one process at a time; who holds it; and what asks the holder to stop.

Whoever has claimed the log holds the folder (``store.log``).
"""

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from carft_ray import files, untrusted
from carft_ray.errors import HoldOutError, Problem, StorageError, UsageError
from carft_ray.layout import COMMITS, MANIFEST, STOP
from carft_ray.store.commit import commit_name
from carft_ray.store.folder import PROBE
from carft_ray.store.log import Log
from carft_ray.study.records import STOPPING, last_of

LOOK_EVERY_S = 5.0  # whether a sign of life is due


class Stop:
    """Whether the holder of a study is to stop, and why: the first reason counts.

    A signal, the budget and failures say it with ``ask``; other processes with a file in the study, or an object in its
    bucket (``Log.order``).

    Attributes:
        reason: Why; empty while nobody has asked.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self.reason = ""
        self._folder, self._log = folder, log

    def ask(self, reason: str) -> None:
        """Asks to stop. It writes nothing, so that a signal handler may call it in the middle of a commit."""
        self.reason = self.reason or reason

    def asked(self) -> bool:
        """Tells whether it is to stop."""
        if not self.reason and self._log.store.order:
            self.ask(self._log.store.order)
        if not self.reason and files.seen(self._folder / STOP):
            self.ask(files.first_line(self._folder, STOP) or "on request")
        return bool(self.reason)


def take_back_stop(log: Log) -> None:
    """Writes to a log that its last stop no longer counts, if it has one: a search goes on, or has ended as finished.

    Raises:
        StorageError: The log cannot be written.
    """
    if stopping(log):
        log.write({"kind": STOPPING, "reason": ""})


def stopping(log: Log, since: int = 0) -> str:
    """Returns why the last search of a log stopped or stops, as it has written; empty where it has not.

    Args:
        log: The log.
        since: Only what was written after this commit counts.
    """
    found = last_of(log, STOPPING, since + 1)
    return str(found["reason"]) if found else ""


def is_study(folder: Path) -> bool:
    """Returns whether a folder holds a study."""
    return (folder / MANIFEST).is_file() and (folder / COMMITS).is_dir()


def unbegun(log: Log, place: str) -> tuple[str, str]:
    """Returns what a study without a recipe is, and the next step, for a message.

    Args:
        log: Its log, read to its end.
        place: By what a user calls the study.
    """
    if (holder := log.holder()) is not None:
        return (
            f"one that {holder} is starting",
            "Wait until its first training starts, then run the same command again.",
        )
    folder = shlex.quote(place)
    step = f"Run the killed command again: carft-ray search RECIPE --study {folder}"
    step += f", or carft-ray train RECIPE --out {folder}"
    return "one whose first command was killed before it wrote the recipe", step


def require_apart(place: str, above: str | None) -> None:
    """Raises a ``UsageError`` if a new study would be inside another one: a study removes only files of its own.

    Args:
        place: Of the new study.
        above: Of the study that would contain it; None: there is none.
    """
    if above is not None:
        beside = f"{above.rpartition('/')[0]}/{place.rpartition('/')[2]}"
        step = f"Give another place, such as {beside}"
        raise UsageError(Problem(place, "must not be inside another study", above, next_step=step))


def check_fit(folder: Path) -> None:
    """Raises when a folder is none that may be held; before anything is written.

    Raises:
        UsageError: It is a file, or holds something and is no study, or is inside another study.
        StorageError: A link leads out of it, or one of its files is a pipe, device or socket.
    """
    step = "Give the folder of a study, or one that does not exist yet."
    if files.exists(folder) and not folder.is_dir():
        raise UsageError(Problem(str(folder), "must be a folder", "a file", next_step=step))
    if not files.exists(folder / MANIFEST):
        if foreign := foreign_names(folder):
            raise UsageError(Problem(str(folder), "must be a study or empty", ", ".join(foreign[:5]), next_step=step))
        require_apart(str(folder), next((str(each) for each in folder.parents if _has_begun(each)), None))
    with files.writing(folder):
        untrusted.require_nothing_outside(folder, StorageError)


def foreign_names(folder: Path) -> list[str]:
    """Returns the names in a folder but those that holding it leaves before it belongs to a recipe."""
    with files.writing(folder):
        return sorted(each.name for each in folder.iterdir() if not is_ours(each)) if folder.is_dir() else []


def is_ours(path: Path) -> bool:
    """Tells whether a file or folder is one that holding the folder above leaves before that belongs to a recipe."""
    if path.name != COMMITS:
        return path.name == MANIFEST or path.name.startswith(f".{MANIFEST}.")
    names = [each.name for each in path.rglob("*") if not each.is_dir()]
    return path.is_dir() and all(name.isdigit() or name.startswith((".", PROBE)) for name in names)


def _has_begun(folder: Path) -> bool:
    return is_study(folder) and (folder / commit_name(1)).is_file()


@contextlib.contextmanager
def held(log: Log, tell: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder within the block, by its log.

    Args:
        log: The log.
        tell: As of ``Log.claim``.

    Raises:
        StorageError: Another process holds it, or it cannot be written; nothing is removed then. Or another process has
            taken it over meanwhile, whatever has failed for that.
    """
    path = Path(str(log)) / COMMITS
    in_folder = path.is_absolute()  # the address of a bucket is not
    missing = [each for each in (path, *path.parents) if not files.exists(each)] if in_folder else []
    try:
        log.claim(tell)
    except StorageError:
        for each in missing:
            with contextlib.suppress(OSError):  # it is not empty: another process has made something in it
                each.rmdir()
        raise
    left = threading.Event()

    def beat() -> None:
        while not left.wait(LOOK_EVERY_S):
            with contextlib.suppress(StorageError):  # the next commit tells
                log.beat()

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    except (StorageError, HoldOutError):
        if log.is_lost:  # this is the cause: what was half written is gone, and the ledger has more lines
            log.check()
        raise
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(StorageError):  # a log that is not released is that of a process that is gone
            log.release()
