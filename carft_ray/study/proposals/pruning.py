"""The recipe's pruner: which looks at a running training count, and why one is cut. Nothing here is written.

A look is the objective on the subset, best over a few alphas (``evaluation.training``), at the end of an epoch. Its
step is the percent of the training's own schedule, so trainings of different length compare.

The rules are those of Optuna's pruners, and tests hold them to the same answers. They stand here again because

- Optuna's halving writes a rung before it answers: a kill in between would lose the cut. Here the answer follows from
  the looks that the study holds, so it can be found before anything is written;
- Optuna's pruners refuse a study of two objectives;
- its median compares looks of one step only, and trainings of different length are seldom looked at in the same
  percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carft_ray.recipe.schedule import END, HALVING, first_percent, num_warmup_steps, percent, rungs
from carft_ray.recipe.schema import PrunerConfig, Recipe
from carft_ray.words import counted

LOOK = "subset/objective"  # in a line of metrics.jsonl
_SHARES = {2: "half", 3: "third", 4: "quarter"}


@dataclass(frozen=True)
class Looked:
    """A trial as a pruner sees it.

    Attributes:
        number: Of the trial.
        looks: Percent of its schedule -> objective on the subset, a fraction.
        complete: It was trained to its end.
    """

    number: int
    looks: Mapping[int, float]
    complete: bool


def look_of(recipe: Recipe, values: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, float] | None:
    """Returns percent and objective of a look that counts; None before ``first``, in the warm-up, or without a look.

    Args:
        recipe: The study's recipe.
        values: Of the trial.
        row: A line of its ``metrics.jsonl``.
    """
    value = row.get(LOOK)
    if value is None or not math.isfinite(value):
        return None
    step = percent(row["epoch"], values.get("epochs", recipe.train.epochs))
    warmup = num_warmup_steps(values.get("warmup_steps", recipe.train.warmup_steps), row["num_steps"])
    return None if step < first_percent(recipe.search.pruner) or row["step"] < warmup else (step, float(value))


def cut_reason(pruner: PrunerConfig, mine: Looked, others: Sequence[Looked]) -> str | None:
    """Returns why a training is cut at its last look, in one line; None when it goes on.

    The end of a training is no reason: what has come so far is complete.

    Args:
        pruner: The recipe's.
        mine: The trial, its last look included.
        others: The other trials.
    """
    step = max(mine.looks)
    if step >= END:
        return None
    if pruner.name == HALVING:
        why = _halving(rungs(pruner), pruner.factor, mine.looks, others)
    else:
        share = 50.0 if pruner.name == "median" else pruner.percentile
        why = _percentile(share, pruner.startup_trials, mine.looks, [other for other in others if other.complete])
    return None if why is None else f"cut at {step} %: {why}"


def deciding_look(pruner: PrunerConfig, looks: Mapping[int, float]) -> float | None:
    """Returns the last look at which a training could have been cut; None when there was none.

    With halving it is that at the last rung.
    """
    reached = max(rungs(pruner), default=0)
    steps = sorted(step for step in looks if reached <= step < END)
    if not steps:
        return None
    return looks[steps[0] if reached else steps[-1]]


def _halving(ends: Sequence[int], factor: int, looks: Mapping[int, float], rivals: Sequence[Looked]) -> str | None:
    """Successive halving without waiting (Li et al. 2020, arXiv 1810.05934).

    Who is not among the best ``1 / factor`` of those that have reached a rung by now is cut there. The first ones to
    come go on when they lead.
    """
    step = max(looks)
    value, before = looks[step], max((other for other in looks if other != step), default=0)
    for rung in ends:
        if not before < rung <= step:
            continue
        values = sorted([value, *(found for rival in rivals if (found := _at_rung(rival.looks, rung)) is not None)])
        if value < values[-max(1, len(values) // factor)]:
            share = _SHARES.get(factor, f"1/{factor}")
            return f"{_shown(value)} was not among the best {share} of {counted(len(values), 'trial')}"
    return None


def _at_rung(looks: Mapping[int, float], rung: int) -> float | None:
    step = min((step for step in looks if step >= rung), default=None)
    return None if step is None else looks[step]


def _percentile(share: float, startup: int, looks: Mapping[int, float], complete: Sequence[Looked]) -> str | None:
    """The best look so far must reach the given share of the complete trials, each at its last look up to here."""
    step = max(looks)
    values = [trial.looks[max(steps)] for trial in complete if (steps := [s for s in trial.looks if s <= step])]
    if sum(bool(trial.looks) for trial in complete) < startup or not values:
        return None
    limit, best = float(np.percentile(values, 100 - share)), max(looks.values())
    if best >= limit:
        return None
    of = counted(len(values), "complete trial")
    return f"{_shown(best)} was not among the best {share:g} % of {of}, from {_shown(limit)} on"


def _shown(value: float) -> str:
    return f"{100 * value:.1f} %"
