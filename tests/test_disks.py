"""A network disk that does not answer for a moment: no verdict on a training, and no end of a search. A full disk."""

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import crash_host
import pytest
from stand_in import make_recipe
from study_steps import searching
from test_study_crash import prepare

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.driver import Driver
from carft_ray.store.attempt_files import read_result
from carft_ray.training.checkpoint import newest_checkpoint
from cluster import hiding


@pytest.fixture
def disk(monkeypatch):
    """Gives a function: looking at, or opening, files of a name fails so many times from now on."""
    left, slept = {}, []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)  # no wait, and none too short
    monkeypatch.setattr(files, "time", clock)

    def failing(plain):
        def wrapped(path, *args, **kwargs):
            name = os.path.basename(path)
            number, times = left.get(name, (0, 0))
            if times > 0:
                left[name] = (number, times - 1)
                raise OSError(number, os.strerror(number), str(path))
            return plain(path, *args, **kwargs)

        return wrapped

    for name in ("stat", "open", "read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    monkeypatch.setattr(os, "open", failing(os.open))
    return lambda name, times, number=errno.ESTALE: left.update({name: (number, times)})


FOREVER = 10**6


@pytest.mark.slow
@pytest.mark.parametrize("number", files.MACHINE_ERRNOS, ids=errno.errorcode.get)
def test_a_fault_that_passes_is_waited_for_and_one_that_stays_is_a_storage_error(disk, tmp_path, number):
    path = tmp_path / "there"
    path.write_text("x")
    for name, there in (("there", True), ("missing", False)):
        disk(name, 3, number)
        assert files.exists(tmp_path / name) is there
    assert not files.exists(path / "below_a_file")
    disk("there", FOREVER, number)
    with pytest.raises(StorageError, match="must be readable") as raised:
        files.exists(path)
    assert raised.value.__cause__.errno == number
    assert not files.seen(path)
    disk("there", 0)
    assert files.seen(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_full_disk_or_a_missing_permission_is_never_hidden(disk, tmp_path, number):
    for read in (files.exists, files.seen, lambda path: files.read_json_lines(path.parent, path.name)):
        disk("file", 1, number)
        with pytest.raises(OSError, match=os.strerror(number)):
            read(tmp_path / "file")


def test_a_search_goes_on_while_its_disk_does_not_answer(disk, tmp_path):
    with searching(tmp_path / "study", make_recipe(2, baselines={})) as study:
        driver = Driver(study, AtATime(1), lambda event: None)
        driver.propose("one").folder(study.study_dir).mkdir(parents=True, exist_ok=True)
        driver.started("one")
        (study.study_dir / "stop").write_text("asked")
        disk("stop", FOREVER, errno.EHOSTDOWN)
        driver.poll()
        assert not driver.is_stopping
        disk("stop", 0)
        assert driver.check_stop()
        assert driver.failure is None


def test_a_study_is_not_taken_for_a_new_one_while_its_disk_does_not_answer(disk, tmp_path):
    names = []
    for _ in range(2):
        with searching(tmp_path / "study", make_recipe(2, baselines={})) as study:
            names.append(study.next().name)
        disk("manifest.json", 5)
        disk("study", 1)
    assert names[0] == names[1]


@pytest.mark.slow
def test_results_and_checkpoints_that_cannot_be_read_now_are_neither_missing_nor_damaged(disk, tmp_path):
    content = {"format_version": 1, "objective": 0.5, "metrics": {}}
    (tmp_path / "result.json").write_text(json.dumps(content))
    disk("result.json", 2, errno.ETIMEDOUT)
    assert read_result(tmp_path)[0] == content
    folder = tmp_path / "attempt-1" / "step-00000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path)[0] is None
    for name, read in (("result.json", read_result), ("state.json", newest_checkpoint)):
        disk(name, FOREVER)
        with pytest.raises(StorageError, match="must be readable"):
            read(tmp_path)


ROOM_KB = range(0, 400, 50)  # a search of six stand-in trainings writes some 370 kB


@pytest.mark.whole
def test_a_search_on_a_disk_that_fills_ends_with_one_message_and_goes_on_where_there_is_space(tmp_path):
    """A disk of 12 MB, of which there is less and less room: each search meets its end at another write."""
    (disk := tmp_path / "disk").mkdir()
    prepare(tmp_path)
    with crash_host.started(tmp_path, "debug_search", before=hiding(disk, size="12m")) as run:

        def commands(*argvs):
            [(_, answers)] = run([{"name": "job", "commands": [{"argv": argv} for argv in argvs]}]).values()
            took_over = re.compile("warning: took over from .*, which is gone\n")  # it had no room to say that it ends
            return [(answer["code"], took_over.sub("", answer["log"])) for answer in answers]

        calm = str(disk / "calm")
        (code, log), (_, whole) = commands(["search", calm, "6"], ["look", calm])
        assert code == 0, log
        stopped_at = set()
        for room in ROOM_KB:
            study = str(disk / str(room))
            search, fill, clear = ["search", study, "6"], ["fill", str(disk), str(room)], ["clear", str(disk)]
            filled, (code, log), halves, _, last, (_, after) = commands(
                fill, search, ["halves", study], clear, search, ["look", study]
            )
            assert (filled, halves, last, after) == ((0, ""), (0, "[]\n"), (0, ""), whole), room
            if code == 0:
                continue
            message, step = log.splitlines()
            assert code == 5, log
            assert message.startswith(f"{disk}/{room}"), log
            assert message.endswith(": must be writable, but got No space left on device"), log
            assert step == "    Free some space or choose another folder, then run the same command again.", log
            stopped_at.add(Path(message.split(":")[0]).relative_to(disk / str(room)).parts[0])
        assert {"log", "trials"} <= stopped_at
