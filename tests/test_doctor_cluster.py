"""The doctor on a cluster: what a node finds on itself, how that is judged, and real nodes that do not see the same."""

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
from carft_ray import __version__, environment
from carft_ray.launch.cluster import node_doctor
from carft_ray.launch.cluster.doctor import Diagnosis
from carft_ray.launch.cluster.node_doctor import NodeReport, collective, judge
from carft_ray.ui.console import node_table

VERSIONS = environment.versions()


def healthy(**machine):
    """What a machine finds on which nothing is wrong, with some of it changed."""
    found = {
        "gpus": 0,
        "memory_gb": 64.0,
        "cache_dir": "/disk",
        "cache_free_gb": 900.0,
        "versions": VERSIONS,
        "source": environment.source_digest(),
    }
    assert machine.keys() <= found.keys()
    return Diagnosis(machine={**found, **machine})


def report(name="10.0.0.2", resources=None, fault="", **machine):
    return NodeReport(name, "f" * 56, resources or {"CPU": 8}, None if fault else healthy(**machine), fault)


def told(one):
    return [(found.level, str(found.problem)) for found in judge([one], healthy())]


def versions(**changed):
    return VERSIONS | changed


GPU = {"CPU": 8, "GPU": 2}
BAD = [
    ("error", report(fault="no answer within 60 s"), f"run the checks of carft-ray {__version__}, but got no answer"),
    ("warning", report(source="0" * 16), "has different files of carft-ray than the driver, with the same version"),
    ("warning", report(versions=versions(scipy=None)), f"scipy {VERSIONS['scipy']}, like the driver: results may"),
    ("warning", report(versions=versions(optuna="4.0.0")), f"should have optuna {VERSIONS['optuna']}, like the driver"),
    (
        "warning",
        report(versions=versions(python="3.10.1")),
        f"should have python {VERSIONS['python']}, like the driver",
    ),
    ("warning", report(cache_free_gb=2.0), "should have 5 GB free for the cache, but got 2 GB at /disk"),
    ("error", report(cache_free_gb=0.1), "should have 5 GB free for the cache, but got 0.1 GB at /disk"),
    ("warning", report(gpus=1), "offers none of its GPUs to Ray: 1"),
    ("error", report(resources=GPU, gpus=1), "must see the 2 GPUs that it offers to Ray, but got 1 by torch"),
]


