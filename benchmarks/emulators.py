"""Worlds in which ``python -m benchmarks.selection`` searches, made of a table of ``benchmarks.seed_table``.

A training of values x with seed s measures, at each alpha, mean(x) + seed(s) + sd(x) rest. This is another family than
the product's model: no Gaussian process, no equal noise, no normal distribution.

    smooth   mean: thin-plate splines through the mean curves of the configurations. Leave-one-out errors choose the
             smoothing. sd: a spline through the logarithms of the configurations' standard deviations
    rough    the same, but the splines pass through the mean curves: luck in these means is an effect of values here
    flat     values have no effect: all have the grand mean curve. The noise is that of ``smooth``
    table    the trainings themselves: a search proposes the nearest configuration that it has not tried, and gets its
             seeds in a random order. The truth is the mean of the seeds that the search has not used, so it is noisy

seed(s) is a random sum of the table's seed effects, which are curves; rest is a whole curve drawn from the table's
standardised residuals. The means of both are 0, so mean(x) is what a training with a new seed is expected to measure. A
baseline outside the search space has its own mean curve and the median noise. A diverged training counts as the frozen
model. All numbers depend on the number of the search, the values and the seed only.

Shape letters: C configurations, S seeds, A alphas, K measures (objective, ID and OOD accuracy), d parameters.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.interpolate import RBFInterpolator

from carft_ray.errors import Problem, UsageError
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import FloatParameter

MEASURES = ("objective", "id_accuracy", "ood_accuracy")
SMOOTHING = (0.0, *(10.0 ** np.arange(-4, 2)), 1e3)  # candidates; the last one is nearly a plane
EDGE = 1e-9  # rounding
MOST_KEPT = 1000  # mean curves

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Values = Mapping[str, Any]


class World(Protocol):
    """What trainings measure, and what is true.

    Attributes:
        alphas: Where curves are measured, from the lowest that may be chosen.
        frozen: Of the zero-shot model, [K].
        is_exact: Whether the truth has no noise.
        most: Trainings of the same values that a search may have; None: any number.
        num_points: Different values that a search may try; None: any number.
    """

    alphas: tuple[float, ...]
    frozen: FloatArray
    is_exact: bool
    most: int | None
    num_points: int | None

    def nearest(self, values: Values, tried: Iterable[Values]) -> dict[str, Any]:
        """Returns the values that a search may try in place of drawn ones."""

    def measured(self, values: Values, seed: int, search: int) -> FloatArray:
        """Returns the curve of a training, [A, K]; ``seed`` counts from 0."""

    def truth(self, values: Values, num_used: int, search: int) -> FloatArray:
        """Returns the curve that a training with a new seed is expected to have, [A, K].

        Args:
            values: Of the training.
            num_used: Trainings of these values in the search.
            search: Its number.
        """


@dataclass(frozen=True, eq=False)
class SeedTable:
    """The trainings of a table.

    Attributes:
        recipe: Of the search.
        alphas: From the lowest that may be chosen.
        names: Of the configurations, C.
        values: Over the recipe's ``train``, C.
        curves: [C, S, A, K].
        frozen: Of the zero-shot model, [K].
        words: The metadata of the file.
    """

    recipe: Recipe
    alphas: tuple[float, ...]
    names: tuple[str, ...]
    values: tuple[dict[str, Any], ...]
    curves: FloatArray
    frozen: FloatArray
    words: Mapping[str, str]

    def place(self, values: Values) -> int:
        """Returns the configuration with these values."""
        return [identity(each) for each in self.values].index(identity(values))

    def is_inside(self, values: Values) -> bool:
        """Tells whether values are a point of the search space; those of some baselines are not."""
        space = space_of(self.recipe)
        inside = (part.low <= self._value(name, values) <= part.high for name, part in space.items())
        return values.keys() <= {*space, "seed"} and all(inside)

    def unit(self, values: Values) -> FloatArray:
        """Returns values as shares of their ranges, logarithmic where the recipe's are, [d]."""
        found = []
        for name, part in space_of(self.recipe).items():
            low, high, value = np.array([part.low, part.high, self._value(name, values)], np.float64)
            share = np.log(value / low) / np.log(high / low) if part.log else (value - low) / (high - low)
            found.append(float(share))
        return np.array(found)

    def _value(self, name: str, values: Values) -> float:
        return float(values.get(name, getattr(self.recipe.train, name)))


