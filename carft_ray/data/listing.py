"""Stored images: what a set's reader finds, which of it belongs to the set, and the source that is made of it.

A reader (``data/readers.py``) lists a set without opening an image: a stable name and a class per image, and functions
that read one. All else is the same for every kind of set and stands here: ids, labels, parts, shots, masks.
"""

import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from carft_ray.data.images import decode_image, small_image
from carft_ray.data.source import IdArray, IntArray, PixelArray
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.sets import MAX_PIXELS, StoredSet
from carft_ray.words import counted


@dataclass(frozen=True, eq=False)
class Listing:
    """What a reader finds, without opening an image. Image i of N is the i-th of ``names``.

    Attributes:
        kind: Reader and its version; begins the fingerprint.
        home: Where the images are, a resolved path.
        names: Stable name of every image, [N], in the order of the set. Sample ids are their hashes, so a name must
            depend on neither machine nor place: a relative path with '/', or a key.
        classes: Class of every image, [N].
        found: All classes of the set in its own label order, also those without images.
        read: Index -> the bytes of the image's file. Raises ``DataError``.
        stamp: Index -> a text that changes when the image may have changed, cheaply: size and date of its file.
            Raises ``DataError`` when it has vanished.
        place: Index -> the image's name for messages.
        decode: Bytes of ``read`` and index -> RGB pixels, uint8 [H, W, 3]. None: they are an image file.
        within: Class of the set -> the classes of the class list that stand for it, where the set has a class list of
            its own: its images are told apart between its classes only, and a class scores the largest of its logits.
        is_sparse: Whether classes of the set may be without images, which are told apart between all of them.
        in_order: Whether images are read quickly in their order alone.
        are_files: Whether each image is a file of its own, whose path is its ``place``.
        excluded: Sample ids that belong to no set made of the listing (``exclude`` of the recipe), uint64 [K].
        passed_over: How many entries of its folders are no images of the set, by what they are.
        lost: Names of links to images that are not there.
        problems: What is missing. With problems the rest may be empty.
    """

    kind: str
    home: str
    names: Sequence[str] = ()
    classes: Sequence[str] = ()
    found: tuple[str, ...] = ()
    read: Callable[[int], bytes] = lambda index: b""
    stamp: Callable[[int], str] = lambda index: ""
    place: Callable[[int], str] = str
    decode: Callable[[bytes, int], PixelArray] | None = None
    within: Mapping[str, tuple[str, ...]] | None = None
    is_sparse: bool = False
    in_order: bool = False
    are_files: bool = False
    excluded: IdArray = field(default_factory=lambda: np.empty(0, np.uint64))
    passed_over: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        """Returns N."""
        return len(self.names)

    @cached_property
    def ids(self) -> IdArray:
        """``sample_id`` of every image, uint64 [N]."""
        return np.array([sample_id(name) for name in self.names], dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class StoredSource:
    """The ``Source`` of some images of a listing.

    Attributes:
        name: Role or name of the set, for messages.
        listing: What the reader found.
        rows: Positions in the listing, int64 [N].
        class_names: The class list.
        labels: Label of every image, int64 [N].
        groups: See ``ImageSet``.
        skipped: Names of images that were left out because they cannot be decoded.
        selection: Positions of part and shots in the listing, of which ``rows`` are those that were not left out.
        max_pixels: Of an image; see the recipe.
    """

    name: str
    listing: Listing
    rows: IntArray
    class_names: tuple[str, ...]
    labels: IntArray
    groups: tuple[tuple[int, ...], ...] | None = None
    skipped: tuple[str, ...] = ()
    selection: IntArray | None = None
    max_pixels: int = MAX_PIXELS

    @cached_property
    def sample_ids(self) -> IdArray:
        """Stable ids, uint64 [N]."""
        return self.listing.ids[self.rows]

    @property
    def home(self) -> str:
        """Where the images are, a resolved path."""
        return self.listing.home

    @property
    def num_skipped(self) -> int:
        """Number of the images that were left out because they cannot be decoded."""
        return len(self.skipped)

    @property
    def in_order(self) -> bool:
        """Whether the images are read quickly in their order alone."""
        return self.listing.in_order

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, stamps, labels and groups.

        Raises:
            DataError: A file has vanished.
        """
        digest = hashlib.blake2b(digest_size=16)
        for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True):
            stamp = self.listing.stamp(row)
            digest.update(_encoded(f"{normal(self.listing.names[row])}\0{stamp}\0{label}\n"))
        if self.groups is not None:
            digest.update(repr(self.groups).encode())
        return f"{self.listing.kind}/{digest.hexdigest()}"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return self.listing.place(int(self.rows[index]))

    def content(self, index: int) -> bytes:
        """Returns the bytes of image ``index``.

        Raises:
            DataError: The image cannot be read.
        """
        return self.listing.read(int(self.rows[index]))

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image cannot be read.
        """
        return self.decode(self.content(index), index)

    def decode(self, content: bytes, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3], from its bytes.

        Raises:
            DataError: They are no image.
        """
        row = int(self.rows[index])
        if self.listing.decode is None:
            return decode_image(content, self.listing.place(row), self.max_pixels)
        return self.listing.decode(content, row)

    def small(self, index: int, content: bytes, side: int) -> tuple[PixelArray, tuple[int, int], str]:
        """Returns image ``index`` for thumbnails from its bytes: ``images.small_image``.

        Raises:
            DataError: They are no image.
        """
        if self.listing.decode is None:
            return small_image(content, self.place(index), side, self.max_pixels)
        pixels = self.decode(content, index)
        return pixels, (pixels.shape[0], pixels.shape[1]), "RGB"

    def without(self, unwanted: Sequence[int]) -> "StoredSource":
        """Returns the source without the images at these indices, which it names as skipped."""
        kept = np.setdiff1d(np.arange(len(self)), np.asarray(unwanted, np.int64))
        names = tuple(self.place(index) for index in unwanted)
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], skipped=(*self.skipped, *names))


def selection(source: StoredSource) -> StoredSource:
    """Returns all images of the part and shots of a set, also those that were left out of it, and without classes.

    Its fingerprint is that of the files alone.
    """
    rows = source.rows if source.selection is None else source.selection
    if rows is source.rows and not source.class_names:
        return source  # it may know its fingerprint
    return StoredSource(
        source.name, source.listing, rows, (), np.zeros(len(rows), np.int64), max_pixels=source.max_pixels
    )


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
    problems = list(listing.problems) or class_problems(listing, spec, wanted, name)
    if problems:
        raise DataError(problems)
    if len(np.unique(listing.ids)) < len(listing):
        rule = "names of images must differ, also after Unicode normalisation"
        raise DataError(Problem(f"{name}: {listing.home}", rule))
    chosen = _part_and_shots(listing, spec)
    rows = _not_excluded(listing, chosen)
    if not len(rows):
        value, step = f"none of {len(listing)} in the part", "Widen its `part`."
        raise DataError(Problem(name, "there must be at least one image", value, next_step=step))
    label_of = {normal(class_name): label for label, class_name in enumerate(wanted)}
    members = _members(listing, spec)
    groups_of = {own: tuple(sorted(label_of[normal(target)] for target in targets)) for own, targets in members.items()}
    labels = np.array([groups_of[normal(listing.classes[row])][0] for row in rows.tolist()], dtype=np.int64)
    partly = listing.within is not None or spec.classes == "some"
    groups = tuple(sorted(set(groups_of.values()))) if partly else None
    return StoredSource(name, listing, rows, wanted, labels, groups, selection=chosen, max_pixels=spec.max_pixels)


def unlabelled_source(listing: Listing, spec: StoredSet, name: str) -> StoredSource:
    """Returns the images of a set whose classes are not checked; all labels are 0.

    Raises:
        DataError: Something is missing.
    """
    if listing.problems:
        raise DataError(listing.problems)
    chosen = _part_and_shots(listing, spec)
    rows = _not_excluded(listing, chosen)
    labels = np.zeros(len(rows), np.int64)
    return StoredSource(name, listing, rows, (), labels, selection=chosen, max_pixels=spec.max_pixels)


def selected_rows(listing: Listing, spec: StoredSet) -> IntArray:
    """Returns which images of a listing belong to a set: its ``part``, of that the ``shots`` of each class, without
    those that are excluded.

    The fraction of an image is its sample id over 2**64, so disjoint parts share none and more images are as likely in
    a part as in any of its length. Shots are those with the lowest hash of (seed, id), so k shots are among k + 1.
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
        rule = "every class must be there in every set"
        step = "Where the set has part of the classes, write classes: some."
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


def sample_id(name: str) -> int:
    """Returns the stable id of an image: the first 8 bytes (little-endian) of BLAKE2b of its name.

    The name is normalised (NFC) first, since file systems differ in how they spell accents.
    """
    return int.from_bytes(hashlib.blake2b(_encoded(normal(name))).digest()[:8], "little")


def normal(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def text_problems(names: Iterable[str], place: str) -> list[Problem]:
    """Returns a problem for names that are no text: what a system gives for one that is not UTF-8.

    They could be listed and read, but stand in no table, page or recipe.
    """
    wrong = [
        name for name in names if not name.isascii() and any("\ud800" <= character < "\ue000" for character in name)
    ]
    if not wrong:
        return []
    rule = "names of files and folders must be UTF-8"
    step = "Rename them, such as with: convmv -f latin1 -t utf8 -r --notest FOLDER."
    return [Problem(place, rule, f"{os.fsencode(wrong[0])!r}{and_more(wrong)}", next_step=step)]


def and_more(wrong: Sized) -> str:
    """Returns how many others there are of what is wrong, behind the one that a message names."""
    return f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


LAYOUT_STEP = "The layout that each kind of source expects stands in docs/data.md."
CLASS_STEP = "Rename it, or name all classes in data.classes."
