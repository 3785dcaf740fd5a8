"""Every key of a recipe, by the name that documents call it: ``train.epochs``, ``<set>.path``."""

import ast
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from carft_ray.recipe.fields import Config, Key, core_type, is_config, key_of, members
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
        part: The part of the recipe that has it; the most general kind of sets where several have it.
        field: Its field.
    """

    name: str
    part: type[Config]
    field: FieldInfo

    @property
    def key(self) -> Key:
        """What the documents say of it."""
        return key_of(self.field)

    @property
    def meaning(self) -> str:
        """Its meaning in one line; empty where another part of the same union documents the key."""
        return _docstrings(self.part).get(self.name.rpartition(".")[2], "")


@functools.cache
def documented_keys() -> tuple[DocumentedKey, ...]:
    """Returns every key in the order of the schema, those of sets and parameters last.

    A key that several kinds of sets or of parameters have stands once for each, unless they inherit it.
    """
    kinds = [(SET, kind) for kind in members(SetSpec)] + [(PARAMETER, kind) for kind in members(Parameter)]
    found = [*_keys(Recipe, ""), *(key for prefix, kind in kinds for key in _keys(kind, prefix))]
    return tuple({(key.name, key.part): key for key in found}.values())


def _keys(part: type[Config], prefix: str) -> Iterator[DocumentedKey]:
    inner = []
    for name, field in part.model_fields.items():
        kind = core_type(field.annotation)
        if is_config(kind):
            inner.append((kind, f"{prefix}{name}."))
        else:
            yield DocumentedKey(f"{prefix}{name}", _home(part, name), field)
    for kind, path in inner:
        yield from _keys(kind, path)


@functools.cache
def _docstrings(part: type[Config]) -> dict[str, str]:
    """Returns the docstrings under the fields of a part.

    Pydantic's ``use_attribute_docstrings`` reads them, too, but at every import: it adds a third to its time.
    """
    (node,) = ast.parse(inspect.getsource(part)).body
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(ast.iter_child_nodes(node))
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _home(part: type[Config], name: str) -> type[Config]:
    """Returns the most general part that has a field."""
    bases = [base for base in part.__mro__ if issubclass(base, Config) and name in base.model_fields]
    return bases[-1]
