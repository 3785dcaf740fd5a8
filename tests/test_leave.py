"""Trainings that leave a node before it goes, with real clusters whose nodes are drained and killed."""

import contextlib
import os
import re
import signal

import killed_searches
import pytest
import stand_in
import stepped
from bucket_server import bucket_server
from killed_searches import driver, ended, finished, titled, wait_until

import cluster
from carft_ray.store.log import log_of
from carft_ray.study.running import begun
from carft_ray.study.snapshot import snapshot

WINDOW = 10  # steps
VALUES = {"learning_rate": 1e-3, "kl_weight": 1.0}
# a trial, and a baseline with its values that is left in peace: 2 epochs of 32 steps
TWINS = {"epochs": 2, "train": {"batch_size": 2}, "enqueue": [VALUES], "baselines": {"calm": VALUES}}


@pytest.fixture(autouse=True)
def no_driver_is_left():
    yield
    killed_searches.kill_drivers()


@contextlib.contextmanager
def nodes(number, **how):
    """Runs a cluster whose head takes no trainings, and nodes of one CPU; yields how it is reached, and the nodes."""
    with cluster.head(**cluster.LATER_LOST) as head, contextlib.ExitStack() as stack:
        started = [stack.enter_context(cluster.node(head, **how)) for _ in range(number)]
        yield head.reached, started, head


def node_of(training, started):
    """Returns the node on which the first rank of a training runs."""
    known = begun(log_of(training.parents[1]))
    last = max(
        (attempt, found["node"]) for (name, attempt), (_, found) in known.items() if name.endswith(training.name)
    )
    return next(node for node in started if node.node_id == last[1])


def running_trial(study_dir, process, at_least):
    """Waits until the trial has made so many steps; returns its folder."""

    def found():
        ended(process)
        return [path for path in study_dir.glob("trials/*") if len(stepped.steps(path)) >= at_least]

    return wait_until(found, "the trial trains")[0]


def check_continued(study_dir):
    """Raises unless a trial has ended in two attempts, with the numbers of its twin that was left in peace."""
    [row], [calm] = snapshot(study_dir).trials, [row for row in snapshot(study_dir).baselines if row.name == "calm"]
    assert (row.outcome, row.attempt, calm.outcome, calm.attempt) == ("complete", 2, "complete", 1)
    for name in ("fine_tuned.safetensors", "predictions/validation.parquet"):
        one, other = (each.place(study_dir) / name for each in (row, calm))
        assert one.read_bytes() == other.read_bytes(), name
    assert killed_searches.numbers_of(study_dir, row) == killed_searches.numbers_of(study_dir, calm)


@pytest.mark.nodes
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_training_leaves_a_node_that_gets_sigterm_or_a_notice_and_continues_elsewhere_without_a_step_lost(
    tmp_path, executor
):
    """Inline by SIGTERM; with Ray Train, over two of three nodes, by ``ray drain-node``."""
    stand_in.tell(tmp_path, seconds=0.1 if executor == "inline" else 0.5)  # Ray's command takes seconds to start
    num_workers, study_dir = 2 if executor == "ray-train" else 1, tmp_path / "study"
    resources = {"num_workers": num_workers, "cpus_per_worker": 1, "wait_for_nodes": 120}
    with nodes(num_workers + 1) as (reached, started, _):
        process = driver(study_dir, 1, executor, *reached, search=TWINS, training="stepped", **resources)
        training = running_trial(study_dir, process, 14)
        node = node_of(training, started)
        node.process.terminate() if executor == "inline" else node.drain(100)
        output = finished(process)
        killed_searches.wait_for_no_groups(*reached)
    check_continued(study_dir)
    made = [step.step for step in stepped.steps(training) if step.rank == 0]
    assert made == list(range(1, 65))
    log = (training / "log.txt").read_text()
    assert re.search(r"attempt 1: left: [\d.]+ is being taken away within \d+ s; the next attempt continues", log)
    assert " lost" not in log
    assert re.search(r"gets another attempt: [\d.]+ is being taken away", output)