@pytest.mark.parametrize(("level", "one", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_what_is_wrong_on_a_node_is_told_with_its_value_and_a_remedy(level, one, text):
    [found] = [each for each in told(one) if text in each[1]]
    assert found[0] == level
    assert "\n    " in found[1], "the next step"


def test_nothing_is_told_of_a_healthy_node():
    assert told(report()) == []
    build = f"{VERSIONS['torch'].partition('+')[0]}+cu130"
    assert told(report(resources=GPU, gpus=2, versions=versions(torch=build))) == []


def test_what_only_the_node_finds_is_told_with_its_place():
    here, there = healthy(), report()
    for one in (here, there.found):
        one.add("warning", "", "is so on every machine")
    there.found.add("error", "data.train.path", "must be an existing folder", "/images")
    there.found.add("note", "model", "is good to know")
    assert [found.level for found in judge([], here)] == ["warning"]  # no node has come yet
    [found] = judge([there], here)
    assert str(found.problem) == "node 10.0.0.2: data.train.path: must be an existing folder, but got /images"


def test_nodes_with_the_same_fault_share_one_message_and_errors_stand_first():
    reports = [report("10.0.0.4", gpus=1)]
    reports += [report(f"10.0.0.{each}", cache_free_gb=0.1) for each in (2, 3)]
    both = "2 nodes (10.0.0.2, 10.0.0.3)"
    found = [(one.level, one.problem.place) for one in judge(reports, healthy())]
    assert found == [("error", both), ("warning", "node 10.0.0.4")]
    assert node_table([*reports, report("10.0.0.5", fault="no answer within 60 s")]).row_count == 4


def test_a_trial_of_one_worker_needs_no_collective():
    two = [report(), report("10.0.0.3")]
    assert node_doctor.check_collective(two, stand_in.make_recipe(1), pytest.fail) == []
    recipe = stand_in.make_recipe(1, resources={"num_workers": 2, "executor": "ray-train"})
    assert node_doctor.check_collective(two[:1], recipe, pytest.fail) == []


@pytest.mark.parametrize(("gpus", "backend"), [(None, "nccl"), (0.5, "nccl"), (0, "gloo")])
def test_nodes_with_gpus_are_checked_with_the_collective_that_trials_use(monkeypatch, gpus, backend):
    asked, said = [], []
    monkeypatch.setattr(node_doctor, "_submit", lambda node, function, *given: asked.append(given[0]))
    monkeypatch.setattr(node_doctor, "_answers", lambda tasks, within_s: ["" for _ in tasks])
    resources = {"num_workers": 2, "executor": "ray-train", "gpus_per_worker": gpus}
    two = [report(resources=GPU, gpus=2), report("10.0.0.3", resources=GPU, gpus=2)]
    assert node_doctor.check_collective(two, stand_in.make_recipe(1, resources=resources), said.append) == []
    assert asked == [backend] * 2
    assert said == [f"running a collective over 2 nodes ({backend})"]


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


def test_an_address_where_no_node_can_be_asked_is_told(capsys):
    recipe = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"
    for address, told in (
        ("http://10.0.0.1:8265", "ray job submit --address http://10.0.0.1:8265 -- carft-ray doctor"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
    ):
        assert crash_host.call(["doctor", recipe, "--address", address]) == 5
        assert told in capsys.readouterr().err


@pytest.mark.nodes
def test_nodes_that_do_not_see_the_same_are_told_apart(tmp_path):
    """One node has no disk with the images and the model, one has an older carft-ray; two are well."""
    disk, recipe = tmp_path / "disk", tmp_path / "recipe.yaml"
    short_training.make(disk)
    text = (disk / "recipe.yaml").read_text()
    recipe.write_text(text.replace("local-dir:", "local-dir:disk/").replace("path: images", "path: disk/images"))
    older = tmp_path / "older" / "carft_ray"
    older.mkdir(parents=True)
    (older / "__init__.py").write_text('__version__ = "0.0.9"\n')

    def ask(*words):
        command = [sys.executable, "-m", "carft_ray.cli", "doctor", recipe, "--address", first.address, *words]
        return subprocess.run(command, cwd=tmp_path, env=first.environment, capture_output=True, text=True, timeout=300)

    with (
        cluster.head(num_cpus=1) as first,
        cluster.node(first, hidden=(disk,)) as blind,
        cluster.node(first, PYTHONPATH=str(older.parent)) as old,
        cluster.node(first, num_cpus=2, XDG_CACHE_HOME=str(tmp_path / "cache")) as seeing,
    ):
        done = ask("--json")
        assert done.returncode == 5, done.stderr
        data = json.loads(done.stdout)
        assert not data["healthy"]
        nodes = {one["node_id"]: one for one in data["nodes"]}
        assert nodes.keys() == {one.node_id for one in (first, blind, old, seeing)}
        caches = [nodes[one.node_id]["found"]["machine"]["cache_dir"] for one in (seeing, blind)]
        assert caches[0] == str(tmp_path / "cache" / "carft-ray") != caches[1]
        place, another = (f"node {nodes[one.node_id]['name']}: " for one in (blind, old))
        errors = [one["text"].partition("\n")[0] for one in data["findings"] if one["level"] == "error"]
        assert f"{another}must run the checks of carft-ray {__version__}, but got carft-ray 0.0.9" in errors
        missing = [text for text in errors if text.startswith(place)]
        assert len(missing) == len(errors) - 1
        for each in ("data.train", "data.id_val", "data.ood_val.sketch", "model.name"):
            assert any(text.startswith(place + each) for text in missing), errors
        assert sorted(path.name for path in disk.iterdir()) == ["images", "model", "recipe.yaml"]

        blind.kill()
        old.kill()
        cluster.wait_until(lambda: len(cluster.alive(first)) == 2, "the cluster notices the loss")
        done = ask("--set", "resources.num_workers=2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "running a collective over 2 nodes (gloo)" in done.stderr
        assert "ood_val.sketch" in done.stdout
