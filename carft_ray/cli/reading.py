"""Reading a study: nothing is locked, nothing is written."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from carft_ray.cli.common import DebugOption, JsonOption, StudyArgument, app, suggest
from carft_ray.cli.watching import budget_lines, watch_search
from carft_ray.errors import Problem, UsageError, nearest
from carft_ray.words import counted, times

PANEL = "Reading a study"  # of the help


@app.command(epilog="Example:  carft-ray status studies/quickstart", rich_help_panel=PANEL)
def status(
    study: StudyArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until the search ends or Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.5, metavar="SECONDS", help="With --watch: how often.")] = 2,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How far a study is: counts, the best trial, what runs, the budget. Nothing is locked or written."""
    from carft_ray import console
    from carft_ray.results.reading import documents, overview

    if watch and json_:
        raise UsageError(Problem("--json", "must stand without --watch: a document ends"))
    if watch and not watch_search(study, every):
        return
    view = overview.read_study(study)
    answer = documents.status(view)
    if json_:
        console.print_json(answer)
        return
    finished, wanted = answer["finished"], answer["wanted"]
    console.out.print(f"{answer['name']}: {finished} of {counted(wanted, 'trial')} finished.", markup=False)
    states = console.numbers(*(state.replace("_", " ") for state in answer["trials"]))
    console.out.print(console.table(states, [[str(count) for count in answer["trials"].values()]]))
    if answer["outside"]:
        told = f"Outside the search space of today: {answer['outside']} of them; the sampler looks at the others alone."
        console.out.print(told, markup=False)
    rows = [*answer["baselines"], *([answer["best"]] if answer["best"] else [])]
    shown = {row["name"] for row in rows}
    rows += [row for row in (*answer["running"], *answer["stopped"], *answer["set_aside"]) if row["name"] not in shown]
    if rows:
        console.out.print()
        console.out.print(console.trial_table(rows))
    for line in answer["lines"]:
        console.out.print(line, markup=False, soft_wrap=True)
    if answer["confirm"]:
        done, begun = answer["confirm"]["complete"], sum(answer["confirm"].values())
        console.out.print(f"\nConfirm: {done} of {counted(begun, 'training')} with fresh seeds finished.", markup=False)
    if answer["ledger"]["test_reads"]:
        console.out.print(f"\nTest sets were read {times(answer['ledger']['test_reads'])}.", markup=False)
    for problem in answer["ledger"]["problems"]:
        console.warn(problem)
    for line in budget_lines(answer["budget"]):
        console.out.print(f"\n{line}", markup=False)
    if answer["pruner"]:
        console.out.print("\n" + "\n".join(answer["pruner"]["lines"]), markup=False)
        if answer["pruner"]["warning"]:
            console.warn(answer["pruner"]["warning"])
    if not view.recipe.data.ood_val:
        console.out.print("\nSelected on ID only: the recipe has no ood_val.", markup=False)
    if view.holder is None:
        console.say("\nNo search runs on it.")
    else:
        asked = "; it was asked to stop" if view.stopping else ""
        console.say(f"\nA search runs on it: {view.holder}{asked}.")
    suggest(study, "status")


@app.command(
    "ls", epilog="Example:  carft-ray ls studies/quickstart --sort objective --limit 10", rich_help_panel=PANEL
)
def list_(
    folder: Annotated[Path, typer.Argument(help="A study, or a folder with studies in it.", show_default=False)],
    sort: Annotated[
        str, typer.Option("--sort", metavar="objective|number", help="Best first, or in the order of the search.")
    ] = "objective",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many trials.")] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the trials of a study, or the studies of a folder. Nothing is locked or written."""
    from carft_ray import console
    from carft_ray.results.reading import documents, overview

    orders = ("objective", "number")
    if sort not in orders:
        raise UsageError(Problem("--sort", "must be an order", repr(sort), orders, nearest(sort, orders)))
    quoted = shlex.quote(str(folder))
    if not overview.is_study(folder):
        studies = documents.list_studies(folder)
        if json_:
            console.print_json({"folder": str(folder), "studies": studies})
            return
        console.out.print(console.study_table(studies))
        console.next_step(f"carft-ray status {shlex.quote(str(folder / studies[0]['name']))}")
        return
    view = overview.read_study(folder)
    answer = documents.listing(view, by_objective=sort == "objective", limit=limit)
    if json_:
        console.print_json(answer)
        return
    rows = [*answer["baselines"], *answer["trials"]]
    if rows:
        console.out.print(console.trial_table(rows))
    for line in answer["lines"]:
        console.out.print(line, markup=False, soft_wrap=True)
    left_out = answer["num_trials"] - len(answer["trials"])
    if left_out:
        console.say(f"{counted(left_out, 'more trial')}; without --limit all are shown.")
    if not answer["num_trials"]:
        console.say("No trial has begun yet.")
    named = [f"carft-ray logs {quoted} {answer['trials'][0]['name']}"] if answer["trials"] else []
    console.next_step(f"carft-ray status {quoted}", *named)


@app.command(epilog="Example:  carft-ray logs studies/quickstart 7 --follow", rich_help_panel=PANEL)
def logs(
    study: StudyArgument,
    trial: Annotated[
        str, typer.Argument(help="Number or name of a trial (7, t0007), or name of a baseline.", show_default=False)
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the training or its search ends.")
    ] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the log of one trial: when its attempts began, and the traceback of one that failed."""
    from carft_ray import console
    from carft_ray.results.reading import logs, overview
    from carft_ray.study.rows import ZERO_SHOT

    if follow and json_:
        raise UsageError(Problem("--json", "must stand without --follow: a document ends"))
    view = overview.read_study(study)
    row, path = logs.find_log(view, trial)
    lines = logs.read_log(path)
    if follow and view.holder is not None and row.outcome == "running":
        try:
            for line in logs.follow_log(path, view.study_dir):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        except KeyboardInterrupt:
            console.say("The search goes on.")
    elif json_:
        console.print_json(lines or [])
    elif lines is None:
        why = "the zero-shot model is not trained" if row.name == ZERO_SHOT else f"it is {view.state(row)}"
        console.say(f"{row.name} has no log: {why}.")
    else:
        sys.stdout.write("".join(line + "\n" for line in lines))
    if not json_:
        console.next_step(f"carft-ray status {shlex.quote(str(study))}")
