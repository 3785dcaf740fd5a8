"""Searches, their continuation and a confirm that are killed around their writes: nothing lost, doubled or wedged.

A search of six trials, one of which is cut and one diverges, its continuation to eight, and a confirm, as users call
them, with the executor ``debug`` and stand-in trainings, in forks of one process (``crash_host.py``). Starts of one
are killed also on a bucket that fails, and with Ray. Each day has its share of the kills, ``make crash-points`` all.
"""

import contextlib
import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import crash_host
import killed_searches
import pytest
import stand_in
from bucket_server import DONE_503, HALF, LATE, LOST, SLOW, bucket_server, refused
from debug_search import told

from carft_ray.study.place import pull
from carft_ray.study.snapshot import snapshot

COMMANDS = {"search": ["search", "study", "6"], "more": ["resume", "study", "8"], "confirm": ["confirm", "study"]}
BEFORE = {"more": "search", "confirm": "more"}  # each begins with the study that another one has left
# writes to the log of a study in a folder and to its other files, or all to a bucket; and when to kill
OF_FOLDERS = {"link": ("before", "after"), "append": ("torn",), "replace": ("after",)}
OF_BUCKETS = {"request": ("before", "after")}
FAULTS = (refused(500, "InternalError"), LATE, LOST, HALF, SLOW, DONE_503)  # of a bucket that fails,
FAULTY = 0.05  # at so many of its requests
NUM_FIRST = 24  # writes of a search in its first second, about
NUM_WITH_RAY = 20
BOTH = ("before", "after")
HERE = Path(__file__).parent


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
    """The same in a bucket; after every second kill, another machine comes, which has another cache.

    ``strike`` is that of the server while the jobs run.
    """

    moments = OF_BUCKETS

    def __init__(self, run, folder, server):
        super().__init__(run, folder)
        self.server, self.strike = server, server.strike

    def copy(self, before, name):
        for each, data in self.server.objects().items():
            if each.startswith(f"{before}/"):
                self.server.put(each.replace(before, name, 1), data)

    def __call__(self, jobs):
        for index, job in enumerate(jobs):
            for number, command in enumerate(job["commands"]):
                address = self.server.address(job["name"])
                command["argv"] = [address if word == "study" else word for word in command["argv"]]
                command["cache"] = f"cache-{number if index % 2 else 0}"
        calm, self.server.strike = self.server.strike, self.strike
        found = super().__call__(jobs)
        self.server.strike = calm
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
    check_whole(name, study_dir, calm)
    rows = told(study_dir)
    assert all(row in rows for row in json.loads(look["log"]) if row[0] == "ledger" or row[4] != "running"), name
    assert sum(row.attempt - 1 for row in snapshot(study_dir).rows) <= 1, name


def check_whole(name, study_dir, calm):
    """Raises when a study is not as one that nothing has disturbed."""
    rows = told(study_dir)
    assert rows == told(calm), name
    assert max(Counter(json.dumps(row[:3]) for row in rows).values()) == 1, name
    killed_searches.check_told_once(study_dir)
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
    print(f"kills around {len(jobs)} moments: {dict(kills)}; lost 0, twice 0, wedged 0")
    outcomes = [Counter(row.outcome for row in snapshot(place / "study").trials) for place in calm.values()]
    assert outcomes[0] == {"complete": 4, "diverged": 1, "pruned": 1}
    assert outcomes[1] == outcomes[2]
    assert sum(outcomes[1].values()) == 8
    assert [row.outcome for row in snapshot(calm["confirm"] / "study").confirmations] == ["complete"] * 4


@pytest.mark.timeout(5400)
@pytest.mark.whole
def test_a_search_killed_at_its_start_goes_on_where_its_bucket_answers_500_late_or_by_halves(tmp_path, monkeypatch):
    prepare(tmp_path)
    argv, rng = COMMANDS["search"], random.Random(0)
    with started(tmp_path, "bucket", monkeypatch) as host:
        calm, [answer] = host([{"name": "search", "commands": [{"argv": argv}]}])["search"]
        assert answer["code"] == 0, answer["log"]
        host.strike = lambda method, path: rng.choice(FAULTS) if rng.random() < FAULTY else None
        jobs = [
            {
                "name": f"search-{number:03d}-{moment}",
                "commands": [{"argv": argv, "kill": (number, moment, "request")}, {"argv": argv, "tries": 10}],
            }
            for number in range(1, NUM_FIRST + 1)
            for moment in OF_BUCKETS["request"]
        ]
        found = host(crash_host.share(jobs))
    killed = 0
    for name, (place, (struck, last)) in found.items():
        assert struck["code"] in (-signal.SIGKILL, 5), (name, struck)  # 5: the bucket has ended it before
        assert "Traceback" not in struck["log"] + last["log"], name
        check_whole(name, place / "study", calm / "study")
        killed += struck["code"] == -signal.SIGKILL
    assert killed
    print(f"kills on a bucket that fails: {killed}, before they came it ended {len(found) - killed}; wedged 0")


@pytest.mark.timeout(5400)
@pytest.mark.whole
def test_a_search_in_a_folder_with_ray_killed_at_its_start_goes_on(tmp_path):
    stand_in.tell(tmp_path, seconds=0)
    argv = [sys.executable, str(HERE / "debug_search.py"), "search"]
    numbers = crash_host.share([(number, moment) for number in range(1, 1 + NUM_WITH_RAY // 2) for moment in BOTH])
    for number, moment in numbers:
        study_dir = tmp_path / f"{number}-{moment}"
        search = [*argv, str(study_dir), "2", "inline"]
        code, output = killed_searches.finish(killed := killed_searches.started([*search, str(number), moment, "link"]))
        assert code == -signal.SIGKILL, output
        killed_searches.kill_group(killed)
        killed_searches.finished(killed_searches.started(search))
        assert [row.outcome for row in snapshot(study_dir).trials] == ["complete"] * 2
        assert sorted(row.outcome for row in snapshot(study_dir).baselines) == ["complete", "complete"]
        killed_searches.check_told_once(study_dir)
    print(f"kills with Ray: {len(numbers)}; wedged 0")
