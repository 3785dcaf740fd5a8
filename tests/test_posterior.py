"""The posterior of expected measures, against scikit-learn's process, and what it promises of any trainings."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from carft_ray.study import posterior as module
from carft_ray.study.posterior import posterior

ALPHAS = np.linspace(0.2, 1, 5)


def world(num, num_values, dimension, noise=0.015, seed=0, effect=0.02):
    """Trainings of a smooth objective over the unit cube, measured at five alphas, and the truth, [G, 5]."""
    rng = np.random.default_rng(seed)
    points, values = rng.random((num_values, dimension)), rng.integers(0, num_values, num)
    seeds = rng.integers(0, 5, num)
    truth = 0.6 + effect * np.sin(4 * points).sum(axis=1)[:, None] * ALPHAS
    luck = 0.6 * rng.standard_normal(5)[seeds] + 0.8 * rng.standard_normal(num)
    return points, values, seeds, truth[values] + noise * luck[:, None] * ALPHAS, truth


@pytest.mark.parametrize(("num", "num_values", "dimension"), [(16, 10, 1), (40, 25, 3), (30, 30, 8)])
def test_mean_and_covariance_are_those_of_scikit_learn(num, num_values, dimension):
    points, values, _, measured, _ = world(num, num_values, dimension)
    seeds = np.arange(num)  # each its own: one more part of the noise
    found = posterior(points, values, seeds, measured)
    kernel = ConstantKernel(found.kappa) * Matern(found.lengths, nu=2.5) if found.uses_space else None
    assert kernel is not None
    flat = ConstantKernel(module.FLAT * (1 + found.kappa))
    oracle = GaussianProcessRegressor(kernel + flat, alpha=1 + found.tau, optimizer=None)
    oracle.fit(points[values], measured - measured.mean(axis=0))
    mean = oracle.predict(points) + measured.mean(axis=0)
    assert found.mean == pytest.approx(mean, abs=1e-7)
    for measure in range(len(ALPHAS)):  # scikit-learn takes one covariance for all measures
        cov = oracle.predict(points, return_cov=True)[1]
        assert found.cov == pytest.approx(cov[..., measure] if cov.ndim == 3 else cov, abs=1e-6)


@pytest.mark.parametrize("dimension", [0, 3])
def test_the_gradient_of_the_loss_is_its_slope(dimension):
    points, values, seeds, measured, _ = world(20, 12, 3)
    points[0] = np.nan  # a baseline
    parts = module._Parts(points, values, seeds, measured)
    theta = np.array([0.3, -0.5, 0.2, -0.3, 0.1])[: 2 + dimension]
    priors = np.array([module.KAPPA, module.TAU, *[module.LENGTH] * dimension])
    for index, step in enumerate(1e-5 * np.eye(len(theta))):
        slope = (module._loss(theta + step, parts, priors)[0] - module._loss(theta - step, parts, priors)[0]) / 2e-5
        assert module._loss(theta, parts, priors)[1][index] == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_of_equal_seeds_the_luck_that_they_share_cancels_in_a_difference():
    points, values, seeds = np.array([[0.2], [0.8]]), np.arange(2), np.array([0, 0])
    measured = np.array([[0.6], [0.62]])
    together, apart = (posterior(points, values, each, measured) for each in (seeds, np.array([0, 1])))
    assert together.p_better((1, 0), (0, 0)) > apart.p_better((1, 0), (0, 0))
    assert together.sd(0, 0) > 0


def test_a_baseline_is_by_itself_as_a_point_far_away_with_a_larger_variance():
    """The covariance by hand, and for the trials that of scikit-learn's kernel."""
    points, *_ = world(20, 12, 2)
    points[0] = np.nan
    theta = np.array([0.3, -0.5, 0.2, -0.3])
    kernel, kappa = module._prior(points, theta)[0], np.exp(0.3)
    flat = module.FLAT * (1 + kappa)
    assert kernel[0, 0] == pytest.approx(flat + module.OWN * kappa)
    assert kernel[0, 1:] == pytest.approx(flat)
    inside = ConstantKernel(kappa) * Matern(np.exp(theta[2:]), nu=2.5)
    assert kernel[1:, 1:] - flat == pytest.approx(inside(points[1:]), abs=1e-9)


