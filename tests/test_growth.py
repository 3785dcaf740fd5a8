"""Clusters that grow and shrink: how many trainings run then, and real nodes that come and go."""

import contextlib
import itertools
import json
import re
from fractions import Fraction
from types import SimpleNamespace

import killed_searches
import pytest
import ray
import stand_in
from study_steps import searching
from tune_stand_in import Tune

import cluster
from carft_ray.errors import BudgetError, ClusterError
from carft_ray.launch import nodes
from carft_ray.launch.cluster.capacity import AtATime, Capacity, Node, capacity_of, held_by_others, node_of
from carft_ray.launch.cluster.cluster import nodes_now, running_ray
from carft_ray.launch.cluster.ray_errors import STARTED_LATE
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import ConcurrencyChanged, Preparing, Started, TrialEpoch
from carft_ray.launch.nodes import alive_nodes, await_nodes
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import STOP
from carft_ray.recipe.schema.recipe import with_keys

REST = "; each node or GPU has too little left"
OTHERS = ", others use the rest"
NONE = "no node for a trial, which needs 1 x 1 CPU"
ASKED = "; nodes for 1 are requested"


@pytest.mark.parametrize(
    ("nodes", "recipe", "concurrency", "one_node", "reason"),
    [
        ([(8, 2)], {}, 2, True, "2 GPUs, 1 per trial"),
        ([(8, 0)], {"max_concurrent_trials": 2}, 2, True, "search.max_concurrent_trials"),
        ([(2, 0), (2, 0)], {"num_workers": 4}, 1, False, "4 CPUs, 4 per trial"),  # over two nodes
        # Ray counts in ten-thousandths, and a share of a GPU lies on one GPU
        ([(8, 1)], {"gpus_per_worker": 0.2}, 5, True, "1 GPU, 0.2 per trial"),
        ([(64, 8)], {"gpus_per_worker": 0.3}, 24, True, "8 GPUs, 0.3 per trial" + REST),
        # what is left over on each node is of no use
        ([(3, 0), (3, 0)], {"num_workers": 2}, 2, True, "6 CPUs, 2 per trial" + REST),
        ([(3, 0)] * 5, {"cpus_per_worker": 2, "num_workers": 2}, 2, False, "15 CPUs, 4 per trial" + REST),
        # CPUs are what one node lacks, GPUs another
        ([(8, 1), (1, 8)], {"num_workers": 2}, 1, False, "9 GPUs, 2 per trial" + REST),
        # what others hold is left to them; CPUs go by what there is, so that a trial is the same one beside others
        ([(4, 0, "", 1)], {}, 3, True, f"3 of 4 CPUs{OTHERS}, 1 per trial"),
        ([(8, 2, "", 0, 1)], {}, 1, True, f"1 of 2 GPUs{OTHERS}, 1 per trial"),
        ([(8, 2, "", 8, 0)], {}, 0, True, f"0 of 8 CPUs{OTHERS}, 4 per trial; one waits"),
        ([(2, 0, "", 1), (2, 0)], {"num_workers": 2}, 1, True, f"3 of 4 CPUs{OTHERS}, 2 per trial"),
        ([(8, 2, "", 0, 0.5)], {"gpus_per_worker": 0.5}, 3, True, f"1.5 of 2 GPUs{OTHERS}, 0.5 per trial"),
        # of one kind
        ([(8, 2, "H100"), (8, 8, "T4")], {"accelerator": "H100"}, 2, True, "2 GPUs, 1 per trial"),
    ],
)  # fmt: skip
def test_concurrency_is_what_the_nodes_hold(nodes, recipe, concurrency, one_node, reason):
    capacity, alone = (capacity_for([node[:most] for node in nodes], recipe) for most in (5, 3))
    assert (capacity.concurrency, capacity.one_node, capacity.reason) == (concurrency, one_node, reason)
    assert (capacity.worker_resources, capacity.one_node) == (alone.worker_resources, alone.one_node)


def capacity_for(nodes, recipe, may_grow=False):
    resources = {key: value for key, value in recipe.items() if key != "max_concurrent_trials"}
    at_most = recipe.get("max_concurrent_trials")
    recipe = stand_in.make_recipe(max_concurrent_trials=at_most, resources=resources)
    return capacity_of(recipe, tuple(Node(*node) for node in nodes), may_grow)


def test_a_reason_without_a_rest_is_the_whole_reason():
    """As many as the reason's own division says, for all small clusters."""
    for sizes in itertools.product([(1, 0), (3, 1), (2, 3), (5, 2)], repeat=2):
        for cpus, gpus, workers in itertools.product((0.5, 1, 2), (0, 0.3, 0.5, 1, 2), (1, 2, 3)):
            if workers > 1 and 0 < gpus < 1:
                continue
            try:
                resources = {"cpus_per_worker": cpus, "gpus_per_worker": gpus, "num_workers": workers}
                capacity = capacity_for(sizes, resources)
            except ClusterError:
                continue
            found = re.fullmatch(rf"([\d.]+) [CG]PUs?, ([\d.]+) per trial({REST})?", capacity.reason)
            whole = Fraction(found[1]) // Fraction(found[2])
            assert capacity.concurrency < whole if found[3] else capacity.concurrency == whole


@pytest.mark.parametrize(
    ("nodes", "resources", "cpus", "concurrency"),
    [
        ([(64, 8)], {}, 8, 8),
        ([(20, 8)], {}, 2, 8),  # four cores are left
        ([(16, 1)], {"gpus_per_worker": 0.3}, 4, 3),
        ([(32, 4)], {"gpus_per_worker": 2}, 16, 2),
        ([(64, 4), (24, 4), (96, 0)], {}, 6, 8),  # every GPU of every node can be used
    ],
)
def test_a_worker_gets_the_cores_that_its_gpus_leave(nodes, resources, cpus, concurrency):
    capacity = capacity_for(nodes, resources)
    assert (capacity.cpus_per_worker, capacity.concurrency) == (cpus, concurrency)


@pytest.mark.parametrize(
    ("nodes", "recipe", "found", "reason"),
    [
        # from zero workers one trial waits
        ([(0, 0)], {}, (0, 1), NONE + ASKED),
        ([(8, 2)], {}, (2, 1), "2 GPUs, 1 per trial; nodes for 1 more are requested"),
        ([(2, 0, "", 2)], {}, (0, 1), f"0 of 2 CPUs{OTHERS}, 1 per trial{ASKED}"),
        # where the recipe says how many are wanted, as many wait as run
        ([(0, 0)], {"max_concurrent_trials": 6}, (0, 1), NONE + ASKED),
        ([(8, 2)], {"max_concurrent_trials": 6}, (2, 2), "2 GPUs, 1 per trial; nodes for 2 more are requested"),
        ([(8, 2)], {"max_concurrent_trials": 1}, (1, 0), "search.max_concurrent_trials"),
        ([(8, 8, "T4")], {"accelerator": "H100"}, (0, 1), f"{NONE} and 1 x 1 GPU of kind H100{ASKED}"),
    ],
)
def test_a_trial_waits_for_nodes_where_a_cluster_may_grow(nodes, recipe, found, reason):
    capacity = capacity_for(nodes, recipe, may_grow=True)
    assert (capacity.concurrency, capacity.asked, capacity.reason) == (*found, reason)


def test_a_trial_that_fits_on_no_node_of_a_fixed_cluster_is_refused_and_told_how_to_wait():
    told = "resources.accelerator: must be a kind of accelerator that a node of the cluster has, but got H100; did you"
    with pytest.raises(ClusterError, match=told) as caught:
        capacity_for([(8, 2, "A100")], {"accelerator": "H100"})
    assert caught.value.exit_code == 5
    assert await_nodes(stand_in.make_recipe(), (Node(2, 0),), False, None, pytest.fail) == (Node(2, 0),)
    recipe = stand_in.make_recipe(resources={"num_workers": 3})
    with pytest.raises(ClusterError, match="a trial needs 3 x 1 CPU, but got 2 CPUs and 0 GPUs in all") as caught:
        await_nodes(recipe, (Node(2, 0),), False, None, pytest.fail)
    assert str(caught.value).endswith("resources.wait_for_nodes=10m waits for nodes that are yet to be added.")


