"""Measuring the alpha curve of one training: which alphas are evaluated, on which images, and what is chosen.

With the default grid, alphas 0, 0.4, 1 and the chosen one are evaluated on all images. The other points are *partial*:
only images that are not settled between the two neighbours among 0, 0.4 and 1 are evaluated there; all others keep the
row of predictions of the nearer neighbour. An image is settled where both neighbours give it the same class and its
margin (largest logit less the second) is at neither among the smallest fifth of its set. So where answers change much
nearly all images are evaluated, and where they change little about a quarter.

A point that is chosen is evaluated in full, takes part in the choice again with what was measured, and shows by how
much the partial one was wrong. By more than half a paired standard error of neighbouring points: the whole curve is
evaluated in full. So it is from the start with a grid that the recipe writes out, with constraints, in a Pareto search.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from carft_ray.errors import DivergedError, Problem
from carft_ray.evaluation.alpha import AlphaChoice, AlphaProfile, alpha_profile, between, neighbour_se, stepped_back
from carft_ray.evaluation.constraints import Limit, violations_at
from carft_ray.evaluation.evaluate import metrics_at
from carft_ray.evaluation.metrics import is_above_chance
from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray, accuracy, concat, margins, select, set_codes, with_rows
from carft_ray.recipe.constraints import constraint_names
from carft_ray.recipe.schema import Recipe

IN_FULL = (0.0, 0.4, 1.0)
UNSURE = 0.2  # share of the images of a set, those with the smallest margin, that are never settled
MAX_MISSED = 0.5  # of a partial point, in paired standard errors of neighbouring points

# gives the predictions at an alpha, of all images or of those rows that are True
At = Callable[[float, BoolArray | None], pa.Table]


@dataclass(frozen=True, eq=False)
class Curve:
    """The points of an alpha curve.

    Attributes:
        at: Evaluates.
        tables: Predictions at every point, of all images; alpha 0 is there from the start.
        partial: Which images were evaluated, of the partial points alone.
    """

    at: At
    tables: dict[float, pa.Table]
    partial: dict[float, BoolArray] = field(default_factory=dict)

    def measure(self, alpha: float) -> None:
        """Evaluates all images at an alpha; of a partial point those that it has not."""
        if (evaluated := self.partial.pop(alpha, None)) is None:
            self.tables[alpha] = self.at(alpha, None)
        else:
            self.tables[alpha] = with_rows(self.tables[alpha], alpha, ~evaluated, self.at(alpha, ~evaluated))

    def measure_part(self, alpha: float) -> None:
        """Evaluates the images that are not settled at an alpha; its neighbours in full must be there."""
        nearer, rows = self._carried(alpha)
        if rows.all():
            self.measure(alpha)
        else:
            self.tables[alpha] = with_rows(nearer, alpha, rows, self.at(alpha, rows))
            self.partial[alpha] = rows

    def missed(self, alpha: float, spec: ObjectiveSpec) -> float:
        """Returns by how much the objective of a partial point differs from that of all images, which are there."""
        (nearer, rows), table = self._carried(alpha), self.tables[alpha]
        part = with_rows(nearer, alpha, rows, table.filter(pa.array(rows)))
        return abs(metrics_at(part, spec, alpha)["objective"] - metrics_at(table, spec, alpha)["objective"])

    def profile(
        self, alphas: Sequence[float], spec: ObjectiveSpec, lowest: float, bounds: Sequence[Limit]
    ) -> AlphaProfile:
        """Returns the profile of some of the points."""
        return alpha_profile(concat([self.tables[alpha] for alpha in alphas]), spec, lowest, bounds)

    def points(self, spec: ObjectiveSpec, bounds: Sequence[Limit]) -> list[dict[str, float]]:
        """Returns metrics and violations of every point, and of a partial one the share that was ``evaluated``."""
        return [
            {"alpha": alpha, **metrics_at(table, spec, alpha), **violations_at(table, bounds, alpha)}
            | ({"evaluated": float(self.partial[alpha].mean())} if alpha in self.partial else {})
            for alpha, table in sorted(self.tables.items())
        ]

    def table(self) -> pa.Table:
        """Returns the predictions of all points."""
        return concat([table for _, table in sorted(self.tables.items())])

    def _carried(self, alpha: float) -> tuple[pa.Table, BoolArray]:
        """Returns the predictions at the nearer neighbour in full, and which rows of them are not settled."""
        low, high = next(pair for pair in itertools.pairwise(IN_FULL) if pair[0] < alpha < pair[1])
        rows = unsettled(self.tables[low], self.tables[high])
        return self.tables[low if alpha - low < high - alpha else high], rows


def unsettled(one: pa.Table, other: pa.Table) -> BoolArray:
    """Returns which images may have another answer between two alphas, in the order of the rows.

    Args:
        one: Predictions of all sets at one alpha.
        other: Of the same images in the same order at the other one.
    """
    margins_N, codes_N = np.minimum(margins(one), margins(other)), set_codes(one)
    found: BoolArray = one["prediction"].to_numpy() != other["prediction"].to_numpy()
    for code in np.unique(codes_N):
        mine = codes_N == code
        found[mine] |= margins_N[mine] <= np.quantile(margins_N[mine], UNSURE)
    return found


def measure_curve(
    recipe: Recipe, spec: ObjectiveSpec, bounds: Sequence[Limit], start: pa.Table, at: At
) -> tuple[Curve, AlphaChoice, list[float]]:
    """Evaluates the alphas that are wanted; returns the curve, the chosen alpha, and the alphas it was chosen from.

    A fixed ``train.alpha`` (or one that the search drew) is taken as it is; otherwise the grid with ``lowest`` is
    evaluated, then the alphas that ``between`` asks for, and the fitted curve decides. A Pareto search evaluates fixed
    alpha and grid: every point may be on its front. A chosen alpha between the points is evaluated, too.

    Args:
        recipe: ``recipe.train`` holds the values of this training.
        spec: The objective.
        bounds: The constraints.
        start: Predictions at alpha 0.
        at: Evaluates.
    """
    search, curve = recipe.search, Curve(at, {0.0: start})
    fixed, lowest, is_pareto = recipe.train.alpha, search.alpha.lowest, search.objective.kind == "pareto"
    if fixed is not None:
        for alpha in sorted({fixed, *(search.alpha.measured if is_pareto else (1.0,))} - {0.0}):
            curve.measure(alpha)
        value = metrics_at(curve.tables[fixed], spec, fixed)["objective"]
        return curve, AlphaChoice(fixed, value, False, "alpha is fixed"), [fixed]
    in_part = search.alpha.grid is None and not (is_pareto or constraint_names(search.constraints))
    alphas = list(search.alpha.measured)
    for alpha in sorted({*alphas} - {0.0}, key=lambda alpha: (in_part and alpha not in IN_FULL, alpha)):
        (curve.measure_part if in_part and alpha not in IN_FULL else curve.measure)(alpha)
    profile = curve.profile(alphas, spec, lowest, bounds)
    if further := between(profile, lowest):
        alphas = sorted([*alphas, *further])
        for alpha in further:
            (curve.measure_part if in_part else curve.measure)(alpha)
        profile = curve.profile(alphas, spec, lowest, bounds)
    while (alpha := profile.choice.alpha) not in curve.tables or alpha in curve.partial:
        curve.measure(alpha)
        if in_part and curve.missed(alpha, spec) > MAX_MISSED * neighbour_se(profile.noise_AA[None])[0]:
            for partial in list(curve.partial):
                curve.measure(partial)
        profile = curve.profile(alphas, spec, lowest, bounds)
    choice = profile.choice
    if choice.alpha not in profile.alphas:
        choice = stepped_back(profile, violations_at(curve.tables[choice.alpha], bounds, choice.alpha), lowest)
    return curve, choice, list(profile.alphas)


def alphas_at_chance(tables: Mapping[float, pa.Table], id_set: str) -> list[float]:
    """Returns the alphas above 0 whose answers to the ID images are at chance; none where those of zero-shot are, too.

    Args:
        tables: Predictions at every point measured, alpha 0 among them.
        id_set: Name of the ID set.

    Raises:
        DivergedError: All alphas above 0 are.
    """
    found = {alpha: select(table, id_set, alpha) for alpha, table in sorted(tables.items())}
    above = {alpha: not is_at_chance(table) for alpha, table in found.items()}
    if not above.pop(0.0):
        return []
    if not any(above.values()):
        highest, number = max(accuracy(table) for alpha, table in found.items() if alpha > 0), len(found[0.0])
        rule, step = "ID accuracy must be above chance", "The training has diverged; try a lower learning_rate."
        value = f"at most {100 * highest:.1f} % of {number:,} images right, as with the same answers in any other order"
        raise DivergedError(Problem("alpha curve", rule, value, next_step=step))
    return [alpha for alpha, is_above in above.items() if not is_above]


def is_at_chance(table: pa.Table) -> bool:
    """Tells whether the answers to the images of one set, at one alpha, do not depend on the image."""
    return not is_above_chance(table["label"].to_numpy(), table["prediction"].to_numpy())
