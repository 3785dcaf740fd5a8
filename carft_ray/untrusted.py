"""The gates for what comes from others: files read whole, names that become paths, text that is shown.

Recipes, tables, images, weights and studies come from strangers. What reads a file of theirs whole, makes a path of a
name of theirs, or shows a text of theirs, does it through here; a test walks the package for calls that go around.
Images have a gate of their own, ``data.decode_images``; files of weights, too, ``model.weights_files``.
"""

import contextlib
import errno
import html as standard_html
import json
import math
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

from carft_ray.errors import CarftError, DataError, Problem

MOST_TEXT_BYTES = 64 * 2**20  # of a file that is read whole and is no image: a list of 1,000,000 names has 30 MB
MOST_VALUES = 2**23  # of JSON: each takes up to a hundred bytes of memory
DEEPEST = 64  # lists and objects in each other
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SPECIAL = "a pipe, device or socket"
_ESCAPED = b"\\u"  # in JSON, before the number of a character
_SHOWN_WHITE_SPACE = "\n\t"
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "#$%&_{}"},
}
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # id_val has no emphasis
_FORMULA = re.compile(r"'*[=+@\t\r-]")


def open_regular(path: Path | str, error: type[CarftError] = DataError) -> BinaryIO:
    """Opens a regular file for reading, through links; never waits for a writer.

    Args:
        path: The file.
        error: What is raised for a file that is none.

    Raises:
        CarftError: ``error``: it is a folder, pipe, device, socket or loop of links, or its name cannot be one.
        OSError: It is missing or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as cause:  # a NUL in the name
        raise error(Problem(visible(str(path)), "must be the name of a file", f"one with {cause}")) from cause
    except OSError as cause:
        if cause.errno != errno.ELOOP:
            raise
        raise error(Problem(visible(str(path)), "must be a regular file", "a loop of links")) from cause
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else _SPECIAL
        raise error(Problem(visible(str(path)), "must be a regular file", kind))
    return os.fdopen(handle, "rb")


def read_regular(path: Path | str, most_bytes: int = MOST_TEXT_BYTES, error: type[CarftError] = DataError) -> bytes:
    """Returns the content of a regular file; never reads more than the limit.

    Args:
        path: The file; links are followed.
        most_bytes: The limit.
        error: What is raised for a file that is none, or too large.

    Raises:
        CarftError: ``error``: as ``open_regular``, or it has more bytes.
        OSError: As there.
    """
    with open_regular(path, error) as file:
        size, content = os.fstat(file.fileno()).st_size, b""
        if size <= most_bytes:
            content = file.read(size + 1)
            if len(content) > size:  # some systems say that a file has no bytes until it is read
                content += file.read(most_bytes - size)
            size = len(content)
    if size > most_bytes:
        rule = f"must have at most {most_bytes:,} bytes, since it is read whole"
        raise error(Problem(visible(str(path)), rule, f"{size:,}"))
    return content


def read_text(path: Path | str, most_bytes: int = MOST_TEXT_BYTES, error: type[CarftError] = DataError) -> str:
    """As ``read_regular``, for text in UTF-8; a byte order mark is left out.

    Raises:
        CarftError: As ``read_regular``, or it is no UTF-8.
        OSError: As there.
    """
    content = read_regular(path, most_bytes, error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        rule = f"must be text in UTF-8, but byte {cause.start:,} is not"
        raise error(Problem(visible(str(path)), rule)) from cause


def parse_json(content: str | bytes) -> Any:
    """Returns what JSON holds.

    Raises:
        ValueError: It is none, is nested too deep to be read, has more than ``MOST_VALUES``, or a text in it is none
            that can be written.
    """
    try:
        raw = content.encode() if isinstance(content, str) else content
        if len(raw) > MOST_VALUES and sum(map(raw.count, (b",", b"[", b"{"))) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        value = json.loads(content)
        if _ESCAPED in raw:
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def require_plain(value: Any) -> Any:
    """Returns a value of JSON that later code can compute with and print: no number is not finite or has over 64 bits.

    Raises:
        ValueError: One is; or it is nested deeper than ``DEEPEST``.
    """
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if (kind is float and not math.isfinite(each)) or (kind is int and each.bit_length() > 64):
                raise ValueError(f"an impossible number: {str(each)[:30]}")
            if kind is dict:
                below += each.values()
            elif kind is list:
                below += each
        level, depth = below, depth + 1
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
    return value


def is_name(text: str) -> bool:
    """Tells whether a text may become the name of a file or folder: letters, digits, ``. _ -``, at most 200."""
    return _NAME.fullmatch(text) is not None


def require_nothing_outside(folder: Path, error: type[CarftError]) -> None:
    """Refuses a folder that is to be written to and has a link that leads out of it, or a pipe, device or socket.

    Args:
        folder: The folder; it may be a link itself, and need not be there.
        error: What is raised.

    Raises:
        CarftError: ``error``.
        OSError: The folder cannot be read.
    """
    home, places = os.path.realpath(folder), [str(folder)]
    while places:
        with contextlib.suppress(FileNotFoundError), os.scandir(places.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
                elif entry.is_symlink():
                    leads_to = os.path.realpath(entry.path)
                    if not Path(leads_to).is_relative_to(home):
                        rule = f"must not lead out of {folder}, where it would be written or removed"
                        step = "Remove the link, or put what it leads to in its place; the folder itself may be a link."
                        raise error(
                            Problem(visible(entry.path), rule, visible(f"a link to {leads_to}"), next_step=step)
                        )
                elif not entry.is_file(follow_symlinks=False):
                    rule = "must be a file or a folder"
                    raise error(Problem(visible(entry.path), rule, _SPECIAL, next_step="Remove it."))


def visible(text: str) -> str:
    r"""Returns text that a terminal, a log or a page shows as it is: what steers them is written out.

    Control characters but newline and tab, marks that change the direction of text, and halves of surrogate pairs
    become ``\x1b``, ``\u202e`` and the like.
    """
    return "".join(map(_visible, text)) if not text.isascii() or not text.isprintable() else text


def visible_line(text: str) -> str:
    r"""Returns ``visible`` text on one line, for the cell of a table: newline and tab become ``\n`` and ``\t``, too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _visible(character: str) -> str:
    if character in _SHOWN_WHITE_SPACE:
        return character
    is_hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    if is_hidden or unicodedata.bidirectional(character) in _DIRECTIONS or character in "\u200e\u200f\u061c":
        return character.encode("unicode_escape").decode("ascii")
    return character


def latex(text: str) -> str:
    """Returns text for one line of LaTeX, of a table too: each character that has a meaning there is written out."""
    line = "".join(_LATEX.get(character, character) for character in _one_line(text))
    return f"{{}}{line}" if line.startswith(("[", "*")) else line  # these would be arguments of a \\ before them


def html(text: str) -> str:
    """Returns text for HTML, for an attribute too."""
    return standard_html.escape(visible(text))


def markdown(text: str) -> str:
    """Returns text for the middle of a line of Markdown: what has a meaning there, or in HTML, is escaped."""
    return _MARKDOWN.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())


def csv_cell(text: str) -> str:
    """Returns text for a cell of a table that spreadsheets open: one that would be a formula begins with ``'``."""
    return f"'{text}" if _FORMULA.match(text) else text


def of_csv_cell(cell: str) -> str:
    """Returns the text that ``csv_cell`` was given."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell
