"""Caches of nodes: filled on all of them before the first trial, or by trials that find them empty. With a real Ray."""

import os
from dataclasses import replace
from pathlib import Path

import attempts
import psutil
import pytest
import ray
import slow_builds
import stand_in
from killed_searches import wait_until
from layouts_tables import pictures, write_folder
from ray.cluster_utils import Cluster
from sources import recipe_of
from test_lost import gloo

from carft_ray.errors import InterruptedRunError
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Note, Preparing
from carft_ray.launch.workers import worker
from carft_ray.launch.workers.mailbox import Mailbox, Wish
from carft_ray.launch.workers.runtime import Runner
from carft_ray.launch.workers.worker import Poster
from carft_ray.training import shared_inputs
from carft_ray.training.loop import StoppedRun
from carft_ray.training.run_context import RunContext

HERE = Path(__file__).parent
PREPARED = Path("none")  # no set was listed before
SIZES = {"object_store_memory": 10**8}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two trials at a time, of one step each, on a folder of images whose files are packed."""
    for seed, (role, number) in enumerate((("train", slow_builds.NUM_TRAIN // 2), ("id_val", 8))):
        write_folder(tmp_path / "images" / role, pictures(number, slow_builds.CLASSES, seed))
    sets = {role: {"source": "folder", "path": "images", "domains": [role]} for role in ("train", "id_val")}
    train = {"epochs": 1, "batch_size": slow_builds.NUM_TRAIN, "kl_weight": 0.0}
    space = {"learning_rate": {"low": 1e-5, "high": 1e-4, "log": True}}
    search = {"trials": 2, "space": space, "baselines": {}, "alpha": {"grid": [0, 0.5, 1]}}
    resources = {"threads": 1, "gpus_per_worker": 0, "hang_timeout_s": slow_builds.HANG_TIMEOUT_S}
    monkeypatch.chdir(tmp_path)
    return recipe_of({**sets, "pack": "always"}, train=train, search=search, resources=resources)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """A cluster of two nodes with a cache each, ``one`` and ``two``, whose head has no CPU; gives its address."""
    caches = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SIZES})
        for name in ("one", "two"):
            cluster.add_node(num_cpus=1, env_vars={"XDG_CACHE_HOME": str(caches / name)}, **SIZES)
    yield cluster.address
    cluster.shutdown()


def searched(recipe, base_dir, address, runner):
    """Runs a search, whose trials must all end well at the first attempt; returns what it told of the preparation."""
    told = []
    result = run_search(Plan(recipe, base_dir / "study", address, told.append, runner))
    assert [(row.outcome, row.attempt) for row in result.study.trials] == [("complete", 1)] * 2
    assert [event for event in told if isinstance(event, Note) and "hangs" in event.text] == []
    return [event.text for event in told if isinstance(event, Preparing)]


@pytest.mark.whole
@pytest.mark.slow
def test_each_node_fills_its_cache_once_and_at_the_same_time_before_the_first_trial(tmp_path, recipe, two_nodes):
    runner = Runner(slow_builds.prepare, slow_builds.train, slow_builds.fill)
    told = searched(recipe, tmp_path, two_nodes, runner)
    notes = slow_builds.notes(tmp_path)
    assert [note["what"] for note in notes] == ["begins", "begins", "ends", "ends"]
    assert {note["cache"] for note in notes[:2]} == {"one", "two"}
    assert {note["trials"] for note in notes} == {0}
    assert any(": building train into the cache: " in text and text.endswith(" s left") for text in told), told


@pytest.mark.slow
@pytest.mark.whole
def test_a_stop_that_is_asked_for_while_caches_are_filled_ends_the_search(tmp_path, two_nodes):
    runner = Runner(stand_in.prepare, stand_in.train, slow_builds.fill_and_ask_to_stop)
    recipe = stand_in.make_recipe(3, resources={"gpus_per_worker": 0})
    with pytest.raises(InterruptedRunError, match="0 of 3 trials finished"):
        run_search(Plan(recipe, tmp_path / "study", two_nodes, runner=runner))
    assert not (tmp_path / "study" / "_tune").exists()


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("what", ["fill", "prepare"])
def test_a_preparation_that_is_stopped_leaves_no_task_in_the_ray_of_the_caller(tmp_path, two_nodes, what):
    functions = {"prepare": stand_in.prepare, "fill": None} | {what: slow_builds.prepare_for_ever}
    runner = Runner(functions["prepare"], stand_in.train, functions["fill"])
    recipe = stand_in.make_recipe(3, resources={"gpus_per_worker": 0})
    ray.init(address=two_nodes, log_to_driver=False)
    try:
        with pytest.raises(InterruptedRunError, match="0 of 3 trials finished"):
            run_search(Plan(recipe, tmp_path / "study", "auto", runner=runner))
        number = int((tmp_path / "pid").read_text())
        wait_until(lambda: not psutil.pid_exists(number), "its process has ended")
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.whole
def test_a_preparation_whose_process_dies_is_run_once_more(tmp_path, two_nodes):
    recipe = stand_in.make_recipe(2, resources={"gpus_per_worker": 0})
    told = searched(recipe, tmp_path, two_nodes, Runner(slow_builds.prepare_or_die, stand_in.train))
    assert any("the preparation runs once more: WorkerCrashedError" in text for text in told), told
    assert (tmp_path / "died").exists()


@pytest.mark.slow
@pytest.mark.whole
def test_a_node_that_dies_while_it_fills_its_cache_ends_no_search(tmp_path, recipe, two_nodes):  # the last to have both
    runner = Runner(slow_builds.prepare, slow_builds.train, slow_builds.fill_or_die)
    told = searched(recipe, tmp_path, two_nodes, runner)
    assert any("is gone: the search continues without it" in text for text in told), told


@pytest.mark.slow
@pytest.mark.whole
def test_a_trial_that_builds_longer_than_the_time_to_hang_and_one_that_waits_for_it_live(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
    data = recipe.data.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    resources = recipe.resources.model_copy(update={"cpus_per_worker": 0.5})
    recipe = recipe.model_copy(update={"data": data, "resources": resources})
    search = recipe.search.model_copy(update={"max_concurrent_trials": 2})
    runner = Runner(slow_builds.prepare_and_empty, slow_builds.train)
    searched(recipe.model_copy(update={"search": search}), tmp_path, None, runner)
    notes = slow_builds.notes(tmp_path)
    assert sorted(note["what"] for note in notes if note["what"] != "waits") == ["begins", "ends"]
    waits = [note for note in notes if note["what"] == "waits"]
    assert {note["pid"] for note in waits}.isdisjoint(note["pid"] for note in notes if note["what"] == "begins")
    assert waits[-1]["at"] - waits[0]["at"] > slow_builds.HANG_TIMEOUT_S


@pytest.mark.slow
def test_a_training_that_is_stopped_while_it_builds_a_set_leaves_no_half_entry(tmp_path):
    asked = []
    recipe = attempts.sandbox_recipe()
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": str(tmp_path)})})
    context = RunContext(should_stop=lambda: asked.append(1) or len(asked) == 7)
    with pytest.raises(StoppedRun, match="stopped on request while train was built into the cache"):
        shared_inputs.shared_inputs_of_worker(recipe, context, PREPARED)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert len(shared_inputs.shared_inputs_of_worker(recipe, RunContext(), PREPARED).train) == 512


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_of_a_training_reports_its_steps(rank, tmp_path):
    box = Mailbox()
    with Poster(box, "trials/t0000", 1, rank) as poster:
        with worker._watched(RunContext(rank, 2), poster, tmp_path, 3600) as context:
            assert [context.should_stop() for _ in range(3)] == [False] * 3
        poster.post()
    assert box.exchange({"trials/t0000": Wish(1, "go")})["trials/t0000"].steps == {rank: 3}


def stop_together(context, base_dir):
    """Rank 0 finds all sets in its cache, and rank 1 is asked to stop while it builds them."""
    recipe = attempts.sandbox_recipe()
    data = recipe.data.model_copy(update={"cache_dir": str(base_dir / str(context.rank))})
    recipe = recipe.model_copy(update={"data": data})
    if context.rank == 0:
        shared_inputs.load_shared_inputs(recipe)
        shared_inputs._loaded.clear()
    context = replace(context, should_stop=lambda: context.rank == 1)
    with pytest.raises(StoppedRun, match="stopped on request while train was built into the cache"):
        shared_inputs.shared_inputs_of_worker(recipe, context, PREPARED)


@pytest.mark.whole
@pytest.mark.slow
def test_all_ranks_stop_where_one_is_asked_to_while_it_builds(tmp_path):
    assert gloo(stop_together, tmp_path) == [0, 0]
