"""The commands `evaluate`, `export` and `predict` as functions: what is done with a training that has ended."""

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carft_ray.api.answers import Answer, Predicted
from carft_ray.api.checks import as_command, several
from carft_ray.errors import Problem, UsageError, require_choice
from carft_ray.recipe.schema.data import MAX_PIXELS, PILLOWS_LIMIT
from carft_ray.ui import console
from carft_ray.words import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from carft_ray.results.export.export import Exported

HEADS = ("fine_tuned", "zero_shot")
logger = logging.getLogger(__name__)


@as_command
def evaluate(
    folder: str | Path,
    *,
    alpha: float | None = None,
    trial: str | int | None = None,
    head: str = HEADS[0],
    trust_paths: bool = False,
) -> Answer:
    """Measures a trained model on ``id_val`` and ``ood_val`` again, at any alpha. No test set is opened.

    Args:
        folder: Of a training or a study, or the address of one in a bucket.
        alpha: Mixing coefficient, 0 to 1; None: the chosen one.
        trial: Number or name of a trial, or name of a baseline; None: the best.
        head: ``fine_tuned``, or ``zero_shot`` for the class head of the prompts.
        trust_paths: Same as in ``resume``.

    Returns:
        ``name``, ``alpha``, ``head``, ``metrics``, and ``sets`` with more numbers per set.

    Raises:
        UsageError: There is no such training, head or alpha; or as in ``resume``.
        NoSuccessfulTrialError: It is not finished.
        StorageError: Its weights were removed, or one of its files is damaged.
    """
    require_choice("--head", "must be the name of a head", head, HEADS)
    _check_alpha(alpha)
    from carft_ray.results.reading.trained import evaluate_trained, open_trained

    trained = open_trained(folder, trial, "evaluate {}", trust_paths)
    used = trained.result["alpha"] if alpha is None else alpha
    metrics, by_set = evaluate_trained(trained, used, head == "zero_shot")
    numbers = {"name": trained.name, "alpha": used, "head": head, "metrics": metrics, "sets": by_set}
    rows = {f"{trained.name}, alpha {used:g}": metrics}
    num_images = {name: each["num_images"] for name, each in by_set.items()}
    tables = (console.accuracy_table(rows, num_images), console.set_table(by_set))
    return Answer(trained.recipe.name, numbers, tables)


@as_command
def export(
    folder: str | Path,
    to: str | Path,
    *,
    formats: Sequence[str] = (),
    alpha: float | None = None,
    trial: str | int | None = None,
    trust_paths: bool = False,
) -> "Exported":
    """Writes the mixed model for open_clip, transformers or onnxruntime; each library opens its export as a check.

    By default it is the model that the study delivers: the tested one, else the best of the winner's trainings.

    Args:
        folder: Of a training or a study, or the address of one in a bucket.
        to: Folder of the export; must be new or empty.
        formats: Any of ``open_clip``, ``huggingface`` and ``onnx``; default: open_clip.
        alpha: Same as in ``evaluate``.
        trial: Same as in ``evaluate``; None: that model. Another one is marked as not tested.
        trust_paths: Same as in ``resume``.

    Returns:
        Folder, training, alpha, and the largest difference of a logit per format.

    Raises:
        UsageError: A format is unknown or cannot store the model, ``to`` is not empty; or as in ``evaluate``.
        NoSuccessfulTrialError: Same as in ``evaluate``.
        StorageError: It cannot be written, or the reopened model gives other logits.
    """
    _check_alpha(alpha)
    from carft_ray.results.delivered import chosen
    from carft_ray.results.export.export import export_model, parse_formats
    from carft_ray.results.reading.study_view import require_study
    from carft_ray.results.reading.trained import folder_of_models, open_trained

    asked = parse_formats(several(formats))
    study_dir = require_study(folder_of_models(folder), "must be a study or the folder of a training")
    about = chosen(study_dir, trial, alpha)
    command = f"export {{}} --to {shlex.quote(str(to))}"
    trained = open_trained(study_dir, about.trial, command, trust_paths, with_sets=False)
    return export_model(trained, Path(to), about, asked)


