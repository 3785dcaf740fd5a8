"""What to expect of tried values: the posterior over the trainings of a study, read at one alpha for each values.

Values are what a training was given, but for its seed; trials with equal values are trainings of the same values. At
their alpha the expected objective of all their trainings is highest, so that choosing it is no luck of one training.
A search that draws alpha has one measured point per training, and alpha is a parameter as the others.

Pruned trainings take no part. A training that diverged or failed counts as one that measured what the frozen model
does; values are the best only if more of their trainings finished than failed. Equal values with equal seeds are the
same training, which counts once.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy  # its modules load when they are first used

from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import VIOLATION, CategoricalParameter, Parameter, total_violation
from carft_ray.recipe.space import is_active, same
from carft_ray.study.attributes import ROUNDING
from carft_ray.study.posterior import BoolArray, FloatArray, IntArray, Posterior, on_one_thread, posterior
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.training import TrialRow
from carft_ray.study.typed import FAILED

CLIP = 0.02  # below the frozen model, or all trainings, deeper falls say nothing more
NEXT = 8  # trainings, of which it is told what they are worth
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
        finishes: Whether more of their trainings finished than failed.
    """

    names: tuple[str, ...]
    kind: str
    alpha: float
    metrics: Point
    ends: tuple[float, float]
    measured: tuple[float, ...]
    better: Mapping[str, float]
    finishes: bool = True

    @property
    def objective(self) -> float:
        """The expected objective."""
        return self.metrics["objective"]

    @property
    def order(self) -> tuple[float, float, float]:
        """What the best values have least of."""
        return not self.finishes, total_violation(self.metrics), -self.objective


@dataclass(frozen=True, eq=False)
class Expectation:
    """What all tried values of a study are expected to measure.

    Attributes:
        posterior: Of all values.
        by_name: What is expected, by the name of each complete trial and baseline.
        has_curves: Whether alpha is chosen from the curves of all trainings; else each counts at its own alpha.
    """

    posterior: Posterior
    by_name: Mapping[str, Expected]
    has_curves: bool
    _measures: IntArray  # of each values, the expected objective at their alpha
    _tried: BoolArray
    _indices: Mapping[str, int]  # of the values of each name of ``by_name``, in the posterior

    @cached_property
    def best(self) -> Expected:
        """The best tried values of trials."""
        return min((each for each in self.by_name.values() if each.kind == "trial"), key=lambda each: each.order)

    def draws(self, rng: np.random.Generator) -> dict[str, float]:
        """Returns a draw of the expected objectives of all values together, by the name of each training."""
        with on_one_thread():
            found = self.posterior.draws(self._measures, 1, rng)[0]
        return {name: float(found[index]) for name, index in self._indices.items()}

    @property
    def deviations(self) -> tuple[float, float]:
        """Standard deviations of the objective between values, and between trainings of the same values.

        Both at the alpha of the best values.
        """
        at = self._measures[self._indices[self.best.names[0]]]
        scale, of = self.posterior.scale[at, at], self.posterior
        return math.sqrt(of.kappa * scale), math.sqrt((1 + of.tau) * scale)

    @cached_property
    def gain(self) -> float:
        """By how much the best expected objective rises with the ``NEXT`` trainings (``Posterior.gain``)."""
        with on_one_thread():
            return self.posterior.gain(self._measures, self._tried, NEXT)

    def is_worth_less(self, points: float | None) -> bool:
        """Tells whether the next trainings are worth less than ``search.stop_gain``, in points; None: never."""
        return points is not None and 100 * self.gain < points


