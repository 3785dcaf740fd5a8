"""Constraints: measured, part of the choice of alpha, told to the sampler, shown."""

import json
from pathlib import Path

import numpy as np
import optuna
import pytest
from curve_stand_in import ZERO_SHOT, make_recipe, run_all, write_result
from from_logits import predictions_table
from optuna.storages import JournalStorage

from carft_ray.errors import NoSuccessfulTrialError, RecipeError, StorageError
from carft_ray.evaluation.constraints import Limit, limits, violations_at
from carft_ray.recipe.checks.advice import warnings
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.constraints import ConstraintsConfig, constraint_names, total_violation, violation_words
from carft_ray.recipe.schema.recipe import alone
from carft_ray.results.reading.status_and_ls import listing, status
from carft_ray.results.reading.study_view import read_study
from carft_ray.store import result
from carft_ray.study.holding import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, trials

PROFILE = {"objective": {}, "alpha": {}}
QUICKSTART = Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml"


def test_a_violation_is_what_is_missing_to_the_bound():
    part = ConstraintsConfig(id_drop={"zero_shot": 0.02, "plain": 0.0})
    bounds = limits(part, {"zero_shot": 0.72, "plain": 0.8})
    names = ("id_drop/zero_shot", "id_drop/plain")
    assert tuple(limit.name for limit in bounds) == constraint_names(part) == names
    right = np.arange(200) < 139
    logits = np.stack([right, ~right], axis=1)
    table = predictions_table("id_val", 0.0, np.arange(200, dtype=np.uint64), np.zeros(200, int), logits)
    found = violations_at(table, bounds, 0.0)
    assert found == pytest.approx({"violation/id_drop/zero_shot": 0.005, "violation/id_drop/plain": 0.105})
    assert total_violation({**found, "id_accuracy": 0.7, "violation/id_drop/met": -0.1}) == pytest.approx(0.11)
    assert violation_words(found) == "violates id_drop zero_shot by 0.5 points and id_drop plain by 10.5 points"
    assert violation_words({"id_accuracy": 0.7, "violation/id_drop/plain": -0.1}) == ""
    assert Limit("x", 0.72 - 0.01).violation(0.71) == 0.0  # rounding is no violation


@pytest.fixture
def study_dir(tmp_path):
    return (tmp_path / "study").resolve()


def test_trials_wait_for_the_baselines_that_a_constraint_names_and_no_longer(study_dir):
    drops = {"zero_shot": 0.1, "plain": 0.05}
    baselines = {"plain": {"kl_weight": 0}, "other": {"kl_weight": 1}}
    recipe = make_recipe(2, **PROFILE, baselines=baselines, constraints={"id_drop": drops})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot(ZERO_SHOT)
        plain, other = study.next(), study.next()
        assert (plain.name, other.name) == ("plain", "other")
        assert study.next() is None
        assert not study.done()
        study.lost(plain, "killed")
        again = study.next()
        assert (again.name, again.attempt) == ("plain", 2)
        assert study.next() is None
        write_result(study, again)
        study.settle(again)
        assert study.next().kind == "trial"  # the other baseline is named by no constraint
        references = json.loads((study_dir / "prepared" / "references.json").read_text())
        assert references.keys() == drops.keys()
        assert references["zero_shot"] == ZERO_SHOT["id_accuracy"]


def test_a_baseline_that_ends_without_a_result_ends_the_search_with_one_message_that_names_it(study_dir):
    recipe = make_recipe(2, **PROFILE, constraints={"id_drop": {"plain": 0.05}})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        spec = study.next()
        spec.folder(study_dir).mkdir(parents=True, exist_ok=True)
        study.settle(spec, Failure("diverged", "loss not finite", spec.attempt, 6, details="Traceback ..."))
        with pytest.raises(NoSuccessfulTrialError) as caught:
            study.next()
    assert caught.value.exit_code == 6
    [problem] = caught.value.problems
    assert problem.place == "search.constraints.id_drop.plain"
    assert problem.value == "diverged: loss not finite"
    assert "baselines/plain/log.txt" in problem.next_step


