"""How a search is asked to stop: by a signal, or by another process.

Both meet a budget that is used up (``launch.budget``) in ``study.holding.Stop``, which the driver asks: running
trainings write a checkpoint and end. The reason is a record of the log.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from carft_ray import files
from carft_ray.errors import ClusterError, InterruptedRunError, MachineError, Problem
from carft_ray.layout import STOP
from carft_ray.store.bucket import Bucket
from carft_ray.store.heartbeat import BEAT_AFTER_S, READERS_SILENT_FOR_S
from carft_ray.study.holding import Stop
from carft_ray.study.place import Place, in_bucket, log_at, stop_request

CHECK_EVERY_S = 0.5
HEARD_S = BEAT_AFTER_S + 15.0  # a wait for a heartbeat
TELL_AFTER_S = 30.0  # of a wait for what was asked to stop
END_WITHIN_S = 3600.0  # a search: an evaluation is finished first


@contextlib.contextmanager
def stop_on_signal(ask: Callable[[str], None]) -> Iterator[None]:
    """Within the block, SIGINT or SIGTERM asks to stop (``Stop.ask``); a second one raises ``KeyboardInterrupt``.

    So does SIGHUP, unless it is ignored (``nohup``); but a second one is nothing: both the kernel and the shell send it
    when a terminal closes. Outside the main thread, where Python allows no handlers, nothing is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]

    def politely(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.default_int_handler)
        ask(signal.Signals(number).name)

    before = [signal.signal(number, politely) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def interruptions_as(interrupted: Callable[[], InterruptedRunError], stop: Stop) -> Iterator[None]:
    """Turns what a signal does to the block into ``interrupted()``: ``KeyboardInterrupt``, or a Ray that it ended too.

    A ``ClusterError`` without a request to stop has another cause and stays what it is. So does a ``MachineError``: the
    search itself has asked to stop then.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted() from None
    except ClusterError as error:
        if isinstance(error, MachineError) or not stop.asked():
            raise
        raise interrupted() from None


def ask_to_stop(place: Place, tell: Callable[[str], None] = lambda text: None) -> str | None:
    """Writes the stop file when a process holds a study; in a bucket an object from which it makes that.

    A process that seems to be silent is asked, too: clocks may differ. It runs if it makes a commit within ``HEARD_S``.

    Args:
        place: Of the study, or of a training.
        tell: Told when a heartbeat is waited for.

    Returns:
        Which process holds it; None when none runs.

    Raises:
        StorageError: The file cannot be written.
    """
    log, text = log_at(place), "asked by `carft-ray stop`\n"
    found = log.holder(also_silent=True)
    if found is None:
        return None
    if in_bucket(place):
        Bucket(str(place)).put(stop_request(log), text.encode())
    else:
        files.write_text(Path(place) / STOP, text)
    if log.holder() is None:
        tell(f"waiting {HEARD_S:.0f} s for a heartbeat of {found}, whose last one is old")
        end = time.monotonic() + HEARD_S
        while not log.follow():
            if time.monotonic() >= end:
                return None
            time.sleep(CHECK_EVERY_S)
    return found


def wait_until_free(place: Place, holder: str, tell: Callable[[str], None], see: str) -> None:
    """Waits until a process that was asked to stop holds the study no more.

    Args:
        place: Of the study, or of a training.
        holder: The process, as ``ask_to_stop`` returns it.
        tell: Told what is waited for, once, after ``TELL_AFTER_S``.
        see: A command that shows what it does.

    Raises:
        ClusterError: It has not ended within ``END_WITHIN_S``.
        StorageError: The log is damaged, or cannot be read.
    """
    log, began, is_told = log_at(place), time.monotonic(), False
    heard = began
    while log.holder(also_silent=True) == holder and time.monotonic() - heard < READERS_SILENT_FOR_S:
        if time.monotonic() - began >= END_WITHIN_S:
            rule = f"must end within {END_WITHIN_S:g} s of being asked to stop"
            raise ClusterError(Problem(holder, rule, "it still runs", next_step=f"See: {see}"))
        if time.monotonic() - began >= TELL_AFTER_S and not is_told:
            tell(f"{holder} still runs: its trainings end at their next checkpoint")
            is_told = True
        time.sleep(CHECK_EVERY_S)
        if log.follow():
            heard = time.monotonic()
