"""What the alpha curve of a training costs: ``python -m benchmarks.curve``

Trainings of the quickstart recipe with one thread, in this process, one after the other; targets of the KL term are
stored and read, as in all trainings of a search but the first. Both times are processor time:

    training    everything up to the fine-tuned weights
    curve       predictions at every alpha that the curve needs, the choice, and writing them; measured by running the
                training again, which finds its weights and makes the curve alone

``--study DIR`` (several times) replays finished studies instead, whose recipe writes the default grid out: every point
was evaluated on all images. With the default, by which some points are of a part of the images, is the same alpha
chosen?

Synthetic images.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.rows import Row
from carft_ray import console
from carft_ray.errors import CarftError
from carft_ray.evaluation.alpha import fitted_curve
from carft_ray.evaluation.curve import measure_curve
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import BoolArray, alphas, concat, read_predictions, select, sets
from carft_ray.evaluation.shared_inputs import load_shared_inputs
from carft_ray.evaluation.training import prepare, run_training
from carft_ray.layout import PREDICTIONS, RESOLVED, RESULT
from carft_ray.learning.context import RunContext
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema import DEFAULT_GRID, Recipe
from carft_ray.recipe.spaces.space import apply

RECIPE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"
ONE_THREAD = ("resources.cpus_per_worker=1", "resources.targets=stored")
# the first writes the targets and is not measured; then low, middle and high in the recipe's range of learning rates
LEARNING_RATES = (5e-4, 2e-4, 7e-4, 2.5e-3)
TARGET = 0.35
LEAST_EQUAL, MOST_LOST = 0.95, 0.001  # share of trainings; a fraction of the objective


def curve_and_training(settings: Sequence[str] = ()) -> list[tuple[float, float]]:
    """Returns the seconds of processor time of the curve and of its training, one pair per measured training.

    Args:
        settings: Overrides of the quickstart recipe.
    """
    recipe = load_recipe(RECIPE, [*ONE_THREAD, *settings])
    found = []
    with tempfile.TemporaryDirectory(prefix="carft-curve-") as folder:
        prepared = Path(folder) / "prepared"
        prepare(recipe, prepared)
        opened = load_shared_inputs(recipe)
        for learning_rate in LEARNING_RATES:
            training, out = apply(recipe, {"learning_rate": learning_rate}), Path(folder) / f"{learning_rate:g}"
            started = time.process_time()
            run_training(training, out, prepared, RunContext(), opened=opened)
            ended = time.process_time()
            (out / RESULT).unlink()
            run_training(training, out, prepared, RunContext(), opened=opened)
            curve_s = time.process_time() - ended
            found.append((curve_s, ended - started - curve_s))
    return found[1:]


def rows(settings: Sequence[str] = ()) -> list[Row]:
    """Returns the row "alpha curve / its training, quickstart": the mean of the trainings, and its range."""
    pairs = curve_and_training(settings)
    ratios = [curve_s / training_s for curve_s, training_s in pairs]
    mean = sum(curve_s for curve_s, _ in pairs) / sum(training_s for _, training_s in pairs)
    return [Row("alpha curve / its training, quickstart", mean, TARGET, True, (min(ratios), max(ratios)))]


@dataclass(frozen=True)
class Replayed:
    """One training whose curve was measured on all images, and what the default would have done.

    Attributes:
        alpha: Chosen from all images.
        other: Chosen by the default.
        lost: Objective at ``alpha`` less that at ``other``: on the fitted curve, or between measured points.
        passes: Evaluations of all images: of the whole curve, and of the default's.
    """

    alpha: float
    other: float
    lost: float
    passes: tuple[float, float]


class _NotStoredError(Exception):
    pass


def replay(recipe: Recipe, path: Path) -> Replayed:
    """Measures a curve again, in full and with the default grid, from stored predictions of all images.

    Args:
        recipe: Of the training's study.
        path: Its predictions.
    """
    table, spec = read_predictions(path), objective_spec(recipe)
    stored = {
        alpha: concat([select(table, name, alpha) for name in sets(table)]) for alpha in alphas(table, spec.id_set)
    }
    evaluated: list[int] = []

    def at(alpha: float, rows: BoolArray | None) -> pa.Table:
        if alpha not in stored:
            raise _NotStoredError(alpha)
        found = stored[alpha] if rows is None else stored[alpha].filter(pa.array(rows))
        evaluated.append(len(found))
        return found

    def with_grid(grid: tuple[float, ...] | None) -> Recipe:
        alpha = recipe.search.alpha.model_copy(update={"grid": grid})
        return recipe.model_copy(update={"search": recipe.search.model_copy(update={"alpha": alpha})})

    start = stored[0.0]
    curve, choice, chosen_from = measure_curve(with_grid(DEFAULT_GRID), spec, (), start, at)
    objectives = [point["objective"] for point in curve.points(spec, ()) if point["alpha"] in chosen_from]
    whole = sum(evaluated)
    evaluated.clear()
    try:
        other = measure_curve(with_grid(None), spec, (), start, at)[1].alpha
    except _NotStoredError as error:
        (other,) = error.args
        evaluated.append(len(start))
    both = [choice.alpha, other]
    if choice.fitted:
        best, found = fitted_curve(chosen_from, objectives, both)
    else:
        best, found = np.interp(both, chosen_from, objectives)
    passes = whole / len(start), sum(evaluated) / len(start)
    return Replayed(choice.alpha, other, float(best - found), passes)


def agreement(studies: Iterable[Path]) -> list[Replayed]:
    """Replays every finished training of some studies that chose alpha from a curve."""
    found = []
    for study in studies:
        recipe = load_recipe(study / RESOLVED)
        for path in sorted(study.glob(f"*/*/{PREDICTIONS}")):
            found.append(replay(recipe, path))
    return found


def report(found: Sequence[Replayed]) -> bool:
    """Prints what a replay shows; returns whether the thresholds are met."""
    equal = np.mean([abs(each.alpha - each.other) < 1e-9 for each in found])
    lost, passes = max(each.lost for each in found), np.mean([each.passes for each in found], axis=0)
    is_met = bool(equal >= LEAST_EQUAL and lost <= MOST_LOST)
    print(
        f"{'PASS' if is_met else 'FAIL'}  {len(found)} trainings: the same alpha in {100 * equal:.1f} % (at least "
        f"{100 * LEAST_EQUAL:g} %), at most {100 * max(lost, 0):.2f} points lost (at most {100 * MOST_LOST:g}); "
        f"{passes[0]:.2f} evaluations of all images in full, {passes[1]:.2f} by the default"
    )
    return is_met


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed target, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve", description="What the alpha curve costs.")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe, KEY=VALUE")
    parser.add_argument("--study", type=Path, action="append", default=[], help="replay this study instead")
    arguments = parser.parse_args(argv)
    try:
        if arguments.study:
            return 0 if report(agreement(arguments.study)) else 1
        found = rows(arguments.set)
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    print(f"{platform.processor() or platform.machine()}, one thread")
    print(*found, sep="\n")
    return 0 if all(row.is_met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
