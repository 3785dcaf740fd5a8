"""Values that several threads make ahead of whoever takes them, in order."""

import contextlib
import threading

import pytest

from carft_ray.data.content import AHEAD, in_order
from carft_ray.errors import DataError


@pytest.mark.parametrize("num_threads", [1, 4, 70])
def test_values_come_in_order_each_made_once_and_few_ahead(num_threads):
    for number in (0, 1, 7, 500):
        made = []
        with contextlib.closing(
            in_order(lambda index, made=made: made.append(index) or index, number, num_threads)
        ) as values:
            for taken, value in enumerate(values):
                assert value == taken
                assert max(made) - taken <= AHEAD * num_threads
        assert sorted(made) == list(range(number))


def test_several_threads_make_values_at_once():
    all_there = threading.Barrier(3)
    assert len(list(in_order(lambda index: all_there.wait(60), 3, 3))) == 3


def test_the_first_error_is_raised_behind_all_values_before_it():
    later_failed, taken = threading.Event(), []

    def make(index):
        if index == 9:
            later_failed.set()
            raise DataError("image 9")
        if index == 2:
            later_failed.wait(60)
            raise DataError("image 2")
        return index

    with pytest.raises(DataError, match="image 2"):
        taken.extend(in_order(make, 20, 4))
    assert taken == [0, 1]


def test_nothing_is_made_any_more_once_it_is_closed():
    made = []
    values = in_order(lambda index: made.append(index), 10_000, 2)
    next(values)
    values.close()
    assert len(made) < 100
    assert [each.name for each in threading.enumerate() if each.name.startswith("ThreadPool")] == []
