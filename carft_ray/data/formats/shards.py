"""Sets that lie in a few large files: from the ``path`` of a set to the files, in order.

A path is a file, a folder of files, or a pattern: ``{000..012}`` counts, ``{a,b}`` lists, ``*``, ``?``, ``[ab]`` match.
"""

import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from carft_ray.data.listing import and_more
from carft_ray.errors import DataError, Problem, nearest

MOST_FILES = 100_000  # of a count in braces
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def find_files(written: str, endings: tuple[str, ...], place: str, step: str) -> list[Path]:
    """Returns the files that a path means, sorted where a folder or a pattern is searched.

    Args:
        written: The path, as the recipe has it.
        endings: Endings of the files that are meant, in small letters.
        place: Where the path is named, for the problems.
        step: What to do when nothing is there.

    Raises:
        DataError: There are none, or others: a pipe or device, of which reading may never end.
        PermissionError: A folder may not be read.
    """
    path = Path(written)
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_file())
        files = [path / name for name in names if name.lower().endswith(endings)]
    elif mode is not None:
        files = [path]
    else:
        texts = list(itertools.islice(_expanded(str(path)), MOST_FILES + 1))
        if len(texts) > MOST_FILES:
            raise DataError(Problem(place, f"a pattern must count at most {MOST_FILES} files", written))
        files = [Path(match) for text in texts for match in sorted(glob.glob(text)) or [text]]
    wrong = [file for file in files if not (file.name.lower().endswith(endings) and os.path.isfile(file))]
    if files and not wrong:
        return files
    there = os.listdir(path.parent) if mode is None and path.parent.is_dir() else []
    rule = "must be a file, a folder, or a pattern of files that end in one of the allowed ways"
    what = "" if not wrong or os.path.lexists(wrong[0]) else "no such file: "
    value = f"{what}{wrong[0]}{and_more(wrong)}" if wrong else f"none in {path}"
    raise DataError(Problem(place, rule, value, endings, nearest(path.name, there), step))


def folder_of(written: str) -> Path:
    """Returns the folder that holds the files of a path: itself where it is a folder."""
    path = Path(written)
    if os.path.isdir(path):
        return path
    return next(parent for parent in path.parents if not re.search(r"[{*?\[]", str(parent)) or parent.is_dir())


def _mode(path: Path) -> int | None:
    """Returns the mode of what stands at a path; None where nothing does."""
    try:
        return path.stat().st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None


def _expanded(text: str) -> Iterator[str]:
    """Yields the texts that braces stand for, the first brace changing slowest."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    low, high, listed = found.groups()
    if listed is None:
        width = len(low) if low.startswith("0") else 0
        words: Iterator[str] = (f"{number:0{width}d}" for number in range(int(low), int(high) + 1))
    else:
        words = iter(listed.split(","))
    for word in words:
        yield from _expanded(text[: found.start()] + word + text[found.end() :])
