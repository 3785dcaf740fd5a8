"""Confirming the winner of a search with fresh seeds."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carft_ray import console
from carft_ray.cli import common
from carft_ray.errors import Problem, UsageError

if TYPE_CHECKING:
    from carft_ray.recipe.schema import Recipe
    from carft_ray.results.confirmation.plan import Stage
    from carft_ray.results.reading.overview import Overview

WINNER_RULES = ("search", "confirmed")


@common.command("confirm studies/quickstart --top 3 --seeds 5", common.TRUST)
def confirm(
    study: common.StudyArgument,
    top: Annotated[int, typer.Option(min=1, help="Trials to train again, from the best down.")] = 3,
    seeds: Annotated[
        int, typer.Option(min=2, help="Fresh seeds of each; 5 for publication. You can add more later.")
    ] = 3,
    winner: Annotated[
        str,
        typer.Option(
            metavar="search|confirmed",
            help="search: the winner is the search's. confirmed: the best on the fresh seeds, which is then trained "
            "with as many further seeds.",
        ),
    ] = "search",
    against: Annotated[
        list[Path] | None, typer.Option(help="Study whose winner is one more baseline; repeatable.")
    ] = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    notify_command: common.NotifyCommandOption = None,
    notify_url: common.NotifyUrlOption = None,
    details: common.DetailsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Train the winner, the next best and the baselines again with fresh seeds: what the best is really worth.

    The best of many trials is partly lucky. Run again after an interruption, it resumes where it was.
    """
    from carft_ray.results.reading import overview

    common.require_choice("--winner", "must say who chooses the winner", winner, WINNER_RULES)
    view = overview.read_study(study)
    if view.holder is not None:
        step = "Wait until it ends, or end it: carft-ray stop " + shlex.quote(str(study))
        raise UsageError(Problem(str(study), "must be a study on which no search runs", view.holder, next_step=step))
    others = [overview.read_study(path) for path in against or ()]
    recipe = common.load(overview.resolved_recipe(view.study_dir), None, executor, num_workers)
    given = {"top": top, "seeds": seeds, "winner": None if winner == "search" else winner, "against": against}
    given |= {"executor": executor, "num_workers": num_workers, "address": address}
    from carft_ray.launch.notify import notifying
    from carft_ray.launch.runs.confirm import run_confirm
    from carft_ray.results.confirmation.summary import summarise

    with notifying(notify_command, notify_url, recipe.name, view.study_dir, console.warn) as with_notices:

        def run(fix: Callable[[Any], Any], on_event: Callable[[Any], None]) -> None:
            command = common.command_line("confirm", study, **given)
            run_confirm(recipe, view.study_dir, fix, command, address, with_notices(on_event))

        stages = _train(view, recipe, (top, seeds, others), winner == "confirmed", not json_, run)
    summary = summarise(view.study_dir, recipe, *stages)
    if console.print_json(summary, json_):
        return
    console.out.print(console.estimate_table(summary["table"]))
    console.say("\n" + "\n".join(summary["lines"] if details else summary["brief"]["lines"]))
    if summary["better_than_winner"] and winner == "search":
        console.next_step(f"carft-ray confirm {shlex.quote(str(study))} --winner confirmed")
    else:
        common.suggest(study, "confirm")


def _train(
    view: "Overview",
    recipe: "Recipe",
    asked: tuple[int, int, list["Overview"]],
    twice: bool,
    show: bool,
    run: Callable[[Any, Any], None],
) -> tuple["Stage", "Stage | None"]:
    """Fixes the winner and trains; where the fresh seeds choose, trains their choice once more; returns both stages.

    Args:
        view: The study.
        recipe: Its recipe.
        asked: Number of trials and of seeds, further studies.
        twice: The fresh seeds choose the winner.
        show: False: nothing but warnings is shown.
        run: Takes what fixes a stage, and what takes the events.
    """
    from carft_ray.evaluation.objective import objective_spec
    from carft_ray.progress import search_shown
    from carft_ray.results.confirmation import plan
    from carft_ray.results.confirmation.summary import choose
    from carft_ray.results.reading.overview import read_study

    study_dir, say = view.study_dir, console.sayer(show)
    first, second, notes = plan.plan(view, *asked)
    second = second if twice else None
    for note in notes:
        console.warn(note)

    def train(stage: "Stage") -> None:
        say(plan.cost(read_study(study_dir), stage))
        trainings = stage.trainings()
        with search_shown(show, study_dir, recipe.train.epochs, kind="confirm", trainings=trainings) as on_event:
            run(lambda study: plan.fix(study_dir, recipe, first, second, stage), on_event)

    train(first)
    if twice:
        chosen = choose(study_dir, objective_spec(recipe), first)
        second = plan.second_stage(first, chosen, recipe)
        say(f"The best on the fresh seeds is {chosen}; these seeds chose it, so others measure it.")
        train(second)
    return first, second
