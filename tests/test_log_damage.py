"""The log of a study after kills, full disks, lost answers and damage; and what readers see beside a writer."""

import contextlib
import itertools
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from optuna.storages import JournalStorage
from short_log import Clock, Struck, claimed, contents, ended, in_fork, log_of, read, search, state

from carft_ray.errors import StorageError
from carft_ray.store import log as module
from carft_ray.store.folder import Folder, RefusedError, UnknownError
from carft_ray.store.log import UNCLEAR_FOR_S


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that nothing has happened to: its folder, its state, and the state after each commit."""
    folder = tmp_path_factory.mktemp("whole")
    states = {}
    log = search(claimed(Folder(folder)), lambda number: states.setdefault(number, state(read(Folder(folder)))))
    log.release()
    return folder, state(read(Folder(folder))), states


@pytest.fixture
def unflushed(monkeypatch):
    """Without the wait for a disk: what a killed process has written is there, flushed or not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# kills, full disks, lost answers


def killed_and_resumed(folder, whole, acknowledged):
    """A store where a search ended too early: what was committed is there, and another one goes on to the same end."""
    found = read(Folder(folder))
    assert acknowledged <= found.number <= max(acknowledged + 1, 3)  # the first three are told at once
    if found.number in whole[2]:
        assert state(found) == whole[2][found.number]
    log = search(claimed(Folder(folder), clock := Clock()))
    assert clock.now == 1000.0
    log.release()
    assert state(read(Folder(folder))) == whole[1]


def killed_at(folder, whole, struck):
    """Runs a search in another process, where ``struck`` makes its store; returns whether it was killed."""
    told, telling = os.pipe()

    def work():
        log = claimed(struck(Folder(folder)))
        search(log, lambda number: os.write(telling, b"%d\n" % number)).release()

    code = ended(in_fork(work))
    os.close(telling)
    numbers = os.read(told, 10_000).split()
    os.close(told)
    assert code in (0, -signal.SIGKILL)
    killed_and_resumed(folder, whole, int(numbers[-1]) if numbers else 0)
    return code != 0


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.usefixtures("unflushed")
def test_a_kill_at_any_operation_of_the_store_loses_nothing(tmp_path, whole, moment):
    for k in range(1, 200):

        def strike(number, name, call, k=k):
            try:
                return None if number == k and moment == "before" else call()
            finally:
                if number == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        if not killed_at(tmp_path / str(k), whole, lambda folder, strike=strike: Struck(folder, strike)):
            break
    assert k > 15


@pytest.mark.slow
@pytest.mark.usefixtures("unflushed")
def test_a_kill_at_any_system_call_loses_nothing(tmp_path, whole):
    calls = ("link", "replace", "fsync", "unlink", "mkdir", "open")

    def counted(k):
        count = 0

        def wrapped(call):
            def made(*arguments, **named):
                nonlocal count
                count += 1
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return made

        for name in calls:
            setattr(os, name, wrapped(getattr(os, name)))

    for k in range(1, 400):
        if not killed_at(tmp_path / str(k), whole, lambda folder, k=k: counted(k) or folder):
            break
    assert k > 60


@pytest.mark.usefixtures("unflushed")
def test_an_error_at_any_operation_of_the_store_loses_nothing(tmp_path, whole):
    def strike(number, name, call):
        if number == k:
            raise StorageError(f"{name} failed")
        return call()

    for k in range(1, 200):
        folder = tmp_path / str(k)
        store, acknowledged = Struck(Folder(folder), strike), [0]
        try:
            log = claimed(store)
            search(log, acknowledged.append).release()
        except StorageError:
            with pytest.raises(StorageError):
                log_of(store).release()
        killed_and_resumed(folder, whole, acknowledged[-1])
        if store.count < k:
            break
    assert k > 15


