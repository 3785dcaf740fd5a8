"""How a running training and a running search are shown: a bar or a live table on a terminal, plain lines elsewhere."""

import contextlib
import heapq
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from carft_ray import console, files
from carft_ray.recipe.constraints import violation_words
from carft_ray.words import counted

if TYPE_CHECKING:
    from carft_ray.launch.events import Event, Started, Stopping
    from carft_ray.results.reading.overview import Overview
    from carft_ray.study.outcome import Kind, TrialRow, TrialSpec

Row = dict[str, float]
NUM_BEST = 5  # rows of the best trials in the live table
NUM_LATEST = 3  # and of those that ended last, where there is room
BAR_WIDTH = 40
SEEN_FOR_A_RANGE = 3  # trainings that must have ended before the rest of the time has a range
IN_RANGE = 1.28  # standard deviations on either side hold 80 %
REFRESH_PER_S = 2


@contextlib.contextmanager
def training_shown(show: bool) -> Iterator[tuple[Callable[[Row], None], Callable[[Row], None]]]:
    """Gives ``(progress, report)`` of a training's context: a bar with loss, CE, KL, learning rate and speed, and a
    line per epoch.

    Args:
        show: False: nothing is shown.
    """
    if not show:
        yield (lambda row: None), (lambda row: None)
        return
    bar = console.training_progress()
    task = bar.add_task("training", total=None, detail="")

    def progress(row: Row) -> None:
        detail = (
            f"epoch {row['epoch']:.0f}  loss {row['loss']:.3f} (CE {row['ce']:.3f}, KL {row['kl']:.4f})  "
            f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.0f} images/s"
        )
        bar.update(task, completed=row["step"], total=row["num_steps"], detail=detail)

    def report(row: Row) -> None:
        line = f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, CE {row['ce']:.3f}, KL {row['kl']:.4f}"
        line += f", context entropy {row['context_entropy']:.2f} nats"
        if "subset/id_accuracy" in row:
            line += f"; on a subset at alpha {row['subset/alpha']:g}: ID {console.percent(row['subset/id_accuracy'])} %"
        if "subset/ood_accuracy" in row:
            line += f", OOD {console.percent(row['subset/ood_accuracy'])} %"
        bar.console.print(line, markup=False)

    with bar if console.err.is_terminal else contextlib.nullcontext():
        yield progress, report


@contextlib.contextmanager
def search_shown(
    show: bool,
    study_dir: Path,
    num_epochs: int,
    on: Console | None = None,
    kind: "Kind" = "trial",
    trainings: Collection[str] | None = None,
) -> Iterator[Callable[["Event"], None]]:
    """Gives what ``run_search`` and ``run_confirm`` tell their events to: a live table on a terminal, else plain lines.

    The table is gone when the block ends, however it ends: results and messages follow it.

    Args:
        show: False: only notes are shown.
        study_dir: Its finished trials, when it is a study already, are in the table from the start.
        num_epochs: Epochs of a training that does not say otherwise.
        on: Where to show it; by default standard error.
        kind: What is counted: trials, or the trainings of a confirm.
        trainings: Names of those that count in a confirm: the study may have others, of another stage. None: all.
    """
    on = on or console.err
    if not show or not on.is_terminal or on.is_dumb_terminal:
        yield announce(show, kind)
        return
    counted = [
        row for row in _earlier(study_dir) if row.kind != "confirm" or trainings is None or row.name in trainings
    ]
    view = SearchView(num_epochs, counted, kind=kind)
    with Live(view, console=on, refresh_per_second=REFRESH_PER_S, transient=True):
        yield _Listener(view, on)


