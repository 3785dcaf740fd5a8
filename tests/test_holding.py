"""Who holds a study: what another machine sees of a search, and when it may take the study over."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import killed_searches
import pytest
from logs import HOLD, commits, holding, take
from stand_in import make_recipe

from carft_ray.errors import DataError
from carft_ray.store import log as module
from carft_ray.store.folder import Folder, RefusedError
from carft_ray.store.log import READERS_SILENT_FOR_S, Log
from carft_ray.store.owner import identity
from carft_ray.study import holding as held_module
from carft_ray.study.holding import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import trials

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


def contents(study_dir):
    return {path: path.read_bytes() if path.is_file() else None for path in study_dir.rglob("*")}


def test_a_study_is_held_while_it_is_open_and_not_after(study_dir):
    assert holder(study_dir) is None
    with holding(study_dir):
        assert re.fullmatch(rf"process {os.getpid()} on \S+, since \S+", holder(study_dir))
    assert holder(study_dir) is None
    assert holder(study_dir / "nothing") is None


def test_a_number_that_another_process_has_got_meanwhile_does_not_count(study_dir):
    leave(study_dir, pid=os.getppid(), process_started="long ago")
    told = []
    with holding(study_dir, told.append):
        assert "which is gone" in told[0]


@pytest.mark.slow
def test_signs_of_life_go_on_during_an_open_study_and_end_with_it(study_dir, monkeypatch):
    monkeypatch.setattr(module, "BEAT_AFTER_S", 0.05)
    monkeypatch.setattr(held_module, "LOOK_EVERY_S", 0.02)
    with open_study(study_dir, make_recipe(3)) as study:
        recover_running(study)
        before = len(commits(study_dir))
        killed_searches.wait_until(lambda: len(commits(study_dir)) >= before + 3, "signs of life")
        assert all(commit["operations"] == commit["records"] == [] for commit in commits(study_dir)[before:])
        assert study.next() is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "beat"]


def test_a_search_that_was_taken_over_sees_it_and_writes_nothing_more(study_dir):
    with open_study(study_dir, make_recipe(3)) as study:
        recover_running(study)
        study.log.check()
        other = take(study_dir)
        before = contents(study_dir / "log")
        for use in (study.log.check, study.next):
            with pytest.raises(RefusedError, match="was written by another search, which has taken the study over"):
                use()
        assert study.log.is_lost
    assert contents(study_dir / "log") == before  # a study that is the other's is not released
    with other.commit({"kind": "goes on"}):
        pass
    assert trials(study_dir) == []


def test_a_new_study_that_is_removed_leaves_no_log_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_AFTER_S", 0.0)
    monkeypatch.setattr(held_module, "LOOK_EVERY_S", 0.001)
    for _ in range(5):
        with pytest.raises(DataError), open_study(tmp_path / "new", make_recipe(3)):
            raise DataError("unfit")
        assert not (tmp_path / "new").exists()


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


def test_a_killed_process_of_this_machine_holds_nothing_even_while_nobody_asks_how_it_ended(study_dir):
    """As in a container, whose first process seldom asks: the dead stay in the list of processes."""
    code = f"{HOLD}import time\nwith holding({str(study_dir)!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert holder(study_dir).startswith(f"process {other.pid} on ")
        other.kill()
        stat = Path(f"/proc/{other.pid}/stat")
        killed_searches.wait_until(lambda: ") Z " in stat.read_text(), "it is dead")
        assert holder(study_dir) is None
        told = []
        with holding(study_dir, told.append):
            assert told[0].startswith(f"took over from process {other.pid} on ")
