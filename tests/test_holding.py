"""Who holds a study: what another machine sees of a search, and when it may take the study over."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import attempts
import killed_searches
import pytest
import search_driver
import stand_in
from logs import commits, holding, take
from stand_in import make_recipe
from study_steps import contents, searching

from carft_ray.errors import DataError, StorageError
from carft_ray.store import heartbeat
from carft_ray.store import log as module
from carft_ray.store.folder import Folder
from carft_ray.store.heartbeat import READERS_SILENT_FOR_S, identity
from carft_ray.store.log import Log, log_of
from carft_ray.study import holding as held_module
from carft_ray.study.opening import open_study
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running

ELSEWHERE = {"host": "node7", "boot": "another", "pid": 12, "since": "noon"}


@pytest.fixture
def study_dir(tmp_path):
    """A study that nobody holds."""
    study_dir = (tmp_path / "study").resolve()
    with open_study(study_dir, make_recipe(3)):
        pass
    return study_dir


def leave(study_dir, **changes):
    """Claims a study as a search that is killed then; returns its log."""
    log = Log(Folder(study_dir))
    log.claim(me={**identity(), **changes})
    return log


def holder(study_dir):
    return log_of(study_dir).holder()


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_search_of_another_machine_that_is_silent_is_taken_over_and_told(study_dir, monkeypatch):
    monkeypatch.setattr(heartbeat, "SILENT_FOR_S", 1.0)
    monkeypatch.setattr(heartbeat, "LOOK_EVERY_S", 0.05)
    leave(study_dir, **ELSEWHERE)
    told = []
    with open_study(study_dir, make_recipe(3), tell=told.append) as study:
        assert told[1:] == ["took over from process 12 on node7, since noon, which is gone"]
        recover_running(study)
        assert study.next() is not None


def test_a_number_that_another_process_has_got_meanwhile_does_not_count(study_dir):
    leave(study_dir, pid=os.getppid(), process_started="long ago")
    told = []
    with holding(study_dir, told.append):
        assert "which is gone" in told[0]


def test_signs_of_life_go_on_during_an_open_study_and_end_with_it(study_dir, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_AFTER_S", 0.05)
    monkeypatch.setattr(held_module, "LOOK_EVERY_S", 0.02)
    with searching(study_dir, make_recipe(3)) as study:
        before = len(commits(study_dir))
        killed_searches.wait_until(lambda: len(commits(study_dir)) >= before + 3, "signs of life")
        assert all(commit["operations"] == commit["records"] == [] for commit in commits(study_dir)[before:])
        assert study.next() is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "beat"]


def test_a_new_study_that_is_removed_leaves_no_log_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_AFTER_S", 0.0)
    monkeypatch.setattr(held_module, "LOOK_EVERY_S", 0.001)
    for _ in range(5):
        with pytest.raises(DataError), open_study(tmp_path / "new", make_recipe(3)):
            raise DataError("unfit")
        assert not (tmp_path / "new").exists()
    with pytest.raises(DataError), open_study(tmp_path / "new", make_recipe(3)):
        raise DataError(str(take(tmp_path / "new")))
    assert (tmp_path / "new").exists()  # it is another search's


# searches of several machines, each a process


WAITS = ("BEAT_AFTER_S", "SILENT_FOR_S", "READERS_SILENT_FOR_S", "LOOK_EVERY_S")


def move(boot):
    """Makes this process one of another machine, for good, whose waits are a hundredth: nobody looks for it here."""
    me = {**identity(), "boot": boot}
    heartbeat.identity = module.identity = lambda: dict(me)
    for name in WAITS:
        setattr(heartbeat, name, getattr(heartbeat, name) / 100)
    module.RETRY_EVERY_S /= 100
    held_module.LOOK_EVERY_S /= 100


class Search:
    """A search in a process of its own, as on another machine; what it prints goes into a file."""

    def __init__(self, folder, boot, num_trials):
        self.path = folder / f"{boot}.txt"
        self.process = attempts.forked(search_elsewhere, self.path, boot, folder / "study", num_trials)

    def read_to(self, start):
        killed_searches.wait_until(lambda: start in self.output or not self.process.is_alive(), start)
        assert start in self.output, self.output

    def ended(self):
        self.process.join(killed_searches.TIMEOUT_S)
        return self.process.exitcode

    @property
    def output(self):
        return self.path.read_text() if self.path.exists() else ""


def search_elsewhere(path, boot, study_dir, num_trials):
    """Searches with stand-in trainings, one after the other, as on another machine."""
    with open(path, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    move(boot)
    sys.exit(search_driver.main(study_dir, num_trials, '{"executor": "debug"}', search='{"baselines": {}}'))


@pytest.mark.whole
def test_a_search_that_slept_while_another_took_over_and_ended_and_a_third_runs_writes_nothing(tmp_path):
    hold, study_dir = stand_in.tell(tmp_path) / "hold", tmp_path / "study"
    hold.touch()
    first = Search(tmp_path, "one", 1)
    first.read_to("TrialEpoch t0000-")
    os.kill(first.process.pid, signal.SIGSTOP)
    killed_searches.wait_until(lambda: state_of(first.process.pid) == "T", "it sleeps")
    hold.unlink()
    second = Search(tmp_path, "two", 1)
    assert second.ended() == 0, second.output
    assert f"took over from process {first.process.pid} on " in second.output
    assert [row.attempt for row in snapshot(study_dir).trials] == [2]
    ended = commits(study_dir)

    hold.touch()
    third = Search(tmp_path, "three", 2)
    third.read_to("TrialEpoch t0001-")
    before = contents(study_dir)
    os.kill(first.process.pid, signal.SIGCONT)
    assert first.ended() == 5
    *lines, error, step = first.output.splitlines()
    assert not any("Error" in line or "Traceback" in line for line in lines), first.output
    assert error.endswith("was written by another search, which has taken the study over")
    assert step == "    The other search continues from all commits; this one has ended."
    after = contents(study_dir)
    changed = {path.relative_to(study_dir) for path in before.keys() | after if before.get(path) != after.get(path)}
    assert [path for path in changed if not str(path).startswith(("log", "trials/t0001-"))] == []
    hold.unlink()
    assert third.ended() == 0, third.output

    assert [(row.number, row.outcome) for row in snapshot(study_dir).trials] == [(0, "complete"), (1, "complete")]
    killed_searches.check_told_once(study_dir)
    assert commits(study_dir)[: len(ended)] == ended
    owners = [commit["owner"] for commit in commits(study_dir)]
    assert len(set(owners)) == 1 + sum(one != other for one, other in pairwise(owners)) == 3


ROUNDS = 25


def starter(boot, folder, barrier, over, told):
    """Claims one study after the other, always together with another process; tells what came of each."""
    move(boot)
    os.fsync = lambda handle: None
    recipe = make_recipe(3)
    for number in range(ROUNDS):
        study_dir, said = folder / str(number), ""
        if number % 5 == 4 and boot == "one":  # a search has died in it, on a third machine
            Log(Folder(study_dir)).claim(me={**identity(), **ELSEWHERE})
        barrier.wait()
        count = 0
        try:
            with open_study(study_dir, recipe) as study:
                while not over.is_set():
                    count += 1
                    study.log.write({"kind": "at work", "count": count})
                    time.sleep(0.002)
        except StorageError as error:
            said = str(error)
            over.set()
        barrier.wait()
        over.clear()
        told.send((os.getpid(), said, count))


@pytest.mark.slow
def test_of_two_machines_that_start_at_once_one_holds_the_study_and_the_other_says_who(tmp_path):
    fork, readers = multiprocessing.get_context("fork"), []
    shared = fork.Barrier(2, timeout=killed_searches.TIMEOUT_S), fork.Event()
    for boot in ("one", "two"):
        reader, writer = fork.Pipe(duplex=False)
        fork.Process(target=starter, args=(boot, tmp_path, *shared, writer), daemon=True).start()
        writer.close()
        readers.append(reader)
    for number in range(ROUNDS):
        check_round(tmp_path / str(number), [reader.recv() for reader in readers])


def check_round(study_dir, told):
    """Raises when not exactly one of two has held a study, or the other has spoilt something."""
    (_, refusal, none), (pid, said, count) = sorted(told, key=lambda each: not each[1])
    assert (said, none) == ("", 0), told
    assert f"is in use: two searches on one study would damage it: process {pid} on " in refusal, told
    log = Log(Folder(study_dir))
    log.follow()  # it is whole: each commit names the one before
    records = [record for _, record in log.records if record.get("host") != ELSEWHERE["host"]]
    assert [record["kind"] for record in records] == ["owner", "recipe", "provenance", *["at work"] * count, "released"]
    assert [record["count"] for record in records[3:-1]] == list(range(1, count + 1))
    assert {path.name for path in study_dir.iterdir()} == {"log", "manifest.json"}
    assert all(path.name.isdigit() for path in (study_dir / "log").iterdir())


# readers, who neither claim nor write


@pytest.mark.parametrize(
    ("age_s", "held"), [(0, True), (-3600, True), (READERS_SILENT_FOR_S / 2, True), (READERS_SILENT_FOR_S + 9, False)]
)
def test_a_reader_writes_nothing_and_goes_by_the_last_commit_with_room_for_clocks_that_differ(
    study_dir, age_s, held, monkeypatch
):
    leave(study_dir, **ELSEWHERE)
    before = contents(study_dir), os.stat(study_dir).st_mtime_ns
    now = time.time() + age_s
    monkeypatch.setattr(time, "time", lambda: now)
    assert holder(study_dir) == ("process 12 on node7, since noon" if held else None)
    assert before == (contents(study_dir), os.stat(study_dir).st_mtime_ns)


def test_a_driver_whose_clock_is_behind_is_seen_by_the_clock_of_the_disk(study_dir, monkeypatch):
    with monkeypatch.context() as behind:
        behind.setattr(time, "time", lambda now=time.time: now() - 2 * READERS_SILENT_FOR_S)
        leave(study_dir, **ELSEWHERE)
    assert holder(study_dir) == "process 12 on node7, since noon"


def test_a_killed_process_of_this_machine_holds_nothing_even_while_nobody_asks_how_it_ended(study_dir):
    """As in a container, whose first process seldom asks: the dead stay in the list of processes."""
    code = "import logs, pathlib, sys, time\nwith logs.holding(pathlib.Path(sys.argv[1])):\n"
    code += "    print('held', flush=True)\n    time.sleep(60)\n"
    command, environment = [sys.executable, "-c", code, str(study_dir)], killed_searches.environment()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert re.fullmatch(rf"process {other.pid} on \S+, since \S+", holder(study_dir))
        other.kill()
        killed_searches.wait_until(lambda: state_of(other.pid) == "Z", "it is dead")
        assert holder(study_dir) is None
        told = []
        with holding(study_dir, told.append):
            assert told[0].startswith(f"took over from process {other.pid} on ")
        assert holder(study_dir) is holder(study_dir / "nothing") is None