def test_a_full_disk_ends_a_search_that_goes_on_where_there_is_room(tmp_path, whole):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = claimed(Folder(tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))  # of an ask: it is larger
        with pytest.raises(StorageError, match="File too large"):
            search(log)
        os._exit(5)

    assert ended(in_fork(work)) == 5
    before = read(Folder(tmp_path)).number
    assert before > 1
    killed_and_resumed(tmp_path, whole, before)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("answer", [UnknownError, RefusedError])
@pytest.mark.parametrize("done", [True, False])
@pytest.mark.usefixtures("unflushed")
def test_a_lost_answer_is_settled_by_reading_back(tmp_path, whole, answer, done):
    for k in range(1, 13):
        creations = 0

        def strike(number, name, call, k=k):
            nonlocal creations
            creations += name == "put_new"
            if name == "put_new" and creations == k:
                if done:
                    call()
                raise answer("the connection was cut")
            return call()

        store = Folder(tmp_path / str(k))
        clock = Clock()
        log = log_of(Struck(store, strike), clock)
        if k <= 2:  # the probe asks for two creations, and takes no excuse
            with contextlib.suppress(StorageError):
                log.claim()
            continue
        log.claim()
        search(log).release()
        assert state(read(store)) == whole[1]
    assert clock.now < 1000 + UNCLEAR_FOR_S


def test_an_answer_that_never_comes_is_unknown_and_the_next_opening_finds_out(tmp_path):
    for done in (True, False):
        store, clock, lost = Folder(tmp_path / str(done)), Clock(), []

        def strike(number, name, call, done=done, lost=lost):
            if lost and name == "put_new":
                if done and len(lost) == 1:
                    call()
                lost.append(name)
                raise UnknownError("timed out")
            if lost and name == "get":
                raise StorageError("timed out")
            return call()

        log = claimed(Struck(store, strike), clock)
        lost.append("from here on")
        with pytest.raises(UnknownError, match="did not say for 30 s"), log.commit({"kind": "a"}):
            pass
        assert UNCLEAR_FOR_S <= clock.now - 1000 < UNCLEAR_FOR_S + 1
        with pytest.raises(StorageError, match="since a commit failed"):
            log.follow()
        kinds = [record["kind"] for _, record in claimed(store).records]
        assert kinds == ["owner", *(["a"] if done else []), "owner"]


@pytest.mark.usefixtures("unflushed")
def test_a_write_that_comes_late_is_ours_or_the_next_owner_reads_it(tmp_path, whole):
    """It was asked for, nothing was there, and then it is: before it is asked for again, or after the process ended."""
    for k in range(3, 13):
        creations, late, clock = 0, [], Clock()

        def strike(number, name, call, k=k, late=late):
            nonlocal creations
            creations += name == "put_new"
            if name == "put_new" and creations == k:
                late.append(call)
                raise UnknownError("timed out")
            return call()

        clock.meanwhile = lambda late=late: late and late.pop()()
        store = Folder(tmp_path / str(k))
        log = log_of(Struck(store, strike), clock)
        log.claim()
        search(log).release()
        assert (late, state(read(store))) == ([], whole[1])
        assert 1000 < clock.now < 1000 + UNCLEAR_FOR_S


def test_a_write_that_lands_while_the_next_search_claims_is_read_and_not_lost(tmp_path):
    store, late = Folder(tmp_path), []

    def unclear(number, name, call):
        if late and name == "put_new":
            late.append(call)
            raise UnknownError("timed out")
        return call()

    log = claimed(Struck(store, unclear))
    late.append(None)
    with pytest.raises(UnknownError), log.commit({"kind": "late"}):
        pass

    def landing(number, name, call):
        if name == "put_new" and late:
            late[-1]()
            late.clear()
        return call()

    assert claimed(Struck(store, landing)).number == 3
    assert [record["kind"] for _, record in read(store).records] == ["owner", "late", "owner"]


# damage, listings, readers


