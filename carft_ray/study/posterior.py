"""What the trainings of a search say together: the expected measures of values, and how sure they are.

One training is lucky or not: by its seed, and by what is left of chance. Trainings with close values, and trainings
with the same values and other seeds, show how much of a number is luck. A measure m (the objective at one alpha, an ID
accuracy) of a training with values x and seed s is modelled as

    y_m = mean_m + f_m(x) + u_m(s) + e_m

with f a Gaussian process over the space (Matern 5/2, one length scale per parameter), u shared by all trainings with a
seed, and e the rest. Up to its scale, each measure has the same covariance C between trainings, where rest has variance
1:

    C = kappa k(x, x') + tau [s = s'] + [the same training],   cov(y_m, y'_m') = Sigma_mm' C,   Sigma = Y' C^-1 Y / dof

So one factorisation serves all measures, and differences between two alphas have a variance, too (Bonilla et al. 2008,
Multi-task Gaussian process prediction, equation 2; Rasmussen and Williams 2006, equations 2.25, 2.26, 2.42 and 5.9).
The mean is flat. A baseline is outside the space: in place of f it has an effect of its own, with a larger variance.

kappa, tau and the length scales maximise likelihood times weak priors. If the process predicts left-out trainings worse
than a mean does, f is independent for each of the values (means that are shrunk): ``uses_space`` is False then.

Shape letters: N trainings, G values, M measures, d parameters. Everything is deterministic.
"""

import functools
import importlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy  # its modules load when they are first used
import threadpoolctl

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

FLAT = 1e3  # variance of a flat mean, times that of f and rest
OWN = 9.0  # variance of the effect of a baseline, times that of f
MOST_FITTED = 300  # trainings that choose kappa, tau and length scales; all of them count in the result
NOISE, NOISE_DOF = 0.003, 1.0  # prior of the scale: sd of the rest, and the number of trainings for which it counts
KAPPA, TAU = (0.0, 1.5), (math.log(0.5), 1.0)  # prior mean and sd of their logarithms
LENGTH = (math.log(0.5), 1.0)  # of a length scale, times sqrt(d): d parameters do not make all values strangers
REACH = 4.0  # sds of these priors that are searched
NUM_DRAWS = 512


def on_one_thread() -> AbstractContextManager[object]:
    """Returns a block in which NumPy and SciPy compute on one thread: these matrices are small, and trainings run."""
    block: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return block


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
    importlib.import_module("scipy.linalg")  # loads SciPy's own BLAS, which the controller has to see
    return threadpoolctl.ThreadpoolController()


@dataclass(frozen=True, eq=False)
class Posterior:
    """The posterior of the expected measures of values: means over seeds.

    Attributes:
        mean: [G, M].
        cov: Of values, in the units of ``scale``, [G, G].
        scale: Sigma, [M, M].
        dof: Degrees of freedom of the scale.
        kappa: Variance of f over that of the rest.
        tau: Variance of u over that of the rest.
        lengths: Length scales of the parameters, [d]; empty if ``uses_space`` is False.
        uses_space: Whether close values tell of each other.
    """

    mean: FloatArray
    cov: FloatArray
    scale: FloatArray
    dof: float
    kappa: float
    tau: float
    lengths: FloatArray
    uses_space: bool

    def sd(self, values: int, measure: int) -> float:
        """Returns the standard deviation of an expected measure."""
        return math.sqrt(max(0.0, self.cov[values, values] * self.scale[measure, measure]))

    def gap(self, one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
        """Returns mean and sd of one expected measure minus another; each is (values, measure)."""
        mean = float(self.mean[one] - self.mean[other])
        (g, a), (h, b) = one, other
        own = self.cov[g, g] * self.scale[a, a] + self.cov[h, h] * self.scale[b, b]
        return mean, math.sqrt(max(0.0, own - 2 * self.cov[g, h] * self.scale[a, b]))

    def p_better(self, one: tuple[int, int], other: tuple[int, int]) -> float:
        """Returns the probability that one expected measure is above another, by Student's t."""
        mean, sd = self.gap(one, other)
        return float(scipy.special.stdtr(self.dof, mean / sd)) if sd > 0 else float(mean > 0)

    def draws(self, measures: IntArray, number: int, rng: np.random.Generator) -> FloatArray:
        """Returns draws of one expected measure of each values together, [number, G]."""
        means, cov = self._of(measures)
        found: FloatArray = means + rng.standard_normal((number, len(cov))) @ _root(cov).T
        return found

    def gain(self, measures: IntArray, tried: BoolArray, number: int) -> float:
        """Returns by how much the highest expected measure of the tried values rises with the next trainings.

        The next trainings are taken to be where draws of the posterior are highest, each with a new seed. What they
        would show moves the expected measures by a normal amount (the knowledge gradient of Frazier et al. 2009).

        Args:
            measures: Of each values, the measure that counts, [G].
            tried: Whether values have a training, [G]; the others are places where the next ones may be.
            number: Of trainings.
        """
        rng, (means, cov) = np.random.default_rng(0), self._of(measures)
        noise = (1 + self.tau) * self.scale[measures, measures]
        next_ones = self.draws(measures, number, rng).argmax(axis=1)
        seen = cov[np.ix_(next_ones, next_ones)] + np.diag(noise[next_ones])
        move = scipy.linalg.solve(_root(seen), cov[next_ones]).T  # [G, number]
        counts = tried.copy()
        counts[next_ones] = True
        after = means + rng.standard_normal((NUM_DRAWS, number)) @ move.T
        return max(0.0, float(after[:, counts].max(axis=1).mean() - means[tried].max()))

    def _of(self, measures: IntArray) -> tuple[FloatArray, FloatArray]:
        """Returns mean and covariance of one expected measure of each values, [G] and [G, G]."""
        cov = self.cov * self.scale[np.ix_(measures, measures)]
        return np.asarray(self.mean[np.arange(len(measures)), measures]), np.asarray(cov)


def _root(cov: FloatArray) -> FloatArray:
    """Returns a matrix whose square is a covariance, which rounding may have made a little indefinite."""
    values, vectors = np.linalg.eigh(cov)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 1e-12 * max(values[-1], 1e-300)))) @ vectors.T)


