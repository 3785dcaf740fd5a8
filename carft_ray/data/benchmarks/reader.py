"""Public benchmarks by name: where their images lie, how they are labelled, and how many there should be.

All that is known of a set is in its record (``recipe.benchmarks``). A set that does not match its name is refused: a
class too many or missing, a list that names other images. Only its size may differ, which `doctor` reports.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from carft_ray.data.benchmarks import layouts
from carft_ray.data.benchmarks.layouts import HOLDOUT, STEP, chosen_domains
from carft_ray.data.listing import Listing, and_more
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.benchmarks import BENCHMARKS, IN_OUT, Benchmark
from carft_ray.recipe.schema.data import BenchmarkSet

_PARTS = {"trainval": ("train", "val")}  # splits that are made of others


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
    facts = BENCHMARKS[spec.name]
    listing: Listing = getattr(layouts, facts.lister)(_root(spec), spec, facts, place)
    if problems := list(_class_problems(listing, spec, facts, place)):
        raise DataError(problems)
    return _in_class_list(listing, spec, facts)


def benchmark_problems(spec: BenchmarkSet, place: str) -> list[Problem]:
    """Returns a problem for a path without the benchmark's folders and lists; nothing is listed."""
    facts, root = BENCHMARKS[spec.name], _root(spec)
    key, rule = f"{place}.domains", f"must be a domain of {facts.title}"
    if wrong := [domain for domain in spec.domains or () if domain not in facts.domains]:
        return [Problem(key, rule, repr(one), facts.domains, nearest(one, facts.domains)) for one in wrong]
    absent = [pattern for pattern in _needed(spec) if not _is_there(root, pattern)]
    if not absent:
        return []
    rule = f"must be the folder of {facts.title}: {', '.join(absent)} must be in it"
    value = f"none in {root}" if root.is_dir() else spec.path
    return [Problem(f"{place}.path", rule, value, next_step=facts.step or STEP)]


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
    facts = BENCHMARKS[spec.name]
    counts = facts.counts
    if not counts or spec.classes == "some" or spec.part is not None or spec.shots is not None:
        return None
    if facts.domains:
        known = [counts[domain] for domain in chosen_domains(spec, facts)]
        held_out = [int(count * HOLDOUT) for count in known]
        return {None: sum(known), "out": sum(held_out), "in": sum(known) - sum(held_out)}[spec.split]
    return counts.get(spec.split) if spec.split is not None else next(iter(counts.values()))


def benchmark_words(name: str) -> dict[str, str]:
    """Returns what stands for each class of a benchmark in a prompt, by the names that the class list has.

    ImageNet-R's are wnids, ObjectNet's folders. The words are those of the set; else those of ``within``; else the
    class names, spaces for underscores. Empty for a name that is no benchmark's.
    """
    if (facts := BENCHMARKS.get(name)) is None:
        return {}
    groups = within_groups(facts)
    known = benchmark_words(facts.within or "")
    firsts = [group[0] for group in groups]
    words = facts.words or [known.get(name, name.replace("_", " ")) for name in firsts]
    return dict(zip(facts.classes if _is_grouped(groups) else firsts, words, strict=True))


def within_groups(facts: Benchmark) -> tuple[tuple[str, ...], ...]:
    """Returns for each class its classes of ``within``; itself for a set with classes of its own.

    A class scores the largest of the logits of its group. A group has one class, but for ObjectNet.
    """
    if facts.within is None or facts.groups is None:
        return tuple((name,) for name in facts.classes)
    whole = BENCHMARKS[facts.within].classes
    return tuple(tuple(whole[index] for index in group) for group in facts.groups)


def _is_grouped(groups: tuple[tuple[str, ...], ...]) -> bool:
    return any(len(group) > 1 for group in groups)


def _class_problems(listing: Listing, spec: BenchmarkSet, facts: Benchmark, place: str) -> Iterator[Problem]:
    """Compares the classes that were found with those that the benchmark has."""
    there = set(listing.found)
    if unknown := sorted(there.difference(facts.classes)):
        near = nearest(unknown[0], facts.classes)
        rule = f"must contain the {len(facts.classes)} classes of {facts.title} and no other"
        yield Problem(place, rule, f"{unknown[0]!r}{and_more(unknown)}", nearest=near, next_step=STEP)
    missing = [name for name in facts.classes if name not in there]
    if missing and spec.classes == "all" and not facts.is_sparse:
        rule = f"every one of the {len(facts.classes)} classes of {facts.title} must have an image"
        step = "If the set has only some of the classes, write classes: some."
        yield Problem(place, rule, f"none of {missing[0]!r}{and_more(missing)}", next_step=step)


def _in_class_list(listing: Listing, spec: BenchmarkSet, facts: Benchmark) -> Listing:
    """Gives a listing the classes of the class list that stand for the set's own, and its label order."""
    there = set(listing.found)
    kept = [name for name in facts.classes if name in there or spec.classes == "all"]
    if facts.within is None:
        return replace(listing, found=tuple(kept), is_sparse=facts.is_sparse or spec.split in IN_OUT)
    groups = within_groups(facts)
    group_of = dict(zip(facts.classes, groups, strict=True))
    if _is_grouped(groups):
        return replace(listing, found=tuple(kept), within={name: group_of[name] for name in kept})
    found = tuple(group_of[name][0] for name in kept)
    within = {name: (name,) for name in found} if len(found) < len(BENCHMARKS[facts.within].classes) else None
    table = listing.table
    classes = pa.array([group_of[name][0] for name in listing.classes], table.schema.field("class").type)
    table = table.set_column(table.column_names.index("class"), "class", classes)
    return replace(listing, table=table, found=found, within=within)


def _root(spec: BenchmarkSet) -> Path:
    """Returns the root of a set: the first of its layout's folders that holds all it needs, else the likeliest."""
    path = Path(spec.path)
    roots = [path / folder for folder in BENCHMARKS[spec.name].folders]
    whole = [root for root in roots if all(_is_there(root, pattern) for pattern in _needed(spec))]
    return next(iter([*whole, *(root for root in roots if root.is_dir())]), path)


def _images(spec: BenchmarkSet) -> tuple[str, ...]:
    facts = BENCHMARKS[spec.name]
    return chosen_domains(spec, facts) if facts.domains else _of_split(facts.images, spec)


def _needed(spec: BenchmarkSet) -> tuple[str, ...]:
    return (*filter(None, _images(spec)), *_of_split(BENCHMARKS[spec.name].signs, spec))


def _of_split(patterns: Iterable[str], spec: BenchmarkSet) -> tuple[str, ...]:
    return tuple(pattern.format(split=spec.split) for pattern in patterns)


def _is_there(root: Path, pattern: str) -> bool:
    """Returns whether a file or folder is there, or hides whether it is."""
    try:
        return any(root.glob(pattern)) if "*" in pattern else (root / pattern).exists()
    except PermissionError:
        return True
