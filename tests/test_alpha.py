"""The alpha curve, the objective and mixing: which point is chosen, formulas, limit cases and derivatives."""

import math

import curve_stand_in
import numpy as np
import pytest
import torch
from from_logits import predictions_table

from carft_ray.errors import DataError, DivergedError
from carft_ray.evaluation.alpha import alphas_at_chance, choose_point, curve_points, measure_curve
from carft_ray.evaluation.objective import ObjectiveSpec, metrics_at
from carft_ray.evaluation.predictions import concat
from carft_ray.model.mixing import mix_weights
from carft_ray.recipe.schema.recipe import DEFAULT_GRID
from carft_ray.recipe.trial_values import apply

MEASURED = tuple(sorted({*DEFAULT_GRID, 0.1}))  # by default: the grid and the lowest alpha that may be chosen
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("sketch",), 0.5)


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
    """Measures the curve of a recipe with predictions whose OOD accuracy rises and falls: the tables by alpha."""
    rng, asked = np.random.default_rng(0), []
    luck = {name: rng.random(500) for name in ("id_val", "sketch")}
    ids = {name: rng.integers(0, 2**64, 500, dtype=np.uint64) for name in luck}

    def at(alpha):
        asked.append(alpha)
        accuracies = {"id_val": 0.7 + 0.1 * alpha, "sketch": 0.5 + 0.3 * alpha * (1 - alpha)}
        rights = {name: luck[name] < accuracy for name, accuracy in accuracies.items()}
        logits = {name: np.stack([right, ~right], 1).astype(np.float32) for name, right in rights.items()}
        return concat(
            [predictions_table(name, alpha, ids[name], np.zeros(500, np.int64), logits[name]) for name in luck]
        )

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
    told = r"alpha curve: ID accuracy must be above chance, but got at most \d\.\d % of 2,000 images right"
    with pytest.raises(DivergedError, match=told):
        alphas_at_chance(curve_of(1000, 0, "constant"), "id_val")
    assert alphas_at_chance(curve_of(0, 0, 0), "id_val") == []  # zero-shot knows no more
    assert alphas_at_chance(curve_of("constant", 700, 0), "id_val") == []


# ---- the objective

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


# ---- mixing


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
