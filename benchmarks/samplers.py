"""Every sampler on the replayed table, after 30 and after 100 trials. ``python -m benchmarks.samplers``

Searches of the product's own study over ``benchmarks.landscape`` in four values: learning rate, KL weight, weight decay
and crop scale, as far as the table covers them. A trial has the noise between seeds; what is compared is the
noise-free objective of the trial that the search calls best, with Student's 95 % interval over searches, and next to it
the difference to random search with the same seed. A search has 100 trials, of which the first 30 are what a search of
30 would have done: ``tpe`` and ``gp`` begin with 8 random trials, the populations have 10. The grid cannot be cut
short: it has a search for each number of trials, of as many points.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.landscape import FloatArray, Landscape, covered, read_landscape
from benchmarks.replay import NUM_SEEDS, mean_with_interval, search
from benchmarks.table import RECIPE, SPACE, TABLE
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import best_row

LOWEST = 0.1  # alpha that a trial may choose
LENGTHS = (30, 100)  # trials after which a search is read
SAMPLERS = {
    "random": [],
    "tpe": ["search.sampler.startup_trials=8"],
    "gp": ["search.sampler.startup_trials=8"],
    "nsga2": ["search.sampler.population_size=10"],
    "qmc": [],
}
GRIDS = {30: (5, 3, 2, 1), 100: (5, 5, 2, 2)}  # points per value, in the order of ``VALUES``
VALUES = ("learning_rate", "kl_weight", "weight_decay", "crop_scale")


def recipe_of(name: str, num_trials: int, overrides: Sequence[str]) -> Recipe:
    """Returns the recipe of a search with one of the samplers over ``VALUES``."""
    settings = [f"search.trials={num_trials}", f"search.sampler.name={name}", *overrides]
    return covered(load_recipe(RECIPE, [*settings, *_space(GRIDS[num_trials] if name == "grid" else None)]))


def _space(points: Sequence[int] | None) -> list[str]:
    """Returns the space as overrides: ranges, or a grid of so many points per value."""
    if points is None:
        ranges = {name: SPACE[name] for name in VALUES}
        return [
            f"search.space.{name}={{low: {low}, high: {high}, log: {str(log).lower()}}}"
            for name, (low, high, log) in ranges.items()
        ]
    found = []
    for name, number in zip(VALUES, points, strict=True):
        low, high, log = SPACE[name]
        shares = (np.arange(number) + 0.5) / number
        ticks = low * (high / low) ** shares if log else low + shares * (high - low)
        found.append(f"search.space.{name}={{choices: [{', '.join(f'{tick:.6g}' for tick in ticks)}]}}")
    return found


def best_after(rows: Sequence[TrialRow], num_trials: int, landscape: Landscape) -> float:
    """Returns the noise-free objective of the best of the first trials, as the search calls it."""
    best = best_row(rows[:num_trials])
    assert best is not None
    return landscape.objective(best.values, LOWEST)


def found(name: str, landscape: Landscape, num_seeds: int) -> FloatArray:
    """Returns the noise-free objectives, [searches, len(LENGTHS)]."""

    def objective_of(values: Mapping[str, Any], rng: np.random.Generator) -> float:
        return landscape.training(values, rng).objective(LOWEST)

    runs = []
    for seed in range(num_seeds):
        if name == "grid":
            rows = [search(recipe_of(name, number, []), objective_of, seed) for number in LENGTHS]
        else:
            rows = [search(recipe_of(name, max(LENGTHS), SAMPLERS[name]), objective_of, seed)] * len(LENGTHS)
        runs.append([best_after(rows[i], number, landscape) for i, number in enumerate(LENGTHS)])
    return np.array(runs)


def run(names: Sequence[str], num_seeds: int) -> None:
    """Prints a row of the table for each sampler, as it is known."""
    landscape = read_landscape(TABLE, covered(load_recipe(RECIPE, [])))
    heads = " | ".join(f"{number} trials | minus random" for number in LENGTHS)
    print(f"| sampler | {heads} | s a search |\n|---|{'---|' * (2 * len(LENGTHS) + 1)}")
    random: FloatArray | None = None
    for name in names:
        began = time.perf_counter()
        best = found(name, landscape, num_seeds)
        seconds = (time.perf_counter() - began) / num_seeds
        random = best if name == "random" else random
        cells = []
        for index in range(len(LENGTHS)):
            cells.append(mean_with_interval(best[:, index]))
            other = random is not None and name != "random"
            cells.append(mean_with_interval(best[:, index] - random[:, index]) if other else "")  # type: ignore[index]
        print(f"| `{name}` | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.samplers", description="Samplers on the replayed table."
    )
    names = [*SAMPLERS, "grid"]
    parser.add_argument("names", nargs="*", choices=[[], *names], help="samplers (all); random first compares with it")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="searches a sampler (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2")
    run(arguments.names or names, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
