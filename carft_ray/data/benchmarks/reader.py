"""Public benchmarks by name: where their images lie, how they are labelled, and how many there should be.

Class lists, masks, words and counts come from ``facts.py``. A set that is another than its name says is refused: a
class too many or missing, a list that names other images. Only its size may differ, which `doctor` reports.
"""

import functools
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from carft_ray.data.benchmarks import listers
from carft_ray.data.benchmarks.facts import Facts, label_groups, load_facts, prompt_words
from carft_ray.data.benchmarks.layouts import STEP
from carft_ray.data.benchmarks.listers import HOLDOUT, chosen_domains
from carft_ray.data.listing import Listing, and_more
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.benchmarks import BENCHMARKS, IN_OUT
from carft_ray.recipe.schema.sets import BenchmarkSet


@dataclass(frozen=True)
class Layout:
    """How the files of a benchmark lie; ``layouts.toml`` explains each attribute and has the values."""

    folders: Sequence[str]
    lister: str
    images: Sequence[str] = ("",)
    signs: Sequence[str] = ()
    is_sparse: bool = False
    step: str = STEP


_TABLES = tomllib.loads(Path(__file__).with_name("layouts.toml").read_text(encoding="utf-8"))
LAYOUTS = {name: Layout(**table) for name, table in _TABLES.items()}
_PARTS = {"trainval": ("train", "val")}  # splits that are made of others


@functools.cache
def known_facts(name: str) -> Facts:
    """Returns the facts of a benchmark, with class names that differ: iWildCam has one name for two labels."""
    facts = load_facts(name)
    first = {own: label for label, own in reversed(list(enumerate(facts.classes)))}
    differ = (own if first[own] == label else f"{own} ({label})" for label, own in enumerate(facts.classes))
    return replace(facts, classes=tuple(differ))


def list_benchmark(spec: BenchmarkSet, place: str) -> Listing:
    """Lists the images of a benchmark. A name is the file's path from the benchmark's root, or file and row of CIFAR.

    Args:
        spec: The set.
        place: Where the set is named, for the problems.

    Raises:
        DataError: Something is missing or damaged.
        OSError: A folder cannot be read.
    """
    if problems := benchmark_problems(spec, place):
        raise DataError(problems)
    facts = known_facts(spec.name)
    listing: Listing = getattr(listers, LAYOUTS[spec.name].lister)(_root(spec), spec, facts, place)
    if problems := list(_class_problems(listing, spec, facts, place)):
        raise DataError(problems)
    return _in_class_list(listing, spec, facts)


def benchmark_problems(spec: BenchmarkSet, place: str) -> list[Problem]:
    """Returns a problem for a path without the benchmark's folders and lists; nothing is listed."""
    facts, path = known_facts(spec.name), Path(spec.path)
    if facts.domains and BENCHMARKS[spec.name].has_domains:
        key, rule = f"{place}.domains", f"must be a domain of {facts.title}"
        if wrong := [domain for domain in spec.domains or () if domain not in facts.domains]:
            return [Problem(key, rule, repr(one), facts.domains, nearest(one, facts.domains)) for one in wrong]
    root = _root(spec)
    absent = [pattern for pattern in _needed(spec) if not _is_there(root, pattern)]
    if not absent:
        return []
    rule = f"must be the folder of {facts.title}: {', '.join(absent)} must be in it"
    value = f"none in {root}" if root.is_dir() else str(path)
    return [Problem(f"{place}.path", rule, value, next_step=LAYOUTS[spec.name].step)]


def benchmark_places(spec: BenchmarkSet) -> list[str]:
    """Returns the folders that hold the images of a set, links resolved."""
    root = _root(spec)
    return [os.path.realpath(root / images) for images in _images(spec)]


def are_disjoint(one: BenchmarkSet, other: BenchmarkSet) -> bool:
    """Returns whether two sets of one benchmark are of splits that share no image."""
    if one.name != other.name or one.trial_seed != other.trial_seed or one.split is None or other.split is None:
        return False
    return not set(_PARTS.get(one.split, (one.split,))) & set(_PARTS.get(other.split, (other.split,)))


def num_expected(spec: BenchmarkSet) -> int | None:
    """Returns the number of images that a whole set must have; None where it is not known for sure."""
    facts = load_facts(spec.name)
    counts = facts.counts
    if not facts.is_sure("counts") or spec.classes == "some" or spec.part is not None or spec.shots is not None:
        return None
    if BENCHMARKS[spec.name].has_domains:
        known = [counts[domain] for domain in chosen_domains(spec, facts)]
        held_out = [int(count * HOLDOUT) for count in known]
        return {None: sum(known), "out": sum(held_out), "in": sum(known) - sum(held_out)}[spec.split]
    return counts.get(spec.split) if spec.split is not None else next(iter(counts.values()))


