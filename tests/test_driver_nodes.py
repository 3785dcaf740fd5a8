"""Nodes under the driver: those that fail or are taken away, and what killed trials keep of them. No Ray runs."""

import re
import time

import pytest
from stand_in import make_recipe, save
from tune_stand_in import kinds, short_search, spec_of

from carft_ray.launch.cluster.capacity import Node, capacity_of
from carft_ray.launch.events import BaselineFinished, Note, TrialSetAside
from carft_ray.launch.leaks import Leaks
from carft_ray.launch.nodes import BadNodes, Drains
from carft_ray.study.retries import LOST_ATTEMPTS


@pytest.fixture
def search(tmp_path):
    with short_search(tmp_path / "study") as make:
        yield make


@pytest.fixture
def tune(search):
    """A search of 6 trials, 2 at a time."""
    return search()


def test_an_attempt_that_was_lost_with_one_of_its_ranks_is_told_with_where_it_ran(tune):
    trial = tune.start()
    tune.post(trial, nodes=[("n1", "10.0.0.1"), ("n2", "10.0.0.2")])
    tune.look()
    tune.end(trial, "it was killed", dead_rank=1)
    told = f"{spec_of(trial).name} gets another attempt: rank 1 on 10.0.0.2: it was killed"
    assert tune.events[-1].text.startswith(told)


def test_a_node_on_which_attempts_fail_again_and_again_is_named_and_left_out_for_a_while(tune):
    now = [0.0]
    nodes = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
    bad_nodes = tune.driver.bad_nodes = BadNodes(lambda: nodes, clock=lambda: now[0])
    tune.finish(tune.start())

    def run(node, end):
        trial = tune.start()
        tune.post(trial, nodes=[[node, nodes[node]]])
        tune.look()
        end(trial)
        return trial.config["avoid"]

    assert [run("n2", end) for end in (tune.die, tune.die, tune.finish)] == [[], [], []]
    assert [run("n2", tune.die) for _ in range(3)] == [[], [], []]  # as if the two before had not been
    said = Note("3 attempts in a row failed on node 10.0.0.2; it is left out for 10 minutes")
    assert [event for event in tune.events if event == said] == [said]
    assert tune.start().config["avoid"] == ["n2"]
    now[0] = 601.0
    assert bad_nodes.left_out() == []

    def broken(trial):
        tune.fail(trial, "error", "ImportError: libcudart.so.12")

    assert [run("n2", end) for end in (broken, broken, broken)] == [[], [], []]
    assert [event for event in tune.events if event == said] == [said] * 2
    assert tune.start().config["avoid"] == ["n2"]
    assert [bad_nodes.failed("n3") for _ in range(4)] == [""] * 4  # never more than half of them
    assert [bad_nodes.failed("gone") for _ in range(4)] == [""] * 4
    now[0] = 1202.0
    assert bad_nodes.left_out() == []


def test_an_attempt_that_was_asked_to_leave_is_repeated_again_and_again_and_no_failure_is_counted(tune):
    trial = tune.start()
    name, folder = trial.config["spec"]["name"], tune.folder(trial)
    for number in range(1, 20):
        save(folder, 1, number)
        for reason in ("node7 goes", "asked once more"):
            tune.driver.ask_to_leave(spec_of(trial), reason)
        assert tune.order(trial) == "leave"
        tune.end(trial)
        assert tune.events[-1] == Note(f"{name} gets another attempt: node7 goes")
        trial = tune.start()
        assert spec_of(trial).attempt == number + 1
        assert tune.order(trial) == "go"  # what an attempt before was asked means nothing
    tune.finish(trial)
    assert kinds(tune.events).count(BaselineFinished) == 1
    lines = (folder / "log.txt").read_text().splitlines()
    assert lines[0].endswith("attempt 1: left: node7 goes; the next attempt continues from step 10 (epoch 1)")
    assert len(lines) == 19
    tune.driver.ask_to_leave(spec_of(trial), "it has ended")
    assert tune.order(trial) == "go"
    trial = tune.start()
    tune.driver.exchange.heard -= 61  # it has slept, and the mailbox has asked
    tune.end(trial)
    assert tune.events[-1].text.endswith(" gets another attempt: the driver was silent for more than 60 s")


