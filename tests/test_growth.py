"""Clusters that grow and shrink: how many trainings run then, and real nodes that come and go."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import killed_searches
import pytest
import ray
import stand_in
from ray.cluster_utils import Cluster
from test_driver import Tune

from carft_ray.errors import ClusterError, InterruptedRunError
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import (
    ConcurrencyChanged,
    Note,
    Preparing,
    Started,
    TrialEpoch,
    TrialFinished,
    TrialStarted,
)
from carft_ray.launch.failures.causes import STARTED_LATE
from carft_ray.launch.ray_cluster.cluster import nodes_now, running_ray
from carft_ray.launch.ray_cluster.concurrency import AtATime, Capacity, Node, capacity_of, held_by_others, node_of
from carft_ray.launch.ray_cluster.growth import await_nodes
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.layout import STOP
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running

HERE = Path(__file__).parent
SIZES = {"object_store_memory": 10**8}
HEAD, GPU_NODE = Node(0, 0), Node(8, 2)


@pytest.mark.parametrize(
    ("nodes", "may_grow", "recipe", "found", "reason"),
    [
        # from zero workers one trial waits
        ([HEAD], True, {}, (0, 1), "no node for a trial, which needs 1 x 1 CPU; nodes for 1 are asked for"),
        ([HEAD], True, {"gpus_per_worker": 1}, (0, 1), "no node for a trial, which needs 1 x 1 CPU and 1 x 1 GPU; "
         "nodes for 1 are asked for"),
        ([GPU_NODE], True, {}, (2, 1), "2 GPUs, 1 a trial; nodes for 1 more are asked for"),
        ([GPU_NODE], False, {}, (2, 0), "2 GPUs, 1 a trial"),
        # where the recipe says how many are wanted, as many wait as run
        ([HEAD], True, {"max_concurrent_trials": 6}, (0, 1), "no node for a trial, which needs 1 x 1 CPU; nodes for 1 "
         "are asked for"),
        ([GPU_NODE], True, {"max_concurrent_trials": 6}, (2, 2), "2 GPUs, 1 a trial; nodes for 2 more are asked for"),
        ([GPU_NODE], True, {"max_concurrent_trials": 3}, (2, 1), "2 GPUs, 1 a trial; nodes for 1 more are asked for"),
        ([GPU_NODE], True, {"max_concurrent_trials": 1}, (1, 0), "search.max_concurrent_trials"),
        # of one kind
        ([Node(8, 2, "H100"), Node(8, 8, "T4")], False, {"accelerator": "H100"}, (2, 0), "2 GPUs, 1 a trial"),
        ([Node(8, 8, "T4")], True, {"accelerator": "H100"}, (0, 1), "no node for a trial, which needs 1 x 1 CPU and "
         "1 x 1 GPU of kind H100; nodes for 1 are asked for"),
    ],
)  # fmt: skip
def test_a_trial_waits_for_nodes_where_a_cluster_may_grow(nodes, may_grow, recipe, found, reason):
    wanted = recipe.pop("max_concurrent_trials", None)
    recipe = stand_in.make_recipe(max_concurrent_trials=wanted, resources=recipe)
    capacity = capacity_of(recipe, tuple(nodes), may_grow)
    assert (capacity.concurrency, capacity.asked, capacity.reason) == (*found, reason)


@pytest.mark.parametrize(
    ("nodes", "resources", "told"),
    [
        ([HEAD, GPU_NODE], {"num_workers": 3}, "resources: a trial needs 3 x 4 CPUs and 3 x 1 GPU, but got "
         "8 CPUs and 2 GPUs in all"),
        ([Node(8, 2, "A100")], {"accelerator": "H100"}, "resources.accelerator: must be a kind of accelerator "
         "that a node of the cluster has, but got H100; did you mean 'A100'? (allowed: A100)"),
    ],
)  # fmt: skip
def test_a_trial_that_fits_on_no_node_of_a_fixed_cluster_is_refused(nodes, resources, told):
    with pytest.raises(ClusterError) as caught:
        capacity_of(stand_in.make_recipe(resources=resources), tuple(nodes))
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("nodes", "may_grow", "resources", "found", "reason"),
    [
        ([Node(4, 0, "", 1)], False, {}, (3, 0), "3 of 4 CPUs, others hold the rest, 1 a trial"),
        # CPUs go by what there is, so that a trial is the same one whoever else is there
        ([Node(8, 2, "", 0, 1)], False, {}, (1, 0), "1 of 2 GPUs, others hold the rest, 1 a trial"),
        ([Node(8, 2, "", 8, 0)], False, {}, (0, 1), "0 of 8 CPUs, others hold the rest, 4 a trial; one waits"),
        ([Node(2, 0, "", 2)], True, {}, (0, 1), "0 of 2 CPUs, others hold the rest, 1 a trial; nodes for 1 are asked "
         "for"),
        ([Node(2, 0, "", 1), Node(2, 0)], False, {"num_workers": 2}, (1, 0), "3 of 4 CPUs, others hold the rest, "
         "2 a trial"),
        # half of a GPU that another one holds leaves the other half
        ([Node(8, 2, "", 0, 0.5)], False, {"gpus_per_worker": 0.5, "cpus_per_worker": 1}, (3, 0),
         "1.5 of 2 GPUs, others hold the rest, 0.5 a trial"),
    ],
)  # fmt: skip
def test_what_others_hold_of_a_cluster_is_left_to_them(nodes, may_grow, resources, found, reason):
    capacity = capacity_of(stand_in.make_recipe(resources=resources), tuple(nodes), may_grow)
    assert (capacity.concurrency, capacity.asked, capacity.reason) == (*found, reason)
    alone = capacity_of(stand_in.make_recipe(resources=resources), tuple(Node(*node_of_all(node)) for node in nodes))
    assert capacity.worker_resources == alone.worker_resources
    assert capacity.one_node == alone.one_node


def node_of_all(node):
    return node.num_cpus, node.num_gpus, node.accelerator


def test_what_is_not_free_and_not_in_a_group_of_the_job_is_held_by_others():
    groups = {"CPU_group_ab01000000": 1.0, "CPU_group_0_ab01000000": 1.0, "CPU_group_cd02000000": 2.0}
    there = {"CPU": 8.0, "GPU": 2.0, "GPU_group_ab01000000": 1.0, **groups}
    assert held_by_others({"CPU": 4.5}, there, "01000000") == {"CPU": 2.5, "GPU": 1.0}
    assert held_by_others({"CPU": 7.0, "GPU": 1.0}, there, "01000000") == {"CPU": 0.0, "GPU": 0.0}


@pytest.mark.slow
def test_a_search_beside_another_driver_takes_what_that_leaves_and_more_when_it_has_ended(tmp_path, monkeypatch):
    stand_in.tell(tmp_path, seconds=0.2)
    hold = tmp_path / "base" / "hold"
    hold.touch()
    recipe = stand_in.make_recipe(6, baselines={}, resources={"gpus_per_worker": 0})
    with killed_searches.cluster(2) as (address, auth), contextlib.ExitStack() as others:
        for name, value in auth.items():
            monkeypatch.setenv(name, value)
        others.enter_context(killed_searches.occupied(1, address, auth))
        events, seen = [], []

        def on_event(event):
            events.append(event)
            if isinstance(event, TrialEpoch) and not seen:  # one runs, and holds what it has itself
                seen.append(nodes_now())
                others.close()
            if isinstance(event, ConcurrencyChanged):
                hold.unlink(missing_ok=True)

        result = run_search(recipe, tmp_path / "study", address, on_event, RUNNER)
        [started] = [event for event in events if isinstance(event, Started)]
        assert (started.concurrency, started.reason) == (1, "1 of 2 CPUs, others hold the rest, 1 a trial")
        assert seen == [(Node(2, 0, "", 1),)]
        assert changes(events) == [(2, "2 CPUs, 1 a trial")]
        assert [row.outcome for row in result.trials] == ["complete"] * 6


@pytest.mark.slow
def test_a_search_on_a_cluster_that_another_driver_holds_waits_for_it_and_says_so(tmp_path, monkeypatch):
    recipe = stand_in.make_recipe(2, baselines={}, resources={"gpus_per_worker": 0})
    with killed_searches.cluster(1) as (address, auth), contextlib.ExitStack() as others:
        for name, value in auth.items():
            monkeypatch.setenv(name, value)
        others.enter_context(killed_searches.occupied(1, address, auth))
        told = []

        def on_event(event):
            if isinstance(event, Preparing) and event.text.startswith("waiting: "):
                told.append(event.text)
                others.close()

        result = run_search(recipe, tmp_path / "study", address, on_event, RUNNER)
    assert told == ["waiting: 0 of 1 CPU, others hold the rest, 1 a trial; one waits"]
    assert [row.outcome for row in result.trials] == ["complete"] * 2


def test_a_kind_of_accelerator_is_asked_of_ray():
    capacity = capacity_of(stand_in.make_recipe(resources={"accelerator": "H100"}), (Node(8, 1, "H100"),))
    assert capacity.worker_resources == {"CPU": 8, "GPU": 1, "accelerator_type:H100": 0.001}
    there = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100_group_0_ab12": 1.0, "accelerator_type:H100": 1.0}
    assert node_of(there) == Node(8, 1, "H100")


def test_where_no_node_comes_a_command_says_how_it_would_wait(tmp_path):
    recipe = stand_in.make_recipe(resources={"num_workers": 3})
    with pytest.raises(ClusterError, match="a trial needs 3 x 1 CPU, but got 2 CPUs and 0 GPUs in all") as caught:
        await_nodes(recipe, (Node(2, 0),), False, tmp_path, pytest.fail)
    assert str(caught.value).endswith("resources.wait_for_nodes=10m waits for nodes that are yet to be added.")


class Changing:
    """A cluster that a driver follows; what it says may be set."""

    def __init__(self):
        self.fits, self.asked = 2, 0

    def __call__(self):
        return Capacity(self.fits, f"{self.fits} CPUs", 1, 1.0, 0.0, one_node=self.fits > 1, asked=self.asked)


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """Gives a function that makes a search of 12 trials on a cluster that changes."""
    monkeypatch.setattr("carft_ray.launch.ray_cluster.concurrency.COUNT_EVERY_S", 0.0)
    with open_study(tmp_path / "study", stand_in.make_recipe(12, baselines={})) as study:
        recover_running(study)

        def make(on_change=lambda *change: None, **how):
            events, cluster = [], Changing()

            def changed(*change):
                on_change(*change)
                events.append(ConcurrencyChanged(*change))

            at_a_time = AtATime(2, 0, "2 CPUs", True, cluster, changed)
            tune = Tune(Driver(study, at_a_time, events.append, **how))
            tune.events, tune.cluster = events, cluster
            return tune

        yield make


def changes(events):
    return [(event.concurrency, event.reason) for event in events if isinstance(event, ConcurrencyChanged)]


@pytest.mark.slow
def test_trainings_at_a_time_follow_the_nodes(followed):
    tune = followed()
    running = [tune.start(), tune.start()]
    assert tune.start() is None
    tune.cluster.fits, tune.cluster.asked = 3, 1
    tune.look()
    running += [tune.start(), tune.start()]
    assert tune.start() is None  # three run, one waits
    assert running[-1].config["one_node"]
    tune.cluster.fits, tune.cluster.asked = 1, 0
    tune.look()
    assert tune.driver.at_a_time.concurrency == 3  # it may be a group of its own, half made
    tune.look()
    for trial in running[:3]:
        tune.finish(trial)
        assert tune.start() is None  # fewer from now on
    tune.finish(running[3])
    assert not tune.start().config["one_node"]
    assert changes(tune.events) == [(3, "3 CPUs"), (1, "1 CPUs")]


def test_without_any_node_one_trial_waits(followed):
    tune = followed()
    tune.cluster.fits = 0
    tune.look()
    tune.look()
    assert tune.start() is not None
    assert tune.start() is None
    assert tune.driver.at_a_time.concurrency == 0


def test_where_memory_was_full_the_same_share_of_a_larger_cluster_is_used(followed):
    tune = followed()
    first, _ = tune.start(), tune.start()
    tune.end(first, "no memory was left on node 10.0.0.7 (7GB of 8GB used)")
    assert changes(tune.events) == [(1, "memory was full")]
    for fits, at_a_time in ((2, 1), (8, 4), (1, 1), (0, 0), (3, 1)):
        tune.cluster.fits, tune.cluster.asked = fits, 1
        tune.look()
        tune.look()
        assert (tune.driver.at_a_time.concurrency, tune.driver.at_a_time.asked) == (at_a_time, 0)
    assert changes(tune.events)[-1] == (1, "memory was full; 3 would fit")


@pytest.mark.slow
def test_workers_that_did_not_come_in_time_have_waited_and_are_no_loss(followed):
    tune = followed()
    for _ in range(30):  # more often than anything may be lost
        tune.end(tune.start(), f"The {STARTED_LATE} after 900 seconds")
    assert tune.driver.failure is None
    assert not tune.driver.study.set_aside()
    told = [event.text for event in tune.events if isinstance(event, Note)]
    assert len(told) == 30
    assert " waits again: The worker group startup timed out after 900 seconds" in told[0]


@pytest.mark.slow
def test_half_of_a_large_cluster_may_go_at_once(followed):
    tune = followed()
    tune.cluster.fits = 8
    tune.look()
    running = [tune.start() for _ in range(8)]
    tune.cluster.fits = 1
    tune.look()
    for trial in running:
        tune.die(trial)
    assert tune.driver.failure is None


def test_what_waits_holds_no_gpu_and_keeps_no_search_from_its_end(followed):
    tune = followed(gpus=4.0, on_change=lambda *change: told.append(change))
    told = []
    runs = tune.start()
    waits = tune.driver.propose("waits")
    for attempt in tune.driver._attempts.values():
        attempt.began -= 1000
    (tune.driver.study.study_dir / STOP).write_text("asked\n")
    tune.look()
    assert not tune.driver.only_waits  # one writes its checkpoint
    tune.end(runs)
    assert tune.driver.only_waits
    tune.driver.end_waiting()
    assert tune.driver.live == []
    assert 4000 < tune.driver.study.gpu_seconds() < 4100
    assert [row.outcome for row in tune.driver.study.rows() if row.name == waits.name] == ["running"]


def test_a_group_that_waits_for_its_workers_is_given_up_some_time_after_a_stop(followed):
    tune = followed(gpus=1.0, leaks=type("None", (), {"check": lambda self, live: 0})())
    tune.start()
    for attempt in tune.driver._attempts.values():
        attempt.began -= 1000
    (tune.driver.study.study_dir / STOP).write_text("asked\n")
    tune.look()
    assert not tune.driver.only_waits
    tune.driver._stopping_since -= 100
    assert tune.driver.only_waits
    tune.driver.end_waiting()
    assert tune.driver.study.gpu_seconds() == 0


RUNNER = Runner(stand_in.prepare, stand_in.train)
PYTHONPATH = os.pathsep.join([str(HERE.parent), str(HERE)])


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of a head without CPUs, which notices soon that a node is gone."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    for name, value in {"initial_delay_ms": 0, "period_ms": 500, "failure_threshold": 2}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SIZES})
    yield cluster
    cluster.shutdown()


class Hands:
    """Adds a node when a search waits for the first, another one later, and then takes that away."""

    def __init__(self, cluster, study_dir):
        self.cluster, self.study_dir = cluster, study_dir
        self.events, self.nodes, self.seen = [], [], []

    def __call__(self, event):
        self.events.append(event)
        ended = isinstance(event, TrialFinished)
        if (isinstance(event, Preparing) and event.text.startswith("waiting: ")) or (ended and len(self.nodes) == 1):
            self.seen.append(read_study(self.study_dir).at_a_time)
            self.nodes.append(self.cluster.add_node(num_cpus=1, **SIZES))
        elif ended and len(self.nodes) == 2 and read_study(self.study_dir).at_a_time[0] == 2:
            self.seen.append(read_study(self.study_dir).at_a_time)
            self.cluster.remove_node(self.nodes[1], allow_graceful=False)
            self.nodes.append(None)

    def __reduce__(self):
        """Tune writes it to a file that nobody reads."""
        return list, ()


@pytest.mark.slow
@pytest.mark.nodes
def test_trainings_follow_nodes_that_are_added_and_removed_by_hand(tmp_path, cluster):
    """From no node to one, to two, and back to one."""
    stand_in.tell(tmp_path, seconds=1)
    resources = {"gpus_per_worker": 0, "wait_for_nodes": 60}
    recipe = stand_in.make_recipe(12, baselines={}, resources=resources)
    hands = Hands(cluster, tmp_path / "study")
    result = run_search(recipe, tmp_path / "study", cluster.address, hands, RUNNER)
    events = hands.events
    assert [row.outcome for row in result.trials] == ["complete"] * 12
    assert [event.concurrency for event in events if isinstance(event, Started)] == [1]
    assert [number for number, _ in changes(events)] == [2, 1]
    assert hands.seen == [
        (0, "no node for a trial, which needs 1 x 1 CPU; nodes for 1 are asked for"),
        (1, "1 CPU, 1 a trial"),
        (2, "2 CPUs, 1 a trial"),
    ]
    assert read_study(tmp_path / "study").at_a_time is None


@pytest.mark.slow
@pytest.mark.nodes
@pytest.mark.parametrize("executor", ["inline", "ray-train"])
def test_a_stop_ends_a_search_that_waits_for_nodes(tmp_path, monkeypatch, cluster, executor):
    """At its beginning, where its patience ends it, too, and later, when a trial waits for a node that never comes."""
    monkeypatch.setattr("carft_ray.launch.driver.STOP_WAITING_AFTER_S", 3.0)
    stand_in.tell(tmp_path, seconds=1)
    resources = {"gpus_per_worker": 0, "wait_for_nodes": 60, "executor": executor}
    recipe = stand_in.make_recipe(9, baselines={}, resources=resources)

    def stopped_by(event):
        if isinstance(event, Preparing) and event.text.startswith("waiting: "):
            (tmp_path / "study" / STOP).write_text("asked\n")

    short = stand_in.make_recipe(resources={**resources, "wait_for_nodes": 1})
    told = "resources.wait_for_nodes: after 1 s there is no node for a trial, which needs 1 x 1 CPU"
    with pytest.raises(ClusterError, match=told):
        run_search(short, tmp_path / "short", cluster.address, runner=RUNNER)

    with pytest.raises(InterruptedRunError, match="stopped; 0 of 9 trials finished"):
        run_search(recipe, tmp_path / "study", cluster.address, stopped_by, RUNNER)

    cluster.add_node(num_cpus=1, **SIZES)
    monkeypatch.setattr("carft_ray.launch.session.may_grow", lambda: True)
    started = []

    def stopped_later(event):
        started.extend([event] if isinstance(event, TrialStarted) else [])
        if isinstance(event, TrialFinished):
            (tmp_path / "study" / STOP).write_text("asked\n")

    with pytest.raises(InterruptedRunError, match="stopped; 1 of 9 trials finished"):
        run_search(recipe, tmp_path / "study", cluster.address, stopped_later, RUNNER)
    assert groups_left(cluster.address) == []


def groups_left(address):
    """Returns the placement groups that stay, as another driver sees them: Ray removes those of one that has ended."""
    gone_by = time.monotonic() + 30
    with running_ray(address, Path(os.devnull)):
        while groups := [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]:
            if time.monotonic() >= gone_by:
                break
            time.sleep(0.5)
        return groups


HEAD_TYPE, FAKE_HEAD = "ray.head.default", "f" * 51 + "00000"  # as Ray's provider of nodes for tests knows the head


@contextlib.contextmanager
def autoscaling_head(folder, version):
    """Starts a head without CPUs whose autoscaler may start two nodes with a CPU; gives its address."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    lists = ["cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"]
    lists += [f"{who}setup_commands" for who in ("", "head_", "worker_")]
    lists += [f"{who}_start_ray_commands" for who in ("head", "worker")]
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            **dict.fromkeys(
                ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check", "launch_multiple"), True
            ),
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 10**8},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "head_node_type": HEAD_TYPE,
        **{name: {} for name in ("docker", "auth", "file_mounts")},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }
    folder.mkdir()
    (folder / "cluster.yaml").write_text(json.dumps(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(folder),
        "PYTHONPATH": PYTHONPATH,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
        "RAY_enable_autoscaler_v2": str(int(version == 2)),
    }
    options = {
        "port": port,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 0,
        "temp-dir": folder / "t",
        "object-store-memory": 10**8,
        "include-dashboard": "false",
        "include-log-monitor": "false",
        "autoscaling-config": folder / "cluster.yaml",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        started_by = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < started_by, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.nodes
@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_starts_the_nodes_of_a_search_from_none_and_ends_them(tmp_path_factory, version):
    """Ray's own autoscaler, with its provider for tests: nodes are processes of this machine."""
    base_dir = tmp_path_factory.mktemp("a")
    stand_in.tell(base_dir, seconds=1.5)
    recipe, events = stand_in.make_recipe(6, baselines={}, resources={"gpus_per_worker": 0, "wait_for_nodes": 60}), []
    with short_folder() as folder, autoscaling_head(folder / "h", version) as address:
        result = run_search(recipe, base_dir / "study", address, events.append, RUNNER)
        assert [row.outcome for row in result.trials] == ["complete"] * 6
        waits = [event.text for event in events if isinstance(event, Preparing) and event.text.startswith("waiting")]
        assert waits == ["waiting: no node for a trial, which needs 1 x 1 CPU; nodes for 1 are asked for"]
        [started] = [event for event in events if isinstance(event, Started)]
        told = (2, "2 CPUs, 1 a trial; nodes for 1 more are asked for")
        assert told in [(started.concurrency, started.reason), *changes(events)]
        with running_ray(address, folder / "ray.log"):
            gone_by = time.monotonic() + 60
            while any(node.num_cpus for node in nodes_now()):
                assert time.monotonic() < gone_by, "the nodes stay"
                time.sleep(0.5)


@contextlib.contextmanager
def short_folder():
    """Gives a folder whose path is short enough for the sockets of Ray."""
    folder = Path(tempfile.mkdtemp(prefix="cg-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
