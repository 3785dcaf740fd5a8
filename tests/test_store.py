"""The store of a study and the log over it: what is there after kills, lost answers, other searches, damage."""

import contextlib
import itertools
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from carft_ray.errors import StorageError
from carft_ray.files import temporary_name
from carft_ray.store import log as module
from carft_ray.store.folder import Folder, RefusedError, UnknownError, probe
from carft_ray.store.log import BEAT_AFTER_S, LOOK_EVERY_S, SILENT_FOR_S, UNCLEAR_FOR_S, Log
from carft_ray.store.owner import identity, process_started

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


class Struck:
    """A store that something happens to: ``strike(number, name, call)`` in place of its n-th operation, from 1."""

    def __init__(self, store, strike):
        self._store, self._strike, self.count = store, strike, 0

    def __str__(self):
        return str(self._store)

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*arguments, **named):
            self.count += 1
            return self._strike(self.count, name, lambda: method(*arguments, **named))

        return call


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


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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


# objects


def test_an_object_is_read_back_listed_and_removed(tmp_path):
    store = Folder(tmp_path / "new" / "study")
    assert (store.get("a/b"), store.list(""), store.list("a")) == (None, [], [])
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    store.put_new("a/c/d", b"3")
    store.put("ab", b"4")
    assert (store.get("a/b"), store.get("a/c/d")) == (b"2", b"3")
    assert store.list("") == ["a/b", "a/c/d", "ab"]
    assert store.list("a") == ["a/b", "a/c/d"]
    assert store.list("a", after="a/b") == ["a/c/d"]
    store.remove("a/c")
    store.remove("a/c")
    assert store.list("") == ["a/b", "ab"]
    with pytest.raises(StorageError, match="must be a regular file, but got a folder"):
        store.get("a")


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../../b", "a//b", "a/", ".", "a\0b", "a\\b", "a\nb", "\ud800", ".a.12-0f.tmp"]
)
def test_a_name_that_leads_out_or_is_temporary_is_refused(tmp_path, name):
    store = Folder(tmp_path / "study")
    for call in (store.get, store.remove, lambda name: store.put(name, b""), lambda name: store.put_new(name, b"")):
        with pytest.raises(StorageError, match="must be a name of an object"):
            call(name)
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "log").symlink_to(tmp_path / "outside")
    (tmp_path / "alias").symlink_to(tmp_path / "study")
    store = Folder(tmp_path / "alias")  # the folder itself may be a link
    for call in (lambda: store.put("log/1", b""), lambda: store.get("log/1"), lambda: store.remove("log")):
        with pytest.raises(StorageError, match="must not lead out of"):
            call()
    store.put("other", b"x")
    assert not list((tmp_path / "outside").iterdir())


def test_of_sixteen_threads_one_creates_an_object(tmp_path):
    store, won, start = Folder(tmp_path), [], threading.Barrier(16)

    def create(number):
        start.wait()
        try:
            store.put_new("log/00000001", b"%d" % number * 1000)
            won.append(number)
        except RefusedError:
            pass

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("log/00000001") == b"%d" % won[0] * 1000
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["00000001"]


def test_what_a_dead_writer_has_left_is_never_listed(tmp_path):
    store = Folder(tmp_path)
    store.put("log/00000001", b"1")
    temporary_name(tmp_path / "log" / "00000002").write_bytes(b"half")
    half = temporary_name(tmp_path / "trials")
    half.mkdir()
    (half / "a").touch()
    assert store.list("") == store.list("log") == ["log/00000001"]


def test_a_store_that_writes_over_what_is_there_is_refused(tmp_path):
    store = Folder(tmp_path)
    probe(store)
    assert store.list("") == []

    class Careless(Folder):
        def put_new(self, name, data):
            self.put(name, data)

    with pytest.raises(StorageError, match="must refuse to create an object that is there"):
        claimed(Careless(tmp_path))
    assert store.list("") == []


def test_a_folder_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")  # as of FAT

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="must lie on a disk with hard links, but got Operation not permitted"):
        claimed(Folder(tmp_path))
    assert contents(tmp_path) == {}


def test_a_flush_that_fails_after_the_link_is_unclear_and_settled_by_another_try(tmp_path, monkeypatch):
    store, flush, failures = Folder(tmp_path), os.fsync, [5, 5]

    def fsync(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("/log") and failures:
            raise OSError(failures.pop(), "Input/output error")
        flush(handle)

    claimed(store).release()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UnknownError):
        store.put_new("log/x", b"")
    log = claimed(store)
    assert (failures, log.number, read(store).number) == ([], 3, 3)


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
    names = store.list("")
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
    Folder(tmp_path).put("log/00000001", module._sealed(json.dumps(content).encode()))
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
