"""Checking a recipe and its folders."""

import sys
from typing import Annotated

from typer import Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.ui import console


@command("validate recipe.yaml --set train.epochs=3 --show", common.ONE_TRAINING)
def validate(
    recipe: common.RecipeArgument,
    set_: common.SetOption = None,
    show: Annotated[bool, Option("--show", help="Print the complete resolved recipe.")] = False,
    deep: Annotated[bool, Option("--deep", help="Read all images, to check that no two roles share one.")] = False,
    json_: common.JsonOption = False,
) -> None:
    """Check a recipe and its folders. Without --deep, it opens no image and no model."""
    from carft_ray.recipe.loading import dump_recipe, recipe_hash

    value = common.load(recipe, set_)
    if deep:
        from carft_ray.data.cache import cache_dir
        from carft_ray.data.copies.shared_images import find_shared, shared_lines

        for line in shared_lines(find_shared(value, cache_dir(value), console.say)):
            console.say(line)
    if json_:
        console.print_json({"valid": True, "recipe_hash": recipe_hash(value), "recipe": value.model_dump(mode="json")})
    elif show:
        sys.stdout.write(dump_recipe(value))
    else:
        console.say(f"{recipe} is valid.")
        console.next_step(common.begin_line(value, recipe, set=set_))
