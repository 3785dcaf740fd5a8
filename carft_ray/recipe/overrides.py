"""Values set over a recipe on the command line: ``--set train.learning_rate=1e-4``."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, get_args, get_origin

from carft_ray.errors import Problem, nearest
from carft_ray.recipe.messages import child_type, keys_of
from carft_ray.recipe.schema.fields import core_type, field_of, members
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.yaml import KeyPath, dotted, parse


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
        parsed = parse(written, option)
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
