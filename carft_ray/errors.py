"""Exceptions with exit codes, and the form of every message about bad input.

All exceptions pass everything to ``Exception.__init__`` positionally, so that they survive the pickling
with which Ray moves them between processes.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

_IS_RULE = re.compile(r"\b(must|needs?|should|may|can|cannot|takes)\b")

SHOWN_PLACES = 3  # of one problem


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    Attributes:
        place: Where: file, line, key path, or the option of the command.
        rule: What must hold, or what is so, as a sentence without a full stop.
        value: What was given instead, or what it is about, already as text; empty when there is nothing to show.
        allowed: The values that would do, when they can be listed.
        nearest: The allowed value that is most similar to the given one.
        next_step: What to do now.
        path: Of a recipe's value, its key path, by which its file and line are found; no part of the message.
    """

    place: str
    rule: str
    value: str = ""
    allowed: tuple[str, ...] = ()
    nearest: str | None = None
    next_step: str = ""
    path: tuple[str | int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        text = f"{self.place}: {self.rule}" if self.place else self.rule
        if self.value:
            text += f", but got {self.value}" if _IS_RULE.search(self.rule) else f": {self.value}"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        if self.allowed:
            shown = ", ".join(self.allowed[:20]) + (", ..." if len(self.allowed) > 20 else "")
            text += f" (allowed: {shown})"
        if self.next_step:
            text += f"\n    {self.next_step}"
        return text


def together(problems: Iterable[Problem]) -> list[Problem]:
    """Returns problems in their order; those that differ in their place only are one."""
    places: dict[Problem, list[str]] = {}
    for problem in problems:
        places.setdefault(replace(problem, place=""), []).append(problem.place)
    found = []
    for problem, named in places.items():
        more = f" and {len(named) - SHOWN_PLACES} more" if len(named) > SHOWN_PLACES else ""
        found.append(replace(problem, place=", ".join(named[:SHOWN_PLACES]) + more))
    return found


class CarftError(Exception):
    """Base of all errors that carft-ray raises for a user's mistake or a broken environment.

    Args:
        problems: All problems at once, or a plain message.
    """

    exit_code = 1

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        super().__init__(problems)
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class UsageError(CarftError):
    """The command line asks for something impossible."""

    exit_code = 2


class RecipeError(CarftError):
    """The recipe, or a value set over it, is not valid."""

    exit_code = 3


class DataError(CarftError):
    """Images, folders, class lists or model weights are missing or do not match the recipe."""

    exit_code = 4


class StorageError(CarftError):
    """A file cannot be written or read back: no space, no permission, a damaged checkpoint or study."""

    exit_code = 5


class ClusterError(CarftError):
    """Ray cannot be reached, or cannot provide the resources of a trial."""

    exit_code = 5


class MachineError(ClusterError):
    """A worker, node, connection, device or disk failed; the training is retried.

    Args:
        problems: As for ``CarftError``.
        rank: The worker on whose machine it failed; None if unknown.
    """

    def __init__(self, problems: str | Problem | Sequence[Problem], rank: int | None = None) -> None:
        super().__init__(problems)
        self.args = (problems, rank)
        self.rank = rank


class OutOfMemoryError(CarftError):
    """The device has no memory for a training or an evaluation; it is retried with less.

    Args:
        problems: As for ``CarftError``.
        micro_batch: Images of the forward pass that a training wanted; 0 if a smaller one would not help.
    """

    exit_code = 5

    def __init__(self, problems: str | Problem | Sequence[Problem], micro_batch: int = 0) -> None:
        super().__init__(problems)
        self.args = (problems, micro_batch)
        self.micro_batch = micro_batch


class NoSuccessfulTrialError(CarftError):
    """The search ended and no trial has an objective."""

    exit_code = 6


class BudgetError(CarftError):
    """The budget was used up before there was a result."""

    exit_code = 7


class HoldOutError(CarftError):
    """A test set would be seen by something that must not see it."""

    exit_code = 8


class DivergedError(CarftError):
    """The numbers of a training are no longer finite; this is a failed trial, not a failed machine."""

    exit_code = 6


class InterruptedRunError(CarftError):
    """Stopped on request; everything needed to resume is on disk."""

    exit_code = 130


def interruption(what: str, resume_command: str) -> InterruptedRunError:
    """Returns the error of a command that was stopped, with the command that resumes it."""
    step = f"Resume with: {resume_command}" if resume_command else ""
    return InterruptedRunError(Problem("", what, next_step=step))


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """Returns the allowed word that is most similar to ``value``, or None when none is close."""
    return next(iter(difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.6)), None)


def require_choice(place: str, rule: str, value: str, allowed: Iterable[str]) -> None:
    """Raises a ``UsageError`` for a value that is none of those allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise UsageError(Problem(place, rule, repr(value), allowed, nearest(value, allowed)))
