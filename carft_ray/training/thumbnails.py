"""Small pictures of validation images whose answers change between zero-shot, the chosen alpha and alpha 1.

A report opens no set, so a training, which has the decoded ones at hand, keeps them with its predictions: set, sample
id, and the picture as JPEG. What has changed is read from the predictions whenever it is shown. A study keeps the
pictures of the trials whose weights it keeps.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from carft_ray import files
from carft_ray.data.decode_images import small_jpeg
from carft_ray.data.source import IdArray, ImageSet
from carft_ray.errors import StorageError
from carft_ray.evaluation.predictions import correct_matrix, read_bounded, sample_ids

SIDE = 96  # pixels of the longer side
MOST_ROWS, MOST_BYTES = 2**16, 2**28  # that are read
QUALITY = 80  # of JPEG: 1 to 4 kB a picture
SCHEMA = pa.schema([("set", pa.string()), ("sample_id", pa.uint64()), ("jpeg", pa.binary())])


def changed(table: pa.Table, set_name: str, alphas: Sequence[float]) -> dict[str, IdArray]:
    """Returns the images of a set that are classified right at some of the alphas and wrong at others.

    Args:
        table: Predictions that hold the set at these alphas.
        set_name: The set.
        alphas: R of them, rising.

    Returns:
        Sample ids, uint64, rising, by pattern: a digit per alpha, 1 where the answer is right. ``010`` is right in the
        middle alone. A pattern that no image has is left out.
    """
    ids = sample_ids(table, set_name, alphas[0])
    correct_RN = correct_matrix([(table, alpha) for alpha in alphas], set_name)
    patterns = ["".join(digits) for digits in itertools.product("01", repeat=len(alphas))][1:-1]
    found = {}
    for pattern in patterns:
        wanted_R1 = np.array([[digit == "1"] for digit in pattern])
        if (has_it := (correct_RN == wanted_R1).all(axis=0)).any():
            found[pattern] = ids[has_it]
    return found


def write_thumbnails(path: Path, table: pa.Table, alpha: float, sets: Sequence[ImageSet], number: int) -> None:
    """Writes pictures of images whose answers change between alpha 0, the chosen one and 1.

    Sets and patterns take turns, so that each has pictures; within one, those with the lowest sample ids come first.

    Args:
        path: The file; appears whole or not at all.
        table: Predictions of the training.
        alpha: The chosen one.
        sets: The validation sets, decoded.
        number: Pictures at most; with 0 nothing is written.

    Raises:
        StorageError: It cannot be written.
    """
    if not number:
        return
    alphas = sorted({0.0, alpha, 1.0})
    groups = [
        [(each, one) for one in ids[:number]] for each in sets for ids in changed(table, each.name, alphas).values()
    ]
    turns = [each for turn in itertools.zip_longest(*groups) for each in turn if each is not None]
    rows = [
        {"set": image_set.name, "sample_id": int(sample_id), "jpeg": _picture(image_set, sample_id)}
        for image_set, sample_id in turns[:number]
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
    files.write_bytes(path, buffer.getvalue())


def _picture(image_set: ImageSet, sample_id: int) -> bytes:
    index = int(np.flatnonzero(image_set.sample_ids == sample_id)[0])
    return small_jpeg(image_set.images_NHWC[index], SIDE, QUALITY)


def read_thumbnails(path: Path) -> pa.Table:
    """Returns the pictures of a training, as ``SCHEMA`` has them; none where it kept none, or they are damaged."""
    try:
        found = read_bounded(path, SCHEMA, MOST_ROWS, MOST_BYTES, 1)
    except (OSError, ValueError, StorageError, pa.ArrowException):
        return SCHEMA.empty_table()
    is_whole = found.schema.equals(SCHEMA) and not any(column.null_count for column in found.columns)
    return found if is_whole else SCHEMA.empty_table()
