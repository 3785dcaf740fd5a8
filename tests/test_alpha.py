"""The alpha curve, the objective, constraints, mixing and metrics: formulas, limit cases, ties, oracles."""

import itertools
import math
import operator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.special
import sklearn.metrics
import study_steps
import torch
from curve_stand_in import ZERO_SHOT, make_recipe, run_all, write_result
from report_studies import predictions, predictions_table
from study_steps import failed, searching

from carft_ray.errors import DataError, DivergedError, NoSuccessfulTrialError, RecipeError, StorageError
from carft_ray.evaluation import metrics
from carft_ray.evaluation.alpha_curve import (
    Limit,
    alphas_at_chance,
    choose_point,
    curve_points,
    limits,
    measure_curve,
    violations_at,
)
from carft_ray.evaluation.metrics import answers, equal_width_bins
from carft_ray.evaluation.objective import ObjectiveSpec, metrics_at
from carft_ray.evaluation.predictions import concat, correct, correct_matrix, read_predictions, write_predictions
from carft_ray.model.mixing import mix_weights
from carft_ray.recipe.loading import apply, load_recipe
from carft_ray.recipe.rules import warnings
from carft_ray.recipe.schema.recipe import alone
from carft_ray.recipe.schema.search import (
    DEFAULT_GRID,
    ConstraintsConfig,
    constraint_names,
    total_violation,
    violation_words,
)
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study

MEASURED = tuple(sorted({*DEFAULT_GRID, 0.1}))  # by default: the grid and the lowest alpha that may be chosen
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("noisy",), 0.5)


def points(objectives, alphas=MEASURED, **violations):
    """Points of a curve; ``violations`` are lists by the name of a constraint."""
    named = {f"violation/{name}": values for name, values in violations.items()}
    return pa.table({"alpha": alphas, "objective": objectives, **named}).to_pylist()


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
    pareto, fixed = make_recipe(), make_recipe(objective={}, alpha={"mode": "sample"})
    for recipe, expected in ((fixed, [0.0, 0.7, 1.0]), (pareto, sorted({*MEASURED, 0.7}))):
        assert list(measured(apply(recipe, {"alpha": 0.7}))) == expected
    tables = measured(make_recipe(objective={}, alpha={}))
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


def test_a_training_has_diverged_only_where_every_alpha_is_at_most_chance():
    assert alphas_at_chance(curve_of(1000, 1100, 1200), "id_val") == []
    assert alphas_at_chance(curve_of(1000, 700, "constant"), "id_val") == [1.0]
    assert alphas_at_chance(curve_of(1000, 700, 0), "id_val") == [1.0]
    told = r"alpha curve: ID accuracy must be above chance, but got at most 6\.2 % of 2,000 images right, as with .*"
    told += r"\n    The training has diverged; try a lower learning_rate\."
    with pytest.raises(DivergedError, match=told):
        alphas_at_chance(curve_of(1000, "constant", "constant"), "id_val")
    assert alphas_at_chance(curve_of(1000, 0, 0), "id_val") == [0.5, 1.0]  # 7.0 %, above 6.25 % by luck
    assert alphas_at_chance(curve_of(0, 0, 0), "id_val") == []  # zero-shot knows no more
    assert alphas_at_chance(curve_of("constant", 700, 0), "id_val") == []


def small_curve(labels, *answers):
    """Predictions at alphas from 0 to 1: a digit is a class."""
    labels, tables = np.array([*map(int, labels)]), {}
    for alpha, given in zip(np.linspace(0, 1, len(answers)).tolist(), answers, strict=True):
        logits = np.eye(10, dtype=np.float32)[[*map(int, given)]]
        tables[alpha] = predictions_table("id_val", alpha, np.arange(len(labels), dtype=np.uint64), labels, logits)
    return tables


