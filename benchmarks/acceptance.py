"""The acceptance of the sandbox as numbers, thresholds and verdicts; no training happens here.

Points 1 to 5 say that the sandbox shows the effect of CAR-FT, points 6 to 8 that a search has something to find.
Shape letters: r seeds, n images of one set.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.trainings import ID_TEST
from carft_ray.evaluation.objective import ID_SET
from carft_ray.recipe.schema.search import FloatParameter
from carft_ray.results.statistics.intervals import Interval, ValuesBySet, crossed, paired_differences, rank_correlation

EDGE = 0.05  # share of a parameter's (log) range that counts as its edge
NUM_RESAMPLES = 500


@dataclass(frozen=True)
class Threshold:
    """A number that must be reached.

    Attributes:
        number: Name in the numbers.
        text: What it is.
        least: Passes from here on; a fraction where ``points``.
        aim: What we would like to see; None: nothing beyond ``least``.
        points: Whether it is shown in points (percent).
    """

    number: str
    text: str
    least: float
    aim: float | None = None
    points: bool = True


THRESHOLDS = (
    Threshold("ood_gain_low", "1. OOD test, CAR-FT minus plain: lower end of the interval", 0.03),
    Threshold("id_change_low", "2. ID test, CAR-FT minus plain: lower end of the interval", -0.02),
    Threshold("plain_id_gain", "3. ID test, plain minus zero-shot", 0.03),
    Threshold("plain_ood_loss", "3. OOD test, zero-shot minus plain", 0.05),
    Threshold("car_ft_ood_change", "4. OOD test, CAR-FT minus zero-shot", -0.05),
    Threshold("car_ft_id_gain", "4. ID test, CAR-FT minus zero-shot", 0.03),
    Threshold("role_correlation", "5. rank correlation of validation and test objective", 0.6, points=False),
    Threshold("regret_gap", "5. regret of id_val minus regret of objective", 0.02),
    Threshold("best_plain_id_gain", "6. ID test, plain at its best learning rate minus zero-shot", 0.04, 0.08),
    Threshold("spread_ratio", "7. objective: sd over random points / sd between seeds", 3.0, 5.0, points=False),
    Threshold("edge_distance", "8. best point's distance to the edge of the space / range", EDGE, points=False),
)

FloatArray = npt.NDArray[np.float64]


def verdicts(numbers: Mapping[str, float], thresholds: Sequence[Threshold] = THRESHOLDS) -> tuple[list[str], bool]:
    """Returns a line PASS or FAIL per threshold, and whether all are reached; a number that is not one fails."""
    lines, passed = [], True
    for threshold in thresholds:
        value = numbers[threshold.number]
        reached = bool(value >= threshold.least)  # false for not-a-number
        passed &= reached
        aim = "" if threshold.aim is None else f", aim {_shown(threshold.aim, threshold)}"
        lines.append(
            f"{'PASS' if reached else 'FAIL'}  {threshold.text}: {_shown(value, threshold)} "
            f"(at least {_shown(threshold.least, threshold)}{aim})"
        )
    return lines, passed


def _shown(value: float, threshold: Threshold) -> str:
    return f"{100 * value:+.1f} points" if threshold.points else f"{value:.2f}"


def random_points(space: Mapping[str, FloatParameter], num_points: int, seed: int) -> list[dict[str, float]]:
    """Returns points drawn uniformly over the (log) ranges of a search space."""
    rng = np.random.default_rng(seed)
    draws = rng.random((num_points, len(space)))
    return [
        {name: value_at(p.low, p.high, p.log, float(u), 3) for (name, p), u in zip(space.items(), row, strict=True)}
        for row in draws
    ]


def value_at(low: float, high: float, log: bool, share: float, digits: int) -> float:
    """Returns the value at a share of a (log) range, in so many digits."""
    value = low * (high / low) ** share if log else low + share * (high - low)
    return float(f"{value:.{digits}g}")


def edge_distance(point: Mapping[str, float], space: Mapping[str, FloatParameter]) -> float:
    """Returns how far a point is from the nearest edge of the space, as a share of that parameter's (log) range."""
    shares = []
    for name, parameter in space.items():
        low, value, high = (math.log(v) if parameter.log else v for v in (parameter.low, point[name], parameter.high))
        shares.append((value - low) / (high - low))
    return min(min(share, 1 - share) for share in shares)


def mean_over(correct: ValuesBySet, sets: Sequence[str]) -> Interval:
    """Returns the mean over sets (equal weights) and seeds, with its intervals."""
    return crossed({name: correct[name] for name in sets}, dict.fromkeys(sets, 1 / len(sets)))


