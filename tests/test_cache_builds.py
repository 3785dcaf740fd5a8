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


def build(kind, **extra):
    return {"argv": [kind, "."], **extra}


def names(place):
    """What the cache of a job holds, but for lock files."""
    return sorted(path.name for path in (place / "cache").glob("*") if path.suffix != ".lock")


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_eight_processes_that_ask_at_once_build_a_set_once(host, kind):
    place, (answer,) = host([{"name": f"eight-{kind}", "commands": [{"argv": ["builders", ".", kind]}]}])[
        f"eight-{kind}"
    ]
    assert answer["code"] == 0, answer["log"]
    sums = json.loads(answer["log"])
    assert len(sums) == NUM_PROCESSES
    assert len(set(sums)) == 1
    lines = [line.split() for line in (place / "log").read_text().splitlines()]
    assert sorted(int(index) for _, index in lines) == list(range(len(Pictures())))
    assert len({process for process, _ in lines}) == 1


@pytest.mark.parametrize("kind", ["decoded", "packed"])
def test_eight_processes_that_build_at_once_on_a_disk_without_locks_leave_one_entry(host, kind):
    name = f"no-locks-{kind}"
    place, (answer,) = host([{"name": name, "commands": [{"argv": ["builders", ".", kind, "no-locks"]}]}])[name]
    assert answer["code"] == 0, answer["log"]
    sums = json.loads(answer["log"].splitlines()[-1])
    assert len(sums) == NUM_PROCESSES
    assert len(set(sums)) == 1
    assert answer["remains"] == []
    assert len(names(place)) == 1


def test_eight_readers_share_one_copy_in_memory(host):
    _, (answer,) = host([{"name": "readers", "commands": [{"argv": ["readers", "."]}]}])["readers"]
    assert answer["code"] == 0, answer["log"]
    found = json.loads(answer["log"])
    assert len({each["total"] for each in found}) == 1
    for each in found:
        assert max(each["grown"]) < 0.1 * each["set"], found


@pytest.fixture(scope="module")
def killed(host):
    """Per kind: builds killed after every durable operation, then run again; ``limited`` ones have to remove a set."""
    found = {}
    for kind in ("decoded", "packed", "limited"):
        first = [build("decoded")] if kind == "limited" else []
        place, answers = host([{"name": f"whole-{kind}", "commands": [*first, build(kind, count_to="kinds")]}])[
            f"whole-{kind}"
        ]
        assert [answer["code"] for answer in answers] == [0] * (1 + len(first))
        number = len(json.loads((place / "kinds").read_text()))
        jobs = [
            {"name": f"{kind}-{n}", "commands": [*first, build(kind, kill=(n, "after")), build(kind)]}
            for n in range(1, number + 1)
        ]
        found[kind] = (place, answers[-1]["log"], number, host(jobs))
    return found


@pytest.mark.parametrize("kind", ["decoded", "packed", "limited"])
def test_a_build_killed_after_any_durable_operation_leaves_nothing_half_written_and_the_next_one_works(killed, kind):
    place, whole, number, jobs = killed[kind]
    assert number >= 3  # flush, rename, flush of the folder
    assert len(jobs) == number
    for name, (folder, (*_, first, second)) in jobs.items():
        assert first["code"] == -signal.SIGKILL, name
        assert (second["code"], second["log"]) == (0, whole), name
        assert names(folder) == names(place), name
        assert [file.name for file in (folder / "cache").rglob("*") if file.suffix == ".tmp"] == [], name


def test_a_cache_with_a_limit_keeps_the_newest_set_only(killed):
    assert len(names(killed["limited"][0])) == 1


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(host):
    """A limit on the size of files stands for a full disk: each write fails where the first byte does not fit."""
    sizes = [0, 700, 2500]  # of a set: 290 and 2,990 bytes, or 2,550
    jobs = [
        {"name": f"full-{kind}-{size}", "commands": [build(kind, file_size=size), build(kind)]}
        for kind in ("decoded", "packed")
        for size in sizes
    ]
    failed = 0
    for name, (folder, (first, second)) in host(jobs).items():
        assert second["code"] == 0, second["log"]
        if first["code"]:
            failed += 1
            assert first["code"] == 5, first["log"]
            assert ": must be writable, but got File too large" in first["log"], name
            assert f"error: {folder}/cache/" in first["log"] or "error: cache/" in first["log"], first["log"]
            assert first["remains"] == [], name
    assert failed >= 5
