"""What one reading of a set's files has found. Every command takes it from the cache, and reads no file again.

Of each image: the hash of its bytes and their number, the thumbnails by which the same picture is known
(``data.shared.overlap``), and, but for test sets, its size, its mode, or why it cannot be decoded. Of a test set
nothing is kept that shows its pictures before `test` but thumbnails; one that cannot be decoded has a black one.

- **Where.** ``records-<key>.arrow`` in the folder of the cache, 0.8 kB an image, mapped into memory.
- **Freshness.** The key is a hash of the place of the set and of its fingerprint: names, sizes and dates of the files.
  A file with another size or date makes it another set, which is read anew. Bytes that change while size and date
  stay are not noticed.
- **Kills.** Every ``PART`` images the pass writes what it has found, ``records-<key>.<number>.part``; the next pass
  continues from there. Files that cannot be read are reported and not kept: the next pass tries their part again.
- **Processes.** One reads a set, others that ask for it wait.

The grey picture of 128 x 128 pixels that decides on candidates (``data.shared.same_picture``) is not kept: 16 kB an
image would be 21 GB for ImageNet. The candidates, which are few, are read a second time.

Shape letters: N images of a set, V = 4 views.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from carft_ray.data.caching.cache import key_of, made_once
from carft_ray.data.caching.index import open_table, write_table
from carft_ray.data.content import DIGEST_BYTES, image_digest, reading_threads
from carft_ray.data.images import DECODERS
from carft_ray.data.listing import StoredSource, selection
from carft_ray.data.shared.same_picture import WHOLE, Box, inside_border, may_have_border
from carft_ray.data.source import IntArray, PixelArray, Source, identity
from carft_ray.errors import DataError, Problem

FORMAT_VERSION = 3  # rises when other things are found in the same files
PART = 4096  # images after which a killed pass continues
CHUNK = 16  # images of a task
TOGETHER = 4  # pictures whose thumbnails are made at a time: what that takes stays in the processor's cache
SIDE = 8  # pixels of a thumbnail
VIEWS: tuple[Box, ...] = (WHOLE, (0.05, 0.95, 0.05, 0.95), (0.15, 0.85, 0.15, 0.85))  # and inside the border
NUM_VIEWS = len(VIEWS) + 1
SHORT_SIDE = 40  # pixels of a side that are enough for views
BORDER_SIDE = 192  # and to see where a border ends
SHARES = 256  # of a tile along an axis, that its pixels have
NUM_NAMED = 3  # images that a warning names

OnProgress = Callable[[int, int], None]

_log = logging.getLogger(__name__)
_warned: set[tuple[str, ...]] = set()  # of this process: images left out; commands open a set several times

_SHAPE = (NUM_VIEWS, SIDE, SIDE, 3)
_BLACK = bytes(math.prod(_SHAPE))
_MODE_BYTES = 8
_UNREAD = -1  # number of bytes of a file that cannot be read
_COLUMNS: dict[str, tuple[pa.DataType, Any]] = {  # type, and the value for a file that cannot be read
    "digest": (pa.binary(DIGEST_BYTES), bytes(DIGEST_BYTES)),
    "num_bytes": (pa.int64(), _UNREAD),
    "thumbnails": (pa.binary(len(_BLACK)), _BLACK),
    "problem": (pa.string(), None),
    "height": (pa.int64(), 0),
    "width": (pa.int64(), 0),
    "mode": (pa.binary(_MODE_BYTES), bytes(_MODE_BYTES)),
}
_FIELDS = [pa.field(name, kind, nullable=value is None) for name, (kind, value) in _COLUMNS.items()]
_NUM_OF_TEST = 4  # fields of a test set: what its images look like is not kept
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
    reported and the set is known with and without them.

    Args:
        source: The set.
        cache_dir: Folder of the cache; made when missing.
        is_test: Keep nothing of sizes, modes, and of what cannot be decoded.
        on_progress: Called with the number of images done and in all, now and then; not where all is known.

    Raises:
        DataError: A file has vanished since the set was listed.
        StorageError: The cache cannot be written.
    """
    whole = selection(source) if isinstance(source, StoredSource) else source
    limit = whole.max_pixels if isinstance(whole, StoredSource) else None
    path = cache_dir / f"records-{key_of([FORMAT_VERSION, DECODERS, is_test, identity(whole), limit])}.arrow"
    table = made_once(
        path,
        path.with_suffix(".lock"),
        lambda path: _opened(path, len(whole)),
        lambda: _read(whole, path, is_test, on_progress),
    )
    if isinstance(source, StoredSource) and isinstance(whole, StoredSource) and len(source) < len(whole):
        table = table.take(pa.array(np.searchsorted(whole.rows, source.rows)))
    texts = table["problem"].combine_chunks()
    problems = {
        index: Problem(source.place(index), **json.loads(texts[index].as_py()))
        for index in np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False)).tolist()
    }
    seen = {}
    if "mode" in table.column_names:
        height, width, mode = (_column(table, name) for name in ("height", "width", "mode"))
        seen = {"heights": height.view(np.int64), "widths": width.view(np.int64), "modes": mode.view(f"S{_MODE_BYTES}")}
    digests = _column(table, "digest").reshape(-1, DIGEST_BYTES)
    thumbnails = _column(table, "thumbnails").reshape(-1, *_SHAPE)
    return Records(digests, thumbnails, _column(table, "num_bytes").view(np.int64), problems, **seen)


