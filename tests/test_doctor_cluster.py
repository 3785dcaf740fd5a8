"""The doctor on a cluster: what a node finds on itself, how that is judged, and real nodes that do not see the same."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import attempts
import crash_host
import pytest
import short_training
import stand_in
from torch.distributed import TCPStore

import cluster
from carft_ray import environment
from carft_ray.launch.ray_cluster import checkup, node_facts
from carft_ray.launch.ray_cluster.checkup import LIBRARIES, NodeReport, judge, recipe_paths
from carft_ray.launch.ray_cluster.node_facts import collective
from carft_ray.recipe.loading import load_recipe
from carft_ray.ui.console import node_table

HERE = {"python": environment.versions()["python"], **environment.versions_of(LIBRARIES)}
GB = 10**9
GPU = {"name": "NVIDIA H100", "total_bytes": 80 * GB, "free_bytes": 79 * GB}


def healthy(**facts):
    """What a node finds on which nothing is wrong, with some of it changed."""
    code = environment.code()
    found = {
        "versions": HERE,
        "carft_ray": {"version": code["version"], "source": code["source"], "fault": ""},
        "gpus": [],
        "missing": {},
        "cache": {"path": "/disk", "fault": "", "free_bytes": 900 * GB},
    }
    assert facts.keys() <= found.keys()
    return {**found, **facts}


def report(name="10.0.0.2", resources=None, fault="", **facts):
    return NodeReport(name, "f" * 56, resources or {"CPU": 8}, None if fault else healthy(**facts), fault)


def told(one):
    return [(found.level, str(found.problem)) for found in judge([one])]


def space(free_gb):
    return {"path": "/full", "fault": "", "free_bytes": free_gb * GB}


def versions(**changed):
    return HERE | changed


OURS = environment.code()["version"]
OTHER_CODE = {"version": OURS, "source": "0" * 16, "fault": ""}
NO_CODE = {"version": "", "source": "", "fault": "ModuleNotFoundError: No module named 'carft_ray'"}
LOST = {"data.train.path": {"path": "/images", "fault": "No such file or directory"}}
LOST |= {"data.id_val.path": LOST["data.train.path"]}
BAD = [
    ("error", report(fault="no answer within 60 s"), "must run a task, but got no answer within 60 s"),
    ("error", report(carft_ray=NO_CODE), f"must have carft-ray {OURS}, like the driver, but got ModuleNotFound"),
    ("error", report(carft_ray=OTHER_CODE | {"version": "0.0.9"}), f"must have carft-ray {OURS}, like the driver"),
    (
        "warning",
        report(carft_ray=OTHER_CODE),
        "has different files of carft-ray than the driver, with the same version",
    ),
    ("error", report(versions=versions(torch=None)), f"must have torch {HERE['torch']}, like the driver, but got"),
    ("warning", report(versions=versions(optuna="4.0.0")), f"should have optuna {HERE['optuna']}, like the driver"),
    ("warning", report(versions=versions(python="3.10.1")), f"should have python {HERE['python']}, like the driver"),
    ("error", report(missing=LOST), "data.train.path: /images: No such file or directory; data.id_val.path: /images"),
    ("error", report(cache=space(9) | {"fault": "Read-only file system"}), "must be able to write the cache of images"),
    ("warning", report(cache=space(2)), "should have 5 GB free for the cache of images, but got 2 GB at /full"),
    ("error", report(cache=space(0.1)), "should have 5 GB free for the cache of images, but got 0.1 GB at /full"),
    ("warning", report(gpus=[GPU]), "offers none of its GPUs to Ray: 1 by nvidia-smi"),
    ("error", report(resources={"CPU": 8, "GPU": 2}, gpus=[GPU], versions=versions(torch="1")), "must have the 2 GPUs"),
    ("error", report(resources={"CPU": 1, "GPU": 1}, gpus=[GPU], versions=versions(torch="1+cpu")), "torch with CUDA"),
]


@pytest.mark.parametrize(("level", "one", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_what_is_wrong_on_a_node_is_told_with_its_value_and_a_remedy(level, one, text):
    [found] = [each for each in told(one) if text in each[1]]
    assert found[0] == level
    assert "\n    " in found[1], "the next step"


def test_nothing_is_told_of_a_healthy_node():
    assert told(report()) == []
    build = f"{HERE['torch'].partition('+')[0]}+cu130"
    assert told(report(resources={"CPU": 8, "GPU": 1}, gpus=[GPU], versions=versions(torch=build))) == []
    assert [level for level, _ in told(report(resources={"GPU": 0}, missing=LOST))] == ["note"]  # it takes no trial


def test_nodes_with_the_same_fault_share_one_message_and_errors_stand_first():
    reports = [report("10.0.0.4", gpus=[GPU])]
    reports += [report(f"10.0.0.{each}", cache=space(0.1)) for each in (2, 3)]
    both = "2 nodes (10.0.0.2, 10.0.0.3)"
    found = [(one.level, one.problem.place) for one in judge(reports)]
    assert found == [("error", both), ("warning", "node 10.0.0.4")]


def test_what_is_sent_to_nodes_imports_the_standard_library_alone():
    """Else a node without carft-ray could not say so."""
    nodes = ast.walk(ast.parse(Path(node_facts.__file__).read_text()))
    tops = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0]
    names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_node_finds_what_this_machine_has(tmp_path):
    paths = {"data.train.path": str(tmp_path), "model.name": str(tmp_path / "gone")}
    asked = {"libraries": LIBRARIES, "paths": paths, "cache_dir": str(tmp_path / "new")}
    facts = node_facts.node_facts(asked)
    assert facts.keys() == healthy().keys()
    assert facts["versions"] == HERE
    assert facts["missing"] == {"model.name": {"path": str(tmp_path / "gone"), "fault": "No such file or directory"}}
    assert facts["cache"]["fault"] == ""
    assert facts["carft_ray"]["source"] == environment.code()["source"]
    assert not (tmp_path / "new").exists()
    assert node_table([report(**facts), report("10.0.0.3", fault="no answer within 60 s")]).row_count == 2


def test_a_trial_of_one_worker_needs_no_collective():
    two = [report(), report("10.0.0.3")]
    assert checkup.check_collective(two, stand_in.make_recipe(1), pytest.fail) == []
    recipe = stand_in.make_recipe(1, resources={"num_workers": 2, "executor": "ray-train"})
    assert checkup.check_collective(two[:1], recipe, pytest.fail) == []


def test_the_table_of_nvidia_smi_is_read():
    found = node_facts.gpus_of("NVIDIA H100 80GB HBM3, 81559, 81072\nOrin, [N/A], [N/A]\n")
    assert [(one["name"], one["total_bytes"]) for one in found] == [
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20),
        ("Orin", None),
    ]


def one_of_two(rank, port, within_s):
    os._exit(0 if not collective("gloo", "127.0.0.1", port, rank, 2, within_s) else 3)


@pytest.mark.slow
def test_a_collective_that_all_nodes_take_part_in_is_well_and_one_that_lacks_a_node_is_told():
    for ranks, within_s, codes in (((0, 1), 300, [0, 0]), ((0,), 2, [3])):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        running = [attempts.forked(one_of_two, rank, store.port, within_s) for rank in ranks]
        for process in running:
            process.join()
        assert [process.exitcode for process in running] == codes


def test_every_path_of_a_recipe_is_looked_for(tmp_path):
    fog = "{source: corrupted, of: {source: folder, path: images}, corruptions: [fog], severity: 3}"
    (tmp_path / "r.yaml").write_text(
        "model: {name: ViT-B-32, pretrained: weights/b32.pt}\n"
        "data:\n"
        "  train: {source: webdataset, path: 'shards/train-{000..010}.tar'}\n"
        "  id_val: {source: folder, path: images, domains: [val], exclude: bad.csv}\n"
        f"  ood_val:\n    fog:\n      {fog}\n"
    )
    places = {"data.train.path": "shards", "data.id_val.path": "images", "data.id_val.exclude": "bad.csv"}
    places |= {"data.ood_val.fog.path": "images", "model.pretrained": "weights/b32.pt"}
    assert recipe_paths(load_recipe(tmp_path / "r.yaml")) == {key: f"{tmp_path}/{path}" for key, path in places.items()}


def test_an_address_where_no_node_can_be_asked_is_told(capsys):
    recipe = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"
    for address, told in (
        ("http://10.0.0.1:8265", "ray job submit --address http://10.0.0.1:8265 -- carft-ray doctor"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
    ):
        assert crash_host.call(["doctor", recipe, "--address", address]) == 5
        assert told in capsys.readouterr().err


MISSING = dict.fromkeys(("data.train.path", "data.id_val.path", "data.ood_val.sketch.path"), "images")
MISSING |= {"model.name": "model"}


@pytest.mark.nodes
def test_nodes_that_do_not_see_the_same_are_told_apart(tmp_path):
    """One node has no disk where the images and the model are, and an older carft-ray; then the driver."""
    disk, recipe = tmp_path / "disk", tmp_path / "recipe.yaml"
    short_training.make(disk)
    text = (disk / "recipe.yaml").read_text()
    recipe.write_text(text.replace("local-dir:", "local-dir:disk/").replace("path: images", "path: disk/images"))
    older = tmp_path / "older" / "carft_ray"
    older.mkdir(parents=True)
    (older / "__init__.py").write_text('__version__ = "0.0.9"\n')
    (older / "environment.py").write_text("def source_digest():\n    return ''\n")

    def ask(*words):
        command = [sys.executable, "-m", "carft_ray.cli", "doctor", recipe, "--address", first.address, *words]
        return subprocess.run(command, cwd=tmp_path, env=first.environment, capture_output=True, text=True, timeout=300)

    with (
        cluster.head(num_cpus=1) as first,
        cluster.node(first, hidden=(disk,), PYTHONPATH=str(older.parent)) as blind,
        cluster.node(first, num_cpus=2, XDG_CACHE_HOME=str(tmp_path / "cache")) as seeing,
    ):
        done = ask("--json")
        assert done.returncode == 5, done.stderr
        data = json.loads(done.stdout)
        assert not data["healthy"]
        nodes = {one["node_id"]: one for one in data["nodes"]}
        assert nodes.keys() == {one.node_id for one in (first, blind, seeing)}
        cache = nodes[seeing.node_id]["facts"]["cache"]["path"]
        assert cache == str(tmp_path / "cache" / "carft-ray") != nodes[blind.node_id]["facts"]["cache"]["path"]
        name = f"node {nodes[blind.node_id]['name']}: "
        assert sorted(one["text"].partition("\n")[0] for one in data["findings"] if one["level"] == "error") == [
            f"{name}must have carft-ray {OURS}, like the driver, but got 0.0.9",
            f"{name}must see what the recipe names, but got "
            + "; ".join(f"{place}: {disk}/{folder}: No such file or directory" for place, folder in MISSING.items()),
        ]
        assert sorted(path.name for path in disk.iterdir()) == ["images", "model", "recipe.yaml"]

        blind.kill()
        cluster.wait_until(lambda: len(cluster.alive(first)) == 2, "the cluster notices the loss")
        done = ask("--set", "resources.num_workers=2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "running a collective over 2 nodes (gloo)" in done.stderr
        assert "ood_val.sketch" in done.stdout
        assert nodes[first.node_id]["name"] in done.stdout
