"""What leaves a search for receivers outside of it (trackers, a webhook). The search does not wait for them.

Each receiver has a queue and a thread of its own, so a slow one delays no other. The faults of a receiver are warnings
at the end of the command, never errors. A receiver does not get

- what happens while ``MOST_WAITING`` events wait for it,
- what happens after it has raised an exception,
- what still waits ``PATIENCE_S`` after the end of the command.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from carft_ray.launch.events import Event, OnEvent, to_all

MOST_WAITING = 10_000
PATIENCE_S = 120.0

Receiver = Callable[[Iterator[Event]], Iterable[str]]  # given the events, in its thread; returns or yields its faults


@dataclass(frozen=True)
class Ended(Event):
    """The command has ended, well or with an error: the last event that a receiver gets."""

    error: BaseException | None


@contextlib.contextmanager
def sending(receivers: Mapping[str, Receiver], warn: Callable[[str], None]) -> Iterator[Callable[[OnEvent], OnEvent]]:
    """Sends what happens in the block to receivers, and how the block ended; then waits for what is on its way.

    Args:
        receivers: By the recipe key or option that names each.
        warn: Given each fault of a receiver once, at the end and in the calling thread.

    Yields:
        A function that lets the one who takes events share them with the receivers.
    """
    boxes = [_Outbox(place, receiver) for place, receiver in receivers.items()]
    error: BaseException | None = None
    try:
        yield lambda on_event: to_all(on_event, *(box.put for box in boxes))
    except BaseException as raised:
        error = raised
        raise
    finally:
        for box in boxes:
            box.waiting.put(Ended(error))
            box.waiting.put(None)
        end = time.monotonic() + PATIENCE_S
        for box in boxes:
            box.join(max(0.0, end - time.monotonic()))
            late = [f"not everything was sent within {PATIENCE_S:g} s"] if box.is_alive() else []
            for fault in dict.fromkeys(box.faults + late):
                warn(f"{box.name}: {fault}; the study is not affected")


class _Outbox(threading.Thread):
    """The queue of a receiver, which ends with None, and the thread that empties it."""

    def __init__(self, place: str, receiver: Receiver) -> None:
        super().__init__(name=place, daemon=True)
        self.receiver, self.waiting, self.faults = receiver, queue.SimpleQueue[Event | None](), list[str]()
        self.start()

    def put(self, event: Event) -> None:
        """Takes or drops an event; returns at once."""
        if self.waiting.qsize() < MOST_WAITING:
            self.waiting.put(event)
        elif self.is_alive():
            self.faults.append(f"more than {MOST_WAITING:,} events were waiting, and the further ones were dropped")

    def run(self) -> None:
        """Gives the receiver what comes."""
        try:
            self.faults.extend(self.receiver(iter(self.waiting.get, None)))
        except Exception as error:  # of a library that we do not know, over a network
            lines = str(error).strip().splitlines()
            self.faults.append(f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": "))
