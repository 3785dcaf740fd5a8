"""Which of many kills a run of the tests makes: one of eight of each kind, others every day. All: KILLS_OF=1."""

import os
from collections import Counter
from datetime import date

OF = int(os.environ.get("KILLS_OF", "8"))


def kind_of(job):
    return job["name"].partition("-")[2]


def share(jobs):
    """Returns the jobs of ``crash_host`` that are done today; their kind is what follows the number in their name.

    Each kind has one at least.
    """
    totals, counts, chosen, today = Counter(map(kind_of, jobs)), Counter(), [], date.today().toordinal()
    for job in jobs:
        kind = kind_of(job)
        every = min(OF, totals[kind])
        if counts[kind] % every == today % every:
            chosen.append(job)
        counts[kind] += 1
    return chosen
