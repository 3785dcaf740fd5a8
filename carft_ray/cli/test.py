"""The one command that reads the test sets."""

from collections.abc import Mapping
from typing import Annotated, Any

from rich.table import Column, Table
from typer import Option

from carft_ray import console
from carft_ray.cli import common


@common.command("test studies/quickstart", common.TRUST)
def evaluate_test_sets(
    study: common.StudyArgument,
    again: Annotated[
        str | None, Option(metavar="REASON", help="Read once more; the ledger and every report keep the reason.")
    ] = None,
    json_: common.JsonOption = False,
) -> None:
    """Open the test sets: measure winner and baselines on id_test and ood_test, once. The ledger records every read."""
    from carft_ray.data.shared.shared_images import read_shared, shared_lines
    from carft_ray.results.test_sets.read import read_sealed
    from carft_ray.results.test_sets.summary import read_lines

    step = f"Resume with: {common.command_line('test', study)}"
    with common.interrupted_as("stopped; what was read so far is kept", step):
        summary = read_sealed(study, again, console.sayer(not json_))
    if console.print_json({"study": str(study.resolve()), **summary}, json_):
        return
    console.show(_table(summary))
    console.say("\n" + "\n".join([*shared_lines(read_shared(study)), *read_lines(summary)]))
    console.say(f"Results: {study / 'test' / 'read-'}{summary['read']}")
    common.suggest(study, "test")


def _table(summary: Mapping[str, Any]) -> Table:
    """Returns the table of a read: a line per row, a column per set, and the interval of the objective."""
    columns = ["ID test" if name == "id_test" else name for name in summary["sets"]]
    columns += ["OOD mean"] if summary["rows"][0]["ood_accuracy"] else []
    lines = []
    for row in summary["rows"]:
        found = [*row["sets"].values(), *([row["ood_accuracy"]] if row["ood_accuracy"] else []), row["objective"]]
        means, (low, high) = [console.percent(each["mean"]) for each in found], row["objective"]["ends"]
        interval = f"[{console.percent(low)}, {console.percent(high)}]"
        lines.append([row["name"], f"{row['alpha']:.2f}", str(row["seeds"] or "-"), *means, interval, row["role"]])
    titles = console.numbers("alpha", "seeds", *columns, "objective")
    titles += console.numbers("95 % of it", no_wrap=True)
    winners = [row["role"] == "winner" for row in summary["rows"]]
    return console.table(["test accuracy, %", *titles, Column("", no_wrap=True)], lines, winners)