@as_command
def predict(
    export: str | Path,
    images: str | Path | Sequence[str | Path],
    to: str | Path | None = None,
    *,
    top: int = 1,
    image: str | None = None,
    id: str | None = None,
    root: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    on_rows: Callable[["pa.Table"], None] | None = None,
    progress: bool = True,
    strict: bool = True,
) -> Predicted:
    """Classifies images with an export. They are opened and resized as in the evaluation of a training.

    The answers have the columns ``file``, ``class`` and ``probability``, and ``top`` rows per image, the most probable
    class first. An image that cannot be read is named in a warning and has no row.

    Args:
        export: Folder that ``export`` has written, in any format.
        images: A folder with images at any depth, an image file, or a CSV, Parquet or Arrow table; or several of them.
        to: File for the answers: ``.csv``, ``.parquet`` or ``.jsonl``. None: they are returned, in memory.
        top: Number of classes per image.
        image: Column of a table with the images: paths, or the bytes of files; None: same as in a recipe.
        id: Column of a table with the names of the images; None: their paths, else file and row.
        root: Folder that the paths in a table are relative to; None: the folder of the table.
        max_pixels: A larger image counts as unreadable.
        on_rows: Called with the answers of each batch, in place of ``to``; they are not returned then.
        progress: Show progress.
        strict: Raise at the end if an image could not be read. False: such images are in the result.

    Returns:
        Counts; ``rows`` has the answers if neither ``to`` nor ``on_rows`` is given.

    Raises:
        UsageError: ``export`` is no export, ``to`` cannot be written to, or ``top`` is none of its classes.
        DataError: The export is damaged; there is no image; or an image could not be read.
        StorageError: ``to`` cannot be written.
    """
    from contextlib import nullcontext

    import pyarrow as pa

    from carft_ray.data.unlabelled import find_images
    from carft_ray.results.export import predict as prediction
    from carft_ray.results.export.opened import open_export, read_head, require_export
    from carft_ray.ui.progress import images_shown

    given, folder = [Path(each) for each in several(images)], Path(export)
    if not 1 <= max_pixels <= PILLOWS_LIMIT:
        raise UsageError(Problem("--max-pixels", f"must be from 1 to {PILLOWS_LIMIT:,}", f"{max_pixels:,}"))
    if to is not None:
        prediction.check_target(Path(to), given)
    form = require_export(folder)
    head = read_head(folder)
    if not 1 <= top <= len(head.class_names):
        rule = f"must be from 1 to {len(head.class_names):,}, the number of classes"
        raise UsageError(Problem("--top", rule, f"{top:,}"))
    number, found = find_images(given, image, id, None if root is None else Path(root))
    opened = open_export(folder, form, head)
    kept: list[pa.Table] = []
    rows = nullcontext(on_rows or kept.append) if to is None else prediction.writing_to(Path(to))
    with rows as write, images_shown(progress, "images") as shown:
        counts = prediction.predict(
            opened, found(), top, max_pixels, write, lambda done: shown(done, number), lambda e: logger.warning("%s", e)
        )
    numbers = {
        "export": str(folder),
        "format": form,
        "images": [str(each) for each in given],
        "to": None if to is None else str(to),
        "num_images": counts.num_images,
        "classes": dict(counts.classes.most_common()),
        "unreadable": [{"file": name, "reason": reason} for name, reason in counts.unreadable],
    }
    line = f"{counted(counts.num_images, 'image')} classified" + (f": {to}" if to else "")
    lines = [line, f"{counted(len(counts.unreadable), 'image')} not readable"] if counts.unreadable else [line]
    table = pa.concat_tables([prediction.SCHEMA.empty_table(), *kept]) if to is None and on_rows is None else None
    answer = Predicted(folder.name, numbers, (), tuple(lines), table)
    if strict:
        answer.check()
    return answer


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None and not 0 <= alpha <= 1:
        raise UsageError(Problem("--alpha", "must be from 0 to 1", f"{alpha:g}"))
