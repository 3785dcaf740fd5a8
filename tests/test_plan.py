"""The forecast of a search: slots, spaces, arithmetic; and the short trainings, in this process and over a real Ray."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import short_training
from crash_host import call
from stand_in import make_recipe

from carft_ray.data.cache import list_entries
from carft_ray.launch import forecast as forecast_module
from carft_ray.launch.forecast import Measured, beyond_budget, forecast, makespan, price
from carft_ray.launch.ray_cluster.concurrency import Node, capacity_of, crowding
from carft_ray.recipe.schema.recipe import BudgetConfig, SearchConfig
from carft_ray.recipe.trial_values import drawn, middle

ROOT = Path(__file__).resolve().parents[1]


# ---- slots


@pytest.mark.parametrize(
    ("jobs", "slots", "first_s", "next_s", "alone", "expected"),
    [
        ([], 2, 5, 1, 1, 0),
        ([10, 10, 10, 10], 1, 5, 1, 1, 15 + 3 * 11),
        ([10, 10, 10, 10], 2, 5, 1, 1, 15 + 11),
        ([30, 10, 10, 10], 2, 0, 0, 1, 30),  # three short ones beside a long one
        ([10, 10, 10, 30], 2, 0, 0, 1, 40),
        ([10] * 10, 8, 0, 0, 0.5, 15),  # the last two run alone, and faster where slots share cores
        ([10] * 10, 8, 0, 0, 0, 12.5),
        ([10] * 2, 8, 0, 0, 0, 10),  # measured two at a time, as the search will have them
    ],
)
def test_jobs_run_in_their_order_on_the_slot_that_is_free_first(jobs, slots, first_s, next_s, alone, expected):
    assert makespan(jobs, slots, first_s, next_s, alone) == expected


@pytest.mark.parametrize(
    ("threads", "told"),
    [(None, ""), (24, ""), (32, "have 128 threads on 64 cores"), (64, "set 16")],
)
def test_trainings_with_far_more_threads_than_cores_are_told(threads, told):
    recipe, nodes = make_recipe(9, resources={"threads": threads}), (Node(64, 4),)
    said = crowding(recipe, capacity_of(recipe, nodes), nodes)
    assert told in said
    assert bool(said) == bool(told)


def test_a_search_of_equal_trainings_takes_what_can_be_counted_by_hand():
    recipe = make_recipe(7, max_concurrent_trials=2)  # and one baseline
    measured = Measured(1.0, 18.0, lambda values: 10.0, 0.1, 5.0, 1.0)
    found = forecast(recipe, capacity_of(recipe, (Node(8, 0),)), measured)
    # 23 s around the trainings, with 5 s before Ray and after it; two slots: one of 15 s, then three of 11 s on each
    assert found["search_s"] == pytest.approx((71, 71 / 1.1, 71 * 1.1), rel=1e-5)
    assert found["trial_s"][0] == 11
    assert found["confirm_s"][0] == pytest.approx(23 + 15 + 5 * 11)  # three trials and the baseline, three seeds
    assert found["cpu_hours"][0] == pytest.approx((8 * 10 + 2 * 5 + 6) / 3600, rel=1e-5)
    assert found["gpu_hours"] == (0.0, 0.0, 0.0)
    assert (found["concurrency"], found["limited_by"]) == (2, "search.max_concurrent_trials")
    json.dumps(found, allow_nan=False)
    recipe = recipe.model_copy(update={"budget": BudgetConfig(wall_time=35.5)})
    assert beyond_budget(recipe, found) == "budget.wall_time (35.5 s) will end the search after about 50%."
    assert beyond_budget(make_recipe(7), found) == ""


def test_gpu_hours_count_every_gpu_of_every_worker_and_prices_follow_them():
    recipe = make_recipe(4, resources={"num_workers": 2, "gpus_per_worker": 2}, baselines={})
    found = forecast(recipe, capacity_of(recipe, (Node(16, 16),)), Measured(1.0, 18.0, lambda values: 10.0, 0.1))
    assert found["concurrency"] == 4
    assert found["gpu_hours"][0] == pytest.approx(4 * 10 * 2 * 2 / 3600, rel=1e-5)
    assert price(found, 3.0, None)[0] == pytest.approx(3 * found["gpu_hours"][0], abs=1e-4)
    assert price(found, None, 36.0)[0] == pytest.approx(found["search_s"][0] / 100, abs=1e-4)
    assert price(found, None, None) is None


def test_what_the_space_varies_enters_by_its_mean_and_widens_the_range():
    recipe = make_recipe(4, max_concurrent_trials=1, baselines={}, space={"epochs": {"low": 1, "high": 9}})
    capacity = capacity_of(recipe, (Node(1, 0),))
    certain = Measured(0, 0, lambda values: 1.0 * values["epochs"], 0.0)
    found = forecast(recipe, capacity, certain)
    assert found["trial_s"][0] == pytest.approx(5, rel=0.05)
    expected, low, high = (seconds - 5 for seconds in found["search_s"])
    assert expected == pytest.approx(20, rel=0.05)
    sd = math.sqrt(4 * (81 - 1) / 12)  # of four draws from 1 .. 9
    assert low == pytest.approx(20 - 1.28 * sd, abs=2.5)
    assert high == pytest.approx(20 + 1.28 * sd, abs=2.5)


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
    for name in ("trial_s", "search_s", "confirm_s", "cpu_hours"):
        expected, low, high = found[name]
        assert 0 < low <= expected <= high
    assert found["search_s"][0] > found["prepare_s"] + found["trial_s"][0]
    assert found["price"][0] == pytest.approx(found["search_s"][0] / 600, rel=0.01)
    assert found["disk_bytes"]["targets"] == 3 * 20 * 3 * 2  # visits, images, contexts, float16
    assert found["disk_bytes"]["cache"] == (15 + 10) * 16 * 16 * 3
    weights = found["disk_bytes"]["weights"]
    assert weights > found["disk_bytes"]["predictions"] > 0
    # two checkpoints of the weights and AdamW's two moments, and the weights
    assert found["disk_bytes"]["while it runs"] == pytest.approx(7 * weights / 3, rel=0.2)
    assert [entry.source for entry in list_entries(tmp_path / "cache") if entry.kind == "heads"] == ["15 sentences"]


@pytest.mark.whole
def test_a_plan_trains_no_more_at_a_time_than_the_search_has_trainings(plan, monkeypatch):
    noted, plain = [], forecast_module.recover_confirm
    measure = lambda study, trainings: noted.append(len(trainings)) or plain(study, trainings)  # noqa: E731
    monkeypatch.setattr(forecast_module, "recover_confirm", measure)
    _, found = plan("resources.executor=inline", "resources.cpus_per_worker=0.25", "search.trials=1")
    assert found["concurrency"] > 2
    assert noted == [2 * 2]


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
