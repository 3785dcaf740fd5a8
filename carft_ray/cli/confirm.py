"""Confirming the winner of a search with fresh seeds."""

from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console

WINNER = "search: the best of the search. confirmed: the best on fresh seeds, measured again on other seeds."


@command("confirm studies/quickstart --top 3 --seeds 5", common.TRUST, shared=common.RunOptions)
def confirm(
    study: common.StudyArgument,
    top: Annotated[int, Option(min=1, help="How many of the best trials to train again.")] = 3,
    seeds: Annotated[
        int, Option(min=2, help="Fresh seeds per trial; 5 for a publication. A later call can add seeds.")
    ] = 3,
    winner: Annotated[str, Option(metavar="search|confirmed", help=WINNER)] = "search",
    against: Annotated[
        list[str] | None, Option(help="Study whose winner becomes another baseline; repeatable.")
    ] = None,
    notify_url: common.NotifyUrlOption = None,
    json_: common.JsonOption = False,
    **shared: Any,
) -> None:
    """Train the best trials and the baselines again with fresh seeds, to see what the winner is worth.

    The best of many trials looks better than it is. After an interruption, the same
    command continues.
    """
    given: dict[str, Any] = {"top": top, "seeds": seeds, "winner": winner, "against": against or []}
    again, chosen_anew = (
        common.command_line("confirm", study, **{**given, "winner": one}, **shared) for one in (winner, "confirmed")
    )
    shared["overrides"] = common.overrides_of(None, shared)
    from carft_ray.api import actions

    found = actions.confirm(study, **given, **shared, notify_url=notify_url, progress=not json_, resume_command=again)
    summary = found.numbers
    if console.print_json(summary, json_):
        return
    console.show(found.tables[0])
    console.say("\n" + "\n".join(found.lines))
    if summary["better_than_winner"] and winner == "search":
        console.next_step(chosen_anew)
    else:
        common.suggest(study, "confirm", changed=True)
