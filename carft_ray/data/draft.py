"""A recipe for a folder of images that somebody has, written with comments, to be read and changed.

First the tree is surveyed. A *class root* is a folder whose folders hold images. Words such as ``train`` and ``val`` on
the way to it name a split, the other words a domain: ``photo``, ``train`` (no domain), ``photo/train`` and
``train/photo`` are all found.

The roles are a proposal: the largest domain (or the one that is asked for) trains, a part of it is ``id_val`` and one
is ``id_test`` unless the tree has splits; the other domains are shared out between ``ood_val``, which comes first, and
``ood_test``.
"""

import itertools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from carft_ray.data.benchmarks.reader import benchmark_words
from carft_ray.data.decode_images import cause_of
from carft_ray.data.formats.folder import folders, is_image
from carft_ray.data.listing import and_more, normal, text_problems
from carft_ray.data.sets import list_set
from carft_ray.errors import DataError, Problem, UsageError, nearest
from carft_ray.recipe.presets import ranges_for
from carft_ray.recipe.rules import ROLES
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.recipe.written import quoted
from carft_ray.untrusted import visible

_log = logging.getLogger(__name__)

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
DEEPEST = 3  # folders between the root and a class
SHARE = 0.1  # of the training images, for id_val and for id_test each, where the tree has no such split
FEW = 1000  # training images below which parts are made to hold their share; above, parts of names' hashes always do
OOD_SPLITS = ("test", "val", "train", "")  # which images of a domain show the shift: the first that is there
LAYOUT_STEP = "Images are found in ROOT/class, ROOT/domain/class, ROOT/split/class and both orders of domain and split."
IDS = "imagenet"  # the benchmark whose classes are known by their WordNet ids

Parts = dict[str, tuple[float, float]]  # split -> its part of the folder that trains

