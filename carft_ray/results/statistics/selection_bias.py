"""Selection bias: how much too high the best of N noisy values is.

``correct_best`` shrinks the trials' values towards their median and simulates the choice (noise of images, and of seeds
once some configurations are confirmed). Everything here reads validation results only.

Shape letters: N trials, r seeds, n images of one set. Accuracies are fractions.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics.intervals import ValuesBySet, residual_variance, values_by_seed

NUM_DRAWS = 2000


def ranking_noise(
    spec: ObjectiveSpec, objectives: Sequence[float], correct: ValuesBySet, confirmed: Sequence[ValuesBySet] = ()
) -> tuple[float, float | None]:
    """Returns the noise that ranks trials of equal worth: (sigma_img^2, sigma_seed^2).

    These are the parts of the variance of one trial's objective that are not shared by all trials; the second is None
    before any configuration is confirmed.

    sigma_img^2 = sum_j w_j^2 MS_E_j / n_j with MS_E the residual of trials x images over the trials with J >= median
    (over all where these are fewer than two); the binomial variance would count luck that all trials share.
    sigma_seed^2 = max(0, pooled variance between seeds - pooled sum_j w_j^2 MS_E_j / n_j of seeds x images). It is an
    upper bound: what a seed does to all configurations alike is in it.

    Args:
        spec: The objective.
        objectives: J of the completed trials, [N].
        correct: Per set the trials' correctness at their alphas, bool [N, n].
        confirmed: Per confirmed configuration its correctness over fresh seeds, bool [r, n]; r = 1 is not used.
    """
    values = np.asarray(objectives, np.float64)
    upper = np.flatnonzero(values >= np.median(values))
    upper = upper if len(upper) > 1 else np.arange(len(values))
    image = residual_variance(spec, {name: np.asarray(correct[name])[upper] for name in spec.sets})
    pooled = seed_variances(spec, confirmed)
    return image, max(0.0, pooled[0] - pooled[1]) if pooled else None


def seed_variances(spec: ObjectiveSpec, confirmed: Iterable[ValuesBySet]) -> tuple[float, float] | None:
    """Returns the variance of J between seeds and its part sum_j w_j^2 MS_E_j / n_j, pooled over configurations.

    By chance the first may be the smaller one. None where no configuration has two seeds.

    Args:
        spec: The objective.
        confirmed: Per configuration its correctness over seeds, bool [r, n] per set.
    """
    total = residual = dof = 0.0
    for by_set in confirmed:
        y = values_by_seed(spec, by_set)
        if len(y) > 1:
            total += (len(y) - 1) * float(np.var(y, ddof=1))
            residual += (len(y) - 1) * residual_variance(spec, by_set)
            dof += len(y) - 1
    return (total / dof, residual / dof) if dof else None


def correct_best(objectives: Sequence[float], variance: float, num_draws: int = NUM_DRAWS) -> dict[str, float]:
    """Returns the best objective minus the optimism that choosing it is expected to have.

    m = median J;  v = mean of (J - m)^2 over J >= m;  B = max(0, 1 - sigma^2 / v);  mu_i = m + B (J_i - m);
    b = mean over draws of z_i* - mu_i*, z = mu + sigma N(0, 1), i* = argmax z.

    The upper half alone shrinks: trials that diverged in part would make all others seem equal. Shrinking never
    re-ranks.

    Args:
        objectives: J of the completed trials, at least one.
        variance: sigma^2 (``ranking_noise``).
        num_draws: Of the simulation.

    Returns:
        ``value``, which is J_max - b, ``optimism`` b, ``num_trials`` N, ``spread`` v, and ``factor`` B: how much of a
        trial's distance from m is believed.
    """
    values = np.asarray(objectives, np.float64)
    median = float(np.median(values))
    spread = float(np.mean((values[values >= median] - median) ** 2))
    factor = max(0.0, 1 - variance / spread) if spread > 0 else 0.0
    shrunk = median + factor * (values - median)
    noise = math.sqrt(variance) * np.random.default_rng(0).standard_normal((num_draws, len(values)))
    picks = (shrunk + noise).argmax(axis=1)
    optimism = max(0.0, float(noise[np.arange(num_draws), picks].mean()))  # below 0 by the draws alone
    best = {"value": float(values.max()) - optimism, "optimism": optimism, "num_trials": len(values)}
    return {**best, "spread": spread, "factor": factor}
