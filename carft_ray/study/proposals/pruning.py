"""The recipe's pruner: which intermediate values of a running training count, and why one is cut. Writes nothing.

An intermediate value is the objective on the subset, best over a few alphas (``training.run``), at the end of
an epoch. Its step is the percent of the training's own schedule, so trainings of different length compare.

The rules are those of Optuna's pruners, and tests hold them to the same answers. They are written again because

- Optuna's halving writes a rung before it answers: a kill in between would lose the cut. Here the answer follows from
  the values that the study holds, so it can be found before anything is written;
- Optuna's pruners refuse a study of two objectives;
- its median compares values of one step only, and trainings of different length seldom share a percent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carft_ray.recipe.schedule import END, first_percent, num_warmup_steps, percent, rungs
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import AnyPruner, HalvingPruner, NoPruner
from carft_ray.words import counted

SUBSET_OBJECTIVE = "subset/objective"  # in a line of metrics.jsonl
_SHARES = {2: "half", 3: "third", 4: "quarter"}


@dataclass(frozen=True)
class PrunerTrial:
    """A trial as a pruner sees it.

    Attributes:
        intermediate_values: Percent of its schedule -> objective on the subset, a fraction.
        complete: It was trained to its end.
    """

    intermediate_values: Mapping[int, float]
    complete: bool


def intermediate_value(recipe: Recipe, values: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[int, float] | None:
    """Returns percent and objective of an evaluation that counts; None before ``first``, in the warm-up, or for none.

    Args:
        recipe: The study's recipe.
        values: Of the trial.
        row: A line of its ``metrics.jsonl``.
    """
    value = row.get(SUBSET_OBJECTIVE)
    if value is None or not math.isfinite(value) or not {"step", "epoch", "num_steps"} <= row.keys():
        return None
    step = percent(row["epoch"], values.get("epochs", recipe.train.epochs))
    warmup = num_warmup_steps(values.get("warmup_steps", recipe.train.warmup_steps), row["num_steps"])
    return None if step < first_percent(recipe.search.pruner) or row["step"] < warmup else (step, float(value))


def cut_reason(pruner: AnyPruner, values: Mapping[int, float], others: Sequence[PrunerTrial]) -> str | None:
    """Returns why a training is cut at its last intermediate value, in one line; None when it continues.

    The end of a training is no reason: what has come so far is complete.

    Args:
        pruner: The recipe's.
        values: Intermediate values of the trial, the last one included.
        others: The other trials.
    """
    step = max(values)
    if step >= END or isinstance(pruner, NoPruner):
        return None
    if isinstance(pruner, HalvingPruner):
        why = _halving(pruner, values, others)
    else:
        complete = [other.intermediate_values for other in others if other.complete and other.intermediate_values]
        why = _percentile(pruner.percentile, pruner.startup_trials, values, complete)
    return None if why is None else f"cut at {step} %: {why}"


def deciding_value(pruner: AnyPruner, values: Mapping[int, float]) -> float | None:
    """Returns the last intermediate value at which a training could have been cut; None when there was none.

    With halving it is that at the last rung.
    """
    reached = max(rungs(pruner), default=0)
    steps = sorted(step for step in values if reached <= step < END)
    return values[steps[0] if reached else steps[-1]] if steps else None


def _halving(pruner: HalvingPruner, values: Mapping[int, float], others: Sequence[PrunerTrial]) -> str | None:
    """Successive halving without waiting (Li et al. 2020, arXiv 1810.05934).

    Who is not among the best ``1 / factor`` of those that have reached a rung by now is cut there. The first ones to
    come continue when they lead.
    """
    step, factor = max(values), pruner.factor
    value, before = values[step], max((other for other in values if other != step), default=0)
    for rung in rungs(pruner):
        if not before < rung <= step:
            continue
        reached = [value]  # there, or at the first step behind
        for found in (other.intermediate_values for other in others):
            reached += [found[min(steps)]] if (steps := [step for step in found if step >= rung]) else []
        if value < sorted(reached)[-max(1, len(reached) // factor)]:
            share = _SHARES.get(factor, f"1/{factor}")
            return f"{_shown(value)} was not among the best {share} of {counted(len(reached), 'trial')}"
    return None


def _percentile(
    share: float, startup: int, values: Mapping[int, float], complete: Sequence[Mapping[int, float]]
) -> str | None:
    """The best value so far must reach the given share of the complete trials, each at its last step up to here."""
    last = max(values)
    reached = [found[max(steps)] for found in complete if (steps := [step for step in found if step <= last])]
    if len(complete) < startup or not reached:
        return None
    limit, best = float(np.percentile(reached, 100 - share)), max(values.values())
    if best >= limit:
        return None
    of = counted(len(reached), "complete trial")
    return f"{_shown(best)} was not among the best {share:g} % of {of}, from {_shown(limit)} on"


def _shown(value: float) -> str:
    return f"{100 * value:.1f} %"
