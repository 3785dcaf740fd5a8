"""Crossed intervals: fixture, NumPy reference, degenerate inputs, coverage; and the small statistics beside them."""

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


def test_seeds_that_agree_by_chance_keep_the_noise_of_images():
    """Reference numbers worked out by hand; without V_res this was a point and p < 0.0001."""
    differences = np.array([[1, 0, 0, 0, 0, 0, 0, -1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]])
    result = crossed({"a": differences}, {"a": 1.0})
    assert (result.mean, result.seed_variance, result.image_variance) == (pytest.approx(0.1), 0, 0)
    assert result.residual_variance == pytest.approx(1 / 90)
    assert result.dof == pytest.approx(9)
    assert result.ends == pytest.approx((-0.13845, 0.33845), abs=5e-6)
    assert result.p_value == pytest.approx(0.3676, abs=5e-5)


def test_one_net_image_of_160_is_no_finding():
    differences = np.zeros((2, 160))
    differences[0, 3] = differences[1, 40] = -1
    result = objective_difference(
        ObjectiveSpec("weighted_mean", "id", ("ood",), 0.5),
        {"id": np.ones((2, 160), bool) & (differences == 0), "ood": np.ones((2, 160), bool)},
        {"id": np.ones((2, 160), bool), "ood": np.ones((2, 160), bool)},
    )
    assert result.mean == pytest.approx(-0.5 / 160)
    assert result.seed_variance == 0
    assert result.ends[1] > 0
    assert result.p_value > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [2, 3])
@pytest.mark.parametrize(("flips", "seed_sd"), [(0.01, 0.03), (0.05, 0.0)])
def test_few_seeds_cover_zero_for_equal_configurations(num_seeds, flips, seed_sd):
    """300 pairs on 500 images; 95 % expected, Monte Carlo standard error 1.3 %; 88 % without the lower bounds."""
    found = statistics.pair_intervals(np.random.default_rng(0), 300, num_seeds, 500, flips, seed_sd)
    covered = [low <= 0 <= high for low, high in (each.ends for each in found)]
    assert np.mean(covered) >= 0.92
    assert all(low < high for low, high in (each.ends for each in found))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_new_images_never_narrow_an_interval(num_seeds):
    rng = np.random.default_rng(num_seeds)
    for _ in range(50):
        shift = rng.normal(0, 0.05, (num_seeds, 1))
        result = crossed({"a": (rng.random((num_seeds, 50)) < 0.5 + shift) ^ (rng.random(50) < 0.5)}, {"a": 1.0})
        half = stats.t.ppf(0.975, num_seeds - 1) * math.sqrt(result.seed_variance)  # new seeds, these images
        assert result.ends[1] - result.mean >= half - 1e-12


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
    assert v_seed > v_res == pytest.approx(crossed(values, weights).residual_variance)
    assert result.ends == pytest.approx((np.mean(y) - half, np.mean(y) + half), abs=1e-12)
    p_values = [2 * stats.t.sf(abs(np.mean(y)) / math.sqrt(v), d) for v, d in ((v_seed + v_image, dof), (v_seed, 3))]
    assert result.p_value == pytest.approx(max(p_values), abs=1e-12)


@pytest.mark.parametrize("level", [0.95, 0.99])
@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_p_value_and_interval_agree(num_seeds, level):
    rng = np.random.default_rng(1)
    for noise in (0, 1):  # without noise nothing varies: the rule of three
        for _ in range(50):
            values = rng.normal(0.2) / 10 + noise * rng.normal(0.15, 1, (num_seeds, 40))
            result = crossed({"a": values}, {"a": 1.0}, level=level)
            assert (result.p_value < 1 - level) == (result.ends[0] > 0 or result.ends[1] < 0)


def test_sets_of_weight_zero_change_nothing():
    more = {**FIXTURE, "spare": np.ones((3, 2), bool)}
    assert crossed(more, {**HALVES, "spare": 0.0}) == crossed(FIXTURE, HALVES)


def test_order_of_images_changes_nothing_and_mirrored_differences_mirror():
    rng = np.random.default_rng(2)
    mixed = {name: values[:, rng.permutation(values.shape[1])] for name, values in FIXTURE.items()}
    assert crossed(mixed, HALVES).ends == pytest.approx(crossed(FIXTURE, HALVES).ends)
    other = {name: ~values for name, values in FIXTURE.items()}
    one, two = (crossed(paired_differences(*pair), HALVES) for pair in ((FIXTURE, other), (other, FIXTURE)))
    assert one.ends == pytest.approx((-two.ends[1], -two.ends[0]))
    assert one.p_value == pytest.approx(two.p_value)