def test_few_images_make_no_training_diverged():
    """Eight of ten right is above chance, 50 %, but not shown to be."""
    labels, nine, eight = "0000011111", "0000011110", "0000111110"
    assert alphas_at_chance(small_curve(labels, nine, eight, eight), "id_val") == [0.5, 1.0]
    assert alphas_at_chance(small_curve(labels, nine, "1000111110"), "id_val") == [1.0]  # 70 %
    for lost in ("0000000000", "0001100011", "1111100000"):  # one class; half right; none
        with pytest.raises(DivergedError, match="ID accuracy must be above chance"):
            alphas_at_chance(small_curve(labels, nine, lost, lost), "id_val")
    assert alphas_at_chance(small_curve("0011", "0011", "0000"), "id_val") == []  # four can show nothing


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
    for share in (0.0, 0.6, 1.0):
        equal = dict.fromkeys(spec.sets, share)
        assert spec.value(equal) == pytest.approx(share)
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
        found = {row.name: row.metrics.get("id_accuracy") for row in study.rows("baseline")}
        assert trial.references == {name: found[name] for name in drops}
        study_steps.write_result(study_dir, trial)  # without its violations
        with pytest.raises(StorageError, match="violation/id_drop/zero_shot"):
            study.settle(trial)


def test_a_baseline_that_ends_without_a_result_ends_the_search_with_one_message_that_names_it(study_dir):
    recipe = make_recipe(2, **PROFILE, constraints={"id_drop": {"plain": 0.05}})
    with searching(study_dir, recipe) as study:
        spec = study.next()
        study.settle(spec, failed(spec, "diverged", "loss not finite"))
        with pytest.raises(NoSuccessfulTrialError) as caught:
            study.next()
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
    [kept] = [path.parents[1].name for path in study_dir.glob("trials/*/*/fine_tuned.safetensors")]
    violations = sorted(row.violation for row in view.trials)
    assert next(row.violation for row in view.trials if row.name == kept) <= violations[1]  # of those with weights
    assert kept != max(view.trials, key=lambda row: row.objective).name
    assert view.best.order == min(row.order for row in view.trials)
    line, *expected = status(view)["lines"]
    assert expected[0].startswith(f"Best: {view.best.name}, expected ")
    assert line.startswith(f"No trial meets all constraints; {view.best.name} violates them least: it violates id_drop")


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


CASES = ("random", "ties", "empty classes", "two classes", "confident")


def case(name):
    """Labels [N] and logits [N, C] of one kind."""
    num_classes = {"two classes": 2, "empty classes": 24}.get(name, 16)
    _, labels, logits = random_set(900, num_classes, seed=CASES.index(name), scale=3)
    logits[np.arange(900), labels] += 2
    if name == "ties":
        logits = np.round(logits / 4) * 4  # one image in three has several largest logits
    if name == "empty classes":
        labels = labels // 2 * 2  # no odd class
    if name == "confident":
        logits *= 30
    return labels, logits


@pytest.fixture(params=CASES)
def both(request):
    """The answers, and what the oracles take: labels, logits and probabilities in float64."""
    labels, logits = case(request.param)
    given = answers(predictions_table("set", 1.0, np.arange(len(labels), dtype=np.uint64), labels, logits))
    return given, labels, logits, scipy.special.softmax(logits.astype(np.float64), axis=1)


def same(value):
    return pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.97, 0.01, 0.01, 0.01)])
def test_one_class_as_the_only_answer_is_at_chance_however_common_it_is(shares):
    labels = np.repeat(np.arange(len(shares)), [round(share * 1000) for share in shares])
    for answer in range(len(shares)):
        assert not metrics.is_above_chance(labels, np.full(len(labels), answer))
    assert metrics.is_above_chance(labels, labels)
    for few in (0, 1):  # no image and one tell nothing
        assert not metrics.is_above_chance(np.zeros(few, int), np.zeros(few, int))
    assert metrics.chance(np.zeros(0, int), np.zeros(0, int)) == 0


@pytest.mark.parametrize(
    ("labels", "given"),
    [("00011222", "00112222"), ("0011", "0011"), ("01234", "01234"), ("0001", "0011"), ("012", "012")],
)
def test_luck_is_that_of_answers_dealt_out_at_random(labels, given):
    """Against all orders of a few answers."""
    labels, given = np.array([*map(int, labels)]), np.array([*map(int, given)])
    right = [sum(map(operator.eq, labels, order)) for order in itertools.permutations(given)]
    limit = np.mean(right) + 1.96 * np.std(right)
    assert metrics.chance(labels, given) == pytest.approx(np.mean(right) / len(labels))
    for order in itertools.islice(itertools.permutations(given), 0, None, 97 if len(labels) > 5 else 1):
        is_above = sum(map(operator.eq, labels, order)) > limit
        assert metrics.is_above_chance(labels, np.array(order)) == is_above