def benchmark_words(name: str) -> dict[str, str]:
    """Returns what stands for each class of a benchmark in a prompt, by the names that the class list has.

    ImageNet-R's are wnids, ObjectNet's folders. Empty for a name that is no benchmark's.
    """
    if name not in BENCHMARKS:
        return {}
    facts = known_facts(name)
    names = facts.classes if (groups := _single_groups(facts)) is None else groups
    return dict(zip(names, prompt_words(facts), strict=True))


def _single_groups(facts: Facts) -> tuple[str, ...] | None:
    """Returns the class of ``within`` for each class; None where a set has none, or more than one for a class."""
    groups = label_groups(facts)
    if groups is None or facts.within is None or any(len(group) > 1 for group in groups):
        return None
    whole = load_facts(facts.within).classes
    return tuple(whole[index] for (index,) in groups)


def _class_problems(listing: Listing, spec: BenchmarkSet, facts: Facts, place: str) -> Iterator[Problem]:
    """Compares the classes that were found with those that the benchmark has."""
    there = set(listing.found)
    if unknown := sorted(there.difference(facts.classes)):
        near = nearest(unknown[0], facts.classes)
        rule = f"must contain the {len(facts.classes)} classes of {facts.title} and no other"
        yield Problem(place, rule, f"{unknown[0]!r}{and_more(unknown)}", nearest=near, next_step=STEP)
    missing = [name for name in facts.classes if name not in there]
    if missing and spec.classes == "all" and not LAYOUTS[spec.name].is_sparse:
        rule = f"every one of the {len(facts.classes)} classes of {facts.title} must have an image"
        step = "If the set has only some of the classes, write classes: some."
        yield Problem(place, rule, f"none of {missing[0]!r}{and_more(missing)}", next_step=step)


def _in_class_list(listing: Listing, spec: BenchmarkSet, facts: Facts) -> Listing:
    """Gives a listing the classes of the class list that stand for the set's own, and its label order."""
    there = set(listing.found)
    kept = [i for i, name in enumerate(facts.classes) if name in there or spec.classes == "all"]
    if facts.within is None or (groups := label_groups(facts)) is None:
        found = tuple(facts.classes[i] for i in kept)
        return replace(listing, found=found, is_sparse=LAYOUTS[spec.name].is_sparse or spec.split in IN_OUT)
    whole = load_facts(facts.within).classes
    single = _single_groups(facts)
    if single is None:
        targets = {facts.classes[i]: tuple(whole[index] for index in groups[i]) for i in kept}
        return replace(listing, found=tuple(targets), within=targets)
    name_of, table = dict(zip(facts.classes, single, strict=True)), listing.table
    found = tuple(single[i] for i in kept)
    within = {name: (name,) for name in found} if len(found) < len(whole) else None
    classes = pa.array([name_of.get(name, name) for name in listing.classes], table.schema.field("class").type)
    table = table.set_column(table.column_names.index("class"), "class", classes)
    return replace(listing, table=table, found=found, within=within)


def _root(spec: BenchmarkSet) -> Path:
    """Returns the root of a set: the first of its layout's folders that holds all it needs, else the likeliest."""
    path = Path(spec.path)
    roots = [path / folder for folder in LAYOUTS[spec.name].folders]
    whole = [root for root in roots if all(_is_there(root, pattern) for pattern in _needed(spec))]
    return next(iter([*whole, *(root for root in roots if root.is_dir())]), path)


def _images(spec: BenchmarkSet) -> tuple[str, ...]:
    if BENCHMARKS[spec.name].has_domains:
        return chosen_domains(spec, known_facts(spec.name))
    return tuple(pattern.format(split=spec.split) for pattern in LAYOUTS[spec.name].images)


def _needed(spec: BenchmarkSet) -> tuple[str, ...]:
    signs = tuple(pattern.format(split=spec.split) for pattern in LAYOUTS[spec.name].signs)
    return (*filter(None, _images(spec)), *signs)


def _is_there(root: Path, pattern: str) -> bool:
    """Returns whether a file or folder is there, or hides whether it is."""
    try:
        return any(root.glob(pattern)) if "*" in pattern else (root / pattern).exists()
    except PermissionError:
        return True
