"""CIFAR-10 and CIFAR-100 in their binary version: arrays of 32 x 32 pixels, mapped into memory.

The Python version is a pickle, which may run any code when it is opened; it is not read.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carft_ray.data.benchmark_sets.facts import Facts
from carft_ray.data.benchmark_sets.layouts import KIND, by_number, unreadable_list
from carft_ray.data.caching.index import told_stamp
from carft_ray.data.listing import Listing
from carft_ray.data.source import PixelArray
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.sets import BenchmarkSet

SIDE = 32
PIXELS = 3 * SIDE * SIDE
STEP = "Unpack the archive of the binary version, {}-binary.tar.gz; the Python version, a pickle, is not read."


@dataclass(frozen=True)
class _Batch:
    """One file: its name for the ids, the pixels [N, 3072] and the labels."""

    name: str
    path: Path
    pixels: PixelArray
    labels: list[int]


def cifar10(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``data_batch_1.bin`` to ``data_batch_5.bin``, or ``test_batch.bin``."""
    files = [f"data_batch_{i}" for i in range(1, 6)] if spec.split == "train" else ["test_batch"]
    return _listing(root, files, 1, facts, root / "batches.meta.txt")


def cifar100(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``train.bin`` or ``test.bin``, with the fine labels."""
    return _listing(root, [str(spec.split)], 2, facts, root / "fine_label_names.txt")


def _listing(root: Path, files: list[str], label_bytes: int, facts: Facts, names_path: Path) -> Listing:
    _check_names(names_path, facts)
    batches = [_batch(root / f"{name}.bin", name, label_bytes) for name in files]
    rows = [(batch, index) for batch in batches for index in range(len(batch.labels))]
    names = [f"{batch.name}/{index:05d}" for batch, index in rows]
    classes = [by_number(batch.labels[index], 0, facts, batch.path, f"image {index}") for batch, index in rows]

    def read(index: int) -> bytes:
        batch, row = rows[index]
        return bytes(batch.pixels[row])

    return Listing(
        kind=KIND,
        home=str(root.resolve()),
        names=names,
        classes=classes,
        found=tuple(sorted(set(classes))),
        read=read,
        stamp=lambda index: told_stamp(rows[index][0].path),
        place=lambda index: f"{rows[index][0].path}, image {rows[index][1]}",
        decode=lambda content, index: _decoded(content),
    )


def _decoded(content: bytes) -> PixelArray:
    planes = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _check_names(path: Path, facts: Facts) -> None:
    """Refuses a set whose own list of class names is another; a set without it is believed."""
    names = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else list(facts.classes)
    if names != list(facts.classes):
        first = next((pair for pair in zip(names, facts.classes, strict=False) if pair[0] != pair[1]), None)
        value = f"{first[0]!r} for {first[1]!r}" if first else f"{len(names)} of {len(facts.classes)}"
        raise DataError(Problem(str(path), f"must name the classes of {facts.title}, in their order", value))


def _batch(path: Path, name: str, label_bytes: int) -> _Batch:
    """Maps a file: per image the labels, the fine one last, and the red, green and blue plane."""
    row = label_bytes + PIXELS
    try:
        size = path.stat().st_size
        if not size or size % row:
            rule = f"must hold whole images of {row} bytes"
            raise DataError(Problem(str(path), rule, f"{size} bytes", next_step="Unpack the archive again."))
        rows = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    except OSError as error:
        raise unreadable_list(path, error) from error
    return _Batch(name, path, rows[:, label_bytes:], rows[:, label_bytes - 1].tolist())
