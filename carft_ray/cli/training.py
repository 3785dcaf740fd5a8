"""One training: fine-tuning, measuring it again, exporting it."""

import shlex
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("train recipe.yaml --out runs/first", common.ONE_TRAINING, shared=common.RunOptions)
def train(
    recipe: common.RecipeArgument,
    out: Annotated[str, Option(help="Folder of the training, or s3://BUCKET/NAME.")],
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint in the folder.")] = False,
    json_: common.JsonOption = False,
    **shared: Any,
) -> None:
    """Fine-tune once and measure the alpha curve on the validation sets."""
    shared["method"] = method
    again = f"{common.command_line('train', recipe, set=set_, out=out, **shared)} --resume"
    overrides = common.overrides_of(set_, shared)
    from carft_ray.api import actions

    found = actions.train(
        recipe, out, overrides=overrides, resume=resume, progress=not json_, resume_command=again, **shared
    )
    if console.print_json(found.numbers, json_):
        return
    console.show(found.tables[0])
    console.say("\n".join(found.lines))
    from carft_ray.results.adviser import export_folder
    from carft_ray.study.place import own_folder

    folder, logs = shlex.quote(out), shlex.quote(str(own_folder(out, need=None)))
    console.next_step(
        f"carft-ray evaluate {folder}",
        f"carft-ray export {folder} --to {export_folder(found.recipe_name)}",
        f"tensorboard --logdir {logs}",
    )


@command("evaluate runs/first --alpha 0.5", common.ONE_TRAINING)
def evaluate(
    folder: common.TrainedArgument,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    head: Annotated[str, Option(help="Class head: fine_tuned, or zero_shot (from the prompts).")] = "fine_tuned",
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Measure a trained model on id_val and ood_val again, at any alpha."""
    from carft_ray.api import actions
    from carft_ray.results.adviser import export_folder

    found = actions.evaluate(folder, alpha=alpha, trial=trial, head=head, trust_paths=trust_paths)
    if console.print_json(found.numbers, json_):
        return
    console.show(found.tables[0])
    console.show()
    console.show(found.tables[1])
    if head == "fine_tuned":  # the head of an export
        line = common.command_line("export", folder, trial=trial, trust_paths=trust_paths)
        console.next_step(f"{line} --to {export_folder(found.recipe_name)} --alpha {found.numbers['alpha']!r}")


@command("export studies/quickstart --to exports/quickstart --format open_clip,onnx", common.ONE_TRAINING)
def export(
    folder: common.TrainedArgument,
    to: Annotated[Path, Option(help="Folder of the export; must be new or empty.")],
    format_: Annotated[
        list[str] | None,
        Option("--format", metavar="NAME", help="open_clip (default), huggingface, onnx; several: open_clip,onnx."),
    ] = None,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Write the mixed model for open_clip, transformers or onnxruntime. The library then loads it, as a check."""
    from carft_ray.api import actions

    exported = actions.export(folder, to, formats=format_ or (), alpha=alpha, trial=trial, trust_paths=trust_paths)
    if console.print_json({**vars(exported), "folder": str(exported.folder)}, json_):
        return
    console.say(f"Exported to {to} at alpha {exported.alpha:g}. Each format was opened with its own library:")
    for name, difference in exported.formats.items():
        console.say(f"  {name}: the logits of {exported.num_checked} images differ by at most {difference:.1e}.")
    console.next_step(f"cat {shlex.quote(str(to / 'README.md'))}")
