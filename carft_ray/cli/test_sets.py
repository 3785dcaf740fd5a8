"""The one command that reads the test sets."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carft_ray.cli.common import DebugOption, DetailsOption, JsonOption, StudyArgument, app, suggest
from carft_ray.errors import InterruptedRunError, Problem

if TYPE_CHECKING:
    from rich.table import Table

PANEL = "Trusting the numbers"  # of the help


@app.command("test", epilog="Example:  carft-ray test studies/quickstart", rich_help_panel=PANEL)
def evaluate_test_sets(
    study: StudyArgument,
    again: Annotated[
        str | None,
        typer.Option("--again", metavar="REASON", help="Read once more; the ledger and every report keep the reason."),
    ] = None,
    all_trials: Annotated[
        bool,
        typer.Option(
            "--all-trials",
            help="Another read, an analysis: every trial whose weights are there, to judge the rules of selection. "
            "`search --set search.keep_checkpoints=N` keeps the weights of the best N. The winner stays what it is.",
        ),
    ] = False,
    details: DetailsOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Open the seal: measure winner and baselines on id_test and ood_test, once; every read goes into the ledger."""
    from carft_ray import console
    from carft_ray.results.test_sets.read import read_sealed

    folder = shlex.quote(str(study))
    try:
        summary = read_sealed(study, again, (lambda text: None) if json_ else console.say, all_trials)
    except KeyboardInterrupt:
        step = f"Go on with: carft-ray test {folder}{' --all-trials' if all_trials else ''}"
        raise InterruptedRunError(Problem("", "stopped; what was read so far is kept", next_step=step)) from None
    if json_:
        console.print_json({"study": str(study.resolve()), **summary})
        return
    console.out.print(regret_table(summary["rules"]) if all_trials else _table(summary))
    short = not details and not all_trials  # an analysis is its table
    console.say("\n" + "\n".join(summary["brief"]["lines"] if short else summary["lines"]))
    console.say(f"Results: {study / 'test' / 'read-'}{summary['read']}")
    suggest(study, "test")


def regret_table(rules: Sequence[Mapping[str, Any]]) -> "Table":
    """Returns the table of an analysis: what each rule picks, what that is worth on the test sets, what it has lost."""
    from rich.table import Column

    from carft_ray import console

    lines = []
    for rule in rules:
        cells = ["-" if rule["alpha"] is None else f"{rule['alpha']:.2f}"]
        cells += ["-" if rule["objective"] is None else console.percent(rule["objective"]), *lost_cells(rule)]
        lines.append([rule["rule"], rule["name"] or "-", *cells, rule["note"]])
    titles = console.numbers("alpha", "objective, %", "regret, points", "standard error")
    oracles = [index for index, rule in enumerate(rules) if rule["rule"] == "oracle"]
    return console.table(["rule, on test", Column("picks", no_wrap=True), *titles, ""], lines, oracles, "dim")


def lost_cells(rule: Mapping[str, Any]) -> list[str]:
    """Returns what a rule of selection loses and its standard error, in points."""
    return ["-" if rule[key] is None else f"{100 * rule[key]:.1f}" for key in ("regret", "se")]


def _table(summary: Mapping[str, Any]) -> "Table":
    """Returns the table of a read: a line per row, a column per set, and the interval of the objective."""
    from rich.table import Column

    from carft_ray import console

    columns = {name: "ID test" if name == "id_test" else name for name in summary["sets"]}
    if summary["ood_mean_over"]:
        columns["ood_mean"] = "OOD mean"
    columns["objective"] = "objective"
    lines = []
    for row in summary["rows"]:
        found = row["test"]
        low, high = found["objective"]["interval"]
        cells = [f"{row['alpha']:.2f}", str(row["num_seeds"] or "-")]
        cells += [console.percent(found[name]["mean"]) for name in columns]
        cells.append(f"[{console.percent(low)}, {console.percent(high)}]")
        lines.append([row["name"], *cells, row["role"]])
    titles = [*console.numbers("alpha", "seeds", *columns.values()), *console.numbers("95 % of it", no_wrap=True)]
    winners = [index for index, row in enumerate(summary["rows"]) if row["role"] == "winner"]
    return console.table(["test accuracy, %", *titles, Column("", no_wrap=True)], lines, winners)
