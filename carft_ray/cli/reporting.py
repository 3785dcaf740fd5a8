"""Trusting the numbers: what a study's best is worth. Nothing is locked, nothing is written."""

from pathlib import Path
from typing import Annotated

import typer

from carft_ray.cli.common import DebugOption, DetailsOption, JsonOption, StudyArgument, app, suggest

PANEL = "Trusting the numbers"  # of the help


@app.command(epilog="Example:  carft-ray report studies/quickstart", rich_help_panel=PANEL)
def report(
    study: StudyArgument,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="CSV with model, acc_id and acc_ood/<set> of models without robustness interventions: effective "
            "robustness.",
        ),
    ] = None,
    details: DetailsOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What the best trial is worth: corrected for having been chosen, other rules, baselines. No test is read."""
    from carft_ray import console
    from carft_ray.cli.test_sets import lost_cells, regret_table
    from carft_ray.results.reading import overview
    from carft_ray.results.report import study_report

    view = overview.read_study(study)
    answer = study_report(view, reference)
    if json_:
        console.print_json(answer)
        return
    for line in answer["lines" if details else "brief"]:
        console.out.print(line, markup=False, soft_wrap=True)
    if answer["rules"]:
        console.out.print("\nRules of selection, each judged on an OOD validation set that it did not see:")
        rows = [[rule["rule"], *lost_cells(rule), rule["note"]] for rule in answer["rules"]]
        titles = console.numbers("regret, points", "standard error")
        console.out.print(console.table(["rule", *titles, ""], rows))
        told = "Regret: what the pick of a rule loses to the best pick there; the rule with the smallest is the best."
        console.out.print(f"{told} That best pick is noisy itself, so all regrets are too high alike.", soft_wrap=True)
    if answer["analysis"]:
        console.out.print("\n" + "\n".join(answer["analysis"]["lines"]), markup=False, soft_wrap=True)
        console.out.print(regret_table(answer["analysis"]["rules"]))
    suggest(study, "report")
