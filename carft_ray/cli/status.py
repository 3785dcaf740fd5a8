"""Reading a study: nothing is locked, nothing is written. On the terminal, and in the browser by optuna-dashboard."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.ui import console
from carft_ray.words import counted, times

ORDERS = ("objective", "number")


@common.command("status studies/quickstart", common.READING, reads=True)
def status(
    study: common.StudyArgument,
    watch: Annotated[bool, Option("--watch", help="Show it repeatedly until the search ends or Ctrl-C.")] = False,
    every: Annotated[float, Option(min=0.5, metavar="SECONDS", help="With --watch: how often.")] = 2,
    json_: common.JsonOption = False,
) -> None:
    """Show how far a study is: counts, the best trial, what runs, the budget. Nothing is locked or written."""
    from carft_ray.results.reading import documents, overview

    if watch and json_:
        raise UsageError(Problem("--json", "must stand without --watch: a document ends"))
    if watch and not _watch(study, every):
        return
    view = overview.read_study(study)
    answer = documents.status(view)
    if console.print_json(answer, json_):
        return
    console.show(f"{answer['name']}: {answer['finished']} of {counted(answer['wanted'], 'trial')} finished.")
    states = console.numbers(*(state.replace("_", " ") for state in answer["trials"]))
    console.show(console.table(states, [[str(count) for count in answer["trials"].values()]]))
    if answer["outside"]:
        console.show(f"Outside the present search space: {answer['outside']} of them; the sampler ignores these.")
    rows = [*answer["baselines"], *([answer["best"]] if answer["best"] else [])]
    shown = {row["name"] for row in rows}
    rows += [row for row in (*answer["running"], *answer["stopped"], *answer["set_aside"]) if row["name"] not in shown]
    if rows:
        console.show()
        console.show(console.trial_table(rows))
    for line in answer["lines"]:
        console.show(line)
    if answer["confirm"]:
        done, begun = answer["confirm"]["complete"], sum(answer["confirm"].values())
        console.show(f"\nConfirm: {done} of {counted(begun, 'training')} with fresh seeds finished.")
    if answer["ledger"]["test_reads"]:
        console.show(f"\nTest sets were read {times(answer['ledger']['test_reads'])}.")
    for problem in answer["ledger"]["problems"]:
        console.warn(problem)
    for line in _budget_lines(answer["budget"]):
        console.show(f"\n{line}")
    if answer["pruner"]:
        console.show("\n" + "\n".join(answer["pruner"]["lines"]))
        if answer["pruner"]["warning"]:
            console.warn(answer["pruner"]["warning"])
    if not view.recipe.data.ood_val:
        console.show("\nSelected on ID only: the recipe has no ood_val.")
    if view.holder is None:
        console.say("\nNo search runs on it.")
    else:
        asked = "; it was asked to stop" if view.stopping else ""
        console.say(f"\nA search runs on it: {view.holder}{asked}.")
        if view.at_a_time is not None:
            console.say(f"{view.at_a_time[0]} at a time ({view.at_a_time[1]}).")
    common.suggest(study, "status")


def _budget_lines(budget: Mapping[str, Any]) -> Iterator[str]:
    """Yields what `status` shows of the budget; nothing for a study without one."""
    used = []
    if budget["wall_time_s"] is not None and budget["wall_time_used_s"] is not None:
        spent, limit = (console.duration(budget[key]) for key in ("wall_time_used_s", "wall_time_s"))
        used.append(f"{spent} of {limit} of the wall time")
    if budget["gpu_hours"] is not None or budget["gpu_hours_used"]:
        limited = "" if budget["gpu_hours"] is None else f" of {budget['gpu_hours']:g}"
        used.append(f"{budget['gpu_hours_used']:.3g}{limited} GPU hours")
    if used:
        yield f"Budget: {' and '.join(used)} used."
    if budget["ended"]:
        yield f"The last search ended early: {budget['ended']}."


def _watch(study: Path, every_s: float) -> bool:
    """Shows a study until its search ends or the user has seen enough: a live table on a terminal, lines elsewhere.

    Args:
        study: The study directory.
        every_s: Seconds between two reads.

    Returns:
        Whether the search has ended, so that its status may follow.
    """
    from rich.live import Live

    from carft_ray.results.reading import overview
    from carft_ray.ui.live import SearchView

    on_terminal = console.out.is_terminal and not console.out.is_dumb_terminal
    live = Live(console=console.out, auto_refresh=False, transient=True)
    try:
        with live if on_terminal else contextlib.nullcontext():
            while (view := overview.read_study(study)).holder is not None:
                if on_terminal:
                    live.update(SearchView.of(view), refresh=True)
                else:
                    console.show(SearchView.of(view).line())
                time.sleep(every_s)
    except KeyboardInterrupt:
        console.say(f"The search continues. Stop it: carft-ray stop {shlex.quote(str(study))}")
        return False
    return True


@common.command("ls studies/quickstart --sort objective --limit 10", common.READING, reads=True)
def list_(
    folder: Annotated[Path, Argument(help="A study, or a folder with studies in it.", show_default=False)],
    sort: Annotated[str, Option(metavar="objective|number", help="Order of the trials.")] = "objective",
    limit: Annotated[int | None, Option(min=1, help="Only so many trials.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """List the trials of a study, or the studies of a folder. Nothing is locked or written."""
    from carft_ray.results.reading import documents, overview

    require_choice("--sort", "must be an order", sort, ORDERS)
    if not overview.is_study(folder):
        studies = documents.list_studies(folder)
        if not console.print_json({"folder": str(folder), "studies": studies}, json_):
            console.show(console.study_table(studies))
            console.next_step(f"carft-ray status {shlex.quote(str(folder / studies[0]['name']))}")
        return
    answer = documents.listing(overview.read_study(folder), by_objective=sort == "objective", limit=limit)
    if console.print_json(answer, json_):
        return
    rows = [*answer["baselines"], *answer["trials"]]
    if rows:
        console.show(console.trial_table(rows))
    for line in answer["lines"]:
        console.show(line)
    left_out = answer["num_trials"] - len(answer["trials"])
    if left_out:
        console.say(f"{counted(left_out, 'more trial')}; without --limit all are shown.")
    if not answer["num_trials"]:
        console.say("No trial has begun yet.")
    quoted = shlex.quote(str(folder))
    named = [f"carft-ray logs {quoted} {answer['trials'][0]['name']}"] if answer["trials"] else []
    console.next_step(f"carft-ray status {quoted}", *named)


@common.command("logs studies/quickstart 7 --follow", common.READING, reads=True)
def logs(
    study: common.StudyArgument,
    trial: Annotated[str, Argument(help="Trial (7, t0007) or name of a baseline.", show_default=False)],
    follow: Annotated[bool, Option("--follow", "-f", help="Print new lines until its training ends.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Print the log of one trial: when its attempts began, and the traceback of one that failed."""
    from carft_ray.results.reading import logs, overview
    from carft_ray.study.rows import ZERO_SHOT

    if follow and json_:
        raise UsageError(Problem("--json", "must stand without --follow: a document ends"))
    view = overview.read_study(study)
    row, path = logs.find_log(view, trial)
    lines = logs.read_log(path)
    if console.print_json(lines or [], json_):
        return
    if follow and view.holder is not None and row.outcome == "running":
        try:
            for line in logs.follow_log(path, view.study_dir):
                console.show(line)
        except KeyboardInterrupt:
            console.say("The search continues.")
    elif lines is None:
        why = "the zero-shot model is not trained" if row.name == ZERO_SHOT else f"it is {view.state(row)}"
        console.say(f"{row.name} has no log: {why}.")
    else:
        for line in lines:
            console.show(line)
    console.next_step(f"carft-ray status {shlex.quote(str(study))}")


@common.command("dashboard studies/quickstart --port 8080", common.READING, reads=True)
def dashboard(
    study: common.StudyArgument,
    port: Annotated[int, Option(min=0, max=65535, help="Of this machine; 0: a free one.")] = 8080,
) -> None:
    """Show a study in the browser with optuna-dashboard. It follows a running search and writes nothing.

    Only this machine can see it. Ctrl-C ends it.
    """
    from carft_ray.api.checks import require_versions
    from carft_ray.results.reading import overview
    from carft_ray.study.dashboard import serve

    require_versions("dashboard")
    study_dir = overview.require_study(study)
    ready: list[int] = []  # the port, once pages are served

    def on_ready(number: int) -> None:
        ready.append(number)
        console.show(f"http://127.0.0.1:{number}/")
        console.say("optuna-dashboard, read-only: what is changed there is refused. Ctrl-C ends it.")

    try:
        serve(study_dir, port, on_ready)
    except KeyboardInterrupt:
        console.next_step(f"carft-ray status {shlex.quote(str(study))}")
    except OSError as error:
        if ready:
            raise
        step = "Give another one, or --port 0 for a free one."
        raise UsageError(Problem("--port", "must be free on this machine", str(port), next_step=step)) from error
