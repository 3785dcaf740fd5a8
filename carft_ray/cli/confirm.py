"""Confirming the winner of a search with fresh seeds."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from carft_ray import console
from carft_ray.cli import common
from carft_ray.errors import Problem, UsageError

if TYPE_CHECKING:
    from carft_ray.results.confirmation.plan import Stage

WINNER_RULES = ("search", "confirmed")
WINNER = (
    "search: the winner is the search's. confirmed: the best on the fresh seeds, which is then trained with as many "
    "further seeds."
)


@common.command("confirm studies/quickstart --top 3 --seeds 5", common.TRUST)
def confirm(
    study: common.StudyArgument,
    top: Annotated[int, Option(min=1, help="Trials to train again, from the best down.")] = 3,
    seeds: Annotated[int, Option(min=2, help="Fresh seeds of each; 5 for publication. You can add more later.")] = 3,
    winner: Annotated[str, Option(metavar="search|confirmed", help=WINNER)] = "search",
    against: Annotated[list[Path] | None, Option(help="Study whose winner is one more baseline; repeatable.")] = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    trust: common.TrustOption = False,
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
    common.require_trusted(recipe, trust)
    given = {"top": top, "seeds": seeds, "winner": None if winner == "search" else winner, "against": against}
    given |= {"executor": executor, "num_workers": num_workers, "address": address, "trust": trust}
    from carft_ray.evaluation.objective import objective_spec
    from carft_ray.launch.notify import notifying
    from carft_ray.launch.runs.confirm import run_confirm
    from carft_ray.progress import search_shown
    from carft_ray.results.confirmation import plan
    from carft_ray.results.confirmation.summary import choose, summarise

    study_dir, show = view.study_dir, not json_
    say, command = console.sayer(show), common.command_line("confirm", study, **given)
    with notifying(notify_command, notify_url, recipe.name, study_dir, console.warn) as with_notices:
        first, second, notes = plan.plan(view, top, seeds, others)
        second = second if winner == "confirmed" else None
        for note in notes:
            console.warn(note)

        def train(stage: "Stage") -> None:
            say(plan.cost(overview.read_study(study_dir), stage))
            trainings = stage.trainings()
            with search_shown(show, study_dir, recipe.train.epochs, kind="confirm", trainings=trainings) as on_event:

                def fix(locked: Any) -> Any:
                    return plan.fix(study_dir, recipe, first, second, stage)

                run_confirm(recipe, study_dir, fix, command, address, with_notices(on_event))

        train(first)
        if winner == "confirmed":
            chosen = choose(study_dir, objective_spec(recipe), first)
            second = plan.second_stage(first, chosen, recipe)
            say(f"The best on the fresh seeds is {chosen}; these seeds chose it, so others measure it.")
            train(second)
    summary = summarise(study_dir, recipe, first, second)
    if console.print_json(summary, json_):
        return
    console.out.print(console.estimate_table(summary["table"]))
    console.say("\n" + "\n".join(summary["lines"] if details else summary["brief"]["lines"]))
    if summary["better_than_winner"] and winner == "search":
        console.next_step(common.command_line("confirm", study, winner="confirmed", trust=trust))
    else:
        common.suggest(study, "confirm")
