"""What it takes to read images out of folders, shards and tables: speed in order and at random, and memory.

    python -m benchmarks.containers

Contents are random bytes (synthetic; nothing is decoded), each kind is read in a process of its own, and the files are
in the page cache. Memory is what the process alone holds, above what it held before it opened the set.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from carft_ray.data.readers import list_set
from carft_ray.data.selection import stored_source
from carft_ray.recipe.schema.sets import SetSpec

KINDS = {
    "folder": {"source": "folder", "path": "images"},
    "shards": {"source": "webdataset", "path": "images.tar"},
    "Arrow": {"source": "table", "path": "images.arrow", "id": "name"},
    "Parquet, groups of 100": {"source": "table", "path": "groups.parquet", "id": "name"},
    "Parquet, one group": {"source": "table", "path": "one.parquet", "id": "name"},
}
NUM_RANDOM = 300


def write(folder: Path, num_images: int, num_bytes: int) -> None:
    """Writes the same images in every kind."""
    rng = np.random.default_rng(0)
    names = [f"class{number % 100:03d}/{number:06d}.jpg" for number in range(num_images)]
    contents = [rng.bytes(num_bytes) for _ in names]
    for name, content in zip(names, contents, strict=True):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name, content in zip(names, contents, strict=True):
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


def read(folder: Path, kind: str) -> dict[str, float]:
    """Reads one kind twice over: first in order, then at random."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    place = {**KINDS[kind], "path": str(folder / KINDS[kind]["path"])}
    spec: Any = TypeAdapter(SetSpec).validate_python(place)
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
        "open_s": opened - started,
        "in_order": len(source) / (in_order - opened),
        "at_random": NUM_RANDOM / (done - in_order),
        "megabytes": highest - before,
    }


def private_megabytes() -> float:
    """Returns the memory that this process alone holds (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def main() -> None:
    """Writes, reads and prints a table."""
    parser = argparse.ArgumentParser(description="Reading images out of folders, shards and tables.")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--bytes", type=int, default=60_000, help="of an image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "KIND"), help="one reading, as JSON")
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(Path(given.read[0]), given.read[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), given.images, given.bytes)
        command = [sys.executable, "-m", "benchmarks.containers", "--read", name]
        rounds = [
            {
                kind: json.loads(subprocess.run([*command, kind], check=True, capture_output=True).stdout)
                for kind in KINDS
            }
            for _ in range(given.repeats)
        ]
    size = given.images * given.bytes / 1e6
    print(f"{given.images} images of {given.bytes} bytes, {size:.0f} MB; median of {given.repeats}\n")
    print("| kind | open, s | images/s in order | at random | memory, MB |\n|---|---|---|---|---|")
    for kind in KINDS:
        of = {key: median(one[kind][key] for one in rounds) for key in rounds[0][kind]}
        print(
            f"| {kind} | {of['open_s']:.2f} | {of['in_order']:,.0f} | {of['at_random']:,.0f} | {of['megabytes']:.0f} |"
        )


if __name__ == "__main__":
    main()