@pytest.mark.nodes
def test_a_kill_of_a_node_without_notice_costs_the_time_between_checkpoints_and_one_window_at_most(tmp_path):
    """An epoch has 64 steps of a fifth of a second, a checkpoint comes every 5 seconds."""
    stand_in.tell(tmp_path, seconds=0.2)
    search = {**TWINS, "train": {"batch_size": 1, "checkpoint_every": "5s"}, "epochs": 1}
    study_dir = tmp_path / "study"
    with nodes(2) as (reached, started, _):
        process = driver(study_dir, 1, "inline", *reached, search=search, training="stepped", wait_for_nodes=120)
        training = running_trial(study_dir, process, 1)
        wait_until(lambda: ended(process) or list(training.glob("attempt-1/step-*")), "it saves")
        known = len(stepped.steps(training))
        wait_until(lambda: ended(process) or len(stepped.steps(training)) >= known + 7, "it goes on")
        node_of(training, started).kill()
        finished(process)
    check_continued(study_dir)
    made = stepped.steps(training)
    first, second = ([step for step in made if step.attempt == attempt] for attempt in (1, 2))
    resumed, at = second[0].step - 1, {step.step: step.at for step in first}
    assert 0 < resumed < 64  # inside of the epoch
    assert [step.step for step in second] == list(range(resumed + 1, 65))
    # the next checkpoint would have come at the first window's end 5 seconds later; the kill was before its end
    due = next((step for step in range(WINDOW, 64, WINDOW) if at.get(step, 0) >= at[resumed + 1] + 5), 64)
    assert first[-1].step <= due
    assert " lost: " in (training / "log.txt").read_text()


# nodes that see neither the study nor the head's caches: all comes and goes through Ray


@pytest.mark.nodes
def test_a_search_whose_study_no_node_sees_has_the_numbers_of_one_on_one_machine(tmp_path):
    """The process that has the files on the head is killed three times."""
    hidden = tmp_path / "head"
    hidden.mkdir()
    study_dir = hidden / "study"
    at_once = {**killed_searches.REAL_SEARCH, "max_concurrent_trials": 2}
    given = {**killed_searches.REAL, "search": at_once, "cpus_per_worker": 0.5, "wait_for_nodes": 120}
    with nodes(1, num_cpus=2, hidden=(hidden,)) as (reached, [node], head):
        process = driver(study_dir, 3, "ray-train", *reached, **given)
        for part in range(3):
            wait_until(
                lambda: ended(process) or len(killed_searches.results(study_dir)) >= part,  # noqa: B023  # in this round
                f"{part} have ended",
            )
            [pid] = wait_until(lambda: ended(process) or titled("files", head.process.pid), "there is one")
            os.kill(pid, signal.SIGKILL)
        finished(process)
        left = [path for path in (node.folder / "home").rglob("*") if path.is_file() and "/trials/" in str(path)]
    assert left == []
    assert {row.outcome for row in snapshot(study_dir).rows} == {"complete"}
    for row in snapshot(study_dir).trials:
        log = (row.folder(study_dir) / "log.txt").read_text()
        assert float(re.search(r"MB came through Ray, ([\d.]+) MB went", log)[1]) > 0.1, row.name
    killed_searches.check_numbers(study_dir, killed_searches.undisturbed(tmp_path / "calm", 3))


@pytest.mark.nodes
def test_a_node_with_keys_uses_the_bucket_and_one_without_continues_what_it_has_left_there(tmp_path, monkeypatch):
    """The node with keys loses its power after a checkpoint of a trial; neither node sees the folder of the driver."""
    hidden = tmp_path / "head"
    hidden.mkdir()
    at_once = {**killed_searches.REAL_SEARCH, "max_concurrent_trials": 2}
    given = {**killed_searches.REAL, "search": at_once, "cpus_per_worker": 1, "wait_for_nodes": 120}
    with (
        bucket_server(monkeypatch) as server,
        cluster.head(**cluster.LATER_LOST) as head,
        contextlib.ExitStack() as stack,
    ):
        address, reached = server.address("study"), head.reached
        with_keys = stack.enter_context(cluster.node(head, hidden=(hidden,)))
        nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "XDG_CACHE_HOME": str(tmp_path / "other")}
        stack.enter_context(cluster.node(head, hidden=(hidden,), **nowhere))
        auth = {**reached[1], "XDG_CACHE_HOME": str(hidden)}
        process = driver(address, 2, "inline", reached[0], auth, **given)

        def left():
            ended(process)
            names = [name for name in server.objects() if "/trials/" in name and name.endswith("/state.json")]
            return [name for name in names if not list(hidden.rglob(name.partition("/trials/")[2]))]

        wait_until(left, "a node has put a checkpoint into the bucket itself")
        with_keys.kill()
        finished(process)
    logs = [path.read_text() for path in hidden.rglob("trials/*/log.txt")]
    assert "from step" in "".join(logs)
    assert "MB came through Ray" in "".join(logs)
    [study_dir] = [path.parent for path in hidden.rglob("driven/*/study/manifest.json")]
    assert {row.outcome for row in snapshot(study_dir).rows} == {"complete"}
    killed_searches.check_numbers(study_dir, killed_searches.undisturbed(tmp_path / "calm", 2))
