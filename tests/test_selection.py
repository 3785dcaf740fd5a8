"""Rules of choosing values, compared in worlds with known truth, on a made-up table. Nothing is trained."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from benchmarks import emulators, rules, selection, trained
from benchmarks.seed_table import design, what_is_trained
from benchmarks.table import write_table
from benchmarks.trainings import Bench
from carft_ray.errors import UsageError
from carft_ray.files import write_json
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.rows import searched

RECIPE = Path(__file__).parents[1] / "examples" / "pacs" / "photo.yaml"
FROZEN = 0.5
SEEDS = 4
PAIR = ("today", "expected")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(RECIPE)


def height(values):
    """How much a configuration gains, at its best alpha."""
    return 0.15 - 0.02 * math.log10(values["learning_rate"] / 6e-4) ** 2 - 0.02 * math.log10(values["kl_weight"] + 0.1)


def curve(values, luck):
    """Accuracies along alpha: more luck at a large alpha."""
    points = []
    for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1):
        shift = 0 if alpha == 0 else height(values) * (1 - (alpha - 0.6) ** 2) + luck * (0.5 + alpha)
        both = {"id_accuracy": FROZEN + 0.1 + shift, "ood_accuracy": FROZEN - 0.1 + shift}
        points.append({"alpha": float(alpha), "objective": FROZEN + shift, **both})
    return points


@pytest.fixture(scope="module")
def path(recipe, tmp_path_factory):
    """A table as ``benchmarks.seed_table`` writes it; large learning rates have three times the noise."""
    rng, rows = np.random.default_rng(0), []
    of_seed = np.linspace(-0.015, 0.015, SEEDS)
    for name, values in design(recipe, 24).items():
        noise = 0.006 if values["learning_rate"] < 6e-4 else 0.018
        for seed in range(SEEDS):
            row = {"configuration": name, **values, "seed": seed, "diverged": False}
            rows.append({**row, "curve": curve(values, of_seed[seed] + rng.normal(0, noise))})
    path = tmp_path_factory.mktemp("tables") / "made-up.parquet"
    write_table(path, rows, {"trained": what_is_trained(recipe, 24), "frozen": "ff00"})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return path


@pytest.fixture(scope="module")
def table(recipe, path):
    return emulators.read_table(path, recipe)


def test_splines_pass_near_the_means_of_the_table(table):
    smooth, rough = (emulators.make_world(name, table) for name in ("smooth", "rough"))
    means = table.curves.mean(axis=1)
    apart = [np.abs(smooth.truth(values) - mean).max() for values, mean in zip(table.values, means, strict=True)]
    assert max(apart) < 0.03  # some two standard errors of a mean of four
    for values, mean in zip(table.values, means, strict=True):
        np.testing.assert_allclose(rough.truth(values), mean, atol=1e-6)
    unseen = {"learning_rate": 7e-4, "kl_weight": 0.5}
    true = np.array([point["objective"] for point in curve(unseen, 0)[1:]])
    assert np.abs(smooth.truth(unseen)[:, 0] - true).max() < 0.02


def test_noise_is_unequal_shared_by_trainings_of_a_seed_and_has_no_mean(table):
    world = emulators.make_world("smooth", table)
    calm, wild = {"learning_rate": 3e-4, "kl_weight": 1.0}, {"learning_rate": 1.2e-3, "kl_weight": 1.0}
    assert world.sd(wild) > 1.5 * world.sd(calm)
    found = np.array([[world.measured(values, 1, search)[:, 0] for values in (calm, wild)] for search in range(2000)])
    true = np.array([world.truth(values)[:, 0] for values in (calm, wild)])
    error = found.std(axis=0) / len(found) ** 0.5
    assert (np.abs(found.mean(axis=0) - true) < 4 * error).all()
    assert found[:, 1].std() > 1.3 * found[:, 0].std()
    last = found[:, :, -1]
    assert np.corrcoef(last[:, 0], last[:, 1])[0, 1] > 0.2
    other = [world.measured(wild, 2, search)[-1, 0] for search in range(2000)]
    assert abs(np.corrcoef(last[:, 1], other)[0, 1]) < 0.1


def test_without_an_effect_all_values_have_one_truth(table):
    world = emulators.make_world("flat", table)
    true = [world.truth(values) for values in (*table.values, {"learning_rate": 2e-3, "kl_weight": 0.011})]
    for each in true:
        np.testing.assert_allclose(each, table.curves.mean(axis=(0, 1)), atol=1e-9)


def test_a_search_of_the_table_gets_each_training_once_and_leaves_a_seed_for_the_truth(table, monkeypatch):
    world, given = emulators.make_world("table", table), []
    measured = world.measured

    def seen(values, seed, search):
        given.append((emulators.identity(values), int(world.order(search)[seed])))
        return measured(values, seed, search)

    monkeypatch.setattr(world, "measured", seen)
    own = rules.as_searched(table.recipe, 16, 0.5, 3)
    trials, baselines = rules.run_search(world, own, 3, told=False)
    assert len(given) == len({*given}) == 16 + 2
    assert sum(bool(row.repeat_of) for row in searched(trials, baselines)) == 8
    known = [emulators.identity(values) for values in table.values]
    for values in {key for key, _ in given}:
        seeds = [seed for key, seed in given if key == values]
        assert len(seeds) < SEEDS
        left = [seed for seed in range(SEEDS) if seed not in seeds]
        true = world.truth(json.loads(values), len(seeds), 3)
        np.testing.assert_allclose(true, table.curves[known.index(values), left].mean(axis=0))


def test_todays_rule_promises_too_much_where_values_have_no_effect_and_the_expected_one_much_less(table):
    world, promised = emulators.make_world("flat", table), []
    for search in range(20):
        own = rules.as_searched(table.recipe, 16, 0, search)
        ended = rules.run_search(world, own, search, told=False)
        found = [rules.judged(world, own, search, name != "today", *ended)["choices"]["trial"] for name in PAIR]
        promised.append([one["promise"] - one["truth"] for one in found])
    today, expected = np.mean(promised, axis=0)
    assert today > 0.01
    assert expected < 0.6 * today


def test_repeats_are_told_to_the_sampler_with_their_own_objective_or_with_the_expected_one(table, monkeypatch):
    world, told = emulators.make_world("smooth", table), []

    def draw(study, trial, recipe):
        told.append([each.value for each in study.get_trials(deepcopy=False)[:-1]])
        return rules_draw(study, trial, recipe)

    rules_draw = rules.draw
    monkeypatch.setattr(rules, "draw", draw)
    own = rules.as_searched(table.recipe, 12, 0.5, 0)
    trials, _ = rules.run_search(world, own, 0, told=False)
    assert told[-1] == [row.objective for row in trials[: len(told[-1])]]
    trials, _ = rules.run_search(world, own, 0, told=True)
    last = [row for row in trials if not row.repeat_of][-1]
    assert len(told[-1]) == last.number
    same = [row.name for row in trials[: last.number] if (row.repeat_of or row.name) == trials[0].name]
    assert len({told[-1][int(name[1:])] for name in same}) == 1
    assert told[-1] != [row.objective for row in trials[: last.number]]


def test_a_killed_run_continues_and_has_the_same_numbers(path, tmp_path, capsys):
    few = (*PAIR, "repeats .5")
    words = ["--table", str(path), "--out", str(tmp_path), "--trainings", "16", "--worlds", "flat", "table"]
    words += ["--rules", *few, "N times"]

    def call():
        assert selection.main([str(RECIPE), *words, "--searches", "2", "--processes", "1"]) == 0
        [numbers], [results] = tmp_path.glob("summary-*.json"), tmp_path.glob("searches-*.jsonl")
        return json.loads(numbers.read_text()), results, capsys.readouterr().out

    first, results, shown = call()
    lines = results.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    results.write_text("".join(lines[:3]) + lines[3][:100])
    again, _, shown_again = call()
    assert (again, shown_again) == (first, shown)
    assert results.read_text() == "".join(lines)
    assert {line["rule"] for line in first} == {
        *few,
        *(f"{name}, or a baseline" for name in few),
        "car_ft N times",
        "fine_tuning N times",
    }
    assert "\nflat, 16 trainings, 2 searches\n" in shown
    one = next(line for line in first if line["rule"] == "today" and line["world"] == "table")
    assert one["minus_today"] == [0, 0, 0]
    assert "covers" not in one


@pytest.mark.slow
def test_two_processes_find_the_same(table, tmp_path):
    here = selection.Here(table, ("today", "expected", "repeats .5"), tmp_path)
    tasks = [selection.Task("rough", 16, search) for search in (0, 1)]
    alone, both = (list(selection.results(here, tasks, processes)) for processes in (1, 2))
    by_search = {result["search"]: result for result in both}
    assert json.dumps(alone) == json.dumps([by_search[0], by_search[1]])


def test_real_trainings_are_run_once_and_kept_for_the_next_machine(table, tmp_path, monkeypatch):
    run = []

    def run_one(bench, planned):
        run.append(dict(planned.values))
        result = {"curve": curve(planned.values, 0.001 * (planned.values["seed"] % 7))}
        write_json(bench.training_dir(planned) / "attempt-1" / "result.json", result)

    monkeypatch.setattr(trained, "run_one", run_one)
    monkeypatch.setattr(trained, "open_bench", lambda recipe, out, reads_tests: Bench(recipe, out))
    answers = "ff00"
    monkeypatch.setattr(
        trained, "start_of", lambda _, recipe, num: {"trained": what_is_trained(recipe, num), "frozen": answers}
    )
    names, file = ("today", "expected", "repeats .5"), tmp_path / "trained.jsonl"
    world = trained.Trained(table, tmp_path / "first", file)
    found = rules.run_rules(world, table.recipe, 12, 1, names)
    assert len(run) == len({json.dumps(each) for each in run})
    assert all(each["seed"] in (0, 1, 2, *trained.FRESH) for each in run)
    best = found["repeats .5"]["choices"]["trial"]
    at = world.alphas.index(best["alpha"])
    fresh = [curve(best["values"], 0.001 * (seed % 7))[1 + at]["objective"] for seed in trained.FRESH]
    assert best["truth"] == pytest.approx(np.mean(fresh))
    world.collect()
    run.clear()
    again = trained.Trained(table, tmp_path / "second", file)
    assert rules.run_rules(again, table.recipe, 12, 1, names) == found
    assert not run
    others = table.recipe.model_copy(update={"train": table.recipe.train.model_copy(update={"epochs": 5})})
    with pytest.raises(UsageError, match="must be of these trainings"):
        trained.Trained(replace(table, recipe=others), tmp_path, file)
    answers = "f0f0"
    with pytest.raises(UsageError, match="answers 8 of 16 validation images otherwise"):
        trained.Trained(table, tmp_path, file)


def test_numbers_of_made_up_searches():
    def of(truth, promise, p=0.9, ends=(0.5, 0.7)):
        one = {"values": {}, "truth": truth, "promise": promise, "ends": ends, "better": {"plain": (p, truth - 0.6)}}
        return {"choices": {"trial": one}, "once": {"plain": 0.6}, "new": 8, "again": 2}

    searches = [
        {"today": of(0.6, 0.65), "new": of(0.61, 0.6)},
        {"today": of(0.59, 0.66), "new": of(0.61, 0.6, ends=(0, 0.1))},
    ]
    today, new = selection.summary(searches, is_exact=True)
    assert new["true"][0] == pytest.approx(0.61)
    assert new["minus_today"][0] == pytest.approx(0.015)
    assert new["minus"]["plain"][0] == pytest.approx(0.01)
    assert (today["worse"]["plain"][0], new["worse"]["plain"][0]) == (0.5, 0)
    assert (today["optimism"][0], new["optimism"][0]) == pytest.approx((0.06, -0.01))
    assert (today["covers"][0], new["covers"][0]) == (1, 0.5)
    assert today["better"]["plain"][-1] == {"count": 2, "p": 0.9, "better": 0.25}  # equal ones count as half
    assert new["better"]["plain"][0]["count"] == 0


def test_a_table_of_another_recipe_or_none_is_refused(path, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--table"]
    assert selection.main([str(RECIPE), *words, str(tmp_path / "none.parquet")]) == 2
    other = RECIPE.parents[2] / "search_spaces" / "quickstart.yaml"
    assert selection.main([str(other), *words, str(path)]) == 2
    assert "seeds, the same per configuration" in capsys.readouterr().err
