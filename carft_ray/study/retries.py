"""How often a training gets another attempt.

An attempt advances when it leaves a newer checkpoint than the failed one before it. There is no limit while attempts
advance. Of attempts in a row that do not, the second exception is a verdict, and after ``LOST_ATTEMPTS`` the training
is set aside and the others continue.
"""

from typing import Any

from carft_ray.study.attributes import STUCK
from carft_ray.study.journal import Journal
from carft_ray.study.training import TrialSpec

ERRORS = 2  # attempts that end with an exception, none advancing, before the study gets the outcome
LOST_ATTEMPTS = 5  # attempts in a row that do not advance before a training is set aside


def count(journal: Journal, spec: TrialSpec, progress: list[int], is_error: bool = False) -> dict[str, Any]:
    """Counts an attempt that was lost or has ended with an exception, once.

    Args:
        journal: Where it is noted.
        spec: The attempt.
        progress: Of its newest checkpoint (``attempt_files.progress_of``).
        is_error: Whether it has ended with an exception.

    Returns:
        Since an attempt has advanced: ``number`` of such attempts, ``errors`` among them; and ``progress`` now.
    """
    none: dict[str, Any] = {"attempt": 0, "progress": [0, 0], "number": 0, "errors": 0}
    before = journal.attribute(spec, STUCK) or none
    if before["attempt"] == spec.attempt:
        return dict(before)
    before = none if progress > before["progress"] else before
    numbers = {"number": before["number"] + 1, "errors": before["errors"] + is_error}
    found = {"attempt": spec.attempt, "progress": progress, **numbers}
    journal.note(spec, {STUCK: found})
    return found


def is_verdict(found: dict[str, Any]) -> bool:
    """Tells whether exceptions, counted by ``count``, are the outcome of the training."""
    return bool(found["errors"] >= ERRORS)


def is_last(found: dict[str, Any]) -> bool:
    """Tells whether a training is set aside after the attempts that ``count`` has counted."""
    return bool(found["number"] >= LOST_ATTEMPTS)


def has_advanced(found: dict[str, Any]) -> bool:
    """Tells whether the attempt that ``count`` has counted last left a newer checkpoint than the one before."""
    return bool(found["number"] == 1 and found["progress"] > [0, 0])
