"""One training."""

import shlex
from typing import Annotated, Any

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("train recipe.yaml --out runs/first", common.ONE_TRAINING, shared=common.RunOptions)
def train(
    recipe: common.RecipeArgument,
    out: Annotated[str, Option(help="Folder of the training, or s3://BUCKET/NAME.")],
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
    from carft_ray.results.adviser import export_folder
    from carft_ray.study.place import own_folder

    folder, logs = shlex.quote(out), shlex.quote(str(own_folder(out, need=None)))
    console.next_step(
        f"carft-ray evaluate {folder}",
        f"carft-ray export {folder} --to {export_folder(found.recipe_name)}",
        f"tensorboard --logdir {logs}",
    )
