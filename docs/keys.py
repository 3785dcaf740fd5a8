"""Writes the generated reference: tables of recipe keys, commands and their options, of methods and of comparisons that
are kept, the JSON schema for editors, and the list of all that users write.

``python docs/keys.py`` writes them; with ``--check`` it fails if one is stale. A generated part is between
``<!-- keys: NAME -->`` and ``<!-- end -->``; everything else in a document is written by hand.
"""

import argparse
import functools
import inspect
import io
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import typer
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from ruamel.yaml import YAML

import carft_ray
from carft_ray.cli import app
from carft_ray.recipe.methods import methods
from carft_ray.recipe.presets import SCHEMA
from carft_ray.recipe.schema.data import SetSpec
from carft_ray.recipe.schema.fields import Config, core_type, is_config, members, resume_of
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import SEARCHABLE, AnyParameter, AnyPruner, AnySampler
from carft_ray.recipe.schema.train import TrainConfig

Schema = dict[str, Any]
Tables = dict[str, list[str]]

SURFACE = "tests/surface.txt"  # a new line in it is a promise for years
ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "tables"  # ``methods.json`` of each comparison that docs/results.md shows
SET = "<set>."  # before the keys of a set, whatever its role
KINDS = {
    SET: SetSpec,
    "search.space.<parameter>.": AnyParameter,
    "search.sampler.": AnySampler,
    "search.pruner.": AnyPruner,
}
TABLE = re.compile(r"(<!-- keys: ([^\n]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
TYPES = {"string": "text", "integer": "int", "number": "float", "boolean": "bool"}
WORDS = {str: "text", bool: "bool", int: "int", float: "float", Path: "path"}  # of a value's own type


class DocumentedKey(NamedTuple):
    """A key by the name that documents call it, the most general part of a recipe that has it, and its field."""

    name: str
    part: type[Config]
    field: FieldInfo


class Untitled(GenerateJsonSchema):
    """Without a title for each key, which would be its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def whole_schema() -> dict[str, Any]:
    """Returns the JSON schema of a recipe as editors read it: a part with nothing behind its key is an empty one."""
    return _for_editors(Recipe.model_json_schema(schema_generator=Untitled)) | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of carft-ray",
    }


def _for_editors(node: Any) -> Any:
    if isinstance(node, list):
        return [_for_editors(one) for one in node]
    if not isinstance(node, dict):
        return node
    node = {name: _for_editors(one) for name, one in node.items() if name not in ("resume", "not_searched", "path_in")}
    if "$ref" in node or isinstance(node.get("default"), (dict, list)):
        node.pop("default", None)  # an editor would write it out
    if "patternProperties" in node:
        node["additionalProperties"] = False
    if node.get("type") == "object":
        node["type"] = ["object", "null"]
    if isinstance(node.get("description"), str):
        node["description"] = " ".join(node["description"].split())
    return node


# ---- the keys


def documented_keys() -> list[DocumentedKey]:
    """Returns every key, those of ``KINDS`` last, each once for a kind that has it."""
    kinds = [(prefix, kind) for prefix, union in KINDS.items() for kind in members(union)]
    found = [*_keys(Recipe, ""), *(key for prefix, kind in kinds for key in _keys(kind, prefix))]
    return list({(key.name, key.part): key for key in found}.values())


def _keys(part: type[Config], prefix: str) -> Iterator[DocumentedKey]:
    inner = []
    for name, field in part.model_fields.items():
        kind = core_type(field.annotation)
        if is_config(kind):
            inner.append((kind, f"{prefix}{name}."))
        elif resume_of(field):  # else it has several kinds, whose keys say it
            homes = [base for base in part.__mro__ if is_config(base) and name in base.model_fields]
            yield DocumentedKey(f"{prefix}{name}", homes[-1], field)
    for kind, path in inner:
        yield from _keys(kind, path)


def key_tables() -> Tables:
    """Returns the tables that explain every key, as lines by name: ``train``, ``search.alpha``, ``folder``."""
    rows = {}
    for name, part, field in documented_keys():
        table = name.rpartition(".")[0] or "recipe"
        if name.startswith(SET):  # what a kind of sets adds to a more general one
            table = "set" if name == f"{SET}source" else part.__name__.removesuffix("Set").lower()
        rows.setdefault(table, {}).setdefault(name, []).append((part, field))
    head = ["| key | meaning | type | default | range | example |", "|---|---|---|---|---|---|"]
    return {table: [*head, *(_row(name, found) for name, found in named.items())] for table, named in rows.items()}


def resume_tables() -> Tables:
    """Returns the tables that say which keys may change freely when a study is resumed, and which never change."""
    names = {}
    for name, _, field in documented_keys():
        names.setdefault(resume_of(field), {})[f"`{name}`"] = None
    head = ["| key | why |", "|---|---|"]
    rows = [(resume, _line(", ".join(of), resume.why)) for resume, of in names.items()]
    return {kind: [*head, *(row for resume, row in rows if resume.kind == kind)] for kind in ("running", "identity")}


def _row(name: str, found: list[tuple[type[Config], FieldInfo]]) -> str:
    """Returns the row of a key: its parts, of which kinds of sets or of parameters may be several, and its fields."""
    key, parts = name.rpartition(".")[2], [part for part, _ in found]
    schemas = [_schema_of(part) for part in parts]
    first, required = schemas[0]["properties"][key], key in schemas[0].get("required", ())
    branches = [branch for schema in schemas for branch in _branches(schema["properties"][key])]
    types = " or ".join(dict.fromkeys(filter(None, map(_type_words, branches))))
    ranges = "; ".join(dict.fromkeys(filter(None, map(_range_words, branches))))
    mark = "* " if parts[0] is TrainConfig and key in SEARCHABLE else ""
    default = "required" if required else f"`{flow(first['default'])}`"
    meaning = " ".join(first["description"].split())
    return _line(f"`{name}`", f"{mark}{meaning}", types, default, ranges, f"`{flow(found[0][1].examples[0])}`")


@functools.cache
def _schema_of(part: type[Config]) -> Schema:
    return part.model_json_schema(schema_generator=Untitled)


def _line(*cells: str) -> str:
    return " | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip()


def _branches(schema: Schema) -> list[Schema]:
    return schema.get("anyOf") or [schema]


def _type_words(schema: Schema) -> str:
    if "oneOf" in schema:
        return "set"
    if "items" in schema or "prefixItems" in schema:
        inner = schema["items"] if "items" in schema else schema["prefixItems"][0]
        return f"list of {' or '.join(filter(None, map(_type_words, _branches(inner)))) or 'value'}"
    if "$ref" in schema or schema.get("type") == "object":
        return "mapping"
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return " or ".join(dict.fromkeys(WORDS[type(value)] for value in values)) or TYPES.get(schema.get("type"), "")


def _range_words(schema: Schema) -> str:
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values or schema.get("type") == "boolean":
        return ", ".join(f"`{flow(value)}`" for value in values or (True, False))
    words = [(sign, _number(schema[name])) for name, sign in SIGNS.items() if name in schema]
    if len(words) == 2:
        (above, low), (below, high) = words
        return f"{low} {above.replace('>', '<')} x {below} {high}"
    if words:
        return " ".join(words[0])
    return f"at least {schema['minItems']}" if "items" in schema and "minItems" in schema else ""


def _number(value: float) -> str:
    whole = int(value)
    return f"2**{whole.bit_length() - 1}" if whole > 10**6 and whole.bit_count() == 1 else str(value)


def flow(value: object) -> str:
    """Returns a value as YAML on one line."""
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = True, 10**6, True
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump({"x": value}, stream)
    written = stream.getvalue().strip().removeprefix("{x: ").removesuffix("}")
    return re.sub(r"(?<=\d)e-0(?=\d)", "e-", written)


def method_tables() -> Tables:
    """Returns the table of the methods that ``--method`` knows."""
    head = ["| method | what it does | searched | besides | cost of a step | source |", "|---|---|---|---|---|---|"]
    rows = []
    for name, one in methods().items():
        ranges = ", ".join(f"`{key}` {flow(span['low'])} to {flow(span['high'])}" for key, span in one.searched.items())
        besides = ", ".join(f"`{key}: {value}`" for key, value in one.sets.items())
        rows.append(_line(f"`{name}`", one.words, ranges, besides, one.cost, one.source))
    return {"methods": [*head, *rows]}


def result_tables() -> Tables:
    """Returns the tables of kept comparisons that the page shows, ``RECIPE, TABLE``, as ``benchmarks.methods`` wrote
    them.
    """
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    kept = {path.stem: json.loads(path.read_text("utf-8"))["tables"] for path in sorted(KEPT.glob("*.json"))}
    found = {f"{recipe}, {name}": lines for recipe, tables in kept.items() for name, lines in tables.items()}
    return {name: found[name] for _, name, _ in TABLE.findall(page) if name in found}


# ---- the commands


def command_lists() -> Tables:
    """Returns the reference of the command line, as lines by the panel of the help."""
    panels: Tables = {}
    for name, found in _commands(typer.main.get_command(app), ""):
        example = found.epilog.removeprefix("Example:").strip()
        about = [line for part in inspect.cleandoc(found.help).split("\n\n") for line in ("", *_wrapped(part))]
        lines = ["", f"### {name}", *about, "", "```console", f"$ {example}", "```"]
        rows = [_option_row(one, found.callback) for one in found.params if "--debug" not in one.opts]
        if rows:
            lines += ["", "| option | value | meaning |", "|---|---|---|", *rows]
        panels.setdefault(found.rich_help_panel, []).extend(lines)
    return {panel: [*lines, ""] for panel, lines in panels.items()}


def _commands(group: Any, before: str, panel: str = "") -> Iterator[tuple[str, Any]]:
    for name, found in group.commands.items():
        found.rich_help_panel = panel or found.rich_help_panel
        if hasattr(found, "commands"):
            yield from _commands(found, f"{name} ", found.rich_help_panel)
        else:
            yield f"{before}{name}", found


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _option_row(option: Any, callback: Any) -> str:
    """Returns the row of an option or argument, from what each release of Typer has."""
    annotation, *_ = get_args(inspect.signature(callback).parameters[option.name].annotation)
    kind = next(one for one in get_args(annotation) or (annotation,) if one is not type(None))
    is_option = option.opts[0].startswith("-")
    names = ", ".join(option.opts) if is_option else option.name.upper()
    value = "" if kind is bool else option.metavar if option.metavar not in (None, names) else WORDS.get(kind, "text")
    default = option.show_default if isinstance(option.show_default, str) else option.default
    more = " Required." if option.required and is_option else ""
    more += "" if default in (None, False) else f" Default: `{default}`."
    return _line(f"`{names}`", value, f"{option.help}{more}")


def surface() -> list[str]:
    """Returns what users write, a line each: keys of recipes, options of commands, functions with their arguments."""
    keys = sorted({name for name, _, _ in documented_keys()})
    commands = [
        f"{name} {','.join(one.opts) if one.opts[0].startswith('-') else one.name.upper()}"
        for name, found in sorted(_commands(typer.main.get_command(app), ""))
        for one in found.params
    ]
    functions = [
        f"{name}({', '.join(inspect.signature(getattr(carft_ray, name)).parameters)})"
        for name in sorted(carft_ray.__all__)
        if callable(getattr(carft_ray, name))
    ]
    parts = {"keys of a recipe": keys, "commands and options": commands, "from carft_ray import": functions}
    return [line for title, lines in parts.items() for line in (f"# {title}: {len(lines)}", *lines)]


# ---- the files


def updated(texts: dict[str, str], tables: Tables) -> dict[str, str]:
    """Returns documents by name with the tables in their places.

    Raises:
        ValueError: The documents together have not one place for each table.
    """
    places = [name for text in texts.values() for _, name, _ in TABLE.findall(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(f"must have one place for each of {sorted(tables)}, but got {sorted(places)}")

    def with_table(found: re.Match[str]) -> str:
        return "".join((found[1], *(f"{line}\n" for line in tables[found[2]]), found[3]))

    return {name: TABLE.sub(with_table, text) for name, text in texts.items()}


def made(root: Path) -> dict[str, str]:
    """Returns the text of every file that is made here, by its name below the root of the project."""
    documents = {"recipe*": key_tables, "resume": resume_tables, "commands": command_lists}
    documents |= {"methods": method_tables, "results": result_tables}
    texts: dict[str, str] = {}
    for pages, tables in documents.items():
        paths = sorted((root / "docs").glob(f"{pages}.md"))
        read = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in paths}
        texts |= updated(read, tables())
    schema = json.dumps(whole_schema(), indent=1, ensure_ascii=False)
    return texts | {f"search_spaces/{SCHEMA}": f"{schema}\n", SURFACE: "".join(f"{line}\n" for line in surface())}


def main(arguments: list[str], root: Path = ROOT) -> str | None:
    """Writes the files, or with ``--check`` returns what to run if one is not what the code makes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for name, text in made(root).items():
        path = root / name
        if not path.exists() or path.read_text("utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, "utf-8")
    return f"not as the schema has them: {', '.join(stale)}; run: make tables" if check and stale else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
