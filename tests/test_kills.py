"""Searches over a real Ray, killed from outside: drivers, trials, workers, and trainings that hang.

The long version is ``make kill-matrix``: eight trainings at a time, ten kills of the driver, so that each moment meets
both executors, and trainings of all fates (``killed_searches.chaotic``), undisturbed and with the driver killed.
"""

import random
import secrets
import signal

import killed_searches as searches
import pytest
import stand_in

from carft_ray.study.snapshot import snapshot
from cluster import LATER_LOST, head

pytestmark = pytest.mark.whole


@pytest.fixture(autouse=True)
def half_a_second_an_epoch(tmp_path):
    stand_in.tell(tmp_path, seconds=0.5)
    yield
    searches.kill_drivers()  # that a test which has failed leaves behind


@pytest.fixture(scope="module")
def cluster():
    with head(2, dashboard=False, **LATER_LOST) as found:
        yield found.reached


@pytest.fixture
def seed():
    drawn = secrets.randbelow(10**6)
    print("seed", drawn)
    return drawn


def test_a_study_killed_with_its_ray_while_trainings_run_and_between_them_is_extended_and_finished(tmp_path, seed):
    moments = [("ray-train", "TrialEpoch"), ("inline", "TrialFinished")]
    numbers = [number for number in range(10) if searches.moment(number) in moments]
    kills = searches.kill_at_random(tmp_path / "study", 4, numbers, random.Random(seed))
    print(*kills, sep="\n")
    assert sorted((executor, event) for executor, event, _, _ in kills) == sorted(moments)


def test_a_search_with_repeats_killed_ten_times_has_the_trials_of_one_that_was_left_alone(tmp_path, seed):
    """One training at a time: what is proposed follows from what has ended. Real trainings, bit for bit."""
    more = {"max_concurrent_trials": 1, "repeats": 0.5, "baselines": {"plain": {"kl_weight": 0}}}
    how, rng = {**searches.REAL, "search": {**searches.REAL_SEARCH, **more}}, random.Random(seed)
    for number in range(10):
        searches.kill_after(searches.driver(tmp_path / "study", 20, searches.moment(number)[0], **how), number, rng)
    searches.finished(searches.driver(tmp_path / "study", 20, **how))
    rows = searches.searched(tmp_path / "study")
    assert (len(rows), sum(bool(row.repeat_of) for row in rows)) == (20, 10)
    assert {row.outcome for row in rows} == {"complete"}
    searches.check_numbers(tmp_path / "study", searches.undisturbed(tmp_path / "calm", 20, **more))


def test_after_a_kill_of_a_trial_on_a_ray_that_lives_the_search_ends_and_no_placement_group_is_left(tmp_path, cluster):
    study_dir = tmp_path / "study"
    output = searches.kill_one("trial", "ray-train", study_dir, cluster)
    assert sorted(row.attempt for row in snapshot(study_dir).rows) == [1, 1, 2]
    assert output.count("gets another attempt") == 1


def test_workers_that_do_not_start_name_the_cause(tmp_path, cluster):
    """Another job takes the cluster after the search has counted what is left, and before its first workers start."""
    address, auth = cluster
    auth = {**auth, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
    process = searches.driver(tmp_path / "study", 1, "ray-train", address, auth)
    try:
        assert any(line.startswith("Started") for line in process.stdout)
        process.send_signal(signal.SIGSTOP)
        with searches.occupied(1.5, *cluster):
            process.send_signal(signal.SIGCONT)
            told = next(line for line in process.stdout if "waits again" in line)
    finally:
        searches.kill_group(process)
    why = "WorkerGroupStartupTimeoutError: The worker group startup timed out after 2.0 seconds waiting for 2 workers"
    assert f" waits again: {why}" in told


def test_a_training_that_hangs_is_ended_and_named(tmp_path, cluster):
    stand_in.tell(tmp_path, seconds=0.05, **{"1": "hang_once"})
    study_dir = tmp_path / "study"
    process = searches.driver(study_dir, 2, "inline", *cluster, hang_timeout_s=10)
    output = searches.finished(process)
    name = snapshot(study_dir).trials[1].name
    assert f"Note {name} hangs: no step for 10 s (resources.hang_timeout_s); process " in output
    log = (study_dir / "trials" / name / "log.txt").read_text()
    assert "most recent call first" in log
    assert '/stand_in.py", line ' in log
    searches.check(study_dir, 2)


def test_a_search_that_loses_half_of_its_nodes_twice_ends_by_itself(tmp_path):
    stand_in.tell(tmp_path, seconds=0.1)
    searches.lose_nodes("inline", tmp_path / "study", 4, 6)


def test_a_training_whose_workers_die_in_collectives_ends_bit_for_bit_as_one_left_in_peace(tmp_path, seed):
    """One death of each rank; the baseline with the trial's values is the one left in peace."""
    searches.kill_workers(tmp_path, 2, random.Random(seed))
