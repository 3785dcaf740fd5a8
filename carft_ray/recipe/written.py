"""A recipe as it is written: YAML to plain values with their lines, ``--set`` over them, and faults in words for users.

YAML is 1.2, so that ``1e-4`` is a number and ``on`` a text. Only plain values come out: tags that would make other
objects are refused, and so are keys that stand twice in one mapping. Key paths have none of pydantic's own pieces, and
rules are sentences. ``Places`` knows the file and line, or the option, that a key path is from.
"""

import copy
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.schema.fields import core_type, field_of, is_config, members
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig

KeyPath = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {_TAG + name for name in ("int", "float", "bool", "null")}
_TEXTS = {_TAG + name for name in ("str", "timestamp", "merge", "value")}
_MOST_DIGITS = 1000  # of a number
_MAX_VALUES = 100_000  # a recipe has hundreds; aliases inside aliases reach this within a few lines
SYNONYMS = {
    "lr": "learning_rate",
    "kl": "kl_weight",
    "lambda": "kl_weight",
    "l2_weight": "l2_sp_weight",
    "kd_weight": "class_kl_weight",
    "fd_weight": "feature_weight",
    "lipsum_weight": "text_weight",
    "wd": "weight_decay",
    "bs": "batch_size",
    "ratio": "alpha",
    "n_trials": "trials",
    "num_trials": "trials",
    "num_samples": "trials",
}
_MAPPING = "must be a mapping of keys to values"
_RULES = {
    "missing": "is required",
    "extra_forbidden": "unknown key",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "literal_error": "must be one of the allowed values",
    "union_tag_invalid": "must be one of the allowed values",
    "union_tag_not_found": "is required",
}


@dataclass
class Document:
    """A parsed text.

    Attributes:
        value: The value: dict, list, str, int, float, bool or None.
        lines: The line, from 1, of every key and list element.
        problems: What is wrong with the text, by line.
    """

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_yaml(text: str, name: str) -> Document:
    """Parses YAML.

    Args:
        text: The text.
        name: What to call the text in messages: the file, or the option that it came from.

    Returns:
        The document. A text that is no YAML gives one problem with its line and column.
    """
    yaml = YAML(typ="safe", pure=True)
    document = Document()
    try:
        node = yaml.compose(text)
        if node is not None:
            document.value = _value(node, (), name, yaml, document)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable character"
        step = "Indent with spaces, not with tabs." if "\\t" in what else ""
        document.problems.append(Problem(place, f"must be valid YAML: {what}", next_step=step))
    except RecursionError:
        document.problems.append(Problem(name, "must have less nesting and fewer repeated aliases"))
    return document


def _value(node: Node, path: KeyPath, name: str, yaml: YAML, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if len(document.lines) > _MAX_VALUES:
        raise RecursionError
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, path, name, yaml, document)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_value(child, (*path, index), name, yaml, document) for index, child in enumerate(node.value)]
    if node.tag in _TEXTS and isinstance(node.value, str):
        return node.value
    rule, value = "must be a plain value without a tag", str(node.tag)
    if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
        rule, value = "must be shorter", f"a number of {len(node.value):,} characters"
    elif node.tag in _NUMBERS:
        try:
            return yaml.constructor.construct_object(node)
        except ValueError:  # a tag written out before a text that is none, such as `!!int x`
            pass
    place = f"{name}:{line}: {dotted(path)}" if path else f"{name}:{line}"
    document.problems.append(Problem(place, rule, value))
    return None


def _mapping(node: MappingNode, path: KeyPath, name: str, yaml: YAML, document: Document) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node.value, str):
            document.problems.append(Problem(f"{name}:{line}", "a key must be a word"))
            continue
        key = (*path, key_node.value)
        if key_node.value in value:
            place = f"{name}:{line}: {dotted(key)}"
            document.problems.append(Problem(place, f"must occur once, but is also on line {document.lines[key]}"))
            continue
        document.lines[key] = line
        value[key_node.value] = _value(child, key, name, yaml, document)
    return value


