"""Every key of a recipe, by the name that documents call it: ``train.epochs``, ``<set>.path``."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from carft_ray.recipe.fields import Key, Part, core_type, is_part, key_of, members
from carft_ray.recipe.parameters import Parameter
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.sets import SetSpec

SET = "<set>."  # before the keys of a set, whatever its role
PARAMETER = "search.space.<parameter>."


@dataclass(frozen=True)
class DocumentedKey:
    """A key of a recipe.

    Attributes:
        name: Its name in documents.
        part: The part of the recipe that it belongs to; of a kind of set, that kind.
        field: Its field.
    """

    name: str
    part: type[Part]
    field: FieldInfo

    @property
    def key(self) -> Key:
        """What users are told of it."""
        return key_of(self.field)


@functools.cache
def documented_keys() -> tuple[DocumentedKey, ...]:
    """Returns every key in the order of the schema; one that several kinds of sets have stands once for each."""
    kinds = [(SET, kind) for kind in members(SetSpec)] + [(PARAMETER, kind) for kind in members(Parameter)]
    return (*_keys(Recipe, ""), *(key for prefix, kind in kinds for key in _keys(kind, prefix)))


def _keys(part: type[Part], prefix: str) -> Iterator[DocumentedKey]:
    inner = []
    for name, field in part.model_fields.items():
        kind = core_type(field.annotation)
        if is_part(kind):
            inner.append((kind, f"{prefix}{name}."))
        else:
            yield DocumentedKey(f"{prefix}{name}", part, field)
    for kind, path in inner:
        yield from _keys(kind, path)
