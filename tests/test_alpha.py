"""The choice of alpha: exact cases, fall-backs, the noise it is measured against, and its gain in simulations."""

import json
import math
from dataclasses import asdict

import curve_stand_in
import numpy as np
import pytest

from carft_ray.errors import CarftError, DataError, DivergedError
from carft_ray.evaluation.alpha import (
    AlphaProfile,
    alpha_profile,
    between,
    choose_alpha,
    choose_alphas,
    fitted_curve,
    neighbour_se,
    objective_covariance,
)
from carft_ray.evaluation.curve import alphas_at_chance, measure_curve
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import concat, predictions_table
from carft_ray.recipe.spaces.space import apply
from carft_ray.results.statistics.intervals import crossed

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MEASURED = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # by default: the grid and the lowest alpha that may be chosen
FINE = np.arange(21) / 20


def cubic(alpha, c=(0.2, -0.1, -0.08), start=0.6):
    return start + c[0] * alpha + c[1] * alpha**2 + c[2] * alpha**3


def noise(neighbour_se, num=6):
    """Covariance of independent points with this paired standard error of neighbours."""
    return np.eye(num) * neighbour_se**2 / 2


def test_a_cubic_without_noise_is_recovered_exactly():
    choice = choose_alpha(GRID, [cubic(alpha) for alpha in GRID], 0.1, noise(1e-9))
    best = FINE[np.argmax(cubic(FINE))]
    assert (choice.alpha, choice.fitted, choice.reason) == (best, True, "")
    assert choice.value == pytest.approx(cubic(best), abs=1e-12)


def test_order_of_the_points_does_not_matter():
    objectives = [cubic(alpha) + 0.001 * math.sin(50 * alpha) for alpha in GRID]
    shuffled = [3, 0, 5, 1, 4, 2]
    assert choose_alpha(
        [GRID[i] for i in shuffled], [objectives[i] for i in shuffled], 0.1, noise(0.01)
    ) == choose_alpha(GRID, objectives, 0.1, noise(0.01))


def test_an_alpha_below_the_lowest_is_never_chosen():
    falling = [0.7 - 0.1 * alpha for alpha in GRID]
    assert choose_alpha(GRID, falling, 0.1, noise(0.01)).alpha == 0.1
    assert choose_alpha(GRID, falling, 0.1, noise(0.01)).value == pytest.approx(0.69)
    assert choose_alpha(GRID, falling, 0.33, noise(0.01)).alpha == 0.35
    assert choose_alpha((0.0, 0.5, 1.0), [0.7, 0.6, 0.5], 0.1, noise(0.01, 3)).alpha == 0.5
    assert choose_alpha(GRID, falling, 1.0, noise(0.01)).alpha == 1.0


def test_of_equal_values_the_smaller_alpha_wins():
    assert choose_alpha(GRID, [0.7] * 6, 0.1, noise(0.0)) == choose_alpha(GRID, [0.7] * 6, 0.1, None)
    assert choose_alpha(GRID, [0.7] * 6, 0.1, noise(0.0)).alpha == 0.1
    assert choose_alpha((0.0, 0.5, 1.0), [0.6, 0.7, 0.7], 0.1, None).alpha == 0.5


@pytest.mark.parametrize("grid", [GRID, GRID[:4], GRID[:3], GRID[1:], (0.0, 0.03, 0.5, 1.0)])
@pytest.mark.parametrize("noise_se", [1e-4, 0.004, 1.0])
def test_many_curves_are_chosen_as_each_alone(grid, noise_se):
    rng = np.random.default_rng(1)
    curves = 0.6 + 0.1 * rng.random((40, 1)) * np.array(grid) + rng.normal(0, 0.01, (40, len(grid)))
    curves[:10] = np.round(curves[:10], 2)  # with ties
    noises = np.stack([noise(noise_se * scale, len(grid)) for scale in rng.uniform(0.5, 2, 40)])
    many = choose_alphas(grid, curves, 0.1, noises)
    assert many.values == pytest.approx((many.readers * curves).sum(axis=1))
    for b, curve in enumerate(curves):
        one = choose_alpha(grid, curve.tolist(), 0.1, noises[b])
        assert (many.alphas[b], many.values[b]) == (one.alpha, pytest.approx(one.value, abs=1e-12))
        assert many.fitted[b] == one.fitted
        other = rng.random(len(grid))
        if one.fitted:
            assert many.readers[b] @ other == pytest.approx(fitted_curve(grid, other, [one.alpha])[0])
        else:
            assert many.readers[b] @ other == other[grid.index(one.alpha)]


