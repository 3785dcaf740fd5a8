"""Counts in words, for messages and tables."""


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
