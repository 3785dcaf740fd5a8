"""The number that ranks trials, made from ID accuracy and the accuracies of the OOD sets.

With a = ID accuracy, b = mean of the m OOD accuracies, w = ``id_weight``:

    weighted_mean   w a + (1 - w) b
    harmonic        2 a b / (a + b), 0 when both are 0
    worst_domain    the lowest OOD accuracy

Without any OOD set every kind is a. All accuracies are fractions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from carft_ray.errors import CarftError, Problem
from carft_ray.recipe.schema import Recipe

ID_SET = "id_val"  # role and name of the ID validation set

FloatArray = npt.NDArray[np.float64]
ObjectiveKind = Literal["weighted_mean", "harmonic", "worst_domain"]


def objective(kind: ObjectiveKind, id_weight: float, id_accuracy: float, ood_accuracies: Mapping[str, float]) -> float:
    """Returns the objective, a finite number in [0, 1].

    Args:
        kind: Which of the formulas above.
        id_weight: w, used by ``weighted_mean`` alone.
        id_accuracy: a.
        ood_accuracies: Accuracy per OOD set, each set with equal weight however many images it has.

    Raises:
        CarftError: An accuracy is not a number in [0, 1]; the message names each.
    """
    _check(id_accuracy, ood_accuracies)
    if not ood_accuracies:
        return float(id_accuracy)
    ood_accuracy = mean_ood_accuracy(ood_accuracies)
    if kind == "weighted_mean":
        return id_weight * id_accuracy + (1 - id_weight) * ood_accuracy
    if kind == "harmonic":
        total = id_accuracy + ood_accuracy
        return 2 * id_accuracy * ood_accuracy / total if total > 0 else 0.0
    return float(min(ood_accuracies.values()))


def mean_ood_accuracy(ood_accuracies: Mapping[str, float]) -> float:
    """Returns the unweighted mean over the OOD sets; it needs at least one."""
    return math.fsum(ood_accuracies.values()) / len(ood_accuracies)


def objective_weights(
    kind: ObjectiveKind, id_weight: float, id_set: str, id_accuracy: float, ood_accuracies: Mapping[str, float]
) -> dict[str, float]:
    """Returns the derivative of the objective with respect to the accuracy of every set.

    These are the weights of an interval (``results.intervals``): exact for ``weighted_mean``, first order for the
    others. Harmonic: dJ/da = 2 b^2 / (a + b)^2 and dJ/db = 2 a^2 / (a + b)^2, shared equally by the OOD sets; where
    a = b = 0 the value along a = b, 1/2, is used. Worst domain: 1 on the lowest set (the first of equals), else 0.

    Args:
        kind: Kind of objective.
        id_weight: w of ``weighted_mean``.
        id_set: Name under which the ID set appears in the answer; no OOD set may have it.
        id_accuracy: a.
        ood_accuracies: Accuracy per OOD set.

    Raises:
        CarftError: An accuracy is not a number in [0, 1].
        ValueError: An OOD set is called ``id_set``.
    """
    _check(id_accuracy, ood_accuracies)
    if id_set in ood_accuracies:
        raise ValueError(f"the ID set and an OOD set must have different names, but got {id_set!r} for both")
    if not ood_accuracies:
        return {id_set: 1.0}
    num_ood = len(ood_accuracies)
    if kind == "worst_domain":
        lowest = min(ood_accuracies, key=lambda name: ood_accuracies[name])
        return {id_set: 0.0, **{name: float(name == lowest) for name in ood_accuracies}}
    id_slope, ood_slope = id_weight, 1 - id_weight
    if kind == "harmonic":
        ood_accuracy = mean_ood_accuracy(ood_accuracies)
        total = id_accuracy + ood_accuracy
        id_slope, ood_slope = (
            (2 * (ood_accuracy / total) ** 2, 2 * (id_accuracy / total) ** 2) if total > 0 else (0.5, 0.5)
        )
    return {id_set: id_slope, **dict.fromkeys(ood_accuracies, ood_slope / num_ood)}


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective together with the sets it is taken over.

    Attributes:
        kind: Which of the formulas above.
        id_set: Name of the ID set.
        ood_sets: Names of the OOD sets; none of them may be ``id_set``.
        id_weight: w, used by ``weighted_mean`` alone.
    """

    kind: ObjectiveKind
    id_set: str
    ood_sets: tuple[str, ...]
    id_weight: float = 0.5

    def value(self, accuracies: Mapping[str, float]) -> float:
        """Returns the objective of the accuracies by set; see ``objective``."""
        return objective(self.kind, self.id_weight, accuracies[self.id_set], self._ood(accuracies))

    def weights(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Returns the derivatives at the accuracies by set; see ``objective_weights``."""
        id_accuracy = accuracies[self.id_set]
        return objective_weights(self.kind, self.id_weight, self.id_set, id_accuracy, self._ood(accuracies))

    def values(self, accuracies: Mapping[str, FloatArray]) -> FloatArray:
        """Returns ``value`` for many models at once: per set an array of accuracies, all of one shape, unchecked."""
        id_accuracy = accuracies[self.id_set]
        if not self.ood_sets:
            return id_accuracy
        by_set = np.stack([accuracies[name] for name in self.ood_sets])
        if self.kind == "worst_domain":
            lowest: FloatArray = by_set.min(axis=0)
            return lowest
        ood_accuracy = by_set.mean(axis=0)
        if self.kind == "harmonic":
            total = id_accuracy + ood_accuracy
            harmonic: FloatArray = 2 * id_accuracy * ood_accuracy / np.where(total > 0, total, 1.0)
            return harmonic
        mean: FloatArray = self.id_weight * id_accuracy + (1 - self.id_weight) * ood_accuracy
        return mean

    def slopes(self, accuracies: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Returns ``weights`` for many models at once, per set an array of the shape of the accuracies."""
        id_accuracy, num_ood = accuracies[self.id_set], len(self.ood_sets)
        if not num_ood:
            return {self.id_set: np.ones_like(id_accuracy)}
        by_set = np.stack([accuracies[name] for name in self.ood_sets])
        if self.kind == "worst_domain":
            lowest = by_set.argmin(axis=0)
            ood = {name: (lowest == i).astype(np.float64) for i, name in enumerate(self.ood_sets)}
            return {self.id_set: np.zeros_like(id_accuracy), **ood}
        if self.kind == "harmonic":
            ood_accuracy = by_set.mean(axis=0)
            total = id_accuracy + ood_accuracy
            id_share = np.where(total > 0, id_accuracy / np.where(total > 0, total, 1.0), 0.5)
            return {
                self.id_set: 2 * (1 - id_share) ** 2,
                **dict.fromkeys(self.ood_sets, 2 * id_share**2 / num_ood),
            }
        ood_slope = np.full_like(id_accuracy, (1 - self.id_weight) / num_ood)
        return {self.id_set: np.full_like(id_accuracy, self.id_weight), **dict.fromkeys(self.ood_sets, ood_slope)}

    def _ood(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        return {name: accuracies[name] for name in self.ood_sets}


def objective_spec(recipe: Recipe) -> ObjectiveSpec:
    """Returns the objective of a recipe over its validation sets; the weighted mean where it keeps two apart."""
    part = recipe.search.objective
    kind: ObjectiveKind = "weighted_mean" if part.kind == "pareto" else part.kind
    return ObjectiveSpec(kind, ID_SET, tuple(recipe.data.ood_val), part.id_weight)


def _check(id_accuracy: float, ood_accuracies: Mapping[str, float]) -> None:
    named = {"ID": id_accuracy, **{f"OOD set {name}": value for name, value in ood_accuracies.items()}}
    problems = [
        Problem(f"accuracy of {name}", "must be a number from 0 to 1, or there is no objective", f"{value}")
        for name, value in named.items()
        if not 0 <= value <= 1  # false for not-a-number too
    ]
    if problems:
        raise CarftError(problems)
