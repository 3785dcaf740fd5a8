"""The budget of a search: when it asks its trainings to stop, so that it ends with its best within the limit.

A running training needs a while to end: it looks for a stop every few steps, writes a checkpoint, and an evaluation at
its end is finished first. So the stop is asked for earlier, by the longest such while seen in this search.

    margin = min(LEAST_MARGIN_S + longest while, limit / 4)

A trial that cannot end within the rest is begun all the same: it leaves a checkpoint, and ``resume`` goes on with it.
"""

from carft_ray.recipe.schema import BudgetConfig

LEAST_MARGIN_S = 5.0  # Ray's own end, table and figure
LARGEST_MARGIN = 0.25  # of the limit


def used_up(limits: BudgetConfig, elapsed_s: float, gpu_s: float, gpus: float = 0.0, longest_end_s: float = 0.0) -> str:
    """Returns which limit is reached, as a sentence without a full stop; empty when none is.

    Args:
        limits: The budget of the recipe.
        elapsed_s: Seconds since this search began.
        gpu_s: GPU seconds of all attempts of the study, those that run included.
        gpus: GPUs that running trainings hold; they go on holding them until they have ended.
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


def margin_s(limit_s: float, longest_end_s: float) -> float:
    """Returns how many seconds before the limit trainings are asked to stop."""
    return min(LEAST_MARGIN_S + longest_end_s, LARGEST_MARGIN * limit_s)
