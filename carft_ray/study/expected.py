"""What to expect of tried values: the posterior over the trainings of a study, read at one alpha for each values.

Values are what a training was given, but for its seed; trials with equal values are trainings of the same values. At
their alpha the expected objective of all their trainings is highest, so that choosing it is no luck of one training.
A search that draws alpha has one measured point per training, and alpha is a parameter as the others.

Pruned trainings take no part. A training that diverged or failed counts as one that measured what the frozen model
does; values are the best only if more of their trainings finished than failed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy  # its modules load when they are first used

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import VIOLATION, CategoricalParameter, Parameter, total_violation
from carft_ray.recipe.space import is_active, same
from carft_ray.study.attributes import ROUNDING
from carft_ray.study.posterior import BoolArray, FloatArray, IntArray, Posterior, posterior
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.training import TrialRow
from carft_ray.study.typed import FAILED

CLIP = 0.02  # below the frozen model, deeper falls say nothing more
NUM_PLACES = 64  # where the next trainings may be, for what they are worth
OWN = math.nan  # in place of an alpha: each training is measured at its own
Point = dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What a training of tried values with a new seed is expected to measure.

    Attributes:
        names: Their complete trainings, in the order of their numbers.
        kind: ``trial`` or ``baseline``.
        alpha: At which they are expected to be best.
        metrics: Expected there: ``objective``, ``id_accuracy``, ``ood_accuracy``, violations; fractions.
        ends: 95 % interval of the expected objective.
        measured: Objectives of the trainings there, in the order of ``names``.
        better: By baseline the probability that the expected objective is higher than the baseline's.
    """

    names: tuple[str, ...]
    kind: str
    alpha: float
    metrics: Point
    ends: tuple[float, float]
    measured: tuple[float, ...]
    better: Mapping[str, float]

    @property
    def objective(self) -> float:
        """The expected objective."""
        return self.metrics["objective"]

    @property
    def rank(self) -> tuple[float, float]:
        """What the best values have least of."""
        return total_violation(self.metrics), -self.objective


@dataclass(frozen=True, eq=False)
class Expectation:
    """What all tried values of a study are expected to measure.

    Attributes:
        posterior: Of all values.
        by_name: What is expected, by the name of each complete trial and baseline.
    """

    posterior: Posterior
    by_name: Mapping[str, Expected]
    _measures: IntArray  # of each values, the expected objective at their alpha
    _tried: BoolArray
    _sound: frozenset[str]

    @cached_property
    def best(self) -> Expected | None:
        """The best tried values of trials."""
        trials = [each for each in self.by_name.values() if each.kind == "trial" and each.names[0] in self._sound]
        return min(trials, key=lambda each: each.rank, default=None)

    def gain(self, number: int) -> float:
        """Returns by how much the best expected objective rises with the next trainings (``Posterior.gain``)."""
        return self.posterior.gain(self._measures, self._tried, number)


def expectation(recipe: Recipe, trials: Iterable[TrialRow], baselines: Iterable[TrialRow]) -> Expectation | None:
    """Returns what the tried values of a study are expected to measure; None before a trial is complete.

    Args:
        recipe: Of the study.
        trials: Of a search with one objective.
        baselines: With the frozen model among them.
    """
    rows = [row for row in trials if row.outcome in ("complete", *FAILED)]
    frozen = next(
        ({**row.metrics, "objective": row.objective or 0.0} for row in baselines if row.name == ZERO_SHOT), {}
    )
    if not any(row.outcome == "complete" for row in rows):
        return None
    rows += [row for row in baselines if row.outcome == "complete" and row.name != ZERO_SHOT]
    keys = [_key(row) for row in rows]
    numbers = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    values = np.array([numbers[key] for key in keys])
    groups: list[list[TrialRow]] = [[] for _ in numbers]
    for key, row in zip(keys, rows, strict=True):
        groups[numbers[key]].append(row)
    alphas = _alphas(recipe, rows)
    names = ["objective", *sorted(set.intersection(*(_named(row) for row in rows if row.outcome == "complete")))]
    failed = np.array([row.outcome in FAILED for row in rows])
    curves = [[_at(row, alpha, frozen) for alpha in alphas] for row in rows]
    measured = np.array([[point.get(name, 0.0) for point in curve for name in names] for curve in curves])
    objectives = np.arange(len(alphas)) * len(names)
    if frozen:
        measured[:, objectives] = np.maximum(measured[:, objectives], frozen["objective"] - CLIP)
    seeds = np.array([int(row.values.get("seed", recipe.train.seed)) for row in rows])
    points = [np.array([_unit(recipe.search.space, own[0]) for own in groups])]
    points.append(_places(recipe.search.space))
    found = posterior(np.concatenate(points), values, seeds, measured, failed, objectives)
    chosen = [_chosen(found, index, names) for index in range(len(found.mean))]
    measures = np.array([place * len(names) for place, _ in chosen])
    rivals = {row.name: values[index] for index, row in enumerate(rows) if row.kind == "baseline"}
    half = float(scipy.special.stdtrit(found.dof, 0.975))
    by_name, sound = {}, set[str]()
    for index, own in enumerate(groups):
        place, metrics = chosen[index]
        complete = [row for row in own if row.outcome == "complete"]
        if not complete:
            continue
        at, reach = (index, int(measures[index])), half * found.sd(index, int(measures[index]))
        is_measured = any(point["alpha"] == alphas[place] for point in _curve(complete[0]))
        alpha = alphas[place] if is_measured else complete[0].alpha
        each = Expected(
            names=tuple(row.name for row in complete),
            kind=complete[0].kind,
            alpha=float(alpha or 0.0),
            metrics=metrics,
            ends=(metrics["objective"] - reach, metrics["objective"] + reach),
            measured=tuple(_at(row, alphas[place], frozen)["objective"] for row in complete),
            better={name: found.p_better(at, (g, int(measures[g]))) for name, g in rivals.items() if g != index},
        )
        by_name.update(dict.fromkeys(each.names, each))
        if 2 * len(complete) > len(own):
            sound.add(each.names[0])
    tried = np.array([index < len(groups) and groups[index][0].kind == "trial" for index in range(len(chosen))])
    return Expectation(found, by_name, measures, tried, frozenset(sound))


