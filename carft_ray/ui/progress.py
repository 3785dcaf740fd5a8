"""How a running training and a running search are shown: a bar or a live table on a terminal, one output that is
written again in a notebook, plain lines elsewhere. Bars that count other work.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from carft_ray.ui import console, notebook
from carft_ray.ui.live import SearchView
from carft_ray.untrusted import visible
from carft_ray.words import time_left

if TYPE_CHECKING:
    from carft_ray.launch.events import Event
    from carft_ray.study.training import Kind, TrialRow

Row = dict[str, float]
REFRESH_PER_S = 2
logger = logging.getLogger(__name__)


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
def images_shown(show: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback (done, in all): a bar with the time left on a terminal, lines of it elsewhere.

    Args:
        show: False: nothing is shown.
        what: What is done.
    """
    if not show or not console.err.is_terminal:
        yield time_left(console.sayer(show), what)
        return
    with counting() as begin:
        yield begin(what)


@contextlib.contextmanager
def training_shown(show: bool) -> Iterator[Callable[["Event"], None]]:
    """Gives what takes the events of ``train_once``: a bar with loss, its terms, learning rate and speed, a line per
    epoch, and lines of what is done before and at the end.

    Args:
        show: False: only notes are shown.
    """
    from carft_ray.launch import events

    bar, area = _bars(), notebook.Area() if notebook.in_notebook() else None
    task = bar.add_task("training", total=None, detail="")

    def on_event(event: "Event") -> None:
        match event:
            case events.Note(text):
                logger.warning("%s", text)
            case _ if not show:
                pass
            case events.TrialStep(_, row):
                bar.update(task, completed=row["step"], total=row["num_steps"], detail=visible(_step_line(row)))
                if area:
                    area.show(bar)
            case events.TrialEpoch(_, row) if area:
                area.show(bar, _epoch_line(row))
            case events.TrialEpoch(_, row):
                console.say(_epoch_line(row))
            case events.Preparing() | events.Stopping():
                console.say(event.line())

    with bar if show and console.err.is_terminal else contextlib.nullcontext():
        yield on_event


def _step_line(row: Row) -> str:
    if "images_per_s" not in row:
        return f"epoch {row['epoch']:.0f}  {_own_numbers(row)}"
    return (
        f"epoch {row['epoch']:.0f}  loss {row['loss']:.3f} ({_terms(row)})  "
        f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.0f} images/s"
    )


def _epoch_line(row: Row) -> str:
    line = f"epoch {row['epoch']:.0f}: {_own_numbers(row)}"
    if "images_per_s" in row:  # of the built-in loop
        line = f"epoch {row['epoch']:.0f}: loss {row['loss']:.3f}, {_terms(row)}"
        line += f", context entropy {row['context_entropy']:.2f} nats"
    if "subset/id_accuracy" in row:
        line += f"; on a subset at alpha {row['subset/alpha']:g}: ID {console.percent(row['subset/id_accuracy'])} %"
    if "subset/ood_accuracy" in row:
        line += f", OOD {console.percent(row['subset/ood_accuracy'])} %"
    return line


def _terms(row: Row) -> str:
    """Returns CE, KL, and the penalties that have a weight, by their names in ``metrics.jsonl``."""
    from carft_ray.recipe.schema.train import PENALTIES

    others = [f"{name} {row[name]:.3g}" for name in row if name != "kl" and f"{name}_weight" in PENALTIES]
    return ", ".join([f"CE {row['ce']:.3f}", f"KL {row['kl']:.4f}", *others])


def _own_numbers(row: Row) -> str:
    """Returns what a function of the user's own has reported."""
    names = [name for name in row if name not in ("epoch", "step", "num_steps") and not name.startswith("subset/")]
    return ", ".join(f"{name} {row[name]:.4g}" for name in names)


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
    area = notebook.Area() if show and on is console.err and notebook.in_notebook() else None
    if not area and (not show or not on.is_terminal or on.is_dumb_terminal):
        yield announce(show)
        return
    rows = [row for row in _earlier(study_dir) if row.kind != "confirm" or trainings is None or row.name in trainings]
    view = SearchView(num_epochs, rows, kind=kind)

    def update(event: "Event") -> None:
        line = console.plain(view.update(event) or "", "yellow")
        if area:
            area.show(view, line)
        elif line:
            on.print(line)

    live = None if area else Live(view, console=on, refresh_per_second=REFRESH_PER_S, transient=True)
    try:
        with live or contextlib.nullcontext():
            yield update
    finally:
        if area:  # what stays is the line that counts
            area.show(view.line(), must=True)


def _earlier(study_dir: Path) -> list["TrialRow"]:
    """Returns the rows of a study that is there; none of one that cannot be read, which the search reports."""
    from carft_ray.errors import CarftError
    from carft_ray.study.snapshot import snapshot

    try:
        return snapshot(study_dir).rows
    except CarftError:
        return []


def announce(show: bool) -> Callable[["Event"], None]:
    """Returns what prints the events of ``run_search`` and ``run_confirm``: a line per thing that happened.

    Args:
        show: False: only notes are shown.
    """
    from carft_ray.launch import events

    began = time.monotonic()
    finished = wanted = 0

    def on_event(event: "Event") -> None:
        nonlocal finished, wanted
        if isinstance(event, events.Note):
            console.warn(event.line())
            return
        line = event.line()
        if isinstance(event, events.Started):
            finished, wanted = event.num_finished, event.num_trials
        elif isinstance(event, events.TrialFinished):
            finished += 1
            if wanted:  # else an earlier search has left it finished, and this one has not begun yet
                line = f"{finished}/{wanted} {line}"
        if show and line:
            console.say(f"[{console.duration(time.monotonic() - began)}] {line}")

    return on_event
