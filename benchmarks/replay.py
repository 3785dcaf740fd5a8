"""Searches replayed on the table of real trainings, in seconds. ``python -m benchmarks.replay``

What a training gives comes from ``benchmarks.landscape``; the search spaces are cut to what the table covers. A
replayed trial adds the noise between seeds, measured on the points that the table holds with several. The search itself
is the product's own: ``study.study`` with its journal, sampler and outcomes. Every comparison uses ``NUM_SEEDS``
searches a side; what is compared is the noise-free objective of the trial that the search calls best, with Student's
95 % interval over searches.

    TPE against random          30 trials
    profile against sample      30 trainings each: alpha from the curve, or drawn like the other parameters
    divergence                  every learning rate above a limit diverges; share of such trials in the second half,
                                recorded as the product does (PRUNED and a constraint) and as FAIL
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scipy import stats

from benchmarks.effect import space_of
from benchmarks.landscape import FOLDS, FloatArray, Landscape, covered, read_landscape
from benchmarks.rows import Row
from benchmarks.table import RECIPE, SPACE, TABLE
from carft_ray.errors import CarftError, DivergedError
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.parameters import FloatParameter
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.result import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure, TrialRow
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row
from carft_ray.ui import console

NUM_SEEDS = 20
NUM_TRIALS = 30
NEEDED_TARGET = 0.5
DIVERGES_ABOVE = 1e-3  # learning rate; half of the space on its log scale
LARGEST_INFEASIBLE_SHARE = 0.40

# objective of a training; None: diverged
ObjectiveOf = Callable[[Mapping[str, Any], np.random.Generator], float | None]


def search(recipe: Recipe, objective_of: ObjectiveOf, seed: int) -> list[TrialRow]:
    """Runs one search of the product's study over replayed trainings, one after the other."""
    sampler = recipe.search.sampler.model_copy(update={"seed": seed})
    part = recipe.search.model_copy(update={"sampler": sampler, "baselines": {}})
    recipe = recipe.model_copy(update={"search": part})
    rng = np.random.default_rng(seed)
    with (
        tempfile.TemporaryDirectory(prefix="carft-replay-") as folder,
        open_study(Path(folder) / "study", recipe) as study,
    ):
        recover_running(study)
        while (spec := study.next()) is not None:
            home = spec.folder(study.study_dir)
            home.mkdir(parents=True, exist_ok=True)
            objective, failure = objective_of(spec.values, rng), None
            if objective is None:
                error = DivergedError("replayed divergence")
                failure = Failure("diverged", str(error), spec.attempt, error.exit_code)
            else:
                write_result(spec.place(study.study_dir), {"objective": objective, "metrics": {}})
            study.settle(spec, failure)
        return study.rows()


def searched_with_fail(recipe: Recipe, objective_of: ObjectiveOf, seed: int) -> list[dict[str, Any]]:
    """Runs the same search in plain Optuna, which records a divergence as FAIL; returns the values of the trials."""
    rng, space = np.random.default_rng(seed), space_of(recipe)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, recipe.search.trials // 4))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(recipe.search.trials):
        trial = study.ask()
        values = {name: trial.suggest_float(name, p.low, p.high, log=p.log) for name, p in space.items()}
        objective = objective_of(values, rng)
        if objective is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, objective)
    return [dict(trial.params) for trial in study.get_trials(deepcopy=False)]


def found(landscape: Landscape, recipe: Recipe, num_seeds: int) -> FloatArray:
    """Returns per search the noise-free objective of its best trial."""
    lowest = recipe.search.alpha.lowest

    def objective_of(values: Mapping[str, Any], rng: np.random.Generator) -> float:
        return landscape.objective(values, lowest) + float(rng.normal(0, landscape.seed_sd))

    best = [best_row(search(recipe, objective_of, seed)) for seed in range(num_seeds)]
    return np.array([landscape.objective(row.values, lowest) for row in best if row is not None])


