"""Trainings that leave a node before it goes, with real clusters whose nodes are drained and killed."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import killed_searches
import pytest
import stand_in
import stepped
from killed_searches import asked, cluster, driver, ended, environment, finish, join, parent_of, wait_until

from carft_ray.launch.runtime import stop_reader
from carft_ray.study.outcome import write_leave
from carft_ray.study.rows import baselines, trials

WINDOW = 10  # steps
VALUES = {"learning_rate": 1e-3, "kl_weight": 1.0}
# a trial, and a baseline with its values that is left in peace: 2 epochs of 32 steps
TWINS = {"epochs": 2, "train": {"batch_size": 2}, "enqueue": [VALUES], "baselines": {"calm": VALUES}}


@pytest.fixture(autouse=True)
def no_driver_is_left():
    yield
    killed_searches.kill_drivers()


def test_an_attempt_reads_that_it_is_to_leave_and_no_other_does(tmp_path, monkeypatch):
    monkeypatch.setattr("carft_ray.launch.runtime.STOP_CHECK_S", 0.0)
    readers = [stop_reader(tmp_path, tmp_path / "t", attempt) for attempt in (1, 2, 3)]
    assert [should_stop() for should_stop in readers] == [False] * 3
    (tmp_path / "t").mkdir()
    write_leave(tmp_path / "t", 2, "its node goes")
    assert [should_stop() for should_stop in readers] == [False, True, False]


@contextlib.contextmanager
def nodes(number, num_cpus=1, **settings):
    """Runs a cluster whose head takes no trainings; yields how it is reached, its nodes, and what adds further ones."""
    temporary = tempfile.TemporaryDirectory(prefix="carft-", dir="/tmp", ignore_cleanup_errors=True)
    with temporary as folder, cluster(0, **killed_searches.SOON_LOST, **settings) as reached:

        def add(number):
            before = asked("ray.cluster_resources().get('CPU', 0)", *reached) if number else 0
            found = join(number, num_cpus, folder, *reached)
            enough = f"ray.cluster_resources().get('CPU', 0) >= {before + number * num_cpus}"
            wait_until(lambda: asked(enough, *reached), "the nodes join")
            return found

        yield reached, add(number), add


def node_of(training, started):
    """Returns which of the processes of ``ray start`` the first rank of a training runs under, and Ray's name of it."""
    alive = json.loads((training / "heartbeat.json").read_text())
    pid = parent_of(parent_of(alive["pid"]))
    return next(node for node in started if node.pid == pid), alive["node_id"]


def running_trial(study_dir, process, at_least):
    """Waits until the trial has made so many steps; returns its folder."""

    def found():
        ended(process)
        return [path for path in study_dir.glob("trials/*") if len(stepped.steps(path)) >= at_least]

    return wait_until(found, "the trial trains")[0]


def check_continued(study_dir, training):
    """Raises unless a trial has ended in two attempts, with the numbers of its twin that was left in peace."""
    [row], [calm] = trials(study_dir), [row for row in baselines(study_dir) if row.name == "calm"]
    assert (row.outcome, row.attempt, calm.outcome, calm.attempt) == ("complete", 2, "complete", 1)
    twin = study_dir / "baselines" / "calm"
    for name in ("fine_tuned.safetensors", "predictions/validation.parquet"):
        assert (training / name).read_bytes() == (twin / name).read_bytes(), name
    assert killed_searches.numbers_of(training) == killed_searches.numbers_of(twin)


@pytest.mark.whole
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_training_leaves_a_node_that_gets_sigterm_or_a_notice_and_continues_elsewhere_without_a_step_lost(
    tmp_path, executor
):
    """Inline by SIGTERM; with Ray Train, over two of three nodes, by ``ray drain-node``."""
    stand_in.tell(tmp_path, seconds=0.1)
    num_workers, study_dir = 2 if executor == "ray-train" else 1, tmp_path / "study"
    resources = {"num_workers": num_workers, "cpus_per_worker": 1}
    with nodes(num_workers + 1) as (reached, started, _):
        process = driver(study_dir, 1, executor, *reached, search=TWINS, training="stepped", **resources)
        training = running_trial(study_dir, process, 14)
        node, node_id = node_of(training, started)
        if executor == "inline":
            node.send_signal(signal.SIGTERM)
        else:
            drain(node_id, reached, 100)
        code, output = finish(process)
        assert code == 0, output
        killed_searches.wait_for_no_groups(*reached)
    check_continued(study_dir, training)
    made = [step.step for step in stepped.steps(training) if step.rank == 0]
    assert made == list(range(1, 65))
    log = (training / "log.txt").read_text()
    assert re.search(r"attempt 1: left: [\d.]+ is being taken away within \d+ s; the next attempt continues", log)
    assert " lost" not in log
    assert re.search(r"gets another attempt: [\d.]+ is being taken away", output)


def drain(node_id, reached, seconds):
    """Gives a node the notice that it will be taken away."""
    address, auth = reached
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a notice"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, check=True, capture_output=True, env=environment(**auth), timeout=60)
