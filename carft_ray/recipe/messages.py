"""From what pydantic finds to words for users: key paths without pydantic's own pieces, rules as sentences.

The place of these problems is a key path; ``loading`` adds file and line.
"""

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.schema.fields import core_type, field_of, is_config, members
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.recipe.yaml import KeyPath, dotted

SYNONYMS = {
    "lr": "learning_rate",
    "kl": "kl_weight",
    "lambda": "kl_weight",
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
