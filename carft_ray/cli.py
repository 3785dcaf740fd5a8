"""The commands. Everything heavy is imported inside them, so that `--help` answers at once."""

import logging
import shlex
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from carft_ray.errors import (
    CarftError,
    DataError,
    HoldOutError,
    InterruptedRunError,
    Problem,
    RecipeError,
    UsageError,
    nearest,
)

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
StudyArgument = Annotated[Path, typer.Argument(help="The study directory.", show_default=False)]
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
    value = _load(recipe, set_, executor, num_workers)
    _search(value, recipe.absolute().parent, study, address, json_)


@app.command(epilog="Example:  carft-ray resume studies/quickstart --trials +4")
def resume(
    study: StudyArgument,
    trials: Annotated[
        str | None, typer.Option("--trials", metavar="N|+N", help="Trials in all, or with a plus how many more.")
    ] = None,
    executor: ExecutorOption = None,
    num_workers: WorkersOption = None,
    address: AddressOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Go on with a study where it was, or extend it; its recipe is its own resolved.yaml."""
    from carft_ray.results import overview

    study_dir = overview.require_study(study)
    overrides = []
    if trials is not None:
        overrides.append(f"search.trials={overview.total_trials(trials, overview.read_study(study_dir))}")
    recipe = overview.resolved_recipe(study_dir)
    _search(_load(recipe, overrides, executor, num_workers), study_dir, study, address, json_)


def _search(value: Any, base_dir: Path, study: Path, address: str | None, json_: bool) -> None:
    """What `search` and `resume` do once they have a recipe."""
    from carft_ray import console
    from carft_ray.recipe.advice import check_searchable

    if problems := check_searchable(value):
        raise RecipeError(problems)
    from carft_ray.launch.search import run_search
    from carft_ray.progress import search_shown
    from carft_ray.results.summary import study_summary, write_best, write_figure

    with search_shown(not json_, study, value.train.epochs) as on_event:
        result = run_search(value, base_dir, study, address, on_event)
    best_path, figure_path = write_best(value, base_dir, result), write_figure(value, result)
    summary = study_summary(value, result)
    if json_:
        console.print_json(summary)
        return
    if not result.num_new:
        console.say(f"Nothing to do: all {len(result.trials)} trials are finished.")
    console.out.print(console.trial_table(summary["rows"]))
    console.say("\n" + "\n".join(summary["lines"]))
    console.say(f"Results: {result.study_dir}; figure: {figure_path}")
    folder = shlex.quote(str(study))
    console.next_step(
        f"carft-ray train {shlex.quote(str(best_path))} --out runs/{value.name}-best",
        f"carft-ray export {folder} --to exports/{value.name}",
        f"carft-ray resume {folder} --trials +{max(4, value.search.trials // 2)}",
        f"tensorboard --logdir {folder}",
    )


@app.command(epilog="Example:  carft-ray status studies/quickstart")
def status(study: StudyArgument, json_: JsonOption = False, debug: DebugOption = False) -> None:
    """How far a study is: counts, the best trial, what runs. Nothing is locked or written."""
    from carft_ray import console
    from carft_ray.results import overview

    view = overview.read_study(study)
    answer = overview.status(view)
    if json_:
        console.print_json(answer)
        return
    finished, wanted, folder = answer["finished"], answer["wanted"], shlex.quote(str(study))
    console.out.print(f"{answer['name']}: {finished} of {wanted} trials are finished.", markup=False)
    console.out.print(console.count_table(answer["trials"]))
    rows = [*answer["baselines"], *([answer["best"]] if answer["best"] else [])]
    shown = {row["name"] for row in rows}
    rows += [row for row in answer["running"] if row["name"] not in shown]
    if rows:
        console.out.print()
        console.out.print(console.trial_table(rows))
    if view.holder is None:
        console.say("\nNo search runs on it.")
        more = f"carft-ray resume {folder}"
        if finished >= wanted:
            more += f" --trials +{max(4, wanted // 2)}"
        steps = [more, f"carft-ray ls {folder}"]
        if answer["best"]:
            steps.append(f"carft-ray export {folder} --to exports/{answer['name']}")
        console.next_step(*steps)
        return
    asked = "; it was asked to stop" if view.stopping else ""
    console.say(f"\nA search runs on it: {view.holder}{asked}.")
    running = [f"carft-ray logs {folder} {row['name']} --follow" for row in answer["running"][:1]]
    console.next_step(*running, f"carft-ray stop {folder}")


@app.command("ls", epilog="Example:  carft-ray ls studies/quickstart --sort objective --limit 10")
def list_(
    folder: Annotated[Path, typer.Argument(help="A study, or a folder with studies in it.", show_default=False)],
    sort: Annotated[
        str, typer.Option("--sort", metavar="objective|number", help="Best first, or in the order of the search.")
    ] = "objective",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only so many trials.")] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the trials of a study, or the studies of a folder. Nothing is locked or written."""
    from carft_ray import console
    from carft_ray.results import overview

    orders = ("objective", "number")
    if sort not in orders:
        raise UsageError(Problem("--sort", "must be an order", repr(sort), orders, nearest(sort, orders)))
    quoted = shlex.quote(str(folder))
    if not overview.is_study(folder):
        studies = overview.list_studies(folder)
        if json_:
            console.print_json({"folder": str(folder), "studies": studies})
            return
        console.out.print(console.study_table(studies))
        console.next_step(f"carft-ray status {shlex.quote(str(folder / studies[0]['name']))}")
        return
    view = overview.read_study(folder)
    answer = overview.listing(view, by_objective=sort == "objective", limit=limit)
    if json_:
        console.print_json(answer)
        return
    rows = [*answer["baselines"], *answer["trials"]]
    if rows:
        console.out.print(console.trial_table(rows))
    left_out = answer["num_trials"] - len(answer["trials"])
    if left_out:
        console.say(f"{left_out} more trials; without --limit all are shown.")
    if not answer["num_trials"]:
        console.say("No trial has begun yet.")
    named = [f"carft-ray logs {quoted} {answer['trials'][0]['name']}"] if answer["trials"] else []
    console.next_step(f"carft-ray status {quoted}", *named)


@app.command(epilog="Example:  carft-ray logs studies/quickstart 7 --follow")
def logs(
    study: StudyArgument,
    trial: Annotated[
        str, typer.Argument(help="Number or name of a trial (7, t0007), or name of a baseline.", show_default=False)
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the training or its search ends.")
    ] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the log of one trial: when its attempts began, and the traceback of one that failed."""
    from carft_ray import console
    from carft_ray.results import logs, overview
    from carft_ray.search.study import ZERO_SHOT

    if follow and json_:
        raise UsageError(Problem("--json", "must stand without --follow: a document ends"))
    view = overview.read_study(study)
    row, path = logs.find_log(view, trial)
    lines = logs.read_log(path)
    if follow and view.holder is not None and row.outcome == "running":
        try:
            for line in logs.follow_log(path, view.study_dir):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        except KeyboardInterrupt:
            console.say("The search goes on.")
    elif json_:
        console.print_json(lines or [])
    elif lines is None:
        why = "the zero-shot model is not trained" if row.name == ZERO_SHOT else f"it is {view.state(row)}"
        console.say(f"{row.name} has no log: {why}.")
    else:
        sys.stdout.write("".join(line + "\n" for line in lines))
    if not json_:
        console.next_step(f"carft-ray status {shlex.quote(str(study))}")


@app.command(epilog="Example:  carft-ray stop studies/quickstart")
def stop(
    study: Annotated[Path, typer.Argument(help="Folder of a study, or of a training.", show_default=False)],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask, and do not wait for the checkpoints.")] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a running search to write its checkpoints and end, as its own Ctrl-C does; then it can be resumed."""
    from carft_ray import console
    from carft_ray.launch.stop import ask_to_stop, wait_until_free
    from carft_ray.results import overview

    folder = shlex.quote(str(study))
    study_dir = overview.require_claimed(study)
    found = ask_to_stop(study_dir)
    answer = {"study": str(study_dir), "asked": found, "ended": found is None}
    try:
        if found is not None and not no_wait:
            if not json_:
                console.say(f"Asked {found} to stop; waiting for its checkpoints. Ctrl-C ends the waiting only.")
            wait_until_free(study_dir)
            answer["ended"] = True
    except KeyboardInterrupt:
        step = f"See: carft-ray status {folder}"
        raise InterruptedRunError(Problem("", "no longer waiting; it stops by itself", next_step=step)) from None
    if not overview.is_study(study_dir):  # a training of `train`
        if json_:
            console.print_json(answer)
        elif found is None:
            console.say(f"Nothing to stop: nothing runs on {study}.")
        else:
            console.say("The training has ended." if answer["ended"] else "Asked to stop.")
        return
    view = overview.read_study(study_dir)
    finished, wanted = view.num_finished, view.recipe.search.trials
    if json_:
        console.print_json({**answer, "finished": finished, "wanted": wanted})
        return
    so_far = f"{finished} of {wanted} trials are finished"
    if found is None:
        console.say(f"Nothing to stop: no search runs on {study}; {so_far}.")
    else:
        console.say(f"The search has ended; {so_far}." if answer["ended"] else f"Asked {found} to stop; {so_far}.")
    console.next_step(
        f"carft-ray status {folder}" if not answer["ended"] or finished >= wanted else f"carft-ray resume {folder}"
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
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Pre-train the tiny CLIP again from nothing (about ten minutes on an idle core)."""
    from carft_ray import console
    from carft_ray.learning.pretrain import NUM_STEPS, pretrain

    num_steps = steps or NUM_STEPS

    def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
        what = "step" if metrics else "picture"
        if not json_ and (done == total or done % (50 if metrics else 5000) == 0):
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            console.say(f"{what} {done}/{total}  {numbers}")

    pretrain(to, num_steps, progress=progress)
    if json_:
        console.print_json({"folder": str(to), "steps": num_steps})
        return
    console.next_step(
        f"carft-ray train search_spaces/quickstart.yaml --set model.name=local-dir:{to.absolute()} --out runs/own"
    )


@sandbox_app.command("images", epilog="Example:  carft-ray sandbox images --to sandbox_png")
def sandbox_images(
    to: Annotated[Path, typer.Option("--to", help="Folder of the images; must be new or empty.")],
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the sandbox as PNG files, domain/class/number.png, to look at or for other tools."""
    from carft_ray import console
    from carft_ray.data.sandbox import export_images

    with console.counting("images") as progress:
        export_images(to, progress)
    if json_:
        console.print_json({"folder": str(to)})
        return
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
