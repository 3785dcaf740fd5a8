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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from carft_ray.errors import CarftError, Problem
from carft_ray.recipe.schema import Recipe

ID_SET = "id_val"  # role and name of the ID validation set

FloatArray = npt.NDArray[np.float64]
ObjectiveKind = Literal["weighted_mean", "harmonic", "worst_domain"]


def mean_ood_accuracy(ood_accuracies: Mapping[str, float]) -> float:
    """Returns the unweighted mean over the OOD sets; it needs at least one."""
    return math.fsum(ood_accuracies.values()) / len(ood_accuracies)


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

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of all sets, the ID set first."""
        return (self.id_set, *self.ood_sets)

    def value(self, accuracies: Mapping[str, float]) -> float:
        """Returns the objective of the accuracies by set, a finite number in [0, 1]; other sets may be there.

        Raises:
            CarftError: An accuracy is not a number in [0, 1]; the message names each.
        """
        id_accuracy, ood = accuracies[self.id_set], {name: accuracies[name] for name in self.ood_sets}
        _check(id_accuracy, ood)
        if not ood:
            return float(id_accuracy)
        return float(self._of(id_accuracy, min(ood.values()) if self._is_lowest else mean_ood_accuracy(ood)))

    def values(self, accuracies: Mapping[str, FloatArray]) -> FloatArray:
        """Returns ``value`` for many models at once: per set an array of accuracies, all of one shape, unchecked."""
        if not self.ood_sets:
            return accuracies[self.id_set]
        by_set = np.stack([accuracies[name] for name in self.ood_sets])
        found: FloatArray = self._of(accuracies[self.id_set], by_set.min(0) if self._is_lowest else by_set.mean(0))
        return found

    @property
    def _is_lowest(self) -> bool:
        return self.kind == "worst_domain"

    def _of(self, id_accuracy: Any, ood_accuracy: Any) -> Any:
        """Returns the objective of a and b (``worst_domain``: of the lowest OOD accuracy): numbers or arrays."""
        if self._is_lowest:
            return ood_accuracy
        if self.kind == "harmonic":
            total = id_accuracy + ood_accuracy
            return 2 * id_accuracy * ood_accuracy / np.where(total > 0, total, 1.0)
        return self.id_weight * id_accuracy + (1 - self.id_weight) * ood_accuracy

    def slopes(self, accuracies: Mapping[str, float] | Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Returns the derivative of the objective with respect to the accuracy of every set; many models at once.

        Weights of an interval (``statistics.intervals``): exact for ``weighted_mean``, first order for the
        others. Harmonic: dJ/da = 2 b^2 / (a + b)^2 and dJ/db = 2 a^2 / (a + b)^2, shared equally by the OOD sets; where
        a = b = 0 the value along a = b, 1/2, is used. Worst domain: 1 on the lowest set (the first of equals), else 0.

        Args:
            accuracies: Per set an accuracy, or an array of them, all of one shape; unchecked.

        Returns:
            Per set an array of that shape.
        """
        id_accuracy, num_ood = np.asarray(accuracies[self.id_set], np.float64), len(self.ood_sets)
        if not num_ood:
            return {self.id_set: np.ones_like(id_accuracy)}
        by_set = np.stack([accuracies[name] for name in self.ood_sets])
        if self._is_lowest:
            lowest = np.asarray(by_set.argmin(axis=0))
            ood = {name: (lowest == i).astype(np.float64) for i, name in enumerate(self.ood_sets)}
            return {self.id_set: np.zeros_like(id_accuracy), **ood}
        id_slope, ood_slope = np.full_like(id_accuracy, self.id_weight), np.full_like(id_accuracy, 1 - self.id_weight)
        if self.kind == "harmonic":
            total = id_accuracy + by_set.mean(axis=0)
            id_share = np.where(total > 0, id_accuracy / np.where(total > 0, total, 1.0), 0.5)
            id_slope, ood_slope = 2 * (1 - id_share) ** 2, 2 * id_share**2
        return {self.id_set: id_slope, **dict.fromkeys(self.ood_sets, ood_slope / num_ood)}

    def weights(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Returns ``slopes`` of one model."""
        return {name: float(slope) for name, slope in self.slopes(accuracies).items()}


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
