"""Two trainings side by side."""

import shlex
from typing import Annotated

from typer import Argument

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console

TARGET = "DIR (the best trial of a study, or the training of `train`) or DIR:TRIAL; DIR may be an address."


@command("compare studies/quickstart:t0003 studies/quickstart:7", common.TRUST, reads=True)
def compare(
    a: Annotated[str, Argument(metavar="A", help=TARGET, show_default=False)],
    b: Annotated[str, Argument(metavar="B", help=TARGET, show_default=False)],
    json_: common.JsonOption = False,
) -> None:
    """Explain how two trainings differ: recipes, data, code, versions, and numbers with paired intervals."""
    from carft_ray.recipe.loading import trust_word
    from carft_ray.results.compare import compare
    from carft_ray.results.reading.finished import open_finished, split_target

    found = compare(a, b)
    if console.print_json(found, json_):
        return
    for key, title, none in (
        ("recipe", "Recipes differ in", "The recipes are the same."),
        ("origin", "Data, code and machines differ in", "Data, code, versions and machines are the same."),
    ):
        console.show(console.differing_table(title, found[key]) if found[key] else none)
        console.show()
    console.show(console.comparison_table(found))
    console.say(
        "\n" + (f"Difference A - B in points; paired 95 % interval {found['words']}." if found["words"] else "")
    )
    for what, reason in found["reasons"].items():
        console.say(f"{what} cannot be compared: {reason}.")
    console.say("These validation sets were used for selection: a best trial looks better on them than it is.")
    trust = trust_word(open_finished(*split_target(a)).recipe)
    console.next_step(f"carft-ray reproduce {shlex.quote(found['a']['folder'])} {found['a']['trial']}{trust}")
