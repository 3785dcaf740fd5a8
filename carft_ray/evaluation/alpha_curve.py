"""The alpha curve of one training: at which alphas it is measured, and which one is chosen.

The weights (1 - alpha) zero_shot + alpha fine_tuned are evaluated on all validation images at every alpha of the grid
and at ``lowest``. The best measured point is the training's: the highest objective among the alphas from ``lowest`` on,
of equals the smaller alpha. What lies between the points is not guessed, so objective and accuracies of a training are
those of one and the same model.

Constraints are part of the choice: only the points that miss them least take part, by the sum of the positive parts of
their violations. All objectives are fractions.

    id_drop/<baseline>   violation = (ID accuracy of the baseline - allowed drop) - ID accuracy

A violation of 0 or less meets the constraint. The baseline's accuracy is fixed before the first trial.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from carft_ray.data.source import IntArray
from carft_ray.errors import DivergedError, Problem
from carft_ray.evaluation.metrics import is_above_chance, is_at_most_chance
from carft_ray.evaluation.objective import ID_SET, ObjectiveSpec, metrics_at
from carft_ray.evaluation.predictions import accuracy, select
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import ID_DROP, VIOLATION, ConstraintsConfig, total_violation

_ROUNDING = 1e-12
EQUAL = 1e-12  # objectives that differ by less are of the same counts of images
Point = dict[str, float]  # ``alpha``, metrics and violations there
At = Callable[[float], pa.Table]  # gives the predictions at an alpha


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


def measure_curve(recipe: Recipe, start: pa.Table, at: At) -> dict[float, pa.Table]:
    """Returns the predictions at every alpha of a training's curve, rising.

    A fixed ``train.alpha`` (or one that the search drew) is measured with both ends; in a Pareto search the grid is,
    too: every point may be on its front. Else it is the grid with ``lowest``.

    Args:
        recipe: ``recipe.train`` holds the values of this training.
        start: Predictions at alpha 0.
        at: Evaluates.
    """
    search, fixed = recipe.search, recipe.train.alpha
    alphas = {*search.alpha.measured} if fixed is None or search.objective.kind == "pareto" else {1.0}
    return {0.0: start} | {alpha: at(alpha) for alpha in sorted({*alphas, fixed or 0.0} - {0.0})}


def curve_points(tables: Mapping[float, pa.Table], spec: ObjectiveSpec, bounds: Sequence[Limit]) -> list[Point]:
    """Returns alpha, metrics and violations of every point.

    Args:
        tables: By alpha the predictions of all sets there; other alphas may be in a table, too.
        spec: The objective.
        bounds: The constraints.

    Raises:
        DataError: A table lacks a set at its alpha.
    """
    return [
        {"alpha": alpha, **metrics_at(table, spec, alpha), **violations_at(table, bounds, alpha)}
        for alpha, table in tables.items()
    ]


def point_at(points: Iterable[Point], alpha: float) -> Point | None:
    """Returns the point of a curve that was measured at an alpha; None where none was."""
    return next((point for point in points if point["alpha"] == alpha), None)


def choose_point(points: Iterable[Point], lowest: float) -> Point:
    """Returns the best of the points from ``lowest`` on, of which there is one; see the module."""
    allowed = sorted((point for point in points if point["alpha"] >= lowest - 1e-9), key=lambda point: point["alpha"])
    least = min(map(total_violation, allowed))
    allowed = [point for point in allowed if total_violation(point) <= least + EQUAL]
    highest = max(point["objective"] for point in allowed)
    return next(point for point in allowed if point["objective"] >= highest - EQUAL)


def alphas_at_chance(tables: Mapping[float, pa.Table], id_set: str) -> list[float]:
    """Returns the alphas above 0 whose answers to the ID images are not shown to be above chance.

    None if those of zero-shot are not, either: there was nothing to lose, or there are too few images to decide.

    Args:
        tables: Predictions at every point measured, alpha 0 among them.
        id_set: Name of the ID set.

    Raises:
        DivergedError: At all alphas above 0 no more answers are right than by chance.
    """
    found = {alpha: select(table, id_set, alpha) for alpha, table in sorted(tables.items())}
    if is_at_chance(found.pop(0.0)):
        return []
    if all(is_at_most_chance(*_answers(table)) for table in found.values()):
        highest, number = max(map(accuracy, found.values())), len(next(iter(found.values())))
        rule, step = "ID accuracy must be above chance", "The training has diverged; try a lower learning_rate."
        value = f"at most {100 * highest:.1f} % of {number:,} images right, as with the same answers in random order"
        raise DivergedError(Problem("alpha curve", rule, value, next_step=step))
    return [alpha for alpha, table in found.items() if is_at_chance(table)]


def is_at_chance(table: pa.Table) -> bool:
    """Tells whether the answers to the images of one set, at one alpha, are not shown to be above chance."""
    return not is_above_chance(*_answers(table))


def _answers(table: pa.Table) -> tuple[IntArray, IntArray]:
    return table["label"].to_numpy(), table["prediction"].to_numpy()