def infeasible_shares(landscape: Landscape, recipe: Recipe, num_seeds: int) -> tuple[FloatArray, FloatArray]:
    """Returns per search the share of diverged trials in its second half: as the product records them, and as FAIL."""

    def objective_of(values: Mapping[str, Any], rng: np.random.Generator) -> float | None:
        noise = float(rng.normal(0, landscape.seed_sd))
        diverges = values["learning_rate"] > DIVERGES_ABOVE
        return None if diverges else landscape.objective(values, recipe.search.alpha.lowest) + noise

    def share(values: Sequence[Mapping[str, Any]]) -> float:
        half = values[len(values) // 2 :]
        return sum(float(v["learning_rate"]) > DIVERGES_ABOVE for v in half) / len(half)

    ours = [share([row.values for row in search(recipe, objective_of, seed)]) for seed in range(num_seeds)]
    fail = [share(searched_with_fail(recipe, objective_of, seed)) for seed in range(num_seeds)]
    return np.array(ours), np.array(fail)


def by_hand(recipe: Recipe, objective_of: ObjectiveOf, seed: int) -> list[tuple[dict[str, Any], float]]:
    """Runs the search of ``peers.careful``: Optuna's TPE as Ray's ``OptunaSearch`` makes it, alpha drawn."""
    rng, space = np.random.default_rng(seed), space_of(recipe)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    found = []
    for _ in range(recipe.search.trials):
        trial = study.ask()
        values = {name: trial.suggest_float(name, p.low, p.high, log=p.log) for name, p in space.items()}
        objective = objective_of(values, rng)
        assert objective is not None
        study.tell(trial, objective)
        found.append((values, objective))
    return found


def needed_row(table: Path = TABLE, num_seeds: int = NUM_SEEDS, num_trials: int = 16, most: int = 32) -> Row:
    """Replays the product's search (profile) and the script's (alpha drawn), each from ``num_seeds`` seeds.

    What a search has found after n trainings is the noise-free objective of the one with the best noisy value. The row
    is the fewest trainings after which the mean over seeds of the product's is at least that of the script's at its
    end, relative to the script's trainings; infinite where ``most`` do not suffice.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ours = covered(load_recipe(RECIPE, [f"search.trials={most}"]))
    drawn = ["search.alpha.mode=sample", "search.space.alpha={low: 0.1, high: 1.0}"]
    script = covered(load_recipe(RECIPE, [f"search.trials={num_trials}", *drawn]))
    landscape, lowest = read_landscape(table, ours), ours.search.alpha.lowest

    def objective_of(values: Mapping[str, Any], rng: np.random.Generator) -> float:
        return landscape.objective(values, lowest) + float(rng.normal(0, landscape.seed_sd))

    def found_after(trials: Sequence[tuple[Mapping[str, Any], float]]) -> FloatArray:
        noisy = np.array([objective for _, objective in trials])
        best = [int(noisy[: n + 1].argmax()) for n in range(len(noisy))]
        return np.array([landscape.objective(trials[index][0], lowest) for index in best])

    by_product = [
        [(row.values, row.objective) for row in search(ours, objective_of, seed) if row.objective is not None]
        for seed in range(num_seeds)
    ]
    means = np.mean([found_after(trials) for trials in by_product], axis=0)
    end = float(np.mean([found_after(by_hand(script, objective_of, seed))[-1] for seed in range(num_seeds)]))
    reached = np.flatnonzero(means >= end)
    number = float(reached[0] + 1) if len(reached) else float("inf")
    name = (
        f"trainings to reach the script's objective after {num_trials} ({100 * end:.2f} %, {num_seeds} replayed seeds)"
    )
    return Row(f"{name} / {num_trials}", number / num_trials, NEEDED_TARGET)


def mean_with_interval(values: FloatArray) -> str:
    """Returns the mean in percent, with Student's 95 % interval over searches."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return f"{100 * mean:.2f} [{100 * (mean - half):.2f}, {100 * (mean + half):.2f}]"


def run(table: Path, num_seeds: int, num_trials: int) -> bool:
    """Prints all comparisons; returns whether the one with a threshold reaches it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recipe = covered(load_recipe(RECIPE, [f"search.trials={num_trials}"]))
    landscape = read_landscape(table, recipe)
    print(
        f"Spline over {table.name}: {landscape.num_collapsed} trainings collapsed; of the others rank correlation "
        f"{landscape.cv_correlation:.2f} and error {100 * landscape.cv_error:.2f} points in {FOLDS}-fold "
        f"cross-validation; between seeds {100 * landscape.seed_sd:.2f} points. Synthetic images."
    )
    low, high, log = SPACE["learning_rate"]
    whole = {**recipe.search.space, "learning_rate": FloatParameter(low=low, high=high, log=log)}
    settings = {
        "TPE, profile": [],
        "random, profile": ["search.sampler.name=random"],
        "TPE, sample": ["search.alpha.mode=sample", "search.space.alpha={low: 0.1, high: 1.0}"],
    }
    results = {}
    for name, overrides in settings.items():
        setting = covered(load_recipe(RECIPE, [f"search.trials={num_trials}", *overrides]))
        results[name] = found(landscape, setting, num_seeds)
        print(f"{name}: best objective after {num_trials} trials {mean_with_interval(results[name])} %")
    for a, b in itertools.pairwise(("random, profile", "TPE, profile", "TPE, sample")):
        print(f"  {a} - {b}: {mean_with_interval(results[a] - results[b])} points")
    wide = recipe.model_copy(update={"search": recipe.search.model_copy(update={"space": whole})})
    ours, fail = infeasible_shares(landscape, wide, num_seeds)
    reached = bool(np.mean(ours) <= LARGEST_INFEASIBLE_SHARE)
    print(
        f"{'PASS' if reached else 'FAIL'}  learning rates above {DIVERGES_ABOVE:g} diverge: their share in the second "
        f"half is {mean_with_interval(ours)} % (at most {100 * LARGEST_INFEASIBLE_SHARE:.0f}); recorded as FAIL it is "
        f"{mean_with_interval(fail)} %"
    )
    return reached


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description="Searches replayed on the table.")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table (%(default)s)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="searches a side (%(default)s)")
    parser.add_argument("--trials", type=int, default=NUM_TRIALS, help="trials of a search (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.trials) < 2:
        parser.error("--seeds and --trials must be at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a missed threshold, or that of the error."""
    arguments = _arguments(argv)
    try:
        return 0 if run(arguments.table.resolve(), arguments.seeds, arguments.trials) else 1
    except CarftError as error:
        console.show_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
