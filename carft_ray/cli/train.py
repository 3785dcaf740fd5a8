"""One training: check a recipe, train, evaluate, export."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.ui import console


@common.command("validate recipe.yaml --set train.epochs=3 --show", common.ONE_TRAINING)
def validate(
    recipe: common.RecipeArgument,
    set_: common.SetOption = None,
    show: Annotated[bool, Option("--show", help="Print the complete resolved recipe.")] = False,
    deep: Annotated[bool, Option("--deep", help="Read all images, to see that no two roles share one.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Check a recipe and its folders; without --deep nothing is loaded or decoded."""
    from carft_ray.recipe.loading import dump_recipe, recipe_hash

    value = common.load(recipe, set_)
    if deep:
        from carft_ray.data.copies.shared_images import find_shared, shared_lines
        from carft_ray.data.sets import cache_dir

        for line in shared_lines(find_shared(value, cache_dir(value), console.say)):
            console.say(line)
    if json_:
        console.print_json({"valid": True, "recipe_hash": recipe_hash(value), "recipe": value.model_dump(mode="json")})
    elif show:
        sys.stdout.write(dump_recipe(value))
    else:
        console.say(f"{recipe} is valid.")
        console.next_step(common.begin_line(value, recipe, set=set_))


@common.command("train recipe.yaml --out runs/first", common.ONE_TRAINING, shared=common.RunOptions)
def train(
    recipe: common.RecipeArgument,
    out: Annotated[Path, Option(help="Folder of the training.")],
    set_: common.SetOption = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint in the folder.")] = False,
    json_: common.JsonOption = False,
    **shared: Any,
) -> None:
    """Fine-tune once and measure the alpha curve on the validation sets."""
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
    from carft_ray.results.next_steps import export_folder

    folder = shlex.quote(str(out))
    console.next_step(
        f"carft-ray evaluate {folder}",
        f"carft-ray export {folder} --to {export_folder(found.recipe_name)}",
        f"tensorboard --logdir {folder}",
    )


@common.command("evaluate runs/first --alpha 0.5", common.ONE_TRAINING)
def evaluate(
    folder: common.TrainedArgument,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    head: Annotated[str, Option(help="fine_tuned or zero_shot (the class head of the prompts).")] = "fine_tuned",
    json_: common.JsonOption = False,
) -> None:
    """Measure a trained model on id_val and ood_val again, at any alpha."""
    from carft_ray.api import actions
    from carft_ray.results.next_steps import export_folder

    found = actions.evaluate(folder, alpha=alpha, trial=trial, head=head)
    if console.print_json(found.numbers, json_):
        return
    console.show(found.tables[0])
    console.show()
    console.show(found.tables[1])
    line = common.command_line("export", folder, trial=trial)
    console.next_step(f"{line} --to {export_folder(found.recipe_name)} --alpha {found.numbers['alpha']:g}")


@common.command("export studies/quickstart --to exports/quickstart --format open_clip,onnx", common.ONE_TRAINING)
def export(
    folder: common.TrainedArgument,
    to: Annotated[Path, Option(help="Folder of the export; must be new or empty.")],
    format_: Annotated[
        list[str] | None,
        Option("--format", metavar="NAME", help="open_clip (the default), huggingface or onnx; or A,B."),
    ] = None,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    json_: common.JsonOption = False,
) -> None:
    """Write the mixed model for open_clip, transformers or onnxruntime. Each opens what was written, as a check."""
    from carft_ray.api import actions

    exported = actions.export(folder, to, formats=format_ or (), alpha=alpha, trial=trial)
    if console.print_json({**vars(exported), "folder": str(exported.folder)}, json_):
        return
    console.say(f"Exported to {to} at alpha {exported.alpha:g}. Opened again, each in a process of its own:")
    for name, difference in exported.formats.items():
        console.say(f"  {name}: the logits of {exported.num_checked} images differ by at most {difference:.1e}.")
    console.next_step(f"cat {shlex.quote(str(to / 'README.md'))}")
