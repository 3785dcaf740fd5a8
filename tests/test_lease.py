"""The lease of a study: what another machine sees of a search, and when it may take the study over."""

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from stand_in import make_recipe

from carft_ray.errors import StorageError
from carft_ray.layout import LEASE
from carft_ray.store.owner import identity, process_started
from carft_ray.study import lease as module
from carft_ray.study.lease import READERS_STALE_AFTER_S, STALE_AFTER_S, holder
from carft_ray.study.lock import study_lock
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import trials


def leave(study_dir, age_s=0.0, **changes):
    """Writes the lease that a search leaves when it is killed: of this process, but for the changes."""
    study_dir.mkdir(exist_ok=True)
    path = study_dir / LEASE
    path.write_text(json.dumps({**identity(), **changes}))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


@pytest.fixture
def study_dir(tmp_path):
    return (tmp_path / "study").resolve()


def test_a_lease_stands_while_a_study_is_held_and_not_after(study_dir):
    with study_lock(study_dir) as held:
        content = json.loads((study_dir / LEASE).read_text())
        assert content["pid"] == os.getpid()
        assert held.note == ""
        assert not held.lost()
    assert not (study_dir / LEASE).exists()


def test_a_live_search_of_another_machine_is_left_alone(study_dir):
    path = leave(study_dir, age_s=STALE_AFTER_S / 2, host="node7", boot="another", pid=12, since="noon")
    before = path.read_text()
    with (
        pytest.raises(StorageError, match="is in use: two searches") as caught,
        open_study(study_dir, make_recipe()),
    ):
        pass
    assert caught.value.exit_code == 5
    assert "process 12 on node7, since noon" in str(caught.value)
    left = re.search(r"If its machine is gone, the study is free (\d+) s from now\.", str(caught.value))
    assert 0 < int(left[1]) <= STALE_AFTER_S / 2
    assert path.read_text() == before


def test_a_search_of_another_machine_without_a_heartbeat_is_taken_over_with_a_note(study_dir):
    leave(study_dir, age_s=STALE_AFTER_S + 5, host="node7", boot="another", pid=12, since="noon")
    with open_study(study_dir, make_recipe(1)) as study:
        assert study.notes == ["took over from process 12 on node7, since noon, which is gone"]


def test_a_dead_process_of_this_machine_is_taken_over_at_once(study_dir):
    code = f"""
        import os
        from pathlib import Path
        from carft_ray.study.lock import study_lock
        with study_lock(Path({str(study_dir)!r})):
            os._exit(1)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    with study_lock(study_dir) as held:
        assert held.note.startswith("took over from process ")


def test_a_number_that_another_process_has_got_meanwhile_does_not_count(study_dir):
    leave(study_dir, pid=os.getppid(), process_started="long ago")
    with study_lock(study_dir) as held:
        assert "which is gone" in held.note


def test_a_process_of_this_machine_that_lives_is_left_alone_even_without_a_lock(study_dir):
    """As on a file system that knows no locks."""
    pid = os.getppid()
    leave(study_dir, age_s=1000, pid=pid, process_started=process_started(pid))
    with pytest.raises(StorageError, match=f"process {pid} on "), study_lock(study_dir):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "\0\0"])
def test_a_damaged_lease_counts_by_its_age(study_dir, content):
    path = leave(study_dir)
    path.write_text(content)
    with pytest.raises(StorageError, match="is in use"), study_lock(study_dir):
        pass
    os.utime(path, (0, 0))
    with study_lock(study_dir):
        pass


@pytest.mark.slow
def test_the_heartbeat_goes_on_and_leaves_the_journal_alone(study_dir, monkeypatch):
    monkeypatch.setattr(module, "BEAT_EVERY_S", 0.05)
    with open_study(study_dir, make_recipe(1)) as study:
        recover_running(study)
        journal = (study_dir / "study.journal").stat()
        for _ in range(3):
            os.utime(study_dir / LEASE, (0, 0))
            wait_until(lambda: time.time() - (study_dir / LEASE).stat().st_mtime < 10)
        after = (study_dir / "study.journal").stat()
        assert (journal.st_mtime_ns, journal.st_size) == (after.st_mtime_ns, after.st_size)
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_a_search_that_was_taken_over_writes_nothing_more(study_dir):
    with open_study(study_dir, make_recipe(3)) as study:
        recover_running(study)
        study.next()
        assert not study.taken_over
        path = leave(study_dir, host="node7", boot="another", pid=12)
        journal = (study_dir / "study.journal").read_bytes()
        with pytest.raises(StorageError, match=r"was taken over by another search .* process 12 on node7"):
            study.next()
        assert study.taken_over
        assert (study_dir / "study.journal").read_bytes() == journal
    assert path.exists()  # it is the other's
    assert trials(study_dir) == []


# readers, who neither lock nor write


def test_a_reader_names_the_process_that_holds_a_study_and_nobody_afterwards(study_dir):
    assert holder(study_dir) is None  # there is no folder
    with study_lock(study_dir):
        assert holder(study_dir).startswith(f"process {os.getpid()} on ")
    assert holder(study_dir) is None


@pytest.mark.parametrize(
    ("age_s", "held"), [(0, True), (-3600, True), (READERS_STALE_AFTER_S / 2, True), (READERS_STALE_AFTER_S + 9, False)]
)
def test_a_reader_goes_by_the_heartbeat_of_another_machine_with_room_for_clocks_that_differ(study_dir, age_s, held):
    leave(study_dir, age_s, host="node7", boot="another", pid=12, since="noon")
    assert holder(study_dir) == ("process 12 on node7, since noon" if held else None)


def test_a_reader_writes_nothing(study_dir):
    leave(study_dir, host="node7", boot="another", pid=12)
    before = os.stat(study_dir).st_mtime_ns, sorted(study_dir.iterdir())
    assert holder(study_dir)
    assert before == (os.stat(study_dir).st_mtime_ns, sorted(study_dir.iterdir()))


@pytest.mark.parametrize(("content", "age_s", "held"), [("{}", 0, True), ("[1", 0, True), ("[1", 10000, False)])
def test_a_reader_takes_a_damaged_lease_by_its_age(study_dir, content, age_s, held):
    path = leave(study_dir)
    path.write_text(content)
    os.utime(path, (time.time() - age_s,) * 2)
    assert (holder(study_dir) is not None) == held


def test_a_killed_process_of_this_machine_holds_nothing_even_while_nobody_asks_how_it_ended(study_dir):
    """As in a container, whose first process seldom asks: the dead stay in the list of processes."""
    code = f"""
        import time
        from pathlib import Path
        from carft_ray.study.lock import study_lock
        with study_lock(Path({str(study_dir)!r})):
            print("locked", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        assert holder(study_dir).startswith(f"process {other.pid} on ")
        other.kill()
        stat = Path(f"/proc/{other.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
        assert (study_dir / LEASE).exists()
        assert holder(study_dir) is None
        with study_lock(study_dir) as held:
            assert held.note.startswith(f"took over from process {other.pid} on ")


def wait_until(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