def test_fewer_than_four_points_give_the_raw_maximum_with_the_reason():
    choice = choose_alpha((0.0, 0.5, 1.0), [0.6, 0.72, 0.7], 0.1, noise(0.01, 3))
    assert (choice.alpha, choice.value, choice.fitted, choice.reason) == (0.5, 0.72, False, "fewer than 4 points")
    assert choose_alpha((0.0, 0.3, 0.6, 1.0), [0.6, 0.7, 0.7, 0.6], 0.1, noise(0.01, 4)).fitted


def test_a_curve_without_its_anchor_gives_the_raw_maximum():
    choice = choose_alpha(GRID[1:], [0.6, 0.7, 0.8, 0.7, 0.6], 0.1, noise(0.01, 5))
    assert (choice.alpha, choice.value, choice.reason) == (0.6, 0.8, "alpha 0 was not evaluated")


def test_residuals_beyond_the_noise_give_the_raw_maximum_with_the_reason():
    peaked = [0.6, 0.61, 0.62, 0.72, 0.62, 0.6]
    choice = choose_alpha(GRID, peaked, 0.1, noise(0.005))
    assert (choice.alpha, choice.value, choice.fitted) == (0.6, 0.72, False)
    assert "above 1.5 paired standard errors of 0.0050" in choice.reason
    assert choose_alpha(GRID, peaked, 0.1, noise(0.1)).fitted
    assert choose_alpha(GRID, peaked, 0.1, None).fitted


def test_residual_sd_has_two_degrees_of_freedom_on_the_default_grid():
    objectives = np.array([0.6, 0.61, 0.63, 0.64, 0.62, 0.6])
    points = np.array(GRID[1:])
    powers = np.stack([points, points**2, points**3], axis=1)
    _, rss, *_ = np.linalg.lstsq(powers, objectives[1:] - 0.6, rcond=None)
    sd = math.sqrt(rss[0] / 2)
    assert choose_alpha(GRID, objectives, 0.1, noise(sd / 1.5 * 1.001)).fitted
    assert not choose_alpha(GRID, objectives, 0.1, noise(sd / 1.5 * 0.999)).fitted


def test_a_curve_that_ends_early_is_not_extrapolated():
    rising = [0.6 + 0.1 * alpha for alpha in GRID[:5]]
    assert choose_alpha(GRID[:5], rising, 0.1, noise(0.01, 5)).alpha == 0.8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_not_finite_is_an_error_that_names_its_alpha(bad):
    with pytest.raises(CarftError, match=r"alpha 0\.4: the objective must be finite"):
        choose_alpha(GRID, [0.6, 0.6, bad, 0.6, 0.6, 0.6], 0.1, noise(0.01))


def test_no_eligible_alpha_and_double_alphas_are_refused():
    with pytest.raises(CarftError, match=r"at least one evaluated alpha must be 0\.9 or more, but got 0, 0\.5"):
        choose_alpha((0.0, 0.5), [0.6, 0.7], 0.9, None)
    with pytest.raises(ValueError, match="must be different"):
        choose_alpha((0.0, 0.5, 0.5), [0.6, 0.7, 0.7], 0.1, None)


def random_correct(rng, num=200):
    return {"id": rng.random(num) < 0.7, "ood": rng.random(num // 2) < 0.5}


def pair_se(covariance):
    return math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])


def stacked(points):
    return {name: np.stack([point[name] for point in points]) for name in points[0]}


def test_the_covariance_gives_the_interval_with_one_seed_on_differences():
    rng = np.random.default_rng(0)
    a, b = random_correct(rng), random_correct(rng)
    spec = ObjectiveSpec("weighted_mean", "id", ("ood",), 0.3)
    differences = {name: a[name][None].astype(float) - b[name][None] for name in a}
    covariance = objective_covariance(stacked([a, b]), spec)
    assert pair_se(covariance) == pytest.approx(crossed(differences, {"id": 0.3, "ood": 0.7}).standard_error, rel=1e-12)
    assert pair_se(objective_covariance(stacked([a, a]), spec)) == 0
    one_image = {"id": np.array([[True], [False]])}
    assert (objective_covariance(one_image, ObjectiveSpec("weighted_mean", "id", ())) == 0).all()


