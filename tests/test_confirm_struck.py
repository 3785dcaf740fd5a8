"""A confirm in two stages, against another study, that is killed or meets a full disk around its writes.

``carft-ray confirm --winner confirmed --against`` with trainings of milliseconds (``verbs_host.py``): what was trained
stays, nothing is trained twice, and the same command ends with the numbers of an undisturbed one.
"""

import json
import shutil
import signal
from collections import Counter

import crash_host
import pytest
import verbs_host
from bucket_server import bucket_server, copied
from debug_search import half_written

from carft_ray.study.place import pull
from carft_ray.study.snapshot import snapshot

pytestmark = pytest.mark.whole  # some 250 kills, of which each day has a tenth

CONFIRM = ["confirm", "study", "--executor", "debug", "--top", "2", "--seeds", "2", "--winner", "confirmed"]
CONFIRM += ["--against", "rival"]
MOMENTS = {"link": ("before", "after"), "append": ("torn",), "replace": ("after",), "request": ("before", "after")}


class Host:
    """Runs jobs on copies of two finished studies; ``calm`` is what an undisturbed confirm leaves."""

    def __init__(self, run, folder, server=None):
        self.folder, self.server, self._run = folder, server, run
        (folder / "recipe.yaml").write_text(verbs_host.RECIPE)
        search = ["search", "../recipe.yaml", "--study"]
        other = ["--set", "search.sampler.seed=7"]
        [(self.made, answers)] = run(
            [{"name": "made", "commands": [{"argv": [*search, "study"]}, {"argv": [*search, "rival", *other]}]}]
        ).values()
        assert [each["code"] for each in answers] == [0, 0], answers
        self.kinds = folder / "kinds.json"
        self.calm, [answer] = self.jobs({"calm": [{"argv": CONFIRM, "count_to": str(self.kinds)}]})["calm"]
        assert answer["code"] == 0, answer["log"]

    def jobs(self, commands):
        """Runs command lines by name of the job; gives the folder with the study of each, and the answers."""
        for name, each in commands.items():
            shutil.copytree(self.made, self.folder / name, ignore=shutil.ignore_patterns("cache", "trained"))
            if self.server is not None:
                copied(self.made / "study", self.server.address(name))
                shutil.rmtree(self.folder / name / "study")
                for number, command in enumerate(each):
                    command["argv"] = [
                        self.server.address(name) if word == "study" else word for word in command["argv"]
                    ]
                    command["cache"] = f"cache-{number}"
                    command["argv"] += ["--trust-paths"] * ("confirm" in command["argv"])
        found = self._run([{"name": name, "commands": each} for name, each in commands.items()])
        for name, (place, answers) in found.items():
            if self.server is not None and answers[-1]["code"] == 0:
                pull(self.server.address(name), place / "study")
        return found


@pytest.fixture(scope="module", params=["folder", "bucket"])
def host(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("struck")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "folder":
            with crash_host.started(folder, "verbs_host") as run:
                yield Host(run, folder)
        else:
            with bucket_server(patched) as server, crash_host.started(folder, "verbs_host") as run:
                yield Host(run, folder, server)


def told(study_dir):
    """Returns what a confirm has left, without times and attempts."""
    rows = [[row.name, row.values, row.outcome, row.objective, row.alpha] for row in snapshot(study_dir).confirmations]
    entries = [[each.purpose, each.details] for each in snapshot(study_dir).ledger]
    return rows, entries, json.loads((study_dir / "confirm" / "summary.json").read_text())


def check(host, name, place, answer):
    """Raises when the last command of a job has not ended as an undisturbed confirm does."""
    assert answer["code"] == 0, (name, answer["log"])
    assert "Traceback" not in answer["log"], name
    study_dir = place / "study"
    assert told(study_dir) == told(host.calm / "study"), name
    assert half_written(study_dir) == [], name
    trained = Counter((place / "trained").read_text().split())
    names = {row.name for row in snapshot(study_dir).confirmations}
    # what had ended, but was not in the bucket yet, another machine trains again
    assert sum(trained.values()) - len(trained) <= (host.server is not None), name
    assert trained.keys() <= names, name
    assert len(names - trained.keys()) <= 1, name  # killed between its result and its note
    assert sum(row.attempt - 1 for row in snapshot(study_dir).confirmations) <= 1, name


@pytest.mark.timeout(5400)  # `make crash-points` kills around each write, on a slow and busy machine too
def test_a_confirm_killed_around_any_write_of_its_stages_trains_nothing_twice(host):
    jobs = {
        f"kill-{number:03d}-{kind}-{moment}": [{"argv": CONFIRM, "kill": (number, moment, kind)}, {"argv": CONFIRM}]
        for kind, count in Counter(json.loads(host.kinds.read_text())).items()
        for number in range(1, count + 1)
        for moment in MOMENTS.get(kind, ())
        if (kind == "request") == (host.server is not None)
    }
    found = host.jobs(dict(crash_host.share([*jobs.items()])))
    for name, (place, answers) in found.items():
        assert answers[0]["code"] == -signal.SIGKILL, (name, answers[0])
        check(host, name, place, answers[-1])
    print(f"kills around {len(found)} of {len(jobs)} moments; lost 0, twice 0")


def test_a_confirm_whose_disk_fills_at_any_write_says_so_once_and_goes_on(host):
    """From one write on, or for this one alone: the disk has space again when the command is repeated."""
    if host.server is not None:
        pytest.skip("in a bucket a full disk of this machine is that of its cache")
    [(place, [answer])] = host.jobs({"writes": [{"argv": ["full", str(10**6), "", *CONFIRM]}]}).values()
    assert answer["code"] == 0, answer["log"]
    count = int((place / "writes").read_text())
    jobs = {
        f"full-{number:03d}-{kind or 'stays'}": [{"argv": ["full", str(number), kind, *CONFIRM]}, {"argv": CONFIRM}]
        for number in range(1, count + 1)
        for kind in ("", "once")
    }
    found = host.jobs(dict(crash_host.share([*jobs.items()][::20])))  # of some 1,700: each has its commits around it
    ends = Counter()
    for name, (place, [full, again]) in found.items():
        ends[full["code"]] += 1
        assert full["code"] in (0, 5), (name, full["log"])
        assert full["log"].count("error: ") == (full["code"] == 5), (name, full["log"])
        assert "Traceback" not in full["log"], (name, full["log"])
        if full["code"]:
            assert "must be writable, but got No space left on device" in full["log"], (name, full["log"])
        assert full["remains"] == [], name
        check(host, name, place, again)
    print(f"a full disk at {len(found)} of {len(jobs)} writes: {dict(ends)}; lost 0, twice 0")
