"""Constraints of a trial, measured from predictions: ID accuracy that may be lost under a baseline.

    id_drop/<baseline>   violation = (ID accuracy of the baseline - allowed drop) - ID accuracy

A violation of 0 or less meets the constraint; several add up by their positive parts. The baseline's accuracy is fixed
before the first trial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from carft_ray.evaluation.objective import ID_SET
from carft_ray.evaluation.predictions import accuracy, select
from carft_ray.recipe.schema.search import ID_DROP, VIOLATION, ConstraintsConfig

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Limit:
    """One constraint with its bound.

    Attributes:
        name: ``id_drop/<baseline>``.
        bound: ID accuracy from below, a fraction.
    """

    name: str
    bound: float

    def violation(self, value: float) -> float:
        """Returns by how much an ID accuracy misses the bound; differences that are rounding alone are 0."""
        found = self.bound - value
        return 0.0 if abs(found) < _ROUNDING else found


def limits(constraints: ConstraintsConfig, id_accuracies: Mapping[str, float]) -> tuple[Limit, ...]:
    """Returns the constraints of a recipe with their bounds, in the order of ``constraint_names`` in ``recipe.schema``.

    Args:
        constraints: The recipe's.
        id_accuracies: ID accuracy of each baseline that they name, at its alpha. A baseline without one constrains
            nothing, as in a training outside a search.
    """
    known = {name: drop for name, drop in constraints.id_drop.items() if name in id_accuracies}
    return tuple(Limit(f"{ID_DROP}/{name}", id_accuracies[name] - drop) for name, drop in known.items())


def violations_at(table: pa.Table, bounds: Sequence[Limit], alpha: float) -> dict[str, float]:
    """Returns ``violation/<name>`` of every constraint for predictions at one alpha."""
    id_accuracy = accuracy(select(table, ID_SET, alpha))
    return {VIOLATION + limit.name: limit.violation(id_accuracy) for limit in bounds}
