"""The Pareto front of ID and OOD accuracy: points that no other one beats, and which of them is the best.

A training has several points, one per evaluated alpha. The front of a study is over all points of all its complete
trainings. Only points that meet all constraints take part; where none does, those that miss them least.

Shape letters: N points, F of them on the front. A point is (ID accuracy, OOD accuracy), fractions, both maximised.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from carft_ray.recipe.schema.search import SearchConfig, total_violation
from carft_ray.study.training import TrialRow
from carft_ray.words import counted

TIE = 1e-12  # accuracies that differ by no more are of the same counts of images
MAX_FURTHER_POINTS = 4  # further points of a training that the sampler gets

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def non_dominated(points_N2: npt.ArrayLike) -> IntArray:
    """Returns the indices of the points that no other one beats, by rising ID accuracy, equal points by index.

    A point is beaten by one that is at least as high in both and higher in one; equal points do not beat each other.
    Accuracies within 1e-12 are equal: equal counts of images differ by some 1e-16 when they come to their mean over
    several sets in another way, and one image more by far more than 1e-12.
    """
    pairs_N2 = np.asarray(points_N2, np.float64).reshape(-1, 2)
    if not len(pairs_N2):
        return np.zeros(0, np.int64)
    ids_N, oods_N = _ranks(pairs_N2[:, 0]), _ranks(pairs_N2[:, 1])
    highest = np.full(ids_N.max() + 2, -1)  # OOD rank per ID rank; the last one stands for none
    np.maximum.at(highest, ids_N, oods_N)
    beyond = np.maximum.accumulate(highest[::-1])[::-1]  # of this ID rank or a higher one
    kept = np.flatnonzero((oods_N == beyond[ids_N]) & (oods_N > beyond[ids_N + 1]))
    return kept[np.argsort(ids_N[kept], kind="stable")]


def _ranks(values_N: FloatArray) -> IntArray:
    """Returns the rank of each value among the different ones, 0 the lowest; neighbours within ``TIE`` are the same."""
    order = np.argsort(values_N, kind="stable")
    ranks = np.zeros(len(values_N), np.int64)
    ranks[order[1:]] = np.cumsum(np.diff(values_N[order]) > TIE)
    return ranks


def knee(front_F2: npt.ArrayLike) -> int:
    """Returns the index of the point of a front that lies farthest beyond the line between the front's two ends.

    Both accuracies are scaled to [0, 1] by the ends first, so the line is x + y = 1 and the distance of a point is
    (x + y - 1) / sqrt(2); a point short of the line has a negative one (Branke et al. 2004, the normal to the extreme
    line). Of equal distances (1e-12) the higher OOD accuracy counts. So one point is its own knee, and of two the one
    with the higher OOD accuracy is taken.

    Args:
        front_F2: The points, none of them beaten, by rising ID accuracy.
    """
    pairs_F2 = np.asarray(front_F2, np.float64)
    if len(pairs_F2) < 3:
        return 0
    low, high = pairs_F2.min(axis=0), pairs_F2.max(axis=0)
    if (high - low <= TIE).any():  # all points are equal
        return 0
    distances = ((pairs_F2 - low) / (high - low)).sum(axis=1)
    return int(np.flatnonzero(distances >= distances.max() - 1e-12)[0])


def lexicographic(front_F2: npt.ArrayLike, tolerance: float) -> int:
    """Returns the index of the highest OOD accuracy among points with ID accuracy of at least best ID - tolerance.

    Args:
        front_F2: The points, none of them beaten, by rising ID accuracy.
        tolerance: A fraction.
    """
    ids = np.asarray(front_F2, np.float64)[:, 0]
    return int(np.flatnonzero(ids >= ids.max() - tolerance - 1e-12)[0])


@dataclass(frozen=True)
class FrontRule:
    """Which point of a front is the best; stored with the study.

    Attributes:
        best: ``knee`` or ``lexicographic``.
        tolerance: Of ``lexicographic``, a fraction.
    """

    best: Literal["knee", "lexicographic"]
    tolerance: float

    def index(self, front_F2: npt.ArrayLike) -> int:
        """Returns the index of the best point."""
        return knee(front_F2) if self.best == "knee" else lexicographic(front_F2, self.tolerance)

    @property
    def words(self) -> str:
        """The rule in words."""
        if self.best == "knee":
            return "knee, farthest beyond the line between the ends of the front"
        return f"lexicographic, highest OOD within {counted(100 * self.tolerance, 'point')} of the best ID"


def front_rule(search: SearchConfig) -> FrontRule | None:
    """Returns the rule of a recipe, or None when its search has one objective, or it searches nothing."""
    objective = search.objective
    return FrontRule(objective.best, objective.tolerance) if objective.kind == "pareto" and search.space else None


@dataclass(frozen=True)
class Point:
    """A point of a training.

    Attributes:
        name: Of the training.
        alpha: Mixing coefficient.
        metrics: There: ``id_accuracy``, ``ood_accuracy``, ``objective`` and more.
    """

    name: str
    alpha: float
    metrics: dict[str, float]

    @property
    def pair(self) -> tuple[float, float]:
        """(ID accuracy, OOD accuracy)."""
        return self.metrics["id_accuracy"], self.metrics["ood_accuracy"]


def points_of(rows: Iterable[TrialRow]) -> list[Point]:
    """Returns every point of the complete trainings of a Pareto search."""
    return [
        Point(row.name, point["alpha"], {name: value for name, value in point.items() if name != "alpha"})
        for row in rows
        if row.outcome == "complete"
        for point in row.points
    ]


def front_of(rows: Iterable[TrialRow]) -> list[Point]:
    """Returns the front over all points of the complete trainings, by rising ID accuracy; see the module."""
    points = points_of(rows)
    missed = [total_violation(point.metrics) for point in points]
    least = min(missed, default=0.0) + TIE
    taking_part = [point for point, each in zip(points, missed, strict=True) if each <= least]
    return [taking_part[index] for index in non_dominated([point.pair for point in taking_part])]


def best_point(front: Sequence[Point], rule: FrontRule) -> Point | None:
    """Returns the best point of a front by a rule; None of an empty one."""
    return front[rule.index([point.pair for point in front])] if front else None


def stand(rows: Sequence[TrialRow], rule: FrontRule) -> list[TrialRow]:
    """Returns the rows of a Pareto search, as ``rows.row_of`` gives them, with their standing.

    The training of the best point stands at that one, every other training of the front at its own point of the front
    with the largest weighted mean, all others at the alpha that was drawn for them.
    """
    front = front_of(rows)
    best = best_point(front, rule)
    # the last one of a training counts: the best one, else that with the largest mean, the first of equals
    falling = sorted(front, key=lambda point: (point is best, point.metrics["objective"]), reverse=True)
    placed, found = {point.name: point for point in reversed(falling)}, []
    for row in rows:
        if point := placed.get(row.name):
            standing, objective = 2 if point is best else 1, point.metrics["objective"]
            row = replace(row, alpha=point.alpha, objective=objective, metrics=point.metrics, standing=standing)
        found.append(row)
    return found


def spread_points(points: Sequence[dict[str, float]], alpha: float) -> list[dict[str, float]]:
    """Returns the points of a training that the sampler gets in addition to the one at ``alpha``.

    They are those of its own non-dominated points, at most four: of more, evenly spaced ones along them.
    """
    pairs = [(point["id_accuracy"], point["ood_accuracy"]) for point in points]
    front = [points[index] for index in non_dominated(pairs)]
    others = [point for point in front if point["alpha"] != alpha]
    chosen = np.linspace(0, len(others) - 1, min(MAX_FURTHER_POINTS, len(others))).round().astype(int)
    return [others[index] for index in chosen]
