"""Which of many kills a run of the tests makes: every third of each kind, or the others (marked ``whole``)."""

from collections import Counter

import pytest

SAMPLE = "every third"
SHARES = (SAMPLE, pytest.param("the others", marks=pytest.mark.whole))


def share(jobs, which):
    """Returns the jobs of ``crash_host`` in one of ``SHARES``; their kind is what follows the number in their name.

    The first of each kind is in the sample.
    """
    counts, chosen = Counter(), []
    for job in jobs:
        kind = job["name"].partition("-")[2]
        if (counts[kind] % 3 == 0) == (which == SAMPLE):
            chosen.append(job)
        counts[kind] += 1
    return chosen