def posterior(
    points: FloatArray,
    values: IntArray,
    seeds: IntArray,
    measured: FloatArray,
    failed: BoolArray | None = None,
    target: IntArray | None = None,
) -> Posterior:
    """Returns the posterior of the expected measures.

    Args:
        points: Values in the unit cube, [G, d]; a row of NaN is a baseline. Values may have no training.
        values: Of each training, an index into ``points``, [N], at least one.
        seeds: Of each training, [N].
        measured: [N, M], fractions.
        failed: Trainings that count in the mean and say nothing about kappa, tau, lengths and noise, [N].
        target: Measures that choose kappa, tau and lengths, indices; None: all.
    """
    used: IntArray = np.flatnonzero(np.ones_like(values) if failed is None or failed.all() else ~failed)
    some = used[np.unique(np.linspace(0, len(used) - 1, MOST_FITTED).round().astype(np.int64))]
    targets = np.arange(measured.shape[1]) if target is None else target
    there, own = np.unique(values[some], return_inverse=True)
    parts = _Parts(points[there], own, seeds[some], measured[np.ix_(some, targets)])
    (theta, score), (alone, alone_score) = _fit(parts, len(points.T)), _fit(parts, 0)
    uses_space = score > alone_score
    theta = theta if uses_space else alone
    kernel = _prior(points, theta)[0]
    cov = _covariance(kernel, values, seeds, theta)
    centre = measured[used].mean(axis=0)
    rest, cross = measured - centre, kernel[:, values]
    factor = scipy.linalg.cho_factor(cov)
    good, inner = rest[used], scipy.linalg.cho_factor(cov[np.ix_(used, used)])
    dof = NOISE_DOF + len(used) - 1
    scale = good.T @ scipy.linalg.cho_solve(inner, good) + NOISE_DOF * NOISE**2 * np.eye(len(rest.T))
    return Posterior(
        mean=centre + cross @ scipy.linalg.cho_solve(factor, rest),
        cov=kernel - cross @ scipy.linalg.cho_solve(factor, cross.T),
        scale=scale / dof,
        dof=dof,
        kappa=math.exp(theta[0]),
        tau=math.exp(theta[1]),
        lengths=np.exp(theta[2:]),
        uses_space=uses_space,
    )


@dataclass(frozen=True, eq=False)
class _Parts:
    """The trainings that choose kappa, tau and the length scales; see ``posterior``."""

    points: FloatArray
    values: IntArray
    seeds: IntArray
    measured: FloatArray


