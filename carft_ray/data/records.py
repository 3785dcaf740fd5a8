"""What one reading of a set's files has found, sets without the images that it could not decode, and facts of a set.

Every command takes it from the cache, and reads no file again.

Of each image: the hash of its bytes and their number, the hash of its pixels, the thumbnail by which the same picture
is found (``data.duplicates``), and, but for test sets, its size, its mode, or why it cannot be decoded. Of a test set
only the thumbnails show pictures before `test`; one that cannot be decoded has an empty thumbnail.

- **Where.** ``records-<key>.arrow`` in the folder of the cache, 0.8 kB an image, mapped into memory.
- **Freshness.** The key is a hash of the identity of the set: its place, and names, sizes, dates and change times of
  the files. A file that differs in one of them makes it another set, which is read anew.
- **Kills.** Every ``PART`` images the pass writes what it has found, ``records-<key>.<number>.part``; the next pass
  continues from there. Files that cannot be read are reported and not kept: the next pass tries their part again.
- **Processes.** One reads a set, others that ask for it wait.

Shape letters: N images of a set.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from carft_ray.data.cache import key_of, made_once
from carft_ray.data.decode_images import DECODERS
from carft_ray.data.file_index import open_table, write_table
from carft_ray.data.listing import StoredSource, selection
from carft_ray.data.source import (
    DIGEST_BYTES,
    IntArray,
    PixelArray,
    Source,
    image_digest,
    pixel_digest,
    reading_threads,
    set_digest,
)
from carft_ray.errors import DataError, Problem

FORMAT_VERSION = 9  # rises when other things are found in the same files
PART = 4096  # images after which a killed pass continues
CHUNK = 16  # images of a task
SIDE = 16  # pixels of a thumbnail
NUM_NAMED = 3  # images that a warning names
NUM_EXAMPLES = 5  # of images that are named
IMBALANCE = 10  # images of the largest class over those of the smallest from which on it is reported
OnProgress = Callable[[int, int], None]
_MODE_BYTES = 8
_UNREAD = -1  # number of bytes of a file that cannot be read
_COLUMNS: dict[str, tuple[pa.DataType, Any]] = {  # type, and the value for a file that cannot be read
    "digest": (pa.binary(DIGEST_BYTES), bytes(DIGEST_BYTES)),
    "num_bytes": (pa.int64(), _UNREAD),
    "pixels": (pa.binary(DIGEST_BYTES), bytes(DIGEST_BYTES)),
    "thumbnail": (pa.binary(3 * SIDE**2), bytes(3 * SIDE**2)),
    "problem": (pa.string(), None),
    "height": (pa.int64(), 0),
    "width": (pa.int64(), 0),
    "mode": (pa.binary(_MODE_BYTES), bytes(_MODE_BYTES)),
}
_FIELDS = [pa.field(name, kind, nullable=value is None) for name, (kind, value) in _COLUMNS.items()]
_NO_NUMBERS = np.empty(0, np.int64)
_log = logging.getLogger(__name__)
_warned: set[tuple[str, ...]] = set()  # of this process: images left out; commands open a set several times


@dataclass(frozen=True, eq=False)
class Records:
    """What is known of the images of a set; arrays are read-only views of the file.

    Attributes:
        digests: Hash of every file (of the pixels where there is none), uint8 [N, 16]; 0 where it cannot be read.
        pixels: Hash of every picture, uint8 [N, 16]; that of the file where it cannot be decoded.
        thumbnails: Every picture as ``thumbnail_of``, uint8 [N, 16, 16, 3]; zeros where it cannot be decoded.
        num_bytes: Of every file, int64 [N]; negative where it cannot be read.
        problems: Why an image cannot be read or decoded, by its index; of a test set only why it cannot be read.
        heights: Pixels, int64 [N], 0 where a picture cannot be decoded, and in a test set.
        widths: As ``heights``.
        modes: Modes of Pillow, bytes [N], empty where heights are 0.
    """

    digests: PixelArray
    pixels: PixelArray
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


def pixel_limit(source: Source) -> int | None:
    """Returns up to how many pixels an image is decoded; nothing is known of what a larger one shows."""
    return source.max_pixels if isinstance(source, StoredSource) else None


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
    key = key_of([FORMAT_VERSION, DECODERS, is_test, whole.identity, pixel_limit(whole)])
    path = cache_dir / f"records-{key}.arrow"
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
    num_bytes, heights, widths = (_column(table, name).view(np.int64) for name in ("num_bytes", "height", "width"))
    digests, pixels = (_column(table, name).reshape(-1, DIGEST_BYTES) for name in ("digest", "pixels"))
    thumbnails = _column(table, "thumbnail").reshape(-1, SIDE, SIDE, 3)
    modes = _column(table, "mode").view(f"S{_MODE_BYTES}")
    return Records(digests, pixels, thumbnails, num_bytes, problems, heights, widths, modes)


def thumbnail_of(pixels: PixelArray) -> PixelArray:
    """Returns a picture, uint8 [H, W, 3], squeezed into a square, uint8 [16, 16, 3]: Y, Cb, Cr as JPEG has them.

    All pixels count: with Pillow's ``reducing_gap=3`` 10 of 400 paintings were missed at 1.3 times their size.
    """
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small.convert("YCbCr"))


def _opened(path: Path, num_images: int) -> pa.Table | None:
    """Opens a file of records; None when it is missing, damaged, or of another number of images."""
    table = open_table(path)
    return None if table is None or table.num_rows != num_images else table


def _read(source: Source, path: Path, is_test: bool, on_progress: OnProgress) -> pa.Table:
    """Reads the files of a set, part by part; what earlier passes have read is not read again."""
    schema = pa.schema(_FIELDS)
    tables, parts = [schema.empty_table()], []
    with ThreadPoolExecutor(reading_threads()) as pool:
        for start in range(0, len(source), PART):
            indices = range(start, min(start + PART, len(source)))
            parts.append(path.with_suffix(f".{start}.part"))
            table = _opened(parts[-1], len(indices))
            if table is None:
                rows: list[dict[str, Any]] = []
                chunks = [indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK)]
                for found in pool.map(lambda some: [_record(source, is_test, index) for index in some], chunks):
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


def _record(source: Source, is_test: bool, index: int) -> dict[str, Any]:
    """Returns what is found in an image, by columns."""
    row = {name: value for name, (_, value) in _COLUMNS.items()}
    try:
        content = source.content(index)
    except DataError as error:
        return {**row, "problem": _as_text(error)}
    row["digest"] = row["pixels"] = image_digest(content)
    row["num_bytes"] = len(content)
    try:
        pixels, mode = (
            source.decoded(content, index) if isinstance(source, StoredSource) else (source.pixels(index), "RGB")
        )
    except DataError as error:
        return {**row, "problem": None if is_test else _as_text(error)}
    row["thumbnail"] = thumbnail_of(pixels).tobytes()
    row["pixels"] = pixel_digest(pixels, row["thumbnail"])
    if not is_test:  # what the images of a test set look like is not kept
        row["height"], row["width"], row["mode"] = *pixels.shape[:2], mode.encode().ljust(_MODE_BYTES, b"\0")
    return row


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
        text = "%s: %d of %d images cannot be decoded and are left out (on_bad_image: skip): %s"
        text += (
            "; carft-ray doctor RECIPE --json lists all in training and validation sets" if len(bad) > NUM_NAMED else ""
        )
        _log.warning(text, source.name, len(bad), len(source), few)
    if not len(left):
        rule = "there must be at least one image that can be decoded"
        raise DataError(Problem(source.name, rule, f"none of {len(bad)}, such as {next(iter(bad.values()))}"))
    return left


def image_facts(source: StoredSource, found: Records) -> dict[str, Any]:
    """Returns what is found in a set's images, as plain data for JSON.

    Args:
        source: The set.
        found: Its records.

    Returns:
        ``digest``: hash of ids, labels and contents; None when a file cannot be read.
        ``short_side``: ``min``, ``median`` and ``max`` in pixels; None for a test set.
        ``modes``: how many images have which mode of Pillow (RGB, L, CMYK ...); empty for a test set.
        ``megabytes``: of all files.
        ``num_unreadable``, ``unreadable``: images that cannot be read or decoded; of a test set that cannot be read.
        ``num_twice``: images with the very content of an earlier one of the set.
        ``contradictions``: the first of these that have another label than the earlier one.
    """
    is_read = not (found.num_bytes < 0).any()
    sides = np.minimum(found.heights, found.widths)[found.heights > 0]
    modes = Counter(mode.decode() for mode in found.modes.tolist() if mode)
    num_twice, contradictions = _repeated(source, found)
    return {
        "digest": set_digest(source, found.hashes()) if is_read else None,
        "short_side": {"min": int(sides.min()), "median": float(np.median(sides)), "max": int(sides.max())}
        if len(sides)
        else None,
        "modes": dict(modes.most_common()),
        "megabytes": round(int(found.num_bytes.clip(0).sum()) / 1e6, 3),
        "num_unreadable": len(found.problems),
        "unreadable": [str(problem) for problem in found.problems.values()],
        "num_twice": num_twice,
        "contradictions": contradictions[:NUM_EXAMPLES],
    }


def _repeated(source: StoredSource, found: Records) -> tuple[int, list[str]]:
    """Returns how many images repeat an earlier one, and those that contradict its label."""
    read = np.flatnonzero(found.num_bytes >= 0)
    _, first, group = np.unique(found.digests[read], axis=0, return_index=True, return_inverse=True)
    earlier = read[first[group]]
    pairs = np.stack([earlier, read], axis=1)[earlier != read]
    wrong = pairs[source.labels[pairs[:, 0]] != source.labels[pairs[:, 1]]].tolist()
    return len(pairs), [f"{source.place(one)} and {source.place(other)}" for one, other in wrong]


def class_counts(source: Source) -> dict[str, Any]:
    """Returns counts of a set's labels, as plain data for JSON; no image is read."""
    counts = Counter(source.labels.tolist())
    fewest = min(counts, key=lambda label: (counts[label], label))
    return {
        "num_images": len(source),
        "num_classes": len(counts),
        "num_groups": None if source.groups is None else len(source.groups),
        "images_per_class": {
            "min": counts[fewest],
            "median": median(counts.values()),
            "max": max(counts.values()),
            "smallest_class": source.class_names[fewest],
        },
    }


def same_words(words: Sequence[str]) -> dict[str, list[int]]:
    """Returns the words that name several classes, with the labels of these."""
    labels: dict[str, list[int]] = {}
    for label, word in enumerate(words):
        labels.setdefault(word.strip().lower(), []).append(label)
    return {word: found for word, found in labels.items() if len(found) > 1}
