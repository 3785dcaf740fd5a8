"""What a training of the sandbox gives, between the real trainings of ``benchmarks/table.parquet``.

A smoothed thin-plate spline over the unit cube of the table's values gives ID and mean OOD accuracy along alpha and the
intermediate values of any training; its error is measured by cross-validation. Trainings with a large learning rate
collapse, down to chance: next to that cliff a smooth surface oscillates, so what is more than ``DEPTH`` under zero-shot
counts as that much (chosen by cross-validation). The noise between seeds is what the table's repeated points show: a
noisy training adds the deviation of one of them, drawn at random with a random sign, to curve and intermediate values
together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy import stats
from scipy.interpolate import CubicSpline, RBFInterpolator

from benchmarks.table import GRID, SPACE
from benchmarks.trainings import space_of
from carft_ray.errors import Problem, StorageError
from carft_ray.evaluation.alpha_curve import choose_point
from carft_ray.recipe.schema.recipe import Recipe

SMOOTHING = 1e-2  # of the spline; in the units of scipy's RBFInterpolator
FOLDS = 10
DEPTH = 0.03  # of the landscape under zero-shot
SHARES = (0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1.0)  # of a schedule, where intermediate values are kept

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one training gives; all fractions.

    Attributes:
        alphas: Where the curve is measured, [A].
        id_accuracies: [A].
        ood_accuracies: Mean over the OOD sets, [A].
        intermediate: Objective after ``SHARES`` of the schedule, [len(SHARES)].
    """

    alphas: FloatArray
    id_accuracies: FloatArray
    ood_accuracies: FloatArray
    intermediate: FloatArray

    @property
    def objectives(self) -> FloatArray:
        """Weighted mean with equal weights, [A]."""
        mean: FloatArray = (self.id_accuracies + self.ood_accuracies) / 2
        return mean

    def objective(self, lowest: float, alpha: float | None = None) -> float:
        """Returns the objective of the profile, or at an alpha that the search has drawn, by a spline."""
        if alpha is not None:
            return float(CubicSpline(self.alphas, self.objectives)(alpha))
        return best_objective(self.alphas.tolist(), self.objectives, lowest)

    def at_share(self, share: float) -> float:
        """Returns the objective after a share of the schedule."""
        return float(np.interp(share, SHARES, self.intermediate))

    def plus(self, noise: FloatArray) -> "Measured":
        """Returns the training with a deviation added, [2 A + len(SHARES)]; alpha 0 is the same in all."""
        n = len(self.alphas)
        return Measured(
            self.alphas,
            self.id_accuracies + noise[:n],
            self.ood_accuracies + noise[n : 2 * n],
            self.intermediate + noise[2 * n :],
        )


@dataclass(frozen=True)
class Landscape:
    """What trainings give: the spline and the noise.

    Attributes:
        alphas: Where the curves are measured, A of them.
        spline: From the unit cube to ``Measured`` in one row, [n, 2 A + len(SHARES)].
        deviations: Of repeated points from their mean, scaled to the noise of one training, [m, 2 A + len(SHARES)].
        seed_sd: Noise of the objective between seeds.
        num_collapsed: Trainings more than ``DEPTH`` under zero-shot.
        cv_correlation: Rank correlation of predicted and measured objective over the folds, of those that stand.
        cv_error: Root mean square of their difference.
        defaults: Values of what a search leaves alone.
    """

    alphas: tuple[float, ...]
    spline: RBFInterpolator
    deviations: FloatArray
    seed_sd: float
    num_collapsed: int
    cv_correlation: float
    cv_error: float
    defaults: Mapping[str, float]

    def training(self, values: Mapping[str, Any], rng: np.random.Generator | None = None) -> Measured:
        """Returns what a training gives: noise-free, or as one seed shows it."""
        row = self.spline(_unit([{**self.defaults, **values}]))[0]
        n = len(self.alphas)
        measured = Measured(np.asarray(self.alphas), row[:n], row[n : 2 * n], row[2 * n :])
        if rng is None:
            return measured
        return measured.plus(rng.choice([-1.0, 1.0]) * self.deviations[rng.integers(len(self.deviations))])

    def curve(self, values: Mapping[str, Any]) -> FloatArray:
        """Returns the noise-free objectives along alpha."""
        return self.training(values).objectives

    def objective(self, values: Mapping[str, Any], lowest: float) -> float:
        """Returns the noise-free objective: of the profile, or at ``values['alpha']`` where the search draws it."""
        return self.training(values).objective(lowest, values.get("alpha"))


