"""How a running training and a running search are shown: a bar or a live table on a terminal, one output that is
written again in a notebook, plain lines elsewhere. Bars that count other work.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from carft_ray import console, notebook
from carft_ray.live import SearchView, counted_trainings, stopping_text
from carft_ray.recipe.constraints import violation_words
from carft_ray.untrusted import visible

if TYPE_CHECKING:
    from carft_ray.launch.events import Event
    from carft_ray.study.outcome import Kind, TrialRow

Row = dict[str, float]
REFRESH_PER_S = 2
NUM_LINES = 5  # of epochs and of warnings that a notebook shows


def _bars() -> Progress:
    """Returns bars with a count, a text (the field ``detail``) and the time left."""
    what, detail = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[detail]}"))
    columns = (what, BarColumn(), MofNCompleteColumn(), detail, TimeRemainingColumn())
    return Progress(*columns, console=console.err, transient=True)


@contextlib.contextmanager
def counting() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Gives a function from the name of a task to a callback (done, in all); the tasks are bars on a terminal."""
    bars = _bars()

    def begin(what: str) -> Callable[[int, int], None]:
        task = bars.add_task(visible(what), total=None, visible=console.err.is_terminal, detail="")
        return lambda done, total: bars.update(task, completed=done, total=total)

    with bars if console.err.is_terminal else contextlib.nullcontext():
        yield begin


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
    if notebook.in_notebook():
        yield _in_area(notebook.Area())
        return
    bar = _bars()
    task = bar.add_task("training", total=None, detail="")

    def progress(row: Row) -> None:
        bar.update(task, completed=row["step"], total=row["num_steps"], detail=visible(_step_line(row)))

    def report(row: Row) -> None:
        console.say(_epoch_line(row))

    with bar if console.err.is_terminal else contextlib.nullcontext():
        yield progress, report


def _step_line(row: Row) -> str:
    if "images_per_s" not in row:
        return f"epoch {row['epoch']:.0f}  {_own_numbers(row)}"
    return (
        f"epoch {row['epoch']:.0f}  loss {row['loss']:.3f} (CE {row['ce']:.3f}, KL {row['kl']:.4f})  "
        f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.0f} images/s"
    )


def _epoch_line(row: Row) -> str:
    line = f"epoch {row['epoch']:.0f}: {_own_numbers(row)}"
    if "images_per_s" in row:  # of the built-in loop
        line = f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, CE {row['ce']:.3f}, KL {row['kl']:.4f}"
        line += f", context entropy {row['context_entropy']:.2f} nats"
    if "subset/id_accuracy" in row:
        line += f"; on a subset at alpha {row['subset/alpha']:g}: ID {console.percent(row['subset/id_accuracy'])} %"
    if "subset/ood_accuracy" in row:
        line += f", OOD {console.percent(row['subset/ood_accuracy'])} %"
    return line


def _own_numbers(row: Row) -> str:
    """Returns what a function of the user's own has reported."""
    names = [name for name in row if name not in ("epoch", "step", "num_steps") and not name.startswith("subset/")]
    return ", ".join(f"{name} {row[name]:.4g}" for name in names)


def _in_area(area: notebook.Area) -> tuple[Callable[[Row], None], Callable[[Row], None]]:
    """Returns ``(progress, report)`` that show the step and the last epochs in a notebook."""
    lines: list[str] = []

    def progress(row: Row) -> None:
        area.show(*lines[-NUM_LINES:], f"step {row['step']:.0f} of {row['num_steps']:.0f}: {_step_line(row)}")

    def report(row: Row) -> None:
        lines.append(_epoch_line(row))
        area.show(*lines[-NUM_LINES:], must=True)

    return progress, report


