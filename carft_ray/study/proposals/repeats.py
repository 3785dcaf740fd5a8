"""Tried values that are trained again with the next seed: ``search.repeats``. Writes nothing.

A repeat is one more proposer, beside the sampler and ``search.enqueue``. With N trainings so far and E expected at the
end of the search, the next one is a repeat if fewer than

    repeats N^2 / E

are: the share rises linearly to ``repeats``, and the sampler begins alone. Whose turn it is, a draw from the posterior
over all tried values says (Thompson 1933): values that may be the best are drawn often, clearly worse ones never.

Repeat k of any values has the seed ``train.seed + k``. So first trainings share a seed, second ones the next, and the
posterior tells the luck of a seed from the rest. Values of which a training runs wait for it, and no values have more
than ``MOST`` trainings. The recipe's baselines take part: little is known of them, since they have no neighbours, so a
baseline waits while it has more trainings than all values of trials.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from carft_ray.recipe.rules import startup_trials
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.expected import Expectation, values_key
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.training import TrialRow

MOST = 8  # trainings of the same values


@dataclass(frozen=True)
class Repeat:
    """A training to repeat.

    Attributes:
        first: The first training of its values.
        seed: Of the new one.
    """

    first: TrialRow
    seed: int


def next_repeat(
    recipe: Recipe,
    trials: Sequence[TrialRow],
    baselines: Sequence[TrialRow],
    expected: Expectation | None,
    end: int | None = None,
) -> Repeat | None:
    """Returns which training to repeat next; None if new values are next, or nothing can be repeated.

    Args:
        recipe: Of the study.
        trials: All of them, running ones too.
        baselines: All of them, with their repeats.
        expected: Of the trainings that have ended; None in a Pareto search, where the front is repeated: of its values
            those with the fewest trainings, the earliest first.
        end: Number of trainings at which the search is expected to end; None: ``search.trials``. 0: no new values are
            left, and the whole share is due.
    """
    own = [row for row in baselines if row.name != ZERO_SHOT]
    repeated = sum(bool(row.repeat_of) for row in (*trials, *own))
    number = len(trials) + sum(bool(row.repeat_of) for row in own)
    due = recipe.search.repeats * number * min(1, number / (recipe.search.trials if end is None else max(1, end)))
    is_early = end != 0 and number - repeated < startup_trials(recipe)
    if is_early or repeated >= round(due, 9):  # 0.55 * 20 is a little more than 11
        return None
    by_values: dict[str, list[TrialRow]] = {}
    for row in (*trials, *own):
        if not row.outside:
            by_values.setdefault(values_key(row), []).append(row)
    most = max((len(rows) for rows in by_values.values() if rows[0].kind == "trial"), default=0)
    may = {
        rows[0].name: rows
        for rows in by_values.values()
        if _may_be_repeated(rows) and (rows[0].kind == "trial" or len(rows) <= most)
    }
    chosen = _chosen(recipe, number, may, expected)
    if chosen is None:
        return None
    first, seed = may[chosen][0], recipe.train.seed
    used = {int(row.values.get("seed", seed)) for row in may[chosen]}
    return Repeat(first, next(at for k in itertools.count(1) if (at := (seed + k) % 2**63) not in used))


def _may_be_repeated(rows: Sequence[TrialRow]) -> bool:
    """Tells whether values may have one more training: the first one is complete, and none runs."""
    waits = any(row.outcome == "running" for row in rows)
    return rows[0].outcome == "complete" and not waits and len(rows) < MOST


def _chosen(
    recipe: Recipe, number: int, may: Mapping[str, Sequence[TrialRow]], expected: Expectation | None
) -> str | None:
    """Returns the first training of the values whose turn it is."""
    if expected is None:
        front = [(len(rows), rows[0].number, name) for name, rows in may.items() if any(row.standing for row in rows)]
        return min(front, default=(0, 0, None))[2]
    known = {name: expected.by_name[name] for name in may}
    least = min((each.order[:2] for each in known.values()), default=None)
    draws = expected.draws(np.random.default_rng([recipe.search.sampler.seed, number]))
    best = [(draws[name], name) for name, each in known.items() if each.order[:2] == least]
    return max(best, default=(0.0, None))[1]
