"""The log of a study: commits below Optuna, who may make them, and the packs from which they are read."""

import os
import threading

import optuna
import pytest
from bucket_server import refused, without_retries
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from short_log import Clock, Struck, claimed, commit, in_bucket, kinds, log_of, read, search
from study_steps import contents

from carft_ray.errors import StorageError
from carft_ray.store import log as module
from carft_ray.store.folder import Folder, RefusedError
from carft_ray.store.heartbeat import BEAT_AFTER_S, LOOK_EVERY_S, SILENT_FOR_S, identity, process_started

ELSEWHERE = {**identity(), "host": "elsewhere"}


@pytest.fixture
def server(monkeypatch):
    with without_retries(monkeypatch) as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    """An empty store of each kind."""
    return Folder(tmp_path) if request.param == "folder" else in_bucket(request.getfixturevalue("server"))


# Optuna over the log


def test_a_study_through_the_log_is_the_same_when_it_is_opened_again(store):
    log = claimed(store)
    storage = JournalStorage(log)
    with log.commit():
        one = optuna.create_study(study_name="one", storage=storage, directions=["maximize"])
        two = optuna.create_study(study_name="two", storage=storage, directions=["maximize", "minimize"])
        one.set_user_attr("ledger", ["a", "ä", "\N{SNOWMAN}"])
        one.enqueue_trial({"x": 0.5})
    for number in range(4):
        with log.commit():
            trial = one.ask()
            trial.suggest_float("x", 1e-5, 1, log=True)
            trial.set_user_attr("pair", (1, 2))
        with log.commit():
            trial.report(float("inf") if number == 2 else number / 3, 1)
        with log.commit():
            one.tell(number, None if number == 1 else 0.1 * number, TrialState.PRUNED if number == 1 else None)
    with log.commit():
        two.add_trial(optuna.trial.create_trial(values=[1, 2], constraints={"trained": -1.0}))
    before = log.number
    commit(log)  # nothing to write
    assert log.number == before
    assert one.trials[0].params["x"] == 0.5
    assert one.trials[0].user_attrs["pair"] == [1, 2], "what is in memory is what will be read"
    again = JournalStorage(read(store))
    for study in (one, two):
        there = optuna.load_study(study_name=study.study_name, storage=again)
        assert (there.trials, there.user_attrs) == (study.trials, study.user_attrs)


def test_a_commit_is_one_object_also_of_blocks_in_a_block(store):
    log = claimed(store)
    with log.commit({"kind": "a"}), log.commit({"kind": "b"}, {"kind": "c"}):
        assert log.number == 1
    assert kinds(store) == ["owner", "a", "b", "c"]
    assert store.list("log")[:2] == ["log/00000001", "log/00000002"]


def test_a_block_that_raises_writes_nothing_and_spoils_the_log(tmp_path):
    log = claimed(Folder(tmp_path))
    study = optuna.create_study(storage=JournalStorage(log))
    study.set_user_attr("value", 0.6)
    for value in ({1, 2}, "\ud800"):  # what JSON cannot hold is refused before memory has it, and spoils nothing
        with pytest.raises((TypeError, ValueError)):
            study.set_user_attr("value", value)
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
    log, before = read(Folder(tmp_path)), contents(tmp_path)
    for use in (lambda: optuna.create_study(storage=JournalStorage(log)), log.release):
        with pytest.raises(StorageError, match="is open for reading only"):
            use()
    assert contents(tmp_path) == before
    log = claimed(Folder(tmp_path))
    optuna.create_study(storage=JournalStorage(log))
    with pytest.raises(StorageError, match="one storage of Optuna"):
        JournalStorage(log)


# who holds it


def test_a_living_process_of_this_machine_turns_others_away_at_once(tmp_path):
    parent = {**identity(), "pid": os.getppid(), "process_started": process_started(os.getppid())}
    claimed(Folder(tmp_path), me=parent)
    before, clock = contents(tmp_path), Clock()
    with pytest.raises(StorageError, match="is in use: two searches on one study would damage it: process"):
        log_of(Folder(tmp_path), clock).claim()
    assert (clock.now, contents(tmp_path)) == (1000.0, before)


def test_a_process_of_another_machine_is_waited_for_ninety_seconds_of_silence(store):
    owner = claimed(store, me=ELSEWHERE)
    said, clock = [], Clock()
    taker = log_of(store, clock)
    taker.claim(said.append)
    assert taker.claimed == 2
    assert clock.now - 1000 == SILENT_FOR_S
    waited, took = said
    assert waited.startswith("waiting 90 s for a write of process")
    assert took.startswith(f"took over from process {os.getpid()} on elsewhere, since ")
    told = rf"{store}/log/00000002: was written by another search, .*taken the study"
    for use in (owner.check, lambda: commit(owner, "late")):
        with pytest.raises(RefusedError, match=told):
            use()
    commit(taker, "mine")
    assert kinds(store) == ["owner", "owner", "mine"]


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


