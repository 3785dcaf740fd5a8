"""Kills a search before and after every write of its log, has it go on, and compares: ``make crash-points``.

A search of six trials, one of which is cut and one diverges, its continuation to eight, and a confirm, all with the
executor ``debug`` and stand-in trainings, in forks of one process (``crash_host.py``).

    python tests/crash_points.py

Prints a table, and ends with an error when a kill has lost or doubled anything.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import crash_host
import killed_searches
import stand_in
from debug_search import told

from carft_ray.study.rows import baselines, confirmations, trials

PROGRAM = "debug_search"
COMMANDS = {"search": ["search", "study", "6"], "more": ["search", "study", "8"], "confirm": ["confirm", "study"]}
DIVERGES = "2"  # number of the trial that does
LOOK = ["look", "study"]
HEADER = ("command", "writes", "kills", "lost", "twice", "begun again")


def prepare(folder):
    """Tells the trainings below a folder what to do."""
    stand_in.tell(folder, **{"seconds": 0, DIVERGES: "diverge"})


def undisturbed(host, folder):
    """Runs the commands in peace, each in a copy of the study that the one before has left.

    Returns:
        By command the folder in which it was run, and how many writes of the log it has made.
    """
    found, before = {}, None
    for name, argv in COMMANDS.items():
        if before is not None:
            shutil.copytree(before / "study", folder / name / "study")
        kinds = folder / f"{name}.json"
        place, [answer] = host([{"name": name, "commands": [{"argv": argv, "count_to": str(kinds)}]}])[name]
        assert answer["code"] == 0, answer["log"]
        found[name] = place, json.loads(kinds.read_text()).count("link")
        before = place
    return found


def jobs_of(calm):
    """Returns the jobs of ``crash_host``: each command killed before and after each write, then looked at and run."""
    return [
        {
            "name": f"{number:03d}-{name}-{moment}",
            "commands": [{"argv": argv, "kill": (number, moment, "link")}, {"argv": LOOK}, {"argv": argv}],
        }
        for name, argv in COMMANDS.items()
        for number in range(1, calm[name][1] + 1)
        for moment in ("before", "after")
    ]


def killed(host, folder, calm, jobs):
    """Runs jobs, each in a copy of the study as it was before its command; returns what ``host`` returns."""
    starts = dict(zip(list(COMMANDS)[1:], (place for place, _ in calm.values()), strict=False))
    for job in jobs:
        if start := starts.get(command_of(job["name"])):
            shutil.copytree(start / "study", folder / job["name"] / "study")
    return host(jobs)


def command_of(name):
    return name.split("-")[1]


def differences(found, calm):
    """Returns names of jobs after which something was missing, or told otherwise, and after which there was too much.

    Raises:
        AssertionError: A kill did not strike, or the same command did not go on to its end.
    """
    lost, twice = [], []
    for name, (place, (struck, look, last)) in found.items():
        assert struck["code"] == -signal.SIGKILL, (name, struck)
        assert (look["code"], last["code"]) == (0, 0), (name, look["log"], last["log"])
        assert "Traceback" not in look["log"] + last["log"], name
        study_dir, expected = place / "study", told(calm[command_of(name)][0] / "study")
        rows = told(study_dir)
        seen = [row for row in json.loads(look["log"]) if row[0] == "ledger" or row[4] != "running"]
        if any(row not in rows for row in expected) or any(row not in rows for row in seen):
            lost.append(name)
        if len(rows) > len(expected) or max(Counter(json.dumps(row[:3]) for row in rows).values()) > 1:
            twice.append(name)
        killed_searches.check_told_once(study_dir)
        assert begun_again(study_dir) <= 1, name
    return lost, twice


def begun_again(study_dir):
    """Returns how many attempts a study has taken more than trainings."""
    return sum(row.attempt - 1 for kind in (trials, baselines, confirmations) for row in kind(study_dir))


def main():
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="carft-points-") as temporary:
        folder = Path(temporary)
        prepare(folder)
        with crash_host.started(folder, PROGRAM) as host:
            calm = undisturbed(host, folder)
            jobs = jobs_of(calm)
            found = killed(host, folder, calm, jobs)
        print(*HEADER, sep="\t")
        failed = []
        for name, (_, number) in calm.items():
            part = {job: answer for job, answer in found.items() if command_of(job) == name}
            lost, twice = differences(part, calm)
            again = sum(begun_again(place / "study") for place, _ in part.values())
            print(name, number, len(part), len(lost), len(twice), again, sep="\t", flush=True)
            failed += lost + twice
    print(f"{time.monotonic() - began:.0f} s", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
