"""Images in a tree ``root/domain/class/*.png|jpg|...`` (DomainBed's) or ``root/class/*``; classes that a file labels.

The endings of images are ``IMAGE_ENDINGS``.

Hidden files and hidden folders are ignored; other files and deeper folders are passed over and counted. Images are
ordered by their relative names, so neither the order of the domains in a recipe nor the file system's order matters.

A file labels classes by text, or by whole numbers that count from 0 in a list of names.
"""

import contextlib
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carft_ray.data.decode_images import IMAGE_ENDINGS, cause_of
from carft_ray.data.listing import Listing, and_more, image_table, normal
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.untrusted import read_text

NAMES_STEP = "Name the classes, in the order of the numbers: class_names: [cat, dog], or a text file with one per line."
KIND = "folder-2"
_TO_NOWHERE, _FOLDER = "link to nowhere", "folder"
SANDBOX_FOLDER = "sandbox_png"  # of ``search_spaces/folders.yaml``
_LAYOUT = "Images are expected as PATH/domain/class/*.png, without domains as PATH/class/*.png; PATH is the set's path."


def read_class_names(written: tuple[str, ...] | str | None, place: str) -> tuple[str, ...] | None:
    """Returns the class names of a set in the order of the labels: a list, or the lines of a text file.

    Args:
        written: The list, or the path of the file; None: there are none.
        place: Where they are named, for the problems.

    Raises:
        DataError: The file cannot be read, or a name is empty or stands twice.
    """
    if not isinstance(written, str):
        return written
    path = Path(written)
    try:
        lines = read_text(path).rstrip().split("\n")
    except OSError as error:
        rule = "must be a readable text file with a class name per line"
        raise DataError(Problem(place, rule, f"{path}: {cause_of(error)}")) from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise DataError(Problem(f"{path}:{names.index('') + 1}", "must contain the name of a class, but is empty"))
    step = "Give ids that differ, and the words, which may repeat, in prompts.class_names."
    check_names(names, "classes", lambda index: f"{path}:{index + 1}", place, step)
    return names


def check_names(names: Sequence[str], what: str, spot: Callable[[int], str], place: str, step: str) -> None:
    """Checks that no two images have one name.

    Args:
        names: Name of every image, [N].
        what: What an image is called in the message.
        spot: Index -> where the image stands, for the message.
        place: Where the set is named, for the problem.
        step: What to do about it.

    Raises:
        DataError: Two have.
    """
    first: dict[str, int] = {}
    for index, name in enumerate(map(normal, names)):
        if first.setdefault(name, index) != index:
            value = f"{name!r} in {spot(first[name])} and {spot(index)}"
            raise DataError(Problem(place, f"the names of two {what} must differ", value, next_step=step))


