"""Kills a search around every write, has it go on, and compares.

A search of six trials, one of which is cut and one diverges, its continuation to eight, and a confirm, all with the
executor ``debug`` and stand-in trainings, in forks of one process (``crash_host.py``).

Writes are those of the log of a study in a folder and of its other files; or all of one in a bucket.
"""

import contextlib
import json
import shutil
import signal
from collections import Counter

import crash_host
import killed_searches
import pytest
import stand_in
from bucket_server import bucket_server
from debug_search import told

from carft_ray.study.mirror import pull
from carft_ray.study.rows import baselines, confirmations, trials

PROGRAM = "debug_search"
COMMANDS = {"search": ["search", "study", "6"], "more": ["search", "study", "8"], "confirm": ["confirm", "study"]}
DIVERGES = "2"  # number of the trial that does
LOOK = ["look", "study"]
OF_FOLDERS = {"link": ("before", "after"), "append": ("torn",), "replace": ("after",)}  # when, by the kind of a write
OF_BUCKETS = {"request": ("before", "after")}


def prepare(folder):
    """Tells the trainings below a folder what to do."""
    stand_in.tell(folder, **{"seconds": 0, DIVERGES: "diverge"})


class Folders:
    """Studies in folders: runs jobs and returns for each name its folder, with the study in it, and its answers."""

    moments = OF_FOLDERS

    def __init__(self, run, folder):
        self.run, self.folder = run, folder

    def copy(self, before, name):
        shutil.copytree(self.folder / before / "study", self.folder / name / "study")

    def __call__(self, jobs):
        return self.run(jobs)


class Buckets(Folders):
    """The same in a bucket; whoever comes after a kill has another cache."""

    moments = OF_BUCKETS

    def __init__(self, run, folder, server):
        super().__init__(run, folder)
        self.server = server

    def copy(self, before, name):
        for each, data in self.server.objects().items():
            if each.startswith(f"{before}/"):
                self.server.put(each.replace(before, name, 1), data)

    def __call__(self, jobs):
        for job in jobs:
            for number, command in enumerate(job["commands"]):
                address = self.server.address(job["name"])
                command["argv"] = [address if word == "study" else word for word in command["argv"]]
                command["cache"] = f"cache-{number}"
        found = self.run(jobs)
        for name, (place, answers) in found.items():
            assert answers[-1]["code"] == 0, (name, answers)
            pull(self.server.address(name), place / "study")
        return found


def undisturbed(host, folder):
    """Runs the commands in peace, each on a copy of the study that the one before has left.

    Returns:
        By command the folder in which it was run, and the kinds of its writes.
    """
    found, before = {}, None
    for name, argv in COMMANDS.items():
        if before is not None:
            host.copy(before, name)
        kinds = folder / f"{name}.json"
        place, [answer] = host([{"name": name, "commands": [{"argv": argv, "count_to": str(kinds)}]}])[name]
        assert answer["code"] == 0, answer["log"]
        found[name] = place, Counter(json.loads(kinds.read_text()))
        before = name
    return found


def jobs_of(calm, moments):
    """Returns the jobs of ``crash_host``: each command killed around each write, then looked at and run."""
    return [
        {
            "name": f"{number:03d}-{name}-{kind}-{moment}",
            "commands": [{"argv": argv, "kill": (number, moment, kind)}, {"argv": LOOK}, {"argv": argv}],
        }
        for name, argv in COMMANDS.items()
        for kind, when in moments.items()
        for number in range(1, calm[name][1][kind] + 1)
        for moment in when
    ]


def killed(host, jobs):
    """Runs jobs, each on a copy of the study as it was before its command; returns what ``host`` returns."""
    starts = dict(zip(list(COMMANDS)[1:], COMMANDS, strict=False))
    for job in jobs:
        if start := starts.get(command_of(job["name"])):
            host.copy(start, job["name"])
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
        again = sum(row.attempt - 1 for kind in (trials, baselines, confirmations) for row in kind(study_dir))
        assert again <= 1, name
        assert kept(study_dir) == kept(calm[command_of(name)][0] / "study"), name
    return lost, twice


def kept(study_dir):
    """Returns which trainings have weights, what ``best.yaml`` says, and what killed writes have left."""
    weights = {path.parents[1].name for path in study_dir.glob("*/*/*/fine_tuned.safetensors")}
    best = (study_dir / "best.yaml").read_text().replace(str(study_dir.parent), "")
    return weights, best, [*study_dir.rglob("*.tmp")]


@contextlib.contextmanager
def started(folder, where="folder"):
    """Gives the runner of jobs, on studies in a folder or in a bucket of moto's."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = None if where == "folder" else stack.enter_context(bucket_server(patch))
        run = stack.enter_context(crash_host.started(folder, PROGRAM))
        yield Folders(run, folder) if server is None else Buckets(run, folder, server)
