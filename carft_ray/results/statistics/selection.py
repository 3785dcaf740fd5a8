"""Statistics of having chosen: noise of the ranking, correction of the best value, one-SE pick, regret of rules.

The best of N noisy values is too high. Two corrections say by how much: ``correct`` shrinks the trials' values towards
their median and simulates the choice (luck of images, and of seeds once some configurations are confirmed);
``bootstrap.bbc`` makes the choice again on resampled images. Everything here reads validation results only.

Shape letters: N trials, n images of one set, r seeds, K candidates (trial, alpha). Accuracies are fractions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import FloatArray
from carft_ray.results.statistics.bootstrap import Candidate, Resamples
from carft_ray.results.statistics.intervals import ValuesBySet, objective_difference, residual_variance, values_by_seed

NUM_DRAWS = 2000
RULES = ("id_val", "ood_val", "objective", "worst_domain")


@dataclass(frozen=True)
class Noise:
    """Variance of one trial's objective as far as it is not shared by all trials.

    Attributes:
        image: sigma_img^2.
        seed: sigma_seed^2; None before any configuration is confirmed.
    """

    image: float
    seed: float | None

    @property
    def variance(self) -> float:
        """sigma^2, the sum of what is known."""
        return self.image + (self.seed or 0.0)

    @property
    def words(self) -> str:
        """What the variance covers."""
        return "image noise only" if self.seed is None else "image and seed noise"


@dataclass(frozen=True)
class Correction:
    """The best objective, corrected for its selection.

    Attributes:
        value: ``corrected``: J_max - b.
        optimism: b.
        median: m.
        spread: v, mean of (J - m)^2 over the trials with J >= m.
        factor: B = max(0, 1 - sigma^2 / v), how much of a trial's distance from m is believed.
        shrunk: mu_i = m + B (J_i - m) per trial.
    """

    value: float
    optimism: float
    median: float
    spread: float
    factor: float
    shrunk: tuple[float, ...]


def ranking_noise(
    spec: ObjectiveSpec, objectives: Sequence[float], correct: ValuesBySet, confirmed: Sequence[ValuesBySet] = ()
) -> Noise:
    """Returns the noise that ranks trials of equal worth.

    sigma_img^2 = sum_j w_j^2 MS_E_j / n_j with MS_E the residual of trials x images over the trials with J >= median
    (over all where these are fewer than two); the binomial variance would count luck that all trials share.
    sigma_seed^2 = max(0, pooled variance between seeds - pooled sum_j w_j^2 MS_E_j / n_j of seeds x images).

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
    return Noise(image, max(0.0, pooled[0] - pooled[1]) if pooled else None)


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


def correct_best(objectives: Sequence[float], variance: float, num_draws: int = NUM_DRAWS, seed: int = 0) -> Correction:
    """Returns the best objective minus the optimism that choosing it is expected to have.

    m = median J;  v = mean of (J - m)^2 over J >= m;  B = max(0, 1 - sigma^2 / v);  mu_i = m + B (J_i - m);
    b = mean over draws of z_i* - mu_i*, z = mu + sigma N(0, 1), i* = argmax z.

    The upper half alone shrinks: trials that diverged in part would make all others seem equal. Shrinking never
    re-ranks.

    Args:
        objectives: J of the completed trials, at least one.
        variance: sigma^2 (``ranking_noise``).
        num_draws: Of the simulation.
        seed: Of the draws.
    """
    values = np.asarray(objectives, np.float64)
    median = float(np.median(values))
    spread = float(np.mean((values[values >= median] - median) ** 2))
    factor = max(0.0, 1 - variance / spread) if spread > 0 else 0.0
    shrunk = median + factor * (values - median)
    noise = math.sqrt(variance) * np.random.default_rng(seed).standard_normal((num_draws, len(values)))
    picks = (shrunk + noise).argmax(axis=1)
    optimism = float(noise[np.arange(num_draws), picks].mean())
    best = float(values.max())
    return Correction(best - optimism, optimism, median, spread, factor, tuple(float(mu) for mu in shrunk))


@dataclass(frozen=True)
class Pick:
    """What the one-standard-error rule takes.

    Attributes:
        name: Of the trial.
        alpha: Its alpha.
        moved: alpha * norm(theta - theta_0) / norm(theta_0) over the image tower.
        behind: Winner's objective - its own, both as measured.
        se: Standard error of that difference.
        num_candidates: Candidates within one standard error, the winner among them.
    """

    name: str
    alpha: float
    moved: float
    behind: float
    se: float
    num_candidates: int


