"""What can be wrong with a recipe, its images and its model, before a GPU is taken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from carft_ray import console
from carft_ray.cli import common
from carft_ray.errors import DataError, Problem, UsageError
from carft_ray.words import counted


@common.command("doctor search_spaces/folders.yaml", common.ONE_TRAINING)
def doctor(
    recipe: common.RecipeArgument,
    set_: common.SetOption = None,
    images: Annotated[int, Option(min=1, help="Images of each validation set for zero-shot.")] = 1000,
    quick: Annotated[bool, Option("--quick", help="Open no image: lists, model and prompts only.")] = False,
    pairs: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write all pairs of images in two roles: a .csv table or an .html page."),
    ] = None,
    json_: common.JsonOption = False,
) -> None:
    """Check data, prompts, model and machine before anything is trained. Test sets are counted and hashed only.

    Every image is read once. Ends with exit code 4 when a search would fail or mean nothing.
    """
    from carft_ray.data.shared.pairs_file import check_pairs_path, write_pairs
    from carft_ray.evaluation.doctor import as_plain_data, examine
    from carft_ray.recipe.loading import load_recipe

    if pairs is not None:
        check_pairs_path(pairs)
        if quick:
            raise UsageError(Problem("--pairs", "needs the images, which --quick does not open"))
    value = load_recipe(recipe, set_ or ())
    if json_:
        found = examine(value, images, quick)
        console.print_json(as_plain_data(found))
    else:
        with console.counting() as progress:
            found = examine(value, images, quick, console.say, progress)
        _show(found)
    if pairs is not None and found.pairs is None:
        console.warn(f"{pairs} is not written: images are compared when nothing else is wrong with the data.")
    elif pairs is not None and found.pairs is not None:
        write_pairs(pairs, found.pairs)
        console.say(f"{pairs}: {counted(len(found.pairs), 'pair')} of images in two roles")
    if found.errors:
        if json_:
            raise typer.Exit(DataError.exit_code)
        raise DataError(found.errors)
    if not json_:
        begin = common.begin_line(value, recipe, set=set_)
        plan = common.command_line("plan", recipe, set=set_)
        console.next_step(*([plan] if begin.startswith("carft-ray search") else []), begin)


def _show(found: Any) -> None:
    """Prints what was found, and a verdict where there is no error; errors end the command."""
    if found.sets:
        console.out.print(console.checkup_table(found.sets, found.zero_shot))
    for line in _model_lines(found.model, found.machine):
        console.say(line)
    for finding in found.findings:
        if finding.level == "note":
            console.say(f"note: {finding.problem}")
        elif finding.level == "warning":
            console.warn(str(finding.problem))
    if not found.errors:
        counts = [sum(one.level == level for one in found.findings) for level in ("warning", "note")]
        console.say(f"No error, {counted(counts[0], 'warning')}, {counted(counts[1], 'note')}.")


def _model_lines(model: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    if model:
        contexts = counted(model["num_contexts"], "context")
        if "effective_contexts" in model:
            contexts += f", in effect {model['effective_contexts']:.1f}"
        yield (
            f"model {model['name']}: {model['image_size']} pixels, s = {model['logit_scale']:.1f}, "
            f"{model['num_classes']} classes, {contexts}; {model['trained_weights'] / 1e6:.1f} million weights train, "
            f"{model['training_memory_gb']:.2g} GB with the frozen tower, gradients and AdamW, images come on top"
        )
    yield (
        f"machine: {machine['device']}, {counted(machine['gpus'], 'GPU')}, {counted(machine['cores'], 'core')}, "
        f"{machine['memory_gb']:.0f} GB memory, {machine['cache_free_gb']:.0f} GB free for {machine['cache_dir']}"
    )
