"""One training: fine-tuning, measuring it again, exporting it, classifying with the export."""

import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from carft_ray.cli import common
from carft_ray.cli.program import command
from carft_ray.errors import Problem, UsageError
from carft_ray.recipe.schema.data import MAX_PIXELS, PILLOWS_LIMIT
from carft_ray.ui import console

if TYPE_CHECKING:
    import pyarrow as pa


@command("train recipe.yaml --out runs/first", common.ONE_TRAINING, shared=common.RunOptions)
def train(
    recipe: common.RecipeArgument,
    out: Annotated[str, Option(help="Folder of the training, or s3://BUCKET/NAME.")],
    method: common.MethodOption = None,
    set_: common.SetOption = None,
    resume: Annotated[bool, Option("--resume", help="Resume from the newest checkpoint.")] = False,
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


@command("soup studies/quickstart --member 3 --member 7", common.ONE_TRAINING)
def soup(
    study: common.StudyArgument,
    member: Annotated[
        list[str] | None, Option(metavar="TRIAL", help="Trial, baseline or confirm/NAME; repeatable, best first.")
    ] = None,
    kind: Annotated[
        str | None, Option(help="repeats, greedy, uniform or model_stock; default: repeats and greedy.")
    ] = None,
    executor: common.ExecutorOption = None,
    num_workers: common.WorkersOption = None,
    address: common.AddressOption = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Average the weights of trained models, and measure the result. The best model is exported."""
    shared: dict[str, Any] = {"executor": executor, "num_workers": num_workers}
    shared |= {"address": address, "trust_paths": trust_paths}
    again = common.command_line("soup", study, member=member or [], kind=kind, **shared)
    shared |= {"overrides": common.overrides_of(None, shared), "resume_command": again}
    from carft_ray.api import actions

    found = actions.soup(study, member or (), kind=kind, progress=not json_, **shared)
    if console.print_json(found.numbers, json_):
        return
    console.show(found.tables[0])
    console.say("\n" + "\n".join(found.lines))
    common.suggest(study, "soup", changed=True, address=address)


@command("evaluate runs/first --alpha 0.5", common.ONE_TRAINING)
def evaluate(
    folder: common.TrainedArgument,
    alpha: common.AlphaOption = None,
    trial: common.TrialOption = None,
    head: Annotated[str, Option(help="fine_tuned, or zero_shot (from the prompts).")] = "fine_tuned",
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Measure a trained model on id_val and ood_val, at any alpha."""
    from carft_ray.api import trained
    from carft_ray.results.adviser import export_folder

    found = trained.evaluate(folder, alpha=alpha, trial=trial, head=head, trust_paths=trust_paths)
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
    to: Annotated[Path, Option(help="Folder of the export; new or empty.")],
    format_: Annotated[
        list[str] | None,
        Option("--format", metavar="NAME", help="open_clip (default), huggingface, onnx; several: open_clip,onnx."),
    ] = None,
    alpha: common.AlphaOption = None,
    trial: common.ExportedOption = None,
    trust_paths: common.TrustPathsOption = False,
    json_: common.JsonOption = False,
) -> None:
    """Write the tested or best model for open_clip, transformers or onnxruntime, and check that it loads."""
    from carft_ray.api import trained

    exported = trained.export(folder, to, formats=format_ or (), alpha=alpha, trial=trial, trust_paths=trust_paths)
    if console.print_json({**vars(exported), "folder": str(exported.folder)}, json_):
        return
    console.say(f"{exported.said}.")
    console.say(f"Exported to {to}. Each format was opened with its own library:")
    for name, difference in exported.formats.items():
        console.say(f"  {name}: the logits of {exported.num_checked} images differ by at most {difference:.1e}.")
    predict = common.command_line("predict", to, "my_images", to="predictions.csv")
    console.next_step(predict, f"cat {shlex.quote(str(to / 'README.md'))}")


IMAGES = "Folder with images at any depth, image files, or a table: CSV, Parquet or Arrow."


@command("predict exports/quickstart my_images --to predictions.csv", common.ONE_TRAINING)
def predict(
    export: Annotated[Path, Argument(metavar="EXPORT", help="Folder that `export` has written.", show_default=False)],
    images: Annotated[list[Path], Argument(metavar="IMAGES...", help=IMAGES, show_default=False)],
    to: Annotated[Path | None, Option(metavar="FILE", help=".csv, .parquet or .jsonl; default: print CSV.")] = None,
    top: Annotated[int, Option(min=1, metavar="K", help="The K most probable classes, a row each.")] = 1,
    image: Annotated[
        str | None, Option(metavar="COLUMN", help="Column with paths or bytes; default: as in a recipe.")
    ] = None,
    id_: Annotated[
        str | None, Option("--id", metavar="COLUMN", help="Column with names of images; default: their paths.")
    ] = None,
    root: Annotated[
        Path | None, Option(metavar="DIR", help="Folder of the paths in a table; default: its own.")
    ] = None,
    max_pixels: Annotated[int, Option(min=1, max=PILLOWS_LIMIT, help="Largest size of an image.")] = MAX_PIXELS,
    json_: common.JsonOption = False,
) -> None:
    """Classify images with an export: file, class and probability of each.

    An unreadable image is named and has no row; the exit code is then 4.
    """
    if json_ and to is None:
        raise UsageError(Problem("--json", "needs --to: without it, the answers are printed"))
    from carft_ray.api import trained

    step = "Run the same command again."
    with common.interrupted_as("stopped; nothing was written" if to else "stopped", step):
        printed = None if to else _printer()
        found = trained.predict(
            export,
            images,
            to,
            top=top,
            image=image,
            id=id_,
            root=root,
            max_pixels=max_pixels,
            on_rows=printed,
            progress=to is not None and not json_,
            strict=False,
        )
    if not console.print_json(found.numbers, json_):
        console.say("\n".join(found.lines))
    found.check()


def _printer() -> Callable[["pa.Table"], None]:
    """Returns what prints answers as CSV, as they come."""
    from carft_ray.results.export.predict import csv_writer

    text = io.StringIO()
    write = csv_writer(text)

    def show(table: "pa.Table") -> None:
        write(table)
        console.show(text.getvalue().removesuffix("\n"))
        text.seek(0)
        text.truncate()

    return show
