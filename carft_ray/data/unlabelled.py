"""Images without labels, as ``predict`` takes them: folders with all that is in them, files, tables.

Images are found twice, for their number and then one after the other, so that nothing is held of an image before its
turn; of a table with paths, these are held.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from carft_ray.data.decode_images import IMAGE_ENDINGS, read_bytes, unreadable
from carft_ray.data.formats.folder import is_image
from carft_ray.data.formats.tables import table_files, unlabelled_rows
from carft_ray.data.listing import text_problems
from carft_ray.data.source import Unlabelled, refused
from carft_ray.data.table_rows import ENDINGS
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.schema.data import TableSet

Found = tuple[int, Callable[[], Iterator[Unlabelled]]]
OPTIONS = ("image", "id", "root")  # keys of a recipe's table


def find_images(
    given: Sequence[Path], image: str | None = None, id: str | None = None, root: Path | None = None
) -> Found:
    """Returns the number of images and a function that yields them, in the order in which they are given.

    Args:
        given: Folders, of which every file with an ending of ``IMAGE_ENDINGS`` is taken, sorted by its path, hidden
            ones left out; files; tables, or patterns of their files.
        image: Column of the tables, as in a recipe; so are the others.
        id: Column with the names of the images.
        root: Folder that paths in a table are relative to.

    Raises:
        DataError: There is no image, or a table is not what it must be.
    """
    found: list[Found] = []
    problems: list[Problem] = []
    for path in given:
        try:
            found.append(_found(path, {"image": image, "id": id, "root": None if root is None else str(root)}))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return sum(number for number, _ in found), lambda: itertools.chain.from_iterable(make() for _, make in found)


def _found(path: Path, columns: dict[str, str | None]) -> Found:
    if path.is_dir():
        number = sum(1 for _ in _below(path))
        if number:
            return number, partial(_below, path)
        there = sorted(entry.name for entry in os.scandir(path) if entry.name.lower().endswith(ENDINGS))
        rule = f"must contain an image, a file that ends in {', '.join(IMAGE_ENDINGS)}, at any depth"
        step = f"For a table, give its file: {path / there[0]}" if there else ""
        raise DataError(Problem(str(path), rule, "none", next_step=step))
    if path.name.lower().endswith(ENDINGS) or (not os.path.lexists(path) and re.search(r"[*?\[{]", path.name)):
        return _table(path, columns)
    if not os.path.lexists(path):
        rule = "must be a folder of images, an image file or a table"
        raise DataError(Problem(str(path), rule, "no such file or folder"))
    return 1, lambda: iter([_file(str(path))])


def _table(path: Path, columns: dict[str, str | None]) -> Found:
    spec, place = TableSet(source="table", path=str(path), **columns), str(path)
    try:
        return unlabelled_rows(spec, table_files(spec, place), place)
    except OSError as error:
        raise DataError(unreadable(f"{place}: {error.filename}", error)) from error
    except DataError as error:  # the keys are options of the command
        raise DataError([_as_option(problem, place) for problem in error.problems]) from error


def _as_option(problem: Problem, place: str) -> Problem:
    for key in OPTIONS:
        if problem.place.startswith(f"{place}.{key}"):
            return replace(problem, place=f"{place}, --{problem.place.removeprefix(f'{place}.')}")
    return problem


def _file(path: str) -> Unlabelled:
    """Returns an image file; the name of one that no table can hold is no text."""
    if problems := text_problems([path], os.fsencode(path).decode(errors="backslashreplace")):
        return refused(problems[0].place, problems[0].place, problems[0])
    return Unlabelled(path, path, partial(read_bytes, path))


def _below(folder: Path) -> Iterator[Unlabelled]:
    """Yields the images of a folder, sorted by their paths; a link to a folder around it is not followed again."""
    places: list[tuple[str, tuple[str, ...]]] = [(f"{folder}/", ())]
    while places:
        path, around = places.pop()
        if not path.endswith("/"):
            yield _file(path)
            continue
        home = os.path.realpath(path)
        if home in around:
            continue
        try:
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
                names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in visible]
        except OSError as error:
            yield refused(path, path, unreadable(path, error))
            continue
        wanted = sorted((name for name in names if name.endswith("/") or is_image(name)), reverse=True)
        places += [(f"{path}{name}", (*around, home)) for name in wanted]
