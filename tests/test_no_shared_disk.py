"""Searches on nodes that see neither the study nor the head's caches: all comes and goes through Ray."""

import os
import re
import signal

import killed_searches as searches
import pytest

import cluster
from carft_ray.study.rows import baselines, trials

TRAFFIC = re.compile(r"attempt \d+: ([\d.]+) MB came through Ray, ([\d.]+) MB went")
REAL = {**searches.REAL, "search": {**searches.REAL_SEARCH, "max_concurrent_trials": 2}}


def auth_of(head):
    return {name: head.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}


def logs(study_dir):
    return {row.name: (row.folder(study_dir) / "log.txt").read_text() for row in trials(study_dir)}


@pytest.mark.slow
@pytest.mark.nodes
@pytest.mark.parametrize(("executor", "kills"), [("inline", 0), ("ray-train", 3)])
def test_a_search_whose_study_no_node_sees_has_the_numbers_of_one_on_one_machine(executor, kills, tmp_path):
    """Those of the process are killed that has the files on the head."""
    hidden = tmp_path / "head"
    hidden.mkdir()
    study_dir = hidden / "study"
    with cluster.head() as head, cluster.node(head, 2, hidden=(hidden,)) as node:
        given = {**REAL, "cpus_per_worker": 0.5, "wait_for_nodes": 120}
        try:
            process = searches.driver(study_dir, 3, executor, head.address, auth_of(head), **given)
            for part in range(kills):
                searches.wait_until(
                    lambda: searches.ended(process) or len(searches.results(study_dir)) >= part,  # noqa: B023  # at once
                    f"{part} have ended",
                )
                [pid] = searches.wait_until(
                    lambda: searches.ended(process) or searches.titled("files", head.process.pid), "there is one"
                )
                os.kill(pid, signal.SIGKILL)
            code, output = searches.finish(process)
        finally:
            searches.kill_drivers()
        left = [path for path in (node.folder / "home").rglob("*") if path.is_file() and "/trials/" in str(path)]
    assert code == 0, output
    assert left == []
    assert {row.outcome for row in trials(study_dir) + baselines(study_dir)} == {"complete"}
    for name, log in logs(study_dir).items():
        assert float(TRAFFIC.search(log)[2]) > 0.1, name
    searches.check_numbers(study_dir, searches.undisturbed(tmp_path / "calm", 3))
