"""A real training by two workers, one of which dies within backward pass, collective, evaluation or checkpoint.

``make kill-matrix WHAT=rank`` has deaths in every place, with eight trainings at a time.
"""

import random
import secrets

import killed_searches as searches
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.whole]


@pytest.fixture(autouse=True)
def no_driver_is_left():
    yield
    searches.kill_drivers()


def test_a_training_whose_workers_die_in_collectives_ends_bit_for_bit_as_one_left_in_peace(tmp_path):
    """One death of each rank; the baseline with the trial's values is the one left in peace."""
    seed = secrets.randbelow(10**6)
    print("seed", seed)
    searches.kill_workers(tmp_path, 2, random.Random(seed))
