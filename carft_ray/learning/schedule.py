"""Learning rate by step: linear warm-up, then a cosine to 0 (as coded in wise-ft, `src/models/utils.py`)."""

import math


def num_warmup_steps(asked: int | None, num_steps: int) -> int:
    """Returns the warm-up length: what was asked for, else ``min(500, 10 % of the steps)``, never all steps."""
    warmup = min(500, num_steps // 10) if asked is None else asked
    return min(warmup, max(num_steps - 1, 0))


def learning_rate_at(step: int, peak: float, warmup: int, num_steps: int) -> float:
    """Returns the learning rate of update ``step`` (from 0).

    ``peak * (step + 1) / warmup`` while ``step < warmup``, then
    ``peak * (1 + cos(pi * (step - warmup) / (num_steps - warmup))) / 2``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
