"""Searches over a real Ray, killed from outside: drivers, trials, workers, and trainings that hang.

The long version is ``make kill-matrix``.
"""

import os
import random
import secrets
import signal
import time

import killed_searches as searches
import pytest

from carft_ray.search.study import baselines, trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def base_dir(tmp_path):
    searches.write_modes(tmp_path / "base", seconds=0.3)
    return tmp_path / "base"


@pytest.fixture(scope="module")
def cluster():
    with searches.cluster() as found:
        yield found


def test_a_study_killed_at_random_moments_is_finished_and_extended(tmp_path, base_dir):
    seed = secrets.randbelow(10**6)
    print("seed", seed)
    kills = searches.kill_at_random(tmp_path / "study", base_dir, 2, 2, random.Random(seed))
    assert len(kills) == 2


@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_training_whose_process_is_killed_gets_another_attempt_and_leaves_no_placement_group(
    tmp_path, base_dir, cluster, executor
):
    study_dir = tmp_path / "study"
    process = searches.driver(study_dir, base_dir, 1, executor, *cluster)
    os.kill(searches.wait_until(lambda: searches.running_pid(study_dir), "a training runs"), signal.SIGKILL)
    code, output = searches.finish(process)
    assert code == 0, output
    searches.check(study_dir, 1)
    assert sorted(row.attempt for row in trials(study_dir) + baselines(study_dir)) == [1, 1, 2]
    assert output.count("gets another attempt") == 1
    searches.wait_for_no_groups(*cluster)


def test_workers_that_do_not_start_name_the_cause(tmp_path, base_dir, cluster):
    """Something else holds the cluster: room for the preparation is left, but not for two workers."""
    address, auth = cluster
    with searches.occupied(1.5, *cluster):
        auth = {**auth, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
        process = searches.driver(tmp_path / "study", base_dir, 1, "ray-train", address, auth)
        try:
            told = next(line for line in process.stdout if "gets another attempt" in line)
        finally:
            searches.kill_group(process)
    why = "2 workers with 0.5 CPUs each did not start within 2 s (RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S)"
    assert told.endswith(f" gets another attempt: {why}: is the cluster full?\n")


def test_a_training_that_hangs_is_ended_and_named(tmp_path, base_dir, cluster):
    searches.write_modes(base_dir, seconds=0.05, **{"1": "hang_once"})
    study_dir = tmp_path / "study"
    began = time.monotonic()
    process = searches.driver(study_dir, base_dir, 2, "inline", *cluster, hang_timeout_s=3)
    code, output = searches.finish(process)
    assert code == 0, output
    name = trials(study_dir)[1].name
    assert f"Note {name} hangs: no step for 3 s (resources.hang_timeout_s); process " in output
    searches.check(study_dir, 2)
    assert time.monotonic() - began < 120
