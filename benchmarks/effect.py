"""Does the sandbox show the effect of CAR-FT, and has a search something to find there? ``python -m benchmarks.effect``

The acceptance of the weights that ship, with thresholds fixed beforehand (``acceptance.THRESHOLDS``). Trainings by the
product's own code, recipe ``search_spaces/quickstart.yaml``:

    pairs    learning rate 5e-4, alpha 1, KL weight 0 and 10, seeds 1..5: the effect, read on the test sets
    plain    KL weight 0 at five learning rates over the search space, alpha profile
    random   30 random points of the search space, alpha profile
    repeats  the first four of them with three more seeds: the noise between seeds
    confirm  the best plain and the best of the first five random points (equal budgets, chosen by validation), each at
             its own alpha, with five fresh seeds, read on the test sets

It prints every threshold with PASS or FAIL, and the comparison of the tuned methods whichever way it comes out; exit
code 1 when a threshold is missed. All numbers go to ``effect.json``, its figure to
``docs/effect.png`` and ``.svg``. Finished trainings are kept and not run again: a killed benchmark continues with the
same command. They belong to one set of weights and one recipe; after a change of the training code, remove the folder.

``--pretrain DIR`` makes the packaged weights anew (``benchmarks/pretrain.py``). Like ``carft-ray test``, and unlike
every search and training, this benchmark **reads the test sets**. For any other recipe: ``benchmarks/methods.py``.
"""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import acceptance, pretrain
from benchmarks.effect_figure import Estimate, effect_figure
from benchmarks.methods import cell, table
from benchmarks.trainings import ID_TEST, Bench, Clock, Finished, Planned, open_bench, run_all, space_of
from carft_ray import environment, files
from carft_ray.errors import CarftError, Problem
from carft_ray.evaluation.objective import ID_SET, objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions
from carft_ray.recipe.loading import load_recipe, recipe_hash
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import DEFAULT_GRID
from carft_ray.results.evidence import in_points
from carft_ray.results.statistics.intervals import (
    OVER_SEEDS_AND_IMAGES,
    Interval,
    objective_difference,
    paired_differences,
)
from carft_ray.ui import console

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "search_spaces" / "quickstart.yaml"
OUT = ROOT / "benchmarks" / "results" / "effect"
DOCS = ROOT / "docs"

LEARNING_RATE, KL_WEIGHT = 5e-4, 10.0
PAIR_SEEDS = (1, 2, 3, 4, 5)
REPEAT_SEEDS = (1, 2, 3)
CONFIRM_SEEDS = (11, 12, 13, 14, 15)
NUM_PLAIN, NUM_RANDOM, NUM_REPEATED = 5, 30, 4
SPACE_SEED = 2  # of the random points
COLUMNS = ("ID", "OOD mean")  # of the table of accuracies
MAY_DIVERGE = ("random", "rates", "repeats")  # as trials of a search may

Group = dict[str, list[Finished]]
Correct = dict[str, BoolArray]  # per set [r, n]
Accuracies = dict[str, dict[str, Interval]]  # by method and column


def first_plan(recipe: Recipe) -> dict[str, list[Planned]]:
    """Returns all trainings that are known beforehand, by heading."""
    grid, space = tuple(alpha for alpha in DEFAULT_GRID if alpha > 0), space_of(recipe)
    rates = space["learning_rate"]
    plain = [float(f"{rate:.3g}") for rate in np.geomspace(rates.low, rates.high, NUM_PLAIN)]
    points = acceptance.random_points(space, NUM_RANDOM, SPACE_SEED)
    pairs = {
        name: [
            Planned(
                f"{name}, seed {seed}",
                {"learning_rate": LEARNING_RATE, "kl_weight": kl_weight, "alpha": 1.0, "seed": seed},
                (1.0,),
            )
            for seed in PAIR_SEEDS
        ]
        for name, kl_weight in (("plain", 0.0), ("CAR-FT", KL_WEIGHT))
    }
    return {
        "random": [Planned(f"random point {i}", point, grid) for i, point in enumerate(points)],
        "rates": [
            Planned(f"plain, learning rate {rate:g}", {"learning_rate": rate, "kl_weight": 0.0}, grid) for rate in plain
        ],
        "repeats": [
            Planned(f"random point {i}, seed {seed}", {**points[i], "seed": seed})
            for i in range(NUM_REPEATED)
            for seed in REPEAT_SEEDS
        ],
        **pairs,
    }