def without_bad_images(
    source: StoredSource, cache_dir: Path, on_progress: OnProgress = lambda done, total: None
) -> StoredSource:
    """Returns a set without the images that cannot be decoded. The log states how many, once per process.

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
    if left.skipped not in _warned:
        _warned.add(left.skipped)
        few = "; ".join(str(problem).splitlines()[0] for problem in list(bad.values())[:NUM_NAMED])
        text = "%s: %d of %d images are left out, which cannot be decoded (on_bad_image: skip): %s"
        text += "; carft-ray doctor RECIPE --json names all of training and validation" if len(bad) > NUM_NAMED else ""
        _log.warning(text, source.name, len(bad), len(source), few)
    if not len(left):
        rule = "there must be at least one image that can be decoded"
        raise DataError(Problem(source.name, rule, f"none of {len(bad)}, such as {next(iter(bad.values()))}"))
    return left


def thumbnails_of(pixels: PixelArray, size: tuple[int, int] | None = None) -> PixelArray:
    """Returns the mean colours of 8 x 8 tiles of each view of a picture, or of many pictures of one size.

    Args:
        pixels: uint8 [..., H, W, 3].
        size: Height and width of a picture where ``pixels`` are so many eighths of it (``images.small_image``), so
            that the last row and column may be a part of one.

    Returns:
        uint8 [..., 4, 8, 8, 3].
    """
    shape = pixels.shape[-3:-1]
    height, width = shape if size is None else size
    eighths = next(k for k in range(8, 0, -1) if (-(-height * k // 8), -(-width * k // 8)) == shape)
    wholes = pixels.reshape(-1, *pixels.shape[-3:])
    reduced = [_reduced(whole, (height * eighths / 8, width * eighths / 8), SHORT_SIDE) for whole in wholes]
    smalls = np.stack([small for small, _ in reduced])
    views = _means(smalls, reduced[0][1], (height, width), VIEWS)
    views = np.concatenate([views, views[:, :1]], axis=1)
    for index in np.flatnonzero(may_have_border(smalls)).tolist():
        if inside_border(_grey(smalls[index])) != WHOLE:
            views[index, -1] = _inside(wholes[index])
    return views.reshape(*pixels.shape[:-3], *_SHAPE)


def _grey(pixels: PixelArray) -> PixelArray:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _inside(pixels: PixelArray) -> PixelArray:
    """Returns the view of what lies inside the border of a picture, uint8 [8, 8, 3]."""
    fine, _ = _reduced(pixels, pixels.shape[:2], BORDER_SIDE)
    left, right, top, bottom = inside_border(_grey(fine))
    rows, columns = fine.shape[:2]
    inside = fine[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)]
    small, size = _reduced(inside, inside.shape[:2], SHORT_SIDE)
    return np.asarray(_means(small[None], size, inside.shape[:2], (WHOLE,))[0, 0])


def _reduced(pixels: PixelArray, size: tuple[float, float], side: int) -> tuple[PixelArray, tuple[float, float]]:
    """Averages whole pixels of a picture so that each side of ``side`` and more keeps less than twice as many.

    Args:
        pixels: uint8 [H, W, 3].
        size: How many pixels high and wide the picture is: the last row and column may be a part of one.
        side: Pixels.

    Returns:
        The smaller picture, and how many of its own pixels high and wide that is.
    """
    down, across = (max(1, length // side) for length in pixels.shape[:2])
    if down == across == 1:
        return pixels, size
    return np.asarray(Image.fromarray(pixels).reduce((across, down))), (size[0] / down, size[1] / across)


def _means(
    pixels: PixelArray, size: tuple[float, float], original: tuple[int, int], boxes: tuple[Box, ...]
) -> PixelArray:
    """Returns the means of the tiles of some boxes of pictures.

    All sums are of whole numbers below 2**24, which float32 holds: they are the same in any order, on any machine.

    Args:
        pixels: uint8 [N, h, w, 3].
        size: How many pixels high and wide each picture is; the last row and column may be a part of one.
        original: How many it was before it was reduced: tiles end between these.
        boxes: What is divided into tiles.

    Returns:
        uint8 [N, boxes, 8, 8, 3].
    """
    number, height, width, channels = pixels.shape
    down = _shares(height, size[0], original[0], tuple(box[2:] for box in boxes))
    across = _shares(width, size[1], original[1], tuple(box[:2] for box in boxes))
    tiles = np.empty((number, len(boxes), SIDE, SIDE, channels), np.float32)
    for some in (slice(first, first + TOGETHER) for first in range(0, number, TOGETHER)):
        rows = down @ pixels[some].reshape(-1, 1, height, width * channels).astype(np.float32)
        tiles[some] = across[:, None] @ rows.reshape(-1, len(boxes), SIDE, width, channels)
    return np.asarray(tiles / SHARES**2 + 0.5, np.uint8)


@lru_cache
def _shares(length: int, size: float, original: int, spans: tuple[tuple[float, float], ...]) -> npt.NDArray[np.float32]:
    """Returns how much of each tile of some spans is of which pixel, whole ``SHARES`` that sum to it.

    Args:
        length: Number of pixels along an axis.
        size: And how many of them the picture has: the last may be a part of one.
        original: And how many it had before it was reduced.
        spans: First and last place, in shares of the size.

    Returns:
        float32 [spans, 8, pixels].
    """
    ends = np.minimum(np.arange(length + 1), size) / size
    low, high = np.array(spans).T[:, :, None]
    edges = low + (high - low) * np.arange(SIDE + 1) / SIDE
    if original * (high - low).min() >= SIDE:  # else some would have no pixel
        edges = np.floor(original * edges + 0.5) / original
    passed = (ends - edges[:, :-1, None]) / np.diff(edges)[:, :, None]  # shares of a tile up to the end of each pixel
    return np.asarray(np.diff(np.rint(SHARES * np.clip(passed, 0, 1))), np.float32)


def _opened(path: Path, num_images: int) -> pa.Table | None:
    """Opens a file of records; None when it is missing, damaged, or of another number of images."""
    table = open_table(path)
    return None if table is None or table.num_rows != num_images else table


def _read(source: Source, path: Path, is_test: bool, on_progress: OnProgress) -> pa.Table:
    """Reads the files of a set, part by part; what earlier passes have read is not read again."""
    schema = pa.schema(_FIELDS[:_NUM_OF_TEST] if is_test else _FIELDS)
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
    """Writes records unless one is of a file that cannot be read; returns whether it did."""
    complete = _UNREAD not in table["num_bytes"].to_numpy()
    if complete:
        write_table(path, table)
    return complete


def _found(source: Source, is_test: bool, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Returns what is found in images, by columns; of a test set those of sizes and modes are passed over.

    Thumbnails are made of all small pictures of one size together: one by one, threads would wait for each other.
    """
    rows: list[dict[str, Any]] = []
    alike = defaultdict(list)
    for index in indices:
        row, content, pixels = _decoded(source, is_test, index)
        rows.append(row)
        if pixels is not None and max(pixels.shape) < 2 * SHORT_SIDE:
            alike[row["height"], row["width"], pixels.shape].append((index, row, content, pixels))
        elif pixels is not None:
            _add_thumbnails(source, [(index, row, content, pixels)])  # at once, so that no two are in memory
    for pictures in alike.values():
        _add_thumbnails(source, pictures)
    return rows


