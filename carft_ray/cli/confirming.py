"""Confirming the winner of a search with fresh seeds."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.cli.common import (
    AddressOption,
    DebugOption,
    DetailsOption,
    ExecutorOption,
    JsonOption,
    NotifyCommandOption,
    NotifyUrlOption,
    StudyArgument,
    WorkersOption,
    app,
    load,
    suggest,
)
from carft_ray.errors import Problem, UsageError, nearest

PANEL = "Trusting the numbers"  # of the help
WINNER_RULES = ("search", "confirmed")


@app.command(epilog="Example:  carft-ray confirm studies/quickstart --top 3 --seeds 5", rich_help_panel=PANEL)
def confirm(
    study: StudyArgument,
    top: Annotated[int, typer.Option("--top", min=1, help="Trials to train again, from the best down.")] = 3,
    seeds: Annotated[
        int, typer.Option("--seeds", min=2, help="Fresh seeds of each; 5 for publication. More may be added later.")
    ] = 3,
    winner: Annotated[
        str,
        typer.Option(
            "--winner",
            metavar="search|confirmed",
            help="search: the winner is the search's. confirmed: the best on the fresh seeds, which is then trained "
            "with as many further seeds.",
        ),
    ] = "search",
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", help="Study whose winner is one more baseline, trained too; may be repeated."),
    ] = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    notify_command: NotifyCommandOption = None,
    notify_url: NotifyUrlOption = None,
    details: DetailsOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the winner, the next best and the baselines again with fresh seeds: what the best is really worth.

    The best of many trials is partly lucky. Run again after an interruption, it goes on where it was.
    """
    from carft_ray import console
    from carft_ray.results.reading import overview

    if winner not in WINNER_RULES:
        rule = "must say who chooses the winner"
        raise UsageError(Problem("--winner", rule, repr(winner), WINNER_RULES, nearest(winner, WINNER_RULES)))
    view = overview.read_study(study)
    if view.holder is not None:
        step = "Wait until it ends, or end it: carft-ray stop " + shlex.quote(str(study))
        raise UsageError(Problem(str(study), "must be a study on which no search runs", view.holder, next_step=step))
    others = [overview.read_study(path) for path in against or ()]
    recipe = load(overview.resolved_recipe(view.study_dir), None, executor, num_workers)
    command = _command(study, top, seeds, winner, against or (), executor, num_workers, address)
    from carft_ray.launch.notify import notifying

    with notifying(notify_command, notify_url, recipe.name, view.study_dir, console.warn) as beside:
        stages = _fix_and_train(view, recipe, others, top, seeds, winner, command, address, not json_, beside)
    from carft_ray.results.confirmation.summary import summarise

    summary = summarise(view.study_dir, recipe, *stages)
    if json_:
        console.print_json(summary)
        return
    console.out.print(console.estimate_table(summary["table"]))
    console.say("\n" + "\n".join(summary["lines"] if details else summary["brief"]["lines"]))
    if summary["better_than_winner"] and winner == "search":
        console.next_step(f"carft-ray confirm {shlex.quote(str(study))} --winner confirmed")
    else:
        suggest(study, "confirm")


def _fix_and_train(
    view: Any,
    recipe: Any,
    others: Sequence[Any],
    top: int,
    seeds: int,
    winner: str,
    command: str,
    address: str | None,
    show: bool,
    beside: Any,
) -> Any:
    """Fixes the winner, trains, and with ``--winner confirmed`` chooses and trains once more; returns both stages.

    ``beside`` lets the notices share the events.
    """
    from carft_ray import console
    from carft_ray.evaluation.objective import objective_spec
    from carft_ray.launch.runs.confirm import run_confirm
    from carft_ray.progress import search_shown
    from carft_ray.results.confirmation import plan as confirming
    from carft_ray.results.confirmation.summary import choose
    from carft_ray.results.reading import overview

    study_dir, twice = view.study_dir, winner == "confirmed"
    first, second, notes = confirming.plan(view, top, seeds, others)
    second = second if twice else None
    for note in notes:
        console.warn(note)

    def train(stage: Any) -> None:
        if show:
            console.say(confirming.cost(overview.read_study(study_dir), stage))
        shown = search_shown(show, study_dir, recipe.train.epochs, kind="confirm", trainings=stage.trainings())
        with shown as on_event:
            run_confirm(
                recipe,
                study_dir,
                lambda study: confirming.fix(study_dir, recipe, first, second, stage),
                command,
                address,
                beside(on_event),
            )

    train(first)
    if twice:
        chosen = choose(study_dir, objective_spec(recipe), first)
        second = confirming.second_stage(first, chosen, recipe)
        if show:
            console.say(f"The best on the fresh seeds is {chosen}; these seeds chose it, so others measure it.")
        train(second)
    return first, second


def _command(
    study: Path,
    top: int,
    seeds: int,
    winner: str,
    against: Sequence[Path],
    executor: str | None,
    num_workers: int | None,
    address: str | None,
) -> str:
    words = ["carft-ray", "confirm", str(study), "--top", str(top), "--seeds", str(seeds)]
    if winner != "search":
        words += ["--winner", winner]
    for path in against:
        words += ["--against", str(path)]
    for option, value in (("--executor", executor), ("--num-workers", num_workers), ("--address", address)):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)
