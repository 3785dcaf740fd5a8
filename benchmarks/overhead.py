"""What a further trial costs besides its training: memory and seconds. ``python -m benchmarks.overhead``

Real searches of the sandbox by the command line, with trainings made short (one epoch), on one machine:

    memory     (peak with eight trials at a time - peak with one at a time) / 7: what each further trial takes
    overhead   seconds between the ends of two trials, one at a time, less the ``elapsed_s`` of the second: the mean

Memory is the proportional set size of the search and all its child processes (pages that several share are counted
once), read twice a second; Linux only.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import Row
from carft_ray import files
from carft_ray.layout import RESULT

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
EXECUTORS = ("inline", "ray-train")
NUM_TRIALS, NUM_QUICK = 8, 3
INLINE_S, RAY_TRAIN_S, FURTHER_MB = 0.5, 2.0, 900.0  # targets
SETTINGS = (
    "train.epochs=1",
    "evaluate.every_epochs=0",
    "search.baselines={}",
    "resources.cpus_per_worker=0.1",  # admits all of them at once on any machine
)
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Measured:
    """One search.

    Attributes:
        peak_mb: Largest proportional set size of all its processes.
        overhead_s: Seconds per trial between trainings; of a search with one trial at a time.
    """

    peak_mb: float
    overhead_s: float


def measure(executor: str, concurrency: int, num_trials: int = NUM_TRIALS) -> Measured:
    """Runs a search of short trials in a process of its own.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    settings = [*SETTINGS, f"search.trials={num_trials}"]
    settings += [f"search.max_concurrent_trials={concurrency}", f"resources.executor={executor}"]
    with tempfile.TemporaryDirectory(prefix="carft-overhead-") as folder:
        study, printed = Path(folder) / "study", Path(folder) / "printed.txt"
        command = [sys.executable, "-m", "carft_ray.cli", "search", str(RECIPE), "--study", str(study)]
        command += [word for setting in settings for word in ("--set", setting)]
        with printed.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, memory_mb(process.pid))
                time.sleep(LOOK_EVERY_S)
        if process.returncode:
            raise RuntimeError(printed.read_text())
        ends = sorted(
            (path.stat().st_mtime, float(files.read_json(path)["elapsed_s"]))
            for path in study.glob(f"trials/*/*/{RESULT}")
        )
    between = ends[-1][0] - ends[0][0] - sum(elapsed_s for _, elapsed_s in ends[1:])
    return Measured(peak, between / (len(ends) - 1))


def memory_mb(pid: int) -> float:
    """Returns the proportional set size of a process and its descendants in MB."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry))
    total, waiting = 0.0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(float(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000
    return total


def rows(full: bool) -> list[Row]:
    """Measures both executors, with fewer trials unless ``full``."""
    number = NUM_TRIALS if full else NUM_QUICK
    inline, nested = (measure(executor, 1, number) for executor in EXECUTORS)
    further = (measure("ray-train", number, number).peak_mb - nested.peak_mb) / (number - 1)
    return [
        Row("overhead of a trial, inline, s", inline.overhead_s, INLINE_S),
        Row("overhead of a trial after the first, ray-train, s", nested.overhead_s, RAY_TRAIN_S),
        Row("memory of a further ray-train trial, MB", further, FURTHER_MB, digits=0),
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description="What a further trial costs.")
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=EXECUTORS, help="which (both)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a Markdown table and returns 0."""
    arguments = _arguments(argv)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, synthetic images\n")
    print("| executor | one at a time, peak MB | eight at a time, peak MB | each further trial, MB | overhead, s |")
    print("|---|---|---|---|---|")
    for executor in arguments.executors:
        one, eight = measure(executor, 1), measure(executor, NUM_TRIALS)
        further = (eight.peak_mb - one.peak_mb) / (NUM_TRIALS - 1)
        print(
            f"| {executor} | {one.peak_mb:.0f} | {eight.peak_mb:.0f} | {further:.0f} | {one.overhead_s:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