def dotted(path: KeyPath) -> str:
    """Returns a key path as users write it: ``search.space.learning_rate``."""
    return ".".join(str(piece) for piece in path)


def dump_yaml(value: Any) -> str:
    """Returns plain values as YAML in block style; ``parse_yaml`` gives them back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel types it None
    yaml.width = 2**20
    # these line breaks the dumper would leave as they are, and the loader would fold them
    yaml.allow_unicode = not set("\x85\u2028\u2029") & set(json.dumps(value, ensure_ascii=False))
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def quoted(value: Any) -> str:
    """Returns a value as JSON that YAML reads alike: of a character that is not printed the number, in one piece."""
    written = json.dumps(value, default=str, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in written)


def at(
    path: KeyPath,
    rule: str,
    value: str = "",
    allowed: tuple[str, ...] = (),
    nearest: str | None = None,
    next_step: str = "",
) -> Problem:
    """Returns a problem of the value at a key path; the others as in ``Problem``."""
    return Problem(dotted(path), rule, value, allowed, nearest, next_step, path)


def shown(value: Any) -> str:
    """Returns a value as a message shows it: as YAML would write it, on one line, cut when long."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def unlisted(path: KeyPath, rule: str, value: Any, allowed: Iterable[Any]) -> Problem:
    """Returns the problem that a value is none of those allowed, with the nearest of them."""
    words = tuple(one if isinstance(one, str) else shown(one) for one in allowed)
    return at(path, rule, shown(value), words, nearest(str(value), words))


def problems_in(error: ValidationError, root: Any = Recipe, prefix: KeyPath = ()) -> list[Problem]:
    """Translates what pydantic found.

    Args:
        error: The validation error.
        root: The type that was validated.
        prefix: Key path of the validated value inside the recipe.
    """
    return [_problem(each, root, prefix) for each in error.errors(include_url=False) if not _is_echo(each)]


def train_problems(values: Mapping[str, Any], prefix: KeyPath) -> list[Problem]:
    """Checks values of fields of ``train``; the key paths of the problems are ``prefix`` and the field."""
    try:
        TrainConfig.model_validate(dict(values))
    except ValidationError as error:
        return problems_in(error, TrainConfig, prefix)
    return []


def _is_echo(details: Mapping[str, Any]) -> bool:
    """Returns whether pydantic calls a list too short only because it has refused elements of it."""
    return details["type"] == "too_short" and bool(len(details["input"]) >= details["ctx"]["min_length"])


def _problem(details: Mapping[str, Any], root: Any, prefix: KeyPath) -> Problem:
    path, holder, kind = _follow(details["loc"], root, prefix)
    what, context, value = details["type"], details.get("ctx", {}), shown(details["input"])
    limits = {key: int(limit) if limit in (0, 1) else limit for key, limit in context.items()}
    rule = _RULES.get(what, "has a form that is not allowed").format(**limits)
    if what == "missing":
        return at(path, rule)
    if what == "extra_forbidden":
        allowed = keys_of(holder) or ()
        return at(path, rule, allowed=allowed, nearest=nearest_key(str(path[-1]), allowed))
    if what == "literal_error":
        return unlisted(path, rule, details["input"], get_args(core_type(kind)))
    if what in ("union_tag_invalid", "union_tag_not_found"):
        key = context["discriminator"].strip("'")
        allowed = tuple(str(tag) for member in members(kind) for tag in get_args(_annotation(member, key)))
        given = details["input"].get(key) if what == "union_tag_invalid" else None
        text = "" if given is None else shown(given)
        return at((*path, key), rule, text, allowed, nearest(str(given), allowed))
    if what == "too_short":
        least = context["min_length"]
        return at(path, "must not be empty" if least == 1 else f"must contain at least {least} values", value)
    if what == "string_pattern_mismatch":
        if context["pattern"].startswith("^[^"):
            return at(path, "must be the name of a folder, not a path", value)
        rule = "a name must begin with a letter or digit and hold only letters, digits, _ and -, at most 100"
        return at(path, rule, value)
    if what == "value_error":
        rule = str(context["error"])
        return at(path, rule, "" if "but got" in rule else value)
    step = "Write it in quotes." if what == "string_type" and isinstance(details["input"], int | float) else ""
    return at(path, rule, value, next_step=step)


