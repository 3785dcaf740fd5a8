"""Constraints: measured, part of the choice of alpha, told to the sampler, shown."""

import json

import numpy as np
import optuna
import pytest
from curve_stand_in import ZERO_SHOT, make_recipe, run_all, write_result
from from_logits import predictions_table
from optuna.storages import JournalStorage

from carft_ray.errors import NoSuccessfulTrialError, RecipeError, StorageError
from carft_ray.evaluation.constraints import Limit, limits, violations_at
from carft_ray.evaluation.predictions import concat, correct_matrix
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

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
NOISE = np.eye(6) * 0.01**2 / 2  # paired standard error of neighbours: .01
PROFILE = {"objective": {}, "alpha": {}}


def table_of(rng, accuracies, n=200, name="id_val"):
    """Predictions of one set at every alpha of the grid, with about these accuracies."""
    tables = []
    for alpha, accuracy in zip(GRID, accuracies, strict=True):
        labels = np.arange(n) % 4
        logits = rng.normal(0, 1, (n, 4)).astype(np.float32)
        right = np.arange(n) < round(accuracy * n)
        logits[np.arange(n), np.where(right, labels, (labels + 1) % 4)] += 4
        tables.append(predictions_table(name, alpha, np.arange(n, dtype=np.uint64)[::-1].copy(), labels, logits))
    return concat(tables)


def test_a_violation_is_what_is_missing_to_the_bound():
    part = ConstraintsConfig(id_drop={"zero_shot": 0.02, "plain": 0.0})
    bounds = limits(part, {"zero_shot": 0.72, "plain": 0.8})
    names = ("id_drop/zero_shot", "id_drop/plain")
    assert tuple(limit.name for limit in bounds) == constraint_names(part) == names
    table = table_of(np.random.default_rng(0), (0.7, 0.75, 0.8, 0.85, 0.9, 0.95))
    found = violations_at(table, bounds, 0.0)
    accuracy = float(correct_matrix([(table, 0.0)], "id_val").mean())
    assert found["violation/id_drop/zero_shot"] == pytest.approx(0.7 - accuracy, abs=1e-12)
    assert found["violation/id_drop/plain"] == pytest.approx(0.8 - accuracy)
    assert total_violation({**found, "id_accuracy": 0.7}) == pytest.approx(sum(max(0, v) for v in found.values()))
    assert violation_words({"violation/id_drop/zero_shot": 0.006}) == "violates id_drop zero_shot by 0.6 points"
    assert " and id_drop plain by 10.5 points" in violation_words(found)
    assert violation_words({"id_accuracy": 0.7, "violation/id_drop/plain": -0.1}) == ""
    assert Limit("x", 0.72 - 0.01).violation(0.71) == 0.0  # rounding is no violation


@pytest.fixture
def study_dir(tmp_path):
    return (tmp_path / "study").resolve()


def told(study_dir):
    storage = JournalStorage(log_of(study_dir))
    return optuna.load_study(storage=storage, study_name="search").trials


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
    recipe = make_recipe(
        5, **PROFILE, baselines={}, constraints={"id_drop": {"zero_shot": 0.0}}, sampler={"name": "random"}
    )
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.78})
        run_all(study, 3)
        for outcome, attempt in (("diverged", 1), ("error", 1), ("error", 2)):
            spec = study.next()
            spec.folder(study_dir).mkdir(parents=True, exist_ok=True)
            study.settle(spec, Failure(outcome, "nan", attempt, 6, details="Traceback ..."))
    found = [trial.constraints for trial in told(study_dir)]
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


def test_a_result_without_its_violations_is_refused(study_dir, tmp_path):
    recipe = make_recipe(1, **PROFILE, baselines={}, constraints={"id_drop": {"zero_shot": 0.1}})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.78})
        spec = study.next()
        result.write_result(spec.place(study_dir), {"objective": 0.5, "metrics": {"id_accuracy": 0.5}})
        with pytest.raises(StorageError, match="violation/id_drop/zero_shot"):
            study.settle(spec)


def written(tmp_path, text, space=""):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""\
data:
  train: {{source: sandbox, domain: photo, split: train, num_per_class: 4}}
  id_val: {{source: sandbox, domain: photo, split: val, num_per_class: 4}}
  ood_val: {{sketch: {{source: sandbox, domain: sketch, split: val, num_per_class: 4}}}}
search:
  space: {{learning_rate: {{low: 1e-4, high: 1e-3}}{space}}}
  {text}
""")
    return path


def test_an_unknown_baseline_or_set_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, "baselines: {plain: {kl_weight: 0}}\n  constraints: {id_drop: {plan: 0.1}}"))
    [problem] = caught.value.problems
    assert (problem.nearest, problem.allowed) == ("plain", ("zero_shot", "plain"))
    recipe = load_recipe(written(tmp_path, "constraints: {id_drop: {zero_shot: 0.1}}"))
    assert alone(recipe).search.constraints == ConstraintsConfig()  # of baselines and fresh seeds


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("", "Write search.alpha.mode: sample and search.space.alpha: {low: 0.1, high: 1}."),
        (", alpha: {low: 0.1, high: 1}", "Write search.alpha.mode: sample."),
    ],
)
def test_a_pareto_search_says_exactly_what_is_missing(tmp_path, space, told):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, "objective: {kind: pareto}", space))
    [problem] = caught.value.problems
    assert (problem.rule, problem.next_step) == ("pareto needs alpha as a parameter of the space", told)


def test_what_belongs_to_a_pareto_search_is_idle_elsewhere(tmp_path):
    recipe = load_recipe(written(tmp_path, "objective: {best: lexicographic, tolerance: 0.01}"))
    assert sum("search.objective." in text and "has no effect" in text for text in warnings(recipe)) == 2
