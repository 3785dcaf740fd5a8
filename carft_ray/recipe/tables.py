"""Writes the tables of keys in the documents, from the fields of the schema: ``python -m carft_ray.recipe.tables``.

A table is between ``<!-- keys: NAME -->`` and ``<!-- end -->``; everything else is written by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from carft_ray.recipe.fields import Resume, core_type, members
from carft_ray.recipe.fine_tuning import TrainConfig
from carft_ray.recipe.keys import SET, DocumentedKey, documented_keys

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}  # limits of a field, the lower ones first
TABLE = re.compile(r"(<!-- keys: ([^\n]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def key_tables() -> dict[str, list[str]]:
    """Returns the tables that explain every key, as lines by name: ``train``, ``search.alpha``, ``folder``."""
    rows: dict[str, dict[str, list[DocumentedKey]]] = {}
    for key in documented_keys():
        rows.setdefault(_table_of(key), {}).setdefault(key.name, []).append(key)
    head = ["| key | meaning | type | default | range | example |", "|---|---|---|---|---|---|"]
    return {table: [*head, *(_row(keys) for keys in named.values())] for table, named in rows.items()}


def resume_tables() -> dict[str, list[str]]:
    """Returns the tables that say which keys may change freely when a study is resumed, and which never change."""
    names: dict[Resume, dict[str, None]] = {}
    for key in documented_keys():
        names.setdefault(key.key.resume, {})[f"`{key.name}`"] = None
    head = ["| key | why |", "|---|---|"]
    rows = [(resume, _line(", ".join(of), resume.why)) for resume, of in names.items()]
    return {kind: [*head, *(row for resume, row in rows if resume.kind == kind)] for kind in ("running", "identity")}


DOCUMENTS = {"search_spaces/README.md": key_tables, "docs/resume.md": resume_tables}


def updated(text: str, tables: Mapping[str, Sequence[str]]) -> str:
    """Returns a document with the tables in their places.

    Raises:
        ValueError: The document has not one place for each table.
    """
    places = [name for _, name, _ in TABLE.findall(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(f"must have one place for each of {sorted(tables)}, but got {sorted(places)}")
    return TABLE.sub(lambda found: "".join((found[1], *(f"{line}\n" for line in tables[found[2]]), found[3])), text)


def _table_of(key: DocumentedKey) -> str:
    if not key.name.startswith(SET):
        return key.name.rpartition(".")[0] or "recipe"
    # what a kind of sets adds to a more general one
    return "set" if key.name == f"{SET}source" else key.part.__name__.removesuffix("Set").lower()


def _row(keys: Sequence[DocumentedKey]) -> str:
    """Returns the row of a key; of several for a key that kinds of sets or of parameters share."""
    key, field = keys[0].key, keys[0].field
    types = key.type or " or ".join(dict.fromkeys(_type_words(one.field.annotation) for one in keys))
    ranges = key.range or ", ".join(_range_words(one) for one in keys)
    mark = "* " if keys[0].part is TrainConfig and not key.not_searched else ""
    default, example = key.left_out or _default_words(field), f"`{key.example}`"
    return _line(f"`{keys[0].name}`", f"{mark}{keys[0].meaning}", types, default, ranges, example)


def _line(*cells: str) -> str:
    return " | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip()


def _type_words(annotation: Any) -> str:
    """Returns a type as the tables call it."""
    kind = core_type(annotation)
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return "set" if members(kind) else " or ".join(_type_words(one) for one in inner if one is not NoneType)
    if get_origin(kind) is tuple:
        return f"list of {_type_words(inner[0])}"
    if get_origin(kind) is dict:
        return f"name: {_type_words(inner[1])}"
    kind = type(inner[0]) if get_origin(kind) is Literal else kind
    return {str: "text", int: "int", float: "float", bool: "bool"}[kind]


def _default_words(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    written = value if isinstance(value, str) else json.dumps(value).replace("e-0", "e-")
    return f"`{written}`"


def _range_words(key: DocumentedKey) -> str:
    """Returns the range of a key as its type and its limits say it.

    Raises:
        ValueError: They say nothing.
    """
    annotation = key.field.annotation
    kind = core_type(annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    optional = [part.__metadata__ for part in get_args(annotation) if get_origin(part) is Annotated]
    inside = [about for metadata in optional for about in metadata if isinstance(about, FieldInfo)]
    limits = [*key.field.metadata, *(limit for about in inside for limit in about.metadata)]
    bounds = {sign: getattr(one, name) for name, sign in SIGNS.items() for one in limits if hasattr(one, name)}
    if not bounds:
        raise ValueError(f"{key.name} needs words for its range")
    words = [(sign, _number(bound)) for sign, bound in bounds.items()]
    if len(words) == 1:
        return " ".join(words[0])
    (above, low), (below, high) = words
    return f"{low} {above.replace('>', '<')} x {below} {high}"


def _number(value: float) -> str:
    whole = int(value)
    return f"2**{whole.bit_length() - 1}" if whole > 10**6 and whole.bit_count() == 1 else str(value)


def main(arguments: Sequence[str], root: Path = Path(__file__).parents[2]) -> str | None:
    """Writes the tables, or with ``--check`` returns what to run when one is not as the schema has it."""
    parser = argparse.ArgumentParser(description="Writes the tables of keys in the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a table is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for name, tables in DOCUMENTS.items():
        text = (root / name).read_text(encoding="utf-8")
        if (new := updated(text, tables())) != text:
            stale.append(name)
            if not check:
                (root / name).write_text(new, encoding="utf-8")
    return f"{', '.join(stale)}: tables are not as the schema has them; run: make tables" if check and stale else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
