"""The commands. Everything heavy is imported inside them, so that `--help` answers at once."""

import logging
import shlex
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.errors import CarftError, DataError, HoldOutError, Problem, RecipeError, UsageError, nearest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Search hyperparameters of CAR-FT (context-aware robust fine-tuning of CLIP) with Ray and Optuna, for "
    "accuracy in-distribution and out-of-distribution together.\n\n"
    "Try it:  carft-ray search search_spaces/quickstart.yaml --study studies/quickstart",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="The built-in synthetic images and tiny CLIP.")
app.add_typer(sandbox_app, name="sandbox")

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the recipe; may be repeated.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ExecutorOption = Annotated[
    str | None, typer.Option("--executor", help="inline, ray-train or auto; over the recipe's resources.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--num-workers", min=1, help="Workers of one training; over the recipe's resources.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Address of a running Ray cluster; without it a Ray of its own.")
]
AlphaOption = Annotated[
    float | None, typer.Option("--alpha", min=0, max=1, help="Mixing coefficient; without it the chosen one.")
]
TrialOption = Annotated[str | None, typer.Option("--trial", help="Name of a trial of the study; without it the best.")]


class _Warnings(logging.Handler):
    """Shows the warnings that the library logs as those of the commands."""

    def emit(self, record: logging.LogRecord) -> None:
        from carft_ray import console

        console.warn(self.format(record))


def main() -> None:
    """Runs the command line; whatever goes wrong ends with one message and its exit code."""
    logger = logging.getLogger("carft_ray")
    logger.addHandler(handler := _Warnings(logging.WARNING))
    try:
        app()
    except Exception as error:  # the outermost boundary: nothing is swallowed, everything ends the process
        from carft_ray import console

        if "--debug" in sys.argv:
            traceback.print_exc()
        if not isinstance(error, CarftError):
            rule, value = "this is a fault of carft-ray, please report it", f"{type(error).__name__}: {error}"
            error = CarftError(Problem("", rule, value, next_step="Run it again with --debug to see where."))
        console.show_error(error)
        sys.exit(error.exit_code)
    finally:
        logger.removeHandler(handler)


