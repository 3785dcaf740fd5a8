"""The log of a study: commits below Optuna, who may make them, and what kills, faults and damage do to them.

On a short search in a log, with no training.
"""

import functools
import itertools
import json
import os
import signal
import threading
import time

import optuna
import pytest
from bucket_server import CUT, DONE_503, LATE, LOST, SILENT, bucket_server, refused
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from study_steps import contents

from carft_ray.errors import StorageError
from carft_ray.store import bucket
from carft_ray.store import log as module
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder, RefusedError, UnknownError
from carft_ray.store.log import BEAT_AFTER_S, LOOK_EVERY_S, SILENT_FOR_S, UNCLEAR_FOR_S, Log
from carft_ray.store.process import identity, process_started

NUM_TRIALS = 2
ELSEWHERE = {**identity(), "host": "elsewhere"}
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Clock:
    """Time that passes only while somebody sleeps; ``meanwhile`` happens then."""

    def __init__(self, meanwhile=lambda: None):
        self.now, self.meanwhile = 1000.0, meanwhile

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


class Struck(Folder):
    """A folder that something happens to: ``strike(number, name, call)`` in place of its n-th operation, from 1."""

    def __init__(self, path, strike):
        super().__init__(path)
        for name in ("get", "put_new", "put", "list", "remove"):
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))
        self._strike, self._count = strike, itertools.count(1)

    def _call(self, name, method, *arguments, **named):
        return self._strike(next(self._count), name, lambda: method(*arguments, **named))


def log_of(store, clock=None):
    clock = clock or Clock()
    return Log(store, clock, clock.sleep)


def claimed(store, clock=None, **me):
    log = log_of(store, clock)
    log.claim(**me)
    return log


def search(log, committed=lambda number: None):
    """A short search, from wherever the log has it; ``committed`` is told after each commit."""
    storage = JournalStorage(log)

    def of(name):
        return optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))

    with log.commit():
        known = optuna.get_all_study_names(storage)
        for name in {"search", "baselines"} - set(known):
            optuna.create_study(study_name=name, storage=storage, direction="maximize")
    with log.commit():
        if not of("baselines").trials:
            of("baselines").add_trial(optuna.trial.create_trial(value=0.5, user_attrs={"name": "zero_shot"}))
            of("search").enqueue_trial({"x": 0.125})
    committed(log.number)
    while len(done := of("search").get_trials(states=[TrialState.COMPLETE])) < NUM_TRIALS:
        study = of("search")
        running = study.get_trials(states=[TrialState.RUNNING])
        if not running:
            with log.commit({"kind": "started", "number": len(done)}):
                study.sampler = optuna.samplers.RandomSampler(seed=len(done))
                trial = study.ask()
                trial.suggest_float("x", 0, 1)
                trial.suggest_categorical("form", ["a", "b"])
                trial.set_user_attr("name", f"t{len(done):04d}")
        elif not running[0].intermediate_values:
            with log.commit():
                optuna.trial.Trial(study, running[0]._trial_id).report(running[0].params["x"] / 2, 50)
        else:
            with log.commit({"kind": "ended", "number": len(done)}):
                trial = optuna.trial.Trial(study, running[0]._trial_id)
                trial.set_user_attr("metrics", {"id_accuracy": running[0].params["x"]})
                study.tell(running[0].number, running[0].params["x"])
        committed(log.number)
    return log


def state(log):
    """All that a study knows, as text; without times, as in a search that was killed they are others."""
    storage, found = JournalStorage(log), {}
    for study in storage.get_all_studies():
        rows = storage.get_all_trials(study._study_id)
        found[study.study_name] = [
            (t.number, t.state.name, t.values, t.params, t.user_attrs, t.system_attrs, t.intermediate_values)
            for t in rows
        ]
    own = [record for _, record in log.records if record["kind"] not in ("owner", "released")]
    return json.dumps([found, own], sort_keys=True)


def read(store):
    log = log_of(store)
    log.follow()
    return log


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
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    with bucket_server(monkeypatch) as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    """An empty store of each kind."""
    return Folder(tmp_path) if request.param == "folder" else in_bucket(request.getfixturevalue("server"))


def in_bucket(server):
    return Bucket(server.address("study"))


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


def commit(log, *kinds):
    """Makes a commit of records of these kinds."""
    log.write(*({"kind": kind} for kind in kinds))


def kinds(store):
    return [record["kind"] for _, record in read(store).records]


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
