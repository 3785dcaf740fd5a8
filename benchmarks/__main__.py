"""Each row of the targets for speed, by one command: ``python -m benchmarks --quick``

Ratios are of sides that were measured in this run, so any machine will do that does nothing else; what is absolute says
its unit. ``--quick`` (the default) takes 11 minutes on two cores, ``--full`` more turns and 16 trainings of the
script. ``--rows NAME ...`` measures some. The row of the GPU needs one; ``python -m benchmarks.gpu`` says more.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import curve, feeding, gpu, overhead, steps, whole
from benchmarks.rows import Row, as_data, machine, machine_line


class Part(NamedTuple):
    """Rows that are measured together.

    Attributes:
        what: What they are, for ``--help``.
        measure: Measures them; told whether in full.
    """

    what: str
    measure: Callable[[bool], list[Row]]


def _gpu(full: bool) -> list[Row]:
    return gpu.rows(gpu.measure(gpu.Setup())) if torch.cuda.is_available() else []


PARTS = {
    "views": Part("a view against decoding; views into a stand-in device", lambda full: feeding.rows(not full)),
    "steps": Part(
        "loop against a resident batch; CAR-FT against plain", lambda full: steps.step_rows(15 if full else 8)
    ),
    "first": Part("first step of the first trial", lambda full: steps.first_rows(5 if full else 3)),
    "curve": Part("alpha curve against its training", lambda full: curve.rows()),
    "overhead": Part("what a trial costs besides its training", overhead.rows),
    "quickstart": Part("the quickstart's search against its trainings", lambda full: [whole.quickstart_row()]),
    "inline": Part("trainings in processes, against the script by hand", whole.inline_rows),
    "nested": Part("trainings as Ray Train groups, against the script", whole.nested_rows),
    "gpu": Part("images per second of one GPU", _gpu),
}


def run(names: Sequence[str], full: bool, say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Measures parts one after the other; returns all numbers, and whether every target was reached.

    What fails is told as an error, and the others are measured all the same.
    """
    found: dict[str, Any] = {"machine": machine(), "full": full, "parts": {}}
    say(f"{machine_line(found['machine'])}; synthetic images")
    passes = True
    for name in names:
        began, rows, error = time.monotonic(), list[Row](), ""
        try:
            rows = PARTS[name].measure(full)
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem).strip() or 'without a message'}"
        for row in rows:
            say(str(row))
        if error:
            say(f"FAIL  {name}: {error}")
        elif not rows:
            say(f"      {name}: not here, which has no GPU")
        passes &= not error and all(row.is_met for row in rows)
        found["parts"][name] = {
            "rows": [as_data(row) for row in rows],
            "error": error,
            "seconds": round(time.monotonic() - began, 1),
            "load": round(os.getloadavg()[0], 1),
        }
    seconds = sum(part["seconds"] for part in found["parts"].values())
    say(f"{seconds:.0f} s, load at the end of each part: {[part['load'] for part in found['parts'].values()]}")
    return found, passes


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all targets were reached, 1 not all, or something failed."""
    words = "\n".join(f"  {name:11s} {part.what}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed, with targets.",
        epilog=f"rows:\n{words}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="11 minutes on two cores (the default)")
    size.add_argument("--full", action="store_true", help="more turns, and 16 trainings of the script")
    parser.add_argument("--rows", nargs="+", choices=PARTS, metavar="NAME", help="which, see below (all)")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON; the lines go to standard error")
    arguments = parser.parse_args(argv)
    out = sys.stderr if arguments.json else sys.stdout
    found, passes = run(arguments.rows or list(PARTS), arguments.full, lambda text: print(text, file=out, flush=True))
    if arguments.json:
        print(json.dumps(found, indent=1))
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