def _add_thumbnails(source: Source, pictures: list[tuple[int, dict[str, Any], bytes, PixelArray]]) -> None:
    """Adds the thumbnails of pictures of one size to their rows.

    Args:
        source: The set.
        pictures: Index, row, bytes and pixels of each.
    """
    size = pictures[0][1]["height"], pictures[0][1]["width"]
    found = thumbnails_of(np.stack([pixels for *_, pixels in pictures]), size)
    in_border = (found[:, 0] != found[:, -1]).any((1, 2, 3)).tolist()
    for (index, row, content, pixels), thumbnails, cut in zip(pictures, found, in_border, strict=True):
        if cut and pixels.shape[:2] != size and isinstance(source, StoredSource):
            thumbnails = thumbnails_of(source.decode(content, index))  # to see where the border ends
        row["thumbnails"] = thumbnails.tobytes()


def _decoded(source: Source, is_test: bool, index: int) -> tuple[dict[str, Any], bytes, PixelArray | None]:
    """Returns what is found in an image but its thumbnails, its bytes, and its pixels; None: it cannot be decoded."""
    row = {name: value for name, (_, value) in _COLUMNS.items()}
    try:
        if isinstance(source, StoredSource):
            content = source.content(index)
        else:
            pixels = source.pixels(index)
            content = pixels.tobytes()
    except DataError as error:
        return {**row, "problem": _as_text(error)}, b"", None
    row["digest"], row["num_bytes"] = image_digest(content), len(content)
    try:
        if isinstance(source, StoredSource):
            pixels, (height, width), mode = source.small(index, content, SHORT_SIDE)
        else:
            (height, width), mode = pixels.shape[:2], "RGB"
    except DataError as error:
        return {**row, "problem": None if is_test else _as_text(error)}, content, None
    row["height"], row["width"], row["mode"] = height, width, mode.encode().ljust(_MODE_BYTES, b"\0")
    return row, content, pixels


def _as_text(error: DataError) -> str:
    """Returns the problem of an image without its place, which may be another when the records are read."""
    problem = error.problems[0]
    return json.dumps({"rule": problem.rule, "value": problem.value, "next_step": problem.next_step})


def _column(table: pa.Table, name: str) -> PixelArray:
    """Returns the bytes of a column, uint8, without a copy."""
    column = table[name].combine_chunks()
    if not len(column):
        return np.empty(0, np.uint8)
    width = column.type.bit_width // 8
    return np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width : (column.offset + len(column)) * width]
