"""Counts and values in words, for messages and tables, and how long something will take."""

import math
import time
from collections.abc import Callable
from typing import Any

FIRST_AFTER_S, THEN_EVERY_S = 3.0, 10.0  # between messages of progress


def counted(number: float, noun: str) -> str:
    """Returns a number with its noun: ``1 trial``, ``0 trials``, ``12,000 trials``, ``0.5 points``.

    Args:
        number: A count, or an amount.
        noun: In the singular; its plural takes an s, or ies for a y.
    """
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{text} {noun if number == 1 else plural}"


def counted_trainings(number: int, kind: str) -> str:
    """Returns a number with what a search (``trial``) or a confirm (``confirm``) counts."""
    return counted(number, "trial") if kind == "trial" else f"{counted(number, 'training')} with fresh seeds"


def value_text(value: Any) -> str:
    """Returns a hyperparameter in few digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def times(number: int) -> str:
    """Returns ``once`` or ``n times``."""
    return "once" if number == 1 else f"{number} times"


def time_left(
    say: Callable[[str], None], what: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Returns a callback (done, in all) that says how long the rest will take, at most every ten seconds.

    Args:
        say: Takes a line; nothing in the first three seconds.
        what: What is done.
        clock: Seconds.
    """
    next_at = clock() + FIRST_AFTER_S
    first: tuple[float, int] | None = None  # when the first call came, and how much was done by then

    def on_progress(done: int, total: int) -> None:
        nonlocal next_at, first
        now = clock()
        began, before = first = first or (now, done)
        if now >= next_at and before < done < total:
            left_s = (now - began) * (total - done) / (done - before)
            left = f"{left_s:.0f} s" if left_s < 120 else counted(math.ceil(left_s / 60), "minute")
            say(f"{what}: {done:,} of {total:,}, about {left} left")
            next_at = now + THEN_EVERY_S

    return on_progress
