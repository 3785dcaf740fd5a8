"""Classifying images with an export: decoded ahead by threads, answered batch by batch, written as they come.

Images are opened and resized as the evaluation of a training does it (``data.decode_images``, ``Clip.to_input``), and
computed in float32 like every export, so the predictions that a study has stored are repeated.

Shape letters: B images of a batch, S side, C classes, K classes that are told.
"""

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from carft_ray.data.cached_sets import transformed
from carft_ray.data.decode_images import decode_image
from carft_ray.data.source import PixelArray, Unlabelled, in_order
from carft_ray.errors import DataError, Problem, UsageError
from carft_ray.files import fsync_file, new_file
from carft_ray.results.export.opened import Opened
from carft_ray.training.evaluate import usual_batch
from carft_ray.training.out_of_memory import in_batches
from carft_ray.untrusted import csv_cell

SCHEMA = pa.schema([("file", pa.string()), ("class", pa.string()), ("probability", pa.float32())])
ENDINGS = (".csv", ".parquet", ".jsonl")
_GROUP = 2**16  # rows of a row group of a Parquet file
Write = Callable[[pa.Table], None]


@dataclass
class Counts:
    """What became of the images.

    Attributes:
        num_images: That were classified.
        classes: How many of them have which class as the most probable one.
        unreadable: Names of the others, each with the reason.
    """

    num_images: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def predict(
    export: Opened,
    images: Iterable[Unlabelled],
    top: int,
    max_pixels: int,
    write: Write,
    on_image: Callable[[int], None] = lambda done: None,
    on_unreadable: Callable[[DataError], None] = lambda error: None,
) -> Counts:
    """Classifies images; one that cannot be read is counted and passed over.

    Args:
        export: What classifies.
        images: In the order of the answers.
        top: K, how many classes are told of each image.
        max_pixels: A larger image counts as unreadable.
        write: Takes the answers of a batch, a table of ``SCHEMA``.
        on_image: Takes how many images are done.
        on_unreadable: Takes the reason of an image that cannot be read.

    Raises:
        DataError: The model gives numbers that are not finite.
        OutOfMemoryError: One image does not fit on the device.
    """

    def made(image: Unlabelled) -> tuple[str, PixelArray | DataError]:
        try:
            return image.name, transformed(decode_image(image.read(), image.place, max_pixels), export.to_input)
        except DataError as error:
            return image.name, error

    counts, size = Counts(), usual_batch(export.device)
    names: list[str] = []
    pixels_BHWC = np.empty((size, export.image_size, export.image_size, 3), np.uint8)

    def answer() -> None:
        table = answers(export, names, pixels_BHWC[: len(names)], top)
        write(table)
        counts.num_images += len(names)
        counts.classes.update(table["class"].to_pylist()[::top])
        names.clear()

    with contextlib.closing(in_order(made, images, ahead=size)) as found:
        for done, (name, pixels) in enumerate(found, start=1):
            if isinstance(pixels, DataError):
                counts.unreadable.append((name, str(pixels)))
                on_unreadable(pixels)
            else:
                pixels_BHWC[len(names)] = pixels
                names.append(name)
            if len(names) == size:
                answer()
                on_image(done)
    if names:
        answer()
    return counts


def answers(export: Opened, names: list[str], pixels_BHWC: PixelArray, top: int) -> pa.Table:
    """Returns the ``top`` most probable classes of each image, a row each, the most probable first.

    Probabilities are the softmax of the logits; of equal ones the first class comes first, as in ``evaluate.answers``.

    Args:
        export: What classifies.
        names: Of the images, [B].
        pixels_BHWC: uint8 [B, S, S, 3].
        top: K.

    Raises:
        DataError, OutOfMemoryError: Same as in ``predict``.
    """

    def of(positions: np.ndarray) -> tuple[Tensor, Tensor]:
        logits_BC = export.logits(pixels_BHWC[positions]).float()
        if not bool(logits_BC.isfinite().all()):
            rule, step = "must give finite numbers", "Restore the export from a copy, or export other weights."
            raise DataError(Problem(str(export.folder), rule, f"others for {names[positions[0]]}", next_step=step))
        logits_BC, classes_BC = logits_BC.sort(dim=1, descending=True, stable=True)
        return logits_BC.double().softmax(dim=1)[:, :top].float().cpu(), classes_BC[:, :top].cpu()

    parts = in_batches(of, np.arange(len(names)), len(names), export.image_size, export.device)
    probabilities_BK, classes_BK = (torch.cat(column) for column in zip(*parts, strict=True))
    words = [export.class_names[index] for index in classes_BK.flatten().tolist()]
    files = [name for name in names for _ in range(top)]
    return pa.table([files, words, probabilities_BK.flatten().numpy()], schema=SCHEMA)


def check_target(to: Path, given: Iterable[Path]) -> None:
    """Checks where answers are to be written.

    Args:
        to: The file.
        given: What the images are read from.

    Raises:
        UsageError: It has another ending than ``ENDINGS``, is in no folder, is one, or is one of the inputs.
    """
    if to.suffix.lower() not in ENDINGS:
        raise UsageError(Problem("--to", "must be a file whose name ends in a known way", str(to), ENDINGS))
    if not to.parent.is_dir():
        raise UsageError(
            Problem("--to", "must be in an existing folder", str(to), next_step=f"Make it: mkdir -p {to.parent}")
        )
    if to.exists() and not to.is_file():
        raise UsageError(Problem("--to", "must be a file", str(to)))
    if any(each.exists() and to.exists() and os.path.samefile(each, to) for each in given):
        raise UsageError(Problem("--to", "must be another file than IMAGES", str(to)))


@contextlib.contextmanager
def writing_to(to: Path) -> Iterator[Write]:
    """Gives what writes answers to a file, which appears when the block ends well: whole, or not at all.

    Args:
        to: CSV, Parquet or JSON lines, by its ending.

    Raises:
        StorageError: It cannot be written.
    """
    with new_file(to) as temporary:
        if to.suffix.lower() == ".parquet":
            with pq.ParquetWriter(str(temporary), SCHEMA, compression="zstd") as writer:
                waiting: list[pa.Table] = []

                def write(table: pa.Table) -> None:
                    waiting.append(table)
                    if sum(map(len, waiting)) >= _GROUP:
                        writer.write_table(pa.concat_tables(waiting))
                        waiting.clear()

                yield write
                if waiting:
                    writer.write_table(pa.concat_tables(waiting))
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                yield csv_writer(file) if to.suffix.lower() == ".csv" else _json_writer(file)
        fsync_file(temporary)


def csv_writer(file: Any) -> Write:
    """Returns what writes answers as CSV to what has a ``write``; texts in quotes, as ``untrusted.csv_cell``."""
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(SCHEMA.names)

    def write(table: pa.Table) -> None:
        files, classes = (map(csv_cell, table[name].to_pylist()) for name in SCHEMA.names[:2])
        writer.writerows(zip(files, classes, _short(table), strict=True))

    return write


def _json_writer(file: Any) -> Write:
    def write(table: pa.Table) -> None:
        for row, probability in zip(table.to_pylist(), _short(table), strict=True):
            file.write(json.dumps({**row, "probability": probability}) + "\n")

    return write


def _short(table: pa.Table) -> Iterator[float]:
    """Yields the probabilities with no more digits than a float32 has."""
    return map(float, map(str, table["probability"].to_numpy()))