_TEMPLATE, _CORRUPTED = (
    Template(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("draft.yaml", "draft_shift.yaml")
)


@dataclass(frozen=True)
class ClassRoot:
    """A folder of class folders.

    Attributes:
        folder: Relative to the root, with '/'; '.' for the root itself.
        domain: Its domain; '' where the tree has none.
        split: ``train``, ``val``, ``test``, or '' where the tree has none.
        counts: Class folder -> images; 0 of an empty one.
    """

    folder: str
    domain: str
    split: str
    counts: dict[str, int]

    @property
    def classes(self) -> set[str]:
        """Class folders that hold images."""
        return {name for name, count in self.counts.items() if count}

    @property
    def num_images(self) -> int:
        """Images of all classes."""
        return sum(self.counts.values())


def survey(root: Path) -> list[ClassRoot]:
    """Finds the class roots of a tree; no image is opened.

    Raises:
        DataError: There is no such folder, or no image in class folders, or images stand at two depths.
    """
    try:
        found = list(_class_roots(root, "."))
        if problems := text_problems((f"{one.folder}/{name}" for one in found for name in one.counts), str(root)):
            raise DataError(problems)
    except OSError as error:
        place = str(error.filename or root)
        step = "A recipe for tables, shards and data sets by name: docs/data.md." if root.is_file() else ""
        raise DataError(Problem(place, "must be a folder that can be read", cause_of(error), next_step=step)) from error
    if not found:
        raise DataError(Problem(str(root), "must contain folders of images", "none", next_step=LAYOUT_STEP))
    depths = {0 if one.folder == "." else one.folder.count("/") + 1 for one in found}
    if len(depths) > 1:
        examples = ", ".join(one.folder for one in found[:3])
        rule = "all class folders must be at the same depth"
        raise DataError(Problem(str(root), rule, f"class folders in {examples}", next_step=LAYOUT_STEP))
    seen: dict[tuple[str, str], ClassRoot] = {}
    for one in found:
        other = seen.setdefault((one.domain, one.split), one)
        if other is not one:
            rule = "each domain must have one folder for each split"
            raise DataError(Problem(str(root), rule, f"{other.folder} and {one.folder}", next_step=LAYOUT_STEP))
    return found


def _class_roots(root: Path, folder: str) -> Iterator[ClassRoot]:
    inside = folders(root / folder)
    counts: Counter[str] = Counter()
    for name in inside:
        counts[normal(name)] += _num_images(root / folder / name)
    parts = [] if folder == "." else folder.split("/")
    with_images = sorted(name for name, number in counts.items() if number)
    below: list[ClassRoot] = []
    if len(parts) + 1 < DEEPEST and all(map(_split_of, with_images)):  # they may be splits without class folders
        below = [each for name in inside for each in _class_roots(root, "/".join([*parts, name]))]
    if with_images and not below:
        splits, others = [*filter(None, map(_split_of, parts))], [part for part in parts if not _split_of(part)]
        yield ClassRoot(folder, "/".join(others), next(iter(splits), ""), dict(counts))
    elif with_images:
        text = "%s: the images directly in %s are not used: they are in no class folder"
        _log.warning(text, root / folder, ", ".join(map(visible, with_images)))
    yield from below


def _split_of(name: str) -> str:
    """Returns the split that the name of a folder means; empty for none."""
    return next((split for split, words in SPLITS.items() if name.lower() in words), "")


def _num_images(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(is_image(entry.name) and entry.is_file() for entry in entries)


@dataclass(frozen=True)
class Roles:
    """Which domains serve as what; '' is the one domain of a tree without domains.

    Attributes:
        train: Domain that trains.
        ood_val: Domains of the selection.
        ood_test: Domains of the test.
        notes: What of the tree is not used as it is, and why: lines for the recipe and for the user.
    """

    train: str
    ood_val: tuple[str, ...]
    ood_test: tuple[str, ...]
    notes: tuple[str, ...] = ()


def choose_roles(
    found: Sequence[ClassRoot], train: str | None, ood_val: Sequence[str] | None, ood_test: Sequence[str] | None
) -> Roles:
    """Returns the roles of the domains: as asked for, the rest as proposed.

    A domain that is not asked for has no role if it has a class without training images, or only one class.

    Args:
        found: What the tree holds.
        train: Domain that trains; None: the one with the most images, of those with two classes.
        ood_val: Domains of the selection; None: half of those that are left, at least one.
        ood_test: Domains of the test; None: the rest.

    Raises:
        UsageError: A domain is not there, has two roles, or cannot have the role that is asked for.
        DataError: The training images are of one class.
    """
    sizes: Counter[str] = Counter()
    for one in found:
        sizes[one.domain] += one.num_images
    asked = {"--train": () if train is None else (train,), "--ood-val": ood_val or (), "--ood-test": ood_test or ()}
    problems, seen = [], dict[str, str]()
    for option, name in ((option, name) for option, names in asked.items() for name in names):
        if name not in sizes:
            rule = "must be a domain of the folder"
            problems.append(Problem(option, rule, repr(name), tuple(sorted(sizes)), nearest(name, sizes)))
        elif name in seen:
            problems.append(Problem(option, f"a domain has one role, and {seen[name]} has this one", repr(name)))
        seen[name] = option
    if problems:
        raise UsageError(problems)
    free = [name for name in sorted(sizes) if name not in seen]
    if train is None:
        several = {name for name in sizes if len(_splits(found, name)["train"].classes) > 1}
        train = max(free or sorted(sizes), key=lambda name: (name in several, sizes[name]))
        free = [name for name in free if name != train]
    trained = _splits(found, train)["train"]
    if len(trained.classes) < 2:
        value, step = f"{len(trained.classes)} in {trained.folder!r}", f"Name another domain by --train. {LAYOUT_STEP}"
        raise DataError(Problem("--from", "the training images must be of two classes or more", value, next_step=step))
    reasons = {name: _misfit(_shown(found, name, trained), trained) for name in sizes if name != train}
    rule = f"must be a domain that can be compared with {train!r}"
    if asked_for := [name for name in reasons if name in seen and reasons[name]]:
        raise UsageError([Problem(seen[name], rule, f"{name!r}: {reasons[name]}") for name in asked_for])
    notes = [f"{name!r} has no role: {reasons[name]}" for name in free if reasons[name]]
    free = [name for name in free if not reasons[name]]
    num_val = (len(free) + 1) // 2 if ood_test is None else len(free)
    val = free[:num_val] if ood_val is None else ood_val
    test = [name for name in free if name not in val] if ood_test is None else ood_test
    return Roles(train, tuple(val), tuple(test), (*_id_notes(found, train), *notes))


def _misfit(one: ClassRoot, trained: ClassRoot) -> str:
    """Returns why a folder cannot be a set beside the training images; empty if it can."""
    if unknown := sorted(one.classes - trained.classes):
        return f"no training image is of its class {unknown[0]!r}{and_more(unknown)}"
    return "" if len(one.classes) > 1 else f"its only class is {min(one.classes)!r}"


def _id_notes(found: Sequence[ClassRoot], domain: str) -> Iterator[str]:
    """Yields what of the domain that trains is not used as it is."""
    splits = _splits(found, domain)
    trained = splits["train"]
    if empty := sorted(trained.counts.keys() - trained.classes):
        yield f"{empty[0]!r}{and_more(empty)} in {trained.folder!r} holds no image, and is no class"
    for one in found:
        if one.domain == domain and one not in splits.values():
            yield f"{one.folder!r} has no role: {_misfit(one, trained)}"
    for split, one in splits.items():
        if missing := sorted(trained.classes - one.classes):
            among = "its images are classified among the other classes"
            yield f"id_{split} has no image of {missing[0]!r}{and_more(missing)}: {among}"


def draft(
    name: str,
    root: Path,
    path: str,
    found: Sequence[ClassRoot],
    roles: Roles,
    model: str,
    pretrained: str | None,
) -> str:
    """Returns the text of a recipe.

    Args:
        name: Of the study.
        root: Root of the tree.
        path: The same as the recipe writes it.
        found: What the tree holds.
        roles: Which domains serve as what.
        model: Name of the model.
        pretrained: Its weights.

    Raises:
        DataError: There are too few images to train on some and to keep others for id_val and id_test.
    """
    ranges = ranges_for(model)
    splits = _splits(found, roles.train)
    classes = sorted(splits["train"].classes)
    parts, train = _parts(root, splits)
    return _TEMPLATE.substitute(
        path=_text(path),
        num_classes=len(classes),
        name=_text(name),
        model=f"name: {_text(model)}" + ("" if pretrained is None else f", pretrained: {_text(pretrained)}"),
        data="\n".join(_data(path, found, roles, parts)),
        templates="sandbox" if model == "sandbox" else "openai",
        words="\n".join(_words(classes)),
        learning_rate=ranges.start,
        kl_weight=ranges.kl_start,
        batch_size=max(2, min(ranges.batch_size, 2 ** max(1, (train // 8).bit_length() - 1))),
        num_train=f"{train:,}",
        rates="low: {}, high: {}".format(*ranges.learning_rate),
        about_rate="" if ranges.sure else "   # a wide guess: no public table for this model",
        kl_weights="low: {}, high: {}".format(*ranges.kl_weight),
    )


def _parts(root: Path, splits: dict[str, ClassRoot]) -> tuple[Parts, int]:
    """Returns the parts of the images that train, and about how many then train.

    For the missing splits, from 0 on, ``SHARE`` each; the rest for ``train``. If a split of few images gets less than
    half of its share, the images are cut by their number.
    """
    one, missing = splits["train"], _missing(splits)
    number, ends = one.num_images, [SHARE * (index + 1) for index in range(len(missing))]
    if number < len(missing) + 2:
        others = "".join(f", one for id_{split}" for split in missing)
        rule = f"must have at least {len(missing) + 2} images: two for train{others}"
        raise DataError(Problem(str(root / one.folder), rule, str(number)))
    train = round((1 - SHARE * len(missing)) * number)
    if missing and number < FEW:
        fractions = np.sort(list_set(FolderSet(source="folder", **_place(str(root), one)), str(root)).ids / 2.0**64)
        counts = np.histogram(fractions, [0, *ends, 1])[0]
        train = int(counts[-1])
        if counts.min() < max(1, SHARE / 2 * number) or counts[-1] < 2:
            each = max(1, round(SHARE * number))
            train = number - each * len(missing)
            ends = [_between(*fractions[each * (index + 1) - 1 :][:2].tolist()) for index in range(len(missing))]
    bounds = itertools.pairwise([0.0, *ends, 1.0])
    return dict(zip([*missing, "train"], bounds, strict=True)), train


def _between(low: float, high: float) -> float:
    """Returns the number with the fewest digits that is above ``low`` and at most ``high``."""
    numbers = ((math.floor(low * 10**digits) + 1) / 10**digits for digits in range(1, 12))
    return next((number for number in numbers if low < number <= high), high)


def _data(path: str, found: Sequence[ClassRoot], roles: Roles, parts: Parts) -> list[str]:
    splits = _splits(found, roles.train)
    trained = splits["train"]
    lines = [
        "# Sets by role: id_val and ood_val are for selection; no model sees id_test and ood_test before `test`.",
        "data:",
        *(f"  # {note}" for note in roles.notes),
    ]
    if trained.counts.keys() != trained.classes:  # else they are those of the training images
        lines.append(f"  classes: [{', '.join(map(_text, sorted(trained.classes)))}]")
    for role, split in (("train", "train"), ("id_val", "val"), ("id_test", "test")):
        lines.append(f"  {role}: {{{_id_set(path, splits, split, parts)}}}")
        if role == "train" and _missing(splits):
            lines.append("  # id_val and id_test are other images of the same domain, chosen by a hash of their names")
    taken = set(ROLES)
    lines.append(
        "  # Shifts. ood_val is used for selection, so ood_test must have other shifts, not only other images."
    )
    if not roles.ood_val:
        lines += _CORRUPTED.substitute(of=_id_set(path, splits, "val", parts)).splitlines()
    for role, domains in (("ood_val", roles.ood_val), ("ood_test", roles.ood_test)):
        lines += [f"  {role}:"] if domains else []
        for domain in domains:
            shown = _set(path, _shown(found, domain, trained), trained)
            lines.append(f"    {_text(_free(set_name(domain), taken))}: {{{shown}}}")
    return lines


def _id_set(path: str, splits: dict[str, ClassRoot], split: str, parts: Parts) -> str:
    """Returns the set of a split of the domain that trains: its folder, or a part of the folder that trains."""
    if split in splits and (split != "train" or not _missing(splits)):
        return _set(path, splits[split], splits["train"])
    low, high = parts[split]
    return f"{_set(path, splits['train'], splits['train'])}, part: [{low:.12g}, {high:.12g}]"


def _splits(found: Sequence[ClassRoot], domain: str) -> dict[str, ClassRoot]:
    """Returns the folders of a domain by split: one is ``train``, and the others can be compared with it."""
    by_split = {one.split: one for one in found if one.domain == domain}
    if "train" not in by_split:
        largest = max(by_split.values(), key=lambda one: one.num_images)
        by_split["train"] = by_split.pop("" if "" in by_split else largest.split)
    trained = by_split["train"]
    return {split: one for split, one in by_split.items() if one is trained or not _misfit(one, trained)}


def _missing(splits: dict[str, ClassRoot]) -> list[str]:
    return [split for split in ("val", "test") if split not in splits]


def _shown(found: Sequence[ClassRoot], domain: str, trained: ClassRoot) -> ClassRoot:
    """Returns the folder of another domain that shows the shift: of those that can, the first of ``OOD_SPLITS``."""
    by_split = {one.split: one for one in found if one.domain == domain}
    there = [by_split[split] for split in OOD_SPLITS if split in by_split]
    return next((one for one in there if not _misfit(one, trained)), there[0])


def _place(path: str, one: ClassRoot) -> dict[str, Any]:
    """Returns ``path`` and ``domains`` of the set that holds a class root; ``path`` given is that of the tree."""
    if one.folder == ".":
        return {"path": path}
    above, _, last = one.folder.rpartition("/")
    return {"path": f"{path}/{above}" if above else path, "domains": [last]}


def _set(path: str, one: ClassRoot, trained: ClassRoot) -> str:
    """Returns the set of a folder; it has some of the classes where class folders are empty or missing."""
    place = _place(path, one)
    domains = "".join(f", domains: [{_text(name)}]" for name in place.get("domains", ()))
    some = "" if one.counts.keys() == one.classes == trained.classes else ", classes: some"
    return f"source: folder, path: {_text(place['path'])}{domains}{some}"


def _words(classes: Sequence[str]) -> list[str]:
    """Returns ``class_names``: ImageNet's for its ids, else readable folder names; a comment where these are none."""
    if set(classes) <= benchmark_words(IDS).keys():
        return [f"  class_names: {IDS}             # ImageNet's words for the ids that name the folders"]
    words = [readable(name) for name in classes]
    listed = "[" + ", ".join(_text(word) for word in words) + "]"
    if all(re.search(r"[^\W\d_]{2}", word) and not re.fullmatch(r"n\d{8}", word) for word in words):
        return [f"  class_names: {listed}"]
    return ["  # THESE FOLDER NAMES ARE NOT WORDS: replace them and remove the '#'.", f"  # class_names: {listed}"]


def readable(name: str) -> str:
    """Returns the name of a class folder as words: ``animals-nature``, ``animals_nature`` and ``animalsNature`` as two,
    ``012.Black_footed_Albatross`` without its number; ``t-shirt`` and what is no word stay as they are."""
    word = re.sub(r"^\d+[ ._-]+(?=.*[^\W\d_]{2})", "", name)
    word = re.sub(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})", " ", word.replace("_", " "))
    word = re.sub(r"(?<=[a-z]{2})([A-Z])(?=[a-z])", lambda found: f" {found[1].lower()}", word)
    return " ".join(word.split()) or name


def _free(name: str, taken: set[str]) -> str:
    """Returns a name, with a number where it is taken, and takes it."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    free = next(one for one in itertools.chain([name], numbered) if one not in taken)
    taken.add(free)
    return free


def set_name(domain: str) -> str:
    """Returns a name for a set or a study that is like that of a folder."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", domain).strip("_-")[:80]
    return name if name and name[0].isalnum() else f"set_{name}"


def _text(value: str) -> str:
    """Returns a text as YAML writes it in a flow: plain where that is safe, else as JSON does."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", value) and value.lower() not in _WORDS:
        return value
    return quoted(value)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "nan", ".nan", ".inf", "~")