def effect_intervals(zero_shot: ValuesBySet, plain: ValuesBySet, car_ft: ValuesBySet) -> dict[str, Interval]:
    """Returns the paired differences on ID test and on the mean of the OOD test sets, ``"<difference>, <ID or OOD>"``.

    Args:
        zero_shot: Per test set bool [1, n]; ``id_test`` and the OOD sets.
        plain: [r, n].
        car_ft: [r, n], seeds paired with those of ``plain`` by index.
    """
    groups = {"ID": [ID_TEST], "OOD": [name for name in zero_shot if name != ID_TEST]}
    pairs = {
        "CAR-FT - plain": (car_ft, plain),
        "plain - zero-shot": (plain, zero_shot),
        "CAR-FT - zero-shot": (car_ft, zero_shot),
    }
    return {
        f"{name}, {group}": mean_over(paired_differences(a, b), sets)
        for name, (a, b) in pairs.items()
        for group, sets in groups.items()
    }


def effect_numbers(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Returns the numbers of points 1 to 4."""
    return {
        "ood_gain_low": intervals["CAR-FT - plain, OOD"].ends[0],
        "id_change_low": intervals["CAR-FT - plain, ID"].ends[0],
        "plain_id_gain": intervals["plain - zero-shot, ID"].mean,
        "plain_ood_loss": -intervals["plain - zero-shot, OOD"].mean,
        "car_ft_ood_change": intervals["CAR-FT - zero-shot, OOD"].mean,
        "car_ft_id_gain": intervals["CAR-FT - zero-shot, ID"].mean,
    }


def accuracy_intervals(correct: ValuesBySet) -> dict[str, Interval]:
    """Returns the accuracies of one method: ``ID``, ``OOD mean``, and every OOD test set."""
    ood = [name for name in correct if name != ID_TEST]
    columns = {"ID": [ID_TEST], "OOD mean": ood, **{name: [name] for name in ood}}
    return {column: mean_over(correct, sets) for column, sets in columns.items()}


def spread_numbers(objectives: Sequence[float], repeats: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns how much the objective varies over the space against the noise between seeds.

    Args:
        objectives: Of different points, one seed.
        repeats: Per repeated point its objectives over seeds; their variances are pooled.
    """
    spread = float(np.std(objectives, ddof=1))
    seed_sd = math.sqrt(float(np.mean([np.var(values, ddof=1) for values in repeats])))
    return {"spread_sd": spread, "seed_sd": seed_sd, "spread_ratio": spread / seed_sd if seed_sd else math.inf}


def regret(rule_values: Sequence[float], target_values: Sequence[float]) -> float:
    """Returns max(target) - target of the rule's pick; the pick is the first candidate with the largest rule value."""
    pick = int(np.argmax(np.asarray(rule_values, np.float64)))
    return float(max(target_values) - target_values[pick])


def role_numbers(
    validation: ValuesBySet,
    test: ValuesBySet,
    validation_weights: Mapping[str, float],
    test_weights: Mapping[str, float],
) -> dict[str, float]:
    """Returns how well choosing on validation serves the test objective, over candidates (training, alpha).

    Regret of a rule: best test objective of all candidates - that of the rule's pick. Its standard error is over
    images: both picks made again in ``NUM_RESAMPLES`` resamples within each set.

    Args:
        validation: Per validation set, bool [candidates, n]; ``id_val`` among them.
        test: Per test set, the same candidates.
        validation_weights: Weight per set in the objective.
        test_weights: The same for the test sets.
    """

    def regrets(rows: Mapping[str, FloatArray]) -> tuple[float, float]:
        target = _weighted(rows, test_weights).tolist()
        return regret(rows[ID_SET].tolist(), target), regret(_weighted(rows, validation_weights).tolist(), target)

    correct = {name: np.asarray(array, np.float64) for name, array in {**validation, **test}.items()}
    accuracies = {name: array.mean(axis=1) for name, array in correct.items()}
    by_id, by_objective = regrets(accuracies)
    rng = np.random.default_rng(0)
    resampled = {}
    for name, array in correct.items():
        num_images = array.shape[1]
        counts = rng.multinomial(num_images, np.full(num_images, 1 / num_images), NUM_RESAMPLES)
        resampled[name] = counts @ array.T / num_images
    gaps = []
    for b in range(NUM_RESAMPLES):
        one, other = regrets({name: rows[b] for name, rows in resampled.items()})
        gaps.append(one - other)
    correlation = rank_correlation(
        list(_weighted(accuracies, validation_weights)), list(_weighted(accuracies, test_weights))
    )
    return {
        "role_correlation": math.nan if correlation is None else correlation,
        "regret_id_val": by_id,
        "regret_objective": by_objective,
        "regret_gap": by_id - by_objective,
        "regret_gap_se": float(np.std(gaps, ddof=1)),
        "num_candidates": len(accuracies[ID_SET]),
    }


def _weighted(accuracies: Mapping[str, FloatArray], weights: Mapping[str, float]) -> FloatArray:
    total: FloatArray = np.sum([weight * accuracies[name] for name, weight in weights.items()], axis=0)
    return total
