"""Ctrl-C: the first one asks politely, the second one does not wait."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from carft_ray import files
from carft_ray.errors import ClusterError, InterruptedRunError, MachineError


@contextlib.contextmanager
def stop_file_on_signal(stop_path: Path) -> Iterator[None]:
    """Within the block, SIGINT or SIGTERM writes the stop file; a second one raises ``KeyboardInterrupt``.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def at_once(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def politely(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, at_once)
        files.write_text(stop_path, f"{signal.Signals(number).name}\n")

    before = [signal.signal(number, politely) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def interruptions_as(interrupted: Callable[[], InterruptedRunError], stop_path: Path) -> Iterator[None]:
    """Turns what a signal does to the block into ``interrupted()``: ``KeyboardInterrupt``, or a Ray that it ended too.

    A ``ClusterError`` without the stop file has another cause and stays what it is, and so does a ``MachineError``: the
    search has written the file itself then.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted() from None
    except ClusterError as error:
        if isinstance(error, MachineError) or not files.seen(stop_path):
            raise
        raise interrupted() from None
