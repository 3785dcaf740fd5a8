"""What the layouts of benchmarks have in common: trees of class folders, and lists of images in files.

The functions of ``listers.py`` are made of these. They raise ``DataError`` for what is broken. ``found`` of a listing
are the classes that are there; ``reader.py`` compares them with those that should be.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carft_ray.data.formats.folder import file_listing, folders, is_image, missing_files
from carft_ray.data.listing import Listing
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.benchmarks import Benchmark
from carft_ray.untrusted import parse_json, read_regular, read_text

KIND = "benchmark-1"  # changes when other images, names or labels are found
STEP = "See docs/data.md for the layout of each benchmark."
MOST_LIST_BYTES = 2**28  # of a list of images; the longest that a benchmark comes with has 40 MB

Row = tuple[str, str]  # file from the root of the set, with '/', and its class


def tree_rows(root: Path, prefix: str = "") -> list[Row]:
    """Returns the images in the class folders of a folder, in the order of torchvision's ``ImageFolder``.

    Args:
        root: Root of the set.
        prefix: The folder that holds the class folders, from the root; '' for the root.
    """
    rows: list[Row] = []
    for folder in folders(root / prefix):
        rows += [(f"{prefix}/{folder}/{file}".lstrip("/"), folder) for file in images_in(root / prefix / folder)]
    return rows


def images_in(folder: Path) -> list[str]:
    """Returns the sorted names of the images of a folder."""
    return sorted(filter(is_image, os.listdir(folder)))


def listing_of(root: Path, rows: Iterable[Row]) -> Listing:
    """Returns the listing of images that were found as files."""
    names, classes = zip(*sorted(rows), strict=True) if (rows := list(rows)) else ((), ())
    return file_listing(KIND, root, names, classes, sorted(set(classes)))


def listed(root: Path, rows: Iterable[Row], place: str) -> Listing:
    """Returns the listing of images that a list names.

    Raises:
        DataError: Files are not in the root, or are named twice.
    """
    rows = list(rows)
    names = sorted({name for name, _ in rows})
    problems = []
    outside = [index for index, name in enumerate(names) if ".." in name.split("/")]
    if absent := outside or missing_files(root, names):
        rule = "every image of the list must exist"
        value = f"{len(absent)} of {len(names)} that are missing in {root}, such as {names[absent[0]]}"
        problems.append(Problem(place, rule, value, next_step=STEP))
    if len(names) < len(rows):
        problems.append(Problem(place, "a list must name an image once", f"{len(rows) - len(names)} named again"))
    if problems:
        raise DataError(problems)
    return listing_of(root, rows)


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return [line.strip() for line in read_text(path, MOST_LIST_BYTES).splitlines() if line.strip()]
    except OSError as error:
        raise unreadable_list(path, error) from error


def read_json_list(path: Path) -> dict[str, list[str]]:
    """Returns a JSON file of class -> images.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        value = parse_json(read_regular(path, MOST_LIST_BYTES))
        return {str(name): [str(image) for image in images] for name, images in value.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise unreadable_list(path, error) from error


def read_matlab(path: Path, *keys: str) -> Any:
    """Returns one variable of a MATLAB file, or a field of a structure that it is: a list of its values.

    Raises:
        DataError: It cannot be read, or has no such variable.
    """
    from scipy.io import loadmat

    try:
        value = loadmat(io.BytesIO(read_regular(path, MOST_LIST_BYTES)), squeeze_me=True)
        for key in keys:
            value = value[key]
        return [one.item() if hasattr(one, "item") else one for one in value.reshape(-1).tolist()]
    except DataError:
        raise
    except Exception as error:  # loadmat raises of every kind on damaged files
        raise unreadable_list(path, error) from error


def unreadable_list(path: Path, error: Exception) -> DataError:
    """Returns the error for a list of images that cannot be read."""
    cause = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
    return DataError(Problem(str(path), "must be the file that the benchmark comes with", cause, next_step=STEP))


def by_number(label: Any, first: int, facts: Benchmark, path: Path, image: str) -> str:
    """Returns the class of a numbered label.

    Args:
        label: The number, or a text of it.
        first: Number of the first class.
        facts: What is known of the set.
        path: File that the label stands in, for the message.
        image: What it is the label of, for the message.

    Raises:
        DataError: There is no such class.
    """
    try:
        index = int(label) - first
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(facts.classes):
        rule = f"a label must be a number from {first} to {first + len(facts.classes) - 1}"
        raise DataError(Problem(str(path), rule, f"{label} for {image}"))
    return facts.classes[index]


def fields(line: str, count: int, path: Path, separator: str | None = None) -> list[str]:
    """Returns the fields of a line of a list.

    Raises:
        DataError: There are fewer.
    """
    found = line.split(separator, count - 1)
    if len(found) < count:
        raise DataError(Problem(str(path), f"a line must have {count} fields", repr(line), next_step=STEP))
    return found