def _follow(loc: KeyPath, root: Any, path: KeyPath) -> tuple[KeyPath, Any, Any]:
    """Walks a location of pydantic; returns the key path in the file, the type that holds its end, the type there."""
    holder, kind = None, core_type(root)
    for piece in loc:
        if piece == "[key]":
            continue
        tagged = [member for member in members(kind) if piece in _tags(member)]
        if tagged:
            kind = tagged[0]
            continue
        path, holder, kind = (*path, piece), kind, child_type(kind, piece)
    return path, holder, kind


def child_type(kind: Any, piece: str | int) -> Any:
    """Returns the type of what stands under a key, or None when such a key cannot be."""
    kind = core_type(kind)
    if (field := field_of(kind, piece)) is not None:
        return core_type(field.annotation)
    if get_origin(kind) is dict:
        return core_type(get_args(kind)[1])
    if get_origin(kind) is tuple and isinstance(piece, int):
        return core_type(get_args(kind)[0])
    return Any if kind is Any else None


def keys_of(kind: Any) -> tuple[str, ...] | None:
    """Returns the keys that may stand in a value of a type; None when it holds no fixed keys."""
    kind = core_type(kind)
    parts = members(kind) or ([kind] if is_config(kind) else [])
    return tuple(dict.fromkeys(key for part in parts for key in part.model_fields)) or None


def nearest_key(key: str, allowed: tuple[str, ...]) -> str | None:
    """Returns the key that was probably meant: a near one of ``allowed``, or the same word elsewhere in the recipe."""
    wanted = SYNONYMS.get(key, key)
    if wanted in allowed:
        return wanted
    here = nearest(key, allowed)
    everywhere = {str(path[-1]): dotted(path) for path in reversed(list(_fixed_paths(Recipe)))}
    elsewhere = difflib.get_close_matches(wanted, everywhere, n=1, cutoff=0.85)
    return here or (everywhere[elsewhere[0]] if elsewhere else None)