def _key(row: TrialRow) -> str:
    """Returns what tells values apart: of a baseline its name, of a trial all but its seed."""
    if row.kind == "baseline":
        return row.name
    return json.dumps({name: value for name, value in row.values.items() if name != "seed"}, sort_keys=True)


def _alphas(recipe: Recipe, rows: Sequence[TrialRow]) -> tuple[float, ...]:
    """Returns the alphas at which all complete trials were measured; ``OWN`` alone if there is none, or it is drawn."""
    trials = [row for row in rows if row.kind == "trial" and row.outcome == "complete"]
    common = set.intersection(*({point["alpha"] for point in _curve(row)} for row in trials))
    allowed = sorted(alpha for alpha in common if alpha >= recipe.search.alpha.lowest - ROUNDING)
    return tuple(allowed) if allowed and "alpha" not in recipe.search.space else (OWN,)


def _named(row: TrialRow) -> set[str]:
    """Returns which metrics of a training are expected, besides its objective."""
    return {name for name in row.metrics if name in ("id_accuracy", "ood_accuracy") or name.startswith(VIOLATION)}


def _at(row: TrialRow, alpha: float, frozen: Mapping[str, float]) -> Mapping[str, float]:
    """Returns what a training measured at an alpha, else at its own; of one that failed what the frozen model does."""
    if row.outcome in FAILED:
        return frozen
    own = {**row.metrics, "objective": row.objective or 0.0}
    return next((point for point in _curve(row) if point["alpha"] == alpha), own)


def _curve(row: TrialRow) -> list[Point]:
    """Returns the points of a training that say what counts; another program may have written them."""
    return [point for point in row.points if {"alpha", "objective"} <= set(point)]


def _unit(space: Mapping[str, Parameter], row: TrialRow) -> list[float]:
    """Returns values in the unit cube: logarithms of what is drawn so, a coordinate for each choice of a category.

    Inactive parameters are in the middle. Of what is not in the space, as of a baseline, all coordinates are NaN.
    """
    found: list[float] = []
    if row.kind == "baseline" or row.outside:
        return [math.nan] * sum(
            len(part.choices) if isinstance(part, CategoricalParameter) else 1 for part in space.values()
        )
    for name, parameter in space.items():
        value: Any = row.values.get(name)
        active = name in row.values and is_active(parameter, row.values)
        if isinstance(parameter, CategoricalParameter):
            found += [float(active and same(value, choice)) / math.sqrt(2) for choice in parameter.choices]
        elif not active:
            found.append(0.5)
        else:
            low, high, at = (math.log(x) if parameter.log else x for x in (parameter.low, parameter.high, float(value)))
            found.append((at - low) / (high - low) if high > low else 0.0)
    return found


def _places(space: Mapping[str, Parameter]) -> FloatArray:
    """Returns places of the space where the next trainings may be, in the unit cube, [P, d]."""
    rng = np.random.default_rng(0)
    columns: list[FloatArray] = []
    for parameter in space.values():
        if isinstance(parameter, CategoricalParameter):
            number = len(parameter.choices)
            columns.append(np.eye(number)[rng.integers(0, number, NUM_PLACES)] / math.sqrt(2))
        else:
            columns.append(rng.random((NUM_PLACES, 1)))
    return np.concatenate(columns, axis=1)


def _chosen(found: Posterior, values: int, names: Sequence[str]) -> tuple[int, Point]:
    """Returns at which alpha values are expected to be best (the place in the alphas), and what is expected there."""
    points = [dict(zip(names, each, strict=True)) for each in found.mean[values].reshape(-1, len(names)).tolist()]
    at = min(range(len(points)), key=lambda at: (total_violation(points[at]), -points[at]["objective"]))
    return at, points[at]
