"""Groups of workers that run one training after the other: what they say, by a group without Ray; and a real one."""

import itertools
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in

from carft_ray.launch import ray_group
from carft_ray.launch.mailbox import Mailbox
from carft_ray.launch.ray_cluster.concurrency import Capacity
from carft_ray.launch.ray_group import Said, WorkerGroup
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.study.outcome import TrialSpec

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
    until(lambda: not idle.fits(groups.runtime, []))
    assert not groups.run(idle, 1)

    groups.dies.set()
    assert groups.run(dead, 2)
    until(lambda: not dead.fits(groups.runtime, []))
    assert not groups.run(dead, 3)
    assert [trial for _, trial in groups.ran] == [0, 2]


class Forgetful(Mailbox):
    """Every third call finds a mailbox that was just started again, every fourth one none."""

    def __init__(self):
        super().__init__()
        self._calls = itertools.count()

    def _meet(self):
        number = next(self._calls)
        if number % 3 == 1:
            super().__init__()
            self._calls = itertools.count(number + 1)
        if number % 4 == 3:
            raise ConnectionError

    def give(self, group, work):
        self._meet()
        return super().give(group, work)

    def take(self, group, said):
        self._meet()
        return super().take(group, said)


def test_a_mailbox_that_forgets_costs_no_training_and_none_is_run_twice(groups):
    groups.runtime.mailbox = Forgetful()
    group = groups.group()
    assert [groups.run(group, number) for number in range(4)] == [True] * 4
    assert groups.ran == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_group_that_does_not_end_does_not_hold_up_the_one_who_closes_it(groups, monkeypatch):
    monkeypatch.setattr(ray_group, "CLOSE_S", 0.1)
    ends, group = threading.Event(), groups.group()
    monkeypatch.setattr(ray_group, "_trainer", lambda *given: SimpleNamespace(fit=ends.wait))
    thread = threading.Thread(target=lambda: groups.ran.append(_raised(groups.run, group, 0)))
    thread.start()
    until(lambda: group.fits(groups.runtime, []))
    group.close()
    ends.set()
    thread.join()
    assert groups.ran == ["its workers ended without a message"]


def _raised(run, *given):
    with pytest.raises(RuntimeError) as raised:
        run(*given)
    return str(raised.value)


def until(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.whole
@pytest.mark.slow
def test_a_search_starts_its_workers_once_and_after_a_failure_again(tmp_path, monkeypatch):
    """Trials and a baseline, one after the other; trial 1 diverges, and its group ends with it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
    stand_in.tell(tmp_path, **{"1": "diverge"})
    resources = {"executor": "ray-train", "num_workers": 2, "cpus_per_worker": 0.5}
    recipe = stand_in.make_recipe(3, epochs=1, resources=resources, max_concurrent_trials=1)
    result = run_search(recipe, tmp_path / "study", runner=Runner(stand_in.prepare, train_and_name_the_process))
    assert [row.outcome for row in result.trials] == ["complete", "diverged", "complete"]
    folders = [tmp_path / "study" / "baselines" / "plain"]
    folders += [tmp_path / "study" / "trials" / row.name for row in result.trials]
    pids = [json.loads((folder / "pids.json").read_text()) for folder in folders]
    assert pids[0] == pids[1] == pids[2] != pids[3]


def train_and_name_the_process(recipe, out_dir, prepared_dir, context, attempt):
    from carft_ray.training.ranks import gather

    pids = gather(context, os.getpid())
    if context.rank == 0:
        (out_dir / "pids.json").write_text(json.dumps(pids))
    return stand_in.train(recipe, out_dir, prepared_dir, context, attempt)
