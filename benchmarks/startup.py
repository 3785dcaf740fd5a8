"""How long a person waits for the first sign of life: ``python -m benchmarks.startup``

Runs ``carft-ray --help`` and ``carft-ray validate search_spaces/quickstart.yaml`` as separate processes, with the
console script that is installed with this interpreter, and compares the median of five with a threshold. One run of
each before that fills the file caches and is not counted. Exit code 1 when a threshold is missed.
"""

import argparse
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carft_ray.errors import CarftError, Problem, UsageError
from carft_ray.ui import console

ROOT = Path(__file__).resolve().parents[1]
NUM_RUNS = 5


@dataclass(frozen=True)
class Command:
    """Arguments of ``carft-ray`` and the median time that they must stay below."""

    arguments: tuple[str, ...]
    below_s: float


COMMANDS = (Command(("--help",), 0.4), Command(("validate", "search_spaces/quickstart.yaml"), 1.5))


def script() -> Path:
    """Returns the ``carft-ray`` of this interpreter.

    Raises:
        UsageError: It is not installed.
    """
    path = Path(sysconfig.get_path("scripts")) / "carft-ray"
    if not path.exists():
        step = "Install it into this interpreter: python -m pip install -e ."
        raise UsageError(Problem(str(path), "must exist", "no such file", next_step=step))
    return path


def run_times(command: Sequence[str], num_runs: int = NUM_RUNS) -> list[float]:
    """Returns the wall times in seconds of ``num_runs`` runs after one that is not counted.

    Raises:
        CarftError: The command fails.
    """
    times = []
    for _ in range(num_runs + 1):
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - began)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CarftError(Problem(" ".join(command), "must succeed", f"exit code {done.returncode}: {last}"))
    return times[1:]


def verdict(command: Command, times: Sequence[float]) -> tuple[str, bool]:
    """Returns the line PASS or FAIL of a command, and whether its median is below the threshold."""
    median = statistics.median(times)
    passed = median < command.below_s
    spread = f"{min(times):.2f} to {max(times):.2f}"
    shown = f"carft-ray {' '.join(command.arguments)}: median {median:.2f} s of {len(times)} ({spread})"
    return f"{'PASS' if passed else 'FAIL'}  {shown}, must be below {command.below_s:g} s", passed


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all below their thresholds, 1 one not, else that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="The start-up time.")
    parser.parse_args(argv)
    passed = True
    try:
        for command in COMMANDS:
            line, reached = verdict(command, run_times([str(script()), *command.arguments]))
            print(line)
            passed &= reached
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
