"""The log of a study under kills, errors, lost answers, damage and gaps, with readers beside its writer."""

import itertools
import os
import signal
import time

import pytest
from bucket_server import CUT, DONE_503, LATE, LOST, SILENT, refused, without_retries
from short_log import Clock, Struck, claimed, commit, in_bucket, kinds, log_of, read, search, state
from study_steps import contents

from carft_ray.errors import StorageError
from carft_ray.store import bucket
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder, UnknownError
from carft_ray.store.log import UNCLEAR_FOR_S


def in_fork(work):
    """Runs ``work`` in another process; returns its pid. It ends with 0, or with 1 when ``work`` raised."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"in the fork: {error!r}\n".encode())
        os._exit(1)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def server(monkeypatch):
    with without_retries(monkeypatch) as server:
        yield server


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


# kills, errors, lost answers


def killed_and_resumed(store, whole, acknowledged):
    """A store where a search ended too early: what was committed is there, and another one goes on to the same end."""
    found = read(store)
    assert acknowledged <= found.number <= max(acknowledged + 1, 3)  # the first three are told at once
    if found.number in whole[2]:
        assert state(found) == whole[2][found.number]
    log = search(claimed(store, clock := Clock()))
    assert clock.now == 1000.0
    log.release()
    assert state(read(store)) == whole[1]


@pytest.mark.parametrize("what", ["kill before", "kill after", "error"])
@pytest.mark.usefixtures("unflushed")
def test_a_kill_or_an_error_at_any_operation_loses_nothing(tmp_path, whole, what):
    for k in range(1, 400):
        told, telling = os.pipe()

        def strike(number, name, call, k=k):
            if number != k:
                return call()
            if what == "error":
                raise StorageError(f"{name} failed")
            try:
                return call() if what == "kill after" else None
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(k=k, telling=telling, strike=strike):
            log = claimed(Struck(tmp_path / str(k), strike))
            search(log, lambda number: os.write(telling, b"%d\n" % number)).release()

        code = ended(in_fork(work))
        os.close(telling)
        numbers = os.read(told, 10_000).split()
        os.close(told)
        killed_and_resumed(Folder(tmp_path / str(k)), whole, int(numbers[-1]) if numbers else 0)
        if code == 0:
            break
        assert code == (1 if what == "error" else -signal.SIGKILL)
    assert k > 15


@pytest.mark.parametrize("fault", [LOST, LATE, CUT, DONE_503, refused(503, "SlowDown"), refused(409, "Conflict")])
def test_a_fault_at_any_write_of_the_log_loses_nothing(server, whole, fault):
    """The first three writes are those by which a store is tried out, and the claim."""
    for k in range(4, 100):
        store, puts = Bucket(server.address(str(k))), []

        def strike(method, path, puts=puts, k=k):
            if method == "PUT":
                puts.append(path)
            return fault if method == "PUT" and len(puts) == k else None

        server.strike = strike
        search(claimed(store)).release()
        assert state(read(store)) == whole[1]
        if len(puts) < k:
            break
    assert k > 10


@pytest.mark.parametrize(
    ("first", "then", "message", "is_there"),
    [
        (LOST, refused(400, "ExpiredToken"), "ExpiredToken", True),  # the keys have expired meanwhile
        (LOST, CUT, r"did not say for 30 s whether it has log/00000002.*no answer", True),
        (CUT, CUT, "did not say for 30 s", False),
    ],
)
def test_an_answer_that_never_comes_is_unknown_and_the_next_opening_finds_out(server, first, then, message, is_there):
    log, faults = claimed(in_bucket(server), clock := Clock()), [first]
    server.strike = lambda method, path: faults.pop() if faults else then
    with pytest.raises(UnknownError, match=message):
        commit(log, "a")
    assert clock.now - 1000 < UNCLEAR_FOR_S + 1
    with pytest.raises(StorageError, match="since a commit failed"):
        log.follow()
    server.strike = lambda method, path: None
    claimed(in_bucket(server))
    assert kinds(in_bucket(server)) == ["owner", *(["a"] if is_there else []), "owner"]


def test_a_server_that_accepts_and_never_answers_is_asked_by_short_requests_that_are_not_repeated(server, monkeypatch):
    for name in ("LOG_TIMEOUT_S", "TIMEOUT_S"):
        monkeypatch.setattr(bucket, name, 0.5)  # enough for an answer on a busy machine
    monkeypatch.setattr(bucket, "MAX_RETRIES", 5)
    monkeypatch.setattr("carft_ray.store.log.UNCLEAR_FOR_S", 1.0)
    log = claimed(in_bucket(server), clock := Clock())
    server.requests.clear()
    server.strike = lambda method, path: SILENT
    with pytest.raises(UnknownError, match="did not say for 1 s whether it has log/00000002"):
        commit(log, "a")
    assert clock.now - 1000 < 2
    assert [method for method, _ in server.requests] == ["PUT", "GET"] * (len(server.requests) // 2)


# damage, listings, readers


def damaged(data):
    """Contents that are not those of an object: cut off, with a bit flipped, longer, none."""
    cut = [data[:size] for size in range(0, len(data), len(data) // 9)]
    places = range(0, len(data), len(data) // 29)
    flipped = [data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in places]
    return [*cut, data[:-1], *flipped, data + b"\n", data + data, b"\n" + data, None]


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
        for content in damaged(data):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            # without its last object it is an earlier state: what was noted elsewhere of its hash tells
            is_earlier = content is None and name == names[-1]
            assert (opened(tmp_path) is not None) == is_earlier, (name, content)
        path.write_bytes(data)
    assert opened(tmp_path) == whole[1]
    for one, other in itertools.pairwise(tmp_path / name for name in names):
        swap(one, other)
        assert opened(tmp_path) is None
        swap(one, other)
    for name in names[4:7]:
        store.remove(name)
    with pytest.raises(StorageError, match=r"00000005: must exist, as later ones do, but got none"):
        claimed(store)


def swap(one, other):
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def test_a_listing_with_gaps_does_not_matter_and_a_reader_writes_nothing(tmp_path, whole):
    before = contents(whole[0]), sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))

    class Forgetful(Folder):
        def list(self, prefix, after=""):
            return super().list(prefix, after)[1::2]

    search(claimed(Forgetful(tmp_path))).release()
    for folder in (whole[0], tmp_path):
        assert state(read(Forgetful(folder))) == whole[1]
    assert (contents(whole[0]), sorted(path.stat().st_mtime_ns for path in whole[0].rglob("*"))) == before
    assert not read(Folder(tmp_path / "nothing")).number
    assert not (tmp_path / "nothing").exists()


def test_readers_beside_a_writer_see_prefixes(tmp_path):
    store = Folder(tmp_path)
    news, told = os.pipe()

    def write():
        log = claimed(store)
        for number in range(60):
            commit(log, "a", "b")
            if number % 15 == 0:
                os.read(news, 1)  # until the reader has seen another prefix, on a busy machine too
        log.release()

    pid = in_fork(write)
    log, seen = log_of(store), []
    deadline = time.monotonic() + 60
    while not log.records or log.records[-1][1]["kind"] != "released":
        assert time.monotonic() < deadline
        before = log.number
        log.follow()
        seen.append((log.number, log.digest, len(log.records)))
        if log.number > before:
            os.write(told, b".")
    assert ended(pid) == 0
    os.close(news)
    os.close(told)
    records = read(store).records
    assert len({number for number, _, _ in seen}) > 3
    for number, digest, count in seen:
        assert digest == (store.get(f"log/{number:08d}") or b"")[:64].decode()
        assert count == sum(n <= number for n, _ in records)
