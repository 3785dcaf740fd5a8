"""The cache of images under many processes: one builder, kills at every durable operation, full disks, memory."""

import json
import signal

import crash_host
import pytest
from cache_builds import NUM_PROCESSES, Pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with crash_host.started(tmp_path_factory.mktemp("builds"), "cache_builds") as run:
        yield run


def names(place):
    """What the cache of a job holds, but for lock files."""
    return sorted(path.name for path in (place / "cache").glob("*") if path.suffix != ".lock")


def one_job(host, name, *argv):
    """Runs one command line; returns the folder of its job and its answer."""
    ((place, (answer,)),) = host([{"name": name, "commands": [{"argv": argv}]}]).values()
    assert answer["code"] == 0, answer["log"]
    return place, answer


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_eight_processes_that_ask_at_once_build_a_set_once_or_without_locks_one_entry(host, kind, locks):
    place, answer = one_job(host, f"{kind}-{locks}", "builders", ".", kind, locks)
    sums = json.loads(answer["log"].splitlines()[-1])
    assert (len(sums), len(set(sums))) == (NUM_PROCESSES, 1)
    assert answer["remains"] == []
    assert len(names(place)) == 1
    if locks == "locks":
        lines = [line.split() for line in (place / "log").read_text().splitlines()]
        assert sorted(int(index) for _, index in lines) == list(range(len(Pictures())))
        assert len({process for process, _ in lines}) == 1


def test_eight_readers_share_one_copy_in_memory(host):
    found = json.loads(one_job(host, "readers", "readers", ".")[1]["log"])
    assert len({each["total"] for each in found}) == 1
    for each in found:
        assert max(each["grown"]) < 0.1 * each["set"], found


@pytest.mark.parametrize("kind", ["decoded", "packed", "limited"])
def test_a_build_killed_after_any_durable_operation_leaves_nothing_half_written_and_the_next_one_works(host, kind):
    build = {"argv": [kind, "."]}
    first = [{"argv": ["decoded", "."]}] if kind == "limited" else []  # a set that has to be removed
    ((place, answers),) = host([{"name": kind, "commands": [*first, {**build, "count_to": "kinds"}]}]).values()
    assert {answer["code"] for answer in answers} == {0}
    assert len(names(place)) == 1  # with a limit the newest one only
    number = len(json.loads((place / "kinds").read_text()))
    assert number >= 3  # flush, rename, flush of the folder
    killed = [[*first, {**build, "kill": (n, "after")}, build] for n in range(1, number + 1)]
    jobs = host([{"name": f"{kind}-{n}", "commands": commands} for n, commands in enumerate(killed)])
    for name, (folder, (*_, stopped, second)) in jobs.items():
        assert stopped["code"] == -signal.SIGKILL, name
        assert (second["code"], second["log"]) == (0, answers[-1]["log"]), name
        assert names(folder) == names(place), name
        assert second["remains"] == [], name


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(host):
    """A limit on the size of files stands for a full disk: each write fails where the first byte does not fit."""
    jobs = [
        {"name": f"full-{kind}-{size}", "commands": [{"argv": [kind, "."], "file_size": size}, {"argv": [kind, "."]}]}
        for kind in ("decoded", "packed")
        for size in (0, 700, 2500)  # of a set: 290 and 2,990 bytes, or 2,550
    ]
    answers = host(jobs)
    failed = [name for name, (_, (first, _)) in answers.items() if first["code"]]
    assert len(failed) >= 5
    for name, (_, (first, second)) in answers.items():
        assert second["code"] == 0, second["log"]
        if name in failed:
            assert first["code"] == 5, first["log"]
            assert ": must be writable, but got File too large" in first["log"], name
            assert "cache/" in first["log"], name
            assert first["remains"] == [], name
