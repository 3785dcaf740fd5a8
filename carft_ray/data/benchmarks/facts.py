"""What is known of the public benchmarks: class names and their order, masks, domains, sizes, prompts.

Each set is one JSON file in ``facts/``. Each item in it names the public sources that were compared, and carries its
hash. An item that fewer than two sources give is not sure: what differs from it is worth a warning, no error.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter

from carft_ray.errors import DataError, Problem, nearest

FOLDER = Path(__file__).with_suffix("")


@dataclass(frozen=True)
class Facts:
    """The facts of one benchmark.

    Attributes:
        name: Name in recipes.
        title: Name for people.
        classes: Folders, or labels of the table, in the order of this set's labels.
        words: What stands for a class in a prompt, in the same order. None: see ``prompt_words``.
        within: Set over whose classes logits are made before they are cut to this set's classes.
        groups: For each class its indices in ``within``. None: by equal name. See ``label_groups``.
        domains: Domains in DomainBed's order, or the corruptions of ImageNet-C.
        counts: Number of images for each split or domain; empty where nothing is known.
        templates: Prompt templates with ``{}``.
        provenance: For each item that is given its ``item``, ``sources``, and ``sure``: whether two sources of
            different owners agree.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    words: tuple[str, ...] | None
    within: str | None
    groups: tuple[tuple[int, ...], ...] | None
    domains: tuple[str, ...] | None
    counts: Annotated[Mapping[str, int], AfterValidator(MappingProxyType)]
    templates: tuple[str, ...] | None
    provenance: tuple[dict[str, Any], ...]

    def is_sure(self, item: str) -> bool:
        """Returns whether two independent sources agree on an item; False for one that is not given."""
        return any(each["sure"] for each in self.provenance if each["item"] == item)


@functools.cache
def fact_names() -> tuple[str, ...]:
    """Returns the names of all sets of which facts are known, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


@functools.cache
def load_facts(name: str) -> Facts:
    """Returns the facts of a set.

    Raises:
        DataError: There are none under this name.
    """
    if name not in fact_names():
        rule = "must be a benchmark whose facts are known"
        raise DataError(Problem("", rule, repr(name), fact_names(), nearest(name, fact_names())))
    return TypeAdapter(Facts).validate_python(read_file(name))


def read_file(name: str) -> dict[str, Any]:
    """Returns the file of a set as it stands."""
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def label_groups(facts: Facts) -> tuple[tuple[int, ...], ...] | None:
    """Returns for each class its indices in the classes of ``within``; None for a set with classes of its own.

    A class scores the largest of the logits of its group. A group has one index, but for ObjectNet.
    """
    if facts.within is None or facts.groups is not None:
        return facts.groups
    index = {name: i for i, name in enumerate(load_facts(facts.within).classes)}
    return tuple((index[name],) for name in facts.classes)


def prompt_words(facts: Facts) -> tuple[str, ...]:
    """Returns what stands for each class in a prompt.

    The words of the set; else those of ``within``, through the groups; else the class names, spaces for underscores.
    """
    if facts.words is not None:
        return facts.words
    groups = label_groups(facts)
    if facts.within is None or groups is None:
        return tuple(name.replace("_", " ") for name in facts.classes)
    words = prompt_words(load_facts(facts.within))
    return tuple(words[group[0]] for group in groups)
