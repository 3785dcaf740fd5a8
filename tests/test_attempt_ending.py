"""How an attempt without a verdict has ended: one judgement of what its processes, its mailbox and the driver know."""

from types import SimpleNamespace

import pytest

from carft_ray.launch.attempt_ending import SLEPT, death_of, ending_of
from carft_ray.launch.cluster.ray_errors import FULL, STARTED_LATE
from carft_ray.launch.workers.attempt import Attempt
from carft_ray.launch.workers.mailbox import Process
from carft_ray.study.training import Failure, TrialSpec

SPEC = TrialSpec("trial", 3, "t0003-abcd", {}, attempt=2)
ONE = Process(7, "then", "n1", "g", (("n1", "10.0.0.1"),))
TWO = Process(7, "then", "n1", "g", (("n1", "10.0.0.1"), ("n2", "10.0.0.2")))
NO_MEMORY = f"{FULL} node 10.0.0.1"


def failure(outcome, reason="why", **words):
    return Failure(outcome, reason, 2, 5, **words)


ENDINGS = {
    "a stop wins over all": (
        {"failure": failure("error"), "leaves": "drained"},
        "died",
        {"stops": True},
        ("stopped", "", ""),
    ),
    "it was asked to leave": ({"leaves": "drained", "alive": ONE}, "", {}, ("left", "drained", "")),
    "the driver slept": ({"alive": ONE}, "", {"slept": True}, ("left", SLEPT, "")),
    "it died before it left": ({"leaves": "drained", "alive": ONE}, "died", {}, ("lost", "died (on 10.0.0.1)", "n1")),
    "an exception": ({"failure": failure("error"), "leaves": "drained"}, "", {}, ("error", "why", "")),
    "memory of its device": ({"failure": failure("memory")}, "", {}, ("memory", "why", "")),
    "its own words on the machine": (
        {"failure": failure("lost", "disk gone", node="n2"), "alive": TWO},
        "died",
        {},
        ("lost", "disk gone (on 10.0.0.1, 10.0.0.2)", "n2"),
    ),
    "nobody says anything": ({}, "", {}, ("lost", "its process ended without a message", "")),
    "it hung": ({"hung": "no step", "alive": TWO}, "killed", {}, ("lost", "no step (on 10.0.0.1, 10.0.0.2)", "")),
    "a node is full, others run": ({"alive": ONE}, NO_MEMORY, {"at_a_time": 2}, ("full", NO_MEMORY, "")),
    "a node is full, it was alone": ({"alive": ONE}, NO_MEMORY, {"at_a_time": 1}, ("lost", NO_MEMORY, "n1")),
    "nodes are awaited": ({}, STARTED_LATE, {"grows": True}, ("waits", STARTED_LATE, "")),
    "no nodes are awaited": ({}, STARTED_LATE, {}, ("lost", STARTED_LATE, "")),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_each_ending_has_one_kind(case):
    known, gone, around, expected = ENDINGS[case]
    attempt = Attempt(SPEC, 0.0, **known)
    at_a_time = SimpleNamespace(concurrency=around.get("at_a_time", 2), capacity_now=around.get("grows") and print)
    found = ending_of(attempt, gone, around.get("stops", False), around.get("slept", False), at_a_time)
    assert (found.kind, found.reason, found.node) == expected


def test_what_the_threads_of_a_hung_process_did_comes_before_what_ended_it():
    attempt = Attempt(SPEC, 0.0, hung="no step", stacks=lambda: "Thread 1")
    found = ending_of(attempt, "killed\nby a signal", False, False, SimpleNamespace(concurrency=1, capacity_now=None))
    assert found.details == "Thread 1\nby a signal"


def test_a_dead_rank_is_the_cause_whatever_exceptions_the_others_raise():
    attempt = Attempt(SPEC, 0.0, alive=TWO, failure=failure("error", "connection closed", details="Traceback"))
    found, gone = death_of(attempt, "its process died", 1)
    assert gone == "rank 1 on 10.0.0.2: its process died"
    assert (found.outcome, found.reason, found.details, found.node) == ("lost", gone, "Traceback", "n2")
    verdict = failure("diverged")
    attempt.failure = verdict
    assert death_of(attempt, "its process died", 1)[0] is verdict
    assert death_of(attempt, NO_MEMORY, 5)[1] == NO_MEMORY
