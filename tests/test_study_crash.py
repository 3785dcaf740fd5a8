"""Searches, their continuation and a confirm that are killed around their writes: nothing lost, nothing doubled.

Without Ray, in forks of one process (``crash_host.py``); what is trained is a stand-in. Each day has its share of the
kills, ``make crash-points`` makes all.
"""

from collections import Counter

import crash_host
import crash_points
import pytest

from carft_ray.study.rows import confirmations, trials


@pytest.mark.parametrize("where", ["folder", pytest.param("bucket", marks=pytest.mark.whole)])
@pytest.mark.slow
def test_a_search_more_of_it_and_a_confirm_killed_around_any_write_lose_and_double_nothing(tmp_path, where):
    crash_points.prepare(tmp_path)
    with crash_points.started(tmp_path, where) as host:
        calm = crash_points.undisturbed(host, tmp_path)
        jobs = crash_host.share(crash_points.jobs_of(calm, host.moments))
        found = crash_points.killed(host, jobs)
    assert {crash_points.command_of(name) for name in found} == set(crash_points.COMMANDS)
    assert len(found) == len(jobs)
    assert crash_points.differences(found, calm) == ([], [])
    outcomes = [Counter(row.outcome for row in trials(place / "study")) for place, _ in calm.values()]
    assert outcomes[0] == {"complete": 4, "diverged": 1, "pruned": 1}
    assert outcomes[1] == outcomes[2]
    assert sum(outcomes[1].values()) == 8
    assert [row.outcome for row in confirmations(calm["confirm"][0] / "study")] == ["complete"] * 4