def test_a_sign_of_life_from_another_thread_leaves_an_open_commit_alone(tmp_path):
    log = claimed(Folder(tmp_path), clock := Clock())
    with log.commit({"kind": "a"}):
        clock.now += BEAT_AFTER_S
        thread = threading.Thread(target=log.beat)
        thread.start()
        thread.join()
        assert log.number == 2
    assert [number for number, record in read(Folder(tmp_path)).records if record["kind"] == "a"] == [3]


def test_who_is_refused_while_claiming_waits_anew(tmp_path):
    claimed(Folder(tmp_path), me=ELSEWHERE)
    quicker = []

    def strike(number, name, call):
        if name == "put_new" and not quicker:
            quicker.append(claimed(Folder(tmp_path), me={**ELSEWHERE, "pid": 7}))
        return call()

    clock = Clock()
    assert claimed(Struck(tmp_path, strike), clock).number == 3
    assert clock.now - 1000 == 2 * SILENT_FOR_S


def test_who_checks_the_store_while_another_begins_and_clears_it_says_who(tmp_path):
    removed = []

    def strike(number, name, call):
        probes = [] if removed else list((tmp_path / "log").glob("probe-*"))
        if probes:  # between the two writes of the check
            claimed(Folder(tmp_path))
            removed.extend(each.unlink() for each in probes)
        return call()

    with pytest.raises(StorageError, match=rf"is in use: .* process {os.getpid()} on "):
        log_of(Struck(tmp_path, strike)).claim()
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["00000001"]


# packs


@pytest.fixture
def packed(server, monkeypatch):
    """A log of 33 commits in a bucket, with packs of ten."""
    monkeypatch.setattr(module, "PACKED", 10)
    monkeypatch.setattr(module, "PACK_EVERY", 4)
    for owner in range(3):
        log = claimed(in_bucket(server))
        for number in range(9):
            commit(log, f"{owner}-{number}")
        log.release()
    server.requests.clear()
    return in_bucket(server)


WHOLE = [kind for owner in range(3) for kind in ("owner", *(f"{owner}-{number}" for number in range(9)), "released")]


def test_a_log_is_read_from_its_packs_which_the_next_owner_continues(packed, server):
    assert packed.list("log", after="log/1") == [f"log/pack-000000{first}1" for first in range(4)]
    server.requests.clear()
    assert kinds(packed) == WHOLE
    assert [method for method, _ in server.requests].count("GET") <= 4 * 3 + 2, "of a pack three, and the end"
    pack = packed.get("log/pack-00000011")
    assert pack == b"".join(packed.get(f"log/{number:08d}") for number in range(11, 21))
    log = claimed(packed)
    for _ in range(8):
        commit(log, "b")
    log.release()
    assert packed.get("log/pack-00000031").count(b"\n") == 2 * 10
    assert packed.get("log/pack-00000041").count(b"\n") == 2 * (read(packed).number - 40)


def test_a_pack_that_is_not_of_the_log_is_passed_over(packed):
    pack, following = packed.get("log/pack-00000011"), packed.get("log/00000021")
    changed, longer = pack.replace(b'"1-2"', b'"1-3"'), pack + following.replace(b'"2', b'"3')
    for harm in (None, b"", pack[:-7], changed, longer):
        packed.remove("log/pack-00000011")
        if harm is not None:
            packed.put("log/pack-00000011", harm)
        assert kinds(packed) == WHOLE, harm


def test_a_log_that_cannot_be_read_is_asked_for_once(packed, server):
    server.strike = lambda method, path: refused(403, "AccessDenied")
    with pytest.raises(StorageError):
        read(packed)
    assert [path.rpartition("/")[2] for _, path in server.requests] == ["00000001"]


def test_a_pack_that_cannot_be_written_harms_nothing(server, monkeypatch):
    monkeypatch.setattr(module, "PACK_EVERY", 1)
    server.strike = lambda method, path: refused(403, "AccessDenied") if "pack" in path else None
    search(claimed(in_bucket(server))).release()
    assert read(in_bucket(server)).number > 5
    assert not [name for name in server.objects() if "pack" in name]


def test_a_record_whose_kind_is_no_text_is_no_claim(tmp_path):
    log = claimed(Folder(tmp_path))
    assert log.holds_only_claims
    log.records.append((2, {"kind": ["owner"]}))
    assert not log.holds_only_claims
