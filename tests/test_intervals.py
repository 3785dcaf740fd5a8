"""Crossed intervals: fixtures, sums written out, degenerate inputs, coverage; and the small statistics beside them."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import statistics
from carft_ray.evaluation.metrics import wilson
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics.headline import headline, in_points, objective_difference
from carft_ray.results.statistics.intervals import (
    OVER_IMAGES,
    accuracy_interval,
    crossed,
    objective_interval,
    paired_differences,
    rank_correlation,
)
from carft_ray.ui import console

FIXTURE = {
    "id": np.array([[1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1]], bool),
    "ood": np.array([[0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool),
}
HALVES = {"id": 0.5, "ood": 0.5}


def test_fixture():
    result = crossed(FIXTURE, HALVES)
    assert result.mean == pytest.approx(0.583333, abs=5e-7)
    assert result.seed_variance == pytest.approx(0.00520833, abs=5e-9)
    assert result.image_variance == pytest.approx(0.01145833, abs=5e-9)
    assert result.dof == pytest.approx(4.8454, abs=5e-5)
    assert result.ends == pytest.approx((0.24826, 0.91840), abs=5e-6)
    assert result.notes == ()
    assert in_points(result.mean, result.ends) == "58.3 [24.8, 91.8]"
    assert in_points(0.75, (0.26, 1.24), signed=True) == "+75.0 [+26.0, +124.0]"


def test_seeds_that_agree_by_chance_keep_the_noise_of_images():
    """Reference numbers worked out by hand; without V_res this was a point and p < 0.0001."""
    differences = np.array([[1, 0, 0, 0, 0, 0, 0, -1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]])
    result = crossed({"a": differences}, {"a": 1.0})
    assert (result.mean, result.seed_variance, result.image_variance) == (pytest.approx(0.1), 0, 0)
    assert result.residual_variance == pytest.approx(1 / 90)
    assert result.dof == pytest.approx(9)
    assert result.ends == pytest.approx((-0.13845, 0.33845), abs=5e-6)
    assert result.p_value == pytest.approx(0.3676, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "flips", "seed_sd"), [(2, 0.01, 0.03), (2, 0.05, 0.0), (3, 0.01, 0.03)])
def test_few_seeds_cover_zero_for_equal_configurations(num_seeds, flips, seed_sd):
    """300 pairs on 500 images; 95 % expected, Monte Carlo standard error 1.3 %; 88 % without the lower bounds."""
    found = statistics.pair_intervals(np.random.default_rng(0), 300, num_seeds, 500, flips, seed_sd)
    covered = [low <= 0 <= high for low, high in (each.ends for each in found)]
    assert np.mean(covered) >= 0.92
    assert all(low < high for low, high in (each.ends for each in found))


def test_random_data_agree_with_sums_written_out():
    rng = np.random.default_rng(4)
    skill = {"a": rng.random((1, 30)), "b": rng.random((1, 20))}
    values = {name: (rng.random((4, part.shape[1])) < part).astype(float) for name, part in skill.items()}
    weights = {"a": 0.7, "b": -0.4}
    y = [sum(weights[name] * values[name][q].mean() for name in values) for q in range(4)]
    v_seed, v_image, v_res = np.var(y, ddof=1) / 4, 0.0, 0.0
    for name, x in values.items():
        n = x.shape[1]
        total = x.mean()
        ms_i = 4 * sum((x[:, k].mean() - total) ** 2 for k in range(n)) / (n - 1)
        ms_e = sum((x[q, k] - x[q].mean() - x[:, k].mean() + total) ** 2 for q in range(4) for k in range(n))
        ms_e /= (n - 1) * 3
        v_image += weights[name] ** 2 * max(0, (ms_i - ms_e) / 4) / n
        v_res += weights[name] ** 2 * ms_e / (4 * n)
    dof = (v_seed + v_image) ** 2 / (v_seed**2 / 3 + v_image**2 / 19)
    half = stats.t.ppf(0.975, dof) * math.sqrt(v_seed + v_image)
    result = crossed(values, weights)
    assert v_image > 0
    assert v_seed > v_res == pytest.approx(result.residual_variance)
    assert result.ends == pytest.approx((np.mean(y) - half, np.mean(y) + half), abs=1e-12)
    p_values = [2 * stats.t.sf(abs(np.mean(y)) / math.sqrt(v), d) for v, d in ((v_seed + v_image, dof), (v_seed, 3))]
    assert result.p_value == pytest.approx(max(p_values), abs=1e-12)
    assert crossed({**values, "spare": np.ones((4, 2))}, {**weights, "spare": 0.0}) == result


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("num_seeds", [1, 2, 3])
@pytest.mark.parametrize("noise", [0, 1])  # without noise nothing varies: the rule of three
def test_p_value_and_interval_agree_and_new_images_never_narrow_it(num_seeds, level, noise):
    rng = np.random.default_rng(1)
    for _ in range(30):
        values = rng.normal(0.2) / 10 + noise * rng.normal(0.15, 1, (num_seeds, 40))
        result = crossed({"a": values}, {"a": 1.0}, level=level)
        assert (result.p_value < 1 - level) == (result.ends[0] > 0 or result.ends[1] < 0)
        if num_seeds > 1:
            half = stats.t.ppf((1 + level) / 2, num_seeds - 1) * math.sqrt(result.seed_variance)  # of these images
            assert result.ends[1] - result.mean >= half - 1e-12


def test_few_seeds_and_few_images_are_told_and_give_numbers():
    one = crossed({name: values[:1] for name, values in FIXTURE.items()}, HALVES)
    half = 1.959964 * math.sqrt(sum(0.25 * x[0].astype(float).var(ddof=1) / x.shape[1] for x in FIXTURE.values()))
    assert one.ends == pytest.approx((7 / 12 - half, 7 / 12 + half), abs=1e-6)
    assert (one.notes, one.words) == (("one training: seeds not covered",), OVER_IMAGES)
    two = crossed({name: values[:2] for name, values in FIXTURE.items()}, HALVES)
    assert "two seeds" in two.notes[0]
    assert two.ends[1] - two.mean >= 8.98 * np.std([7 / 12, 17 / 24], ddof=1)
    one_image = crossed({"a": np.array([[1], [0], [1]])}, {"a": 1.0})
    assert one_image.notes == ("a has one image: its image variance is not covered",)
    assert all(map(math.isfinite, one_image.ends))


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 0.1 + 0.2])
def test_where_nothing_varies_the_rule_of_three_holds(num_seeds, value):
    result = crossed({"a": np.full((num_seeds, 70), value), "b": np.zeros((num_seeds, 60))}, {"a": 0.5, "b": 0.5})
    half = -math.log(0.05) * 0.5 / 60
    assert result.ends == pytest.approx((result.mean - half, result.mean + half))
    assert result.p_value == pytest.approx(1.0 if value == 0 else 20 ** (-value / 2 / half))
    assert (result.seed_variance, result.residual_variance, result.image_variance) == (0, 0, 0)


def test_objectives_weigh_sets_by_their_derivatives():
    weighted, other = ObjectiveSpec("weighted_mean", "id", ("ood",), 0.5), {k: v[::-1] for k, v in FIXTURE.items()}
    assert objective_interval(weighted, FIXTURE).ends == pytest.approx(crossed(FIXTURE, HALVES).ends, abs=1e-14)
    difference = objective_difference(weighted, FIXTURE, other)
    plain = crossed(paired_differences(FIXTURE, other), HALVES)
    assert (*difference.ends, difference.p_value) == pytest.approx((*plain.ends, plain.p_value), abs=1e-12)
    harmonic = objective_interval(ObjectiveSpec("harmonic", "id", ("ood",)), FIXTURE)
    a, b = (FIXTURE[name].mean(axis=1) for name in ("id", "ood"))
    y = 2 * a * b / (a + b)
    assert (harmonic.mean, harmonic.seed_variance) == pytest.approx((y.mean(), y.var(ddof=1) / 3))
    a, b = a.mean(), b.mean()
    weights = {"id": 2 * b**2 / (a + b) ** 2, "ood": 2 * a**2 / (a + b) ** 2}
    assert harmonic.image_variance == pytest.approx(crossed(FIXTURE, weights).image_variance)


def test_an_accuracy_without_variation_gets_the_interval_of_wilson_and_stays_below_one():
    assert accuracy_interval(np.array([[True] * 9 + [False]])).ends == pytest.approx(wilson(9, 10))
    assert accuracy_interval(np.ones((3, 28), bool)).ends == pytest.approx(wilson(28, 28))
    nearly = np.ones((2, 40), bool)
    nearly[0, 0] = nearly[1, 1] = False
    result = accuracy_interval(nearly)
    assert 0 < result.ends[0] < result.mean < result.ends[1] == 1
    for right, num in ((0, 10), (3, 10), (812, 1008)):
        reference = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
        assert wilson(right, num) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    assert [console.percent(share, 28) for share in (0.0, 0.5)] == ["0.0 [0.0, 12.1]", "50.0 [32.6, 67.4]"]


def test_the_headline_says_better_worse_or_neither_and_worse_by_is_better_by_turned_round():
    noise = np.tile([0.1, -0.1], (3, 20)) + np.array([[0.01], [-0.01], [0.0]])
    better, worse, same = (crossed({"a": noise * (sign or 1) + 0.5 * sign}, {"a": 1.0}) for sign in (1, -1, 0))
    told = headline(better, "fine_tuning").removeprefix("improves on fine tuning by ")
    low, high = (float(end) for end in told.partition("[")[2].partition("]")[0].split(", "))
    assert 0 < low < float(told.partition(" ")[0]) == 50 < high
    assert headline(worse, "fine_tuning") == f"worse than fine tuning by {told}"
    assert headline(same, "paper").startswith("no improvement over paper shown (+0.0 [-")
    found = [headline(each, "paper", is_measured_again=False).partition(" by ")[0] for each in (better, worse)]
    assert found == ["measured higher than paper", "measured lower than paper"]


def test_worst_domain_near_another_set_is_marked_approximate():
    rng = np.random.default_rng(3)
    correct = {name: rng.random((3, 400)) < share for name, share in (("id", 0.8), ("a", 0.5), ("b", 0.7))}
    correct["c"] = correct["a"][:, ::-1]
    clear = objective_interval(ObjectiveSpec("worst_domain", "id", ("a", "b")), correct)
    close = objective_interval(ObjectiveSpec("worst_domain", "id", ("a", "b", "c")), correct)
    assert clear.mean == pytest.approx(correct["a"].mean(axis=1).mean())
    assert clear.notes == ()
    assert "approximate" in close.notes[0]


def test_rank_correlation_is_none_where_it_is_not_defined():
    assert rank_correlation([1, 2, 2, 4], [3, 1, 1, 9]) == pytest.approx(stats.spearmanr([1, 2, 2, 4], [3, 1, 1, 9])[0])
    assert rank_correlation([1, 2, 3], [1, 1, 1]) is rank_correlation([1], [1]) is None
