"""What it takes to read sets of images.

    reading     the pass of ``data.records``, which hashes, decodes, makes thumbnails and writes what it has found,
                against a plain loop that reads and decodes each file with as many threads; a decoded set of 224 pixels
                built with all threads against one. JPEG files, most of them hard links to the first.
    containers  the same contents, random bytes, read out of shards and tables against a folder: in order, at random;
                with ``scale`` there are 2,000 shards. Each kind is read in a process of its own, the files are in the
                page cache, and nothing is decoded. Memory is what the process alone holds, above what it held before
                it opened the set.

Synthetic images.
"""

import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import TypeAdapter

from benchmarks.photos import HEIGHT, WIDTH, write_tree
from benchmarks.rows import Row, apart, median_row
from carft_ray.data import source as reading
from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.decode_images import decode_image, read_bytes
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import CHUNK, records
from carft_ray.data.selection import stored_source, unlabelled_source
from carft_ray.data.sets import list_set
from carft_ray.data.source import reading_threads
from carft_ray.recipe.schema.data import FolderSet, SetSpec

READING_TARGET = 0.4  # it decodes whole pictures, and a hash and a thumbnail of all pixels take as long again
NUM_DISTINCT = 400  # pictures: to make one takes 20 ms
KINDS = {
    "folder": {"source": "folder", "path": "images"},
    "shards": {"source": "webdataset", "path": "shards"},
    "Arrow": {"source": "table", "path": "images.arrow", "id": "name"},
    "Parquet, groups of 100": {"source": "table", "path": "groups.parquet", "id": "name"},
    "Parquet, one group": {"source": "table", "path": "one.parquet", "id": "name"},
}
NUM_RANDOM = 300

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
        image_set(source, to_input, "benchmark", Keeping(cache))
    finally:
        shutil.rmtree(cache)


def with_one_thread(source: StoredSource) -> None:
    """``decoded_set`` with one thread."""
    with mock.patch.object(reading, "reading_threads", return_value=1):
        decoded_set(source)


def ratio_row(name: str, source: StoredSource, runs: tuple[Run, Run], num_turns: int, target: float | None) -> Row:
    """Returns the row of files per second of the first run against those of the second."""
    turns = [(_rate(runs[1], source), _rate(runs[0], source)) for _ in range(num_turns)]
    shown = " and ".join(f"{statistics.median(rates):,.0f}" for rates in reversed([*zip(*turns, strict=True)]))
    return median_row(name, [mine / other for other, mine in turns], target, False, f"{shown} files/s")


def _rate(run: Run, source: StoredSource) -> float:
    began = time.perf_counter()
    run(source)
    return len(source) / (time.perf_counter() - began)


def write(folder: Path, num_images: int, num_bytes: int, num_shards: int = 1) -> None:
    """Writes the same images in every kind, random bytes."""
    rng = np.random.default_rng(0)
    names = [f"class{number % 100:03d}/{number:06d}.jpg" for number in range(num_images)]
    contents = [rng.bytes(num_bytes) for _ in names]
    for name, content in zip(names, contents, strict=True):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    (folder / "shards").mkdir()
    for part, indices in enumerate(np.array_split(np.arange(num_images), num_shards)):
        with tarfile.open(folder / "shards" / f"{part:06d}.tar", "w") as archive:
            for index in indices.tolist():
                name, content = names[index], contents[index]
                for file, inside in ((name, content), (name.replace(".jpg", ".cls"), name.split("/")[0].encode())):
                    member = tarfile.TarInfo(file)
                    member.size = len(inside)
                    archive.addfile(member, io.BytesIO(inside))
    labels = [name.split("/")[0] for name in names]
    table = pa.table({"image": pa.array(contents, pa.binary()), "label": labels, "name": names})
    with pa.ipc.new_stream(str(folder / "images.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    pq.write_table(table, folder / "groups.parquet", row_group_size=100)
    pq.write_table(table, folder / "one.parquet", row_group_size=num_images)


def read(folder: str, kind: str) -> dict[str, float]:
    """Reads one kind twice over: first in order, then at random."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    place = {**KINDS[kind], "path": f"{folder}/{KINDS[kind]['path']}"}
    spec: Any = TypeAdapter(SetSpec).validate_python(place)
    began = time.perf_counter()
    stored_source(list_set(spec, "set"), spec, None, "set")  # makes the index
    before = private_megabytes()
    started = time.perf_counter()
    source = stored_source(list_set(spec, "set"), spec, None, "set")
    opened = time.perf_counter()
    highest = 0.0
    for index in range(len(source)):
        source.content(index)
        if index % 100 == 0:
            highest = max(highest, private_megabytes())
    in_order = time.perf_counter()
    for index in np.random.default_rng(1).integers(0, len(source), NUM_RANDOM).tolist():
        source.content(index)
    done = time.perf_counter()
    return {
        "index_s": started - began,
        "open_s": opened - started,
        "in_order": len(source) / (in_order - opened),
        "at_random": NUM_RANDOM / (done - in_order),
        "megabytes": highest - before,
    }


def private_megabytes() -> float:
    """Returns the memory that this process alone holds (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def reading_rows(full: bool, scale: bool) -> list[Row]:
    """Measures the reading of a set: of 500 x 375 pixels, in full of 224 x 224 as well; ``scale``: 100,000 of these."""
    found = []
    sizes = {(WIDTH, HEIGHT): 2000 if full else 800}
    if full or scale:
        sizes[224, 224] = 100_000 if scale else 2000
    for (width, height), number in sizes.items():
        with tempfile.TemporaryDirectory(prefix="carft-reading-") as folder:
            write_tree(Path(folder), number, width, height, NUM_DISTINCT)
            spec = FolderSet(source="folder", path=folder)
            source, what = unlabelled_source(list_set(spec, "set"), spec, "set"), f"{number:,} of {width} x {height}"
            plain_loop(source)  # now the files are in memory
            turns = 5 if full else 3
            name = f"files/s, one reading of a set / decoding alone, {what}"
            found.append(ratio_row(name, source, (one_pass, plain_loop), turns, READING_TARGET))
            if number < 10_000:
                name = f"files/s, decoded set built with {reading_threads()} threads / one, {what}"
                found.append(ratio_row(name, source, (decoded_set, with_one_thread), turns, None))
    return found


def container_rows(full: bool, scale: bool) -> list[Row]:
    """Measures reading out of containers; ``scale``: 2,000 shards of ten images."""
    num_images, num_bytes, num_shards = (20_000, 20_000, 2000) if scale else (6000 if full else 2000, 60_000, 1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="carft-containers-") as folder:
        write(Path(folder), num_images, num_bytes, num_shards)
        turns = [{kind: apart(read, folder, kind) for kind in KINDS} for _ in range(3 if full else 1)]
    for kind in KINDS:
        name = f"{num_shards:,} shards" if kind == "shards" and scale else kind
        of = {key: statistics.median(turn[kind][key] for turn in turns) for key in turns[0][kind]}
        for key, words in (("in_order", "in order"), ("at_random", "at random")) if kind != "folder" else ():
            ratios = [turn[kind][key] / turn["folder"][key] for turn in turns]
            shown = f"{of[key]:,.0f} images/s, {of['megabytes']:.0f} MB"
            rows.append(median_row(f"images/s {words}, {name} / folder", ratios, None, False, shown))
        if scale and kind == "shards":
            ratios = [turn[kind]["index_s"] / turn["folder"]["index_s"] for turn in turns]
            rows.append(median_row(f"listing {name} / a folder", ratios, detail=f"{of['index_s']:.1f} s"))
    return rows
