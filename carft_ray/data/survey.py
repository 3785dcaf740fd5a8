"""What kind of image tree a folder is: where its classes stand, and which of its folders are domains and splits.

A *class root* is a folder whose folders hold images. Words such as ``train`` and ``val`` on the way to it name a
split, the other words a domain: ``photo``, ``train`` (no domain), ``photo/train`` and ``train/photo`` are all found.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from carft_ray.data.formats.folder import folders, is_image
from carft_ray.errors import DataError, Problem

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
DEEPEST = 3  # folders between the root and a class


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
    except OSError as error:
        place = str(error.filename or root)
        raise DataError(Problem(place, "must be a folder that can be read", error.strerror or str(error))) from error
    if not found:
        raise DataError(Problem(str(root), "must hold folders of images", "none", next_step=step))
    depths = {0 if one.folder == "." else one.folder.count("/") + 1 for one in found}
    if len(depths) > 1:
        examples = ", ".join(one.folder for one in found[:3])
        rule = "all class folders must stand at one depth"
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
    counts = {name: _num_images(root / folder / name) for name in inside}
    if sum(counts.values()):
        yield _class_root(folder, {name: count for name, count in counts.items() if count})
        return
    parts = [] if folder == "." else folder.split("/")
    if len(parts) + 1 < DEEPEST:
        for name in inside:
            yield from _class_roots(root, "/".join([*parts, name]))


def _class_root(folder: str, counts: dict[str, int]) -> ClassRoot:
    parts = [] if folder == "." else folder.split("/")
    splits = [split for part in parts for split, words in SPLITS.items() if part.lower() in words]
    others = [part for part in parts if not any(part.lower() in words for words in SPLITS.values())]
    return ClassRoot(folder, "/".join(others), splits[0] if splits else "", counts)


def _num_images(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(is_image(entry.name) and entry.is_file() for entry in entries)
