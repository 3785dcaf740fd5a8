"""A search as a live table on a terminal: the best trials, those that ended last, what runs, and how far it is."""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from carft_ray import files
from carft_ray.ui import console
from carft_ray.untrusted import visible
from carft_ray.words import counted_trainings, value_text

if TYPE_CHECKING:
    from carft_ray.launch.events import Event, Started
    from carft_ray.results.reading.study_view import Overview
    from carft_ray.study.training import Kind, TrialRow, TrialSpec

NUM_BEST = 5  # rows of the best trials in the live table
NUM_LATEST = 3  # and of those that ended last, where they fit
BAR_WIDTH = 40
EXPECTED = "expected, %"
MEASURED = ("epoch", "ID, %", "OOD, %", "objective, %", EXPECTED, "time")  # columns
_Line = tuple[dict[str, str], str]  # cells of a row by their columns, and its style


@dataclass
class _Running:
    spec: "TrialSpec"
    began: float
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last epoch


class SearchView:
    """A search as a table: the best trials, those that ended last, what runs, a bar, and a line that counts. It keeps
    to the height of the terminal. Rich renders it again and again from a thread of its own, while events come in.

    Args:
        num_epochs: Epochs of a training whose values do not say otherwise.
        earlier: Rows that the study has already.
        clock: Seconds.
        kind: What is counted.
    """

    def __init__(
        self,
        num_epochs: int,
        earlier: Sequence["TrialRow"] = (),
        clock: Callable[[], float] = time.monotonic,
        kind: "Kind" = "trial",
    ) -> None:
        self._num_epochs = num_epochs
        self._kind = kind
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._phase = "starting Ray"
        self._started: Started | None = None
        self._running: dict[tuple[str, str], _Running] = {}
        self._rows = {(row.kind, row.name): row for row in earlier if row.outcome != "running"}
        self._best = ""  # name of the best trial, as the search has reported it
        self._seconds: list[float] = []  # of the trainings that ended in this search

    @classmethod
    def of(cls, overview: "Overview", clock: Callable[[], float] = time.time) -> "SearchView":
        """Returns a study as another process sees it on disk.

        Args:
            overview: The study.
            clock: Seconds since 1970.
        """
        from carft_ray.launch.events import Started
        from carft_ray.layout import METRICS
        from carft_ray.recipe.space import num_trials
        from carft_ray.results.confirm_plan import read_plan
        from carft_ray.study.rows import ZERO_SHOT

        running = {(row.kind, row.name) for row in overview.rows if overview.state(row) == "running"}
        plan = read_plan(overview.study_dir) if any(kind == "confirm" for kind, _ in running) else None
        view = cls(overview.recipe.train.epochs, overview.rows, clock, "trial" if plan is None else "confirm")
        view._began = clock() - (overview.held_s or 0.0)
        for row in overview.rows:
            if (row.kind, row.name) in running:
                lines = files.read_json_lines(overview.study_dir, f"{row.training}/{METRICS}")
                began = overview.since[row.kind, row.name]
                view._running[row.kind, row.name] = _Running(row, began, lines[-1] if lines else {})
            elif row.name != ZERO_SHOT and row.outcome == "complete" and (seconds := row.spent_s or row.elapsed_s):
                view._seconds.append(seconds)
        view._phase = "" if overview.holder else "no search is running"
        view._phase = "stopping; trainings write their checkpoints" if overview.stopping else view._phase
        view._best = "" if overview.best is None else overview.best.name
        at_a_time = overview.at_a_time or (max(1, len(view._running)), "")
        if plan is None:
            view._started = Started(num_trials(overview.recipe), overview.num_finished, *at_a_time)
        else:
            wanted = {name for stage in plan if stage is not None for name in stage.trainings()}
            view._rows = {key: row for key, row in view._rows.items() if key[0] != "confirm" or key[1] in wanted}
            view._started = Started(len(wanted), sum(kind == "confirm" for kind, _ in view._rows), *at_a_time)
        return view

    def line(self) -> str:
        """Returns counts, the best trial and times, for where there is no terminal."""
        with self._lock:
            best = self._ranked(1)
            found = []
            if best and best[0].expected is not None:
                found = [f"expected best {console.percent(best[0].expected)} % ({best[0].name})"]
            elif best:
                found = [f"best {console.percent(best[0].objective or 0.0)} % ({best[0].name})"]
            return " · ".join([*self._pieces(), *found])

    def update(self, event: "Event") -> str | None:
        """Records an event.

        Returns:
            A line to show above the table, for what must not be overlooked.
        """
        from carft_ray.launch import events

        with self._lock:
            match event:
                case events.Note():
                    return f"warning: {event.line()}"
                case events.Decided():
                    return event.line()
                case events.Preparing() | events.Stopping():
                    self._phase = event.line()
                case events.Started():
                    self._started, self._phase = event, ""
                case events.ConcurrencyChanged() if self._started is not None:
                    self._started = replace(self._started, concurrency=event.concurrency, reason=event.reason)
                case events.TrialStarted():
                    self._running[event.spec.kind, event.spec.name] = _Running(event.spec, self._clock())
                case events.TrialEpoch():
                    if (found := self._running.get((event.spec.kind, event.spec.name))) is not None:
                        found.metrics = event.metrics
                case events.TrialSetAside():
                    self._running.pop((event.spec.kind, event.spec.name), None)
                    return event.line()
                case events.BaselineFinished() | events.TrialFinished() | events.SoupFinished():
                    self._best = getattr(event, "best", "") or self._best
                    self._end(event.row)
                    ranked = {(row.kind, row.name): row for row in getattr(event, "ranked", ())}
                    self._rows |= {key: ranked[key] for key in self._rows if key in ranked}
                    return None if event.row.outcome in ("complete", "pruned") else event.line()
            return None

    def _end(self, row: "TrialRow") -> None:
        key = (row.kind, row.name)
        ran = self._running.pop(key, None)
        if ran is not None:
            self._seconds.append(self._clock() - ran.began)
        self._rows.pop(key, None)  # the latest stands last
        self._rows[key] = row

    def __rich_console__(self, console_: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            parts = Group(*self._parts(options.max_width, console_.size.height, console_.encoding.startswith("utf")))
        # the console of messages lets long lines run on; a table must keep to the terminal
        yield from console_.render(parts, options.update(no_wrap=True, overflow="ellipsis"))

    def _parts(self, width: int, height: int, can_star: bool) -> Iterator[Table | Text]:
        space = max(3, height - 9)  # lines but for header, notes, bar, last lines, and one above
        first = (row for row in self._rows.values() if row.kind == "baseline" and not row.repeat_of)
        baselines = [*itertools.islice(first, space // 4)]
        best = self._ranked(min(NUM_BEST, max(1, space // 3)))
        running = list(self._running.values())
        shown = running[: max(1, space - len(baselines) - len(best))]
        left = min(NUM_LATEST, space - len(baselines) - len(best) - len(shown))
        ended = (row for row in reversed(self._rows.values()) if self._counts(row) and row not in best)
        latest = list(itertools.islice(ended, max(0, left)))
        if baselines or best or shown:
            star = ("★" if can_star else "*") if self._kind == "trial" else " "
            lines = [_line(row, " ") for row in baselines]
            lines += [_line(row, " " if index else star) for index, row in enumerate(best)]
            lines += [_line(row, "…" if can_star else " ") for row in latest]
            lines += [self._running_line(each) for each in shown]
            yield _fitting_table(lines, width)
        if len(running) > len(shown):
            yield Text(f"  and {len(running) - len(shown)} more, running", style="dim")
        if any("subset/id_accuracy" in each.metrics for each in shown):
            yield Text("  running trials: accuracies on a subset, at the best of a few alphas", style="dim")
        is_low = height < 12
        if self._started is not None and not is_low:
            yield self._bar(self._started.num_trials, min(width - 8, BAR_WIDTH), can_star)
        last = " · ".join(self._pieces())
        yield Text(visible(last), style="bold", no_wrap=is_low, overflow="ellipsis" if is_low else "fold")

    def _running_line(self, running: _Running) -> _Line:
        spec, metrics = running.spec, running.metrics
        epoch = f"{metrics.get('epoch', 0):.0f}/{spec.values.get('epochs', self._num_epochs)}"
        epoch = "" if spec.kind == "soup" else epoch
        names = ("id_accuracy", "ood_accuracy", "objective")
        accuracies = [*(console.objective_cell(metrics.get(f"subset/{name}")) for name in names), ""]
        elapsed = console.duration(self._clock() - running.began)
        return _cells(f"  {spec.name}", spec.values, [epoch, *accuracies, elapsed]), "cyan"

    def _ranked(self, number: int) -> list["TrialRow"]:
        """Returns the first trials from the best down; trainings of a confirm from the latest back."""
        from carft_ray.study.rows import rank

        return heapq.nsmallest(
            number,
            (row for row in self._rows.values() if row.kind == self._kind and row.objective is not None),
            key=lambda row: (row.name != self._best, *rank(row)) if self._kind == "trial" else (-row.number,),
        )  # the search names the best: of a front, one row does not show it; fresh seeds are no candidates

    def _counts(self, row: "TrialRow") -> bool:
        """Tells whether a row is one of the trainings of which there is a number; a repeat of a baseline is a trial."""
        return row.kind == self._kind or (self._kind == "trial" and bool(row.repeat_of))

    def _bar(self, num_trials: int, width: int, can_draw: bool) -> Text:
        ended = sum(map(self._counts, self._rows.values()))
        share = min(1.0, ended / max(1, num_trials))
        full = int(share * width)
        dash, rest = ("━", "─") if can_draw else ("#", "-")
        return Text.assemble((dash * full, "green"), (rest * (width - full), "dim"), f" {100 * share:.0f} %")

    def _pieces(self) -> list[str]:
        trials = [row for row in self._rows.values() if self._counts(row)]
        pruned = sum(row.outcome == "pruned" for row in trials)
        failed = sum(row.objective is None for row in trials) - pruned
        pieces = [f"{console.duration(self._clock() - self._began)} elapsed"]
        if (started := self._started) is not None:
            count = f"{len(trials)} of {counted_trainings(started.num_trials, self._kind)} finished"
            count += "".join(f", {n} of them {what}" for what, n in (("pruned", pruned), ("failed", failed)) if n)
            at_a_time = f"{started.concurrency} at a time ({started.reason})"
            pieces = [count, at_a_time if started.reason else f"{len(self._running)} running", *pieces]
            left = self._seconds_left(started.num_trials - len(trials))
            if left is not None and not self._phase:
                pieces.append(f"about {console.duration(left)} left")
        return [self._phase, *pieces] if self._phase else pieces

    def _seconds_left(self, num_left: int) -> float | None:
        """Estimates the rest from the trainings that ended in this search; None before the first has."""
        if self._started is None or not self._seconds:
            return None
        each = sum(self._seconds) / len(self._seconds)
        running = [max(each - (self._clock() - ran.began), 0.0) for ran in self._running.values()]
        num_running = sum(ran.spec.kind == self._kind for ran in self._running.values())
        waiting = each * max(num_left - num_running, 0)
        return max((sum(running) + waiting) / max(1, self._started.concurrency), max(running, default=0.0))


def _cells(name: str, values: Mapping[str, Any], measured: Sequence[str]) -> dict[str, str]:
    """Returns the cells of a row by their columns."""
    texts = {key: value_text(value) for key, value in values.items() if key != "alpha"}
    return {"": name, **texts, **dict(zip(MEASURED, measured, strict=True))}


def _line(row: "TrialRow", mark: str) -> _Line:
    accuracies = [console.objective_cell(row.metrics.get(name)) for name in ("id_accuracy", "ood_accuracy")]
    ended = "" if row.outcome in ("complete", "running") else row.outcome
    objectives = map(console.objective_cell, (row.objective, row.expected))
    measured = [ended, *accuracies, *objectives, console.elapsed_cell(row.elapsed_s)]
    style = "bold green" if mark in "★*" else "dim" if row.kind == "baseline" else ""
    return _cells(f"{mark} {row.name}", row.values, measured), style


def _fitting_table(lines: Sequence[_Line], width: int) -> Table:
    """Returns the table of these rows; hyperparameters that do not fit are left out, the last ones first."""
    names = [name for name in dict.fromkeys(name for cells, _ in lines for name in cells) if name not in MEASURED]
    columns = {name: [cells.get(name, "") for cells, _ in lines] for name in (*names, *MEASURED)}
    if not any(columns[EXPECTED]):  # of a front, of a confirm, and before the first trial has ended
        del columns[EXPECTED]
    while len(names) > 1 and sum(2 + max(map(len, (name, *cells))) for name, cells in columns.items()) > width:
        del columns[names.pop()]
    made = console.table(console.numbers(*columns, no_wrap=True), zip(*columns.values(), strict=True))
    made.columns[0].justify = "left"
    for row, (_, style) in zip(made.rows, lines, strict=True):
        row.style = style
    return made
