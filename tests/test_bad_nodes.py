"""Nodes that are left out, with a real Ray of two nodes."""

import os
from pathlib import Path

import pytest
import stand_in
from ray.cluster_utils import Cluster

from carft_ray.launch.events import TrialEpoch
from carft_ray.launch.ray_cluster.nodes import BadNodes
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.study.outcome import read_live

HERE = Path(__file__).parent
SIZES = {"object_store_memory": 10**8}


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster whose head has no CPU; gives its address and Ray's names of its two nodes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SIZES})
    nodes = [cluster.add_node(num_cpus=1, **SIZES) for _ in range(2)]
    yield cluster.address, [node.node_id for node in nodes]
    cluster.shutdown()


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_no_training_runs_on_a_node_that_is_left_out(tmp_path, monkeypatch, two_nodes, executor):
    address, (left_out, other) = two_nodes
    monkeypatch.setattr(BadNodes, "left_out", lambda self: [left_out])
    stand_in.tell(tmp_path, seconds=1)
    resources = {"executor": executor, "num_workers": 1, "gpus_per_worker": 0}
    recipe = stand_in.make_recipe(3, baselines={}, max_concurrent_trials=1, resources=resources)
    ran = []

    def on_event(event):
        if isinstance(event, TrialEpoch) and (live := read_live(tmp_path / "study").get(event.spec.training)):
            ran.append(live.node)

    run_search(recipe, tmp_path / "study", address, on_event, Runner(stand_in.prepare, stand_in.train))
    assert set(ran) == {other}
