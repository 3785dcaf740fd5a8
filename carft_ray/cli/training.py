"""One training: check a recipe, train, evaluate, export."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from carft_ray.cli.common import (
    AddressOption,
    AlphaOption,
    DebugOption,
    ExecutorOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    TrialOption,
    WorkersOption,
    app,
    begin_line,
    load,
    quoted,
)
from carft_ray.errors import Problem, UsageError, nearest

PANEL = "One training"  # of the help


@app.command(
    epilog="Example:  carft-ray validate search_spaces/quickstart.yaml --set train.epochs=3 --show",
    rich_help_panel=PANEL,
)
def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    show: Annotated[bool, typer.Option("--show", help="Print the complete resolved recipe.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Read all images, to see that no two roles share one.")] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a recipe and its folders; without --deep nothing is loaded or decoded."""
    from carft_ray import console
    from carft_ray.recipe.loading import dump_recipe, recipe_hash

    value = load(recipe, set_)
    if deep:
        from carft_ray.data.sets import cache_dir
        from carft_ray.data.shared.shared_images import find_shared, shared_lines

        for line in shared_lines(find_shared(value, cache_dir(value), console.say)):
            console.say(line)
    if json_:
        console.print_json({"valid": True, "recipe_hash": recipe_hash(value), "recipe": value.model_dump(mode="json")})
    elif show:
        sys.stdout.write(dump_recipe(value))
    else:
        console.say(f"{recipe} is valid.")
        console.next_step(begin_line(value, quoted(recipe, set_)))


@app.command(epilog="Example:  carft-ray train search_spaces/quickstart.yaml --out runs/first", rich_help_panel=PANEL)
def train(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the training.")],
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune once and measure the alpha curve on the validation sets."""
    from carft_ray import console

    value = load(recipe, set_, executor, num_workers)
    command = f"carft-ray train {quoted(recipe, set_, executor, num_workers)} --out {shlex.quote(str(out))}"
    if address is not None:
        command += f" --address {shlex.quote(address)}"
        if value.resources.executor != "ray-train" and value.resources.num_workers == 1:
            console.warn("--address has no effect: one worker trains in this process")
    from carft_ray.launch.runs.single import train_once
    from carft_ray.progress import training_shown
    from carft_ray.results.next_steps import export_folder

    with training_shown(not json_) as (progress, report):
        say = (lambda text: None) if json_ else console.say
        result, zero_shot = train_once(value, out, resume, f"{command} --resume", say, progress, report, address)
    if json_:
        console.print_json({"folder": str(out), "zero_shot": zero_shot, **result})
        return
    rows = {
        "zero-shot": zero_shot,
        "fine-tuned, alpha 1": result["fine_tuned"],
        f"mixed, alpha {result['alpha']:g}": result["metrics"],
    }
    console.out.print(console.accuracy_table(rows, result["num_images"]))
    console.say("Validation sets; alpha was chosen on them. Intervals: over images.")
    folder = shlex.quote(str(out))
    console.next_step(
        f"carft-ray evaluate {folder}",
        f"carft-ray export {folder} --to {export_folder(value.name)}",
        f"tensorboard --logdir {folder}",
    )


@app.command(epilog="Example:  carft-ray evaluate runs/first --alpha 0.5", rich_help_panel=PANEL)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a training or a study.", show_default=False)],
    alpha: AlphaOption = None,
    trial: TrialOption = None,
    head: Annotated[
        str, typer.Option("--head", help="fine_tuned or zero_shot (the class head of the prompts).")
    ] = "fine_tuned",
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a trained model on id_val and ood_val again, at any alpha."""
    from carft_ray import console

    if head not in ("fine_tuned", "zero_shot"):
        heads = ("fine_tuned", "zero_shot")
        raise UsageError(Problem("--head", "must be the name of a head", repr(head), heads, nearest(head, heads)))
    from carft_ray.results.next_steps import export_folder
    from carft_ray.results.reading.trained import evaluate_trained, open_trained

    trained = open_trained(folder, trial)
    used = trained.result["alpha"] if alpha is None else alpha
    metrics, by_set = evaluate_trained(trained, used, head == "zero_shot")
    if json_:
        console.print_json({"name": trained.name, "alpha": used, "head": head, "metrics": metrics, "sets": by_set})
        return
    rows = {f"{trained.name}, alpha {used:g}": metrics}
    console.out.print(console.accuracy_table(rows, trained.result["num_images"]))
    console.out.print()
    console.out.print(console.set_table(by_set))
    chosen = f" --trial {shlex.quote(trial)}" if trial is not None else ""
    words = f"{shlex.quote(str(folder))}{chosen} --to {export_folder(trained.recipe.name)} --alpha {used:g}"
    console.next_step(f"carft-ray export {words}")


@app.command(
    epilog="Example:  carft-ray export studies/quickstart --to exports/quickstart --format open_clip,onnx",
    rich_help_panel=PANEL,
)
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a training or a study.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="Folder of the export; must be new or empty.")],
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="NAME", help="open_clip (the default), huggingface or onnx; several with commas."
        ),
    ] = None,
    alpha: AlphaOption = None,
    trial: TrialOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the mixed model for open_clip, transformers or onnxruntime, and open it with that to verify it."""
    from carft_ray import console
    from carft_ray.results.exports.export import export_model, parse_formats
    from carft_ray.results.reading.trained import open_trained

    formats = parse_formats(format_ or ())
    exported = export_model(open_trained(folder, trial), to, alpha, formats)
    if json_:
        console.print_json({**vars(exported), "folder": str(exported.folder)})
        return
    console.say(f"Exported to {to} at alpha {exported.alpha:g}. Opened again, each in a process of its own:")
    for name, difference in exported.formats.items():
        console.say(f"  {name}: the logits of {exported.num_checked} images differ by at most {difference:.1e}.")
    console.next_step(f"cat {shlex.quote(str(to / 'README.md'))}")
