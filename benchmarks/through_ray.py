"""What it takes to move a file of a study through Ray, on one machine: ``python -m benchmarks.through_ray [MB ...]``

A worker gets a file from the driver's machine, and sends one. Beside: a plain copy of the file, flushed; their ratio is
what the way costs. Memory is what the processes of both sides have taken more at their peak.
"""

import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ray

from carft_ray.launch.named_actor import started_here
from carft_ray.launch.study_files import THREADS, FileServer, StudyFiles

NAME = "trials/t/attempt-1/step-00000010/weights"


class Server(FileServer):
    """The server, which tells its memory."""

    def peak_mb(self) -> float:
        """Returns the most that the process has held."""
        return peak_mb()


def peak_mb() -> float:
    """Returns the most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def move(away: StudyFiles, folder: Path) -> dict[str, float]:
    """Gets and sends the file; returns seconds and MB."""
    before, began = peak_mb(), time.perf_counter()
    away.get(away.entries("trials"), folder)
    got_s = time.perf_counter() - began
    (folder / "trials/t/attempt-1").rename(folder / "trials/t/attempt-2")
    began = time.perf_counter()
    away.send(folder, "trials/t/attempt-2/step-00000010")
    return {"get": got_s, "send": time.perf_counter() - began, "worker": peak_mb() - before}


def measure(megabytes: int) -> None:
    """Prints the row of a size."""
    with tempfile.TemporaryDirectory(prefix="carft-move-") as name:
        study, node = Path(name, "study"), Path(name, "node")
        source = study / NAME
        source.parent.mkdir(parents=True)
        source.write_bytes(os.urandom(2**20) * megabytes)
        began = time.perf_counter()
        with open(shutil.copyfile(source, Path(name, "copy")), "rb") as copied:
            os.fsync(copied.fileno())
        copy_s = time.perf_counter() - began
        started, actor = started_here(Server, "files", study, threads=THREADS)
        before = ray.get(actor.peak_mb.remote())
        found = ray.get(ray.remote(move).remote(StudyFiles(started), node))
        server = ray.get(actor.peak_mb.remote()) - before
    print(
        f"{megabytes} MB: copy {copy_s:.2f} s; get {found['get']:.2f} s ({found['get'] / copy_s:.1f}x), "
        f"send {found['send']:.2f} s ({found['send'] / copy_s:.1f}x); "
        f"worker {found['worker']:+.0f} MB, server {server:+.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    for size in map(int, sys.argv[1:] or ("350", "1024")):
        measure(size)
    ray.shutdown()
