"""The trials of a study, or the studies of a folder."""

import shlex
from typing import Annotated

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import require_choice
from carft_ray.ui import console
from carft_ray.words import counted

ORDERS = ("objective", "number")
PLACE = "A study (folder or address), or a folder of studies."


@command("ls studies/quickstart --sort objective --limit 10", common.READING, reads=True)
def list_(
    place: Annotated[str, Argument(metavar="PLACE", help=PLACE, show_default=False)],
    sort: Annotated[str, Option(metavar="objective|number", help="Order of the trials.")] = "objective",
    limit: Annotated[int | None, Option(min=1, help="Show at most this many trials.")] = None,
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
    quoted = shlex.quote(place)
    named = [f"carft-ray logs {quoted} {answer['trials'][0]['name']}"] if answer["trials"] else []
    console.next_step(f"carft-ray status {quoted}", *named)
