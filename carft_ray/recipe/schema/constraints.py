"""The constraints of a search: their keys and names, and the words for a violation. Nothing is measured here.

A violation is a difference of fractions: 0 or less where the constraint is met. Measured ones stand among the metrics
of a training under ``violation/<name>``.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from carft_ray.recipe.schema.fields import Config, Fraction, Resume, SetName, key, nothing_is_empty

VIOLATION = "violation/"  # before the name of a constraint, in metrics
ID_DROP = "id_drop"
ALPHA = Resume("identity", "part of the choice of alpha")


class ConstraintsConfig(Config):
    """What the chosen weights of a trial must keep; part of its choice of alpha, and passed to the sampler."""

    id_drop: Annotated[dict[SetName, Fraction], BeforeValidator(nothing_is_empty)] = key({}, {"zero_shot": 0.01}, ALPHA)
    """ID accuracy that may be lost under `zero_shot` or a baseline; trials wait for it"""


def constraint_names(constraints: ConstraintsConfig) -> tuple[str, ...]:
    """Returns the names of all constraints, ``id_drop/<baseline>``."""
    return tuple(f"{ID_DROP}/{name}" for name in constraints.id_drop)


def violations(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the measured violations among metrics, by the name of the constraint."""
    return {name.removeprefix(VIOLATION): value for name, value in metrics.items() if name.startswith(VIOLATION)}


def total_violation(metrics: Mapping[str, float]) -> float:
    """Returns the sum of the positive parts of the violations among metrics; 0 means that all constraints are met."""
    return sum(max(0.0, value) for value in violations(metrics).values())


def violation_words(metrics: Mapping[str, float]) -> str:
    """Returns which constraints are missed and by how much: ``violates id_drop zero_shot by 0.6 points``; else ''."""
    missed = {name.replace("/", " "): 100 * value for name, value in violations(metrics).items() if value > 0}
    words = [f"{name} by {value:{'.1f' if value >= 0.1 else '.1g'}} points" for name, value in missed.items()]
    return "violates " + " and ".join(words) if words else ""