def confirm_plan(group: Group, budget: Sequence[Planned]) -> dict[str, list[Planned]]:
    """Returns the trainings with fresh seeds of each method's best by validation.

    Args:
        group: Finished trainings; the best plain one is chosen among ``rates``.
        budget: The random points among which the best of CAR-FT is chosen, as many.
    """
    tried = {
        "plain": group["rates"],
        "CAR-FT": [training for training in group["random"] if training.planned in budget],
    }
    plans = {}
    for name, trainings in tried.items():
        best = max(trainings, key=lambda training: float(training.result["objective"]))
        values = {**best.planned.values, "alpha": best.result["alpha"]}
        plans[f"tuned {name}"] = [
            Planned(f"tuned {name}, seed {seed}", {**values, "seed": seed}, (values["alpha"],))
            for seed in CONFIRM_SEEDS
        ]
    return plans


def run_groups(bench: Bench, plans: Mapping[str, Sequence[Planned]], processes: int, clock: Clock) -> Group:
    """Runs planned trainings and returns them under the same headings; what diverged is named and left out.

    Raises:
        CarftError: One that cannot be left out has diverged, or as ``run_all``.
    """
    finished = iter(run_all(bench, [planned for group in plans.values() for planned in group], processes, clock))
    group = {name: [next(finished) for _ in part] for name, part in plans.items()}
    diverged = {name: [f.planned.name for f in part if f.diverged] for name, part in group.items()}
    for name, lost in diverged.items():
        if lost and name not in MAY_DIVERGE:
            raise CarftError([Problem(training, "must not diverge") for training in lost])
        for training in lost:
            print(f"{training}: diverged, left out")
    return {name: [training for training in part if not training.diverged] for name, part in group.items()}


def test_correct(trainings: Sequence[Finished], test_sets: Sequence[str]) -> Correct:
    """Returns per test set which images are classified right, bool [trainings, n], each at its only test alpha."""
    tables = [(training.test, training.planned.test_alphas[0]) for training in trainings]
    return {name: correct_matrix(tables, name) for name in test_sets}