@dataclass(frozen=True)
class _Listener:
    """Takes the events of a search on behalf of its table."""

    view: "SearchView"
    console: Console

    def __call__(self, event: "Event") -> None:
        line = self.view.tell(event)
        if line is not None:
            self.console.print(Text(line, style="yellow"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes the searcher, and with it this, to a file that nobody reads; a terminal does not go there."""
        return announce, (False,)


def _earlier(study_dir: Path) -> list["TrialRow"]:
    """Returns the rows of a study that is there; none of one that cannot be read, which the search will tell."""
    from carft_ray.errors import CarftError
    from carft_ray.study.rows import rows_by_kind

    try:
        return [row for rows in rows_by_kind(study_dir).values() for row in rows]
    except CarftError:
        return []


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
        self._best = ""  # name of the best trial, as the search has told it
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
        from carft_ray.recipe.spaces.grid import num_trials
        from carft_ray.results.reading.overview import alive_since, folder_of, search_began
        from carft_ray.study.outcome import TrialSpec
        from carft_ray.study.rows import ZERO_SHOT

        view = cls(overview.recipe.train.epochs, overview.rows, clock)
        view._began = search_began(overview.study_dir) or clock()
        for row in overview.rows:
            if overview.state(row) == "running":
                spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
                lines = files.read_json_lines(folder_of(overview.study_dir, row) / METRICS)
                began = alive_since(overview.study_dir, row) or clock()
                view._running[row.kind, row.name] = _Running(spec, began, lines[-1] if lines else {})
            elif row.name != ZERO_SHOT and row.outcome == "complete" and (row.spent_s or row.elapsed_s):
                view._seconds.append(row.spent_s or row.elapsed_s or 0.0)
        view._phase = "" if overview.holder else "no search runs"
        view._phase = "stopping; trainings write their checkpoints" if overview.stopping else view._phase
        view._best = "" if overview.best is None else overview.best.name
        num_running = max(1, len(view._running))
        view._started = Started(num_trials(overview.recipe), overview.num_finished, num_running, "")
        return view

    def line(self) -> str:
        """Returns counts, the best trial and times, for where there is no terminal."""
        with self._lock:
            best = self._ranked(1)
            found = [f"best {console.percent(best[0].objective or 0.0)} % ({best[0].name})"] if best else []
            return " · ".join([*self._pieces(), *found])

    def tell(self, event: "Event") -> str | None:
        """Takes an event in.

        Returns:
            A line to show above the table, for what must not be overlooked.
        """
        from carft_ray.launch import events

        with self._lock:
            if isinstance(event, events.Note):
                return f"warning: {event.text}"
            if isinstance(event, events.Preparing):
                self._phase = event.what
            elif isinstance(event, events.Started):
                self._started, self._phase = event, ""
            elif isinstance(event, events.ConcurrencyChanged):
                if self._started is not None:
                    self._started = replace(self._started, concurrency=event.concurrency, reason=event.reason)
            elif isinstance(event, events.TrialStarted):
                self._running[event.spec.kind, event.spec.name] = _Running(event.spec, self._clock())
            elif isinstance(event, events.TrialEpoch):
                found = self._running.get((event.spec.kind, event.spec.name))
                if found is not None:
                    found.metrics = event.metrics
            elif isinstance(event, events.Stopping):
                self._phase = _stopping(event)
            elif isinstance(event, events.TrialSetAside):
                self._running.pop((event.spec.kind, event.spec.name), None)
                return f"{event.spec.name}: set aside, {event.reason}"
            elif isinstance(event, events.TrialFinished | events.BaselineFinished):
                if isinstance(event, events.TrialFinished):
                    self._best = event.best or self._best
                return self._end(event.row)
            return None

    def _end(self, row: "TrialRow") -> str | None:
        key = (row.kind, row.name)
        ran = self._running.pop(key, None)
        if ran is not None:
            self._seconds.append(self._clock() - ran.began)
        self._rows.pop(key, None)  # the latest stands last
        self._rows[key] = row
        return None if row.outcome in ("complete", "pruned") else f"{row.name}: {row.outcome}, {row.reason}"

    def __rich_console__(self, console_: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            parts = Group(*self._parts(options.max_width, console_.size.height, console_.encoding.startswith("utf")))
        # the console of messages lets long lines run on; a table must keep to the terminal
        yield from console_.render(parts, options.update(no_wrap=True, overflow="ellipsis"))

    def _parts(self, width: int, height: int, can_star: bool) -> Iterator[Table | Text]:
        room = max(3, height - 9)  # lines but for header, notes, bar, last lines, and one above
        beside = [row for row in self._rows.values() if row.kind == "baseline"][: room // 4]
        ranks = self._kind == "trial"  # fresh seeds are no candidates: none of them is the best
        best = self._ranked(min(NUM_BEST, max(1, room // 3)))
        running = list(self._running.values())
        shown = running[: max(1, room - len(beside) - len(best))]
        left = min(NUM_LATEST, room - len(beside) - len(best) - len(shown))
        names = {row.name for row in best}
        ended = (row for row in reversed(self._rows.values()) if row.kind == self._kind and row.name not in names)
        latest = list(itertools.islice(ended, max(0, left)))
        if beside or best or shown:
            star = "★" if can_star else "*"
            rows = [_line(row, " ") for row in beside]
            rows += [_line(row, star if ranks and row is best[0] else " ") for row in best]
            rows += [_line(row, "…" if can_star else " ") for row in latest]
            rows += [self._running_line(each) for each in shown]
            yield _fitting_table(rows, width)
        if any(row.fitted for row in (*beside, *best, *latest)):
            yield Text(f"  {console.FITTED}", style="dim")
        if len(running) > len(shown):
            yield Text(f"  and {len(running) - len(shown)} more, running", style="dim")
        if any("subset/id_accuracy" in each.metrics for each in shown):
            yield Text("  of running trials: on a subset, at the best of a few alphas", style="dim")
        if self._started is not None and height >= 12:
            yield self._bar(min(width - 8, BAR_WIDTH), can_star)
        yield Text(
            self._last_line(), style="bold", no_wrap=height < 12, overflow="fold" if height >= 12 else "ellipsis"
        )

    def _running_line(self, running: _Running) -> "_Line":
        spec, metrics = running.spec, running.metrics
        wanted = spec.values.get("epochs", self._num_epochs)
        accuracies = [metrics.get(f"subset/{name}") for name in ("id_accuracy", "ood_accuracy", "objective")]
        numbers = ["" if value is None else console.percent(value) for value in accuracies]
        epoch = f"{metrics.get('epoch', 0):.0f}/{wanted}"
        elapsed = console.duration(self._clock() - running.began)
        return _Line(f"  {spec.name}", spec.values, [epoch, *numbers, elapsed], "cyan")

    def _ranked(self, number: int) -> list["TrialRow"]:
        """Returns the first trials from the best down; trainings of a confirm from the latest back."""
        from carft_ray.study.rows import rank

        ranks = self._kind == "trial"  # fresh seeds are no candidates: none of them is the best
        return heapq.nsmallest(
            number,
            (row for row in self._rows.values() if row.kind == self._kind and row.objective is not None),
            key=lambda row: (row.name != self._best, *rank(row)) if ranks else (-row.number,),
        )  # the best was told: of a front one row does not tell

    def _bar(self, width: int, can_draw: bool) -> Text:
        ended = sum(row.kind == self._kind for row in self._rows.values())
        share = min(1.0, ended / max(1, self._started.num_trials if self._started else 1))
        full = int(share * width)
        dash, rest = ("━", "─") if can_draw else ("#", "-")
        return Text.assemble((dash * full, "green"), (rest * (width - full), "dim"), f" {100 * share:.0f} %")

    def _last_line(self) -> str:
        return " · ".join(self._pieces())

    def _pieces(self) -> list[str]:
        trials = [row for row in self._rows.values() if row.kind == self._kind]
        pruned = sum(row.outcome == "pruned" for row in trials)
        failed = sum(row.objective is None for row in trials) - pruned
        elapsed = f"{console.duration(self._clock() - self._began)} elapsed"
        pieces = [elapsed]
        if self._started is not None:
            count = f"{len(trials)} of {_counted(self._started.num_trials, self._kind)} finished"
            if pruned:
                count += f", {pruned} of them pruned"
            if failed:
                count += f", {failed} of them failed"
            room = f"{self._started.concurrency} at a time ({self._started.reason})"
            pieces = [count, room if self._started.reason else f"{len(self._running)} running", elapsed]
            left = self._seconds_left(self._started.num_trials - len(trials))
            if left is not None and not self._phase:
                spread = self._spread(self._started.num_trials - len(trials))
                between = f"{console.duration(max(0.0, left - spread))} to {console.duration(left + spread)}"
                pieces.append(f"about {console.duration(left)} left" + (f" ({between})" if spread >= 1 else ""))
        return [self._phase, *pieces] if self._phase else pieces

    def _spread(self, num_left: int) -> float:
        """Returns half the width of the range of the rest that holds 80 %, 0 before enough has been seen.

        The sum of k further trainings, with the mean of n as its forecast, has the standard error sd sqrt(k + k^2 / n).
        """
        seen = len(self._seconds)
        if self._started is None or seen < SEEN_FOR_A_RANGE or num_left <= 0:
            return 0.0
        of_sum = statistics.stdev(self._seconds) * math.sqrt(num_left + num_left**2 / seen)
        return IN_RANGE * of_sum / self._started.concurrency

    def _seconds_left(self, num_left: int) -> float | None:
        """Estimates the rest from the trainings that ended in this search; None before the first has."""
        if self._started is None or not self._seconds:
            return None
        each = sum(self._seconds) / len(self._seconds)
        running = [max(each - (self._clock() - ran.began), 0.0) for ran in self._running.values()]
        num_running = sum(ran.spec.kind == self._kind for ran in self._running.values())
        waiting = each * max(num_left - num_running, 0)
        return max((sum(running) + waiting) / self._started.concurrency, max(running, default=0.0))


@dataclass(frozen=True)
class _Line:
    """A row of the live table.

    Attributes:
        name: With the mark of the best.
        values: Hyperparameters.
        cells: Epoch, ID, OOD, objective (``~``: of the fitted curve), time.
        style: Of Rich.
    """

    name: str
    values: dict[str, Any]
    cells: list[str]
    style: str


def _line(row: "TrialRow", mark: str) -> _Line:
    names = ("id_accuracy", "ood_accuracy")
    numbers = [console.percent(row.metrics[name]) if name in row.metrics else "" for name in names]
    objective = console.objective_cell(row.objective, row.fitted)
    seconds = row.elapsed_s or 0.0
    elapsed = console.duration(seconds) if seconds >= 0.5 else ""  # zero-shot takes none
    style = "bold green" if mark in "★*" else "dim" if row.kind == "baseline" else ""
    ended = "" if row.outcome in ("complete", "running") else row.outcome
    return _Line(f"{mark} {row.name}", row.values, [ended, *numbers, objective, elapsed], style)


def _fitting_table(lines: Sequence[_Line], width: int) -> Table:
    """Returns the table of these rows; hyperparameters that find no room are left out, the last ones first."""
    columns = {"": [line.name for line in lines]}
    for name in dict.fromkeys(name for line in lines for name in line.values if name != "alpha"):
        columns[name] = [console.value_text(line.values[name]) if name in line.values else "" for line in lines]
    droppable = list(columns)[1:]
    for index, name in enumerate(("epoch", "ID, %", "OOD, %", "objective, %", "time")):
        columns[name] = [line.cells[index] for line in lines]

    def needed() -> int:
        return sum(2 + max(len(name), *(len(cell) for cell in cells)) for name, cells in columns.items())

    while droppable and needed() > width:
        del columns[droppable.pop()]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for index, line in enumerate(lines):
        table.add_row(*(cells[index] for cells in columns.values()), style=line.style)
    return table


def announce(show: bool, kind: "Kind" = "trial") -> Callable[["Event"], None]:
    """Returns what ``run_search`` and ``run_confirm`` tell their events to: a line per thing that happened.

    Args:
        show: False: only notes are shown.
        kind: What is counted.
    """
    from carft_ray.launch import events

    began = time.monotonic()
    state = {"finished": 0, "wanted": 0}

    def clock() -> str:
        return f"[{console.duration(time.monotonic() - began)}]"

    def on_event(event: "Event") -> None:
        if isinstance(event, events.Note):
            console.warn(event.text)
        elif not show:
            return
        elif isinstance(event, events.Preparing):
            console.say(f"{clock()} {event.what}")
        elif isinstance(event, events.Started):
            state.update(finished=event.num_finished, wanted=event.num_trials)
            left = event.num_trials - event.num_finished
            console.say(f"{clock()} {_counted(left, kind)} to go, {event.concurrency} at a time ({event.reason})")
        elif isinstance(event, events.BaselineFinished):
            console.say(f"{clock()} baseline {_result(event.row)}")
        elif isinstance(event, events.TrialFinished):
            state["finished"] += 1
            mark = "  <- best so far" if event.is_best else ""
            # one that an earlier search left finished is told before the search says how many are wanted
            position = f"{state['finished']}/{state['wanted']} " if state["wanted"] else ""
            console.say(f"{clock()} {position}{_result(event.row)}{mark}")
        elif isinstance(event, events.TrialSetAside):
            console.say(f"{clock()} {event.spec.name}: set aside, {event.reason}")
        elif isinstance(event, events.Stopping):
            console.say(f"{clock()} {_stopping(event)}")

    return on_event


def _counted(number: int, kind: "Kind") -> str:
    return counted(number, "trial") if kind == "trial" else f"{counted(number, 'training')} with fresh seeds"


def _stopping(event: "Stopping") -> str:
    why = f" ({event.reason})" if event.reason else ""
    saving = f"; saving checkpoints of {counted(event.num_running, 'training')}" if event.num_running else ""
    return f"stopping{why}{saving}"


def _result(row: "TrialRow") -> str:
    values = " ".join(f"{name}={console.value_text(value)}" for name, value in row.values.items() if name != "alpha")
    text = f"{row.name} {values}".rstrip()
    if row.objective is None:
        return f"{text}: {row.outcome}, {row.reason}"
    metrics = row.metrics
    ood = f", OOD {console.percent(metrics['ood_accuracy'])}" if "ood_accuracy" in metrics else ""
    at = f" at alpha {row.alpha:.2f}" if row.alpha is not None else ""
    missed = f"; {words}" if (words := violation_words(metrics)) else ""
    missed += "; alpha 1.00 at chance" if row.at_chance else ""
    accuracies = f"ID {console.percent(metrics['id_accuracy'])}{ood}"
    fitted = " (fitted)" if row.fitted else ""
    return f"{text}: {accuracies}, objective {console.percent(row.objective)} %{fitted}{at}{missed}"
