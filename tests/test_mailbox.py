"""The mailbox between a driver and its trainings, as an object and as an actor of a real Ray; groups of workers."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import ray
from killed_searches import wait_until

from carft_ray.launch.cluster.capacity import Capacity
from carft_ray.launch.cluster.cluster import running_ray
from carft_ray.launch.workers import group as group_module
from carft_ray.launch.workers import mailbox, worker
from carft_ray.launch.workers.group import Said, WorkerGroup
from carft_ray.launch.workers.mailbox import PATIENCE_S, Exchange, Mailbox, Post, Process, Wish, start_mailbox
from carft_ray.launch.workers.worker import Poster
from carft_ray.study.training import TrialSpec

NAME, OTHER = "trials/t0000-abcd", "trials/t0001-abcd"
PROCESS = Process(7, "5", "n1", "g1", (("n1", "10.0.0.1"),))


@pytest.fixture
def clock(monkeypatch):
    """Time that stands until it is set: ``now``."""
    clock = SimpleNamespace(now=0.0)
    for module in (mailbox, worker):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_what_all_ranks_post_is_given_to_the_driver_and_what_it_does_not_name_is_forgotten():
    box = Mailbox()
    box.post(Post(NAME, 1, 0, 3, PROCESS))
    box.post(Post(NAME, 1, 1, 5))
    box.post(Post(OTHER, 1, 0, 1))
    found = box.exchange({NAME: Wish(1, "go")})
    assert (found[NAME].steps, found[NAME].process) == ({0: 3, 1: 5}, PROCESS)
    assert list(found) == [NAME]
    assert list(box.exchange({NAME: Wish(1, "go"), OTHER: Wish(1, "go")})) == [NAME]
    assert box.exchange({NAME: Wish(2, "go")}) == {}  # of another attempt
    box.post(Post(NAME, 2, 0, 1, PROCESS))
    assert box.post(Post(NAME, 1, 0, 99, Process(1, "1"))).order == "outdated"  # and changes nothing
    [found] = box.exchange({NAME: Wish(2, "go")}).values()
    assert (found.attempt, found.steps, found.process) == (2, {0: 1}, PROCESS)


def test_an_attempt_gets_the_order_that_is_its_own():
    box = Mailbox()
    assert box.post(Post(NAME, 2)).order == "go"  # the driver has not named it yet
    box.exchange({NAME: Wish(2, "stop")})
    assert [box.post(Post(NAME, attempt)).order for attempt in (1, 2, 3)] == ["outdated", "stop", "go"]
    assert box.post(Post(OTHER, 1)).order == "go"


def test_while_the_driver_or_the_mailbox_is_silent_for_long_a_training_is_to_leave(clock):
    box = Mailbox(lambda: clock.now)
    box.exchange({NAME: Wish(1, "go")})
    for now, order in ((PATIENCE_S - 1, "go"), (PATIENCE_S, "leave")):
        clock.now = now
        assert box.post(Post(NAME, 1)).order == order
    box.exchange({NAME: Wish(1, "go")})  # it is awake again
    assert box.post(Post(NAME, 1)).order == "go"
    clock.now = 0.0
    poster = Poster(SimpleNamespace(post=mock.Mock(side_effect=ConnectionError)), NAME, 1)
    for now, order in ((PATIENCE_S - 1, "go"), (PATIENCE_S, "leave")):
        clock.now = now
        poster.post()
        assert poster.step() == order


def test_a_step_never_waits_for_the_mailbox():
    held, box = threading.Event(), Mailbox()

    def slow(post):
        if post.steps:
            held.wait()
        return box.post(post)

    with Poster(SimpleNamespace(post=slow), NAME, 1) as poster:
        for _ in range(1000):
            assert poster.step() == "go"
        wait_until(lambda: poster._thread.is_alive(), "it has come")
        held.set()


def test_the_driver_knows_when_a_step_was_last_seen_and_the_longest_between_two(clock):
    box = Mailbox()
    exchange = Exchange(box)
    exchange.order(NAME, 1)
    assert exchange.mail(NAME, 1) is None

    def look(now, *steps):
        clock.now = now
        for rank, number in enumerate(steps):
            box.post(Post(NAME, 1, rank, number))
        exchange.now()
        mail = exchange.mail(NAME, 1)
        return mail.seen, mail.longest_s

    assert look(1.0, 0, 0) == (1.0, 0.0)
    assert look(3.0, 0, 0) == (1.0, 0.0)
    assert look(4.0, 0, 1) == (4.0, 3.0)  # one of the ranks is enough
    assert look(PATIENCE_S + 4, 1, 1) == (PATIENCE_S + 4, 3.0)  # it was the driver that slept
    assert exchange.mail(NAME, 2) is None
    exchange.forget(NAME)
    exchange.now()
    assert exchange.mail(NAME, 1) is None


def test_an_exchange_goes_on_while_the_driver_is_busy_and_when_the_mailbox_fails(monkeypatch):
    monkeypatch.setattr(mailbox, "EXCHANGE_EVERY_S", 0.01)
    box, calls = Mailbox(), []

    def flaky(orders):
        calls.append(orders)
        if len(calls) % 2:
            raise ConnectionError
        return box.exchange(orders)

    exchange = Exchange(SimpleNamespace(exchange=flaky))
    with exchange.going_on():
        exchange.order(NAME, 1, "stop")

        def come():
            return box.post(Post(NAME, 1, 0, 8)).order == "stop" and exchange.mail(NAME, 1)

        wait_until(come, "it has come")
    assert exchange.mail(NAME, 1).signs.steps == {0: 8}


class Losing(Mailbox):
    """Every third call has no answer though it came, every fourth finds a mailbox that was just started again."""

    calls = 0

    def _lose(self, call, *given):
        self.calls += 1
        if self.calls % 4 == 0:
            super().__init__()
        answer = call(*given)
        if self.calls % 3 == 0:
            raise ConnectionError
        return answer

    def post(self, post):
        self.last = post
        return self._lose(super().post, post)

    def ask(self, group, work):
        return self._lose(super().ask, group, work)

    def answer(self, group, said):
        return self._lose(super().answer, group, said)


@pytest.mark.parametrize("looks", [1, 2, 5])
def test_each_record_reaches_the_driver_once_and_in_order_whatever_is_lost_on_the_way(looks):
    box, found = Losing(), []
    exchange, poster = Exchange(box), Poster(box, NAME, 1)
    exchange.order(NAME, 1)
    for number in range(40):
        poster.record("row", number)
        for _ in range(number % 3):
            poster.post()
        if number % looks == 0:
            exchange.now()
            found += exchange.records(NAME, 1)
    while not poster.post():
        pass
    exchange.now()
    found += exchange.records(NAME, 1)
    assert found == [("row", number) for number in range(40)]
    for _ in range(3):  # by then the poster knows, and drops them
        exchange.now()
        poster.post()
    assert box.last.records == ()


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    """A mailbox as an actor."""
    with running_ray(None, tmp_path_factory.mktemp("ray") / "ray.log"):
        yield start_mailbox()


def pid_of(box):
    """The process of an actor; None while it has none."""
    try:
        return ray.get(box._actor.__ray_call__.remote(lambda self: os.getpid()), timeout=10)
    except ray.exceptions.RayError:
        return None


@pytest.mark.slow
def test_the_actor_answers_as_the_object_and_comes_back_when_it_is_killed(actor):
    orders = {NAME: Wish(1, "leave")}
    actor.exchange(orders)
    with Poster(actor, NAME, 1, process=PROCESS) as poster:
        assert poster.order == "leave"
        killed = pid_of(actor)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: pid_of(actor) not in (None, killed), "it has come")
        wait_until(lambda: actor.exchange(orders) and actor.exchange(orders)[NAME].process == PROCESS, "it has come")
    assert actor.post(Post(NAME, 1)).order == "leave"


@pytest.mark.slow
def test_a_mailbox_that_does_not_answer_is_an_error_of_the_system_and_no_hang(actor, monkeypatch):
    monkeypatch.setattr(mailbox, "CALL_TIMEOUT_S", 0.2)
    pid = pid_of(actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(OSError, match="the mailbox does not answer"):
            actor.post(Post(NAME, 1))
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: pid_of(actor) == pid, "it has come")


# groups of workers that run one training after the other, without Ray


CAPACITY = Capacity(1, "", 2, 1.0, 0.0, one_node=True)


class Groups:
    """Makes groups whose workers are a thread; ``ran`` has what each took: number of the group, trial."""

    def __init__(self, study_dir, monkeypatch):
        self.study_dir, self.ran, self.num = study_dir, [], 0
        self.fails, self.told = set(), set()  # trials that fail, and that end because they were told to
        self.dies = threading.Event()  # a worker, while it waits
        self.runtime = SimpleNamespace(study_dir=study_dir, capacity=CAPACITY, mailbox=Mailbox())
        monkeypatch.setattr(group_module, "_trainer", lambda runtime, name, avoid, folder: self._trainer(name))
        monkeypatch.setattr(group_module, "LOOK_EVERY_S", 0.05)
        monkeypatch.setattr(group_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=self._wait))

    def run(self, group, number):
        return group.run(TrialSpec("trial", number, f"t{number:04}-abcd", {}, 1))

    def _wait(self, seconds):
        if self.dies.is_set():
            raise ValueError("a worker died")
        time.sleep(seconds)

    def _trainer(self, name):
        self.num += 1
        return SimpleNamespace(fit=lambda: self._work(name, self.num))

    def _work(self, name, group):
        said = Said([f"node{group}"])
        while work := group_module._next(self.runtime.mailbox, name, said):
            self.ran.append((group, work.spec.number))
            if work.spec.number in self.fails:
                raise ValueError("no trial")
            said = Said(said.nodes, work.number, work.number, work.spec.number in self.told)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    return Groups(tmp_path, monkeypatch)


def test_one_group_runs_one_training_after_the_other_and_ends_when_closed(groups):
    group = WorkerGroup(groups.runtime)
    assert not group.fits(groups.runtime, [])
    assert groups.run(group, 0)
    assert groups.run(group, 1)
    assert groups.ran == [(1, 0), (1, 1)]
    assert group.fits(groups.runtime, ["node2"])
    assert not group.fits(groups.runtime, ["node1"])  # it is on a node that is left out
    fewer = SimpleNamespace(capacity=Capacity(1, "", 1, 1.0, 0.0, one_node=True))
    assert not group.fits(fewer, [])
    group.close()
    group.close()
    assert not group.fits(groups.runtime, [])


def test_a_group_ends_with_a_training_that_fails_or_was_told_to_end(groups):
    group, groups.told = WorkerGroup(groups.runtime), {1}
    assert groups.run(group, 0)
    assert groups.run(group, 1)
    assert not group.fits(groups.runtime, [])
    group, groups.fails = WorkerGroup(groups.runtime), {2}
    with pytest.raises(ValueError, match="no trial"):
        groups.run(group, 2)
    assert not group.fits(groups.runtime, [])


def test_a_training_is_not_lost_with_a_group_that_ended_before(groups, monkeypatch):
    monkeypatch.setattr(group_module, "IDLE_S", 0.0)
    idle, dead = WorkerGroup(groups.runtime), WorkerGroup(groups.runtime)
    assert groups.run(idle, 0)
    wait_until(lambda: not idle.fits(groups.runtime, []), "it ends")
    assert not groups.run(idle, 1)

    groups.dies.set()
    assert groups.run(dead, 2)
    wait_until(lambda: not dead.fits(groups.runtime, []), "it ends")
    assert not groups.run(dead, 3)
    assert [trial for _, trial in groups.ran] == [0, 2]


def test_a_mailbox_that_forgets_costs_no_training_and_none_is_run_twice(groups):
    groups.runtime.mailbox = Losing()
    group = WorkerGroup(groups.runtime)
    assert [groups.run(group, number) for number in range(4)] == [True] * 4
    assert groups.ran == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_workers_that_never_reach_the_mailbox_end_with_its_error(groups, monkeypatch):
    monkeypatch.setattr(group_module, "IDLE_S", 0.0)
    monkeypatch.setattr(groups.runtime.mailbox, "answer", mock.Mock(side_effect=ConnectionError("it is gone")))
    with pytest.raises(ConnectionError, match="it is gone"):
        groups.run(WorkerGroup(groups.runtime), 0)


def test_a_group_that_does_not_end_does_not_hold_up_the_one_who_closes_it(groups, monkeypatch):
    monkeypatch.setattr(group_module, "CLOSE_S", 0.1)
    ends, group = threading.Event(), WorkerGroup(groups.runtime)
    monkeypatch.setattr(group_module, "_trainer", lambda *given: SimpleNamespace(fit=ends.wait))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(groups.run, group, 0)
        wait_until(lambda: group.fits(groups.runtime, []), "it begins")
        group.close()
        ends.set()
    assert str(running.exception()) == "its workers ended without a message"