@contextlib.contextmanager
def search_shown(
    show: bool,
    study_dir: Path,
    num_epochs: int,
    on: Console | None = None,
    kind: "Kind" = "trial",
    trainings: Collection[str] | None = None,
) -> Iterator[Callable[["Event"], None]]:
    """Gives what takes the events of ``run_search`` and ``run_confirm``: a live table on a terminal, else plain lines.

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
    is_here = show and on is console.err and notebook.in_notebook()
    if not is_here and (not show or not on.is_terminal or on.is_dumb_terminal):
        yield announce(show, kind)
        return
    rows = [row for row in _earlier(study_dir) if row.kind != "confirm" or trainings is None or row.name in trainings]
    view = SearchView(num_epochs, rows, kind=kind)
    if is_here:
        listener = _Cell(view, notebook.Area(), [])
        try:
            yield listener
        finally:
            listener.end()
        return
    with Live(view, console=on, refresh_per_second=REFRESH_PER_S, transient=True):
        yield _Listener(view, on)


@dataclass(frozen=True)
class _Listener:
    """Takes the events of a search on behalf of its table."""

    view: SearchView
    console: Console

    def __call__(self, event: "Event") -> None:
        line = self.view.update(event)
        if line is not None:
            self.console.print(console.plain(line, "yellow"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes the searcher, and with it this, to a file that nobody reads; a terminal does not go there."""
        return announce, (False,)


@dataclass(frozen=True)
class _Cell:
    """Takes the events of a search on behalf of the output of a notebook's cell."""

    view: SearchView
    area: notebook.Area
    warnings: list[str]

    def __call__(self, event: "Event") -> None:
        line = self.view.update(event)
        self.warnings.extend([line] if line else [])
        self.area.show(*self._notes(), self.view)

    def end(self) -> None:
        """Leaves the line that counts."""
        self.area.show(*self._notes(), self.view.line(), must=True)

    def _notes(self) -> list[Text]:
        return [console.plain(line, "yellow") for line in self.warnings[-NUM_LINES:]]

    def __reduce__(self) -> tuple[Any, ...]:
        """As that of ``_Listener``."""
        return announce, (False,)


def _earlier(study_dir: Path) -> list["TrialRow"]:
    """Returns the rows of a study that is there; none of one that cannot be read, which the search reports."""
    from carft_ray.errors import CarftError
    from carft_ray.study.rows import rows_by_kind

    try:
        return [row for rows in rows_by_kind(study_dir).values() for row in rows]
    except CarftError:
        return []


def announce(show: bool, kind: "Kind" = "trial") -> Callable[["Event"], None]:
    """Returns what prints the events of ``run_search`` and ``run_confirm``: a line per thing that happened.

    Args:
        show: False: only notes are shown.
        kind: What is counted.
    """
    from carft_ray.launch import events

    began = time.monotonic()
    finished = wanted = 0

    def line_of(event: "Event") -> str | None:
        nonlocal finished, wanted
        match event:
            case events.Preparing():
                return event.what
            case events.Decided():
                return event.text
            case events.Started():
                finished, wanted = event.num_finished, event.num_trials
                left = counted_trainings(wanted - finished, kind)
                return f"{left} to go, {event.concurrency} at a time ({event.reason})"
            case events.ConcurrencyChanged():
                return f"from now on {event.concurrency} at a time ({event.reason})"
            case events.BaselineFinished():
                return f"baseline {_result(event.row)}"
            case events.TrialFinished():
                finished += 1
                mark = "  <- best so far" if event.is_best else ""
                # one that an earlier search left finished comes before the search says how many are wanted
                position = f"{finished}/{wanted} " if wanted else ""
                return f"{position}{_result(event.row)}{mark}"
            case events.TrialSetAside():
                return f"{event.spec.name}: set aside, {event.reason}"
            case events.Stopping():
                return stopping_text(event)
        return None

    def on_event(event: "Event") -> None:
        if isinstance(event, events.Note):
            console.warn(event.text)
        elif show and (line := line_of(event)) is not None:
            console.say(f"[{console.duration(time.monotonic() - began)}] {line}")

    return on_event


def _result(row: "TrialRow") -> str:
    values = " ".join(f"{name}={console.value_text(value)}" for name, value in row.values.items() if name != "alpha")
    text = f"{row.name} {values}".rstrip()
    if row.objective is None:
        return f"{text}: {row.outcome}, {row.reason}"
    metrics = row.metrics
    text += f": ID {console.percent(metrics['id_accuracy'])}"
    text += f", OOD {console.percent(metrics['ood_accuracy'])}" if "ood_accuracy" in metrics else ""
    text += f", objective {console.percent(row.objective)} %{' (fitted)' if row.fitted else ''}"
    text += f" at alpha {row.alpha:.2f}" if row.alpha is not None else ""
    text += f"; {words}" if (words := violation_words(metrics)) else ""
    return f"{text}; {'alpha 1.00 ' if row.alpha else ''}at chance" if row.at_chance else text