def test_the_wall_time_ends_a_search_that_waits_for_its_first_node(monkeypatch):
    monkeypatch.setattr(nodes, "nodes_now", lambda: ())
    monkeypatch.setattr(nodes.ray.util, "placement_group", lambda bundles, strategy: None)
    removed = []
    monkeypatch.setattr(nodes.ray.util, "remove_placement_group", removed.append)
    study = SimpleNamespace(log=SimpleNamespace(write=lambda record: None), stop=SimpleNamespace(asked=lambda: False))
    recipe = with_keys(stand_in.make_recipe(), budget={"wall_time": 1e-3})
    with pytest.raises(BudgetError, match=r"^the wall time is used up "):
        await_nodes(recipe, (), True, study, lambda text: None, 0.0)
    assert removed == [None]


def test_what_is_not_free_and_not_in_a_group_of_the_job_is_held_by_others():
    groups = {"CPU_group_ab01000000": 1.0, "CPU_group_0_ab01000000": 1.0, "CPU_group_cd02000000": 2.0}
    there = {"CPU": 8.0, "GPU": 2.0, "GPU_group_ab01000000": 1.0, **groups}
    assert held_by_others({"CPU": 4.5}, there, "01000000") == {"CPU": 2.5, "GPU": 1.0}
    assert held_by_others({"CPU": 7.0, "GPU": 1.0}, there, "01000000") == {"CPU": 0.0, "GPU": 0.0}


def test_a_kind_of_accelerator_is_asked_of_ray():
    capacity = capacity_of(stand_in.make_recipe(resources={"accelerator": "H100"}), (Node(8, 1, "H100"),))
    assert capacity.worker_resources == {"CPU": 8, "GPU": 1, "accelerator_type:H100": 0.001}
    there = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100_group_0_ab12": 1.0, "accelerator_type:H100": 1.0}
    assert node_of(there) == Node(8, 1, "H100")


@pytest.mark.slow
def test_a_search_on_a_cluster_that_others_hold_waits_says_so_and_takes_what_they_leave(tmp_path, monkeypatch):
    """Two drivers hold a CPU each: the first one ends when the search waits, the other one when a training runs."""
    hold = stand_in.tell(tmp_path) / "hold"
    hold.touch()
    recipe = stand_in.make_recipe(3, baselines={}, resources={"gpus_per_worker": 0})
    alone = cluster.head(2, dashboard=False, **cluster.LATER_LOST)
    with alone as head, contextlib.ExitStack() as one, contextlib.ExitStack() as other:
        attach(head, monkeypatch)
        for stack in (one, other):
            stack.enter_context(killed_searches.occupied(1, *head.reached))
        events, seen = [], []

        def on_event(event):
            events.append(event)
            if isinstance(event, Preparing) and event.text.startswith("waiting: "):
                seen.append(event.text)
                one.close()
            if isinstance(event, TrialEpoch) and len(seen) == 1:  # one runs, and holds what it has itself
                seen.append(nodes_now())
                assert list(alive_nodes()) == [ray.get_runtime_context().get_node_id()]
                other.close()
            if isinstance(event, ConcurrencyChanged):
                hold.unlink(missing_ok=True)

        result = run_search(Plan(recipe, tmp_path / "study", head.address, on_event, RUNNER))
    [started] = [event for event in events if isinstance(event, Started)]
    assert (started.concurrency, started.reason) == (1, "1 of 2 CPUs, others use the rest, 1 per trial")
    assert seen == ["waiting: 0 of 2 CPUs, others use the rest, 1 per trial; one waits", (Node(2, 0, "", 1),)]
    assert changes(events) == [(2, "2 CPUs, 1 per trial")]
    assert [row.outcome for row in result.study.trials] == ["complete"] * 3


def attach(head, monkeypatch):
    """Gives this process the token of a cluster."""
    for name, value in head.reached[1].items():
        monkeypatch.setenv(name, value)


