"""Counts in words."""

import pytest

from carft_ray.words import counted, times


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "trial", "0 trials"),
        (1, "trial", "1 trial"),
        (12_000, "image", "12,000 images"),
        (1.0, "point", "1 point"),
        (0.5, "GPU", "0.5 GPUs"),
    ],
)
def test_a_count_has_the_noun_in_its_number(number, noun, words):
    assert counted(number, noun) == words


def test_once_or_n_times():
    assert [times(number) for number in (0, 1, 2)] == ["0 times", "once", "2 times"]
