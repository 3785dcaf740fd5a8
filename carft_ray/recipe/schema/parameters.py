"""The parameters of a search space."""

import math
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from carft_ray.recipe.schema.fields import (
    REQUIRED,
    Config,
    Flag,
    Number,
    PositiveFloat,
    PositiveInt,
    Resume,
    key,
    not_searched,
    nothing_is_empty,
    plain_value,
)
from carft_ray.recipe.schema.fine_tuning import TrainConfig, field_kind

_MOST_STEPS = 10**9
# field of train -> why no search space may have it
NOT_SEARCHABLE = {name: why for name, field in TrainConfig.model_fields.items() if (why := not_searched(field))}
SEARCHABLE = tuple(key for key in TrainConfig.model_fields if key not in NOT_SEARCHABLE)
SPACE = Resume("space", "the sampler needs one space; earlier trials inside it still count")


def _choices(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise ValueError("must be a value of the other parameter, or a list of them")
    return tuple(plain_value(one) for one in values)


Choice = Annotated[bool | int | float | str | None, BeforeValidator(plain_value)]
Choices = Annotated[Any, BeforeValidator(_choices, json_schema_input_type=Choice | list[Choice])]
When = Annotated[dict[str, Choices], BeforeValidator(nothing_is_empty)]


class FloatParameter(Config):
    """A real number between two ends."""

    type: Literal["float"] = key("float", "float", SPACE)
    """kind of the parameter; if left out, it follows from the keys and the field"""
    low: Number = key(REQUIRED, 0.0001, SPACE)
    """lower bound, included; inside the field's own range"""
    high: Number = key(REQUIRED, 0.1, SPACE)
    """upper bound, included"""
    log: Flag = key(False, True, SPACE)
    """draw on a log scale; needs low > 0 and no step"""
    step: PositiveFloat | None = key(None, None, SPACE)
    """distance between the values that are drawn; divides high - low; 1 for an int parameter by default"""
    when: When = key({}, {"head_bias": True}, SPACE)
    """condition: a categorical parameter, and its value or values for which this one is drawn; otherwise the field
    keeps its value in `train`; not for `alpha`"""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, self.step)
        return self


class IntParameter(Config):
    """A whole number between two ends, both included; ``FloatParameter`` documents the keys."""

    type: Literal["int"] = key("int", "int", SPACE)
    low: Annotated[int, Field(strict=True)] = key(REQUIRED, 4, SPACE)
    high: Annotated[int, Field(strict=True)] = key(REQUIRED, 16, SPACE)
    log: Flag = key(False, True, SPACE)
    step: PositiveInt = key(1, 2, SPACE)
    when: When = key({}, {"head_bias": True}, SPACE)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        _check_ends(self.low, self.high, self.log, None if self.step == 1 else self.step)
        return self


class CategoricalParameter(Config):
    """One of a list of values."""

    type: Literal["categorical"] = key("categorical", "categorical", SPACE)
    choices: Annotated[tuple[Choice, ...], Field(min_length=1)] = key(REQUIRED, [0.05, 0.1], SPACE)
    """the values of a categorical parameter, without duplicates"""
    when: When = key({}, {"head_bias": True}, SPACE)

    @field_validator("choices")
    @classmethod
    def _differ(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({(isinstance(choice, bool), choice) for choice in choices}) < len(choices):
            raise ValueError(f"choices must differ, but got {list(choices)}")
        return choices


def decimal(value: float) -> Decimal:
    """Returns a number as it is written: 0.1 divides 0.9 then, which is not so for floats."""
    return Decimal(str(value))


def _check_ends(low: float, high: float, log: bool, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low <= high must hold, but got low={low}, high={high}")
    if log and low <= 0:
        raise ValueError(f"low > 0 must hold with log: true, but got low={low}")
    if log and step is not None:
        raise ValueError(f"log: true and step exclude each other, but got step={step}")
    if not math.isfinite(high - low):
        raise ValueError(f"high - low must be a finite number, but got low={low}, high={high}")
    if step is not None and (decimal(high) - decimal(low)) / decimal(step) > _MOST_STEPS:
        raise ValueError(f"low to high must have at most {_MOST_STEPS:,} steps, but got step={step}")
    if step is not None and (decimal(high) - decimal(low)) % decimal(step) != 0:
        raise ValueError(f"high - low must be a multiple of step, but got low={low}, high={high}, step={step}")


AnyParameter = FloatParameter | IntParameter | CategoricalParameter
Parameter = Annotated[AnyParameter, Field(discriminator="type")]


def name_types(space: Any) -> Any:
    """Names the type of each parameter that leaves it out: from `choices`, else from the field that it searches."""
    if not isinstance(space, dict):
        return nothing_is_empty(space)
    return {name: _name_type(name, parameter) for name, parameter in space.items()}


def _name_type(name: str, parameter: Any) -> Any:
    if not isinstance(parameter, dict) or "type" in parameter:
        return parameter
    if "choices" in parameter:
        return {"type": "categorical", **parameter}
    return {"type": "int" if field_kind(name) is int else "float", **parameter}


Searched: Any = Literal[SEARCHABLE]
Space = Annotated[
    dict[str, Parameter],
    BeforeValidator(name_types, json_schema_input_type=dict[Searched, AnyParameter]),  # `type` may be left out
]
