"""Watching a study: again and again on the terminal, and in the browser by optuna-dashboard."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.cli.common import DebugOption, StudyArgument, app, require_versions
from carft_ray.errors import Problem, UsageError

PANEL = "Reading a study"  # of the help


def budget_lines(budget: Mapping[str, Any]) -> list[str]:
    """Returns what `status` says of the budget; nothing for a study without one."""
    from carft_ray.console import duration

    used = []
    if budget["wall_time_s"] is not None and budget["wall_time_used_s"] is not None:
        used.append(f"{duration(budget['wall_time_used_s'])} of {duration(budget['wall_time_s'])} of the wall time")
    if budget["gpu_hours"] is not None:
        used.append(f"{budget['gpu_hours_used']:.3g} of {budget['gpu_hours']:g} GPU hours")
    elif budget["gpu_hours_used"]:
        used.append(f"{budget['gpu_hours_used']:.3g} GPU hours")
    lines = [f"Budget: {' and '.join(used)} used."] if used else []
    return [*lines, *([f"The last search ended early: {budget['ended']}."] if budget["ended"] else [])]


def watch_search(study: Path, every_s: float) -> bool:
    """Shows a study until its search ends or the user has seen enough: a live table on a terminal, lines elsewhere.

    Args:
        study: The study directory.
        every_s: Seconds between two looks.

    Returns:
        Whether the search has ended, so that the last word may follow.
    """
    from carft_ray import console
    from carft_ray.progress import SearchView
    from carft_ray.results.reading import overview

    try:
        with _shown() as show:
            while (view := overview.read_study(study)).holder is not None:
                show(SearchView.of(view))
                time.sleep(every_s)
    except KeyboardInterrupt:
        console.say(f"The search goes on. Stop it: carft-ray stop {shlex.quote(str(study))}")
        return False
    return True


@contextlib.contextmanager
def _shown() -> Iterator[Any]:
    from rich.live import Live

    from carft_ray import console

    if not console.out.is_terminal or console.out.is_dumb_terminal:
        yield lambda view: console.out.print(view.line(), markup=False, soft_wrap=True)
        return
    with Live(console=console.out, auto_refresh=False, transient=True) as live:
        yield lambda view: live.update(view, refresh=True)


@app.command(epilog="Example:  carft-ray dashboard studies/quickstart --port 8080", rich_help_panel=PANEL)
def dashboard(
    study: StudyArgument,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of this machine; 0: a free one.")] = 8080,
    debug: DebugOption = False,
) -> None:
    """Show a study in the browser with optuna-dashboard. It follows a running search and writes nothing.

    Only this machine can see it. Ctrl-C ends it.
    """
    from carft_ray import console
    from carft_ray.results.reading import overview
    from carft_ray.study.dashboard import serve

    require_versions("dashboard")
    study_dir = overview.require_study(study)
    told = False

    def ready(number: int) -> None:
        nonlocal told
        told = True
        console.out.print(f"http://127.0.0.1:{number}/", markup=False)
        console.say("optuna-dashboard, read-only: what is changed there is refused. Ctrl-C ends it.")

    try:
        serve(study_dir, port, ready)
    except KeyboardInterrupt:
        console.next_step(f"carft-ray status {shlex.quote(str(study))}")
    except OSError as error:
        if told:
            raise
        step = "Give another one, or --port 0 for a free one."
        raise UsageError(Problem("--port", "must be free on this machine", str(port), next_step=step)) from error