@pytest.mark.slow
def test_every_finished_trial_has_the_same_constraints_and_violations_are_shown(study_dir):
    constraints = {"id_drop": {"zero_shot": 0.0}}
    recipe = make_recipe(5, **PROFILE, baselines={}, constraints=constraints, sampler={"name": "random"})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.78})
        run_all(study, 3)
        for outcome, attempt in (("diverged", 1), ("error", 1), ("error", 2)):
            spec = study.next()
            spec.folder(study_dir).mkdir(parents=True, exist_ok=True)
            study.settle(spec, Failure(outcome, "nan", attempt, 6, details="Traceback ..."))
    storage = JournalStorage(log_of(study_dir))
    found = [trial.constraints for trial in optuna.load_study(storage=storage, study_name="search").trials]
    assert [each["trained"] for each in found] == [-1, -1, -1, 1, 1]
    assert found[3]["id_drop/zero_shot"] == found[4]["id_drop/zero_shot"] == 0
    rows = trials(study_dir)
    missed = [row.violation for row in rows[:3]]
    assert [max(0, each["id_drop/zero_shot"]) for each in found[:3]] == pytest.approx(missed)
    assert min(missed) < max(missed)
    best = best_row(rows)
    assert best.violation == min(missed)
    answer = listing(read_study(study_dir))
    assert answer["trials"][0]["violations"]["id_drop/zero_shot"] == best.metrics["violation/id_drop/zero_shot"]


@pytest.mark.slow
def test_weights_of_trials_that_meet_the_constraints_stay_before_better_ones_that_do_not(study_dir):
    recipe = make_recipe(6, **PROFILE, baselines={}, constraints={"id_drop": {"zero_shot": 0.0}}, keep_checkpoints=1)
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.99})  # which none reaches
        run_all(study)
    view = read_study(study_dir)
    assert [path.parents[1].name for path in study_dir.glob("trials/*/*/fine_tuned.safetensors")] == [view.best.name]
    assert view.best.violation == min(row.violation for row in view.trials)
    [line] = status(view)["lines"]
    assert line.startswith(f"No trial meets all constraints; {view.best.name} misses them least: it violates id_drop")


def test_a_result_without_its_violations_is_refused(study_dir):
    recipe = make_recipe(1, **PROFILE, baselines={}, constraints={"id_drop": {"zero_shot": 0.1}})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.78})
        spec = study.next()
        result.write_result(spec.place(study_dir), {"objective": 0.5, "metrics": {"id_accuracy": 0.5}})
        with pytest.raises(StorageError, match="violation/id_drop/zero_shot"):
            study.settle(spec)


def test_an_unknown_baseline_is_refused_with_the_nearest():
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, ["search.constraints.id_drop.car_tf=0.1"])
    [problem] = caught.value.problems
    assert (problem.nearest, problem.allowed) == ("car_ft", ("zero_shot", "fine_tuning", "car_ft"))
    recipe = load_recipe(QUICKSTART, ["search.constraints.id_drop.zero_shot=0.1"])
    assert alone(recipe).search.constraints == ConstraintsConfig()  # of baselines and fresh seeds


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ([], "Write search.alpha.mode: sample and search.space.alpha: {low: 0.1, high: 1}."),
        (["search.space.alpha={low: 0.1, high: 1}"], "Write search.alpha.mode: sample."),
    ],
)
def test_a_pareto_search_says_exactly_what_is_missing(space, told):
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, ["search.objective={kind: pareto}", *space])
    [problem] = caught.value.problems
    assert (problem.rule, problem.next_step) == ("pareto needs alpha as a parameter of the space", told)


def test_what_belongs_to_a_pareto_search_is_idle_elsewhere():
    recipe = load_recipe(QUICKSTART, ["search.objective={best: lexicographic, tolerance: 0.01}"])
    assert sum("search.objective." in text and "has no effect" in text for text in warnings(recipe)) == 2