class Changing:
    """A cluster that a driver follows; what it says may be set."""

    def __init__(self):
        self.fits, self.asked = 2, 0

    def __call__(self):
        return Capacity(self.fits, f"{self.fits} CPUs", 1, 1.0, 0.0, one_node=self.fits > 1, asked=self.asked)


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """Gives a function that makes a search of 12 trials on a cluster that changes."""
    monkeypatch.setattr("carft_ray.launch.cluster.capacity.COUNT_EVERY_S", 0.0)
    with searching(tmp_path / "study", stand_in.make_recipe(12, baselines={})) as study:

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


def test_trainings_at_a_time_follow_the_nodes(followed):
    tune = followed()
    late = tune.start()
    tune.end(late, f"the {STARTED_LATE} after 30 s")
    assert tune.events[-1].text == f"{late.config['spec']['name']} waits again: the {STARTED_LATE} after 30 s"
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


RUNNER = Runner(stand_in.prepare, stand_in.train)
HEAD_TYPE, FAKE_HEAD = "ray.head.default", "f" * 51 + "00000"  # as Ray's provider of nodes for tests knows the head


@contextlib.contextmanager
def autoscaling_head(folder, version):
    """Starts a head without CPUs whose autoscaler may start two nodes with a CPU, processes of this machine."""
    like = SimpleNamespace(ports=cluster.ports_of_head(), environment={"RAY_AUTH_TOKEN": "t" * 64})
    lists = ["cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"]
    lists += [f"{who}setup_commands" for who in ("", "head_", "worker_")]
    lists += [f"{who}_start_ray_commands" for who in ("head", "worker")]
    worker = {"resources": {"CPU": 1, "object_store_memory": 10**8}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    on = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check", "launch_multiple")
    provider = {"type": "external", "head_node_id": FAKE_HEAD, **dict.fromkeys(on, True)}
    provider["module"] = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider["gcs_address"] = f"127.0.0.1:{like.ports['port']}"
    config = {"cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 0.1, "provider": provider}
    config |= {"available_node_types": {HEAD_TYPE: head, "worker": {**worker, "node_config": {}}}}
    config |= {"head_node_type": HEAD_TYPE, "file_mounts_sync_continuously": False}
    config |= {name: {} for name in ("docker", "auth", "file_mounts")} | {name: [] for name in lists}
    (folder / "cluster.yaml").write_text(json.dumps(config))
    settings = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_NODE_TYPE_NAME": HEAD_TYPE}
    settings |= dict.fromkeys(("RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"), FAKE_HEAD)
    settings["RAY_enable_autoscaler_v2"] = str(int(version == 2))
    options = (f"--autoscaling-config={folder}/cluster.yaml",)
    with cluster.head(0, *options, like=like, dashboard=False, **settings) as started:
        yield started


@pytest.mark.nodes
@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_starts_the_nodes_of_a_search_from_none_and_ends_them(tmp_path, monkeypatch, version):
    """Ray's own autoscaler, with its provider for tests."""
    stand_in.tell(tmp_path, seconds=1.5)
    recipe, events = stand_in.make_recipe(6, baselines={}, resources={"gpus_per_worker": 0, "wait_for_nodes": 60}), []
    with autoscaling_head(tmp_path, version) as head:
        attach(head, monkeypatch)
        result = run_search(Plan(recipe, tmp_path / "study", head.address, events.append, RUNNER))
        assert [row.outcome for row in result.study.trials] == ["complete"] * 6
        waits = [event.text for event in events if isinstance(event, Preparing) and event.text.startswith("waiting")]
        assert waits == ["waiting: no node for a trial, which needs 1 x 1 CPU; nodes for 1 are requested"]
        [started] = [event for event in events if isinstance(event, Started)]
        told = (2, "2 CPUs, 1 per trial; nodes for 1 more are requested")
        assert told in [(started.concurrency, started.reason), *changes(events)]
        with running_ray(head.address, tmp_path / "ray.log"):
            killed_searches.wait_until(lambda: not any(node.num_cpus for node in nodes_now()), "the nodes end", 60)