def test_one_seed_covers_images_only_and_says_so():
    first = {name: values[:1] for name, values in FIXTURE.items()}
    result = crossed(first, HALVES)
    half = 1.959964 * math.sqrt(sum(0.25 * x[0].astype(float).var(ddof=1) / x.shape[1] for x in first.values()))
    assert result.ends == pytest.approx((7 / 12 - half, 7 / 12 + half), abs=1e-6)
    assert result.notes == ("one training: seeds not covered",)
    assert result.words == OVER_IMAGES


def test_two_seeds_are_allowed_with_a_warning():
    result = crossed({name: values[:2] for name, values in FIXTURE.items()}, HALVES)
    assert "two seeds" in result.notes[0]
    y = np.array([7 / 12, 17 / 24])
    assert result.ends[1] - result.mean >= 8.98 * y.std(ddof=1)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2])
def test_where_nothing_varies_the_rule_of_three_holds(num_seeds, value):
    result = crossed({"a": np.full((num_seeds, 70), value), "b": np.zeros((num_seeds, 60))}, {"a": 0.5, "b": 0.5})
    half = -math.log(0.05) * 0.5 / 60
    assert result.ends == pytest.approx((result.mean - half, result.mean + half))
    assert result.p_value == pytest.approx(1.0 if value == 0 else 20 ** (-value / 2 / half))
    assert (result.seed_variance, result.residual_variance, result.image_variance) == (0, 0, 0)


def test_all_right_gets_the_interval_of_wilson_and_stays_below_one():
    assert accuracy_interval(np.ones((3, 28), bool)).ends == pytest.approx(wilson(28, 28))
    nearly = np.ones((2, 40), bool)
    nearly[0, 0] = nearly[1, 1] = False
    result = accuracy_interval(nearly)
    assert 0 < result.ends[0] < result.mean < result.ends[1] == 1


def test_equal_seeds_leave_the_images_and_equal_images_leave_the_seeds():
    same_seeds = crossed({"a": np.tile([1, 0, 1, 1], (3, 1))}, {"a": 1.0})
    assert same_seeds.seed_variance == 0
    assert same_seeds.dof == 3
    assert same_seeds.image_variance == pytest.approx(np.var([1, 0, 1, 1], ddof=1) / 4)
    same_images = crossed({"a": np.tile([[0.2], [0.4], [0.3]], (1, 6))}, {"a": 1.0})
    assert same_images.image_variance == 0
    assert same_images.dof == 2
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert same_images.ends == pytest.approx((0.3 - half, 0.3 + half))


def test_one_image_is_named_as_not_covered():
    result = crossed({"a": np.array([[1], [0], [1]])}, {"a": 1.0})
    assert result.notes == ("a has one image: its image variance is not covered",)
    assert all(map(math.isfinite, result.ends))


def test_weighted_mean_of_sets_is_the_plain_crossed_interval():
    spec = ObjectiveSpec("weighted_mean", "id", ("ood",), 0.5)
    plain, general = crossed(FIXTURE, HALVES), objective_interval(spec, FIXTURE)
    assert general.ends == pytest.approx(plain.ends, abs=1e-14)
    other = {name: values[::-1, ::-1] for name, values in FIXTURE.items()}
    difference = objective_difference(spec, FIXTURE, other)
    plain = crossed(paired_differences(FIXTURE, other), HALVES)
    assert difference.ends == pytest.approx(plain.ends, abs=1e-14)
    assert difference.p_value == pytest.approx(plain.p_value, abs=1e-12)


def test_harmonic_mean_uses_its_values_per_seed_and_its_derivatives():
    result = objective_interval(ObjectiveSpec("harmonic", "id", ("ood",)), FIXTURE)
    a, b = (FIXTURE[name].mean(axis=1) for name in ("id", "ood"))
    y = 2 * a * b / (a + b)
    assert result.mean == pytest.approx(y.mean())
    assert result.seed_variance == pytest.approx(y.var(ddof=1) / 3)
    a, b = a.mean(), b.mean()
    weights = {"id": 2 * b**2 / (a + b) ** 2, "ood": 2 * a**2 / (a + b) ** 2}
    assert result.image_variance == pytest.approx(crossed(FIXTURE, weights).image_variance)


