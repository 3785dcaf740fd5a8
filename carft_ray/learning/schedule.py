"""Learning rate by step: linear warm-up, then a cosine to 0 (as coded in wise-ft, `src/models/utils.py`)."""

import math

from carft_ray.recipe.schedule import num_warmup_steps

__all__ = ["learning_rate_at", "num_warmup_steps"]


def learning_rate_at(step: int, peak: float, warmup: int, num_steps: int) -> float:
    """Returns the learning rate of update ``step`` (from 0).

    ``peak * (step + 1) / warmup`` while ``step < warmup``, then
    ``peak * (1 + cos(pi * (step - warmup) / (num_steps - warmup))) / 2``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
