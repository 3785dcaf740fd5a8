"""Searches, their continuation and a confirm that are killed around their writes: nothing lost, nothing doubled.

A search of six trials, one of which is cut and one diverges, its continuation to eight, and a confirm, all with the
executor ``debug`` and stand-in trainings, in forks of one process (``crash_host.py``). Each day has its share of the
kills, ``make crash-points`` makes all.
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

from carft_ray.study.place import pull
from carft_ray.study.rows import baselines, confirmations, trials

COMMANDS = {"search": ["search", "study", "6"], "more": ["resume", "study", "8"], "confirm": ["confirm", "study"]}
BEFORE = {"more": "search", "confirm": "more"}  # each begins with the study that another one has left
# writes to the log of a study in a folder and to its other files, or all to a bucket; and when to kill
OF_FOLDERS = {"link": ("before", "after"), "append": ("torn",), "replace": ("after",)}
OF_BUCKETS = {"request": ("before", "after")}


def prepare(folder):
    """Tells the trainings below a folder what to do."""
    stand_in.tell(folder, **{"seconds": 0, "2": "diverge"})


class Folders:
    """Studies in folders: runs jobs and returns for each name its folder, with the study in it, and its answers."""

    moments = OF_FOLDERS

    def __init__(self, run, folder):
        self.run, self.folder = run, folder

    def copy(self, before, name):
        shutil.copytree(self.folder / before / "study", self.folder / name / "study")

    def __call__(self, jobs):
        for job in jobs:
            if before := BEFORE.get(command_of(job["name"])):
                self.copy(before, job["name"])
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
        found = super().__call__(jobs)
        for name, (place, answers) in found.items():
            assert answers[-1]["code"] == 0, (name, answers)
            pull(self.server.address(name), place / "study")
        return found


def command_of(name):
    return name.split("-")[0]


def check(name, place, answers, calm):
    """Raises when after a kill something was missing, or told otherwise, or was there twice."""
    struck, look, last = answers
    assert struck["code"] == -signal.SIGKILL, (name, struck)
    assert (look["code"], last["code"]) == (0, 0), (name, look["log"], last["log"])
    assert "Traceback" not in look["log"] + last["log"], name
    study_dir = place / "study"
    rows = told(study_dir)
    assert rows == told(calm), name
    assert all(row in rows for row in json.loads(look["log"]) if row[0] == "ledger" or row[4] != "running"), name
    assert max(Counter(json.dumps(row[:3]) for row in rows).values()) == 1, name
    killed_searches.check_told_once(study_dir)
    assert sum(row.attempt - 1 for kind in (trials, baselines, confirmations) for row in kind(study_dir)) <= 1, name
    assert kept(study_dir) == kept(calm), name


def kept(study_dir):
    """Returns which trainings have weights, what ``best.yaml`` says, and what killed writes have left."""
    weights = {path.parents[1].name for path in study_dir.glob("*/*/*/fine_tuned.safetensors")}
    best = (study_dir / "best.yaml").read_text().replace(str(study_dir.parent), "")
    return weights, best, [*study_dir.rglob("*.tmp")]


@contextlib.contextmanager
def started(folder, where, monkeypatch):
    """Gives the runner of jobs, on studies in a folder or in a bucket of moto's."""
    with contextlib.ExitStack() as stack:
        server = None if where == "folder" else stack.enter_context(bucket_server(monkeypatch))
        run = stack.enter_context(crash_host.started(folder, "debug_search"))
        yield Folders(run, folder) if server is None else Buckets(run, folder, server)


@pytest.mark.timeout(5400)  # `make crash-points` kills around each write, on a slow and busy machine too
@pytest.mark.parametrize("where", ["folder", pytest.param("bucket", marks=pytest.mark.whole)])
@pytest.mark.slow
def test_a_search_more_of_it_and_a_confirm_killed_around_any_write_lose_nothing(tmp_path, where, monkeypatch):
    prepare(tmp_path)
    jobs, calm = [], {}
    with started(tmp_path, where, monkeypatch) as host:
        for name, argv in COMMANDS.items():  # in peace first
            kinds = tmp_path / f"{name}.json"
            calm[name], [answer] = host([{"name": name, "commands": [{"argv": argv, "count_to": str(kinds)}]}])[name]
            assert answer["code"] == 0, answer["log"]
            jobs += [
                {
                    "name": f"{name}-{number:03d}-{kind}-{moment}",
                    "commands": [
                        {"argv": argv, "kill": (number, moment, kind)},
                        {"argv": ["look", "study"]},
                        {"argv": argv},
                    ],
                }
                for kind, count in Counter(json.loads(kinds.read_text())).items()
                for number in range(1, count + 1)
                for moment in host.moments.get(kind, ())
            ]
        found = host(crash_host.share(jobs))
    kills = Counter(command_of(name) for name in found)
    assert {*kills} == {*COMMANDS}
    for name, (place, answers) in found.items():
        check(name, place, answers, calm[command_of(name)] / "study")
    print(f"kills around {len(jobs)} moments: {dict(kills)}; lost 0, twice 0")
    outcomes = [Counter(row.outcome for row in trials(place / "study")) for place in calm.values()]
    assert outcomes[0] == {"complete": 4, "diverged": 1, "pruned": 1}
    assert outcomes[1] == outcomes[2]
    assert sum(outcomes[1].values()) == 8
    assert [row.outcome for row in confirmations(calm["confirm"] / "study")] == ["complete"] * 4