def weights(id_weight: float, sets: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each set in the weighted mean of the ID set, the first, and the OOD sets."""
    return {sets[0]: id_weight, **dict.fromkeys(sets[1:], (1 - id_weight) / (len(sets) - 1))}


def roles(trainings: Sequence[Finished], recipe: Recipe) -> dict[str, float]:
    """Returns the numbers of point 5 over trainings x alpha grid."""
    validation_sets, test_sets = (ID_SET, *recipe.data.ood_val), (ID_TEST, *recipe.data.ood_test)
    candidates = [(training, alpha) for training in trainings for alpha in training.planned.test_alphas]

    def rows(tables: Sequence[tuple[pa.Table, float]], sets: Sequence[str]) -> Correct:
        return {name: correct_matrix(tables, name) for name in sets}

    return acceptance.role_numbers(
        rows([(training.validation, alpha) for training, alpha in candidates], validation_sets),
        rows([(training.test, alpha) for training, alpha in candidates], test_sets),
        weights(recipe.search.objective.id_weight, validation_sets),
        weights(recipe.search.objective.id_weight, test_sets),
    )


def measure(group: Group, zero_shot: Correct, recipe: Recipe) -> tuple[dict[str, float], dict[str, Interval]]:
    """Returns all numbers of the thresholds, and the intervals behind them and of the tuned comparison."""
    test_sets = tuple(zero_shot)
    plain, car_ft = (test_correct(group[name], test_sets) for name in ("plain", "CAR-FT"))
    intervals = acceptance.effect_intervals(zero_shot, plain, car_ft)
    tuned = {name: test_correct(group[f"tuned {name}"], test_sets) for name in ("plain", "CAR-FT")}
    spec = replace(objective_spec(recipe), id_set=ID_TEST, ood_sets=test_sets[1:])
    differences = paired_differences(tuned["CAR-FT"], tuned["plain"])
    intervals |= {
        "tuned CAR-FT - tuned plain, objective": objective_difference(spec, tuned["CAR-FT"], tuned["plain"]),
        "tuned CAR-FT - tuned plain, ID": acceptance.mean_over(differences, [ID_TEST]),
        "tuned CAR-FT - tuned plain, OOD": acceptance.mean_over(differences, test_sets[1:]),
    }
    best_rate = max(group["rates"], key=lambda training: training.result["curve"][-1]["id_accuracy"])  # at alpha 1
    best_id = correct_matrix([(best_rate.test, 1.0)], ID_TEST)
    intervals["plain at its best learning rate - zero-shot, ID"] = acceptance.mean_over(
        paired_differences({ID_TEST: best_id}, {ID_TEST: zero_shot[ID_TEST]}), [ID_TEST]
    )
    objectives = [float(training.result["objective"]) for training in group["random"]]
    repeats: dict[tuple[float, ...], list[float]] = {}  # by point
    for training in (*group["random"], *group["repeats"]):
        point = tuple(float(training.planned.values[name]) for name in space_of(recipe))
        repeats.setdefault(point, []).append(float(training.result["objective"]))
    best_point = group["random"][int(np.argmax(objectives))].planned.values
    numbers = {
        **acceptance.effect_numbers(intervals),
        **roles([*group["random"], *group["rates"]], recipe),
        "best_plain_id_gain": intervals["plain at its best learning rate - zero-shot, ID"].mean,
        "best_plain_learning_rate": float(best_rate.planned.values["learning_rate"]),
        **acceptance.spread_numbers(objectives, [values for values in repeats.values() if len(values) > 1]),
        "edge_distance": acceptance.edge_distance(best_point, space_of(recipe)),
        **{f"best_{name}": float(value) for name, value in best_point.items()},
        "best_objective": max(objectives),
    }
    return numbers, intervals


def row_of(training: Finished) -> dict[str, Any]:
    """Returns a training as plain data."""
    kept = ("objective", "alpha", "metrics", "elapsed_s")
    return {
        "name": training.planned.name,
        "values": dict(training.planned.values),
        **{key: training.result[key] for key in kept},
    }


def tables_of(accuracies: Accuracies, intervals: Mapping[str, Interval]) -> dict[str, list[str]]:
    """Returns accuracies and differences on the test sets as Markdown, in percent with 95 % intervals."""
    rows = [[name, *(cell(asdict(cells[column])) for column in COLUMNS)] for name, cells in accuracies.items()]
    differences = [[name, cell(asdict(interval), signed=True)] for name, interval in intervals.items()]
    return {
        "accuracies": table(["test sets, synthetic images", *COLUMNS], rows),
        "differences": table(["difference on the test sets", "points"], differences),
    }


def show(
    tables: Mapping[str, Sequence[str]],
    numbers: Mapping[str, float],
    intervals: Mapping[str, Interval],
    group: Group,
) -> None:
    """Prints accuracies, differences, what the random points found, and the tuned comparison."""
    for lines in tables.values():
        print("\n" + "\n".join(lines))
    print(
        f"\nRandom points: best objective {100 * numbers['best_objective']:.1f} % at learning rate "
        f"{numbers['best_learning_rate']:.3g}, KL weight {numbers['best_kl_weight']:.3g}; sd over points "
        f"{100 * numbers['spread_sd']:.2f}, between seeds {100 * numbers['seed_sd']:.2f} points"
    )
    print(
        f"Regret on the test objective over {numbers['num_candidates']:.0f} candidates (training, alpha): chosen by "
        f"id_val {100 * numbers['regret_id_val']:.1f}, by objective {100 * numbers['regret_objective']:.1f} points; "
        f"difference {100 * numbers['regret_gap']:.1f}, standard error over images "
        f"{100 * numbers['regret_gap_se']:.1f}"
    )
    for name in ("plain", "CAR-FT"):
        values = group[f"tuned {name}"][0].planned.values
        shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items() if key != "seed")
        print(f"Tuned {name}, best of {NUM_PLAIN} trainings by validation: {shown}")
    difference = intervals["tuned CAR-FT - tuned plain, objective"]
    gap = in_points(difference.mean, difference.ends, signed=True)
    print(f"CAR-FT with alpha minus plain fine-tuning with alpha, objective on the test sets: {gap} points")


def draw(methods: Mapping[str, Correct], folder: Path) -> None:
    """Draws the figure of docs/results.md."""
    effects = {
        name: {column: Estimate(i.mean, *i.ends) for column, i in acceptance.accuracy_intervals(correct).items()}
        for name, correct in methods.items()
    }
    words = f"test sets; 95 % intervals {OVER_SEEDS_AND_IMAGES}, {len(PAIR_SEEDS)} seeds (zero-shot: over images)"
    title = f"Equal learning rate ({LEARNING_RATE:g}), alpha 1, KL weight 0 and {KL_WEIGHT:g}"
    effect_figure(effects, folder / "effect.png", folder / "effect.svg", title, words=words, synthetic=True)


def hardware() -> str:
    """Returns on what the numbers were made."""
    return f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"


def run(out: Path, figure_dir: Path, processes: int) -> bool:
    """Runs what is missing, prints and writes everything; returns whether all thresholds are reached."""
    began = time.monotonic()
    recipe = load_recipe(RECIPE, ["evaluate.every_epochs=0"])
    bench = open_bench(recipe, out)
    plans = first_plan(recipe)
    confirm_cost = 2 * len(CONFIRM_SEEDS) * Planned("", {"alpha": 1.0}, (1.0,)).cost
    clock = Clock(sum(planned.cost for part in plans.values() for planned in part) + confirm_cost)
    group = run_groups(bench, plans, processes, clock)
    group |= run_groups(bench, confirm_plan(group, plans["random"][:NUM_PLAIN]), processes, clock)

    test_sets = (ID_TEST, *recipe.data.ood_test)
    zero_shot_table = read_predictions(bench.zero_shot_test_path)
    zero_shot = {name: correct_matrix([(zero_shot_table, 0.0)], name) for name in test_sets}
    numbers, intervals = measure(group, zero_shot, recipe)
    lines, passed = acceptance.verdicts(numbers)
    methods = {
        "zero-shot": zero_shot,
        "plain fine-tuning": test_correct(group["plain"], test_sets),
        "CAR-FT": test_correct(group["CAR-FT"], test_sets),
    }
    tuned = {f"tuned {name}": test_correct(group[f"tuned {name}"], test_sets) for name in ("plain", "CAR-FT")}
    accuracies = {name: acceptance.accuracy_intervals(correct) for name, correct in {**methods, **tuned}.items()}
    tables = tables_of(accuracies, intervals)
    show(tables, numbers, intervals, group)
    print("\n" + "\n".join(lines))
    seconds = time.monotonic() - began
    trained_s = sum(training.result["elapsed_s"] for part in group.values() for training in part)
    num_trainings = sum(len(part) for part in group.values())
    print(f"\n{num_trainings} trainings of {trained_s / num_trainings:.1f} s; this call {seconds:.0f} s; {hardware()}")
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": environment.code()["commit"],
        "recipe": recipe_hash(recipe),
        "cpu": environment.cpu_model(),
        "hardware": hardware(),
        "elapsed_s": round(seconds, 1),
        "trained_s": round(trained_s, 1),
        "passed": passed,
        "thresholds": [asdict(threshold) for threshold in acceptance.THRESHOLDS],
        "numbers": numbers,
        "intervals": {name: asdict(interval) for name, interval in intervals.items()},
        "tables": tables,
        "accuracies": {name: {column: asdict(i) for column, i in cells.items()} for name, cells in accuracies.items()},
        "trainings": {name: [row_of(training) for training in part] for name, part in group.items()},
    }
    files.write_json(out / "effect.json", _finite(content))
    draw(methods, figure_dir)
    print(f"Numbers: {out / 'effect.json'}; figure: {figure_dir / 'effect.png'}")
    return passed


def _finite(value: Any) -> Any:
    """Returns plain data with None for what JSON cannot hold (infinite degrees of freedom)."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.effect", description="What CAR-FT is worth.")
    parser.add_argument("--out", type=Path, default=OUT, help="where trainings and numbers are kept (%(default)s)")
    parser.add_argument("--figure-dir", type=Path, default=DOCS, help="where the figure goes (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--pretrain", type=Path, metavar="DIR", help="makes the weights of the sandbox anew instead")
    parser.add_argument("--steps", type=int, default=pretrain.NUM_STEPS, help="of --pretrain (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error("--processes must be at least 1")
    if arguments.steps < 10:
        parser.error("--steps must be at least 10")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all thresholds reached, 1 one missed, else that of the error."""
    given = _arguments(argv)
    try:
        if given.pretrain is not None:
            pretrain.pretrain(given.pretrain, given.steps, progress=pretrain.show)
            return 0
        return 0 if run(given.out.resolve(), given.figure_dir.resolve(), given.processes) else 1
    except CarftError as error:
        console.show_error(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