def test_worst_domain_near_another_set_is_marked_approximate():
    rng = np.random.default_rng(3)
    correct = {name: rng.random((3, 400)) < share for name, share in (("id", 0.8), ("a", 0.5), ("b", 0.7))}
    correct["c"] = correct["a"][:, ::-1]
    clear = objective_interval(ObjectiveSpec("worst_domain", "id", ("a", "b")), correct)
    close = objective_interval(ObjectiveSpec("worst_domain", "id", ("a", "b", "c")), correct)
    assert clear.notes == ()
    assert clear.mean == pytest.approx(correct["a"].mean(axis=1).mean())
    assert "approximate" in close.notes[0]
    swapped = {**correct, "a": correct["b"], "b": correct["a"]}
    difference = objective_difference(ObjectiveSpec("worst_domain", "id", ("a", "b")), correct, swapped)
    assert difference.mean == pytest.approx(0)
    assert difference.p_value > 0.05


@pytest.mark.slow
def test_paired_interval_covers_zero_for_equal_configurations():
    """400 pairs that differ by seed and image luck only; 95 % expected, Monte Carlo standard error 1.1 %."""
    rng = np.random.default_rng(0)
    num, seeds, images = 400, 3, 200
    seed_sd, shared, own = 0.05, math.sqrt(0.9), math.sqrt(0.06)
    rest = math.sqrt(0.04)
    hits = seeds_only = 0
    for _ in range(num):
        difference = {}
        for name in ("id", "ood"):
            u = rng.standard_normal(images)
            right = [
                shared * u + own * rng.standard_normal(images) + rest * rng.standard_normal((seeds, images))
                < 0.5 + seed_sd * rng.standard_normal((seeds, 1))
                for _ in range(2)
            ]
            difference[name] = right[0].astype(float) - right[1]
        result = crossed(difference, HALVES)
        hits += result.ends[0] <= 0 <= result.ends[1]
        seeds_only += abs(result.mean) <= stats.t.ppf(0.975, seeds - 1) * math.sqrt(result.seed_variance)
    assert 0.92 <= hits / num <= 0.98
    assert seeds_only / num < hits / num  # image luck is not in it


def test_accuracy_of_one_training_gets_the_interval_of_wilson():
    result = accuracy_interval(np.array([[True] * 9 + [False]]))
    assert result.ends == pytest.approx(wilson(9, 10))
    assert accuracy_interval(FIXTURE["id"]).ends == crossed({"": FIXTURE["id"]}, {"": 1.0}).ends


def test_wilson_agrees_with_scipy_and_stays_in_its_bounds():
    for right, num in ((0, 10), (3, 10), (10, 10), (812, 1008)):
        reference = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
        assert wilson(right, num) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


def test_an_accuracy_of_few_images_is_shown_with_an_interval_also_where_all_or_none_are_right():
    assert console.percent(0.0, 28) == "0.0 [0.0, 12.1]"
    assert console.percent(1.0, 28) == "100.0 [87.9, 100.0]"
    assert console.percent(0.5, 28) == "50.0 [32.6, 67.4]"


def test_rank_correlation_agrees_with_scipy_and_is_none_where_not_defined():
    rng = np.random.default_rng(4)
    a = rng.integers(0, 8, 40).astype(float)
    b = a + rng.normal(0, 3, 40)
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation([1, 2, 3], [1, 1, 1]) is None
    assert rank_correlation([1], [1]) is None


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (0.5, "improves on plain fine-tuning by 50.0 [4"),
        (-0.5, "worse than plain fine-tuning by 50.0 [4"),
        (0.0, "no improvement over plain fine-tuning shown (+0.0 ["),
    ],
)
def test_headline(shift, words):
    noise = np.tile([0.1, -0.1], (3, 20)) + np.array([[0.01], [-0.01], [0.0]])
    found = crossed({"a": noise + shift}, {"a": 1.0})
    assert headline(found, "plain fine-tuning").startswith(words)
    searched = headline(found, "plain fine-tuning", is_measured_again=False)
    assert searched.startswith(words.replace("improves on", "measured higher than").replace("worse", "measured lower"))


def test_a_mean_is_printed_with_its_interval():
    found = crossed(FIXTURE, HALVES)
    assert in_points(found.mean, found.ends) == "58.3 [24.8, 91.8]"
    assert in_points(0.75, (0.26, 1.24), signed=True) == "+75.0 [+26.0, +124.0]"


def test_worse_by_is_better_by_turned_round_with_its_interval():
    noise = np.tile([0.1, -0.1], (3, 20)) + np.array([[0.01], [-0.01], [0.0]])
    better, worse = (crossed({"a": sign * (noise + 0.2)}, {"a": 1.0}) for sign in (1, -1))
    told = headline(better, "plain").removeprefix("improves on plain by ")
    assert headline(worse, "plain") == f"worse than plain by {told}"
    low, high = (float(end) for end in told.partition("[")[2].partition("]")[0].split(", "))
    assert 0 < low < float(told.partition(" ")[0]) < high
