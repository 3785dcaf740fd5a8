"""One search of a world by each rule of ``python -m benchmarks.selection``, and what its choices are worth.

Proposals, repeats and expectations are the product's own functions, on an Optuna study in memory.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import optuna
from scipy import stats

from benchmarks.emulators import MEASURES, FloatArray, World
from carft_ray.evaluation.alpha_curve import choose_point
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.attributes import NAME, REPEAT_OF
from carft_ray.study.expected import Expectation, expectation, stand, values_key
from carft_ray.study.journal import constraint_values
from carft_ray.study.proposals.optuna_samplers import ask, distribution, draw
from carft_ray.study.proposals.repeats import next_repeat
from carft_ray.study.rows import ZERO_SHOT, best_row, searched
from carft_ray.study.training import Kind, TrialRow

TODAY = "today"
REPEATED = "N times"  # of each baseline, in place of a search


@dataclass(frozen=True)
class Rule:
    """How a search finds its best values.

    Attributes:
        expects: Whether expected objectives choose; else measured ones.
        repeats: Share of repeats.
        told: Whether the sampler is told expected objectives.
    """

    expects: bool = True
    repeats: float = 0.0
    told: bool = False


RULES = {
    TODAY: Rule(expects=False),
    "expected": Rule(),
    "repeats .25": Rule(repeats=0.25),
    "repeats .35": Rule(repeats=0.35),
    "repeats .5": Rule(repeats=0.5),
    "repeats .5, told": Rule(repeats=0.5, told=True),
}


def run_rules(
    world: World, recipe: Recipe, trainings: int, search: int, names: Sequence[str] = (*RULES, REPEATED)
) -> dict[str, dict[str, Any]]:
    """Returns what each rule has found in a search of so many trainings; rules with the same trainings share them."""
    found, ended = {}, {}
    for name, rule in RULES.items():
        if name not in names:
            continue
        own, key = as_searched(recipe, trainings, rule.repeats, search), (rule.repeats, rule.told)
        if key not in ended:
            ended[key] = run_search(world, own, search, rule.told)
        found[name] = judged(world, own, search, rule.expects, *ended[key])
    for name in recipe.search.baselines if REPEATED in names else ():
        found[f"{name} {REPEATED}"] = repeated_baseline(world, as_searched(recipe, trainings, 0, search), search, name)
    return found


def train(world: World, recipe: Recipe, search: int, first: TrialRow, seed: int) -> TrialRow:
    """Returns a training as a row that has ended.

    Args:
        world: In which it is trained.
        recipe: Of the search.
        search: Its number.
        first: Its kind, number, name and values.
        seed: Counts from 0, which is the recipe's own.
    """
    curve = world.measured(first.values, seed, search).tolist()
    points = tuple(
        {"alpha": alpha, **dict(zip(MEASURES, each, strict=True))}
        for alpha, each in zip(world.alphas, curve, strict=True)
    )
    best = choose_point(points, recipe.search.alpha.lowest)
    values = {**first.values, "seed": recipe.train.seed + seed} if seed else first.values
    metrics = {name: value for name, value in best.items() if name not in ("alpha", "objective")}
    own = replace(first, outcome="complete", objective=best["objective"], alpha=best["alpha"])
    return replace(own, values=values, metrics=metrics, points=points)


def begun(kind: Kind, number: int, name: str, values: Mapping[str, Any], repeat_of: str = "") -> TrialRow:
    """Returns a training that begins."""
    return TrialRow(kind, number, name, dict(values), 1, "running", repeat_of=repeat_of)


def run_search(world: World, recipe: Recipe, search: int, told: bool) -> tuple[list[TrialRow], list[TrialRow]]:
    """Returns the trials of a search and its baselines, with the frozen model and repeats among them."""
    trials: list[TrialRow] = []
    frozen = dict(zip(MEASURES, world.frozen.tolist(), strict=True))
    objective = frozen.pop("objective")
    baselines = [replace(begun("baseline", 0, ZERO_SHOT, {}), outcome="complete", objective=objective, metrics=frozen)]
    for name, values in recipe.search.baselines.items():
        first = begun("baseline", len(baselines), name, values)
        baselines.append(train(world, recipe, search, first, 0))
    while len(searched(trials, baselines)) < recipe.search.trials:
        found = cast(Expectation, Later(lambda: expectation(recipe, trials, baselines)))
        left, left_baselines = (used_up(world, rows, [*trials, *baselines]) for rows in (trials, baselines))
        repeat = next_repeat(recipe, left, left_baselines, found)
        if repeat is None:
            values = world.nearest(drawn(recipe, trials, found if told else None), [row.values for row in trials])
            first, seed = begun("trial", len(trials), f"t{len(trials):04d}", values), 0
        else:
            seed = repeat.seed - recipe.train.seed
            rows = trials if repeat.first.kind == "trial" else baselines
            name = f"t{len(rows):04d}" if rows is trials else f"{repeat.first.name}-seed{repeat.seed}"
            first = begun(repeat.first.kind, len(rows), name, repeat.first.values, repeat.first.name)
        (trials if first.kind == "trial" else baselines).append(train(world, recipe, search, first, seed))
    return trials, baselines


class Later:
    """An expectation that is made when it is read: most trainings are no repeats, and it takes most of the time."""

    def __init__(self, make: Callable[[], Expectation | None]) -> None:
        self._make = cache(make)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)


def used_up(world: World, rows: Sequence[TrialRow], everything: Sequence[TrialRow]) -> list[TrialRow]:
    """Returns rows as ``next_repeat`` gets them: values that the world cannot train again are marked as outside."""
    if world.most is None:
        return list(rows)
    keys = [values_key(row) for row in everything]
    return [replace(row, outside=True) if keys.count(values_key(row)) >= world.most else row for row in rows]


def drawn(recipe: Recipe, trials: Sequence[TrialRow], found: Expectation | None) -> dict[str, Any]:
    """Returns new values from the recipe's sampler.

    Args:
        recipe: Of the search.
        trials: All of them, ended.
        found: What is expected; then the sampler is told this in place of the measured objectives.
    """
    study = optuna.create_study(direction="maximize")
    distributions = {name: distribution(part) for name, part in recipe.search.space.items()}
    for row in trials:
        study.add_trial(
            optuna.trial.create_trial(
                value=found.by_name[row.name].objective if found else row.objective,
                params={name: row.values[name] for name in distributions},
                distributions=distributions,
                user_attrs={NAME: row.name, **({REPEAT_OF: row.repeat_of} if row.repeat_of else {})},
                constraints=constraint_values("complete", {}, ()),
            )
        )
    return dict(draw(study, ask(study, recipe), recipe))


def as_searched(recipe: Recipe, trainings: int, repeats: float, search: int) -> Recipe:
    """Returns the recipe of one search, without the points that a recipe may give."""
    sampler = recipe.search.sampler.model_copy(update={"seed": search})
    changed = {"trials": trainings, "repeats": repeats, "sampler": sampler, "enqueue": ()}
    return recipe.model_copy(update={"search": recipe.search.model_copy(update=changed)})


def truth(world: World, row: TrialRow, num_used: int, search: int) -> float:
    """Returns the true objective of a training's values, of which a search has some trainings, at its alpha."""
    assert row.alpha is not None
    return float(world.truth(row.values, num_used, search)[world.alphas.index(row.alpha), 0])


