"""The log of a study: commits below Optuna, and who may make them."""

import json
import os
import signal
import threading
import time

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from short_log import ELSEWHERE, Clock, Struck, claimed, contents, ended, in_fork, log_of, read, search

from carft_ray.errors import StorageError
from carft_ray.store.folder import Folder, RefusedError
from carft_ray.store.log import BEAT_AFTER_S, LOOK_EVERY_S, SILENT_FOR_S, Log
from carft_ray.store.owner import identity, process_started

# Optuna over the log


def test_a_study_through_the_log_is_the_same_when_it_is_opened_again(tmp_path):
    log = claimed(Folder(tmp_path))
    storage = JournalStorage(log)
    with log.commit():
        one = optuna.create_study(study_name="one", storage=storage, directions=["maximize"])
        two = optuna.create_study(study_name="two", storage=storage, directions=["maximize", "minimize"])
    with log.commit():
        one.set_user_attr("ledger", ["a", "ä", "\N{SNOWMAN}"])
        one.enqueue_trial({"x": 0.5})
    for _ in range(4):
        with log.commit():
            trial = one.ask()
            trial.suggest_float("x", 1e-5, 1, log=True)
            trial.suggest_int("n", 1, 8)
            trial.set_user_attr("pair", (1, 2))
        number = trial.number
        with log.commit():
            for step in (1, 2):
                trial.report(float("inf") if number == 2 else step / 3, step)
        with log.commit():
            one.tell(number, None if number == 1 else 0.1 * number, TrialState.PRUNED if number == 1 else None)
    with log.commit():
        two.add_trial(optuna.trial.create_trial(values=[1, 2], constraints={"trained": -1.0}))
        two.ask()
    before = log.number
    with log.commit():
        pass  # nothing to write
    assert log.number == before
    assert one.trials[0].params["x"] == 0.5
    assert one.trials[0].user_attrs["pair"] == [1, 2], "what is in memory is what will be read"
    again = JournalStorage(read(Folder(tmp_path)))
    for study in (one, two):
        there = optuna.load_study(study_name=study.study_name, storage=again)
        assert (there.trials, there.user_attrs) == (study.trials, study.user_attrs)


def test_applied_operations_are_not_kept(tmp_path):
    log = search(claimed(Folder(tmp_path)))
    JournalStorage.get_all_studies(storage := JournalStorage(read(Folder(tmp_path))))
    assert storage._backend._operations == []
    assert len(log._operations) <= 1


def test_a_commit_is_one_object_also_of_blocks_in_a_block(tmp_path):
    store = Folder(tmp_path)
    log = claimed(store)
    with log.commit({"kind": "a"}), log.commit({"kind": "b"}, {"kind": "c"}):
        assert log.number == 1
    assert [record["kind"] for _, record in read(store).records] == ["owner", "a", "b", "c"]
    assert store.list("log") == ["log/00000001", "log/00000002"]
    log.append_logs([])
    assert log.number == 2


