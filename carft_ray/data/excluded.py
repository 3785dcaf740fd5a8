"""Images that a recipe leaves out by name: ``exclude`` of a set."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from carft_ray.data.source import IdArray
from carft_ray.errors import Problem

COLUMN = "sample_id"
NUM_EXAMPLES = 3


def excluded_ids(written: tuple[int, ...] | str, place: str) -> tuple[IdArray, list[Problem]]:
    """Returns the sample ids that ``exclude`` names, uint64 [K], and what is wrong with its file.

    Args:
        written: The ids, or the path of a text file with one per line or of a CSV file with a column ``sample_id``.
        place: Where it is written, for the problems.
    """
    if not isinstance(written, str):
        return np.array(written, np.uint64), []
    path = Path(written)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = [(number, text.strip()) for number, text in _texts(file) if text.strip()]
    except (OSError, ValueError, csv.Error) as error:  # of which UnicodeDecodeError is one
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        rule = f"must be a text file with a sample id per line, or a CSV file with a column {COLUMN}"
        return np.empty(0, np.uint64), [Problem(place, rule, f"{path}: {cause}")]
    wrong = [(number, text) for number, text in found if not _is_id(text)]
    problems = [
        Problem(f"{path}:{number}", "must be a sample id, a whole number from 0 to 2**64 - 1", repr(text))
        for number, text in wrong[:NUM_EXAMPLES]
    ]
    return np.array([int(text) for _, text in found if _is_id(text)], np.uint64), problems


def _texts(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yields line number and text of every id: of the column of that name, else of the first."""
    column = 0
    for row in (reader := csv.reader(lines)):
        if reader.line_num == 1 and COLUMN in row:
            column = row.index(COLUMN)
        elif row:
            yield reader.line_num, row[column] if column < len(row) else ""


def _is_id(text: str) -> bool:
    return re.fullmatch(r"\d{1,20}", text) is not None and int(text) < 2**64
