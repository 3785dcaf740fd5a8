"""The one command that reads the test sets."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from rich.table import Column, Table
from typer import Option

from carft_ray import console
from carft_ray.cli import common
from carft_ray.errors import InterruptedRunError, Problem

ANALYSIS = (
    "Another read, an analysis: every trial whose weights are there, to judge the rules of selection. "
    "`search --set search.keep_checkpoints=N` keeps the weights of the best N. The winner stays what it is."
)


@common.command("test studies/quickstart", common.TRUST)
def evaluate_test_sets(
    study: common.StudyArgument,
    again: Annotated[
        str | None, Option(metavar="REASON", help="Read once more; the ledger and every report keep the reason.")
    ] = None,
    all_trials: Annotated[bool, Option("--all-trials", help=ANALYSIS)] = False,
    details: common.DetailsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Open the test sets: measure winner and baselines on id_test and ood_test, once. The ledger records every read."""
    from carft_ray.results.test_sets.read import read_sealed

    try:
        summary = read_sealed(study, again, console.sayer(not json_), all_trials)
    except KeyboardInterrupt:
        step = f"Resume with: carft-ray test {shlex.quote(str(study))}{' --all-trials' if all_trials else ''}"
        raise InterruptedRunError(Problem("", "stopped; what was read so far is kept", next_step=step)) from None
    if console.print_json({"study": str(study.resolve()), **summary}, json_):
        return
    console.show(regret_table(summary["rules"]) if all_trials else _table(summary))
    short = not details and not all_trials  # an analysis is its table
    console.say("\n" + "\n".join(summary["brief"]["lines"] if short else summary["lines"]))
    console.say(f"Results: {study / 'test' / 'read-'}{summary['read']}")
    common.suggest(study, "test")


def regret_table(rules: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of an analysis: what each rule picks, what that is worth on the test sets, what it has lost."""
    lines = []
    for rule in rules:
        cells = ["-" if rule["alpha"] is None else f"{rule['alpha']:.2f}"]
        cells += ["-" if rule["objective"] is None else console.percent(rule["objective"]), *lost_cells(rule)]
        lines.append([rule["rule"], rule["name"] or "-", *cells, rule["note"]])
    titles = console.numbers("alpha", "objective, %", "regret, points", "standard error")
    oracles = [rule["rule"] == "oracle" for rule in rules]
    return console.table(["rule, on test", Column("picks", no_wrap=True), *titles, ""], lines, oracles, "dim")


def lost_cells(rule: Mapping[str, Any]) -> list[str]:
    """Returns what a rule of selection loses and its standard error, in points."""
    return ["-" if rule[key] is None else f"{100 * rule[key]:.1f}" for key in ("regret", "se")]


def _table(summary: Mapping[str, Any]) -> Table:
    """Returns the table of a read: a line per row, a column per set, and the interval of the objective."""
    columns = {name: "ID test" if name == "id_test" else name for name in summary["sets"]}
    if summary["ood_mean_over"]:
        columns["ood_mean"] = "OOD mean"
    columns["objective"] = "objective"
    lines = []
    for row in summary["rows"]:
        low, high = map(console.percent, row["test"]["objective"]["interval"])
        means = [console.percent(row["test"][name]["mean"]) for name in columns]
        seeds = str(row["num_seeds"] or "-")
        lines.append([row["name"], f"{row['alpha']:.2f}", seeds, *means, f"[{low}, {high}]", row["role"]])
    titles = [*console.numbers("alpha", "seeds", *columns.values()), *console.numbers("95 % of it", no_wrap=True)]
    winners = [row["role"] == "winner" for row in summary["rows"]]
    return console.table(["test accuracy, %", *titles, Column("", no_wrap=True)], lines, winners)
