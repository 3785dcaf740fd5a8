"""The forecast of a search: slots, spaces, arithmetic; and the short trainings, in this process and over a real Ray."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import short_training
from crash_host import call
from stand_in import make_recipe

import cluster
from carft_ray.data.cache import list_entries
from carft_ray.launch import forecast as forecast_module
from carft_ray.launch.cluster.capacity import Node, capacity_of, crowding
from carft_ray.launch.forecast import OUTSIDE_S, beyond_budget, forecast, num_rounds
from carft_ray.recipe.schema.recipe import BudgetConfig
from carft_ray.recipe.schema.search import SearchConfig
from carft_ray.recipe.space import drawn, middle

ROOT = Path(__file__).resolve().parents[1]


# ---- slots


@pytest.mark.parametrize(
    ("trainings", "slots", "alone", "rounds"),
    [
        (4, 1, 1, 4),
        (4, 2, 1, 2),
        (5, 2, 1, 3),
        (10, 8, 1, 2),  # on GPUs the last two take as long as the others
        (10, 8, 0.5, 1.5),  # the last two run alone, and faster where slots share cores
        (10, 8, 0, 1.25),
        (2, 2, 0, 1),
    ],
)
def test_trainings_run_in_rounds_of_as_many_as_fit(trainings, slots, alone, rounds):
    assert num_rounds(trainings, slots, alone) == rounds


@pytest.mark.parametrize(
    ("threads", "told"),
    [(None, ""), (24, ""), (32, "have 128 threads on 64 cores"), (64, "set 16")],
)
def test_trainings_with_far_more_threads_than_cores_are_told(threads, told):
    recipe, nodes = make_recipe(9, resources={"threads": threads}), (Node(64, 4),)
    said = crowding(recipe, capacity_of(recipe, nodes), nodes)
    assert told in said
    assert bool(said) == bool(told)


def measured(**changed):
    """What short trainings have shown; bytes are those of one thing each."""
    bytes_ = dict.fromkeys(("weights", "checkpoint", "predictions", "cache", "targets"), 1)
    seconds = {"prepare_s": 8.0, "start_s": 5.0, "fixed_s": 1.0, "epoch_s": 3.0, "look_s": 0.5, "alone": 1.0}
    return {**bytes_, **seconds, **changed}


@pytest.mark.parametrize(
    ("slots", "rounds", "confirm_rounds", "starts"), [(1, 8, 15, 1), (2, 4, 8, 2), (8, 1, 2, 8), (20, 1, 2, 8)]
)
def test_a_search_of_equal_trainings_takes_what_can_be_counted_by_hand(slots, rounds, confirm_rounds, starts):
    recipe = make_recipe(7, 3, max_concurrent_trials=slots)  # and one baseline
    found = forecast(recipe, capacity_of(recipe, (Node(32, 0),)), measured())
    # 18 s for Ray and the preparation, 5 s until the first training runs, 10 s of each training
    assert found["search_s"] == 18 + 5 + rounds * 10
    assert found["trial_s"] == 10
    assert found["confirm_s"] == 18 + 5 + confirm_rounds * 10  # 3 trials, no penalties, the baseline; 3 seeds
    assert found["cpu_hours"] == pytest.approx((8 * 10 + starts * 5) / 3600, abs=1e-5)
    assert found["gpu_hours"] == 0
    assert (found["concurrency"], found["limited_by"]) == (slots, "search.max_concurrent_trials")
    assert found["disk_bytes"]["weights"] == 7 + 1  # of trials at most ``search.keep_checkpoints``
    assert found["disk_bytes"]["while it runs"] == 3 * starts
    json.dumps(found, allow_nan=False)


def test_a_budget_that_ends_the_search_is_told():
    recipe = make_recipe(7, 3)
    found = forecast(recipe, capacity_of(recipe, (Node(1, 0),)), measured())
    assert beyond_budget(recipe, found) == ""
    recipe = recipe.model_copy(update={"budget": BudgetConfig(wall_time=51.5)})
    assert beyond_budget(recipe, found) == "budget.wall_time (51.5 s) will end the search after about 50%."


def test_gpu_hours_count_every_gpu_of_every_worker():
    recipe = make_recipe(4, 3, resources={"num_workers": 2, "gpus_per_worker": 2}, baselines={})
    found = forecast(recipe, capacity_of(recipe, (Node(16, 16),)), measured(start_s=0))
    assert found["concurrency"] == 4
    assert found["gpu_hours"] == pytest.approx(4 * 10 * 2 * 2 / 3600, abs=1e-5)


def test_searched_epochs_enter_by_their_mean():
    recipe = make_recipe(4, max_concurrent_trials=1, baselines={}, space={"epochs": {"low": 1, "high": 9}})
    found = forecast(recipe, capacity_of(recipe, (Node(1, 0),)), measured(fixed_s=0, epoch_s=1, start_s=0, prepare_s=0))
    assert found["trial_s"] == pytest.approx(5, rel=0.05)
    assert found["search_s"] == pytest.approx(OUTSIDE_S + 4 * found["trial_s"], abs=0.3)


def test_an_estimate_says_what_it_leaves_out():
    recipe = make_recipe(4)
    always = ["weights, price and hours of confirm", "failed trainings and further attempts"]
    always += ["searched values other than epochs"]
    assert forecast(recipe, capacity_of(recipe, (Node(1, 0),)), measured())["left_out"] == always
    pruned = make_recipe(4, pruner={"name": "median"})
    growing = capacity_of(pruned, (Node(1, 0),), may_grow=True)
    told = forecast(pruned, growing, measured())["left_out"]
    assert told == [*always, "trainings that the pruner ends early", "nodes that join later"]


# ---- values


def test_draws_are_uniform_between_the_ends_and_heed_steps_logarithms_and_conditions():
    space = {
        "epochs": {"low": 2, "high": 8, "step": 2},
        "batch_size": {"low": 1, "high": 100, "log": True},
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "crop_scale": {"low": 0.5, "high": 0.9, "step": 0.1},
        "decay": {"choices": ["all", "matrices"]},
        "weight_decay": {"low": 0.0, "high": 1.0, "when": {"decay": "matrices"}},
    }
    described = SearchConfig.model_validate({"space": space}).space
    rng = np.random.default_rng(1)
    draws = [drawn(described, rng.uniform) for _ in range(2000)]
    assert {each["epochs"] for each in draws} == {2, 4, 6, 8}
    assert statistics.fmean(each["epochs"] for each in draws) == pytest.approx(5, abs=0.15)
    assert {round(each["crop_scale"], 6) for each in draws} == {0.5, 0.6, 0.7, 0.8, 0.9}
    assert all(type(each["batch_size"]) is int and 1 <= each["batch_size"] <= 100 for each in draws)
    logs = [math.log10(each["learning_rate"]) for each in draws]
    assert statistics.fmean(logs) == pytest.approx(-3, abs=0.05)
    assert (min(logs), max(logs)) == (pytest.approx(-4, abs=0.01), pytest.approx(-2, abs=0.01))
    assert {("weight_decay" in each, each["decay"]) for each in draws} == {(True, "matrices"), (False, "all")}
    assert middle(described)["learning_rate"] == pytest.approx(1e-3)


# ---- short trainings


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Gives a function that plans a search of short trainings, and returns what it says and what it has found."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe = short_training.make(tmp_path)

    def run(*settings, code=0):
        settings = (f"data.cache_dir={tmp_path / 'cache'}", "search.baselines={plain: {kl_weight: 0}}", *settings)
        words = [word for setting in settings for word in ("--set", setting)]
        capsys.readouterr()
        ended = call(["plan", recipe, "--study", tmp_path / "studies" / "a", *words, "--price-per-hour", "6", "--json"])
        shown = capsys.readouterr()
        assert ended == code, shown.err
        assert list((tmp_path / "studies").iterdir()) == []
        return shown.err, None if code else json.loads(shown.out)

    return run


def test_a_plan_measures_trainings_and_leaves_the_caches_alone(plan, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    _, found = plan("resources.executor=debug")
    assert {path.name for path in tmp_path.iterdir()} == before | {"cache", "studies"}
    assert (found["concurrency"], found["num_trials"], found["num_baselines"]) == (1, 2, 1)
    assert all(found[name] > 0 for name in ("trial_s", "search_s", "confirm_s", "cpu_hours"))
    assert found["search_s"] > OUTSIDE_S + found["trial_s"]
    assert found["price"] == pytest.approx(found["search_s"] / 600, abs=1e-4)
    assert found["disk_bytes"]["targets"] == 3 * 20 * 3 * 2  # visits, images, contexts, float16
    assert found["disk_bytes"]["cache"] == (15 + 10) * 16 * 16 * 3
    weights = found["disk_bytes"]["weights"]
    assert weights > found["disk_bytes"]["predictions"] > 0
    # two checkpoints of the weights and AdamW's two moments, and the weights
    assert found["disk_bytes"]["while it runs"] == pytest.approx(7 * weights / 3, rel=0.2)
    assert [entry.source for entry in list_entries(tmp_path / "cache") if entry.kind == "heads"] == ["15 sentences"]


@pytest.mark.whole
def test_a_plan_trains_no_more_at_a_time_than_the_search_has_trainings(plan, monkeypatch):
    noted, plain = [], forecast_module.recover_given
    measure = lambda study, trainings: noted.append(len(trainings)) or plain(study, trainings)  # noqa: E731
    monkeypatch.setattr(forecast_module, "recover_given", measure)
    _, found = plan("resources.executor=inline", "resources.cpus_per_worker=0.25", "search.trials=1")
    assert found["concurrency"] > 2
    assert noted == [2]


@pytest.mark.nodes
def test_a_plan_of_a_cluster_without_nodes_waits_for_the_first(tmp_path):
    recipe, log = short_training.make(tmp_path), tmp_path / "log"
    settings = ["resources.wait_for_nodes=30m", f"data.cache_dir={tmp_path / 'cache'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    with cluster.head() as first, open(log, "w") as file:
        command = [sys.executable, "-m", "carft_ray.cli", "plan", recipe, "--address", first.address, *words]
        with subprocess.Popen(command, env=first.environment, stdout=file, stderr=file) as planning:
            waits = lambda: "waiting: no node for a trial" in log.read_text() or planning.poll() is not None  # noqa: E731
            cluster.wait_until(waits, "the plan waits")
            with cluster.node(first, num_cpus=3):
                assert planning.wait(cluster.TIMEOUT_S) == 0, log.read_text()
    said = log.read_text()
    assert "running short trainings, 2 at a time (the search has no more trainings)" in said
    assert "short: 2 trials, 3 at a time (3 CPUs, 1 per trial)" in said
    assert "whole search" in said


def test_a_short_training_that_fails_ends_the_plan_with_its_reason(plan):
    told, _ = plan("resources.executor=debug", "search.space={learning_rate: {low: 1e30, high: 1e31}}", code=5)
    assert "error: plan: a short training has failed: step " in told
    assert "Traceback" not in told


def test_what_cannot_be_planned_is_told_before_anything_is_measured(capsys):
    for words, message in (
        (["--price-per-hour", "1", "--price-per-gpu-hour", "1"], "--price-per-hour: cannot be used with"),
        (["--set", "search.space={}"], "search.space: must contain at least one parameter to search"),
    ):
        assert call(["plan", ROOT / "search_spaces" / "quickstart.yaml", *words]) in (2, 3)
        assert f"error: {message}" in capsys.readouterr().err
