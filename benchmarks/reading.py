"""What the one reading of a set costs in addition to decoding it: ``python -m benchmarks.reading``

Makes small JPEG files (synthetic, with the spectrum of photos) in a temporary folder, in two sizes: that of most of
ImageNet, and 224 pixels. From ``NUM_DISTINCT`` on they are hard links to the first. Then, in turns and with as many
threads, a plain loop that reads and decodes each file (``images.decode_image``), and the pass of ``data.records``,
which hashes, decodes, makes thumbnails and writes what it has found. Printed are the medians of files per second and
the ratio of the two, turn by turn.

In the same way it builds a decoded set of 224 pixels (``data.decoded``) with one thread and with all.

``PASS_RATIO`` was fixed before: of each size the pass must read .8 of the files that the plain loop reads.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from PIL import Image

from benchmarks.photos import write_tree
from carft_ray.data import content
from carft_ray.data.content import reading_threads
from carft_ray.data.decoded import image_set
from carft_ray.data.images import decode_image, read_bytes
from carft_ray.data.listing import StoredSource
from carft_ray.data.readers import list_set
from carft_ray.data.records import CHUNK, records
from carft_ray.data.selection import unlabelled_source
from carft_ray.recipe.schema.sets import FolderSet

PASS_RATIO = 0.8
SIZES = ((500, 375), (224, 224))
NUM_TURNS = 5
NUM_FILES = 4000  # of fewer, writing what was found, once a pass, would weigh more than in a set
NUM_DISTINCT = 1000  # pictures

Run = Callable[[StoredSource], None]


def plain_loop(source: StoredSource) -> None:
    """Reads and decodes all files."""
    paths = [Path(source.place(index)) for index in range(len(source))]

    def decode(some: Sequence[Path]) -> None:
        for path in some:
            decode_image(read_bytes(path), str(path))

    with ThreadPoolExecutor(reading_threads()) as pool:
        list(pool.map(decode, [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]))


def one_pass(source: StoredSource) -> None:
    """Finds all records with an empty cache."""
    cache = Path(tempfile.mkdtemp())
    try:
        records(source, cache)
    finally:
        shutil.rmtree(cache)


def to_input(image: Image.Image) -> Image.Image:
    """What a model of 224 pixels wants."""
    return image.resize((224, 224), Image.Resampling.BICUBIC)


def decoded_set(source: StoredSource) -> None:
    """Builds a decoded set in an empty cache with all threads."""
    cache = Path(tempfile.mkdtemp())
    try:
        image_set(source, to_input, "benchmark", cache)
    finally:
        shutil.rmtree(cache)


def with_one_thread(source: StoredSource) -> None:
    """``decoded_set`` with one thread."""
    with mock.patch.object(content, "reading_threads", return_value=1):
        decoded_set(source)


def measure(source: StoredSource, runs: tuple[Run, Run], num_turns: int) -> tuple[float, float, float]:
    """Returns files per second of both runs, and the ratio of the second to the first: medians of turns."""
    turns = [(_rate(runs[0], source), _rate(runs[1], source)) for _ in range(num_turns)]
    first, second = (statistics.median(rates) for rates in zip(*turns, strict=True))
    return first, second, statistics.median(other / one for one, other in turns)


def _rate(run: Run, source: StoredSource) -> float:
    began = time.perf_counter()
    run(source)
    return len(source) / (time.perf_counter() - began)


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the pass is too slow, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description="The one reading of a set.")
    parser.add_argument("--files", type=int, default=NUM_FILES, help="files of each size (%(default)s)")
    parser.add_argument("--size", type=_size, help="one size alone, as WIDTHxHEIGHT")
    parser.add_argument("--turns", type=int, default=NUM_TURNS, help="times that each reads all (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.files, arguments.turns) < 1:
        parser.error("--files and --turns must be at least 1")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {reading_threads()} threads; synthetic pictures")
    ratios = []
    for width, height in SIZES if arguments.size is None else [arguments.size]:
        with tempfile.TemporaryDirectory() as folder:
            size = write_tree(Path(folder), arguments.files, width, height, NUM_DISTINCT)
            spec = FolderSet(source="folder", path=folder)
            source = unlabelled_source(list_set(spec, "set"), spec, "set")
            plain_loop(source)  # now the files are in memory
            plain, whole, ratio = measure(source, (plain_loop, one_pass), arguments.turns)
            one, several, gain = measure(source, (with_one_thread, decoded_set), arguments.turns)
        ratios.append(ratio)
        print(
            f"{width} x {height} pixels, {size / arguments.files / 1000:.0f} kB, {arguments.files:,} files of "
            f"{min(arguments.files, NUM_DISTINCT):,} pictures: decoding {plain:,.0f} files/s, "
            f"one reading {whole:,.0f} files/s, ratio {ratio:.2f}; decoded set {one:,.0f} files/s with one thread, "
            f"{several:,.0f} with all, ratio {gain:.2f}"
        )
    passed = min(ratios) >= PASS_RATIO
    print(f"{'PASS' if passed else 'FAIL'} one reading is at least {PASS_RATIO:g} of decoding: {min(ratios):.2f}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
