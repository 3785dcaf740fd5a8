"""What one reading of a set's files has found. Every command takes it from the cache, and reads no file again.

Of each image: the hash of its bytes and their number, the thumbnails by which the same picture is known
(``data.overlap``), and, but for test sets, its size, its mode, or why it cannot be decoded. Of a test set nothing is
kept that tells of its pictures before `test` but thumbnails; one that cannot be decoded has a black one.

- **Where.** ``records-<key>.arrow`` in the folder of the cache, 0.8 kB an image, mapped into memory.
- **Freshness.** The key is a hash of the place of the set and of its fingerprint: names, sizes and dates of the files.
  A file with another size or date makes it another set, which is read anew. Bytes that change while size and date
  stay are not noticed.
- **Kills.** Every ``PART`` images the pass writes what it has found, ``records-<key>.<number>.part``; the next pass
  goes on from there. Files that cannot be read are told and not kept: the next pass tries their part again.
- **Processes.** One reads a set, others that ask for it wait.

The look at 128 x 128 pixels that decides on candidates (``data.same_picture``) is not among it: 16 kB an image would be
21 GB for ImageNet. It reads the candidates a second time, which are few.

Shape letters: N images of a set, V = 4 views.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from carft_ray.data.cache import key_of, lock
from carft_ray.data.content import DIGEST_BYTES, image_digest, reading_threads
from carft_ray.data.images import DECODERS
from carft_ray.data.index import open_table, write_table
from carft_ray.data.listing import StoredSource, selection
from carft_ray.data.same_picture import WHOLE, Box, inside_border
from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.errors import DataError, Problem

FORMAT_VERSION = 1  # rises when other things are found in the same files
PART = 4096  # images after which a killed pass goes on
CHUNK = 16  # images of a task
SIDE = 8  # pixels of a thumbnail
VIEWS: tuple[Box, ...] = (WHOLE, (0.05, 0.95, 0.05, 0.95), (0.15, 0.85, 0.15, 0.85))  # and inside the border
NUM_VIEWS = len(VIEWS) + 1
SHORT_SIDE = 80  # pixels of the shorter side that are enough for views of a picture without a border
BORDER_SIDE = 192  # and with one, which must be cut off where it ends
NUM_NAMED = 3  # images that a warning names

OnProgress = Callable[[int, int], None]

_log = logging.getLogger(__name__)
_told: set[tuple[str, ...]] = set()  # of this process: images left out; commands open a set several times

_SHAPE = (NUM_VIEWS, SIDE, SIDE, 3)
_BLACK = bytes(math.prod(_SHAPE))
_MODE_BYTES = 8
_UNREAD = -1  # number of bytes of a file that cannot be read
_KNOWN = [
    pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
    pa.field("num_bytes", pa.int64(), nullable=False),
    pa.field("thumbnails", pa.binary(len(_BLACK)), nullable=False),
    pa.field("problem", pa.string()),
]
_SEEN = [  # not of test sets
    pa.field("height", pa.int64(), nullable=False),
    pa.field("width", pa.int64(), nullable=False),
    pa.field("mode", pa.binary(_MODE_BYTES), nullable=False),
]
_NO_NUMBERS = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Records:
    """What is known of the images of a set; arrays are read-only views of the file.

    Attributes:
        digests: Hash of every file (of the pixels where there is none), uint8 [N, 16]; 0 where it cannot be read.
        thumbnails: Of each view, uint8 [N, 4, 8, 8, 3]; black where a picture cannot be decoded.
        num_bytes: Of every file, int64 [N]; negative where it cannot be read.
        problems: Why an image cannot be read or decoded, by its index; of a test set only why it cannot be read.
        heights: Pixels, int64 [N], 0 where a picture cannot be decoded; empty for a test set, as the next two.
        widths: Pixels, int64 [N].
        modes: Modes of Pillow, bytes [N].
    """

    digests: PixelArray
    thumbnails: PixelArray
    num_bytes: IntArray = field(default_factory=lambda: _NO_NUMBERS)
    problems: dict[int, Problem] = field(default_factory=dict)
    heights: IntArray = field(default_factory=lambda: _NO_NUMBERS)
    widths: IntArray = field(default_factory=lambda: _NO_NUMBERS)
    modes: npt.NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, f"S{_MODE_BYTES}"))

    def hashes(self) -> list[bytes]:
        """Returns a hash per image, in order.

        Raises:
            DataError: A file cannot be read.
        """
        if unread := np.flatnonzero(self.num_bytes < 0).tolist():
            raise DataError([self.problems[index] for index in unread[:NUM_NAMED]])
        return [row.tobytes() for row in self.digests]


def records(
    source: Source, cache_dir: Path, is_test: bool = False, on_progress: OnProgress = lambda done, total: None
) -> Records:
    """Returns what is known of the images of a set, from the cache or from reading each of its files once now.

    Images that ``exclude`` or ``on_bad_image`` leave out are read with the others of their part, so that they can be
    told and the set is known with and without them.

    Args:
        source: The set.
        cache_dir: Folder of the cache; made when missing.
        is_test: Keep nothing of sizes, modes, and of what cannot be decoded.
        on_progress: Told the number of images done and in all, now and then; not where all is known.

    Raises:
        DataError: A file has vanished since the set was listed.
        StorageError: The cache cannot be written.
    """
    whole = selection(source) if isinstance(source, StoredSource) else source
    path = cache_dir / f"records-{key_of([FORMAT_VERSION, DECODERS, is_test, identity(whole)])}.arrow"
    table = _opened(path, len(whole))
    if table is None:
        with lock(path.with_suffix(".lock")) as alone:
            if alone:
                for left in path.parent.glob(f".{path.stem}.*.tmp"):
                    left.unlink(missing_ok=True)  # of a process that was killed
            table = _opened(path, len(whole))
            if table is None:
                table = _read(whole, path, is_test, on_progress)
    kept = None
    if isinstance(source, StoredSource) and isinstance(whole, StoredSource) and len(source) < len(whole):
        kept = np.searchsorted(whole.rows, source.rows)
    return _records(table, source, kept)


def without_bad_images(
    source: StoredSource, cache_dir: Path, on_progress: OnProgress = lambda done, total: None
) -> StoredSource:
    """Returns a set without the images that cannot be decoded. The log tells how many, once per process.

    Args:
        source: The set.
        cache_dir: Folder of the cache; made when missing.
        on_progress: As ``records``.

    Raises:
        DataError: No image is left.
        StorageError: The cache cannot be written.
    """
    bad = records(source, cache_dir, on_progress=on_progress).problems
    if not bad:
        return source
    left = source.without(list(bad))
    if left.skipped not in _told:
        _told.add(left.skipped)
        few = "; ".join(str(problem).splitlines()[0] for problem in list(bad.values())[:NUM_NAMED])
        names = "carft-ray doctor RECIPE --json names all of training and validation"
        more = f"; and {len(bad) - NUM_NAMED} more ({names})" if len(bad) > NUM_NAMED else ""
        told = "%s: %d of %d images are left out, which cannot be decoded (on_bad_image: skip): %s%s"
        _log.warning(told, source.name, len(bad), len(source), few, more)
    if not len(left):
        rule = "there must be at least one image that can be decoded"
        raise DataError(Problem(source.name, rule, f"none of {len(bad)}, such as {next(iter(bad.values()))}"))
    return left


def identity(source: Source) -> str:
    """Returns the fingerprint of a set and where its files are: archives give many files one date and one size."""
    return f"{source.fingerprint} {source.home}"


def thumbnails_of(pixels: PixelArray, size: tuple[int, int] | None = None) -> PixelArray:
    """Returns the mean colours of 8 x 8 tiles of each view of a picture.

    Args:
        pixels: uint8 [H, W, 3].
        size: Height and width of the picture where ``pixels`` are so many eighths of it (``images.small_image``), so
            that the last row and column may be a part of one.

    Returns:
        uint8 [4, 8, 8, 3].
    """
    whole = Image.fromarray(pixels)
    height, width = pixels.shape[:2] if size is None else size
    eighths = next(k for k in range(8, 0, -1) if (-(-height * k // 8), -(-width * k // 8)) == pixels.shape[:2])
    for side in (SHORT_SIDE, BORDER_SIDE):
        factor = max(1, min(whole.size) // side)
        image = whole.reduce(factor)
        inside = inside_border(np.asarray(image.convert("L")))
        if inside == WHOLE:
            break
    sides = (width * eighths / 8 / factor, height * eighths / 8 / factor)  # in pixels of the smaller picture
    views = [_view(image, sides, box) for box in VIEWS]
    views.append(views[0] if inside == WHOLE else _view(image, sides, inside))
    return np.frombuffer(b"".join(views), np.uint8).reshape(_SHAPE)


def _view(image: Image.Image, sides: tuple[float, float], box: Box) -> bytes:
    left, right, top, bottom = box
    pixels = (left * sides[0], top * sides[1], right * sides[0], bottom * sides[1])
    return image.resize((SIDE, SIDE), Image.Resampling.BOX, pixels).tobytes()


def _opened(path: Path, num_images: int) -> pa.Table | None:
    """Opens a file of records; None when it is missing, damaged, or of another number of images."""
    table = open_table(path)
    return None if table is None or table.num_rows != num_images else table


def _read(source: Source, path: Path, is_test: bool, on_progress: OnProgress) -> pa.Table:
    """Reads the files of a set, part by part; what earlier passes have read is not read again."""
    schema = pa.schema(_KNOWN if is_test else _KNOWN + _SEEN)
    tables, parts = [schema.empty_table()], []
    with ThreadPoolExecutor(reading_threads()) as pool:
        for start in range(0, len(source), PART):
            indices = range(start, min(start + PART, len(source)))
            parts.append(path.with_suffix(f".{start}.part"))
            table = _opened(parts[-1], len(indices))
            if table is None:
                rows: list[dict[str, Any]] = []
                chunks = [indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK)]
                for found in pool.map(partial(_found, source, is_test), chunks):
                    rows += found
                    on_progress(start + len(rows), len(source))
                table = pa.Table.from_pylist(rows, schema)
                if len(source) > PART:
                    _keep(parts[-1], table)
            tables.append(table)
    whole = pa.concat_tables(tables).combine_chunks()
    if _keep(path, whole):
        for part in parts:
            part.unlink(missing_ok=True)
    return whole


def _keep(path: Path, table: pa.Table) -> bool:
    """Writes records unless one is of a file that cannot be read; tells whether it did."""
    complete = _UNREAD not in table["num_bytes"].to_numpy()
    if complete:
        write_table(path, table)
    return complete


def _found(source: Source, is_test: bool, indices: Sequence[int]) -> list[dict[str, Any]]:
    return [_record(source, is_test, index) for index in indices]


def _record(source: Source, is_test: bool, index: int) -> dict[str, Any]:
    """Returns what is found in an image, by columns; of a test set those of sizes and modes are passed over."""
    nothing = {"digest": bytes(DIGEST_BYTES), "num_bytes": _UNREAD, "thumbnails": _BLACK}
    not_decoded = {"height": 0, "width": 0, "mode": bytes(_MODE_BYTES)}
    try:
        if isinstance(source, StoredSource):
            content = source.content(index)
        else:
            pixels = source.pixels(index)
            content = pixels.tobytes()
    except DataError as error:
        return {**nothing, "problem": _as_text(error), **not_decoded}
    known = {"digest": image_digest(content), "num_bytes": len(content), "thumbnails": _BLACK}
    try:
        if isinstance(source, StoredSource):
            pixels, (height, width), mode = source.small(index, content, SHORT_SIDE)
            thumbnails = thumbnails_of(pixels, (height, width))
            if pixels.shape[:2] != (height, width) and (thumbnails[0] != thumbnails[-1]).any():
                thumbnails = thumbnails_of(source.decode(content, index))  # to see where the border ends
        else:
            thumbnails = thumbnails_of(pixels)
            (height, width), mode = pixels.shape[:2], "RGB"
    except DataError as error:
        return {**known, "problem": None if is_test else _as_text(error), **not_decoded}
    known["thumbnails"] = thumbnails.tobytes()
    return {**known, "height": height, "width": width, "mode": mode.encode().ljust(_MODE_BYTES, b"\0")}


def _as_text(error: DataError) -> str:
    """Returns the problem of an image without its place, which may be another when the records are read."""
    problem = error.problems[0]
    return json.dumps({"rule": problem.rule, "value": problem.value, "next_step": problem.next_step})


def _records(table: pa.Table, source: Source, kept: IntArray | None) -> Records:
    """Returns the records of a table; with ``kept`` those of these rows, which are the images of the source."""
    if kept is not None:
        table = table.take(pa.array(kept))
    num_images = len(source)
    told = table["problem"].combine_chunks()
    problems = {
        index: Problem(source.place(index), **json.loads(told[index].as_py()))
        for index in np.flatnonzero(told.is_valid().to_numpy(zero_copy_only=False)).tolist()
    }
    seen = {}
    if "mode" in table.column_names:
        height, width, mode = (_column(table, name) for name in ("height", "width", "mode"))
        seen = {"heights": height.view(np.int64), "widths": width.view(np.int64), "modes": mode.view(f"S{_MODE_BYTES}")}
    return Records(
        _column(table, "digest").reshape(num_images, DIGEST_BYTES),
        _column(table, "thumbnails").reshape(num_images, *_SHAPE),
        _column(table, "num_bytes").view(np.int64),
        problems,
        **seen,
    )


def _column(table: pa.Table, name: str) -> PixelArray:
    """Returns the bytes of a column, uint8, without a copy."""
    column = table[name].combine_chunks()
    if not len(column):
        return np.empty(0, np.uint8)
    width = column.type.bit_width // 8
    whole: PixelArray = np.frombuffer(column.buffers()[1], np.uint8)
    return whole[column.offset * width : (column.offset + len(column)) * width]
