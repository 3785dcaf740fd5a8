"""A recipe for a folder of images that somebody has, written with comments, to be read and changed.

First the tree is surveyed. A *class root* is a folder whose folders hold images. Words such as ``train`` and ``val`` on
the way to it name a split, the other words a domain: ``photo``, ``train`` (no domain), ``photo/train`` and
``train/photo`` are all found.

The roles are a proposal: the largest domain (or the one that is asked for) trains, a part of it is ``id_val`` and one
is ``id_test`` unless the tree has splits; the other domains are shared out between ``ood_val``, which comes first, and
``ood_test``.
"""

import itertools
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
from carft_ray.data.formats.folder import folders, is_image
from carft_ray.data.images import cause_of
from carft_ray.data.listing import text_problems
from carft_ray.data.readers import list_set
from carft_ray.errors import DataError, Problem, UsageError, nearest
from carft_ray.recipe.presets import ranges_for
from carft_ray.recipe.rules import ROLES
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.recipe.yaml import quoted

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
DEEPEST = 3  # folders between the root and a class
SHARE = 0.1  # of the training images, for id_val and for id_test each, where the tree has no such split
FEW = 1000  # training images below which parts are made to hold their share; above, parts of names' hashes always do
OOD_SPLITS = ("test", "val", "train", "")  # which images of a domain show the shift: the first that is there
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
        counts: Class folder -> images.
    """

    folder: str
    domain: str
    split: str
    counts: dict[str, int]

    @property
    def num_images(self) -> int:
        """Images of all classes."""
        return sum(self.counts.values())


def survey(root: Path) -> list[ClassRoot]:
    """Finds the class roots of a tree; no image is opened.

    Raises:
        DataError: There is no such folder, or no image in class folders, or images stand at two depths.
    """
    step = "Images are found in ROOT/class, ROOT/domain/class, ROOT/split/class and both orders of domain and split."
    try:
        found = list(_class_roots(root, "."))
        if problems := text_problems((f"{one.folder}/{name}" for one in found for name in one.counts), str(root)):
            raise DataError(problems)
    except OSError as error:
        place = str(error.filename or root)
        raise DataError(Problem(place, "must be a folder that can be read", cause_of(error))) from error
    if not found:
        raise DataError(Problem(str(root), "must contain folders of images", "none", next_step=step))
    depths = {0 if one.folder == "." else one.folder.count("/") + 1 for one in found}
    if len(depths) > 1:
        examples = ", ".join(one.folder for one in found[:3])
        rule = "all class folders must be at the same depth"
        raise DataError(Problem(str(root), rule, f"class folders in {examples}", next_step=step))
    seen: dict[tuple[str, str], ClassRoot] = {}
    for one in found:
        other = seen.setdefault((one.domain, one.split), one)
        if other is not one:
            rule = "each domain must have one folder for each split"
            raise DataError(Problem(str(root), rule, f"{other.folder} and {one.folder}", next_step=step))
    return found


def _class_roots(root: Path, folder: str) -> Iterator[ClassRoot]:
    inside = folders(root / folder)
    counts = {name: count for name in inside if (count := _num_images(root / folder / name))}
    parts = [] if folder == "." else folder.split("/")
    if counts:
        splits = [split for part in parts for split, words in SPLITS.items() if part.lower() in words]
        others = [part for part in parts if not any(part.lower() in words for words in SPLITS.values())]
        yield ClassRoot(folder, "/".join(others), next(iter(splits), ""), counts)
        return
    if len(parts) + 1 < DEEPEST:
        for name in inside:
            yield from _class_roots(root, "/".join([*parts, name]))


def _num_images(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(is_image(entry.name) and entry.is_file() for entry in entries)


@dataclass(frozen=True)
class Roles:
    """Which domains serve as what; '' is the one domain of a tree without domains."""

    train: str
    ood_val: tuple[str, ...]
    ood_test: tuple[str, ...]


def choose_roles(
    found: Sequence[ClassRoot], train: str | None, ood_val: Sequence[str] | None, ood_test: Sequence[str] | None
) -> Roles:
    """Returns the roles of the domains: as asked for, the rest as proposed.

    Args:
        found: What the tree holds.
        train: Domain that trains; None: the one with the most images.
        ood_val: Domains of the selection; None: half of those that are left, at least one.
        ood_test: Domains of the test; None: the rest.

    Raises:
        UsageError: A domain is not there or has two roles.
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
        train = max(free or sorted(sizes), key=lambda name: sizes[name])
        free = [name for name in free if name != train]
    num_val = (len(free) + 1) // 2 if ood_test is None else len(free)
    val = free[:num_val] if ood_val is None else ood_val
    test = [name for name in free if name not in val] if ood_test is None else ood_test
    return Roles(train, tuple(val), tuple(test))


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
    classes = sorted({c for one in found if one.domain == roles.train for c in one.counts})
    by_split, missing = _splits(found, roles.train)
    parts, train = _parts(root, by_split["train"], missing)
    return _TEMPLATE.substitute(
        path=_text(path),
        num_classes=len(classes),
        name=_text(name),
        model=f"name: {_text(model)}" + ("" if pretrained is None else f", pretrained: {_text(pretrained)}"),
        data="\n".join(_data(path, found, roles, classes, parts)),
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


def _parts(root: Path, one: ClassRoot, missing: Sequence[str]) -> tuple[Parts, int]:
    """Returns the parts of the images that train, and about how many then train.

    For the ``missing`` splits, from 0 on, ``SHARE`` each; the rest for ``train``. If a split of few images gets less
    than half of its share, the images are cut by their number.
    """
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


def _data(path: str, found: Sequence[ClassRoot], roles: Roles, classes: Sequence[str], parts: Parts) -> list[str]:
    missing = _splits(found, roles.train)[1]
    lines = [
        "# Sets by role: id_val and ood_val are for selection; no model sees id_test and ood_test before `test`.",
        "data:",
    ]
    for role, split in (("train", "train"), ("id_val", "val"), ("id_test", "test")):
        lines.append(f"  {role}: {{{_id_set(path, found, roles.train, split, parts)}}}")
        if role == "train" and missing:
            lines.append("  # id_val and id_test are other images of the same domain, chosen by a hash of their names")
    taken = set(ROLES)
    lines.append(
        "  # Shifts. ood_val is used for selection, so ood_test must have other shifts, not only other images."
    )
    if not roles.ood_val:
        lines += _CORRUPTED.substitute(of=_id_set(path, found, roles.train, "val", parts)).splitlines()
    for role, domains in (("ood_val", roles.ood_val), ("ood_test", roles.ood_test)):
        lines += [f"  {role}:"] if domains else []
        for domain in domains:
            by_split = {one.split: one for one in found if one.domain == domain}
            shown = _folder(path, next(by_split[split] for split in OOD_SPLITS if split in by_split))
            there = {name for one in by_split.values() for name in one.counts}
            some = ", classes: some" if there < set(classes) else ""
            lines.append(f"    {_text(_free(set_name(domain), taken))}: {{{shown}{some}}}")
    return lines


def _id_set(path: str, found: Sequence[ClassRoot], domain: str, split: str, parts: Parts) -> str:
    """Returns the set of a split of a domain: its folder, or a part of the folder that trains."""
    by_split, missing = _splits(found, domain)
    if split in by_split and (split != "train" or not missing):
        return _folder(path, by_split[split])
    low, high = parts[split]
    return f"{_folder(path, by_split['train'])}, part: [{low:.12g}, {high:.12g}]"


def _splits(found: Sequence[ClassRoot], domain: str) -> tuple[dict[str, ClassRoot], list[str]]:
    """Returns the folders of a domain by split, one of which is ``train``, and which of val and test are missing."""
    by_split = {one.split: one for one in found if one.domain == domain}
    if "train" not in by_split:
        largest = max(by_split.values(), key=lambda one: one.num_images)
        by_split["train"] = by_split.pop("" if "" in by_split else largest.split)
    return by_split, [split for split in ("val", "test") if split not in by_split]


def _place(path: str, one: ClassRoot) -> dict[str, Any]:
    """Returns ``path`` and ``domains`` of the set that holds a class root; ``path`` given is that of the tree."""
    if one.folder == ".":
        return {"path": path}
    above, _, last = one.folder.rpartition("/")
    return {"path": f"{path}/{above}" if above else path, "domains": [last]}


def _folder(path: str, one: ClassRoot) -> str:
    place = _place(path, one)
    domains = "".join(f", domains: [{_text(name)}]" for name in place.get("domains", ()))
    return f"source: folder, path: {_text(place['path'])}{domains}"


def _words(classes: Sequence[str]) -> list[str]:
    """Returns ``class_names``: ImageNet's for its ids, else readable folder names; a comment where these are none."""
    if set(classes) <= benchmark_words(IDS).keys():
        return [f"  class_names: {IDS}             # its words for the ids that the folders are named by"]
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