def _prior(points: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Returns the covariance of mean + f, [G, G], its derivative by log kappa, and a part of those by log lengths.

    Args:
        points: As of ``posterior``.
        theta: log kappa, log tau and the logarithms of d lengths; or of none: f is independent for each values.
    """
    kappa, lengths = math.exp(theta[0]), np.exp(theta[2:])
    is_trial: BoolArray = np.asarray(~np.isnan(points).any(axis=1))
    both = np.outer(is_trial, is_trial)
    if len(lengths):
        scaled = np.where(is_trial[:, None], points, 0.0) / lengths
        square = (scaled**2).sum(axis=1)
        r = np.sqrt(5 * np.maximum(0.0, square[:, None] + square - 2 * scaled @ scaled.T))
        k, slope = (1 + r + r**2 / 3) * np.exp(-r), 5 / 3 * (1 + r) * np.exp(-r)
    else:
        k, slope = np.eye(len(points)), np.zeros((len(points), len(points)))
    by_kappa = kappa * (k * both + OWN * np.diag(~is_trial) + FLAT)
    return by_kappa + FLAT, by_kappa, kappa * slope * both


def _covariance(kernel: FloatArray, values: IntArray, seeds: IntArray, theta: FloatArray) -> FloatArray:
    found = kernel[np.ix_(values, values)] + np.eye(len(values))
    return np.asarray(found + math.exp(theta[1]) * np.equal.outer(seeds, seeds))


def _fit(parts: _Parts, dimension: int) -> tuple[FloatArray, float]:
    """Returns ``theta`` of ``_prior``, and how well it predicts left-out trainings."""
    middle = LENGTH[0] + math.log(max(1, dimension)) / 2
    priors = np.array([KAPPA, TAU, *[(middle, LENGTH[1])] * dimension])
    options: dict[str, Any] = {"jac": True, "method": "L-BFGS-B", "options": {"maxiter": 40}}
    options["bounds"] = list(zip(*(priors[:, 0] + sign * REACH * priors[:, 1] for sign in (-1, 1)), strict=True))
    starts = (priors[:, 0] - start * (np.arange(len(priors)) == 0) for start in (0, 2))  # also with little effect
    found = [scipy.optimize.minimize(_loss, start, (parts, priors), **options) for start in starts]
    theta = np.asarray(min(found, key=lambda each: float(each.fun)).x)
    return theta, _left_out(parts, theta)


def _solved(parts: _Parts, theta: FloatArray, kernel: FloatArray) -> tuple[FloatArray, float, FloatArray, FloatArray]:
    """Returns C^-1, log det C, C^-1 Y, and of each measure Y' C^-1 Y with its prior."""
    cov = _covariance(kernel, parts.values, parts.seeds, theta)
    factor = scipy.linalg.cholesky(cov, lower=True)
    inverse = scipy.linalg.cho_solve((factor, True), np.eye(len(cov)))
    rest = parts.measured - parts.measured.mean(axis=0)
    weights = inverse @ rest
    return (
        inverse,
        2 * float(np.log(np.diag(factor)).sum()),
        weights,
        (rest * weights).sum(axis=0) + NOISE_DOF * NOISE**2,
    )


def _loss(theta: FloatArray, parts: _Parts, priors: FloatArray) -> tuple[float, FloatArray]:
    """Returns minus the logarithm of likelihood times priors, and its gradient.

    The measures are nearly the same trainings seen again, so the mean of their log likelihoods counts.
    """
    kernel, by_kappa, slope = _prior(parts.points, theta)
    inverse, log_det, weights, squares = _solved(parts, theta, kernel)
    dof = NOISE_DOF + len(inverse) - 1
    outer = inverse - (weights * (dof / len(squares) / squares)) @ weights.T  # the loss moves by tr(outer dC) / 2
    by_values = np.zeros_like(kernel)
    np.add.at(by_values, np.ix_(parts.values, parts.values), outer)
    parameters = zip(np.nan_to_num(parts.points).T, np.exp(theta[2:]), strict=False)  # without lengths: none
    gaps = ((one[:, None] - one) / length for one, length in parameters)
    by_tau = math.exp(theta[1]) * outer[np.equal.outer(parts.seeds, parts.seeds)].sum()
    gradient = [(by_values * by_kappa).sum(), by_tau, *((by_values * slope * gap**2).sum() for gap in gaps)]
    away = (theta - priors[:, 0]) / priors[:, 1]
    loss = (log_det + dof * float(np.log(squares).mean()) + float(away @ away)) / 2
    return loss, np.array(gradient) / 2 + away / priors[:, 1]


def _left_out(parts: _Parts, theta: FloatArray) -> float:
    """Returns the mean log density of a training given the others, of those about which the others say anything."""
    inverse, _, weights, squares = _solved(parts, theta, _prior(parts.points, theta)[0])
    precision = np.diag(inverse)
    known = precision * FLAT * (1 + math.exp(theta[0])) > 10
    if not known.any():
        return 0.0
    scale = squares / (NOISE_DOF + len(inverse) - 1)
    density = (
        np.log(precision[known])[:, None] - np.log(scale) - weights[known] ** 2 / precision[known][:, None] / scale
    )
    return float(density.mean()) / 2
