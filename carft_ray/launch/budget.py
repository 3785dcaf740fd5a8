"""The budget of a search: when it is used up, and what to do if no trial was complete by then.

A running training needs a while for its end, and an evaluation is finished first. So a budget asks earlier, by the
longest such while seen in this search.

    margin = min(LEAST_MARGIN_S + longest while, limit / 4)

A trial that cannot end within the rest is begun all the same: it leaves a checkpoint, and ``resume`` continues it.
"""

import math
from collections.abc import Sequence

from carft_ray.errors import BudgetError, Problem
from carft_ray.recipe.schema.recipe import BudgetConfig, Recipe
from carft_ray.study.training import TrialRow
from carft_ray.words import counted

BUDGET_STOP = "budget: "  # how the reason begins when the budget is used up; what follows is the limit
LEAST_MARGIN_S = 5.0  # Ray's own end, table and figure
LARGEST_MARGIN = 0.25  # of the limit


def used_up(limits: BudgetConfig, elapsed_s: float, gpu_s: float, gpus: float = 0.0, longest_end_s: float = 0.0) -> str:
    """Returns which limit is reached, as a sentence without a full stop; empty when none is.

    Args:
        limits: The budget of the recipe.
        elapsed_s: Seconds since this search began.
        gpu_s: GPU seconds of all attempts of the study, those that run included.
        gpus: GPUs that running trainings hold; they hold them until they have ended.
        longest_end_s: The longest that a training took to end, or to make a step, as far as was seen.
    """
    if limits.wall_time is not None and elapsed_s >= limits.wall_time - margin_s(limits.wall_time, longest_end_s):
        return f"the wall time is used up (budget.wall_time, {limits.wall_time:g} s)"
    if limits.gpu_hours is not None:
        limit_s = limits.gpu_hours * 3600
        margin = min(gpus * longest_end_s, LARGEST_MARGIN * limit_s)
        if gpu_s >= limit_s - margin:
            return f"{gpu_s / 3600:.3g} GPU hours are used (budget.gpu_hours, {limits.gpu_hours:g})"
    return ""


def expected_end(limits: BudgetConfig, elapsed_s: float, gpu_s: float, before: int, begun: int) -> int | None:
    """Returns at how many trials the budget will end the search, if trials go on to begin as fast as before.

    Args:
        limits: The budget of the recipe.
        elapsed_s: Seconds since this search began.
        gpu_s: GPU seconds of all attempts of the study, those that run included.
        before: Trials that had begun before this search.
        begun: All trials that have begun.

    Returns:
        None if no limit is set, or nothing is used yet.
    """
    ends = []
    if limits.wall_time and elapsed_s > 0:
        ends.append(before + (begun - before) * max(1.0, limits.wall_time / elapsed_s))
    if limits.gpu_hours and gpu_s > 0:
        ends.append(begun * max(1.0, limits.gpu_hours * 3600 / gpu_s))
    return math.ceil(min(ends)) if ends else None


def margin_s(limit_s: float, longest_end_s: float) -> float:
    """Returns how many seconds before the limit trainings are asked to stop."""
    return min(LEAST_MARGIN_S + longest_end_s, LARGEST_MARGIN * limit_s)


def nothing_within_budget(recipe: Recipe, rows: Sequence[TrialRow], ended: str, again: str) -> BudgetError:
    """Returns the error of a search whose budget was used up before a trial was complete.

    Args:
        recipe: Of the search.
        rows: Its trials.
        ended: Which limit is reached (``used_up``).
        again: The command that continues it.
    """
    begun = sum(row.outcome == "running" for row in rows)
    rule = f"{ended}, and no trial is complete" + (f"; {counted(begun, 'trial')} stopped" if begun else "")
    hours = recipe.budget.gpu_hours
    more = f"--set budget.gpu_hours={2 * hours:g}" if hours is not None and "gpu_hours" in ended else "--wall-time 8h"
    return BudgetError(Problem("budget", rule, next_step=f"Give more and continue with: {again} {more}"))