def test_neighbour_se_is_the_root_mean_square_over_neighbouring_pairs():
    rng = np.random.default_rng(1)
    curve = stacked([random_correct(rng) for _ in range(4)])
    spec = ObjectiveSpec("weighted_mean", "id", ("ood",), 0.4)
    covariance = objective_covariance(curve, spec)
    pairs = [pair_se(covariance[i : i + 2, i : i + 2]) for i in range(3)]
    assert neighbour_se(covariance) == pytest.approx(np.sqrt(np.mean(np.square(pairs))), rel=1e-12)
    harmonic = neighbour_se(objective_covariance(curve, ObjectiveSpec("harmonic", "id", ("ood",))))
    assert 0.5 * neighbour_se(covariance) < harmonic < 2 * neighbour_se(covariance)


def test_a_fit_that_misses_one_measured_point_by_three_of_its_own_standard_errors_is_rejected():
    points = np.array(MEASURED[1:])
    powers = np.stack([points, points**2, points**3], axis=1)
    hat = powers @ np.linalg.pinv(powers)
    objectives = np.array([0.6, 0.61, 0.62, 0.64, 0.66, 0.62, 0.6])
    residuals = np.append(0, objectives[1:] - 0.6 - hat @ (objectives[1:] - 0.6))
    share = np.sqrt(np.append(1, 1 - np.diag(hat)))  # standard error of a residual over that of its point
    point_se = np.abs(residuals / share).max() / 3
    points_alone = np.diag([0.0, *[point_se**2] * 6])  # all points but the anchor vary, each for itself
    assert math.sqrt(residuals @ residuals / 3) < 1.49 * neighbour_se(points_alone)  # the residuals together pass
    assert choose_alpha(MEASURED, objectives, 0.1, points_alone * 1.001).fitted
    choice = choose_alpha(MEASURED, objectives, 0.1, points_alone * 0.999)
    assert (choice.alpha, choice.value, choice.fitted) == (0.6, 0.66, False)
    assert "above 3 paired standard errors of" in choice.reason


def profile_of(alphas, objectives, neighbour_se=0.01, violations=()):
    """A profile with one set, whose accuracies are the objectives."""
    noise_AA, missed = noise(neighbour_se, len(alphas)), np.array(violations) if violations else None
    choice = choose_alpha(alphas, objectives, 0.1, noise_AA, missed)
    return AlphaProfile(alphas, {}, tuple(objectives), noise_AA, choice, missed)


def test_points_between_are_measured_at_an_end_of_the_curve_and_where_there_is_no_fit():
    falling = [0.7 - 0.1 * alpha for alpha in MEASURED]
    rising = [0.6 + 0.1 * alpha for alpha in MEASURED]
    inner = [0.6 + 0.1 * alpha * (1 - alpha) for alpha in MEASURED]
    peaked = [0.6, 0.6, 0.61, 0.62, 0.72, 0.62, 0.6]
    assert between(profile_of(MEASURED, falling), 0.1) == (0.15,)
    assert between(profile_of(MEASURED, rising), 0.1) == (0.9,)
    assert between(profile_of(MEASURED, inner), 0.1) == ()
    assert between(profile_of(MEASURED, peaked, 0.001), 0.1) == (0.5, 0.7)
    assert between(profile_of(MEASURED, peaked, 0.1), 0.1) == ()  # within the noise
    assert between(profile_of((0.0, 0.1, 1.0), [0.6, 0.7, 0.5]), 0.1) == (0.55,)  # too few points for a fit
    assert between(profile_of((0.0, 0.95, 1.0), [0.6, 0.7, 0.8]), 0.95) == ()  # nothing finer than steps of .05
    assert between(profile_of(GRID, [0.7] * 6), 1.0) == ()
    missed = ((-0.1, -0.1, -0.1, 0.1, 0.1, 0.1, 0.1),)
    assert between(profile_of(MEASURED, peaked, 0.001, missed), 0.1) == (0.15, 0.3)  # the best that meets all