def test_accuracies_by_class_equal_those_of_scikit_learn(both):
    given, labels, logits, _ = both
    classes, found = np.arange(logits.shape[1]), metrics.class_accuracies(given)
    assert list(found) == sorted(set(labels.tolist()))
    recall = sklearn.metrics.recall_score(labels, logits.argmax(1), labels=classes, average=None, zero_division=np.nan)
    assert all(value == same(recall[index]) for index, value in found.items())
    of_set = metrics.set_metrics(given)
    assert of_set["worst_class"] == {"index": int(np.nanargmin(recall)), "accuracy": same(np.nanmin(recall))}
    assert of_set["mean_class_accuracy"] == same(np.nanmean(recall))
    numbers = [value for value in of_set.values() if not isinstance(value, dict)]
    assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers)


def test_negative_log_likelihood_and_brier_score_equal_those_of_torch_and_scikit_learn(both):
    given, labels, logits, probabilities = both
    found, classes = metrics.set_metrics(given), np.arange(logits.shape[1])
    oracle = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert found["nll"] == same(oracle)
    oracle = sklearn.metrics.brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False)
    assert found["brier"] == same(oracle)


def guo(confidence, correct, num_bins):
    """ECE as Guo et al. 2017 compute it: lower edge out, upper edge in."""
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > np.float32(b / num_bins)) & (confidence <= np.float32((b + 1) / num_bins))
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_calibration_error_equals_that_of_guo(both, num_bins):
    given = both[0]
    found = metrics.expected_calibration_error(given, num_bins)
    assert found == same(guo(given.confidence, given.correct, num_bins))


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    assert equal_width_bins(np.array([0.0, 0.25, 0.25, 0.26, 0.5, 0.75, 1.0]), 4).tolist() == [0, 0, 0, 1, 1, 2, 3]
    edges = (np.arange(1, 16) / 15).astype(np.float32)
    assert equal_width_bins(edges).tolist() == list(range(15))
    assert equal_width_bins(np.nextafter(edges[:-1], np.float32(1))).tolist() == list(range(1, 15))


def test_huge_logits_give_finite_metrics():
    given = answers(predictions_table("s", 1.0, [1, 2, 3], [0, 1, 1], [[3e4, -3e4], [3e4, -3e4], [-3e4, -3e4]]))
    assert given.confidence.tolist() == [1, 1, 0.5]
    assert given.nll.tolist() == [0, 6e4, np.float32(math.log(2))]
    assert given.brier.tolist() == pytest.approx([0, 2, 0.5], abs=1e-7)


def random_set(num_samples=37, classes=16, seed=0, scale=8.0):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(num_samples, dtype=np.uint64) * np.uint64(2**57 + 1) + np.uint64(2**63))
    labels = rng.integers(0, classes, num_samples)
    logits = (scale * rng.normal(size=(num_samples, classes))).astype(np.float32)
    return ids, labels, logits


def table_of(set_name="id_val", alpha=1.0, **kwargs):
    return predictions_table(set_name, alpha, *random_set(**kwargs))


@pytest.mark.parametrize("classes", [1, 3, 16, 300])
def test_table_agrees_with_numpy(classes):
    ids, labels, logits = random_set(classes=classes)
    table = predictions_table("id_val", 0.6, ids, labels, logits)
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    place = 1 + np.flatnonzero(order == labels[:, None]) % classes
    assert table["rank"].to_pylist() == np.where(place <= 5, place, 0).tolist()
    assert table["prediction"].to_pylist() == order[:, 0].tolist()
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    of_label = -np.log(p[np.arange(len(p)), labels])
    for name, expected in (("confidence", p.max(1)), ("nll", of_label), ("sum_p2", (p**2).sum(1))):
        np.testing.assert_allclose(table[name].to_numpy(), expected, rtol=2**-24, atol=1e-12)
    assert table["sample_id"].to_numpy().tolist() == ids.tolist()
    found = metrics.set_metrics(answers(table))
    assert found["accuracy"] == np.mean(place == 1)
    assert found["top5"] == np.mean(place <= 5)


