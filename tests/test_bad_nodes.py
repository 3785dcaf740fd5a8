"""Nodes that are left out, with a real Ray of two nodes."""

import os
from pathlib import Path

import pytest
import ray
import stand_in
from ray.cluster_utils import Cluster

from carft_ray.launch.ray_cluster.nodes import BadNodes
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner

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


def train_and_name_the_node(recipe, out_dir, prepared_dir, context, attempt):
    (out_dir / "node").write_text(ray.get_runtime_context().get_node_id())
    return stand_in.train(recipe, out_dir, prepared_dir, context, attempt)


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_no_training_runs_on_a_node_that_is_left_out(tmp_path, monkeypatch, two_nodes, executor):
    address, (left_out, other) = two_nodes
    monkeypatch.setattr(BadNodes, "left_out", lambda self: [left_out])
    resources = {"executor": executor, "num_workers": 1, "gpus_per_worker": 0}
    recipe = stand_in.make_recipe(3, baselines={}, max_concurrent_trials=1, resources=resources)
    run_search(recipe, tmp_path / "study", address, runner=Runner(stand_in.prepare, train_and_name_the_node))
    ran = [path.read_text() for path in tmp_path.glob("study/trials/*/node")]
    assert ran == [other] * 3
