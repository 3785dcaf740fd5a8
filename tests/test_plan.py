"""The forecast of a search: slots, spaces, parts of a training; and the probe over a real Ray."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import short_training
from crash_host import call
from stand_in import make_recipe

from carft_ray.data.caching.cache import list_entries
from carft_ray.evaluation.probe import FirstImages, share_of
from carft_ray.launch import probe as plan
from carft_ray.launch.forecast import Measured, beyond_budget, forecast, limited_by_input, makespan, price
from carft_ray.launch.probe import between, kind_of
from carft_ray.launch.ray_cluster.concurrency import Node, capacity_of
from carft_ray.recipe.schema import BudgetConfig, SearchConfig
from carft_ray.recipe.spaces.shared_targets import num_stored_visits
from carft_ray.recipe.spaces.space import drawn, middle

ROOT = Path(__file__).resolve().parents[1]


def measured(training_s=lambda values: 10.0, first_s=5.0, next_s=1.0):
    return Measured("probe", 1.0, 20.0, 3.0, first_s, next_s, training_s, 0.1)


def space(**parameters):
    return SearchConfig.model_validate({"space": parameters}).space


# ---- slots


@pytest.mark.parametrize(
    ("jobs", "slots", "first_s", "next_s", "expected"),
    [
        ([], 2, 5, 1, 0),
        ([10], 4, 5, 1, 15),
        ([10, 10, 10, 10], 1, 5, 1, 15 + 3 * 11),
        ([10, 10, 10, 10], 2, 5, 1, 15 + 11),
        ([10, 10, 10], 2, 0, 0, 20),
        ([30, 10, 10, 10], 2, 0, 0, 30),  # three short ones beside a long one
        ([10, 10, 10, 30], 2, 0, 0, 40),
        ([10] * 8, 8, 2, 1, 12),
    ],
)
def test_jobs_run_in_their_order_on_the_slot_that_is_free_first(jobs, slots, first_s, next_s, expected):
    assert makespan(jobs, slots, first_s, next_s) == expected


def test_a_search_of_equal_trainings_takes_what_can_be_counted_by_hand():
    recipe = make_recipe(7, max_concurrent_trials=2)  # and one baseline
    found = forecast(recipe, capacity_of(recipe, (Node(8, 0),)), measured())
    # two slots: first trainings of 15 s, then three more of 11 s on each
    assert found["search_s"][0] == pytest.approx(20 + 15 + 3 * 11 + 3)
    assert found["search_s"][1] == pytest.approx(71 / 1.1, rel=1e-5)
    assert found["search_s"][2] == pytest.approx(71 * 1.1, rel=1e-5)
    assert found["trial_s"][0] == 11
    assert found["cpu_hours"][0] == pytest.approx((8 * 10 + 2 * 5 + 6) / 3600, rel=1e-5)
    assert found["gpu_hours"] == (0.0, 0.0, 0.0)
    assert (found["concurrency"], found["limited_by"]) == (2, "search.max_concurrent_trials")
    json.dumps(found, allow_nan=False)


def test_gpu_hours_count_every_gpu_of_every_worker_and_prices_follow_them():
    recipe = make_recipe(4, resources={"num_workers": 2, "gpus_per_worker": 2}, baselines={})
    found = forecast(recipe, capacity_of(recipe, (Node(16, 16),)), measured(first_s=0, next_s=0))
    assert found["concurrency"] == 4
    assert found["gpu_hours"][0] == pytest.approx(4 * 10 * 2 * 2 / 3600, rel=1e-5)
    assert price(found, 3.0, None)[0] == pytest.approx(3 * found["gpu_hours"][0], abs=1e-4)
    assert price(found, None, 36.0)[0] == pytest.approx(found["search_s"][0] / 100, abs=1e-4)
    assert price(found, None, None) is None


@pytest.mark.parametrize(
    ("resources", "needed", "text"),
    [
        ({}, 0.0, ""),  # not known
        ({}, 8.0, ""),
        ({}, 13.2, "Views, not the GPU, will be the limit: a worker needs 14 cores for them and has 8 (resources.cpus"),
        ({"threads": 2}, 2.5, "a worker needs 3 cores for them and has 2 (resources.threads)."),
    ],
)
def test_the_plan_says_that_views_are_the_limit(resources, needed, text):
    recipe = make_recipe(4, resources=resources)
    found = forecast(recipe, capacity_of(recipe, (Node(64, 8),)), dataclasses.replace(measured(), cores_needed=needed))
    told = limited_by_input(recipe, found)
    assert text in told
    assert bool(told) == bool(text)


def test_what_the_space_varies_enters_by_its_mean_and_widens_the_range():
    recipe = make_recipe(4, max_concurrent_trials=1, baselines={}, space={"epochs": {"low": 1, "high": 9}})
    capacity = capacity_of(recipe, (Node(1, 0),))
    certain = Measured("probe", 0, 0, 0, 0, 0, lambda values: 1.0 * values["epochs"], 0.0)
    found = forecast(recipe, capacity, certain)
    assert found["trial_s"][0] == pytest.approx(5, rel=0.05)
    assert found["search_s"][0] == pytest.approx(20, rel=0.05)
    low, high = found["search_s"][1:]
    sd = math.sqrt(4 * (81 - 1) / 12)  # of four draws from 1 .. 9
    assert low == pytest.approx(20 - 1.28 * sd, abs=2.5)
    assert high == pytest.approx(20 + 1.28 * sd, abs=2.5)


def test_a_budget_that_is_too_small_is_told():
    recipe = make_recipe(7, max_concurrent_trials=2).model_copy(update={"budget": BudgetConfig(wall_time=35.5)})
    found = forecast(recipe, capacity_of(recipe, (Node(8, 0),)), measured())
    assert beyond_budget(recipe, found) == "budget.wall_time (35.5 s) will end it after about 50%."
    assert beyond_budget(make_recipe(7), found) == ""


# ---- values


def test_draws_are_uniform_between_the_ends_and_heed_steps_logarithms_and_conditions():
    described = space(
        epochs={"low": 2, "high": 8, "step": 2},
        batch_size={"low": 1, "high": 100, "log": True},
        learning_rate={"low": 1e-4, "high": 1e-2, "log": True},
        crop_scale={"low": 0.5, "high": 0.9, "step": 0.1},
        decay={"choices": ["all", "matrices"]},
        weight_decay={"low": 0.0, "high": 1.0, "when": {"decay": "matrices"}},
    )
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


def test_a_training_computes_targets_itself_when_the_store_cannot_have_them():
    recipe = make_recipe(4)
    assert kind_of(recipe, {"kl_weight": 0.0}) == "plain"
    assert kind_of(recipe, {"learning_rate": 1e-3}) == "stored"
    assert kind_of(recipe, {"crop_scale": 0.5}) == "online"  # of a baseline
    assert num_stored_visits(recipe) == recipe.train.epochs
    searched = make_recipe(4, space={"crop_scale": {"low": 0.5, "high": 1}, "epochs": {"low": 1, "high": 30}})
    assert kind_of(searched, {"crop_scale": 0.7}) == "online"
    assert num_stored_visits(searched) == 0
    longer = make_recipe(4, space={"epochs": {"low": 1, "high": 30}})
    assert num_stored_visits(longer) == 30


def test_a_step_takes_a_straight_line_between_two_batch_sizes():
    # a step of b images takes 2 + b seconds
    assert between(64, 16, 256, 18 / 16, 258 / 256) == pytest.approx(66 / 64)
    assert between(16, 16, 16, 0.5, 0.5) == 0.5


def test_the_probe_runs_every_kind_at_the_smallest_and_the_largest_batch():
    searched = {"batch_size": {"choices": [8, 16, 32]}, "kl_weight": {"low": 1, "high": 10}}
    recipe = make_recipe(4, space=searched, baselines={"plain": {"kl_weight": 0, "batch_size": 16}})
    found = plan._trainings(recipe)
    assert list(found) == ["plain-8", "plain-32", "stored-8", "stored-32", "online-8", "online-32"]
    assert found["plain-8"]["kl_weight"] == 0
    assert found["stored-32"]["kl_weight"] > 0


# ---- the share


def test_the_first_images_of_a_source_are_a_source(source):
    first = FirstImages(source, 7)
    assert len(first) == 7
    assert first.labels.tolist() == source.labels[:7].tolist()
    assert (first.pixels(3) == source.pixels(3)).all()
    assert first.fingerprint != source.fingerprint


@pytest.mark.whole
@pytest.mark.slow
def test_a_plan_measures_over_ray_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe = short_training.make(tmp_path)
    cache = tmp_path / "cache"
    study = tmp_path / "studies" / "short"
    settings = [f"data.cache_dir={cache}", "search.max_concurrent_trials=3", "search.baselines={plain: {kl_weight: 0}}"]
    settings.append("resources.cpus_per_worker=0.25")  # three at a time, on any machine
    words = [word for setting in settings for word in ("--set", setting)]
    before = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    code = call(["plan", recipe, "--study", study, *words, "--price-per-hour", "6", "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(shown.out)
    assert {path.name for path in tmp_path.iterdir()} == before | {"cache", "studies"}
    assert list(study.parent.iterdir()) == []
    assert found["num_trials"] == 2
    assert found["num_baselines"] == 1
    for name in ("trial_s", "search_s", "cpu_hours"):
        expected, low, high = found[name]
        assert 0 < low <= expected <= high
    assert found["search_s"][0] > found["prepare_s"] + found["trial_s"][0]
    assert found["price"][0] == pytest.approx(found["search_s"][0] / 600, rel=0.01)
    assert found["disk_bytes"]["targets"] == 3 * (20 * 3 * 2 + 16)  # visits, images, contexts, float16; a hash
    assert found["disk_bytes"]["cache"] == (15 + 10) * 16 * 16 * 3
    assert found["disk_bytes"]["weights"] > found["disk_bytes"]["predictions"] > 0
    assert found["measured"]["by"] == "probe"
    assert [entry.source for entry in list_entries(cache) if entry.kind == "heads"] == ["15 sentences"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--price-per-hour", "1", "--price-per-gpu-hour", "1"], "--price-per-hour: must stand without"),
        (["--set", "search.space={}"], "search.space: must hold at least one parameter to search"),
    ],
)
def test_what_cannot_be_planned_is_told_before_anything_is_measured(words, message, capsys):
    assert call(["plan", ROOT / "search_spaces" / "quickstart.yaml", *words]) in (2, 3)
    told = capsys.readouterr().err
    assert f"error: {message}" in told
    assert "Traceback" not in told


def test_a_share_is_ten_steps_of_the_largest_batch(source):
    from types import SimpleNamespace

    from carft_ray.evaluation.shared_inputs import SharedInputs

    whole = SharedInputs(SimpleNamespace(), (), (), source, (), {}, "key")
    share = share_of(whole, make_recipe(2), 3)
    assert len(share.train) == 30
    assert share.key != whole.key
    assert len(share_of(whole, make_recipe(2), 64).train) == len(source)
