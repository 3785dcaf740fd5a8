"""What the alpha curve of a training costs, and what its grid loses: ``python -m benchmarks.curve``

Trainings of the quickstart recipe with one thread, in this process, one after the other; targets of the KL term are
stored and read, as in all trainings of a search but the first. Both times are processor time:

    training    everything up to the fine-tuned weights
    curve       predictions at every alpha that the curve needs, the choice, and writing them; measured by running the
                training again, which finds its weights and makes the curve alone

``--grids`` replays ``benchmarks/table.parquet`` instead: each training chooses the best point of a grid on half of the
images, drawn at random in every set, and the other half says what it is worth; then the halves change places.

Synthetic images.
"""

import argparse
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.rows import Row
from benchmarks.table import TABLE
from carft_ray.errors import CarftError
from carft_ray.evaluation.alpha import choose_point
from carft_ray.evaluation.objective import ID_SET
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.trial_values import apply
from carft_ray.training.run import prepare, run_training
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import load_shared_inputs
from carft_ray.ui import console

RECIPE = Path(__file__).resolve().parents[1] / "search_spaces" / "quickstart.yaml"
ONE_THREAD = ("resources.cpus_per_worker=1", "resources.targets=stored")
# the first writes the targets and is not measured; then low, middle and high in the recipe's range of learning rates
LEARNING_RATES = (5e-4, 2e-4, 7e-4, 2.5e-3)
TARGET = 0.35
NUM_SPLITS = 20
INNER = (0.2, 0.4, 0.6, 0.8)  # of the table's alphas, those that a grid may leave out

FloatArray = npt.NDArray[np.float64]


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
            run_training(training, out, prepared, RunContext(), 2, opened=opened)  # from the weights of the first
            curve_s = time.process_time() - ended
            found.append((curve_s, ended - started - curve_s))
    return found[1:]


def rows(settings: Sequence[str] = ()) -> list[Row]:
    """Returns the row "alpha curve / its training, quickstart": the mean of the trainings, and its range."""
    pairs = curve_and_training(settings)
    ratios = [curve_s / training_s for curve_s, training_s in pairs]
    mean = sum(curve_s for curve_s, _ in pairs) / sum(training_s for _, training_s in pairs)
    return [Row("alpha curve / its training, quickstart", mean, TARGET, True, (min(ratios), max(ratios)))]


def read_table() -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the trainings of the table that have a curve, and the number of images by set."""
    table = pq.read_table(TABLE)
    return [row for row in table.to_pylist() if not row["diverged"]], json.loads(table.schema.metadata[b"sets"])


def halves(rng: np.random.Generator) -> tuple[tuple[float, ...], FloatArray]:
    """Returns the alphas that all trainings of the table share, and their objectives on two halves of the images.

    Returns:
        A alphas above 0; objectives (equal weights of ID and OOD mean), [2, trainings, A].
    """
    trainings, sizes = read_table()
    curves = [{round(point["alpha"], 9): point["correct"] for point in row["curve"]} for row in trainings]
    alphas = tuple(sorted(set.intersection(*map(set, curves)) - {0.0}))
    bits_RAn = np.stack([[np.unpackbits(np.frombuffer(curve[a], np.uint8)) for a in alphas] for curve in curves])
    found: FloatArray = np.zeros((2, *bits_RAn.shape[:2]))
    start = 0
    for name, size in sizes.items():
        order, weight = start + rng.permutation(size), 0.5 if name == ID_SET else 0.5 / (len(sizes) - 1)
        for half, part in enumerate(np.array_split(order, 2)):
            found[half] += weight * bits_RAn[:, :, part].mean(axis=2)
        start += size
    return alphas, found


def judged(alphas: Sequence[float], objectives_2RA: FloatArray, grid: Sequence[float]) -> FloatArray:
    """Returns per training what the choice from a grid is worth on the half that did not choose, the mean of both."""
    taken = [alphas.index(alpha) for alpha in grid]
    worth: FloatArray = np.zeros(objectives_2RA.shape[1])
    for chosen_RA, judge_RA in itertools.permutations(objectives_2RA, 2):
        for index, values in enumerate(chosen_RA):
            points = [{"alpha": alphas[i], "objective": float(values[i])} for i in taken]
            worth[index] += judge_RA[index, alphas.index(choose_point(points, grid[0])["alpha"])] / 2
    return worth


def print_grids() -> None:
    """Prints per grid what its choice is worth against that from all points, the mean over trainings."""
    grids = [(*inner, 1.0) for count in range(len(INNER), 0, -1) for inner in itertools.combinations(INNER, count)]
    splits = [halves(np.random.default_rng(seed)) for seed in range(NUM_SPLITS)]
    worth = {grid: np.mean([judged(*split, grid) for split in splits], axis=0) for grid in grids}
    for grid, values in worth.items():
        gap = values - worth[grids[0]]
        error = float(gap.std(ddof=1)) / len(gap) ** 0.5
        print(f"{', '.join(f'{alpha:g}' for alpha in grid)}: {100 * gap.mean():+.3f} +- {100 * error:.3f} points")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed target, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve", description="What the alpha curve costs.")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe, KEY=VALUE")
    parser.add_argument("--grids", action="store_true", help="replay the table of trainings with other grids instead")
    arguments = parser.parse_args(argv)
    if arguments.grids:
        print_grids()
        return 0
    try:
        found = rows(arguments.set)
    except CarftError as error:
        console.show_error(error)
        return error.exit_code
    print(f"{platform.processor() or platform.machine()}, one thread")
    print(*found, sep="\n")
    return 0 if all(row.is_met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
