"""Searches in which trials diverge, raise, hang, die and want for memory end by themselves, with the right counts.

Forty trials with Ray Train (a minute and a half for four), and forty with the driver killed five times, are rows of
``make kill-matrix``.
"""

import secrets

import killed_searches as searches
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def no_driver_is_left():
    yield
    searches.kill_drivers()


@pytest.fixture
def seed():
    drawn = secrets.randbelow(10**6)
    print("seed", drawn)
    return drawn


def test_forty_trials_of_all_fates_end_with_the_counts_of_their_seed(tmp_path, seed):
    counts = searches.chaotic(tmp_path / "study", 40, seed, "inline", 0)
    print(dict(counts))


def test_ten_trials_of_all_fates_end_so_though_the_driver_is_killed(tmp_path, seed):
    searches.chaotic(tmp_path / "study", 10, seed, "inline", 2)