@pytest.mark.parametrize("value", [{1, 2}, float, "\ud800", {"a": b"x"}])
def test_what_json_cannot_hold_is_refused_before_memory_has_it(tmp_path, value):
    log = claimed(Folder(tmp_path))
    study = optuna.create_study(storage=JournalStorage(log))
    before = contents(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        study.set_user_attr("x", value)
    assert study.user_attrs == {}
    study.set_user_attr("x", 1)  # outside of a block it spoils nothing
    with pytest.raises((TypeError, ValueError)), log.commit():
        study.set_user_attr("x", value)
    with pytest.raises(StorageError, match="since a commit failed"):
        _ = study.user_attrs
    assert len(contents(tmp_path)) == len(before) + 1


def test_a_block_that_raises_writes_nothing_and_spoils_the_log(tmp_path):
    log = claimed(Folder(tmp_path))
    study = optuna.create_study(storage=JournalStorage(log))
    study.set_user_attr("value", 0.6)
    before = contents(tmp_path)

    def interrupted():
        with log.commit():
            study.set_user_attr("value", 0.7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for use in (lambda: study.user_attrs, lambda: study.set_user_attr("value", 1), log.release, log.follow):
        with pytest.raises(StorageError, match=r"cannot be used any more .*\n.*Run the same command again"):
            use()
    assert contents(tmp_path) == before
    again = claimed(Folder(tmp_path))  # at once, in the same process too
    assert optuna.load_study(study_name=study.study_name, storage=JournalStorage(again)).user_attrs == {"value": 0.6}


def test_nothing_is_written_by_who_does_not_hold_the_log(tmp_path):
    claimed(Folder(tmp_path)).release()
    log = read(Folder(tmp_path))
    before = contents(tmp_path)
    for use in (lambda: optuna.create_study(storage=JournalStorage(log)), log.release):
        with pytest.raises(StorageError, match="is open for reading only"):
            use()
    assert contents(tmp_path) == before
    log = claimed(Folder(tmp_path))
    optuna.create_study(storage=JournalStorage(log))
    with pytest.raises(StorageError, match="one storage of Optuna"):
        JournalStorage(log)


# who holds it


def test_of_two_starters_one_holds_the_log_and_the_other_writes_nothing(tmp_path):
    go, going = os.pipe()

    def start():
        os.read(go, 1)
        log = Log(Folder(tmp_path), sleep=lambda seconds: time.sleep(0.01))
        try:
            log.claim()
        except StorageError as error:
            (tmp_path / f"{os.getpid()}").write_text(str(error))
            os._exit(3)
        while len(list(tmp_path.glob("[0-9]*"))) < 3:
            time.sleep(0.02)
            with log.commit({"kind": "at work"}):
                pass

    pids = [in_fork(start) for _ in range(4)]
    os.write(going, b"1234")
    assert sorted(ended(pid) for pid in pids) == [0, 3, 3, 3]
    for path in tmp_path.glob("[0-9]*"):
        assert "is in use: two searches on one study would spoil it" in path.read_text()
    assert len({json.loads(each.split(b"\n")[1])["owner"] for each in contents(tmp_path / "log").values()}) == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"log"}


def test_a_log_is_free_when_released_or_when_its_process_is_gone(tmp_path):
    clock = Clock()
    claimed(Folder(tmp_path)).release()
    claimed(Folder(tmp_path), clock)
    claimed(Folder(tmp_path / "other"), me=ELSEWHERE).release()
    claimed(Folder(tmp_path / "other"), clock)
    assert ended(in_fork(lambda: claimed(Folder(tmp_path / "gone")))) == 0
    claimed(Folder(tmp_path / "gone"), clock)
    assert clock.now == 1000.0


@pytest.mark.parametrize("who", ["this one", "another one"])
def test_a_living_process_of_this_machine_turns_others_away_at_once(tmp_path, who):
    parent = {**identity(), "pid": os.getppid(), "process_started": process_started(os.getppid())}
    claimed(Folder(tmp_path), me=None if who == "this one" else parent)
    before, clock = contents(tmp_path), Clock()
    with pytest.raises(StorageError, match="is in use: two searches on one study would spoil it: process"):
        log_of(Folder(tmp_path), clock).claim()
    assert (clock.now, contents(tmp_path)) == (1000.0, before)


def test_a_process_of_another_machine_is_waited_for_ninety_seconds_of_silence(tmp_path):
    owner = claimed(Folder(tmp_path), me=ELSEWHERE)
    said, clock = [], Clock()
    taker = log_of(Folder(tmp_path), clock)
    assert taker.claim(said.append) == 2
    assert clock.now - 1000 == SILENT_FOR_S
    waited, took = said
    assert waited.startswith("waiting 90 s for a write of process")
    assert took.startswith(f"took over from process {os.getpid()} on elsewhere, since ")
    before = contents(tmp_path)
    with pytest.raises(RefusedError, match="taken the study over"), owner.commit({"kind": "late"}):
        pass
    assert contents(tmp_path) == before


def test_a_sign_of_life_turns_others_away(tmp_path):
    time_of_both = Clock()
    owner = claimed(Folder(tmp_path), time_of_both, me=ELSEWHERE)
    time_of_both.meanwhile = owner.beat
    said = []
    with pytest.raises(StorageError, match="is in use"):
        log_of(Folder(tmp_path), time_of_both).claim(said.append)
    assert time_of_both.now - 1000 == BEAT_AFTER_S + LOOK_EVERY_S - 1
    assert (owner.number, len(said)) == (2, 1)
    owner.beat()
    assert owner.number == 2, "there was a commit just now"


def test_who_is_refused_while_claiming_waits_anew(tmp_path):
    claimed(Folder(tmp_path), me=ELSEWHERE)
    quicker = []

    def strike(number, name, call):
        if name == "put_new" and not quicker:
            quicker.append(claimed(Folder(tmp_path), me={**ELSEWHERE, "pid": 7}))
        return call()

    clock = Clock()
    assert claimed(Struck(Folder(tmp_path), strike), clock).number == 3
    assert clock.now - 1000 == 2 * SILENT_FOR_S


def test_who_sees_another_take_over_at_the_last_look_leaves_it_the_log(tmp_path):
    claimed(Folder(tmp_path), me=ELSEWHERE)
    quicker, clock = [], Clock()

    def take():
        if clock.now - 1000 == SILENT_FOR_S:
            quicker.append(log_of(Folder(tmp_path)))
            quicker[0].claim(me={**ELSEWHERE, "pid": 7})

    clock.meanwhile = take
    with pytest.raises(StorageError, match=r"is in use: .* process 7 on elsewhere"):
        log_of(Folder(tmp_path), clock).claim()
    with quicker[0].commit({"kind": "goes on"}):
        pass


def test_who_checks_the_store_while_another_begins_and_clears_it_says_who(tmp_path):
    removed = []

    def strike(number, name, call):
        probes = [] if removed else list((tmp_path / "log").glob("probe-*"))
        if probes:  # between the two writes of the check
            claimed(Folder(tmp_path))
            removed.extend(each.unlink() for each in probes)
        return call()

    with pytest.raises(StorageError, match=rf"is in use: .* process {os.getpid()} on "):
        log_of(Struck(Folder(tmp_path), strike)).claim()
    assert len(removed) == 1
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["00000001"]


def test_an_owner_that_slept_is_refused_and_changes_nothing(tmp_path):
    told, telling = os.pipe()

    def work():
        log = search(claimed(Folder(tmp_path), me=ELSEWHERE))
        os.write(telling, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            with log.commit({"kind": "late"}):
                pass
        except RefusedError:
            os._exit(7)

    pid = in_fork(work)
    assert os.read(told, 1) == b"x"
    os.waitpid(pid, os.WUNTRACED)
    claimed(Folder(tmp_path)).release()  # by a clock that passes at once: one takes over and ends
    log = claimed(Folder(tmp_path))  # the next one works
    with log.commit({"kind": "new"}):
        pass
    before = contents(tmp_path)
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 7
    assert contents(tmp_path) == before
    with log.commit({"kind": "goes on"}):
        pass


def test_a_sign_of_life_from_another_thread_leaves_an_open_commit_alone(tmp_path):
    clock = Clock()
    log = claimed(Folder(tmp_path), clock)
    study = optuna.create_study(storage=JournalStorage(log))
    with log.commit({"kind": "a"}):
        study.set_user_attr("x", 1)
        clock.now += BEAT_AFTER_S
        thread = threading.Thread(target=log.beat)
        thread.start()
        thread.join()
        assert log.number == 3
        study.set_user_attr("y", 2)
    again = read(Folder(tmp_path))
    assert [number for number, record in again.records if record["kind"] == "a"] == [4]
    assert optuna.load_study(study_name=study.study_name, storage=JournalStorage(again)).user_attrs == {"x": 1, "y": 2}