def _fixed_paths(part: type[BaseModel], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for key in part.model_fields:
        yield (*prefix, key)
    for key in part.model_fields:
        kind = core_type(_annotation(part, key))
        if is_config(kind):
            yield from _fixed_paths(kind, (*prefix, key))


def _annotation(part: Any, key: str) -> Any:
    return part.model_fields[key].annotation


def _tags(part: Any) -> set[Any]:
    """Returns the words that distinguish this part from the others of its union."""
    kinds = (
        core_type(part.model_fields[key].annotation) for key in ("source", "type", "name") if key in part.model_fields
    )
    return {tag for kind in kinds if get_origin(kind) is Literal for tag in get_args(kind)}


@dataclass
class Places:
    """Where each value of a recipe comes from.

    Attributes:
        file: The recipe file, as messages call it.
        lines: The line of each key in it.
        options: The ``--set`` option of each key that one gave, in the order of the command line.
    """

    file: str
    lines: dict[KeyPath, int]
    options: dict[KeyPath, str] = field(default_factory=dict)

    def placed(self, problems: Iterable[Problem]) -> list[Problem]:
        """Returns problems of key paths by line of the file, then by option; their places in the words of the user."""
        ordered = sorted(problems, key=lambda problem: self._order(problem.path))
        return [replace(problem, place=self.place(problem.path)) for problem in ordered]

    def place(self, path: KeyPath) -> str:
        """Returns the words for a key path: ``file.yaml:12: train.epochs`` or ``--set train.epochs=0``."""
        known = self._known(path)
        if known in self.options:
            option = self.options[known]
            return option if known == path else f"{option}: {dotted(path)}"
        line = f":{self.lines[known]}" if known in self.lines else ""
        return ": ".join(filter(None, (f"{self.file}{line}", dotted(path))))

    def _order(self, path: KeyPath) -> tuple[int, int]:
        known = self._known(path)
        if known in self.options:
            return 1, list(self.options).index(known)
        return 0, self.lines.get(known, 0)

    def _known(self, path: KeyPath) -> KeyPath:
        """Returns the longest beginning of a key path that an option or a line gave; else what an option gave in it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.options or path[:end] in self.lines:
                return path[:end]
        return next((each for each in self.options if path and each[: len(path)] == path), ())


def apply_overrides(value: Any, places: Places, overrides: Sequence[str]) -> tuple[Any, list[Problem]]:
    """Sets values over those of a file; mappings on the way that are missing are made.

    ``null`` takes an entry out of a mapping whose keys the recipe's author names, such as ``search.space.kl_weight``.
    The name of another sampler or pruner takes the keys of the one before with it.

    Args:
        value: The value of the file; stays as it is.
        places: Learns which option gave which key.
        overrides: Texts ``path=value``, the value as YAML. A later one wins.

    Returns:
        The new value, and a problem for each text that cannot be used.
    """
    value = copy.deepcopy(value)
    problems = []
    for text in overrides:
        option = f"--set {text}"
        key, equals, written = text.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(Problem(option, "must have the form key.path=value"))
            continue
        parsed = parse_yaml(written, option)
        if parsed.problems:
            problems += [replace(found, place=option) for found in parsed.problems]
            continue
        changed, new = path, parsed.value
        if new is None and _is_entry(path):
            *above, name = path
            entries = reduce(_under, above, value)
            if name not in entries:
                rule, there = f"{dotted(path[:-1])} must have {name}, which null removes", tuple(map(str, entries))
                problems.append(Problem(option, rule, allowed=there, nearest=nearest(str(name), there)))
                continue
            changed = tuple(above)
            new = {key: entry for key, entry in entries.items() if key != name}
        value = _set(value, changed, new)
        if unfit := _keys_of_other_kinds(path, new):
            entries = reduce(_under, path[:-1], value)
            value = _set(value, path[:-1], {key: entry for key, entry in entries.items() if key not in unfit})
        for known in [known for known in places.options if known[: len(path)] == path]:
            del places.options[known]
        places.options[path] = option
        places.lines = {known: line for known, line in places.lines.items() if known[: len(path)] != path}
    return value, problems


def _is_entry(path: KeyPath) -> bool:
    """Tells whether a path ends with a key that a recipe's author names, of something that has keys itself."""
    kind = _kind_at(path[:-1])
    child = child_type(kind, path[-1])
    return get_origin(kind) is dict and (get_origin(child) is dict or keys_of(child) is not None)


def _keys_of_other_kinds(path: KeyPath, new: Any) -> set[str]:
    """Returns the keys that another kind of a part has, such as a sampler, where an option names its kind."""
    *above, name = path
    kinds = members(_kind_at(above))
    fields = [(kind, field) for kind in kinds if (field := field_of(kind, name)) is not None]
    named = [kind for kind, field in fields if get_args(core_type(field.annotation)) == (new,)]
    return {key for kind in kinds for key in kind.model_fields if named and key not in named[0].model_fields}


def _kind_at(path: Sequence[str | int]) -> Any:
    kind: Any = Recipe
    for piece in path:
        kind = child_type(kind, piece)
    return kind


def _under(value: Any, piece: str | int) -> dict[Any, Any]:
    """Returns the mapping under a key; an empty one where there is none."""
    found = value.get(piece) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _set(value: Any, path: KeyPath, new: Any) -> Any:
    if not path:
        return new
    parts = value if isinstance(value, dict) else {}
    return {**parts, path[0]: _set(parts.get(path[0]), path[1:], new)}
