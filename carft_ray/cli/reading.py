"""Reading a study: its progress, trials, logs, the dashboard, a copy of it."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.layout import LOG
from carft_ray.ui import console
from carft_ray.words import counted, times


@command("status studies/quickstart", common.READING, reads=True)
def status(
    study: common.StudyArgument,
    watch: Annotated[bool, Option("--watch", help="Repeat until the search ends.")] = False,
    every: Annotated[float, Option(min=0.5, metavar="SECONDS", help="Time between reads of --watch.")] = 2,
    json_: common.JsonOption = False,
) -> None:
    """Show a study's counts, best trial, running trials, budget. Writes nothing."""
    from carft_ray.results.reading import status_and_ls, study_view
    from carft_ray.store.copy import STATE

    if watch and json_:
        raise UsageError(Problem("--json", "cannot be used with --watch"))
    if watch and not _watch(study, every):
        return
    view = study_view.read_study(study, STATE)
    answer = status_and_ls.status(view)
    if console.print_json(answer, json_):
        return
    console.show(f"{answer['name']}: {answer['finished']} of {counted(answer['wanted'], 'trial')} finished.")
    states = console.numbers(*(state.replace("_", " ") for state in answer["trials"]))
    console.show(console.table(states, [[str(count) for count in answer["trials"].values()]]))
    if answer["outside"]:
        console.show(f"Outside the current search space: {answer['outside']} of them; the sampler ignores these.")
    rows = [*answer["baselines"], *([answer["best"]] if answer["best"] else [])]
    shown = {row["name"] for row in rows}
    rows += [row for row in (*answer["running"], *answer["stopped"], *answer["set_aside"]) if row["name"] not in shown]
    if rows:
        console.show()
        console.show(console.trial_table(rows))
    for line in answer["lines"]:
        console.show(line)
    for row in answer["soups"]:
        measured = "" if row["objective"] is None else f", {console.percent(row['objective'])} %"
        console.show(f"Soup soups/{row['name']}, {len(row['members'])} members: {row['outcome']}{measured}.")
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
        console.say(f"\nNo {view.what} is running.")
    else:
        asked = "; it was asked to stop" if view.stopping else ""
        console.say(f"\nA {view.what} is running: {view.holder}{asked}.")
        if view.at_a_time is not None:
            console.say(f"{view.at_a_time[0]} at a time ({view.at_a_time[1]}).")
    common.suggest(study, "status", view=view)


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


def _watch(study: str, every_s: float) -> bool:
    """Shows a study until its search ends or the user has seen enough: a live table on a terminal, lines elsewhere.

    Args:
        study: The study directory, or its address.
        every_s: Seconds between two reads.

    Returns:
        Whether the search has ended, so that its status may follow.
    """
    from rich.live import Live

    from carft_ray.results.reading import study_view
    from carft_ray.store.copy import STATE
    from carft_ray.ui.live import SearchView

    on_terminal = console.out.is_terminal and not console.out.is_dumb_terminal
    live = Live(console=console.out, auto_refresh=False, transient=True)
    try:
        with live if on_terminal else contextlib.nullcontext():
            while (view := study_view.read_study(study, STATE)).holder is not None:
                if on_terminal:
                    live.update(SearchView.of(view), refresh=True)
                else:
                    console.show(SearchView.of(view).line())
                time.sleep(every_s)
    except KeyboardInterrupt:
        console.say(f"The search continues. Stop it: carft-ray stop {shlex.quote(study)}")
        return False
    return True


ORDERS = ("objective", "number")
PLACE = "A study, or a folder of studies."


