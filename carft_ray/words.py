"""Counts in words, for messages and tables, and how long something will take."""

import time
from collections.abc import Callable

FIRST_AFTER_S, THEN_EVERY_S = 3.0, 10.0  # when it is told how far something is


def counted(number: float, noun: str) -> str:
    """Returns a number with its noun: ``1 trial``, ``0 trials``, ``12,000 trials``, ``0.5 points``.

    Args:
        number: A count, or an amount.
        noun: In the singular; its plural takes an s, or ies for a y.
    """
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{text} {noun if number == 1 else plural}"


def times(number: int) -> str:
    """Returns ``once`` or ``n times``."""
    return "once" if number == 1 else f"{number} times"


def told_time_left(
    say: Callable[[str], None], what: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Returns a callback (done, in all) that tells how long the rest will take, at most every ten seconds.

    Args:
        say: Told a line; nothing in the first three seconds.
        what: What is done.
        clock: Seconds.
    """
    began, before = clock(), 0  # before: done when it began, where work that was cut off is resumed
    next_at = began + FIRST_AFTER_S

    def on_progress(done: int, total: int) -> None:
        nonlocal began, before, next_at
        now = clock()
        if not before:
            began, before = now, done
        if now >= next_at and before < done < total:
            left_s = (now - began) * (total - done) / (done - before)
            say(f"{what}: {done:,} of {total:,}, about {left_s:.0f} s left")
            next_at = now + THEN_EVERY_S

    return on_progress
