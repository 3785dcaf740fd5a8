"""What happens in a search, for whoever shows it. All values are plain data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from carft_ray.recipe.schema.search import violation_words
from carft_ray.study.training import Kind, TrialRow, TrialSpec
from carft_ray.words import counted, counted_trainings, value_text


@dataclass(frozen=True)
class Event:
    """Something that has happened."""

    def line(self) -> str:
        """Returns it in words; empty for what needs no line."""
        return ""


@dataclass(frozen=True)
class _Text(Event):
    text: str

    def line(self) -> str:
        return self.text


class Note(_Text):
    """A warning: a study that was taken over, a trial that gets another attempt."""


class Decided(_Text):
    """The value that an ``auto`` of the recipe was resolved to."""


@dataclass(frozen=True)
class Preparing(_Text):
    """What all trainings share is being made (seconds to minutes the first time), or the sets compared before."""

    text: str = "preparing: model, sets, heads, zero-shot"


@dataclass(frozen=True)
class Started(Event):
    """Trainings begin."""

    num_trials: int  # that the study will have; in a confirm, trainings with fresh seeds
    num_finished: int  # before this command
    concurrency: int
    reason: str  # why not more at a time
    kind: Kind = "trial"  # what is counted

    def line(self) -> str:
        left = counted_trainings(self.num_trials - self.num_finished, self.kind)
        return f"{left} to go, {self.concurrency} at a time ({self.reason})"


@dataclass(frozen=True)
class ConcurrencyChanged(Event):
    """From now on, another number of trainings runs at a time than ``Started`` said."""

    concurrency: int
    reason: str  # why not more at a time

    def line(self) -> str:
        return f"from now on {self.concurrency} at a time ({self.reason})"


@dataclass(frozen=True)
class TrialStarted(Event):
    """A trial or baseline begins, or resumes when ``spec.attempt`` is above 1."""

    spec: TrialSpec


@dataclass(frozen=True)
class TrialStep(Event):
    """A training has gone on by some steps; ``metrics`` are those of its last ones."""

    spec: TrialSpec
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrialEpoch(Event):
    """A training finished an epoch; ``metrics`` is the last line of its ``metrics.jsonl``."""

    spec: TrialSpec
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrialFinished(Event):
    """A trial, a repeat of a baseline, or a training of a confirm has ended and is in the study."""

    row: TrialRow
    is_best: bool  # its values are the best of the study now
    best: str = ""  # name of the study's best trial now; empty where nothing was ranked
    ranked: tuple[TrialRow, ...] = field(default=(), repr=False)  # complete trials and baselines as they stand now

    def line(self) -> str:
        return _result(self.row) + ("  <- best so far" if self.is_best else "")


@dataclass(frozen=True)
class BaselineFinished(Event):
    """A baseline has ended."""

    row: TrialRow

    def line(self) -> str:
        return f"baseline {_result(self.row)}"


@dataclass(frozen=True)
class SoupFinished(Event):
    """A soup was made and measured, or could not be."""

    row: TrialRow

    def line(self) -> str:
        return f"soup {_result(self.row)}"


@dataclass(frozen=True)
class TrialSetAside(Event):
    """The attempts at a training were lost one after the other and did not advance; the others continue."""

    spec: TrialSpec
    reason: str

    def line(self) -> str:
        return f"{self.spec.name}: set aside, {self.reason}"


@dataclass(frozen=True)
class Stopping(Event):
    """A stop was asked for; the search waits for the checkpoints of running trainings."""

    num_running: int
    reason: str = ""  # which budget is used up; empty: somebody asked

    def line(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        saving = f"; saving checkpoints of {counted(self.num_running, 'training')}" if self.num_running else ""
        return f"stopping{why}{saving}"


def _result(row: TrialRow) -> str:
    """Returns the values of a training that has ended, and how it ended."""
    values = " ".join(f"{name}={value_text(value)}" for name, value in row.values.items() if name != "alpha")
    text = f"{row.name} {values}".rstrip()
    if row.objective is None:
        return f"{text}: {row.outcome}, {row.reason}"
    metrics = row.metrics
    text += f": ID {100 * metrics['id_accuracy']:.1f}"
    text += f", OOD {100 * metrics['ood_accuracy']:.1f}" if "ood_accuracy" in metrics else ""
    text += f", objective {100 * row.objective:.1f} %"
    text += f", expected {100 * row.expected:.1f} %" if row.expected is not None else ""
    text += f" at alpha {row.alpha:.2f}" if row.alpha is not None else ""
    text += f"; {words}" if (words := violation_words(metrics)) else ""
    return f"{text}; {'alpha 1.00 ' if row.alpha else ''}not shown above chance" if row.at_chance else text


OnEvent = Callable[[Event], None]


def to_all(*takers: OnEvent) -> OnEvent:
    """Returns what passes events on to all who take them."""

    def take(event: Event) -> None:
        for each in takers:
            each(event)

    return take