@command("ls studies/quickstart --sort objective --limit 10", common.READING, reads=True)
def list_(
    place: Annotated[str, Argument(metavar="PLACE", help=PLACE, show_default=False)],
    sort: Annotated[str, Option(metavar="objective|number", help="Order of the trials.")] = "objective",
    limit: Annotated[int | None, Option(min=1, help="Largest number of trials.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """List the trials of a study, or the studies in a folder. Writes nothing."""
    from carft_ray.results.reading import status_and_ls, study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.holding import is_study
    from carft_ray.study.place import fetched, in_bucket

    require_choice("--sort", "must be an order", sort, ORDERS)
    if not in_bucket(place) and not is_study(folder := fetched(place)):
        studies = status_and_ls.list_studies(folder)
        if not console.print_json({"folder": str(folder), "studies": studies}, json_):
            console.show(console.study_table(studies))
            first = min(studies, key=lambda each: each["problem"] is not None)  # one that can be read, if there is one
            console.next_step(f"carft-ray status {shlex.quote(str(folder / first['name']))}")
        return
    answer = status_and_ls.listing(study_view.read_study(place, STATE), by_objective=sort == "objective", limit=limit)
    if console.print_json(answer, json_):
        return
    rows = [*answer["baselines"], *answer["trials"], *answer["soups"]]
    if rows:
        console.show(console.trial_table(rows))
    for line in answer["lines"]:
        console.show(line)
    left_out = answer["num_trials"] - len(answer["trials"])
    if left_out:
        console.say(f"{counted(left_out, 'more trial')}; without --limit all are shown.")
    if not answer["num_trials"]:
        console.say("No trial has begun yet.")
    quoted = shlex.quote(place)
    named = [f"carft-ray logs {quoted} {answer['trials'][0]['name']}"] if answer["trials"] else []
    console.next_step(f"carft-ray status {quoted}", *named)


@command("logs studies/quickstart 7 --follow", common.READING, reads=True)
def logs(
    study: common.StudyArgument,
    trial: Annotated[str, Argument(help="Trial (7, t0007) or name of a baseline.", show_default=False)],
    follow: Annotated[bool, Option("--follow", "-f", help="Print new lines until its training ends.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Print the log of a trial: starts of attempts, tracebacks of failures."""
    from carft_ray.results.reading import study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.place import bring
    from carft_ray.study.rows import ZERO_SHOT

    if follow and json_:
        raise UsageError(Problem("--json", "cannot be used with --follow"))
    view = study_view.read_study(study, STATE)
    confirmed = {row.name: row for row in (*view.confirmations, *view.soups)}  # these have no numbers to be called by
    row = confirmed.get(trial) or study_view.find_row([*view.all_baselines, *view.trials], trial)
    bring(view.study_dir, [f"{row.training}/{LOG}"])
    lines = study_view.read_log(view.study_dir, row.training)
    if console.print_json(lines or [], json_):
        return
    if follow and view.holder is not None and row.outcome == "running":
        try:
            for line in study_view.follow_log(study, row.training):
                console.show(line)
        except KeyboardInterrupt:
            console.say("The search continues.")
    elif lines is None:
        why = "the zero-shot model is not trained" if row.name == ZERO_SHOT else f"it is {view.state(row)}"
        console.say(f"{row.name} has no log: {why}.")
    else:
        for line in lines:
            console.show(line)
    console.next_step(f"carft-ray status {shlex.quote(study)}")


@command("dashboard studies/quickstart --port 8080", common.READING, reads=True)
def dashboard(
    study: common.StudyArgument,
    port: Annotated[int, Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 8080,
) -> None:
    """Show a study in the browser with optuna-dashboard. Follows a running search, writes nothing.

    Only this machine can see it. Ctrl-C ends it.
    """
    from carft_ray.api.checks import require_versions
    from carft_ray.results.reading import study_view
    from carft_ray.store.copy import STATE
    from carft_ray.study.dashboard import serve

    require_versions("dashboard")
    study_view.require_study(study, need=STATE)
    ready: list[int] = []  # the port, once pages are served

    def on_ready(number: int) -> None:
        ready.append(number)
        console.show(f"http://127.0.0.1:{number}/")
        console.say("optuna-dashboard, read-only: it refuses changes. Ctrl-C ends it.")

    try:
        serve(study, port, on_ready)
    except KeyboardInterrupt:
        console.next_step(f"carft-ray status {shlex.quote(study)}")
    except OSError as error:
        if ready:
            raise
        step = "Give another one, or --port 0 for a free one."
        raise UsageError(Problem("--port", "must be free on this machine", str(port), next_step=step)) from error


MB = 10**6


@command("pull s3://my-bucket/quickstart studies/quickstart", common.READING, reads=True)
def pull(
    address: Annotated[str, Argument(metavar="ADDRESS", help="s3://BUCKET/STUDY.", show_default=False)],
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder of the copy; new or empty.", show_default=False)],
    json_: common.JsonOption = False,
) -> None:
    """Copy a study with its weights from a bucket to a folder. The copy's manifest names its source."""
    from carft_ray.study import place
    from carft_ray.ui.progress import counting

    with (
        common.interrupted_as("stopped pulling; an incomplete copy is not a study", "Run the command again."),
        counting() as begin,
    ):
        tell = begin("pulling, MB")
        answer = place.pull(address, folder, lambda done, total: tell(done // MB, -(-total // MB)))
    if not console.print_json(answer, json_):
        size = console.size_text(answer["num_bytes"])
        console.say(f"Copied {counted(answer['commits'], 'commit')} and {counted(answer['files'], 'file')} ({size}).")
        console.next_step(f"carft-ray status {shlex.quote(str(folder))}")
