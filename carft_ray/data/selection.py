"""Which images of a listing belong to a set of the recipe, and their labels: parts, shots, class lists, masks."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from carft_ray.data.listing import Listing, StoredSource, normal, sample_id
from carft_ray.data.source import IntArray
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import StoredSet
from carft_ray.words import counted

LAYOUT_STEP = "See docs/data.md for the layout that each kind of source expects."
CLASS_STEP = "Rename it, or name all classes in data.classes."


def stored_source(listing: Listing, spec: StoredSet, classes: Sequence[str] | None, name: str) -> StoredSource:
    """Returns the images of a listing that belong to a set.

    Args:
        listing: What the set's reader found.
        spec: The set: parts, shots and whether it has all classes.
        classes: The class list; None: the listing's own.
        name: Role or name of the set, for messages.

    Raises:
        DataError: Images or classes are missing; all problems at once.
    """
    wanted = listing.found if classes is None else tuple(classes)
    if problems := class_problems(listing, spec, wanted, name) or name_problems(listing, name):
        raise DataError(problems)
    chosen = _part_and_shots(listing, spec)
    rows = _not_excluded(listing, chosen)
    if not len(rows):
        raise DataError(empty_problem(listing, name))
    label_of = {normal(class_name): label for label, class_name in enumerate(wanted)}
    members = _members(listing, spec)
    groups_of = {own: tuple(sorted(label_of[normal(target)] for target in targets)) for own, targets in members.items()}
    labels = np.array([groups_of[normal(listing.classes[row])][0] for row in rows.tolist()], dtype=np.int64)
    partly = listing.within is not None or spec.classes == "some"
    groups = tuple(sorted(set(groups_of.values()))) if partly else None
    return StoredSource(name, listing, rows, wanted, labels, groups, selection=chosen, max_pixels=spec.max_pixels)


def unlabelled_source(listing: Listing, spec: StoredSet, name: str) -> StoredSource:
    """Returns the images of a set whose classes are not checked; all labels are 0."""
    chosen = _part_and_shots(listing, spec)
    rows = _not_excluded(listing, chosen)
    labels = np.zeros(len(rows), np.int64)
    return StoredSource(name, listing, rows, (), labels, selection=chosen, max_pixels=spec.max_pixels)


def name_problems(listing: Listing, place: str) -> list[Problem]:
    """Returns a problem if two images of a listing have one sample id."""
    if len(np.unique(listing.ids)) == len(listing):
        return []
    return [Problem(f"{place}: {listing.home}", "names of images must differ, also after Unicode normalisation")]


def empty_problem(listing: Listing, place: str) -> Problem:
    """Returns the problem of a set without ``selected_rows``."""
    value, step = f"none of {len(listing)} in the part", "Widen its `part`."
    return Problem(place, "there must be at least one image", value, next_step=step)


def selected_rows(listing: Listing, spec: StoredSet) -> IntArray:
    """Returns which images of a listing belong to a set: its ``part``, of that the ``shots`` of each class, without
    those that are excluded.

    The fraction of an image is its sample id over 2**64, so disjoint parts share none, and a part [a, b) holds about
    b - a of the images. Shots are those with the lowest hash of (seed, id), so k shots are among k + 1.
    """
    return _not_excluded(listing, _part_and_shots(listing, spec))


def _not_excluded(listing: Listing, rows: IntArray) -> IntArray:
    return rows[~np.isin(listing.ids[rows], listing.excluded)] if len(listing.excluded) else rows


def _part_and_shots(listing: Listing, spec: StoredSet) -> IntArray:
    rows = np.arange(len(listing), dtype=np.int64)
    if spec.part is not None:
        fractions = listing.ids / 2.0**64
        rows = rows[(spec.part[0] <= fractions) & (fractions < spec.part[1] if spec.part[1] < 1 else True)]
    if spec.shots is None:
        return rows
    by_class: defaultdict[str, list[int]] = defaultdict(list)
    for row in sorted(rows.tolist(), key=lambda row: sample_id(f"{spec.shots_seed} {int(listing.ids[row])}")):
        by_class[listing.classes[row]].append(row)
    return np.array(sorted(row for own in by_class.values() for row in own[: spec.shots]), dtype=np.int64)


def class_problems(listing: Listing, spec: StoredSet, classes: Sequence[str], place: str) -> list[Problem]:
    """Compares the classes of a set with the class list.

    Every class must have images, unless the set has some classes only, and no other class may stand there.

    Args:
        listing: What was found.
        spec: The set.
        classes: The class list.
        place: Where the set is named, for the problems.
    """
    if not len(listing) and not classes:
        return [Problem(place, "there must be at least one image", "none", next_step=LAYOUT_STEP)]
    wanted = {normal(class_name): class_name for class_name in classes}
    members = _members(listing, spec)
    known = {normal(target): target for targets in members.values() for target in targets}
    with_images = {normal(own) for own in set(listing.classes)}
    unknown = sorted(target for key, target in known.items() if key not in wanted)
    partly = listing.within is not None or spec.classes == "some"
    missing = [] if partly else [class_name for key, class_name in wanted.items() if key not in known]
    empty = [] if listing.is_sparse else sorted(own for own in members if own not in {*with_images, *unknown})
    problems = []
    if unknown:
        match = nearest(unknown[0], missing or classes)
        rule = "every class of a set must be in the class list"
        problems.append(Problem(place, rule, _some(unknown), tuple(classes), match, CLASS_STEP))
    if missing:
        rule = "every set must have every class"
        step = "If the set has only some of the classes, write classes: some."
        near = nearest(missing[0], unknown)
        problems.append(Problem(place, rule, f"none for {_some(missing)}", nearest=near, next_step=step))
    if empty:
        step = "Add images, or remove the empty folders."
        problems.append(Problem(place, "every class must have an image", f"none in {_some(empty)}", next_step=step))
    if spec.shots is not None and not problems:
        counts = Counter(listing.classes[row] for row in _part_and_shots(listing, spec).tolist())
        few = sorted(own for own in set(listing.classes) if counts[own] < spec.shots)
        if few:
            rule = f"every class must have {counted(spec.shots, 'image')}, as shots says"
            problems.append(Problem(f"{place}.shots", rule, f"{counts[few[0]]} in {_some(few)}"))
    return problems


def _members(listing: Listing, spec: StoredSet) -> dict[str, tuple[str, ...]]:
    """Returns for each class of the set the classes of the class list that stand for it.

    A set of some classes has those that hold an image; otherwise also the empty ones, so that they are reported.
    """
    if listing.within is not None:
        return {normal(own): tuple(targets) for own, targets in listing.within.items()}
    names = sorted(set(listing.classes)) if spec.classes == "some" else listing.found
    return {normal(own): (normal(own),) for own in names}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more
