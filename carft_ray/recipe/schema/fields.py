"""What the fields of a recipe are made of: their base class, the types of values, and what a field says of its key."""

import re
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo


def seconds_of(value: Any) -> Any:
    """Reads 90, '90s', '45m', '8h', '1h30m' as seconds."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", value.strip())
    if found is None or not any(found.groups()):
        raise ValueError("must be seconds, or a text such as 45m, 8h or 1h30m")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


# Strict: true is no number, '3' is no number, 1 is not true.
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$")]  # files and folders are named so
DurationText = Annotated[str, Field(pattern=r"^(\d+[dhms])+$")]  # for editors; ``seconds_of`` checks the order
Duration = Annotated[PositiveFloat, BeforeValidator(seconds_of, json_schema_input_type=PositiveFloat | DurationText)]
T = TypeVar("T")


Class = Literal["identity", "space", "running"]
# a field whose text is a path, or one if it is no address, after ``local-dir:``, or no tag of open_clip
PathIn = Literal["", "path", "study", "model", "weights"]
REQUIRED: Any = ...  # in place of a default


class Config(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused. The docstring under a field is its meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return nothing_is_empty(value)


class Resume(NamedTuple):
    """Whether a key may change between two searches of one study, and why.

    Attributes:
        kind: ``identity`` never changes, ``space`` with ``--change-space``, ``running`` freely.
        why: The reason.
    """

    kind: Class
    why: str


def key(default: T, example: Any, resume: Resume, not_searched: str = "", path_in: PathIn = "") -> T:
    """Makes a field.

    Args:
        default: Its default, or ``REQUIRED``.
        example: A value, as a recipe has it.
        resume: Whether it may change when a study is resumed.
        not_searched: Of a field of ``train``: why no search space may have it.
        path_in: Which of its texts, or of those in its list, are or contain a path.
    """
    said: dict[str, Any] = {"resume": resume, "not_searched": not_searched, "path_in": path_in}
    field: T = Field(default, examples=[example], json_schema_extra=said)
    return field


def resume_of(field: FieldInfo) -> Resume | None:
    """Returns whether a key may change; None for a part of a recipe, whose keys say it."""
    return cast(dict[str, Any], field.json_schema_extra or {}).get("resume")


def not_searched(field: FieldInfo) -> str:
    """Returns why no search space may have a field of ``train``; empty where one may."""
    return str(cast(dict[str, Any], field.json_schema_extra)["not_searched"])


def path_in(field: FieldInfo) -> PathIn:
    """Returns which texts of a field are paths; empty if none is."""
    return cast(PathIn, cast(dict[str, Any], field.json_schema_extra or {}).get("path_in", ""))


def core_type(annotation: Any) -> Any:
    """Strips ``Annotated`` and ``| None`` from a type."""
    while True:
        others = [argument for argument in get_args(annotation) if argument is not NoneType]
        if get_origin(annotation) is Annotated or (len(others) == 1 and NoneType in get_args(annotation)):
            annotation = others[0]
        else:
            return annotation


def is_config(kind: Any) -> bool:
    """Returns whether a type is a part of a recipe."""
    return isinstance(kind, type) and issubclass(kind, Config)


def members(kind: Any) -> list[type[Config]]:
    """Returns the parts of a union of parts, else nothing."""
    return [member for member in get_args(core_type(kind)) if is_config(member)]


def field_of(kind: Any, name: str | int) -> FieldInfo | None:
    """Returns the field of a part of a recipe, of the first in a union that has it; None where none has."""
    parts = members(kind) or [core_type(kind)]
    fields = (part.model_fields.get(str(name)) for part in parts if is_config(part))
    return next((field for field in fields if field is not None), None)


def distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses a name that occurs twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"must not contain a name twice, but got {', '.join(twice)}")
    return names


def nothing_is_empty(value: Any) -> Any:
    """A key with nothing behind it (every line under it is a comment) is an empty mapping."""
    return {} if value is None else value


def plain_value(value: Any) -> Any:
    """Refuses lists and mappings."""
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError("must be a number, a text, true, false or null")
    return value
