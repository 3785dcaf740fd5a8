"""How fast everything is: ``python -m benchmarks.speed``

Rows are ratios of sides that were measured in this run, one after the other or in turns, so any machine will do that
does nothing else; what is absolute says its unit. A few minutes on two cores; ``--full`` takes more turns, and adds the
searches that take minutes each; ``--scale`` takes 10,000 trials, 100,000 files and 2,000 shards; ``--rows NAME ...``
measures some. Where a target was fixed beforehand the row is judged.

``--keep`` writes the numbers into ``speed.json``, by machine; each run tells the ratio to what is kept of its machine.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import speed_engine, speed_memory, speed_methods, speed_searches, speed_sets, speed_steps, speed_views
from benchmarks.rows import ROOT, Row, as_data, machine, machine_line
from carft_ray import files

KEPT = ROOT / "benchmarks" / "speed.json"
Kept = dict[str, dict[str, Any]]  # of one machine: value and date by row


class Part(NamedTuple):
    """Rows that are measured together.

    Attributes:
        what: What they are, for ``--help``.
        measure: Measures them; told whether in full, and whether at scale.
        long: Whether they take minutes: measured in full, or when they are named.
    """

    what: str
    measure: Callable[[bool, bool], list[Row]]
    long: bool = False


def _steps(full: bool, scale: bool) -> list[Row]:
    return speed_steps.step_rows(15 if full else 8)


def _methods(full: bool, scale: bool) -> list[Row]:
    return speed_methods.method_rows(15 if full else 4)


def _first(full: bool, scale: bool) -> list[Row]:
    return speed_steps.first_rows(5 if full else 2)


PARTS = {
    "views": Part("a view against decoding; views into a stand-in device", speed_views.view_and_device_rows),
    "loader": Part("images/s against ImageFolder and a DataLoader", speed_views.loader_rows),
    "reading": Part("the one reading of a set against decoding it", speed_sets.reading_rows),
    "containers": Part("shards and tables against a folder", speed_sets.container_rows),
    "steps": Part("loop against a resident batch; CAR-FT against plain", _steps),
    "methods": Part("step and memory of each method against plain fine-tuning", _methods),
    "first": Part("first step of the first trial", _first),
    "curve": Part("alpha curve against its training", lambda full, scale: speed_steps.curve_rows()),
    "startup": Part("commands against Python that does nothing", speed_searches.startup_rows),
    "study": Part("a study of many trials against one of 10", speed_engine.study_rows),
    "driver": Part("a driver with 200 running trials", speed_engine.driver_rows),
    "throughput": Part("trainings of nothing through Ray", speed_engine.throughput_rows),
    "files": Part("a file through Ray against a copy", speed_searches.file_rows),
    "overhead": Part("what a trial costs besides its training", speed_searches.overhead_rows, True),
    "memory": Part("memory of a worker over 16 trainings", speed_memory.memory_rows, True),
    "quickstart": Part("the quickstart's search against its trainings", speed_searches.quickstart_rows, True),
    "inline": Part("trainings in processes, against the script by hand", speed_searches.inline_rows, True),
    "nested": Part("trainings as Ray Train groups, against the script", speed_searches.nested_rows, True),
}


def run(
    names: Sequence[str], full: bool, scale: bool, kept: Kept, say: Callable[[str], None]
) -> tuple[dict[str, Any], bool]:
    """Measures parts one after the other; returns all numbers, and whether every target was reached.

    What fails is told as an error, and the others are measured all the same.
    """
    found: dict[str, Any] = {"machine": machine(), "full": full, "scale": scale, "parts": {}}
    say(f"{machine_line(found['machine'])}; synthetic images")
    passes = True
    for name in names:
        began, rows, error = time.monotonic(), list[Row](), ""
        try:
            rows = PARTS[name].measure(full, scale)
        except Exception as problem:
            error = f"{type(problem).__name__}: {str(problem).strip() or 'without a message'}"
        for row in rows:
            say(f"{row}{against(row, kept)}")
        if error:
            say(f"FAIL  {name}: {error}")
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


def against(row: Row, kept: Kept) -> str:
    """Returns the words that compare a row with what is kept of it; none where nothing is."""
    before = kept.get(row.name)
    if before is None or not before["value"]:
        return ""
    return f"; {row.value / before['value']:.2f} of the {before['value']:,.{row.digits}f} of {before['date']}"


def machine_name(found: dict[str, Any]) -> str:
    """Returns the name under which the numbers of a machine are kept."""
    return f"{found['processor']}, {found['cpus']} CPUs, {found['gpu'] or 'no GPU'}"


def keep(found: dict[str, Any]) -> None:
    """Writes what was measured into ``KEPT``; rows that were not measured keep their number."""
    where = found["machine"]
    rows = [row for part in found["parts"].values() for row in part["rows"]]
    new = {row["name"]: {"value": float(f"{row['value']:.4g}"), "date": where["date"]} for row in rows}
    whole, name = read_kept(), machine_name(where)
    files.write_json(KEPT, {**whole, name: {**whole.get(name, {}), **new}})


def read_kept() -> dict[str, Kept]:
    """Returns what is kept, by machine."""
    kept: dict[str, Kept] = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all targets were reached, 1 not all, or something failed."""
    words = "\n".join(f"  {name:11s} {part.what}{' (long)' if part.long else ''}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Speed, as ratios of sides that one run measures.",
        epilog=f"rows:\n{words}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=PARTS, metavar="NAME", help="which, see below (all but the long)")
    parser.add_argument("--full", action="store_true", help="more turns and larger sets, and the long rows")
    parser.add_argument("--scale", action="store_true", help="10,000 trials, 100,000 files, 2,000 shards")
    parser.add_argument("--keep", action="store_true", help="writes the numbers into benchmarks/speed.json")
    parser.add_argument("--json", action="store_true", help="all numbers as JSON; the lines go to standard error")
    given = parser.parse_args(argv)
    out = sys.stderr if given.json else sys.stdout
    names = given.rows or [name for name, part in PARTS.items() if given.full or not part.long]
    kept = read_kept().get(machine_name(machine()), {})
    found, passes = run(names, given.full, given.scale, kept, lambda text: print(text, file=out, flush=True))
    if given.keep:
        keep(found)
    if given.json:
        print(json.dumps(found, indent=1))
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main())
