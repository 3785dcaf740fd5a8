"""The alpha curve, the objective, constraints and mixing: which point is chosen, formulas, limit cases, derivatives."""

import json
import math
from pathlib import Path

import curve_stand_in
import numpy as np
import pytest
import study_steps
import torch
from curve_stand_in import ZERO_SHOT, make_recipe, run_all, write_result
from from_logits import predictions_table
from report_studies import predictions
from study_steps import failed, searching

from carft_ray.errors import DataError, DivergedError, NoSuccessfulTrialError, RecipeError, StorageError
from carft_ray.evaluation.alpha import alphas_at_chance, choose_point, curve_points, measure_curve
from carft_ray.evaluation.constraints import Limit, limits, violations_at
from carft_ray.evaluation.objective import ObjectiveSpec, metrics_at
from carft_ray.evaluation.predictions import concat
from carft_ray.model.mixing import mix_weights
from carft_ray.recipe.checks.advice import warnings
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.constraints import ConstraintsConfig, constraint_names, total_violation, violation_words
from carft_ray.recipe.schema.recipe import DEFAULT_GRID, alone
from carft_ray.recipe.trial_values import apply
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study

MEASURED = tuple(sorted({*DEFAULT_GRID, 0.1}))  # by default: the grid and the lowest alpha that may be chosen
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("noisy",), 0.5)


def points(objectives, alphas=MEASURED, **violations):
    """Points of a curve; ``violations`` are lists by the name of a constraint."""
    named = {f"violation/{name}": values for name, values in violations.items()}
    return [
        {"alpha": alpha, "objective": value, **{name: values[i] for name, values in named.items()}}
        for i, (alpha, value) in enumerate(zip(alphas, objectives, strict=True))
    ]


def test_the_highest_measured_objective_from_the_lowest_alpha_on_is_chosen_and_of_equal_ones_the_smaller_alpha():
    curve = points([0.6 + 0.1 * alpha * (1 - alpha) - (alpha == 0) for alpha in MEASURED])
    best = max(curve, key=lambda point: point["objective"])
    assert choose_point(curve, 0.1) == choose_point(curve[::-1], 0.1) == best
    falling = points([0.7 - 0.1 * alpha for alpha in MEASURED])
    assert [choose_point(falling, lowest)["alpha"] for lowest in (0.1, 0.33, 1.0)] == [0.1, 0.4, 1.0]
    assert choose_point(points([0.7] * len(MEASURED))[::-1], 0.1)["alpha"] == 0.1
    assert choose_point(points([0.6, 0.7 - 1e-15, 0.7], (0.0, 0.5, 1.0)), 0.1)["alpha"] == 0.5  # rounding counts not


def test_only_the_points_that_miss_the_constraints_least_take_part():
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    rising = [0.6 + 0.1 * alpha for alpha in alphas]
    met = [-0.3, -0.2, -0.1, 0.05, 0.2]
    assert choose_point(points(rising, alphas, drop=met), 0.1)["alpha"] == 0.5
    assert choose_point(points(rising, alphas, drop=met, ece=[0.5, -0.1, 0.1, 0, 0]), 0.1)["alpha"] == 0.25
    assert choose_point(points(rising, alphas, drop=[-1.0] * 5), 0.1)["alpha"] == 1.0
    # none meets them all: the smallest sum of what is missing, and of equal sums the best
    drop, ece = [0.9, 0.5, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.3, 0.5]
    assert choose_point(points(rising, alphas, drop=drop, ece=ece), 0.1)["alpha"] == 0.5
    assert choose_point(points(rising, alphas, drop=[0.3] * 5), 0.1)["alpha"] == 1.0


def measured(recipe):
    """Measures the curve of a recipe: the tables by alpha."""
    asked = []

    def at(alpha):
        asked.append(alpha)
        return predictions(recipe.train, (alpha,), SPEC.sets, np.random.default_rng(0))

    tables = measure_curve(recipe, at(0.0), at)
    assert asked == list(tables)  # each once
    return tables


