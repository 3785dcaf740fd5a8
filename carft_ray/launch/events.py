"""What happens in a search, for whoever shows it. All values are plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from carft_ray.study.outcome import TrialRow, TrialSpec


@dataclass(frozen=True)
class Event:
    """Something that has happened."""


@dataclass(frozen=True)
class Note(Event):
    """Something worth a line: a repaired journal, a trial that gets another attempt."""

    text: str


@dataclass(frozen=True)
class Preparing(Event):
    """What all trainings share is being made (seconds to minutes the first time), or the sets compared before."""

    what: str = "preparing: model, sets, heads, zero-shot, the frozen model's targets"


@dataclass(frozen=True)
class Prepared(Event):
    """The zero-shot model's numbers are there."""

    metrics: dict[str, Any]


@dataclass(frozen=True)
class Started(Event):
    """Trainings begin."""

    num_trials: int  # that the study will have; in a confirm, trainings with fresh seeds
    num_finished: int  # before this command
    concurrency: int
    reason: str  # why not more at a time


@dataclass(frozen=True)
class ConcurrencyChanged(Event):
    """From now on, another number of trainings runs at a time than ``Started`` said."""

    concurrency: int
    reason: str  # why not more at a time


@dataclass(frozen=True)
class TrialStarted(Event):
    """A trial or baseline begins, or resumes when ``spec.attempt`` is above 1."""

    spec: TrialSpec


@dataclass(frozen=True)
class TrialEpoch(Event):
    """A training finished an epoch; ``metrics`` is the last line of its ``metrics.jsonl``."""

    spec: TrialSpec
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrialFinished(Event):
    """A trial, or a training of a confirm, has ended and is in the study."""

    row: TrialRow
    is_best: bool  # the best of the study now
    best: str = ""  # name of the study's best trial now; empty where nothing was ranked


@dataclass(frozen=True)
class BaselineFinished(Event):
    """A baseline has ended."""

    row: TrialRow


@dataclass(frozen=True)
class TrialSetAside(Event):
    """The attempts at a training were lost one after the other and did not advance; the others continue."""

    spec: TrialSpec
    reason: str


@dataclass(frozen=True)
class Stopping(Event):
    """A stop was asked for; the search waits for the checkpoints of running trainings."""

    num_running: int
    reason: str = ""  # which budget is used up; empty: somebody asked


OnEvent = Callable[[Event], None]


class Shared:
    """Takes events for two. Tune writes it to a file that nobody reads; there it is None.

    Args:
        on_event: Takes them first.
        take: Takes them then; returns at once.
    """

    def __init__(self, on_event: OnEvent, take: OnEvent) -> None:
        self._on_event, self._take = on_event, take

    def __call__(self, event: Event) -> None:
        self._on_event(event)
        self._take(event)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
