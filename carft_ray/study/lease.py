"""The lease of a folder: who works in it. For other machines, which a lock of a shared file system may not reach.

One small file, ``lease.json``, says which process holds the folder; its time of change is the heartbeat. A lease whose
process is gone from this machine, or whose heartbeat has stopped, is taken over. Readers read it too: they take no
lock, which could turn away a search that begins at that moment, and write nothing.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import LEASE
from carft_ray.store.owner import identity, is_gone, is_seen, named

BEAT_EVERY_S = 10.0
STALE_AFTER_S = 60.0
# a reader may not write a file to ask for the file system's clock, and goes by its own: it must believe in a heartbeat
# for longer, since clocks of machines differ and what is known of a shared file may be old
READERS_STALE_AFTER_S = 300.0


class Lease:
    """A held lease.

    Attributes:
        note: From whom it was taken over, in a sentence; empty when nobody held it.
    """

    def __init__(self, path: Path, content: dict[str, Any], note: str) -> None:
        self.note = note
        self._path, self._content = path, content

    def lost(self) -> bool:
        """Tells whether another process has taken it over, which it may after a minute without a heartbeat."""
        return _read(self._path) not in (None, self._content)

    def check(self) -> None:
        """Raises a ``StorageError`` when another process has taken it over: this one was suspended, or cut off."""
        if self.lost():
            by = named(_read(self._path) or {})
            rule = f"was taken over by another search while this one gave no sign of life for {STALE_AFTER_S:.0f} s"
            step = "The other search continues with all that is finished; this one has ended."
            raise StorageError(Problem(str(self._path.parent), rule, by, next_step=step))

    def beat(self, left: threading.Event) -> None:
        """Keeps the heartbeat until ``left`` is set or the lease is lost."""
        while not left.wait(BEAT_EVERY_S):
            with contextlib.suppress(OSError):  # a file system that is away for a moment
                if self.lost():
                    return
                os.utime(self._path)


@contextlib.contextmanager
def lease(folder: Path) -> Iterator[Lease]:
    """Holds the lease of a folder within the block.

    Raises:
        StorageError: A live process holds it, or the folder cannot be written.
    """
    path = folder / LEASE
    content, note = identity(), ""
    if files.exists(path):
        before = _read(path) or {}
        age_s = _age_s(path)
        if _is_alive(before, age_s, STALE_AFTER_S):
            raise StorageError(in_use(folder, named(before), age_s))
        note = f"took over from {named(before)}, which is gone"
    files.write_json(path, content)
    held, left = Lease(path, content, note), threading.Event()
    thread = threading.Thread(target=held.beat, args=(left,), name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(OSError):  # one that stays is that of a process that is gone
            if not held.lost():
                path.unlink(missing_ok=True)


def holder(folder: Path) -> str | None:
    """Returns which live process works in a study's folder (or that of a training of `train`); None when none does.

    Writes nothing and takes no lock. A process of this machine is checked, and one that is gone counts for nothing,
    whatever it has left behind. One of another machine counts until its heartbeat is ``READERS_STALE_AFTER_S`` old.
    """
    path = folder / LEASE
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:  # there is none, as between two searches, or it cannot be seen
        return None
    content = _read(path) or {}
    if not content and not files.exists(path):  # its process has just ended
        return None
    return named(content) if _is_alive(content, age_s, READERS_STALE_AFTER_S) else None


def in_use(folder: Path, by: str, age_s: float | None = None) -> Problem:
    """Returns the message for a folder that another process works in; ``age_s`` since its last heartbeat."""
    step = "Wait until the other search ends, or end it with Ctrl-C; then run the command again."
    if age_s is not None:
        step += f" If its machine is gone, the study is free {max(0.0, STALE_AFTER_S - age_s):.0f} s from now."
    return Problem(str(folder), "is in use: two searches on one study would spoil it", by, next_step=step)


def _is_alive(content: dict[str, Any], age_s: float, stale_after_s: float) -> bool:
    """Tells whether the holder of a lease is alive: by its process where that can be seen, else by its heartbeat."""
    if is_seen(content):
        return not is_gone(content)
    return age_s < stale_after_s


def _age_s(path: Path) -> float:
    """Returns the seconds since the heartbeat, by the clock of the file system: those of machines may differ."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with files.writing(path):
        probe.write_bytes(b"now")
        now = probe.stat().st_mtime
        probe.unlink()
        return now - path.stat().st_mtime


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a lease; None when it cannot be read."""
    with contextlib.suppress(OSError):
        return files.read_object(path)
    return None