def test_the_grid_and_the_lowest_alpha_are_each_measured_once_and_a_fixed_alpha_with_its_ends():
    pareto, fixed = (
        curve_stand_in.make_recipe(**more) for more in ({}, {"objective": {}, "alpha": {"mode": "sample"}})
    )
    for recipe, expected in ((fixed, [0.0, 0.7, 1.0]), (pareto, sorted({*MEASURED, 0.7}))):
        assert list(measured(apply(recipe, {"alpha": 0.7}))) == expected
    tables = measured(curve_stand_in.make_recipe(objective={}, alpha={}))
    assert list(tables) == list(MEASURED)
    curve = curve_points(tables, SPEC, ())
    assert [point["alpha"] for point in curve] == list(MEASURED)
    assert all(point.items() > metrics_at(tables[point["alpha"]], SPEC, point["alpha"]).items() for point in curve)
    for point in curve:
        assert (point["id_accuracy"], point["ood_accuracy"]) == (point["accuracy/id_val"], point["accuracy/noisy"])
        assert point["objective"] == pytest.approx((point["id_accuracy"] + point["ood_accuracy"]) / 2)
    whole = concat(list(tables.values()))  # as a study stores it
    assert curve_points(dict.fromkeys(tables, whole), SPEC, ()) == curve
    with pytest.raises(DataError, match=r"must have been evaluated at the alpha, but got id_val at 0\.45"):
        curve_points({0.45: tables[1.0]}, SPEC, ())


def curve_of(*num_right, num_classes=16, num_images=2000):
    """Predictions at alphas from 0 to 1, so many right, the others off by one class; a string is a constant answer."""
    labels, tables = np.arange(num_images) % num_classes, {}
    for alpha, right in zip(np.linspace(0, 1, len(num_right)).tolist(), num_right, strict=True):
        answers = labels.copy()
        if right == "constant":
            answers[:] = 3
        else:
            rest = np.random.default_rng(0).permutation(num_images)[: num_images - right]
            answers[rest] = np.random.default_rng(1).permutation(labels[rest])
        logits = np.eye(num_classes, dtype=np.float32)[answers]
        tables[alpha] = predictions_table("id_val", alpha, np.arange(num_images, dtype=np.uint64), labels, logits)
    return tables


def test_a_training_has_diverged_only_where_every_alpha_is_at_chance():
    assert alphas_at_chance(curve_of(1000, 1100, 1200), "id_val") == []
    assert alphas_at_chance(curve_of(1000, 700, "constant"), "id_val") == [1.0]
    assert alphas_at_chance(curve_of(1000, 700, 0), "id_val") == [1.0]
    told = r"alpha curve: ID accuracy must be above chance, but got at most 7\.0 % of 2,000 images right, as with .*"
    told += r"\n    The training has diverged; try a lower learning_rate\."
    with pytest.raises(DivergedError, match=told):
        alphas_at_chance(curve_of(1000, 0, "constant"), "id_val")
    assert alphas_at_chance(curve_of(0, 0, 0), "id_val") == []  # zero-shot knows no more
    assert alphas_at_chance(curve_of("constant", 700, 0), "id_val") == []


KINDS = ["weighted_mean", "harmonic", "worst_domain"]