def test_a_baseline_keeps_its_own_mean_and_repeats_make_it_surer():
    points = np.array([[np.nan, np.nan], [0.1, 0.2], [0.4, 0.9], [0.8, 0.3]])
    once = posterior(points, np.arange(4), np.zeros(4, int), np.array([[0.7], [0.5], [0.52], [0.51]]))
    assert once.mean[0, 0] == pytest.approx(0.7, abs=0.01)
    values, seeds = np.array([0, 1, 2, 3, 0, 0]), np.array([0, 0, 0, 0, 1, 2])
    often = posterior(points, values, seeds, np.array([[0.7], [0.5], [0.52], [0.51], [0.69], [0.71]]))
    assert often.cov[0, 0] < once.cov[0, 0]
    assert once.p_better((0, 0), (1, 0)) > 0.9
    assert once.p_better((0, 0), (1, 0)) + once.p_better((1, 0), (0, 0)) == pytest.approx(1)


def test_the_best_expected_value_is_not_the_luckiest_one():
    """Over many searches of 16 trainings the expected best is right on average; the highest measured one is not."""
    raw, expected, covered = [], [], []
    for seed in range(60):
        points, _, _, _, truth = world(1, 16, 2, seed=seed)
        rng = np.random.default_rng(1000 + seed)
        measured = truth + 0.02 * rng.standard_normal((16, 1)) * ALPHAS
        found = posterior(points, np.arange(16), np.zeros(16, int), measured)
        where = np.unravel_index(found.mean.argmax(), found.mean.shape)
        raw.append(measured.max() - truth[np.unravel_index(measured.argmax(), truth.shape)])
        expected.append(found.mean[where] - truth[where])
        covered.append(abs(found.mean[where] - truth[where]) <= 1.96 * found.sd(*map(int, where)))
    assert np.mean(raw) > 0.015
    assert abs(np.mean(expected)) < 0.01
    assert np.mean(covered) >= 0.9


def test_trainings_that_failed_count_in_the_mean_and_not_in_the_noise():
    points, values, seeds, measured, _ = world(20, 20, 2)
    failed = np.arange(20) == 7
    low = measured.copy()
    low[7] = 0.1
    without = posterior(points, np.delete(values, 7), np.delete(seeds, 7), np.delete(measured, 7, axis=0))
    found = posterior(points, values, seeds, low, failed)
    assert (found.kappa, found.tau) == (without.kappa, without.tau)
    assert found.scale == pytest.approx(without.scale)
    assert found.mean[values[7], -1] < without.mean[values[7], -1] - 0.05


EDGES = {
    "one": (1, 1, 1),
    "two": (2, 2, 1),
    "five": (5, 4, 2),
    "64": (64, 40, 3),
    "eight parameters": (64, 64, 8),
    "more trainings than values": (64, 2, 1),
}


@pytest.mark.parametrize("kind", ["usual", "all equal", "all failed", "baselines alone"])
@pytest.mark.parametrize("edge", EDGES)
def test_everything_is_finite_and_the_same_again(edge, kind):
    points, values, seeds, measured, _ = world(*EDGES[edge])
    failed = np.zeros(len(values), bool)
    if kind == "all equal":
        measured[:] = 0.5
    if kind == "all failed":
        failed[:] = True
    if kind == "baselines alone":
        points[:] = np.nan
    found, again = (posterior(points, values, seeds, measured, failed) for _ in range(2))
    tried = np.isin(np.arange(len(points)), values)
    best = found.mean.argmax(axis=1)
    first = int(values[0])
    numbers = [found.mean, found.cov, found.scale, found.sd(first, 0), found.p_better((first, 0), (0, 1))]
    numbers.append(found.gain(best, tried, 8))
    assert all(np.isfinite(each).all() for each in numbers)
    assert 0 <= numbers[4] <= 1
    assert numbers[5] >= 0
    assert np.array_equal(found.mean, again.mean)
    assert numbers[5] == again.gain(best, tried, 8)


def test_more_trainings_are_worth_more_and_sure_values_nothing():
    points, values, seeds, measured, _ = world(24, 24, 2)
    found = posterior(points, values, seeds, measured)
    best, tried = found.mean.argmax(axis=1), np.isin(np.arange(24), values)
    gains = [found.gain(best, tried, number) for number in (1, 4, 16)]
    assert gains == sorted(gains)
    sure = posterior(np.array([[0.5]]), np.zeros(50, int), np.arange(50), np.full((50, 1), 0.5))
    assert sure.gain(np.zeros(1, int), np.ones(1, bool), 8) < 1e-9


def test_of_a_thousand_trainings_a_few_hundred_choose_the_model_and_all_count(monkeypatch):
    seen = []
    loss = module._loss
    monkeypatch.setattr(
        module, "_loss", lambda theta, parts, priors: seen.append(len(parts.values)) or loss(theta, parts, priors)
    )
    points, values, seeds, measured, truth = world(1000, 900, 4)
    found = posterior(points, values, seeds, measured)
    assert max(seen) == module.MOST_FITTED
    assert np.isfinite(found.mean).all()
    assert np.corrcoef(found.mean[:, -1], truth[:, -1])[0, 1] > 0.9
