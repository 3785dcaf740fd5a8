"""A sealed read that is killed, falls asleep or meets a full disk at any of its writes; an export on a full disk.

The read continues with its line of the ledger, and its numbers are those of an undisturbed one. One seal is spent.
"""

import json
import shutil
import signal
from collections import Counter

import crash_host
import pytest
import short_sealed
from debug_search import half_written

from carft_ray.study.snapshot import snapshot

pytestmark = pytest.mark.slow

TEST = ["test", "study"]
EXPORT = ["export", "study", "--to", "exported"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Runs jobs, each on a copy of a finished study with test sets, and with a cache of its own."""
    made, folder = short_sealed.shared(tmp_path_factory), tmp_path_factory.mktemp("tests_struck")

    def jobs(commands):
        for name in commands:
            shutil.copytree(made / "study", folder / name / "study")
            shutil.rmtree(made / "cache" / "test_reads", ignore_errors=True)
        return run([{"name": name, "commands": each} for name, each in commands.items()])

    with crash_host.started(folder, "verbs_host") as run:
        yield jobs


@pytest.fixture(scope="module")
def calm(host, tmp_path_factory):
    """What an undisturbed read says, the kinds of its writes, and how many of them a full disk can refuse."""
    path = tmp_path_factory.mktemp("calm") / "kinds.json"
    found = host(
        {"calm": [{"argv": TEST, "count_to": str(path)}], "writes": [{"argv": ["full", "1000000", "", *TEST]}]}
    )
    assert [answer["code"] for _, answers in found.values() for answer in answers] == [0, 0], found
    return (
        told(found["calm"][0] / "study"),
        json.loads(path.read_text()),
        int((found["writes"][0] / "writes").read_text()),
    )


def told(study_dir):
    summary = json.loads((study_dir / "test" / "summary.json").read_text())
    assert summary == json.loads((study_dir / "test" / "read-1" / "summary.json").read_text())
    return {**summary, "time": "", "elsewhere": []}  # other jobs read the same images


def check(name, place, answer, calm):
    """Raises when a read is not the undisturbed one, or a seal was spent twice; without an answer nothing was to do."""
    study_dir = place / "study"
    if answer is not None:
        assert answer["code"] == 0, (name, answer["log"])
        assert "Traceback" not in answer["log"], name
        assert half_written(study_dir) == [], name
    assert told(study_dir) == calm, name
    assert [(each.number, each.purpose) for each in snapshot(study_dir).ledger] == [(1, "test")], name
    assert [path.name for path in (study_dir / "test").iterdir() if path.is_dir()] == ["read-1"], name


@pytest.mark.timeout(5400)  # `make crash-points` kills around each write, on a slow and busy machine too
def test_a_read_killed_around_any_write_continues_with_its_line_and_its_numbers(host, calm):
    numbers, kinds, _ = calm
    jobs = {
        f"kill-{number:02d}-{kind}-{moment}": [{"argv": TEST, "kill": (number, moment, kind)}, {"argv": TEST}]
        for kind, moments in {"link": ("before", "after"), "replace": ("before", "after")}.items()
        for number in range(1, kinds.count(kind) + 1)
        for moment in moments
    }
    found = host(dict(crash_host.share([*jobs.items()])))
    for name, (place, [struck, last]) in found.items():
        assert struck["code"] == -signal.SIGKILL, (name, struck)
        if last["code"] == 8:  # it was finished: the kill came when all was written
            assert "its test sets were read already" in last["log"], (name, last["log"])
            last = None
        check(name, place, last, numbers)
    print(f"kills around {len(found)} of {len(jobs)} moments of a read; lost 0, seals spent twice 0")


def test_a_read_whose_disk_fills_at_any_write_says_so_once_and_continues(host, calm):
    numbers, _, count = calm
    jobs = {
        f"full-{number:03d}-{kind or 'stays'}": [{"argv": ["full", str(number), kind, *TEST]}, {"argv": TEST}]
        for number in range(1, count + 1)
        for kind in ("", "once")
    }
    found, ends = host(dict(crash_host.share([*jobs.items()][::5]))), Counter()
    for name, (place, [full, last]) in found.items():
        ends[full["code"]] += 1
        assert full["code"] in (0, 5), (name, full["log"])
        assert full["log"].count("error: ") == (full["code"] == 5), (name, full["log"])
        assert "Traceback" not in full["log"], (name, full["log"])
        if full["code"]:
            assert "must be writable, but got No space left on device" in full["log"], (name, full["log"])
        assert full["remains"] == [], name
        if last["code"] == 8:
            assert "its test sets were read already" in last["log"], (name, last["log"])
            last = None
        check(name, place, last, numbers)
    print(f"a full disk at {len(found)} of {len(jobs)} writes of a read: {dict(ends)}; seals spent twice 0")


def test_an_export_whose_disk_fills_leaves_nothing_and_the_same_command_writes_it(host):
    found = host({"export": [{"argv": EXPORT}], "export-writes": [{"argv": ["full", "1000000", "", *EXPORT]}]})
    whole = contents(found["export"][0] / "exported")
    count = int((found["export-writes"][0] / "writes").read_text())
    jobs = {
        f"export-{number:03d}-{kind or 'stays'}": [{"argv": ["full", str(number), kind, *EXPORT]}, {"argv": EXPORT}]
        for number in range(1, count + 1)
        for kind in ("", "once")
    }
    for name, (place, [full, last]) in host(dict(crash_host.share([*jobs.items()][::3]))).items():
        assert "Traceback" not in full["log"], (name, full["log"])
        assert full["code"] in (0, 5), (name, full["log"])
        assert full["log"].count("error: ") == (full["code"] == 5), (name, full["log"])
        if full["code"]:
            assert last["code"] == 0, (name, last["log"])
        assert contents(place / "exported") == whole, name


def contents(folder):
    assert not list(folder.rglob("*.tmp"))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