def judged(
    world: World, recipe: Recipe, search: int, expects: bool, trials: Sequence[TrialRow], baselines: Sequence[TrialRow]
) -> dict[str, Any]:
    """Returns the choices of a search, and the truth of each baseline at the alpha of its first training."""
    found, rivals = expectation(recipe, trials, baselines), [row for row in baselines if row.name != ZERO_SHOT]
    assert found is not None
    number, chosen = Counter(values_key(row) for row in (*trials, *rivals)), {}

    def true(row: TrialRow) -> float:
        return truth(world, row, number[values_key(row)], search)

    firsts = [row for row in rivals if not row.repeat_of]
    standing = {row.name: true(row) for row in stand(firsts, found)}
    for choice, rows in (("trial", trials), ("any", [*trials, *rivals])):
        best = best_row(stand(rows, found) if expects else rows)
        assert best is not None
        one: dict[str, Any] = {"values": best.values if best.kind == "trial" else values_key(best), "alpha": best.alpha}
        one |= {"truth": true(best), "promise": best.objective, "trainings": number[values_key(best)]}
        if expects:
            each = found.by_name[best.name]
            one |= {"promise": each.objective, "ends": each.ends}
            one["better"] = {name: (p, one["truth"] - standing[name]) for name, p in each.better.items()}
        chosen[choice] = one
    once = {row.name: true(row) for row in firsts}
    again = sum(bool(row.repeat_of) for row in rivals)
    return {"choices": chosen, "once": once, "new": sum(not row.repeat_of for row in trials), "again": again}


def repeated_baseline(world: World, recipe: Recipe, search: int, name: str) -> dict[str, Any]:
    """Returns what repeating a baseline in place of a search has found: its mean curve chooses alpha."""
    number = min(recipe.search.trials, world.most or recipe.search.trials)
    first = begun("baseline", 1, name, recipe.search.baselines[name])
    rows = [train(world, recipe, search, first, seed) for seed in range(number)]
    curves = np.array([[point["objective"] for point in row.points] for row in rows])
    points = [{"alpha": a, "objective": y} for a, y in zip(world.alphas, curves.mean(axis=0).tolist(), strict=True)]
    best = choose_point(points, recipe.search.alpha.lowest)
    true = truth(world, replace(rows[0], alpha=best["alpha"]), number, search)
    one = {"values": name, "alpha": best["alpha"], "truth": true, "promise": best["objective"], "trainings": number}
    if number > 1:
        one["ends"] = student(curves[:, world.alphas.index(best["alpha"])])[1:]
    once = {name: truth(world, rows[0], number, search)}
    return {"choices": {"any": one}, "once": once, "new": 0, "again": number - 1}


def student(values: FloatArray) -> tuple[float, float, float]:
    """Returns the mean of at least two values with Student's 95 % interval."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half
