"""How far a study is."""

import contextlib
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.ui import console
from carft_ray.words import counted, times


@command("status studies/quickstart", common.READING, reads=True)
def status(
    study: common.StudyArgument,
    watch: Annotated[bool, Option("--watch", help="Repeat until the search ends or you press Ctrl-C.")] = False,
    every: Annotated[float, Option(min=0.5, metavar="SECONDS", help="Time between two reads of --watch.")] = 2,
    json_: common.JsonOption = False,
) -> None:
    """Show the progress of a study: counts, best trial, running trials, budget. Writes nothing."""
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