def test_equal_logits_are_ordered_by_class_index():
    rows = [[0, 7, 7, 7], [1, 1, 1, 1], [7, 7, 0, 7]]
    table = predictions_table("s", 0.0, np.arange(3, dtype=np.uint64), [2, 0, 3], rows)
    assert table["rank"].to_pylist() == [2, 1, 3]
    assert table["prediction"].to_pylist() == [1, 0, 0]


def test_a_group_of_classes_scores_its_largest_logit_and_is_named_by_its_first_class():
    groups, (ids, labels, logits) = ((4, 1), (0, 2, 3)), random_set(classes=6)
    labels = np.where(labels % 2, 4, 0)
    found = predictions_table("s", 1.0, ids, labels, logits, groups)
    largest = np.stack([logits[:, list(group)].max(axis=1) for group in groups], axis=1)
    plain = predictions_table("s", 1.0, ids, (labels == 0).astype(int), largest)
    assert found["prediction"].to_pylist() == [groups[index][0] for index in plain["prediction"].to_pylist()]
    for name in ("rank", "confidence", "nll", "sum_p2"):
        assert found[name].equals(plain[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_that_counts_the_images(value):
    ids, labels, logits = random_set()
    logits[3, 1] = value
    told = r"^model\.pretrained: class logits of the zero-shot model for id_val must be finite, but those of 1 of 37 .*"
    with pytest.raises(DataError, match=told + r"\n    Use other weights: these are damaged\.$"):  # no training blamed
        predictions_table("id_val", 0.0, ids, labels, logits)
    with pytest.raises(DivergedError, match=r"id_val at alpha 0\.4: class logits must be finite, but those of 1 of 37"):
        predictions_table("id_val", 0.4, ids, labels, logits)


def test_correctness_does_not_depend_on_the_order_of_the_rows():
    ids, labels, logits = random_set()
    order = np.random.default_rng(5).permutation(37)
    a = predictions_table("s", 1.0, ids, labels, logits)
    b = predictions_table("s", 1.0, ids[order], labels[order], logits[order])
    assert correct(a, "s", 1.0).tolist() == correct(b, "s", 1.0).tolist()
    by_id = dict(zip(ids.tolist(), (logits.argmax(1) == labels).tolist(), strict=True))
    assert correct(a, "s", 1.0).tolist() == [by_id[i] for i in sorted(by_id)]
    assert correct_matrix([(a, 1.0), (b, 1.0)], "s").shape == (2, 37)


def test_results_of_other_images_or_of_no_evaluation_are_an_error():
    with pytest.raises(DataError, match="must be of the same images"):
        correct_matrix([(table_of(), 1.0), (table_of(num_samples=36), 1.0)], "id_val")
    with pytest.raises(DataError, match=r"but got noisy at 0.5 \(allowed: id_val at 1\)"):
        correct(table_of(), "noisy", 0.5)


def test_file_gives_back_the_same_table_in_the_published_format(tmp_path):
    table = concat([table_of("id_val"), table_of("noisy", 0.6, seed=1)])
    path = tmp_path / "predictions" / "t.parquet"
    write_predictions(path, table)
    assert read_predictions(path).equals(table)
    assert [file.name for file in path.parent.iterdir()] == ["t.parquet"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert " ".join(table.schema.names) == "set alpha sample_id label prediction rank confidence nll sum_p2"


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    path, table = tmp_path / "t.parquet", table_of()
    for broken in (b"", b"nonsense"):
        path.write_bytes(broken)
        with pytest.raises(StorageError, match=rf"{path}: must be a readable Parquet file"):
            read_predictions(path)
    with pytest.raises(StorageError, match="No such file"):
        read_predictions(tmp_path / "none.parquet")
    for foreign, message in (
        (pa.table({"a": [1]}), "format_version of predictions must be 4, but got none"),
        (table.replace_schema_metadata({"format_version": "3"}), "must be 4, but got 3\n    Evaluate the model again"),
        (table.drop_columns(["label"]), r"must have the columns set, alpha, .*, but got set, alpha, sample_id, pred"),
    ):
        pq.write_table(foreign, path)
        with pytest.raises(StorageError, match=message):
            read_predictions(path)