DAMAGES = {
    "cut off": lambda data: [data[:size] for size in range(0, len(data), len(data) // 9)] + [data[:-1]],
    "a bit": lambda data: [
        data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in range(0, len(data), len(data) // 29)
    ],
    "longer": lambda data: [data + b"\n", data + data, b"\n" + data],
    "of nothing": lambda data: [None],
}


def opened(folder):
    """The state that a folder opens to; None when it says that it is damaged."""
    try:
        return state(read(Folder(folder)))
    except StorageError as error:
        message = str(error)
    assert message.startswith(str(folder / "log"))
    assert message.endswith("Restore log/ from a copy of the study.")
    return None


@pytest.mark.usefixtures("unflushed")
def test_damage_of_an_object_is_a_message(tmp_path, whole):
    store = Folder(tmp_path)
    search(claimed(store)).release()
    names = store.list("log")
    assert names == [f"log/{number:08d}" for number in range(1, 11)]
    for name in names:
        path = tmp_path / name
        data = path.read_bytes()
        for kind, damage in DAMAGES.items():
            for damaged in damage(data):
                path.unlink()
                if damaged is not None:
                    path.write_bytes(damaged)
                if damaged is None and name == names[-1]:
                    # an earlier state: what was noted elsewhere of its hash tells
                    assert opened(tmp_path) is not None
                else:
                    assert opened(tmp_path) is None, (name, kind)
        path.write_bytes(data)
    assert opened(tmp_path) == whole[1]
    for one, other in itertools.pairwise(names):
        swap(tmp_path / one, tmp_path / other)
        assert opened(tmp_path) is None
        swap(tmp_path / one, tmp_path / other)


def swap(one, other):
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def test_several_objects_that_are_gone_from_the_middle_show(tmp_path, whole):
    search(claimed(Folder(tmp_path)))
    for number in (5, 6, 7):
        Folder(tmp_path).remove(f"log/{number:08d}")
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=r"00000005: must be there, as later ones are, but got none"):
        claimed(Folder(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"number": 1},
        {"number": 1, "previous": "", "owner": [], "records": [], "operations": []},
        {"records": 5},
    ],
)
def test_a_commit_that_nobody_of_ours_has_written_is_a_message(tmp_path, content):
    Folder(tmp_path).put_new("log/00000001", module._sealed(json.dumps(content).encode()))
    assert opened(tmp_path) is None


def test_a_listing_with_gaps_does_not_matter(tmp_path, whole):
    for folder in (whole[0], tmp_path):

        class Forgetful(Folder):
            def list(self, prefix, after=""):
                return super().list(prefix, after)[1::2]

        if folder == tmp_path:
            search(claimed(Forgetful(folder))).release()
        assert state(read(Forgetful(folder))) == whole[1]


def test_readers_beside_a_writer_see_prefixes(tmp_path, whole):
    store = Folder(tmp_path)

    def write():
        log = claimed(store)
        for number in range(60):
            with log.commit({"kind": "a", "number": number}, {"kind": "b", "number": number}):
                pass
        log.release()

    pid = in_fork(write)
    log, seen = log_of(store), []
    storage = JournalStorage(log)
    deadline = time.monotonic() + 60
    while not log.records or log.records[-1][1]["kind"] != "released":
        assert time.monotonic() < deadline
        log.follow()
        storage.get_all_studies()
        seen.append((log.number, log.digest, len(log.records)))
    assert ended(pid) == 0
    told = json.dumps(log.records)
    again = read(store)
    assert json.dumps(again.records) == told
    hashes = {0: "", **{n: store.get(f"log/{n:08d}")[:64].decode() for n in range(1, again.number + 1)}}
    assert len({number for number, _, _ in seen}) > 3
    for number, digest, count in seen:
        assert digest == hashes[number]
        assert count == sum(n <= number for n, _ in again.records)
    assert all(Path(name).name.isdigit() for name in store.list("log"))


def test_a_reader_writes_nothing(tmp_path, whole):
    before = contents(whole[0]), sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))
    log = read(Folder(whole[0]))
    assert not log.follow()
    state(log)
    assert (contents(whole[0]), sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))) == before
    assert not read(Folder(tmp_path / "nothing")).number
    assert not list(tmp_path.iterdir())
