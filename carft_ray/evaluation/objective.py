"""The number that ranks trials, made from ID accuracy and the accuracies of the OOD sets.

With a = ID accuracy, b = mean of the m OOD accuracies, w = ``id_weight``:

    weighted_mean   w a + (1 - w) b
    harmonic        2 a b / (a + b), 0 when both are 0
    worst_domain    the lowest OOD accuracy

Without any OOD set every kind is a. All accuracies are fractions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carft_ray.data.source import IdArray
from carft_ray.evaluation.predictions import accuracy, select
from carft_ray.recipe.schema.recipe import Recipe

ID_SET = "id_val"  # role and name of the ID validation set

FloatArray = npt.NDArray[np.float64]
Metrics = dict[str, float]
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
        images: Per set an id of each image, equal ids for one image that two sets show; None: no two sets share one
            (``statistics.images``).
    """

    kind: ObjectiveKind
    id_set: str
    ood_sets: tuple[str, ...]
    id_weight: float = 0.5
    images: Mapping[str, IdArray] | None = field(default=None, compare=False, repr=False)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of all sets, the ID set first."""
        return (self.id_set, *self.ood_sets)

    def value(self, accuracies: Mapping[str, float]) -> float:
        """Returns the objective of the accuracies by set, a number in [0, 1]; other sets may be there."""
        id_accuracy, ood = accuracies[self.id_set], {name: accuracies[name] for name in self.ood_sets}
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

    def weights(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """Returns the derivative of the objective with respect to the accuracy of every set.

        Weights of an interval (``statistics.intervals``): exact for ``weighted_mean``, first order for the
        others. Harmonic: dJ/da = 2 b^2 / (a + b)^2 and dJ/db = 2 a^2 / (a + b)^2, shared equally by the OOD sets; where
        a = b = 0 the value along a = b, 1/2, is used. Worst domain: 1 on the lowest set (the first of equals), else 0.

        Args:
            accuracies: Per set an accuracy, unchecked; other sets may be there.
        """
        ood = {name: accuracies[name] for name in self.ood_sets}
        if not ood:
            return {self.id_set: 1.0}
        if self._is_lowest:
            lowest = min(ood, key=lambda name: ood[name])
            return {self.id_set: 0.0, **{name: float(name == lowest) for name in ood}}
        id_slope, ood_slope = self.id_weight, 1 - self.id_weight
        if self.kind == "harmonic":
            total = accuracies[self.id_set] + mean_ood_accuracy(ood)
            id_share = accuracies[self.id_set] / total if total > 0 else 0.5
            id_slope, ood_slope = 2 * (1 - id_share) ** 2, 2 * id_share**2
        return {self.id_set: id_slope, **dict.fromkeys(ood, ood_slope / len(ood))}


def objective_spec(recipe: Recipe) -> ObjectiveSpec:
    """Returns the objective of a recipe over its validation sets; the weighted mean where it keeps two apart."""
    part = recipe.search.objective
    kind: ObjectiveKind = "weighted_mean" if part.kind == "pareto" else part.kind
    return ObjectiveSpec(kind, ID_SET, tuple(recipe.data.ood_val), part.id_weight)


def metrics_at(table: pa.Table, spec: ObjectiveSpec, alpha: float) -> Metrics:
    """Returns ``accuracy/<set>``, ``id_accuracy``, ``ood_accuracy`` (mean of the OOD sets) and ``objective``.

    ``ood_accuracy`` is absent where there is no OOD set.

    Args:
        table: Predictions that hold all sets of the objective at ``alpha``.
        spec: The objective and its sets.
        alpha: Which rows.
    """
    by_set = {name: accuracy(select(table, name, alpha)) for name in spec.sets}
    metrics = {f"accuracy/{name}": value for name, value in by_set.items()}
    metrics["id_accuracy"] = by_set[spec.id_set]
    if spec.ood_sets:
        metrics["ood_accuracy"] = mean_ood_accuracy({name: by_set[name] for name in spec.ood_sets})
    return {**metrics, "objective": spec.value(by_set)}
