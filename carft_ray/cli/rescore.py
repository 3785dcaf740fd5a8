"""Another objective for the trials of a study, from stored predictions."""

import shlex
from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console
from carft_ray.words import counted


@command("rescore studies/quickstart --objective worst_domain", common.TRUST, reads=True)
def rescore(
    study: common.StudyArgument,
    objective: Annotated[str | None, Option(metavar="KIND", help="weighted_mean, harmonic or worst_domain.")] = None,
    id_weight: Annotated[float | None, Option(min=0, max=1, help="Weight of the ID accuracy in weighted_mean.")] = None,
    sets: Annotated[str | None, Option(metavar="A,B", help="OOD validation sets that count; default: all.")] = None,
    json_: common.JsonOption = False,
) -> None:
    """Rank the trials by another objective, from stored predictions. The recipe's constraints apply. Writes nothing."""
    from carft_ray.layout import WEIGHTS
    from carft_ray.results import rescore as rescoring
    from carft_ray.results.reading import study_view

    view = study_view.read_study(study)
    spec = rescoring.asked_objective(view.recipe, objective, id_weight, sets)
    if id_weight is not None and spec.kind != "weighted_mean":
        console.warn(f"--id-weight has no effect: {spec.kind} has no weight")
    answer = rescoring.rescore(view, spec)
    if console.print_json(answer, json_):
        return
    weight = f", ID weight {spec.id_weight:g}" if spec.kind == "weighted_mean" else ""
    sets_text = ", ".join(spec.ood_sets)
    ood = f"OOD: mean over {sets_text}." if spec.ood_sets else "No OOD set: only ID counts."
    if spec.kind == "worst_domain" and spec.ood_sets:
        ood = f"The lowest accuracy of {sets_text} counts; the column OOD is their mean, and ID does not count."
    own = " (the study's own objective)" if answer["objective"] == answer["own_objective"] else ""
    console.show(f"Objective: {spec.kind}{weight}{own}. {ood}\n")
    rows = [*answer["baselines"], *answer["trials"]]
    console.show(console.rescored_table(rows))
    if answer["constraints"]:
        console.say("The study's constraints also hold here; trials that violate them come last.")
    if answer["unfinished"]:
        console.say(f"Without a result: {counted(answer['unfinished'], 'more trial')}.")
    console.say(f"\n{answer['note']}")
    first, folder = answer["trials"][0], shlex.quote(study)
    steps = [f"carft-ray ls {folder}"]
    row = next(row for row in view.trials if row.name == first["name"])
    if (row.place(view.study_dir) / WEIGHTS).exists():  # a study keeps those of its best
        steps.insert(0, f"carft-ray evaluate {folder} --trial {first['name']} --alpha {first['alpha']!r}")
    console.next_step(*steps)
