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

from carft_ray.errors import DataError, Problem, nearest
from carft_ray.words import counted

MOST_FILES = 100_000  # of a count in braces
_COUNT, _LIST = re.compile(r"\{(\d+)\.\.(\d+)\}"), re.compile(r"\{([^{}]*,[^{}]*)\}")


def find_files(written: str, endings: tuple[str, ...], place: str, step: str) -> list[Path]:
    """Returns the files that a path means, sorted where a folder or a pattern is searched.

    Args:
        written: The path, as the recipe has it.
        endings: Endings of the files that are meant, in small letters.
        place: Where the path is named, for the problems.
        step: What to do when nothing is there.

    Raises:
        DataError: There are none, or others.
        PermissionError: A folder may not be read.
    """
    path = Path(written)
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_file())
        found = [path / name for name in names if name.lower().endswith(endings)]
        others = "" if found else f"none of {counted(len(names), 'file')}" if names else "none"
        rule = "there must be a file in the folder that ends in one of the allowed ways"
        if not found:
            raise DataError(Problem(f"{place}: {path}", rule, others, endings, next_step=step))
        return found
    if mode is not None:
        if path.name.lower().endswith(endings):
            return _regular([path], place)
        raise DataError(Problem(place, "must be a file that ends in one of the allowed ways", str(path), endings))
    if not re.search(r"[{*?\[]", written):
        there = os.listdir(path.parent) if path.parent.is_dir() else []
        rule = "must be a file, a folder, or a pattern of files"
        raise DataError(Problem(place, rule, f"no such one: {path}", nearest=nearest(path.name, there), next_step=step))
    texts = list(itertools.islice(_expanded(str(path)), MOST_FILES + 1))
    if len(texts) > MOST_FILES:
        raise DataError(Problem(place, f"a pattern must count at most {MOST_FILES} files", written))
    files: list[Path] = []
    missing: list[str] = []
    for text in texts:
        matches = [text] if os.path.isfile(text) else sorted(glob.glob(text)) if re.search(r"[*?\[]", text) else []
        files += [Path(match) for match in matches]
        missing += [] if matches else [text]
    if missing or not files:
        value = f"none for {len(missing)} of {len(texts)}, such as {missing[0]}" if missing else "none"
        rule = f"there must be a file for every name that {written} stands for"
        raise DataError(Problem(place, rule, value, next_step=step))
    wrong = [str(file) for file in files if not file.name.lower().endswith(endings)]
    if wrong:
        raise DataError(Problem(place, "must be files that end in one of the allowed ways", wrong[0], endings))
    return _regular(files, place)


def _regular(files: list[Path], place: str) -> list[Path]:
    """Returns the files; raises where one is a pipe, a device, a socket or a folder, of which reading may never end."""
    if wrong := [file for file in files if not file.is_file()]:
        raise DataError(Problem(place, "must be regular files", f"{wrong[0]}, which is none"))
    return files


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
    found = min(filter(None, (_COUNT.search(text), _LIST.search(text))), key=lambda match: match.start(), default=None)
    if found is None:
        yield text
        return
    if ".." in found.group() and found.re is _COUNT:
        low, high = found.groups()
        width = len(low) if low.startswith("0") else 0
        words: Iterator[str] = (f"{number:0{width}d}" for number in range(int(low), int(high) + 1))
    else:
        words = iter(found.group(1).split(","))
    for word in words:
        yield from _expanded(text[: found.start()] + word + text[found.end() :])