def read_landscape(path: Path, recipe: Recipe) -> Landscape:
    """Reads the table and fits the spline.

    Raises:
        StorageError: There is no table.
    """
    if not path.exists():
        step = "Make it: python -m benchmarks.samplers --make (about 200 trainings)"
        raise StorageError(Problem(str(path), "must be the table of trainings", "none", next_step=step))
    rows = [row for row in pq.read_table(path).to_pylist() if not row["diverged"]]
    alphas, lowest = tuple(map(float, GRID)), recipe.search.alpha.lowest
    found = np.array([_measured(row, alphas) for row in rows])
    n = len(alphas)
    zero = list(alphas).index(0.0)
    floor = float(found[0, [zero, n + zero]].mean()) - DEPTH  # alpha 0 is zero-shot in every row
    clipped = np.concatenate(
        [_raised(found[:, :n], found[:, n : 2 * n], floor), np.maximum(found[:, 2 * n :], floor)], 1
    )
    points = _unit(rows)
    identity = [tuple(row[name] for name in SPACE) for row in rows]
    fold = np.array([identity.index(values) for values in identity]) % FOLDS  # repeated points stay together
    predicted = np.empty_like(clipped)
    for k in range(FOLDS):
        predicted[fold == k] = _spline(points[fold != k], clipped[fold != k])(points[fold == k])
    predicted, measured = (
        np.array([best_objective(alphas, (row[:n] + row[n : 2 * n]) / 2, lowest) for row in both])
        for both in (predicted, clipped)
    )
    counted = np.array([row["objective"] > floor for row in rows])
    repeats: dict[tuple[float, ...], list[int]] = {}
    for index, values in enumerate(identity):
        repeats.setdefault(values, []).append(index)
    groups = [which for which in repeats.values() if len(which) > 1 and counted[which].all()]
    variances = [np.var([rows[i]["objective"] for i in which], ddof=1) for which in groups]
    deviations = [
        (found[which] - found[which].mean(axis=0)) * np.sqrt(len(which) / (len(which) - 1)) for which in groups
    ]
    return Landscape(
        alphas=alphas,
        spline=_spline(points, clipped),
        deviations=np.concatenate(deviations),
        seed_sd=float(np.sqrt(np.mean(variances))),
        num_collapsed=int((~counted).sum()),
        cv_correlation=float(stats.spearmanr(predicted[counted], measured[counted]).statistic),
        cv_error=float(np.sqrt(np.mean((predicted - measured)[counted] ** 2))),
        defaults={name: getattr(recipe.train, name) for name in SPACE},
    )


def mean_with_interval(values: FloatArray) -> str:
    """Returns the mean in percent, with Student's 95 % interval over searches."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return f"{100 * mean:.2f} [{100 * (mean - half):.2f}, {100 * (mean + half):.2f}]"


def best_objective(alphas: Sequence[float], objectives: FloatArray, lowest: float) -> float:
    """Returns the objective of a training that takes the best point of its curve."""
    points = [{"alpha": alpha, "objective": value} for alpha, value in zip(alphas, objectives.tolist(), strict=True)]
    return choose_point(points, lowest)["objective"]


def covered(recipe: Recipe) -> Recipe:
    """Returns the recipe with a search space that the table covers."""
    space = dict(recipe.search.space)
    for name, part in space_of(recipe).items():
        if name in SPACE:
            low, high, _ = SPACE[name]
            space[name] = part.model_copy(update={"low": max(part.low, low), "high": min(part.high, high)})
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"space": space})})


def _measured(row: Mapping[str, Any], alphas: Sequence[float]) -> list[float]:
    """Returns a training of the table in one row: ID accuracies, OOD accuracies, intermediate values."""
    points = [next(p for p in row["curve"] if abs(p["alpha"] - alpha) < 1e-9) for alpha in alphas]
    shares = [seen["epoch"] / row["epochs"] for seen in row["epochs_seen"]]
    intermediate = np.interp(SHARES, shares, [seen["subset/objective"] for seen in row["epochs_seen"]])
    return [*(p["id_accuracy"] for p in points), *(p["ood_accuracy"] for p in points), *intermediate.tolist()]


def _raised(id_accuracies: FloatArray, ood_accuracies: FloatArray, floor: float) -> FloatArray:
    """Returns both curves in one row, raised by the same amount where their mean lies under the floor."""
    lift = np.maximum(floor - (id_accuracies + ood_accuracies) / 2, 0)
    return np.concatenate([id_accuracies + lift, ood_accuracies + lift], axis=1)


def _spline(points: FloatArray, values: FloatArray) -> RBFInterpolator:
    return RBFInterpolator(points, values, kernel="thin_plate_spline", smoothing=SMOOTHING)


def _unit(rows: Sequence[Mapping[str, Any]]) -> FloatArray:
    """Returns values as shares of their (log) range, [n, len(SPACE)]."""
    columns = []
    for name, (low, high, log) in SPACE.items():
        column = np.array([float(row[name]) for row in rows])
        columns.append(np.log(column / low) / np.log(high / low) if log else (column - low) / (high - low))
    return np.stack(columns, axis=1)