def whole_numbers(labels: Sequence[Any]) -> Sequence[Any]:
    """Returns the labels of a text format as numbers where all of them are whole numbers, else as they are."""
    if all(isinstance(label, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", label) for label in labels):
        return [int(label) for label in labels]
    return labels


def named_classes(
    labels: Sequence[Any], names: Sequence[str] | None, spot: Callable[[int], str], place: str
) -> tuple[list[str], tuple[str, ...], list[Problem]]:
    """Returns the class of every image.

    Args:
        labels: Label of every image: all texts, or all whole numbers.
        names: Names of the classes in label order; None: those of the texts, sorted.
        spot: Index -> where the label stands, for messages.
        place: Where the set is named, for the problems.

    Returns:
        The classes, [N]; all classes in label order, also those without images; the problems.
    """

    def problem(rule: str, wrong: list[int], allowed: tuple[str, ...] = (), step: str = "") -> Problem:
        value = f"{labels[wrong[0]]!r} in {spot(wrong[0])}{and_more(wrong)}"
        near = nearest(str(labels[wrong[0]]), allowed) if allowed else None
        return Problem(f"{place}.label", rule, value, allowed, near, step)

    if empty := [index for index, label in enumerate(labels) if label is None or label == ""]:
        return [], (), [problem("every image must have a label", empty)]
    kinds = {type(label) for label in labels}
    if not kinds <= {str} and not kinds <= {int}:
        rule = "every label must be a text, or every one a whole number"
        common = str if sum(type(label) is str for label in labels) * 2 > len(labels) else int
        return [], (), [problem(rule, [i for i, label in enumerate(labels) if type(label) is not common])]
    if int in kinds:
        if names is None:
            rule = "labels that are numbers need the names of the classes"
            return [], (), [Problem(place, rule, f"{labels[0]} in {spot(0)}", next_step=NAMES_STEP)]
        if wrong := [index for index, label in enumerate(labels) if not 0 <= label < len(names)]:
            rule = f"a label must be from 0 to {len(names) - 1}, as there are {len(names)} class names"
            return [], (), [problem(rule, wrong)]
        return [names[label] for label in labels], tuple(names), []
    texts = [normal(label) for label in labels]
    if names is None:
        return texts, tuple(sorted(set(texts))), []
    known = {normal(name): name for name in names}
    if wrong := [index for index, text in enumerate(texts) if text not in known]:
        return [], (), [problem("a label must be one of class_names", wrong, tuple(names))]
    return [known[text] for text in texts], tuple(names), []


def list_folder_set(spec: FolderSet, place: str) -> Listing:
    """Lists the images of a tree. The names are ``domain/class/file``, or ``class/file`` without domains.

    Args:
        spec: The set.
        place: Where the set is named, for the problems.

    Raises:
        DataError: Something is missing, or a folder cannot be read.
    """
    root = Path(spec.path)
    problems = folder_set_problems(spec, place)
    rows: list[tuple[str, str]] = []
    classes: dict[str, list[str]] = {}  # of each domain
    passed_over: Counter[str] = Counter()
    lost: list[str] = []
    for domain in [] if problems else (["."] if spec.domains is None else sorted(spec.domains)):
        try:
            for class_folder in folders(root / domain):
                prefix = class_folder if spec.domains is None else f"{domain}/{class_folder}"
                classes.setdefault(domain, []).append(normal(class_folder))
                with os.scandir(root / domain / class_folder) as entries:
                    for entry in entries:
                        kind = _passed_over(entry)
                        if kind is None:
                            rows.append((f"{prefix}/{entry.name}", normal(class_folder)))
                        elif kind:
                            passed_over[kind] += 1
                        if kind == _TO_NOWHERE and is_image(entry.name):
                            lost.append(f"{prefix}/{entry.name}")
        except OSError as error:
            problems.append(Problem(f"{place}: {error.filename}", "must be readable", cause_of(error)))
    if problems := problems or _spelling_problems(classes, f"{place}: {root}"):
        raise DataError(problems)
    rows.sort()
    found = sorted({name for names in classes.values() for name in names})
    listing = file_listing(KIND, root, [name for name, _ in rows], [own for _, own in rows], found)
    return replace(listing, passed_over=passed_over, lost=tuple(sorted(lost)))


def _passed_over(entry: os.DirEntry[str]) -> str | None:
    """Returns as what an entry of a class folder is passed over; None for an image, '' for what is hidden."""
    if entry.name.startswith("."):
        return ""
    if entry.is_file():
        return None if is_image(entry.name) else os.path.splitext(entry.name)[1].lower() or "without ending"
    return _FOLDER if entry.is_dir() else _TO_NOWHERE if entry.is_symlink() else "pipe, socket or device"


def _spelling_problems(classes: dict[str, list[str]], place: str) -> list[Problem]:
    """Returns a problem for classes that differ in case alone, unless one domain has both: letters may be classes."""
    spelled: defaultdict[str, dict[str, str]] = defaultdict(dict)  # without case -> name -> its place
    for domain, names in classes.items():
        for name in names:
            spelled[name.casefold()].setdefault(name, f"{domain}/{name}")
    together = {key for names in classes.values() for key, n in Counter(map(str.casefold, names)).items() if n > 1}
    rule = "a class must be spelled the same way in all domains: on disks that ignore case both are one folder"
    twice = [places.values() for key, places in spelled.items() if len(places) > 1 and key not in together]
    return [Problem(place, rule, " and ".join(places), next_step="Rename one.") for places in twice]


def file_listing(
    kind: str,
    root: Path,
    names: Sequence[str],
    classes: Sequence[str],
    found: Sequence[str],
    files: Sequence[str] | None = None,
) -> Listing:
    """Returns the listing of images that are files.

    Args:
        kind: Reader and its version.
        root: Folder that the files' names count from.
        names: Stable names, [N].
        classes: Class of every image, [N].
        found: All classes in label order.
        files: Relative names of the files where they are not ``names``.
    """
    home = os.path.realpath(root)
    table = image_table(names, classes, names if files is None else files, home)
    return Listing(kind, home, table, tuple(found), str(root))


def folder_set_problems(spec: FolderSet, place: str) -> list[Problem]:
    """Returns a problem for a missing root and for every domain that is not a folder of it.

    Nothing below the domains is checked. A folder that may not be entered is not a problem here.
    """
    root, domains = Path(spec.path), spec.domains or ()
    if not may_be_folder(root):
        step = f"To write the sandbox's images there: carft-ray sandbox images --to {shlex.quote(str(root))}"
        step = step if root.name == SANDBOX_FOLDER else _LAYOUT
        return [Problem(place, "the root of the image tree must be a folder", str(root), next_step=step)]
    wrong = [domain for domain in domains if not may_be_folder(root / domain)]
    there = folders(root) if wrong and os.access(root, os.R_OK | os.X_OK) else []
    rule = f"a domain must be a folder of {root}"
    return [Problem(place, rule, repr(domain), tuple(there), nearest(domain, there)) for domain in wrong]


def folder_set_places(spec: FolderSet) -> list[str]:
    """Returns the folders that hold the images of a set, links resolved."""
    root = Path(spec.path)
    return [os.path.realpath(root / domain) for domain in spec.domains or (".",)]


def may_be_folder(path: Path) -> bool:
    """Returns whether a path is a folder, or hides whether it is one."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False


def folders(folder: Path) -> list[str]:
    """Returns the sorted names of the visible folders inside a folder."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def missing_files(root: Path, names: Sequence[str]) -> list[int]:
    """Returns the indices of relative names that are no files. A folder is read once: quicker than asking per file."""
    there: dict[str, frozenset[str]] = {}
    missing = []
    for index, path in enumerate(names):
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = frozenset()
            with contextlib.suppress(OSError):
                there[folder] = frozenset(os.listdir(root / folder))
        if name not in there[folder] and not os.path.isfile(root / path):
            missing.append(index)
    return missing


def is_image(name: str) -> bool:
    """Returns whether a file is one of the images of a tree, by its name."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_ENDINGS)