def test_the_last_node_on_which_a_training_fits_is_never_left_out():
    """The head has no CPU; of two workers one is left out, and the other then goes."""
    there = {"head": Node(0, 0), "n1": Node(2, 0), "n2": Node(2, 0), "n3": Node(1, 0)}

    def fits(without):
        left = tuple(node for name, node in there.items() if name not in without)
        return capacity_of(make_recipe(6, resources={"cpus_per_worker": 2}), left, may_grow=True).concurrency > 0

    nodes = BadNodes(lambda: dict.fromkeys(there, "10.0.0.1"), fits)
    assert [bool(nodes.failed("n1")) for _ in range(3)] == [False, False, True]
    assert not any(nodes.failed("n2") for _ in range(9))
    assert nodes.left_out() == ["n1"]
    del there["n2"]
    assert nodes.left_out() == []


def test_an_attempt_that_ends_before_it_has_left_is_settled_as_any_other_and_one_that_dies_is_lost(tune):
    tune.finish(tune.start())
    for end, outcome in ((lambda trial: tune.fail(trial, "diverged"), "diverged"), (tune.finish, "complete")):
        trial = tune.start()
        tune.driver.ask_to_leave(spec_of(trial), "node7 goes")
        end(trial)
        assert tune.events[-1].row.outcome == outcome
    for _ in range(LOST_ATTEMPTS):
        trial = tune.start()
        tune.driver.ask_to_leave(spec_of(trial), "node7 goes")
        tune.die(trial)
    assert tune.events[-1] == TrialSetAside(spec_of(trial), "RuntimeError: The actor died unexpectedly.")


def test_what_has_a_rank_on_a_node_that_is_taken_away_leaves_it_and_nothing_is_put_there(tune):
    draining, now = {}, [0.0]
    tune.driver.drains = Drains(lambda: draining, lambda: now[0])
    first, second = tune.start(), tune.start()
    tune.post(first, nodes=[("n1", "10.0.0.1")])
    tune.post(second, nodes=[("n1", "10.0.0.1"), ("n2", "10.0.0.2")])
    tune.look()
    draining["n2"] = round(1000 * (time.time() + 1000))
    tune.look()  # Ray is asked once a second
    assert tune.order(second) == "go"
    now[0] = 1.0
    tune.look()
    assert (tune.order(first), tune.order(second)) == ("go", "leave")
    tune.end(second)
    assert re.search(r" gets another attempt: 10\.0\.0\.2 is being taken away within \d+ s$", tune.events[-1].text)
    again = tune.start()
    assert (again.config["spec"]["name"], again.config["avoid"]) == (second.config["spec"]["name"], ["n2"])
    del draining["n2"]  # it is gone
    now[0] = 2.0
    tune.finish(again)
    assert tune.start().config["avoid"] == []


def test_the_group_of_a_killed_trial_is_removed_once_it_is_known_or_keeps_others_from_theirs(search):
    groups, removed = {}, []  # of the job, with whether each has its resources

    def remove(name):
        removed.append(name)
        del groups[name]

    groups["of the program"] = True  # which has it for itself, and starts a search beside it
    tune = search(leaks=Leaks(lambda: dict(groups), remove))
    groups |= {"g1": True, "g2": True}
    first, second = tune.start(), tune.start()
    tune.die(first)
    tune.look()
    assert removed == []  # which of the two is the second one's is not known yet
    third = tune.start()
    groups["g3"] = True
    tune.post(second, group="g2")
    tune.look()
    assert removed == []  # the third one may have taken a group that was there
    tune.post(third, group="g3")
    tune.look()
    assert removed == ["g1"]
    assert tune.events[-1] == Note("removed 1 placement group that a killed trial had left behind")
    tune.end(second)
    groups["g4"] = False  # the next one waits for what the third one holds
    tune.start()
    tune.die(third)
    tune.look()
    assert "g3" in removed
    tune.driver.leaks.clear()
    assert [*groups] == ["of the program"]
