"""What lies on the driver's machine alone: a node that cannot see it trains all the same."""

import killed_searches as searches
import pytest
import stand_in

import cluster
from carft_ray.study.rows import baselines, trials


@pytest.mark.slow
@pytest.mark.nodes
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_node_that_does_not_see_the_drivers_temporary_folder_trains(executor, tmp_path, monkeypatch):
    stand_in.tell(tmp_path, seconds=0.1)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with cluster.head() as head, cluster.node(head, 4, hidden=(hidden,)):
        auth = {name: head.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        monkeypatch.setenv("TMPDIR", str(hidden))
        given = {"search": {"max_concurrent_trials": 2}, "cpus_per_worker": 0.5, "wait_for_nodes": 120}
        try:
            code, output = searches.finish(
                searches.driver(tmp_path / "study", 3, executor, head.address, auth, **given)
            )
        finally:
            searches.kill_drivers()
    assert code == 0, output
    assert {row.outcome for row in trials(tmp_path / "study") + baselines(tmp_path / "study")} == {"complete"}
    assert list(hidden.iterdir()) == []  # nothing is left behind
