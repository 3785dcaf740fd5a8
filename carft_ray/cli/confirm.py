"""Confirming the winner of a search with fresh seeds."""

from pathlib import Path
from typing import Annotated

from typer import Option

from carft_ray import console
from carft_ray.cli import common

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
    notify_url: common.NotifyUrlOption = None,
    details: common.DetailsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Train the winner, the next best and the baselines again with fresh seeds: what the best is really worth.

    The best of many trials is partly lucky. Run again after an interruption, it resumes where it was.
    """
    given = {"top": top, "seeds": seeds, "winner": None if winner == "search" else winner, "against": against}
    given |= {"executor": executor, "num_workers": num_workers, "address": address, "trust": trust}
    from carft_ray import actions

    found = actions.confirm(
        study,
        top=top,
        seeds=seeds,
        winner=winner,
        against=against or (),
        overrides=common.overrides_of(None, executor=executor, num_workers=num_workers),
        address=address,
        trust=trust,
        notify_url=notify_url,
        progress=not json_,
        resume_command=common.command_line("confirm", study, **given),
    )
    summary = found.numbers
    if console.print_json(summary, json_):
        return
    console.show(found.tables[0])
    console.say("\n" + "\n".join(summary["lines"] if details else found.lines))
    if summary["better_than_winner"] and winner == "search":
        console.next_step(common.command_line("confirm", study, winner="confirmed", trust=trust))
    else:
        common.suggest(study, "confirm")
