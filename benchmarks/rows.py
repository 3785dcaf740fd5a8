"""Rows of a benchmark: a number with its target, on which machine it was measured, and in a process of its own."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from carft_ray import environment

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    """One measurement with its target.

    Attributes:
        name: What was measured, with what belongs to it: the same in every run.
        value: The number.
        target: None: it is told, not judged.
        at_most: Whether the target is the largest value that is good; else the smallest.
        spread: Least and largest value over the turns; None where it was measured once.
        digits: Decimals shown.
        detail: What is shown beside it.
    """

    name: str
    value: float
    target: float | None = None
    at_most: bool = True
    spread: tuple[float, float] | None = None
    digits: int = 2
    detail: str = ""

    @property
    def is_met(self) -> bool:
        """Tells whether the target was reached; a value that is no number reaches none."""
        if self.target is None:
            return True
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        """Returns the line that is printed."""
        value = f"{self.value:,.{self.digits}f}"
        inner = [] if self.spread is None else ["{:,.{d}f} to {:,.{d}f}".format(*self.spread, d=self.digits)]
        inner += [self.detail] if self.detail else []
        spread = f" ({'; '.join(inner)})" if inner else ""
        if self.target is None:
            return f"      {self.name}: {value}{spread}"
        bound = f"{'at most' if self.at_most else 'at least'} {self.target:g}"
        return f"{'PASS' if self.is_met else 'FAIL'}  {self.name}: {value}{spread}, {bound}"


def median_row(
    name: str, values: Sequence[float], target: float | None = None, at_most: bool = True, detail: str = ""
) -> Row:
    """Returns the row of the median over turns."""
    return Row(name, statistics.median(values), target, at_most, (min(values), max(values)), detail=detail)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of a benchmark in a process of its own, with arguments and answer as JSON.

    Raises:
        RuntimeError: It failed; with what it printed.
    """
    code = f"import json, sys; from {function.__module__} import {function.__name__} as f"
    code += "; print(json.dumps(f(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def as_data(row: Row) -> dict[str, Any]:
    """Returns a row as plain data."""
    return {**row._asdict(), "is_met": None if row.target is None else row.is_met}


def machine() -> dict[str, Any]:
    """Returns where and when something is measured."""
    import torch  # not above: the memory of a process without it is measured, too

    return {
        "date": date.today().isoformat(),
        "processor": environment.cpu_model(),
        "cpus": environment.usable_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "commit": environment.code()["commit"],
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def machine_line(found: dict[str, Any]) -> str:
    """Returns ``machine`` in one line, for people."""
    gpu, loads = found["gpu"] or "no GPU", " ".join(map(str, found["load"]))
    return f"{found['date']}, {found['processor']}, {found['cpus']} CPUs, {gpu}, torch {found['torch']}, load {loads}"


def peak_mb() -> float:
    """Returns the most memory that this process has held; Linux only."""
    return _status_mb("VmHWM")  # `ru_maxrss` begins with that of the process that started this one


def held_mb() -> float:
    """Returns the memory that this process holds now; Linux only."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    return float(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def descendants(pid: int) -> list[int]:
    """Returns the processes below a process; Linux only."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found = list(children.get(pid, []))
    for each in found:  # grows meanwhile
        found += children.get(each, [])
    return found


def let_workers_import() -> None:
    """Lets Ray's workers find the benchmarks by their names; to be called before Ray starts."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
