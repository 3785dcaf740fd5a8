"""Noise, correction, tests in families: fixtures, references, limit cases."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import special, stats

from benchmarks import statistics as benchmark
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics.intervals import crossed, values_by_seed
from carft_ray.results.statistics.optimism import correct_best, ranking_noise
from carft_ray.results.statistics.paired import holm, keeps_id

J = [0.70, 0.71, 0.69, 0.64, 0.50, 0.715, 0.705, 0.68]
SPEC = ObjectiveSpec("weighted_mean", "id_val", ("a", "b"), 0.5)
SIZES = {"id_val": 50, "a": 30, "b": 20}


def random_correct(rng, num_rows, sizes=SIZES, share=0.6):
    return {name: rng.random((num_rows, n)) < share for name, n in sizes.items()}


# ---------------------------------------------------------------------------------------------- correction


@pytest.mark.slow
def test_correction_of_the_fixture():
    found = correct_best(J, 0.01**2, num_draws=2_000_000)
    assert found.spread == pytest.approx(1.875e-4)
    assert found.factor == pytest.approx(0.466667, abs=5e-7)
    assert found.num_trials == 8
    assert found.optimism == pytest.approx(0.01109, abs=1e-4)
    assert found.value == pytest.approx(0.715 - found.optimism)
    assert correct_best(J, 0.01**2).optimism == pytest.approx(0.01109, abs=8e-4)


def test_without_noise_nothing_changes():
    exact = correct_best(J, 0.0)
    assert (exact.value, exact.optimism, exact.factor) == (0.715, 0.0, 1.0)


def test_equal_trials_are_corrected_by_the_expected_maximum_of_noise():
    found = correct_best([0.7] * 10, 0.01**2, num_draws=100_000)
    assert found.factor == 0
    assert found.optimism == pytest.approx(0.01538753, abs=1e-4)  # of ten standard normal values: 1.538753
    assert correct_best([0.7] * 3, 0.0).value == 0.7
    assert correct_best([0.7], 0.01**2).value == pytest.approx(0.7, abs=1e-3)


def test_noise_agrees_with_sums_written_out_over_the_upper_half():
    rng = np.random.default_rng(0)
    correct = random_correct(rng, 7)
    objectives = [0.5, 0.9, 0.6, 0.8, 0.55, 0.7, 0.4]
    upper = [1, 2, 3, 5]
    expected = 0.0
    for name, w in (("id_val", 0.5), ("a", 0.25), ("b", 0.25)):
        x = correct[name][upper].astype(float)
        n = x.shape[1]
        residual = sum((x[i, k] - x[i].mean() - x[:, k].mean() + x.mean()) ** 2 for i in range(4) for k in range(n))
        expected += w**2 * residual / ((n - 1) * 3) / n
    noise = ranking_noise(SPEC, objectives, correct)
    assert noise.image == pytest.approx(expected, abs=1e-15)
    assert (noise.seed, noise.variance, noise.words) == (None, noise.image, "image noise only")


def test_luck_that_all_trials_share_is_no_noise():
    rng = np.random.default_rng(1)
    shared = {name: np.repeat(rows, 6, axis=0) for name, rows in random_correct(rng, 1).items()}
    assert ranking_noise(SPEC, J[:6], shared).variance == pytest.approx(0, abs=1e-30)
    assert ranking_noise(SPEC, [0.7], random_correct(rng, 1)).variance == 0


def test_seed_noise_is_what_the_images_do_not_explain():
    rng = np.random.default_rng(2)
    correct, configurations = random_correct(rng, 4), [random_correct(rng, 5), random_correct(rng, 3)]
    total = dof = own = 0.0
    for by_set in configurations:
        y = values_by_seed(SPEC, by_set)
        total += sum((value - np.mean(y)) ** 2 for value in y)
        own += (len(y) - 1) * ranking_noise(SPEC, [1.0] * len(y), by_set).image
        dof += len(y) - 1
    noise = ranking_noise(SPEC, J[:4], correct, configurations)
    assert noise.seed == pytest.approx(max(0.0, (total - own) / dof))
    assert noise.words == "image and seed noise"
    steady = {name: np.repeat(rows[:1], 3, axis=0) for name, rows in correct.items()}
    assert ranking_noise(SPEC, J[:4], correct, [steady]).seed == 0
    assert ranking_noise(SPEC, J[:4], correct, [random_correct(rng, 1)]).seed is None
    shifts = [{name: np.arange(n) < share * n for name, n in SIZES.items()} for share in (0.2, 0.5, 0.8)]
    moving = {name: np.stack([by_set[name] for by_set in shifts]) for name in SIZES}
    assert ranking_noise(SPEC, J[:4], correct, [moving]).seed == pytest.approx(0.09, rel=0.05)


# ---------------------------------------------------------------------------------------------- tests and families


def test_holm_of_the_fixture_and_its_limits():
    def adjusted(*p):
        return [one for one, _ in holm(p)]

    assert adjusted(0.01, 0.04, 0.03) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted(0.9, 0.8) == [1.0, 1.0]
    assert holm([0.02]) == [(0.02, pytest.approx(0.95))]
    assert holm([]) == []
    p = np.random.default_rng(0).random(9)
    raised = np.array(adjusted(*p))[np.argsort(p)]
    assert all(one <= two for one, two in pairwise(raised))
    assert (raised >= np.sort(p)).all()


def test_an_interval_at_the_level_of_holm_says_what_its_p_value_says():
    rng = np.random.default_rng(1)
    for _ in range(200):
        p_values = rng.random(rng.integers(1, 7)) ** 4
        for p, (adjusted, level) in zip(p_values, holm(list(p_values)), strict=True):
            assert (adjusted < 0.05) == (p < 1 - level)
            assert level >= 0.95 - 1e-12


def test_id_is_kept_when_the_interval_stays_above_the_margin():
    noise = np.tile([0.02, -0.02], (3, 50))
    low = crossed({"id": noise}, {"id": 1.0}).ends[0]
    assert keeps_id(crossed({"id": noise}, {"id": 1.0}), margin=-low + 1e-9)
    assert not keeps_id(crossed({"id": noise}, {"id": 1.0}), margin=-low - 1e-9)
    assert not keeps_id(crossed({"id": noise - 0.02}, {"id": 1.0}))


@pytest.mark.parametrize(("num_seeds", "half_width"), [(2, 9.0), (3, 2.48), (5, 1.24), (10, 0.72)])
def test_half_width_over_seeds_in_standard_deviations(num_seeds, half_width):
    y = np.arange(num_seeds, dtype=float)
    y = y / y.std(ddof=1)
    result = crossed({"a": np.tile(y[:, None], (1, 20))}, {"a": 1.0})
    assert (result.ends[1] - result.ends[0]) / 2 == pytest.approx(half_width, abs=0.02)
    assert result.image_variance == 0


# ---------------------------------------------------------------------------------------------- simulated studies


def test_simulated_answers_have_their_true_accuracies():
    rng = np.random.default_rng(6)
    truth = {"id_val": 0.8, "ood_1": 0.6, "ood_2": 0.5}
    shares = []
    for _ in range(400):
        images = benchmark.draw_images(rng, 1)
        correct = benchmark.answers(rng, truth, images, 0, rng.normal(0, 0.3, 2), 0.3)
        shares.append([correct[name].mean() for name in truth])
    assert np.mean(shares, axis=0) == pytest.approx(list(truth.values()), abs=0.02)


def test_the_mean_over_seeds_on_fixed_images_is_the_closed_form():
    rng = np.random.default_rng(7)
    truth, images = {"id_val": 0.8, "ood_1": 0.6, "ood_2": 0.5}, benchmark.draw_images(rng, 2)
    correct = benchmark.answers(rng, truth, images, 1, rng.normal(0, 0.2, 2000), 0.2)
    means = benchmark.objective_of(correct)
    exact = benchmark.mean_on_these_images(truth, images, 1, 0.2)
    assert means.mean() == pytest.approx(exact, abs=4 * means.std() / math.sqrt(2000))
    assert special.ndtri(0.8) == pytest.approx(stats.norm.ppf(0.8))


@pytest.mark.slow
def test_a_few_simulated_studies_run_and_are_repeatable():
    checks, beside = benchmark.run(num_studies=20, num_trials=12, seed=1, num_pairs=10)
    again, _ = benchmark.run(num_studies=20, num_trials=12, seed=1, num_pairs=10)
    assert checks == again
    assert len(checks) == 12
    assert checks[-1].passed  # no interval without width
    assert all(math.isfinite(check.value) for check in checks)
    assert "naive" in beside[0]
    naive = next(check for check in checks if check.text.startswith("naive"))
    assert naive.passed == (naive.value <= 0.75)


def test_a_check_passes_between_its_ends_only():
    assert benchmark.Check("x", 0.5, 0.5, 0.6).line() == "PASS  x: 50.00 (from 50.00 to 60.00)"
    assert benchmark.Check("x", 0.49, 0.5, 0.6).line().startswith("FAIL")
    assert not benchmark.Check("x", math.nan, 0, 1).passed


def test_the_benchmark_refuses_too_few_studies(capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main(["--studies", "1"])
    assert left.value.code == 2
    assert "at least 2" in capsys.readouterr().err
