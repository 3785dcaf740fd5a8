"""YAML text to plain values, with the line of every key.

YAML 1.2, so that ``1e-4`` is a number and ``on`` a text. Only plain values come out: tags that would make other
objects are refused, and so are keys that stand twice in one mapping.
"""

import io
import json
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from carft_ray.errors import Problem

KeyPath = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {_TAG + name for name in ("int", "float", "bool", "null")}
_TEXTS = {_TAG + name for name in ("str", "timestamp", "merge", "value")}
_MAX_VALUES = 100_000  # a recipe has hundreds; aliases inside aliases reach this within a few lines


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


def parse(text: str, name: str) -> Document:
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
    if node.tag in _NUMBERS:
        try:
            return yaml.constructor.construct_object(node)
        except ValueError:  # a tag written out before a text that is none, such as `!!int x`
            pass
    place = f"{name}:{line}: {dotted(path)}" if path else f"{name}:{line}"
    document.problems.append(Problem(place, "must be a plain value without a tag", str(node.tag)))
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


def dump(value: Any) -> str:
    """Returns plain values as YAML in block style; ``parse`` gives them back."""
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
