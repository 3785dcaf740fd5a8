"""What the one reading of a set costs beside decoding it: ``python -m benchmarks.reading``

Makes small JPEG files (synthetic, with the spectrum of photos) in a temporary folder, in two sizes: that of most of
ImageNet, and 224 pixels. Then, in turns and with as many threads, a plain loop that reads and decodes each file
(``images.decode_image``), and the pass of ``data.records``, which hashes, decodes, makes thumbnails and writes what it
has found. Printed are the medians of files per second and the ratio of the two, turn by turn.

``PASS_RATIO`` was fixed before: the pass of the first size must read .8 of the files that the plain loop reads.
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

from benchmarks.photos import write_tree
from carft_ray.data.content import reading_threads
from carft_ray.data.images import decode_image, read_bytes
from carft_ray.data.listing import StoredSource, unlabelled_source
from carft_ray.data.readers import list_set
from carft_ray.data.records import CHUNK, records
from carft_ray.recipe.schema import FolderSet

PASS_RATIO = 0.8
SIZES = ((500, 375), (224, 224))
NUM_TURNS = 5


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


def measure(source: StoredSource, num_turns: int) -> tuple[float, float, float]:
    """Returns files per second of the plain loop and of the pass, and the ratio of pass to loop: medians of turns."""
    plain_loop(source)  # now the files are in memory
    turns = [(_rate(plain_loop, source), _rate(one_pass, source)) for _ in range(num_turns)]
    plain, whole = (statistics.median(rates) for rates in zip(*turns, strict=True))
    return plain, whole, statistics.median(one / other for other, one in turns)


def _rate(run: Callable[[StoredSource], None], source: StoredSource) -> float:
    began = time.perf_counter()
    run(source)
    return len(source) / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the pass is too slow, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading", description="The one reading of a set.")
    parser.add_argument("--files", type=int, default=1000, help="files of each size (%(default)s)")
    parser.add_argument("--turns", type=int, default=NUM_TURNS, help="times that each reads all (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.files, arguments.turns) < 1:
        parser.error("--files and --turns must be at least 1")
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {reading_threads()} threads; synthetic pictures")
    ratios = []
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            size = write_tree(Path(folder), arguments.files, width, height)
            spec = FolderSet(source="folder", path=folder)
            source = unlabelled_source(list_set(spec, "set"), spec, "set")
            plain, whole, ratio = measure(source, arguments.turns)
        ratios.append(ratio)
        print(
            f"{width} x {height} pixels, {size / arguments.files / 1000:.0f} kB: decoding {plain:,.0f} files/s, "
            f"one reading {whole:,.0f} files/s, ratio {ratio:.2f}"
        )
    passed = ratios[0] >= PASS_RATIO
    print(f"{'PASS' if passed else 'FAIL'} one reading is at least {PASS_RATIO:g} of decoding: {ratios[0]:.2f}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