@pytest.mark.parametrize(
    ("kind", "id_weight", "expected"),
    [
        ("weighted_mean", 0.25, 0.25 * 0.8 + 0.75 * 0.6),
        ("weighted_mean", 1.0, 0.8),
        ("harmonic", 0.25, 2 * 0.8 * 0.6 / 1.4),
        ("worst_domain", 0.25, 0.5),
    ],
)
def test_a_value_is_that_of_the_formula_and_weights_are_its_derivatives(kind, id_weight, expected):
    step, point = 1e-6, {"id_val": 0.8, "noisy": 0.5, "blurry": 0.7}
    spec = ObjectiveSpec(kind, "id_val", ("noisy", "blurry"), id_weight)
    assert spec.value(point) == pytest.approx(expected)
    for name, weight in spec.weights(point).items():
        up, down = (spec.value({**point, name: point[name] + sign * step}) for sign in (1, -1))
        assert weight == pytest.approx((up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_limit_cases(kind):
    alone, spec = ObjectiveSpec(kind, "id_val", ()), ObjectiveSpec(kind, "id_val", ("a", "b"), 0.3)
    assert (alone.value({"id_val": 0.7}), alone.weights({"id_val": 0.4})) == (0.7, {"id_val": 1.0})
    for accuracy in (0.0, 0.6, 1.0):
        equal = dict.fromkeys(spec.sets, accuracy)
        assert spec.value(equal) == pytest.approx(accuracy)
        assert all(map(math.isfinite, spec.weights(equal).values()))
    lowest = ObjectiveSpec("worst_domain", "id_val", ("a", "b")).weights({"id_val": 0.1, "a": 0.3, "b": 0.3})
    assert lowest == {"id_val": 0, "a": 1, "b": 0}  # the first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ood_sets", [("a", "b"), ()])
def test_values_of_many_models_are_those_of_each(kind, ood_sets):
    rng = np.random.default_rng(0)
    spec = ObjectiveSpec(kind, "id_val", ood_sets, 0.3)
    accuracies = {name: rng.random((3, 4)) for name in ("id_val", *ood_sets)}
    for array in accuracies.values():
        array[0, 0] = 0.0
    values = spec.values(accuracies)
    for index in np.ndindex(3, 4):
        one = {name: float(array[index]) for name, array in accuracies.items()}
        assert values[index] == pytest.approx(spec.value(one), abs=1e-14)


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    zero_shot = {
        "weight": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "running_mean": torch.randn(3, generator=generator),
        "num_batches_tracked": torch.tensor(7),
        "mask": torch.full((2, 2), -torch.inf),
    }
    moved = zero_shot["weight"] + torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return zero_shot, {**zero_shot, "weight": moved, "num_batches_tracked": torch.tensor(9)}


def test_a_mixture_is_that_of_numpy_and_its_ends_are_the_models_bit_for_bit(states):
    zero_shot, fine_tuned = (state["weight"].numpy().copy() for state in states)
    for alpha in (0.0, 0.1, 0.73, 1.0):
        mixed = mix_weights(*states, alpha)
        expected = (1 - alpha) * zero_shot + alpha * fine_tuned
        np.testing.assert_allclose(mixed["weight"].numpy(), expected, rtol=0, atol=1e-9 if 0 < alpha < 1 else 0)
        for name in ("num_batches_tracked", "mask", "running_mean"):  # integers, and what is equal at both ends
            assert torch.equal(mixed[name], states[0][name])
        mixed["weight"].zero_()  # a copy


def test_wrong_alpha_and_wrong_names_are_refused(states):
    with pytest.raises(ValueError, match="0 <= alpha <= 1"):
        mix_weights(*states, 1.5)
    for name in ("extra", "weight"):
        with pytest.raises(ValueError, match=f"differ: {name}"):
            mix_weights(states[0], {**states[1], name: torch.zeros(1)}, 0.5)


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


def test_trials_wait_for_the_baselines_that_a_constraint_names_and_no_longer(study_dir):
    drops = {"zero_shot": 0.1, "plain": 0.05}
    baselines = {"plain": {"kl_weight": 0}, "other": {"kl_weight": 1}}
    recipe = make_recipe(2, **PROFILE, baselines=baselines, constraints={"id_drop": drops})
    with searching(study_dir, recipe) as study:
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
        trial = study.next()
        assert trial.kind == "trial"  # the other baseline is named by no constraint
        study_steps.write_result(study_dir, trial)  # without its violations
        with pytest.raises(StorageError, match="violation/id_drop/zero_shot"):
            study.settle(trial)
        references = json.loads((study_dir / "prepared" / "references.json").read_text())
        assert references.keys() == drops.keys()
        assert references["zero_shot"] == ZERO_SHOT["id_accuracy"]


def test_a_baseline_that_ends_without_a_result_ends_the_search_with_one_message_that_names_it(study_dir):
    recipe = make_recipe(2, **PROFILE, constraints={"id_drop": {"plain": 0.05}})
    with searching(study_dir, recipe) as study:
        spec = study.next()
        study.settle(spec, failed(spec, "diverged", "loss not finite"))
        with pytest.raises(NoSuccessfulTrialError) as caught:
            study.next()
    assert caught.value.exit_code == 6
    [problem] = caught.value.problems
    assert problem.place == "search.constraints.id_drop.plain"
    assert problem.value == "diverged: loss not finite"
    assert "baselines/plain/log.txt" in problem.next_step


@pytest.mark.slow
def test_weights_of_trials_that_meet_the_constraints_stay_before_better_ones_that_do_not(study_dir):
    recipe = make_recipe(6, **PROFILE, baselines={}, constraints={"id_drop": {"zero_shot": 0.0}}, keep_checkpoints=1)
    with searching(study_dir, recipe) as study:
        study.add_zero_shot({**ZERO_SHOT, "id_accuracy": 0.99})  # which none reaches
        run_all(study)
    view = read_study(study_dir)
    assert [path.parents[1].name for path in study_dir.glob("trials/*/*/fine_tuned.safetensors")] == [view.best.name]
    assert view.best.violation == min(row.violation for row in view.trials)
    [line] = status(view)["lines"]
    assert line.startswith(f"No trial meets all constraints; {view.best.name} misses them least: it violates id_drop")


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
