"""Searches replayed on the table of real trainings, in seconds: parts of ``python -m benchmarks.samplers``

What a training gives comes from ``benchmarks.landscape``; the search spaces are cut to what the table covers. A
replayed trial adds the noise between seeds, measured on the points that the table holds with several. The search itself
is the product's own: ``study.study`` with its journal, sampler and outcomes. What
is compared is the noise-free objective of the trial that the search calls best, with Student's 95 % interval over
searches.

    alpha        TPE against random search, 30 trials; 30 trainings each with alpha from the curve, and with alpha
                 drawn like the other parameters
    divergence   every learning rate above a limit diverges; share of such trials in the second half, recorded as the
                 product does (PRUNED and a constraint) and as FAIL
    script       trainings that find as much as 16 of ``benchmarks.peers.careful``
    grids        grids of alphas of the alpha curve, on the trainings of the table themselves
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq

from benchmarks.landscape import FloatArray, Landscape, covered, mean_with_interval
from benchmarks.rows import Row
from benchmarks.table import RECIPE, SPACE, TABLE
from benchmarks.trainings import space_of
from carft_ray.errors import DivergedError
from carft_ray.evaluation.alpha_curve import choose_point
from carft_ray.evaluation.objective import ID_SET
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import FloatParameter
from carft_ray.store.attempt_files import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.rows import best_row
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import Failure, TrialRow

NUM_TRIALS = 30
NEEDED_TARGET = 0.5
DIVERGES_ABOVE = 1e-3  # learning rate; half of the space on its log scale
LARGEST_INFEASIBLE_SHARE = 0.40
DRAWN = ["search.alpha.mode=sample", "search.space.alpha={low: 0.1, high: 1.0}"]
INNER = (0.2, 0.4, 0.6, 0.8)  # of the table's alphas, those that a grid may leave out

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


def needed_row(landscape: Landscape, num_seeds: int, num_trials: int = 16, most: int = 32) -> Row:
    """Replays the product's search (profile) and the script's (alpha drawn), each from ``num_seeds`` seeds.

    What a search has found after n trainings is the noise-free objective of the one with the best noisy value. The row
    is the fewest trainings after which the mean over seeds of the product's is at least that of the script's at its
    end, relative to the script's trainings; infinite where ``most`` do not suffice.
    """
    ours = covered(load_recipe(RECIPE, [f"search.trials={most}"]))
    careful, lowest = covered(load_recipe(RECIPE, [f"search.trials={num_trials}", *DRAWN])), ours.search.alpha.lowest

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
    end = float(np.mean([found_after(by_hand(careful, objective_of, seed))[-1] for seed in range(num_seeds)]))
    reached = np.flatnonzero(means >= end)
    number = float(reached[0] + 1) if len(reached) else float("inf")
    name = (
        f"trainings to reach the script's objective after {num_trials} ({100 * end:.2f} %, {num_seeds} replayed seeds)"
    )
    return Row(f"{name} / {num_trials}", number / num_trials, NEEDED_TARGET)


def alpha(landscape: Landscape, num_seeds: int) -> bool:
    """Prints TPE against random search, and alpha from the curve against alpha drawn like the other parameters."""
    settings = {
        "random, profile": ["search.sampler.name=random"],
        "TPE, profile": [],
        "TPE, sample": DRAWN,
    }
    results = {}
    for name, overrides in settings.items():
        setting = covered(load_recipe(RECIPE, [f"search.trials={NUM_TRIALS}", *overrides]))
        results[name] = found(landscape, setting, num_seeds)
        print(f"{name}: best objective after {NUM_TRIALS} trials {mean_with_interval(results[name])} %")
    for a, b in itertools.pairwise(results):
        print(f"  {a} - {b}: {mean_with_interval(results[a] - results[b])} points")
    return True


def divergence(landscape: Landscape, num_seeds: int) -> bool:
    """Prints the share of diverged trials in the second half of searches; returns whether it is small enough."""
    recipe = covered(load_recipe(RECIPE, [f"search.trials={NUM_TRIALS}"]))
    low, high, log = SPACE["learning_rate"]
    whole = {**recipe.search.space, "learning_rate": FloatParameter(low=low, high=high, log=log)}
    wide = recipe.model_copy(update={"search": recipe.search.model_copy(update={"space": whole})})
    ours, fail = infeasible_shares(landscape, wide, num_seeds)
    reached = bool(np.mean(ours) <= LARGEST_INFEASIBLE_SHARE)
    print(
        f"{'PASS' if reached else 'FAIL'}  learning rates above {DIVERGES_ABOVE:g} diverge: their share in the second "
        f"half is {mean_with_interval(ours)} % (at most {100 * LARGEST_INFEASIBLE_SHARE:.0f}); recorded as FAIL it is "
        f"{mean_with_interval(fail)} %"
    )
    return reached


def script(landscape: Landscape, num_seeds: int) -> bool:
    """Prints how many trainings reach what a search by hand finds; returns whether they are few enough."""
    row = needed_row(landscape, num_seeds)
    print(row)
    return row.is_met


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


def grids(landscape: Landscape, num_seeds: int) -> bool:
    """Prints per grid of alphas what its choice is worth against that from all points, the mean over trainings.

    Each training of the table chooses the best point of a grid on half of the images, drawn at random in every set, and
    the other half says what it is worth; then the halves change places.
    """
    tried = [(*inner, 1.0) for count in range(len(INNER), 0, -1) for inner in itertools.combinations(INNER, count)]
    splits = [halves(np.random.default_rng(seed)) for seed in range(num_seeds)]
    worth = {grid: np.mean([judged(*split, grid) for split in splits], axis=0) for grid in tried}
    for grid, values in worth.items():
        gap = values - worth[tried[0]]
        error = float(gap.std(ddof=1)) / len(gap) ** 0.5
        print(f"{', '.join(f'{alpha:g}' for alpha in grid)}: {100 * gap.mean():+.3f} +- {100 * error:.3f} points")
    return True
