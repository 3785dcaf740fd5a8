"""Samplers, pruning, Pareto search, constraints, warm start, replayed: parts of ``python -m benchmarks.samplers``

Searches of the product's own study over ``benchmarks.landscape``, over the four values of
``VALUES``; a trial shows the noise between seeds, what is compared is free of it, with Student's 95 %
interval over searches. Differences are paired by seed.

    samplers      every sampler after 30 and after 100 trials, against random search
    pruners       each pruner against none, 30 trials of 12 epochs: epochs saved, objective of the best; next to it the
                  best of the first trials without a pruner that train as many epochs
    pareto        TPE with and without successive halving, and random: hypervolume of the reported front beyond
                  zero-shot, 30 trainings each; epochs saved
    constraints   ID accuracy at least that of plain fine-tuning plus ``ID_GAIN``: how often the best trial meets it,
                  with the constraint passed to TPE, with it in the choice of alpha alone (random), and without
    warm_start    10 trials after a search of 30 on a related task (the same space, whose trainings give what half as
                  many epochs give), against 10 and 30 trials alone
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from benchmarks.landscape import FloatArray, Landscape, Measured, covered, mean_with_interval
from benchmarks.replay import search
from benchmarks.table import RECIPE, SPACE
from carft_ray import files
from carft_ray.evaluation.alpha_curve import choose_point
from carft_ray.layout import METRICS
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schedule import has_intermediate_value
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import VIOLATION
from carft_ray.store.attempt_files import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.pareto_front import front_of, non_dominated
from carft_ray.study.rows import best_row
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import TrialRow

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
NUM_TRIALS = 30
EPOCHS = 12
STEPS_AN_EPOCH = 8  # of the quickstart recipe
PLAIN = {"learning_rate": 5e-4, "kl_weight": 0.3, "weight_decay": 0.1, "crop_scale": 0.9}  # the least KL of the table
ID_GAIN = 0.0125
CONSTRAINT = "id_drop/plain"
PRUNERS: dict[str, list[str]] = {
    "none": [],
    "successive_halving": ["search.pruner.name=successive_halving"],
    "median": ["search.pruner.name=median"],
    "percentile, best 75 %": ["search.pruner={name: percentile, percentile: 75.0}"],
}
TPE = ["search.sampler.startup_trials=8"]
DRAWN_ALPHA = ["search.objective.kind=pareto", "search.alpha.mode=sample", "search.space.alpha={low: 0.1, high: 1.0}"]


def four_values(name: str, num_trials: int, overrides: Sequence[str]) -> Recipe:
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


def found_by(name: str, landscape: Landscape, num_seeds: int) -> FloatArray:
    """Returns the noise-free objectives, [searches, len(LENGTHS)]."""

    def objective_of(values: Mapping[str, Any], rng: np.random.Generator) -> float:
        return landscape.training(values, rng).objective(LOWEST)

    runs = []
    for seed in range(num_seeds):
        if name == "grid":
            rows = [search(four_values(name, number, []), objective_of, seed) for number in LENGTHS]
        else:
            rows = [search(four_values(name, max(LENGTHS), SAMPLERS[name]), objective_of, seed)] * len(LENGTHS)
        runs.append([best_after(rows[i], number, landscape) for i, number in enumerate(LENGTHS)])
    return np.array(runs)


def samplers(landscape: Landscape, num_seeds: int) -> bool:
    """Prints a row for each sampler: after 30 and 100 trials, and its difference to random search of the same seed.

    A search has 100 trials, of which the first 30 are what a search of 30 would have done: ``tpe`` and ``gp`` begin
    with 8 random trials, the populations have 10. The grid cannot be cut short: it has a search for each number of
    trials, of as many points.
    """
    heads = " | ".join(f"{number} trials | minus random" for number in LENGTHS)
    print(f"| sampler | {heads} | s a search |\n|---|{'---|' * (2 * len(LENGTHS) + 1)}")
    random: FloatArray | None = None
    for name in (*SAMPLERS, "grid"):
        began = time.perf_counter()
        best = found_by(name, landscape, num_seeds)
        seconds = (time.perf_counter() - began) / num_seeds
        cells = []
        for index in range(len(LENGTHS)):
            cells.append(mean_with_interval(best[:, index]))
            cells.append("" if random is None else mean_with_interval(best[:, index] - random[:, index]))
        random = best if random is None else random
        print(f"| `{name}` | {' | '.join(cells)} | {seconds:.1f} |", flush=True)
    return True


@dataclass(frozen=True)
class Searched:
    """A replayed search.

    Attributes:
        rows: Its trials.
        num_epochs: Epochs that were trained.
    """

    rows: list[TrialRow]
    num_epochs: int


def replayed(
    recipe: Recipe, landscape: Landscape, seed: int, study_dir: Path | None = None, as_epochs: int | None = None
) -> Searched:
    """Runs one search, a training after the other, with intermediate values, cuts, alpha curves and constraints.

    Args:
        recipe: Its baselines are left out, but for ``plain`` where a constraint names it.
        landscape: What trainings give.
        seed: Of the sampler and of the noise.
        study_dir: Where the study is made and stays; None: a temporary folder.
        as_epochs: Trainings give what so many epochs give; None: those of the recipe.
    """
    sampler = recipe.search.sampler.model_copy(update={"seed": seed})
    baselines = {"plain": PLAIN} if recipe.search.constraints.id_drop else {}
    part = recipe.search.model_copy(update={"sampler": sampler, "baselines": baselines})
    recipe = recipe.model_copy(update={"search": part})
    rng, num_epochs = np.random.default_rng(seed), 0
    with (
        tempfile.TemporaryDirectory(prefix="carft-replay-") as folder,
        open_study(study_dir or Path(folder) / "study", recipe) as study,
    ):
        recover_running(study)
        while (spec := study.next()) is not None:
            home = spec.folder(study.study_dir)
            home.mkdir(parents=True, exist_ok=True)
            values = {"epochs": as_epochs or recipe.train.epochs, **spec.values}
            training = landscape.training(values, rng if spec.kind == "trial" else None)
            cut_after = None
            for epoch in range(1, recipe.train.epochs + 1):
                if has_intermediate_value(
                    recipe.evaluate.every_epochs, recipe.search.pruner, epoch, recipe.train.epochs
                ):
                    line = _line(epoch, recipe.train.epochs, training)
                    files.append_line(home / METRICS, json.dumps(line))
                    if study.report(spec, line) is not None:
                        cut_after = epoch
                        break
            if cut_after is None:
                result = _result(recipe, training, spec.values.get("alpha"), landscape)
                write_result(spec.place(study.study_dir), result)
            study.settle(spec)
            num_epochs += (cut_after or recipe.train.epochs) if spec.kind == "trial" else 0
        return Searched(study.rows(), num_epochs)


def _line(epoch: int, epochs: int, training: Measured) -> dict[str, Any]:
    steps = {"step": epoch * STEPS_AN_EPOCH, "num_steps": epochs * STEPS_AN_EPOCH}
    return {"epoch": epoch, **steps, "subset/objective": training.at_share(epoch / epochs)}


def _result(recipe: Recipe, training: Measured, drawn: float | None, landscape: Landscape) -> dict[str, Any]:
    """Returns the result of a training; with a constraint alpha is chosen within it."""
    bound = id_bound(landscape) if recipe.search.constraints.id_drop else None

    def at(alpha: float) -> dict[str, float]:
        id_accuracy, ood_accuracy = accuracies_at(training, alpha)
        found = {"id_accuracy": id_accuracy, "ood_accuracy": ood_accuracy}
        violation = {} if bound is None else {VIOLATION + CONSTRAINT: bound - id_accuracy}
        return {**found, **violation, "objective": (id_accuracy + ood_accuracy) / 2}

    alphas = {*training.alphas.tolist()} | ({drawn} if drawn is not None else set())
    curve = [{"alpha": alpha, **at(alpha)} for alpha in sorted(alphas)]
    if drawn is None:
        drawn = choose_point(curve, recipe.search.alpha.lowest)["alpha"]
    metrics = at(drawn)
    return {
        "objective": metrics["objective"],
        "alpha": drawn,
        "metrics": metrics,
        "curve": curve,
    }


def accuracies_at(training: Measured, alpha: float) -> tuple[float, float]:
    """Returns ID and OOD accuracy at an alpha, by splines through the points of both curves."""
    id_accuracy, ood_accuracy = (
        float(CubicSpline(training.alphas, curve)(alpha)) for curve in (training.id_accuracies, training.ood_accuracies)
    )
    return id_accuracy, ood_accuracy


def id_bound(landscape: Landscape) -> float:
    """Returns the least ID accuracy that the constraint asks for: of plain fine-tuning at its alpha, and more."""
    plain = landscape.training({**PLAIN, "epochs": EPOCHS})
    pairs = zip(plain.alphas.tolist(), plain.objectives.tolist(), strict=True)
    points = [{"alpha": alpha, "objective": objective} for alpha, objective in pairs]
    return accuracies_at(plain, choose_point(points, LOWEST)["alpha"])[0] + ID_GAIN


def truth(row: TrialRow, landscape: Landscape) -> tuple[float, float]:
    """Returns ID and OOD accuracy of a trial at its alpha, free of noise."""
    assert row.alpha is not None
    return accuracies_at(landscape.training({"epochs": EPOCHS, **row.values}), row.alpha)


def best_truth(rows: Sequence[TrialRow], landscape: Landscape) -> float:
    """Returns the noise-free objective of the trial that a search calls best, at its alpha."""
    best = best_row(rows)
    assert best is not None
    return sum(truth(best, landscape)) / 2


def pruners(landscape: Landscape, num_seeds: int) -> bool:
    """Prints what each pruner saves and costs."""
    heads = ("pruner", "epochs saved, %", "trials cut", "best, %", "minus none", "minus none of as many epochs")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    unpruned: list[Searched] = []
    for name, overrides in PRUNERS.items():
        recipe = four_values("tpe", NUM_TRIALS, [*TPE, "evaluate.every_epochs=1", *overrides])
        found = [replayed(recipe, landscape, seed) for seed in range(num_seeds)]
        saved = np.array([1 - each.num_epochs / (NUM_TRIALS * EPOCHS) for each in found])
        cut = np.mean([sum(row.outcome == "pruned" for row in each.rows) for each in found])
        best = np.array([best_truth(each.rows, landscape) for each in found])
        cells = ["0", "0", mean_with_interval(best), "", ""]
        unpruned = unpruned or found
        if overrides:
            plain = np.array([best_truth(each.rows, landscape) for each in unpruned])
            as_many = [
                best_truth(all_.rows[: max(1, round(each.num_epochs / EPOCHS))], landscape)
                for all_, each in zip(unpruned, found, strict=True)
            ]
            cells = [mean_with_interval(saved), f"{cut:.1f}", mean_with_interval(best)]
            cells += [mean_with_interval(best - plain), mean_with_interval(best - np.array(as_many))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return True


def hypervolume(points_N2: FloatArray, reference: tuple[float, float]) -> float:
    """Returns the area that the points dominate beyond a reference point; with zero-shot as reference, gains alone.

    The area of the union of the rectangles from the reference to each point; a point that does not exceed the reference
    in both adds nothing.

    Args:
        points_N2: Any points.
        reference: (ID accuracy, OOD accuracy) from which the area counts.
    """
    points_N2 = np.asarray(points_N2, np.float64).reshape(-1, 2)
    beyond = points_N2[(points_N2 > reference).all(axis=1)]
    area, left = 0.0, reference[0]
    for id_accuracy, ood_accuracy in beyond[non_dominated(beyond)]:
        area += (id_accuracy - left) * (ood_accuracy - reference[1])
        left = id_accuracy
    return float(area)


def pareto(landscape: Landscape, num_seeds: int) -> bool:
    """Prints the hypervolume of fronts, in thousandths of the unit square."""
    zero_shot = landscape.training(PLAIN)
    reference = (float(zero_shot.id_accuracies[0]), float(zero_shot.ood_accuracies[0]))
    print("| search | hypervolume, 1e-3 | minus random | epochs saved, % |\n|---|---|---|---|")
    halving = [*PRUNERS["successive_halving"], "evaluate.every_epochs=1"]
    settings = {"random": ("random", []), "TPE": ("tpe", TPE), "TPE, successive halving": ("tpe", [*TPE, *halving])}
    random: FloatArray | None = None
    for name, (sampler, overrides) in settings.items():
        recipe = four_values(sampler, NUM_TRIALS, [*DRAWN_ALPHA, *overrides])
        volumes, saved = [], []
        for seed in range(num_seeds):
            searched = replayed(recipe, landscape, seed)
            rows = {row.name: row for row in searched.rows}
            front = [(rows[point.name], point.alpha) for point in front_of(searched.rows)]
            points = [
                accuracies_at(landscape.training({"epochs": EPOCHS, **row.values}), alpha) for row, alpha in front
            ]
            volumes.append(hypervolume(np.array(points), reference))
            saved.append(1 - searched.num_epochs / (NUM_TRIALS * EPOCHS))
        found = np.array(volumes)
        random = found if random is None else random
        difference = mean_with_interval(10 * (found - random)) if name != "random" else ""
        share = mean_with_interval(np.array(saved)) if any(saved) else "0"
        print(f"| {name} | {mean_with_interval(10 * found)} | {difference} | {share} |", flush=True)
    return True


def constraints(landscape: Landscape, num_seeds: int) -> bool:
    """Prints how often the best trial meets a constraint, free of noise."""
    bound = id_bound(landscape)
    print(f"ID accuracy of at least {100 * bound:.2f} %, free of noise:")
    heads = ("search", "best meets it, %", "violation of the best, points", "of the second half meet it, %", "best, %")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    constrained = ["search.baselines={plain: {kl_weight: 0.3}}", "search.constraints={id_drop: {plain: 0.0}}"]
    settings = {"TPE, none": ("tpe", TPE), "random, in the choice of alpha": ("random", constrained)}
    settings["TPE, in the choice of alpha and passed"] = ("tpe", [*TPE, *constrained])
    for name, (sampler, overrides) in settings.items():
        recipe = four_values(sampler, NUM_TRIALS, overrides)
        met, missed, later, best = [], [], [], []
        for seed in range(num_seeds):
            rows = replayed(recipe, landscape, seed).rows
            winner = best_row(rows)
            assert winner is not None
            gap = bound - truth(winner, landscape)[0]
            met.append(float(gap <= 0))
            missed.append(max(gap, 0.0))
            later.append(np.mean([truth(row, landscape)[0] >= bound for row in rows[NUM_TRIALS // 2 :]]))
            best.append(best_truth(rows, landscape))
        cells = [f"{100 * np.mean(met):.0f}", *(mean_with_interval(np.array(each)) for each in (missed, later, best))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return True


def warm_start(landscape: Landscape, num_seeds: int) -> bool:
    """Prints what a search on a related task is worth to the next one."""
    few = 10
    alone = {number: four_values("tpe", number, TPE) for number in (few, NUM_TRIALS)}
    found: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        with tempfile.TemporaryDirectory(prefix="carft-warm-") as folder:
            source = Path(folder) / "related"
            replayed(alone[NUM_TRIALS], landscape, seed + num_seeds, source, EPOCHS // 2)
            part = alone[few].search.model_copy(update={"warm_start": (str(source),)})
            warm = replayed(alone[few].model_copy(update={"search": part}), landscape, seed)
        runs = {f"{few} trials": replayed(alone[few], landscape, seed), f"{few} trials, warm": warm}
        runs[f"{NUM_TRIALS} trials"] = replayed(alone[NUM_TRIALS], landscape, seed)
        for name, searched in runs.items():
            found.setdefault(name, []).append(best_truth(searched.rows, landscape))
    cold = np.array(found[f"{few} trials"])
    print(f"| search of {EPOCHS} epochs a trial | best, % | minus {few} trials |\n|---|---|---|")
    for name, values in found.items():
        best = np.array(values)
        difference = "" if name == f"{few} trials" else mean_with_interval(best - cold)
        print(f"| {name} | {mean_with_interval(best)} | {difference} |")
    return True
