"""Classes of images that a file labels: by text, or by whole numbers that count from 0 in a list of names."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from carft_ray.data.images import cause_of
from carft_ray.data.listing import and_more, normal
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.untrusted import read_text

NAMES_STEP = "Name the classes, in the order of the numbers: class_names: [cat, dog], or a text file with one per line."


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
