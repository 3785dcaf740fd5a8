"""What the alpha curve of a training costs: ``python -m benchmarks.curve``

Trainings of the quickstart recipe with one thread, in this process, one after the other; targets of the KL term are
stored and read, as in all trainings of a search but the first. Both times are processor time:

    training    everything up to the fine-tuned weights
    curve       predictions at every alpha that the curve needs, the choice, and writing them; measured by running the
                training again, which finds its weights and makes the curve alone

Synthetic images.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row
from carft_ray.errors import CarftError
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed target, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve", description="What the alpha curve costs.")
    parser.add_argument("--set", action="append", default=[], help="override of the recipe, KEY=VALUE")
    arguments = parser.parse_args(argv)
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