@app.command(epilog="Example:  carft-ray validate search_spaces/quickstart.yaml --set train.epochs=3 --show")
def validate(
    recipe: RecipeArgument,
    set_: SetOption = None,
    show: Annotated[bool, typer.Option("--show", help="Print the complete resolved recipe.")] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a recipe and its folders; nothing is loaded or decoded."""
    from carft_ray import console
    from carft_ray.recipe.loading import dump_recipe, recipe_hash

    value = _load(recipe, set_)
    if json_:
        console.print_json({"valid": True, "recipe_hash": recipe_hash(value), "recipe": value.model_dump(mode="json")})
    elif show:
        sys.stdout.write(dump_recipe(value))
    else:
        console.say(f"{recipe} is valid.")
        console.next_step(f"carft-ray search {_quoted(recipe, set_)} --study studies/{value.name}")


@app.command(epilog="Example:  carft-ray search search_spaces/quickstart.yaml --study studies/quickstart")
def search(
    recipe: RecipeArgument,
    study: Annotated[Path, typer.Option("--study", help="Study directory; an existing study goes on.")],
    set_: SetOption = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search for the best hyperparameters; run again, it goes on where it was."""
    from carft_ray import console

    value = _load(recipe, set_, executor, num_workers)
    from carft_ray.recipe.advice import check_searchable

    if problems := check_searchable(value):
        raise RecipeError(problems)
    from carft_ray.launch.search import run_search
    from carft_ray.progress import announce
    from carft_ray.results.summary import study_summary, write_best, write_figure

    base_dir = recipe.absolute().parent
    result = run_search(value, base_dir, study, address, announce(show=not json_))
    best_path, figure_path = write_best(value, base_dir, result), write_figure(value, result)
    summary = study_summary(value, result)
    if json_:
        console.print_json(summary)
        return
    if not result.num_new:
        console.say(f"Nothing to do: all {value.search.trials} trials are finished.")
    console.out.print(console.trial_table(summary["rows"]))
    console.say("\n" + "\n".join(summary["lines"]))
    console.say(f"Results: {result.study_dir}; figure: {figure_path}")
    console.next_step(
        f"carft-ray train {shlex.quote(str(best_path))} --out runs/{value.name}-best",
        f"carft-ray export {shlex.quote(str(study))} --to exports/{value.name}",
    )


@app.command(epilog="Example:  carft-ray train search_spaces/quickstart.yaml --out runs/first")
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

    value = _load(recipe, set_, executor, num_workers)
    command = f"carft-ray train {_quoted(recipe, set_, executor, num_workers)} --out {shlex.quote(str(out))}"
    if address is not None:
        command += f" --address {shlex.quote(address)}"
        if value.resources.executor != "ray-train" and value.resources.num_workers == 1:
            console.warn("--address has no effect: one worker trains in this process")
    from carft_ray.launch.single import train_once
    from carft_ray.progress import training_shown

    with training_shown(not json_) as (progress, report):
        say = (lambda text: None) if json_ else console.say
        result, zero_shot = train_once(
            value, recipe.absolute().parent, out, resume, f"{command} --resume", say, progress, report, address
        )
    if json_:
        console.print_json({"folder": str(out), "zero_shot": zero_shot, **result})
        return
    rows = {
        "zero-shot": zero_shot,
        "fine-tuned, alpha 1": result["fine_tuned"],
        f"mixed, alpha {result['alpha']:g}": result["metrics"],
    }
    console.out.print(console.accuracy_table(rows, result["num_images"]))
    console.say("Validation sets; alpha was chosen on them. SE: of the images.")
    folder = shlex.quote(str(out))
    console.next_step(
        f"carft-ray evaluate {folder}",
        f"carft-ray export {folder} --to exports/{value.name}",
        f"tensorboard --logdir {folder}",
    )


@app.command(epilog="Example:  carft-ray evaluate runs/first --alpha 0.5")
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
    from carft_ray.results.trained import evaluate_trained, open_trained

    trained = open_trained(folder, trial)
    used = trained.result["alpha"] if alpha is None else alpha
    metrics = evaluate_trained(trained, used, head == "zero_shot")
    if json_:
        console.print_json({"name": trained.name, "alpha": used, "head": head, "metrics": metrics})
        return
    rows = {f"{trained.name}, alpha {used:g}": metrics}
    console.out.print(console.accuracy_table(rows, trained.result["num_images"]))
    chosen = f" --trial {shlex.quote(trial)}" if trial is not None else ""
    console.next_step(
        f"carft-ray export {shlex.quote(str(folder))}{chosen} --to exports/{trained.recipe.name} --alpha {used:g}"
    )


@app.command(epilog="Example:  carft-ray export studies/quickstart --to exports/quickstart")
def export(
    folder: Annotated[Path, typer.Argument(help="Folder of a training or a study.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="Folder of the export; must be new or empty.")],
    alpha: AlphaOption = None,
    trial: TrialOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the mixed model as a folder that stock open_clip opens, and verify it."""
    from carft_ray import console
    from carft_ray.results.export import export_model
    from carft_ray.results.trained import open_trained

    exported = export_model(open_trained(folder, trial), to, alpha)
    if json_:
        console.print_json({**vars(exported), "folder": str(exported.folder)})
        return
    console.say(
        f"Exported to {to} at alpha {exported.alpha:g}. Opened again: the logits of {exported.num_checked} images "
        f"differ by at most {exported.largest_difference:.1e}."
    )
    console.next_step(
        f"cat {shlex.quote(str(to / 'README.md'))}", f'open_clip.create_model_and_transforms("local-dir:{to}")'
    )


@sandbox_app.command("build", epilog="Example:  carft-ray sandbox build --to /tmp/tiny-clip")
def sandbox_build(
    to: Annotated[Path, typer.Option("--to", help="Folder of the model; must be new or empty.")],
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Pre-training steps; fewer make a weaker model.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Pre-train the tiny CLIP again from nothing (several minutes on two cores)."""
    from carft_ray import console
    from carft_ray.learning.pretrain import NUM_STEPS, pretrain

    num_steps = steps or NUM_STEPS

    def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
        what = "step" if metrics else "picture"
        if done == total or done % (50 if metrics else 5000) == 0:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            console.say(f"{what} {done}/{total}  {numbers}")

    pretrain(to, num_steps, progress=progress)
    console.next_step(
        f"carft-ray train search_spaces/quickstart.yaml --set model.name=local-dir:{to.absolute()} --out runs/own"
    )


@sandbox_app.command("images", epilog="Example:  carft-ray sandbox images --to sandbox_png")
def sandbox_images(
    to: Annotated[Path, typer.Option("--to", help="Folder of the images; must be new or empty.")],
    debug: DebugOption = False,
) -> None:
    """Write the sandbox as PNG files, domain/class/number.png, to look at or for other tools."""
    from carft_ray import console
    from carft_ray.data.sandbox import export_images

    with console.counting("images") as progress:
        export_images(to, progress)
    console.say(f"Wrote {to}: domain/class/number.png.")
    own = "" if to.name == "sandbox_png" else f"    # with {to} for each `path` in it"
    console.next_step(f"carft-ray search search_spaces/folders.yaml --study studies/folders{own}")


def _load(path: Path, overrides: list[str] | None, executor: str | None = None, num_workers: int | None = None) -> Any:
    """Loads and checks a recipe as far as that needs no torch; warnings go to standard error."""
    from carft_ray import console
    from carft_ray.data.sets import check_roles, check_sets
    from carft_ray.learning.catalog import check_model
    from carft_ray.recipe.advice import warnings
    from carft_ray.recipe.loading import load_recipe

    chosen = {"resources.executor": executor, "resources.num_workers": num_workers}
    asked = [*(overrides or ()), *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
    recipe = load_recipe(path, asked)
    base_dir = path.absolute().parent
    if problems := check_model(recipe.model, base_dir):
        raise RecipeError(problems)
    if problems := check_roles(recipe, base_dir):
        raise HoldOutError(problems)
    if problems := check_sets(recipe, base_dir):
        raise DataError(problems)
    for text in warnings(recipe):
        console.warn(text)
    return recipe


def _quoted(
    recipe: Path, overrides: list[str] | None, executor: str | None = None, num_workers: int | None = None
) -> str:
    words = [str(recipe)]
    for override in overrides or ():
        words += ["--set", override]
    if executor is not None:
        words += ["--executor", executor]
    if num_workers is not None:
        words += ["--num-workers", str(num_workers)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