def one_se_pick(
    spec: ObjectiveSpec,
    winner: Candidate,
    candidates: Sequence[Candidate],
    moved: Mapping[str, float],
    lowest: float,
    seed_variance: float | None = None,
) -> Pick:
    """Returns the candidate (trial, alpha) within one standard error of the winner that moved least from zero-shot.

    J_max - J_i <= SE, SE^2 the paired image variance of the difference, plus 2 sigma_seed^2 when known (0 between
    alphas of the winner's own training). Both objectives are those measured, so that they are of the same images.

    Args:
        spec: The objective.
        winner: The winning trial, with the alpha it won with alone.
        candidates: Trials with the alphas that were evaluated; those below ``lowest`` are passed over.
        moved: ``moved`` of each trial's result, by name; trials without it are passed over.
        lowest: Lowest alpha that may be chosen.
        seed_variance: sigma_seed^2; None: not known.

    Raises:
        KeyError: The winner's ``moved`` is not known.
    """
    picks = [Pick(winner.name, winner.alphas[0], winner.alphas[0] * moved[winner.name], 0.0, 0.0, 0)]
    for candidate in candidates:
        for index, alpha in enumerate(candidate.alphas):
            own = candidate.name == winner.name
            if candidate.name not in moved or alpha < lowest - 1e-9 or (own and alpha == winner.alphas[0]):
                continue
            other = {name: array[index : index + 1] for name, array in candidate.correct.items()}
            difference = objective_difference(spec, winner.correct, other)
            se = math.sqrt(difference.image_variance + (0.0 if own else 2 * (seed_variance or 0.0)))
            if difference.mean <= se + 1e-12:
                picks.append(Pick(candidate.name, alpha, alpha * moved[candidate.name], difference.mean, se, 0))
    return replace(min(picks, key=lambda each: each.moved), num_candidates=len(picks))


@dataclass(frozen=True)
class RuleRegret:
    """A line of the table of selection rules.

    Attributes:
        rule: Name.
        regret: Mean regret over the OOD sets left out; None where the rule is not defined.
        se: Bootstrap standard error, both picks made again per resample.
        note: A remark.
    """

    rule: str
    regret: float | None
    se: float | None
    note: str = ""


def regret_table(
    candidates: Sequence[Candidate], resamples: Resamples, spec: ObjectiveSpec, lowest: float
) -> list[RuleRegret]:
    """Returns what each rule of selection would have lost on an OOD set that it did not use, from validation alone.

    For each OOD set d: a rule may use the ID set and the other OOD sets; the target is w ID + (1 - w) acc_d; regret =
    max target - target of the rule's pick, over all (trial, alpha) with alpha >= ``lowest``, as measured; mean over d.
    The maximum is itself noisy, so all regrets are too high alike. Empty without an OOD set.

    Args:
        candidates: Trials with their evaluated alphas.
        resamples: Of the same candidates (``bootstrap.resample``).
        spec: The objective; its ``id_weight`` is w.
        lowest: Lowest alpha that may be chosen; a single alpha counts whatever it is.
    """
    if not spec.ood_sets:
        return []
    allowed = [
        np.array([alpha >= lowest - 1e-9 or len(candidate.alphas) == 1 for alpha in candidate.alphas])
        for candidate in candidates
    ]
    measured, resampled = {}, {}
    for name in spec.sets:
        rows = [candidate.correct[name][kept].mean(axis=1) for candidate, kept in zip(candidates, allowed, strict=True)]
        measured[name] = np.concatenate(rows)
        again = [part[name][:, kept] for part, kept in zip(resamples.accuracies, allowed, strict=True)]
        resampled[name] = np.concatenate(again, axis=1)
    now, spread = _regrets(spec, measured), _regrets(spec, resampled)
    table = {rule: RuleRegret(rule, None, None, "needs two OOD validation sets") for rule in RULES}
    for rule, regret in now.items():
        table[rule] = RuleRegret(rule, float(regret), float(np.std(spread[rule], ddof=1)))
    return [*table.values(), replace(table["ood_val"], rule="leave_one_domain_out", note="same as ood_val")]


def rule_values(spec: ObjectiveSpec, accuracies: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Returns per rule of selection what it maximises; ``ood_val`` and ``worst_domain`` need an OOD set.

    Args:
        spec: The objective over the sets that a rule may use.
        accuracies: Per set, any shape.
    """
    values = {"id_val": accuracies[spec.id_set], "objective": spec.values(accuracies)}
    if spec.ood_sets:
        by_set = np.stack([accuracies[name] for name in spec.ood_sets])
        values |= {"ood_val": by_set.mean(axis=0), "worst_domain": by_set.min(axis=0)}
    return values


def _regrets(spec: ObjectiveSpec, accuracies: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Returns per rule its mean regret over the sets left out; accuracies [..., K] give [...]."""
    id_accuracy, found = accuracies[spec.id_set], dict[str, list[FloatArray]]()
    for left_out in spec.ood_sets:
        others = tuple(name for name in spec.ood_sets if name != left_out)
        target = spec.id_weight * id_accuracy + (1 - spec.id_weight) * accuracies[left_out]
        for rule, values in rule_values(replace(spec, ood_sets=others), accuracies).items():
            picked = np.take_along_axis(target, values.argmax(axis=-1)[..., None], axis=-1)[..., 0]
            found.setdefault(rule, []).append(target.max(axis=-1) - picked)
    return {rule: np.mean(regrets, axis=0) for rule, regrets in found.items()}