def wise_curves(rng, num):
    """True curves: ID rises and saturates, OOD rises and falls, as for mixtures of zero-shot and fine-tuned weights."""
    gain, rate = rng.uniform(0.02, 0.12, (num, 1)), rng.uniform(0.5, 4, (num, 1))
    peak, bend = rng.uniform(0.1, 0.9, (num, 1)), rng.uniform(0.02, 0.15, (num, 1))
    id_gain = gain * (1 - np.exp(-rate * FINE)) / (1 - np.exp(-rate))
    return 0.65 + (id_gain + bend * (2 * peak * FINE - FINE**2)) / 2


@pytest.mark.slow
def test_the_cubic_is_less_biased_and_loses_less_than_the_raw_maximum():
    """Paired sd 0.53 points at distance 0.25; in points, about 0.21 / 0.10 against 0.29 / 0.14 (bias / regret)."""
    rng = np.random.default_rng(0)
    num, sd = 1000, 0.0053
    true = wise_curves(rng, num)
    walk = np.cumsum(rng.normal(0, sd * math.sqrt(0.05 / 0.25), (num, 20)), axis=1)
    seen = true + np.concatenate([np.zeros((num, 1)), walk], axis=1)
    columns = [round(20 * alpha) for alpha in MEASURED]
    walk_noise = sd**2 / 0.25 * np.minimum.outer(MEASURED, MEASURED)
    noise_se = float(neighbour_se(walk_noise))
    choices = [choose_alpha(MEASURED, row, 0.1, walk_noise) for row in seen[:, columns]]
    rows = np.arange(num)
    at_cubic = true[rows, [round(20 * choice.alpha) for choice in choices]]
    raw = 4 * (1 + seen[:, 4::4].argmax(axis=1))
    top = true[:, 2:].max(axis=1)
    bias = np.mean([choice.value for choice in choices] - at_cubic)
    raw_bias = np.mean(seen[rows, raw] - true[rows, raw])
    assert 0.001 < bias < 0.8 * raw_bias
    assert np.mean(top - at_cubic) < 0.8 * np.mean(top - true[rows, raw])
    assert np.mean([choice.fitted for choice in choices]) > 0.98
    # against the maximum of the full 21-point curve: at most one paired standard error worse in 95 % of trials
    full = 2 + seen[:, 2:].argmax(axis=1)
    assert np.mean(true[rows, full] - at_cubic <= noise_se) >= 0.95


STEEP = {0.0: (0.58, 0.54), 0.1: (0.44, 0.38), 0.2: (0.2, 0.16), 0.4: (0.08, 0.07), 0.6: (0.06, 0.06)}


def steep_run(recipe, asked):
    """What ``run_training`` measures and chooses on a curve that has lost most at alpha .2, in the order asked."""
    rng = np.random.default_rng(0)
    luck = {name: rng.random(1000) for name in ("id_val", "sketch")}
    ids = {name: rng.integers(0, 2**64, 1000, dtype=np.uint64) for name in luck}

    def at(alpha, rows=None):
        assert rows is None  # two classes with one margin for all: no image is settled
        asked.append(alpha)
        rights = {
            name: each < np.interp(alpha, list(STEEP), [pair[i] for pair in STEEP.values()])
            for i, (name, each) in enumerate(luck.items())
        }
        tables = [
            predictions_table(
                name, alpha, ids[name], np.zeros(1000, np.int64), np.stack([right, ~right], 1).astype(np.float32)
            )
            for name, right in rights.items()
        ]
        return concat(tables)

    spec = ObjectiveSpec("weighted_mean", "id_val", ("sketch",), 0.5)
    curve, choice, chosen_from = measure_curve(recipe, spec, (), at(0.0), at)
    return curve.table(), choice, chosen_from, curve.points(spec, ())


def test_the_lowest_alpha_is_measured_and_the_best_of_a_steep_curve_is_found():
    asked = []
    _, choice, chosen_from, curve = steep_run(curve_stand_in.make_recipe(objective={}, alpha={}), asked)
    assert asked == [0.0, 0.4, 1.0, 0.1, 0.2, 0.6, 0.8, 0.15]
    assert chosen_from == sorted(asked) == [point["alpha"] for point in curve]
    assert (choice.alpha, choice.fitted) == (0.1, False)
    assert choice.value == curve[1]["objective"] == pytest.approx(0.41, abs=0.03)
    assert "paired standard errors" in choice.reason


