"""Groups of workers that run one training after the other: what they say, by a group without Ray; and real ones."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in
from killed_searches import wait_until

from carft_ray.errors import InterruptedRunError
from carft_ray.launch import ray_group
from carft_ray.launch.mailbox import Mailbox
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.ray_group import Said, WorkerGroup
from carft_ray.launch.runs.single import train_once
from carft_ray.launch.runtime import Runner
from carft_ray.study.outcome import TrialSpec
from carft_ray.study.rows import trials

HERE = Path(__file__).parent
CAPACITY = Capacity(1, "", 2, 1.0, 0.0, one_node=True)


class Groups:
    """Makes groups whose workers are a thread; ``ran`` has what each took: number of the group, trial."""

    def __init__(self, study_dir, monkeypatch):
        self.study_dir, self.ran, self.num = study_dir, [], 0
        self.fails, self.told = set(), set()  # trials that fail, and that end because they were told to
        self.dies = threading.Event()  # a worker that dies while it waits
        self.runtime = SimpleNamespace(study_dir=study_dir, capacity=CAPACITY, mailbox=Mailbox())
        monkeypatch.setattr(ray_group, "_trainer", lambda runtime, name, avoid, folder: self._trainer(name))
        monkeypatch.setattr(ray_group, "time", SimpleNamespace(monotonic=time.monotonic, sleep=self._wait))

    def group(self):
        return WorkerGroup(self.runtime)

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


@pytest.mark.slow
def test_one_group_runs_one_training_after_the_other_and_ends_when_closed(groups):
    group = groups.group()
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


@pytest.mark.slow
def test_a_group_ends_with_a_training_that_fails_or_was_told_to_end(groups):
    group, groups.told = groups.group(), {1}
    assert groups.run(group, 0)
    assert groups.run(group, 1)
    assert not group.fits(groups.runtime, [])
    group, groups.fails = groups.group(), {2}
    with pytest.raises(ValueError, match="no trial"):
        groups.run(group, 2)
    assert not group.fits(groups.runtime, [])


def test_a_training_is_not_lost_with_a_group_that_ended_before(groups, monkeypatch):
    monkeypatch.setattr(ray_group, "IDLE_S", 0.0)
    idle, dead = groups.group(), groups.group()
    assert groups.run(idle, 0)
    wait_until(lambda: not idle.fits(groups.runtime, []), "it ends")
    assert not groups.run(idle, 1)

    groups.dies.set()
    assert groups.run(dead, 2)
    wait_until(lambda: not dead.fits(groups.runtime, []), "it ends")
    assert not groups.run(dead, 3)
    assert [trial for _, trial in groups.ran] == [0, 2]


class Forgetful(Mailbox):
    """Every third call finds a mailbox that was just started again, every fourth one none."""

    calls = 0

    def _meet(self):
        number, self.calls = self.calls, self.calls + 1
        if number % 3 == 1:
            super().__init__()
        if number % 4 == 3:
            raise ConnectionError

    def give(self, group, work):
        self._meet()
        return super().give(group, work)

    def take(self, group, said):
        self._meet()
        return super().take(group, said)


@pytest.mark.whole
@pytest.mark.slow
def test_a_mailbox_that_forgets_costs_no_training_and_none_is_run_twice(groups):
    groups.runtime.mailbox = Forgetful()
    group = groups.group()
    assert [groups.run(group, number) for number in range(4)] == [True] * 4
    assert groups.ran == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_group_that_does_not_end_does_not_hold_up_the_one_who_closes_it(groups, monkeypatch):
    monkeypatch.setattr(ray_group, "CLOSE_S", 0.1)
    ends, group = threading.Event(), groups.group()
    monkeypatch.setattr(ray_group, "_trainer", lambda *given: SimpleNamespace(fit=ends.wait))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(groups.run, group, 0)
        wait_until(lambda: group.fits(groups.runtime, []), "it begins")
        group.close()
        ends.set()
    assert str(running.exception()) == "its workers ended without a message"


@pytest.mark.slow
def test_no_attempt_of_a_training_has_the_number_of_another(tmp_path):
    """The first attempt raises; the second one is stopped, and the third one finishes."""
    recipe = stand_in.make_recipe(resources={"executor": "debug"})
    stand_in.tell(tmp_path, rain="raise_once")  # by the letters where a trial has its number
    (tmp_path / "base" / "hold").touch()
    out, runner, epochs = tmp_path / "out", Runner(stand_in.prepare, stand_in.train), []

    def train(resume, report):
        return train_once(recipe, out, resume, "", str, str, report, None, None, (), runner)

    def stop(row):
        if row["epoch"] == 1:
            (out / "stop").write_text("")

    with pytest.raises(InterruptedRunError, match="continues from step 10"):
        train(False, stop)
    (tmp_path / "base" / "hold").unlink()
    train(True, epochs.append)
    assert [row["epoch"] for row in epochs] == [2]
    [row] = trials(out)
    assert (row.name, row.outcome, row.attempt) == ("train", "complete", 3)
    lines = (row.folder(out) / "log.txt").read_text().splitlines()
    kinds = [line.split()[2:4] for line in lines if " attempt " in line]
    assert kinds == [["1:", "starts"], ["1:", "error:"], ["2:", "starts"], ["2:", "stopped:"], ["3:", "starts"]]
