"""Searches replayed on a table of 200 real trainings of the sandbox: ``python -m benchmarks.samplers [PART ...]``

What a training gives is read off the table (``benchmarks.landscape``); the searches are the product's own. About half
an hour in all, most of it the sampler ``gp``. ``--make`` trains the table anew (about 50 minutes); a run that was
killed goes on with the same command. Synthetic images. The parts are explained in ``benchmarks.searches`` and
``benchmarks.replay``; exit code 1 when one with a threshold misses it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna

from benchmarks import replay, searches, table
from benchmarks.landscape import FOLDS, Landscape, covered, read_landscape
from carft_ray.errors import CarftError
from carft_ray.recipe.loading import load_recipe
from carft_ray.ui import console

NUM_SEEDS = 20
PARTS: dict[str, Callable[[Landscape, int], bool]] = {
    "samplers": searches.samplers,
    "alpha": replay.alpha,
    "divergence": replay.divergence,
    "script": replay.script,
    "grids": replay.grids,
    "pruners": searches.pruners,
    "pareto": searches.pareto,
    "constraints": searches.constraints,
    "warm_start": searches.warm_start,
}


def run(names: Sequence[str], num_seeds: int) -> bool:
    """Prints the parts; returns whether those with a threshold reach it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    landscape = read_landscape(table.TABLE, covered(load_recipe(table.RECIPE)))
    print(
        f"Spline over {table.TABLE.name}: {landscape.num_collapsed} trainings collapsed; of the others rank "
        f"correlation {landscape.cv_correlation:.2f} and error {100 * landscape.cv_error:.2f} points in {FOLDS}-fold "
        f"cross-validation; between seeds {100 * landscape.seed_sd:.2f} points. Synthetic images."
    )
    reached = True
    for name in names:
        print(f"\n{name}", flush=True)
        reached &= PARTS[name](landscape, num_seeds)
    return reached


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed threshold, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description="Searches replayed on a table.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="searches a side (%(default)s)")
    parser.add_argument("--make", nargs="?", type=Path, const=table.OUT, metavar="DIR", help="trains the table anew")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2")
    try:
        if arguments.make:
            table.make(arguments.make.resolve())
            return 0
        return 0 if run(arguments.parts or list(PARTS), arguments.seeds) else 1
    except CarftError as error:
        console.show_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