def expectation(recipe: Recipe, trials: Iterable[TrialRow], baselines: Iterable[TrialRow]) -> Expectation | None:
    """Returns what the tried values of a study are expected to measure; None before a trial is complete, or of `train`.

    Args:
        recipe: Of the study.
        trials: Of a search with one objective.
        baselines: With the frozen model among them.
    """
    rows = [row for row in trials if row.outcome in ("complete", *FAILED)]
    frozen = next(
        ({**row.metrics, "objective": row.objective or 0.0} for row in baselines if row.name == ZERO_SHOT), {}
    )
    if not recipe.search.space or not any(row.outcome == "complete" for row in rows):
        return None
    rows += [row for row in baselines if row.outcome == "complete" and row.name != ZERO_SHOT]
    by_key: dict[str, dict[int, TrialRow]] = {}
    for row in rows:
        same_values, seed = by_key.setdefault(values_key(row), {}), int(row.values.get("seed", recipe.train.seed))
        if seed not in same_values or same_values[seed].outcome != "complete":
            same_values[seed] = row
    everything, rows = rows, [row for each in by_key.values() for row in each.values()]
    groups = [list(each.values()) for each in by_key.values()]
    values = np.repeat(np.arange(len(groups)), [len(own) for own in groups])
    seeds = np.array([seed for each in by_key.values() for seed in each])
    alphas = _alphas(recipe, rows)
    names = ["objective", *sorted(set.intersection(*(_named(row) for row in rows if row.outcome == "complete")))]
    failed = np.array([row.outcome in FAILED for row in rows])
    curves = [[_at(row, alpha, frozen) for alpha in alphas] for row in rows]
    measured = np.array([[point.get(name, 0.0) for point in curve for name in names] for curve in curves])
    objectives = np.arange(len(alphas)) * len(names)
    if frozen:
        highest = measured[:, objectives].max(axis=0)  # where none reaches the frozen model, the best one counts
        floor = np.minimum(highest, frozen["objective"]) - CLIP
        measured[:, objectives] = np.maximum(measured[:, objectives], floor)
    points = [np.array([_unit(recipe.search.space, own[0]) for own in groups])]
    points.append(_places(recipe.search.space))
    with on_one_thread():
        found = posterior(np.concatenate(points), values, seeds, measured, failed, objectives)
    chosen = [_chosen(found, index, names) for index in range(len(found.mean))]
    measures = np.array([place * len(names) for place, _ in chosen])
    places = {key: index for index, key in enumerate(by_key)}
    rivals = {key: index for key, index in places.items() if _is_baseline(groups[index][0])}
    half = float(scipy.special.stdtrit(found.dof, 0.975))
    expected = {}
    for index, (key, own) in enumerate(zip(by_key, groups, strict=True)):
        place, metrics = chosen[index]
        complete = [row for row in own if row.outcome == "complete"]
        if not complete:
            continue
        at, reach = (index, int(measures[index])), half * found.sd(index, int(measures[index]))
        is_measured = any(point["alpha"] == alphas[place] for point in _curve(complete[0]))
        alpha = alphas[place] if is_measured else complete[0].alpha
        expected[key] = Expected(
            names=tuple(row.name for row in complete),
            kind=complete[0].kind,
            alpha=float(alpha or 0.0),
            metrics=metrics,
            ends=(metrics["objective"] - reach, metrics["objective"] + reach),
            measured=tuple(_at(row, alphas[place], frozen)["objective"] for row in complete),
            better={name: found.p_better(at, (g, int(measures[g]))) for name, g in rivals.items() if g != index},
            finishes=2 * len(complete) > len(own),
        )
    keys = {row.name: values_key(row) for row in everything if row.outcome == "complete"}
    by_name = {name: expected[key] for name, key in keys.items()}
    indices = {name: places[key] for name, key in keys.items()}
    tried = np.array([index < len(groups) and not _is_baseline(groups[index][0]) for index in range(len(chosen))])
    return Expectation(found, by_name, alphas != (OWN,), measures, tried, indices)


def stand(rows: Iterable[TrialRow], found: Expectation | None) -> list[TrialRow]:
    """Returns rows with what their values are expected to measure, each at the alpha of its values.

    Rows of a Pareto search, of trainings that are not complete and of the frozen model stay as they are.

    Args:
        rows: Trials or baselines.
        found: Of their study.
    """
    return [_standing(row, found.by_name[row.name]) if found and row.name in found.by_name else row for row in rows]


def _standing(row: TrialRow, each: Expected) -> TrialRow:
    row = replace(row, expected=each.objective, order=each.order)
    point = next((point for point in _curve(row) if point["alpha"] == each.alpha), None)
    if point is None or each.alpha == row.alpha:
        return row
    metrics = {name: value for name, value in point.items() if name not in ("alpha", "objective")}
    return replace(row, alpha=each.alpha, objective=point["objective"], metrics=metrics)


def values_key(row: TrialRow) -> str:
    """Returns what tells the values of trainings apart: of a baseline its name, of a trial all but its seed."""
    if _is_baseline(row):
        return row.repeat_of or row.name
    return json.dumps({name: value for name, value in row.values.items() if name != "seed"}, sort_keys=True)


def _is_baseline(row: TrialRow) -> bool:
    return row.kind == "baseline"


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
    """Returns the points of a training that say what counts; none of one with a given alpha.

    Another program may have written them.
    """
    return [] if "alpha" in row.values else [point for point in row.points if {"alpha", "objective"} <= set(point)]


def _unit(space: Mapping[str, Parameter], row: TrialRow) -> list[float]:
    """Returns values in the unit cube: logarithms of what is drawn so, a coordinate for each choice of a category.

    Inactive parameters are in the middle. Values outside the space, which has changed, are outside the cube. Of what
    has no place, as a baseline, or a trial with a parameter that the space had before, all coordinates are NaN.
    """
    found: list[float] = []
    for name, parameter in space.items():
        value: Any = row.values.get(name)
        active = name in row.values and is_active(parameter, row.values)
        if isinstance(parameter, CategoricalParameter):
            found += [float(active and same(value, choice)) / math.sqrt(2) for choice in parameter.choices]
        elif not active:
            found.append(0.5)
        elif not isinstance(value, int | float) or (parameter.log and value <= 0):
            found.append(math.nan)
        else:
            low, high, at = (math.log(x) if parameter.log else x for x in (parameter.low, parameter.high, float(value)))
            found.append((at - low) / (high - low) if high > low else 0.0)
    has_others = not {*row.values} <= {*space, "seed", "alpha"}
    return [math.nan] * len(found) if _is_baseline(row) or has_others or any(map(math.isnan, found)) else found


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
