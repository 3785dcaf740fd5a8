"""Groups of workers that run one training after the other, without Ray."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
from killed_searches import wait_until
from test_mailbox import Losing

from carft_ray.launch import ray_group
from carft_ray.launch.mailbox import Mailbox
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.ray_group import Said, WorkerGroup
from carft_ray.study.outcome import TrialSpec

CAPACITY = Capacity(1, "", 2, 1.0, 0.0, one_node=True)


class Groups:
    """Makes groups whose workers are a thread; ``ran`` has what each took: number of the group, trial."""

    def __init__(self, study_dir, monkeypatch):
        self.study_dir, self.ran, self.num = study_dir, [], 0
        self.fails, self.told = set(), set()  # trials that fail, and that end because they were told to
        self.dies = threading.Event()  # a worker, while it waits
        self.runtime = SimpleNamespace(study_dir=study_dir, capacity=CAPACITY, mailbox=Mailbox())
        monkeypatch.setattr(ray_group, "_trainer", lambda runtime, name, avoid, folder: self._trainer(name))
        monkeypatch.setattr(ray_group, "LOOK_EVERY_S", 0.05)
        monkeypatch.setattr(ray_group, "time", SimpleNamespace(monotonic=time.monotonic, sleep=self._wait))

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
        while work := ray_group._next(self.runtime.mailbox, name, said):
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
    monkeypatch.setattr(ray_group, "IDLE_S", 0.0)
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
    monkeypatch.setattr(ray_group, "IDLE_S", 0.0)
    monkeypatch.setattr(groups.runtime.mailbox, "take", mock.Mock(side_effect=ConnectionError("it is gone")))
    with pytest.raises(ConnectionError, match="it is gone"):
        groups.run(WorkerGroup(groups.runtime), 0)


def test_a_group_that_does_not_end_does_not_hold_up_the_one_who_closes_it(groups, monkeypatch):
    monkeypatch.setattr(ray_group, "CLOSE_S", 0.1)
    ends, group = threading.Event(), WorkerGroup(groups.runtime)
    monkeypatch.setattr(ray_group, "_trainer", lambda *given: SimpleNamespace(fit=ends.wait))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(groups.run, group, 0)
        wait_until(lambda: group.fits(groups.runtime, []), "it begins")
        group.close()
        ends.set()
    assert str(running.exception()) == "its workers ended without a message"
