"""Images in a tree ``root/domain/class/*.png|jpg|...``, the layout of DomainBed; endings: ``IMAGE_ENDINGS``.

Hidden files, hidden folders, other files and deeper folders are ignored. Images are ordered by their relative names,
so neither the order of the domains in a recipe nor the file system's order matters.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from carft_ray.data.images import IMAGE_ENDINGS, read_image
from carft_ray.data.source import IdArray, IntArray, PixelArray
from carft_ray.errors import DataError, Problem, nearest


@dataclass(frozen=True, eq=False)
class FolderSource:
    """The ``Source`` of a tree of images; see ``folder_source``.

    Attributes:
        name: Role or name of the set, for messages.
        root: Root of the tree.
        files: Relative names ``domain/class/file`` in order, one per image.
        class_names: Class folders in label order.
        labels: Label of every image, int64 [N].
        sample_ids: ``sample_id`` of every relative name, uint64 [N].
    """

    name: str
    root: Path
    files: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: IntArray
    sample_ids: IdArray

    @cached_property
    def fingerprint(self) -> str:
        """Hash of relative names, sizes, times of last change and labels.

        Raises:
            DataError: A file has vanished.
        """
        digest = hashlib.blake2b(digest_size=16)
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            try:
                state = (self.root / file).stat()
            except OSError as error:
                raise DataError(_unreadable(f"{self.name}: {self.root / file}", error)) from error
            digest.update(_encoded(f"{_normal(file)}\0{state.st_size}\0{state.st_mtime_ns}\0{label}\n"))
        return f"folder-2/{digest.hexdigest()}"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.files)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3]; see ``read_image``.

        Raises:
            DataError: The image cannot be read.
        """
        return read_image(self.root / self.files[index])


@dataclass(frozen=True)
class FolderListing:
    """What stands in the domains of a tree, without opening an image.

    Attributes:
        images: Class folder -> relative names of its images over all domains. Names are as on disk.
        problems: Missing folders.
    """

    images: dict[str, list[str]]
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        """Returns the number of images."""
        return sum(len(names) for names in self.images.values())


def folder_source(root: Path, domains: Sequence[str], classes: Sequence[str] | None, name: str) -> FolderSource:
    """Returns the images of some domains of a tree as one set.

    Args:
        root: Root of the tree.
        domains: Folders of the tree that belong to the set.
        classes: Class folders in label order, all of which must be there and no others; None: the class folders that
            are there, sorted.
        name: Role or name of the set, for messages.

    Raises:
        DataError: A folder is missing, a class folder is missing, empty or unknown, or there is no image; all
            problems at once.
    """
    listing = list_folders(root, domains, name)
    found = tuple(sorted(listing.images))
    wanted = found if classes is None else tuple(classes)
    problems = list(listing.problems) or class_problems(listing, wanted, name)
    if problems:
        raise DataError(problems)
    label_of = {_normal(class_name): label for label, class_name in enumerate(wanted)}
    rows = sorted((file, label_of[class_name]) for class_name, files in listing.images.items() for file in files)
    files = tuple(file for file, _ in rows)
    ids = np.array([sample_id(file) for file in files], dtype=np.uint64)
    if len(np.unique(ids)) < len(ids):
        raise DataError(Problem(f"{name}: {root}", "file names must differ, also after Unicode normalisation"))
    labels = np.array([label for _, label in rows], dtype=np.int64)
    return FolderSource(name, root, files, wanted, labels, ids)


def sample_id(relative_name: str) -> int:
    """Returns the stable id of an image: the first 8 bytes (little-endian) of BLAKE2b of ``domain/class/file``.

    The name is normalised (NFC) first, since file systems differ in how they spell accents.
    """
    return int.from_bytes(hashlib.blake2b(_encoded(_normal(relative_name))).digest()[:8], "little")


def list_folders(root: Path, domains: Sequence[str], place: str) -> FolderListing:
    """Lists class folders and images of some domains, without opening an image.

    Args:
        root: Root of the tree.
        domains: Folders of the tree.
        place: Where the set is named, for the problems.
    """
    problems = domain_problems(root, domains, place)
    images: dict[str, list[str]] = {}
    for domain in [] if problems else sorted(domains):
        try:
            for class_folder in _folders(root / domain):
                with os.scandir(root / domain / class_folder) as entries:
                    files = [e.name for e in entries if _is_image(e.name) and e.is_file()]
                names = images.setdefault(_normal(class_folder), [])
                names.extend(f"{domain}/{class_folder}/{file}" for file in files)
        except OSError as error:
            problems.append(_unreadable(f"{place}: {error.filename}", error))
    return FolderListing(images, tuple(problems))


def domain_problems(root: Path, domains: Sequence[str], place: str) -> list[Problem]:
    """Returns a problem for a missing root and for every domain that is not a folder of it.

    Nothing below the domains is looked at. A folder that may not be entered is not a problem here.
    """
    if not _may_be_folder(root):
        return [Problem(place, "the root of the image tree must be a folder", str(root), next_step=_LAYOUT)]
    problems = []
    for position, domain in enumerate(domains):
        plain = domain not in ("", ".", "..") and "/" not in domain and os.sep not in domain
        if not plain:
            rule = "a domain must be the name of one folder, not a path"
            problems.append(Problem(place, rule, repr(domain), next_step=_LAYOUT))
        elif domain in domains[:position]:
            problems.append(Problem(place, "a domain must be listed once", repr(domain)))
        elif not _may_be_folder(root / domain):
            there = _folders(root) if os.access(root, os.R_OK | os.X_OK) else []
            rule = f"a domain must be a folder of {root}"
            problems.append(Problem(place, rule, repr(domain), tuple(there), nearest(domain, there)))
    return problems


def class_problems(listing: FolderListing, classes: Sequence[str], place: str) -> list[Problem]:
    """Compares class folders with the class list: every class must have images, and no other folder may stand there.

    Args:
        listing: What was found.
        classes: Class folders in label order.
        place: Where the set is named, for the problems.
    """
    if not len(listing) and not classes:
        return [Problem(place, "there must be at least one image", "an empty tree", next_step=_LAYOUT)]
    normal = {_normal(class_name): class_name for class_name in classes}
    missing = [class_name for key, class_name in normal.items() if key not in listing.images]
    unknown = sorted(set(listing.images) - set(normal))
    empty = sorted(folder for folder in set(listing.images) & set(normal) if not listing.images[folder])
    problems = []
    if unknown:
        match = nearest(unknown[0], missing or classes)
        rule = "every class folder must be in the class list"
        problems.append(Problem(place, rule, _some(unknown), tuple(classes), match, _CLASS_STEP))
    if missing:
        rule = "every class must have a folder in every set"
        problems.append(Problem(place, rule, f"none for {_some(missing)}", nearest=nearest(missing[0], unknown)))
    if empty:
        rule = f"every class folder must hold an image ({', '.join(IMAGE_ENDINGS)})"
        problems.append(Problem(place, rule, f"none in {_some(empty)}"))
    return problems


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


def _unreadable(place: str, error: OSError) -> Problem:
    return Problem(place, "must be readable", error.strerror or str(error))


def _folders(folder: Path) -> list[str]:
    """Sorted names of the visible folders inside a folder."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _may_be_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_ENDINGS)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


_LAYOUT = "Images are expected as PATH/domain/class/*.png; PATH is data.<set>.path of the recipe."
_CLASS_STEP = "Rename the folder, or name all classes in data.classes."