def test_a_curve_that_is_measured_again_is_the_same_bit_for_bit():
    """A training that was killed while its curve was measured measures all of it again."""
    recipe = curve_stand_in.make_recipe(objective={}, alpha={})
    first, again = (steep_run(recipe, []) for _ in range(2))
    assert first[0].equals(again[0])
    assert first[1:] == again[1:]


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
    told = (
        r"alpha curve: ID accuracy must be above chance, but got at most \d\.\d % of 2,000 images right, as with the "
    )
    with pytest.raises(DivergedError, match=told):
        alphas_at_chance(curve_of(1000, 0, "constant"), "id_val")
    assert alphas_at_chance(curve_of(0, 0, 0), "id_val") == []  # zero-shot knows no more
    assert alphas_at_chance(curve_of("constant", 700, 0), "id_val") == []


def test_a_fixed_alpha_and_a_pareto_search_measure_nothing_between():
    fixed = curve_stand_in.make_recipe(objective={}, alpha={"mode": "sample"})
    pareto = curve_stand_in.make_recipe()
    for recipe, expected in ((fixed, [0.0, 0.7, 1.0]), (pareto, [0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0])):
        asked = []
        values = apply(recipe, {"alpha": 0.7})
        _, choice, chosen_from, _ = steep_run(values, asked)
        assert (asked, choice.alpha, chosen_from) == (expected, 0.7, [0.7])


def simulated_predictions(seed=0, num=400, num_alphas=6):
    """Correctness over alpha from one uniform draw per image: neighbouring alphas agree on most images."""
    rng = np.random.default_rng(seed)
    tables = []
    for name, accuracy in (("id_val", lambda a: 0.7 + 0.1 * a), ("noisy", lambda a: 0.6 + 0.1 * a - 0.15 * a**2)):
        luck, ids = rng.random(num), rng.integers(0, 2**64, num, dtype=np.uint64)
        for alpha in np.linspace(0, 1, num_alphas).round(6).tolist():
            changed = rng.random(num) < 0.02
            right = (luck < accuracy(alpha)) ^ changed
            logits = np.stack([right, ~right], axis=1).astype(np.float32)
            tables.append(predictions_table(name, alpha, ids, np.zeros(num, np.int64), logits))
    return concat(tables)


SPEC = ObjectiveSpec("weighted_mean", "id_val", ("noisy",), 0.5)


@pytest.mark.parametrize("kind", ["weighted_mean", "harmonic", "worst_domain"])
def test_profile_derives_everything_from_the_predictions(kind):
    spec = ObjectiveSpec(kind, "id_val", ("noisy",))
    profile = alpha_profile(simulated_predictions(), spec, 0.1)
    noise_AA, accuracies = profile.noise_AA, profile.accuracies
    assert profile.alphas == GRID
    assert profile.objectives[3] == spec.value({"id_val": accuracies["id_val"][3], "noisy": accuracies["noisy"][3]})
    assert profile.choice == choose_alpha(GRID, profile.objectives, 0.1, noise_AA)
    assert 0.004 < neighbour_se(noise_AA) < 0.03
    json.dumps(asdict(profile.choice), allow_nan=False)


def test_profile_without_ood_sets_is_of_id_alone():
    profile = alpha_profile(simulated_predictions(), ObjectiveSpec("harmonic", "id_val", ()), 0.1)
    assert profile.accuracies == {"id_val": list(profile.objectives)}


def test_profile_of_a_single_alpha_is_that_point():
    table = simulated_predictions().filter(pa_equal("alpha", 1.0))
    profile = alpha_profile(table, SPEC, 0.1)
    assert (profile.choice.alpha, profile.choice.fitted) == (1.0, False)


def test_profile_with_sets_at_other_alphas_is_an_error():
    extra = predictions_table("id_val", 0.5, np.arange(2, dtype=np.uint64), [0, 0], np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match="predictions of noisy: must have been evaluated at the alphas of id_val"):
        alpha_profile(concat([simulated_predictions(), extra]), SPEC, 0.1)


def pa_equal(column, value):
    import pyarrow.compute as pc

    return pc.field(column) == value
