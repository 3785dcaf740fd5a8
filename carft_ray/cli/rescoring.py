"""Looking at a study under another objective: nothing is locked, nothing is written."""

import shlex
from typing import Annotated

import typer

from carft_ray.cli.common import DebugOption, JsonOption, StudyArgument, app
from carft_ray.words import counted

PANEL = "Trusting the numbers"  # of the help


@app.command(epilog="Example:  carft-ray rescore studies/quickstart --objective worst_domain", rich_help_panel=PANEL)
def rescore(
    study: StudyArgument,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="KIND",
            help="weighted_mean, harmonic or worst_domain; without it that of the recipe.",
        ),
    ] = None,
    id_weight: Annotated[
        float | None,
        typer.Option("--id-weight", min=0, max=1, help="Weight of ID in weighted_mean; without it the recipe's."),
    ] = None,
    sets: Annotated[
        str | None,
        typer.Option("--sets", metavar="A,B", help="OOD validation sets to count; without it all. id_val stays in."),
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rank the trials again under another objective, from stored predictions; constraints hold, nothing is written."""
    from carft_ray import console
    from carft_ray.layout import FOLDERS, WEIGHTS
    from carft_ray.results.reading import overview
    from carft_ray.results.rescore import asked_objective
    from carft_ray.results.rescore import rescore as rescored

    view = overview.read_study(study)
    spec = asked_objective(view.recipe, objective, id_weight, sets)
    if id_weight is not None and spec.kind != "weighted_mean":
        console.warn(f"--id-weight has no effect: {spec.kind} has no weight")
    answer = rescored(view, spec)
    if json_:
        console.print_json(answer)
        return
    weight = f", ID weight {spec.id_weight:g}" if spec.kind == "weighted_mean" else ""
    sets_text = ", ".join(spec.ood_sets)
    ood = f"OOD: mean over {sets_text}." if spec.ood_sets else "No OOD set: ID alone counts."
    if spec.kind == "worst_domain" and spec.ood_sets:
        ood = f"The lowest accuracy of {sets_text} counts; the column OOD is their mean, and ID does not count."
    own = " (the study's own objective)" if answer["objective"] == answer["own_objective"] else ""
    console.out.print(f"Objective: {spec.kind}{weight}{own}. {ood}", markup=False, soft_wrap=True)
    console.out.print()
    rows = [*answer["baselines"], *answer["trials"]]
    console.out.print(console.rescored_table(rows))
    if any(row["fitted"] or not row["measured"] for row in rows):
        console.say(f"{console.FITTED}.")
    if answer["constraints"]:
        console.say("The study's constraints hold here too; trials that miss them come last.")
    if answer["unfinished"]:
        console.say(f"Without a result: {counted(answer['unfinished'], 'more trial')}.")
    console.say(f"\n{answer['note']}")
    first, folder = answer["trials"][0], shlex.quote(str(study))
    steps = [f"carft-ray ls {folder}"]
    if (view.study_dir / FOLDERS["trial"] / first["name"] / WEIGHTS).exists():  # a study keeps those of its best
        steps.insert(0, f"carft-ray evaluate {folder} --trial {first['name']} --alpha {first['alpha']:g}")
    console.next_step(*steps)