def space_of(recipe: Recipe) -> dict[str, FloatParameter]:
    """Returns the search space, of which the floats count; as ``benchmarks.trainings``, which loads torch."""
    return {name: part for name, part in recipe.search.space.items() if isinstance(part, FloatParameter)}


def read_table(path: Path, recipe: Recipe) -> SeedTable:
    """Returns the trainings of a table that ``benchmarks.seed_table`` has made of the recipe.

    Raises:
        UsageError: There is none, or it is of another recipe, or a training is missing.
    """
    if not path.is_file():
        step = "Make it with python -m benchmarks.seed_table, or name it with --table."
        raise UsageError(Problem(str(path), "must be a table of benchmarks.seed_table", next_step=step))
    content = pq.read_table(path)
    rows = content.to_pylist()
    names = tuple(dict.fromkeys(row["configuration"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    by_key = {(row["configuration"], row["seed"]): row for row in rows}
    space, baselines = space_of(recipe), recipe.search.baselines
    alphas = tuple(alpha for alpha in recipe.search.alpha.measured if alpha >= recipe.search.alpha.lowest - EDGE)
    finished = next(row for row in rows if not row["diverged"])
    is_whole = len(seeds) > 1 and all((name, seed) in by_key for name in names for seed in seeds)
    is_whole &= {0.0, *alphas} <= {point["alpha"] for point in finished["curve"]}
    if not is_whole or not {*baselines} <= {*names} or not {*space} <= {*finished}:
        rule = "must have the recipe's baselines, parameters, alphas, and two or more seeds, the same per configuration"
        raise UsageError(Problem(str(path), rule))
    frozen = curve_of(finished, (0.0,))[0]
    first = {name: by_key[name, seeds[0]] for name in names}
    values = [dict(baselines.get(name) or {key: first[name][key] for key in space}) for name in names]
    curves = [[_measured(by_key[name, seed], alphas, frozen) for seed in seeds] for name in names]
    return SeedTable(recipe, alphas, names, tuple(values), np.array(curves), frozen, words_of(content))


def words_of(table: pa.Table) -> dict[str, str]:
    """Returns the metadata of a table of ``benchmarks.seed_table``."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _measured(row: Mapping[str, Any], alphas: Sequence[float], frozen: FloatArray) -> FloatArray:
    return np.tile(frozen, (len(alphas), 1)) if row["diverged"] else curve_of(row, alphas)


def curve_of(row: Mapping[str, Any], alphas: Sequence[float]) -> FloatArray:
    """Returns the curve of a result, [A, K]."""
    points = [next(point for point in row["curve"] if abs(point["alpha"] - alpha) < EDGE) for alpha in alphas]
    return np.array([[point[name] for name in MEASURES] for point in points])


def identity(values: Values) -> str:
    """Returns what tells values apart: all but the seed."""
    return json.dumps({name: value for name, value in values.items() if name != "seed"}, sort_keys=True)


def make_world(name: str, table: SeedTable) -> World:
    """Returns a world of the module's list by its name."""
    return Tabulated(table) if name == "table" else Emulator(table, name)


class Emulator:
    """Splines through a table, with its noise; see the module.

    Attributes:
        rest: Residual curves of trainings, standardised, [C S, A, K].
        seeds: Effects of the table's seeds, [S, A, K].
    """

    is_exact: bool = True
    most: int | None = None
    num_points: int | None = None

    def __init__(self, table: SeedTable, name: str) -> None:
        self.alphas, self.frozen, self._table = table.alphas, table.frozen, table
        means = table.curves.mean(axis=1)
        num_C, num_S = table.curves.shape[:2]
        inside = np.array([table.is_inside(values) for values in table.values])
        points = np.array([table.unit(values) for values in table.values if table.is_inside(values)])
        own = means if name != "flat" else np.broadcast_to(means.mean(axis=0), means.shape)
        self._outside = {identity(table.values[c]): own[c] for c in np.flatnonzero(~inside)}
        self._mean = spline(points, own[inside], 0.0 if name == "rough" else None)
        self.seeds = table.curves.mean(axis=0) - means.mean(axis=0)
        rest = table.curves - means[:, None] - self.seeds
        lost = num_C * num_S / ((num_C - 1) * (num_S - 1))  # both means are of the same trainings
        logs = np.log(np.maximum(1e-4, np.sqrt(lost * (rest[..., 0] ** 2).mean(axis=(1, 2)))))
        self._log_sd = spline(points, logs[inside, None], None)
        self._bounds = logs.min(), logs.max()
        self._usual = float(np.median(logs))
        sds = np.array([self.sd(values) for values in table.values])
        scaled = (np.sqrt(lost) * rest / sds[:, None, None, None]).reshape(-1, *rest.shape[2:])
        self.rest = scaled - scaled.mean(axis=0)
        self._means: dict[str, FloatArray] = {}

    def sd(self, values: Values) -> float:
        """Returns the standard deviation of the objective of trainings of values, without that of seeds."""
        if identity(values) in self._outside:
            return float(np.exp(self._usual))
        return float(np.exp(np.clip(self._log_sd(self._table.unit(values)[None])[0, 0], *self._bounds)))

    def nearest(self, values: Values, tried: Iterable[Values]) -> dict[str, Any]:
        """Returns the values themselves."""
        return dict(values)

    def measured(self, values: Values, seed: int, search: int) -> FloatArray:
        """As of ``World``."""
        of_seed = np.random.default_rng([search, 0, seed])
        weights = of_seed.standard_normal(len(self.seeds)) / np.sqrt(len(self.seeds) - 1)
        own = np.random.default_rng([search, 1, seed, zlib.crc32(identity(values).encode())])
        drawn = self.rest[own.integers(len(self.rest))]
        found: FloatArray = self.truth(values) + np.tensordot(weights, self.seeds, 1) + self.sd(values) * drawn
        return found

    def truth(self, values: Values, num_used: int = 0, search: int = 0) -> FloatArray:
        """As of ``World``; the same in all searches."""
        key = identity(values)
        if key in self._outside:
            return np.asarray(self._outside[key])
        if key not in self._means:
            if len(self._means) > MOST_KEPT:  # those of earlier searches
                self._means.clear()
            self._means[key] = np.reshape(self._mean(self._table.unit(values)[None]), (len(self.alphas), -1))
        return self._means[key]


class Tabulated:
    """The trainings of a table; see the module."""

    is_exact: bool = False
    most: int | None
    num_points: int | None

    def __init__(self, table: SeedTable) -> None:
        self.alphas, self.frozen, self._table = table.alphas, table.frozen, table
        self.most = table.curves.shape[1] - 1  # one seed is left for the truth
        named = zip(table.names, table.values, strict=True)
        self._points = [dict(values) for name, values in named if name not in table.recipe.search.baselines]
        self.num_points = len(self._points)

    def nearest(self, values: Values, tried: Iterable[Values]) -> dict[str, Any]:
        """Returns the nearest configuration that is no baseline and has no training."""
        known, wanted = {identity(each) for each in tried}, self._table.unit(values)
        left = [each for each in self._points if identity(each) not in known]
        return min(left, key=lambda each: float(((self._table.unit(each) - wanted) ** 2).sum())).copy()

    def measured(self, values: Values, seed: int, search: int) -> FloatArray:
        """As of ``World``."""
        assert self.most is not None
        assert seed < self.most
        return np.asarray(self._table.curves[self._table.place(values), self.order(search)[seed]])

    def truth(self, values: Values, num_used: int, search: int) -> FloatArray:
        """As of ``World``: the mean of the seeds that are left."""
        left = self.order(search)[num_used:]
        return np.asarray(self._table.curves[self._table.place(values), left].mean(axis=0))

    def order(self, search: int) -> npt.NDArray[np.int64]:
        """Returns the order in which a search gets the table's seeds."""
        return np.random.default_rng([search, 2]).permutation(self._table.curves.shape[1])


def spline(points: FloatArray, values: FloatArray, smoothing: float | None) -> RBFInterpolator:
    """Returns a thin-plate spline through values at points of the unit cube.

    Args:
        points: [n, d].
        values: [n, ...].
        smoothing: In the units of SciPy; None: the one with the smallest squared error at points that are left out.
    """
    flat = values.reshape(len(values), -1)

    def through(kept: BoolArray, smoothing: float) -> RBFInterpolator:
        return RBFInterpolator(points[kept], flat[kept], kernel="thin_plate_spline", smoothing=smoothing)

    everything = np.ones(len(points), bool)
    if smoothing is not None:
        return through(everything, smoothing)
    errors = {
        candidate: sum(
            float(((through(np.arange(len(points)) != k, candidate)(points[k : k + 1]) - flat[k]) ** 2).sum())
            for k in range(len(points))
        )
        for candidate in SMOOTHING
    }
    return through(everything, min(errors, key=lambda candidate: errors[candidate]))
