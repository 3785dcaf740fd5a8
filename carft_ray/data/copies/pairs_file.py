"""Pairs of images that stand in two roles, as a file to read: a CSV table, or a page with the pictures side by side."""

import base64
from collections.abc import Sequence
from pathlib import Path
from string import Template

from carft_ray.data.copies.find import SharedImage, SharedPair
from carft_ray.data.copies.shared_images import COLUMNS as ALL_COLUMNS
from carft_ray.data.copies.shared_images import csv_of, rows_of
from carft_ray.data.images import small_jpeg
from carft_ray.data.same_picture import LIMIT
from carft_ray.errors import Problem, UsageError
from carft_ray.files import write_text
from carft_ray.untrusted import html
from carft_ray.words import counted

COLUMNS = [name for name in ALL_COLUMNS if not name.endswith("done")]
ENDINGS = (".csv", ".html")
MOST_SHOWN = 1000  # pairs of a page, about 20 kB each
SIDE, QUALITY = 240, 85  # of a shown picture: pixels, and of JPEG

_PAGE = Template(Path(__file__).with_name("pairs.html").read_text(encoding="utf-8"))


def check_pairs_path(path: Path) -> None:
    """Raises a ``UsageError`` for a file that is neither a table nor a page."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(Problem("--pairs", "the name must end in .csv or .html", repr(str(path))))


def write_pairs(path: Path, pairs: Sequence[SharedPair]) -> None:
    """Writes pairs, those most alike first, as the ending of the name says; a page shows ``MOST_SHOWN`` of them.

    Raises:
        DataError: A picture of a page cannot be read.
        StorageError: The file cannot be written.
    """
    ordered = sorted(pairs, key=lambda pair: (pair.first.place, pair.second.place, pair.distance))
    is_table = path.suffix.lower() == ".csv"
    write_text(path, csv_of(rows_of(ordered), COLUMNS) if is_table else _page(ordered))


def _page(pairs: Sequence[SharedPair]) -> str:
    title = f"Images in two roles: {counted(len(pairs), 'pair')}"
    shown = "\n".join(map(_article, pairs[:MOST_SHOWN]))
    rest = f"<p>The first {MOST_SHOWN:,} are shown; a .csv file has all.</p>" if len(pairs) > MOST_SHOWN else ""
    return _PAGE.substitute(title=title, limit=f"{LIMIT:g}", rest=rest, pairs=shown)


def _article(pair: SharedPair) -> str:
    pictures, words = zip(*map(_shown, (pair.first, pair.second)), strict=True)
    heading = f"<h2>{pair.how}, distance {pair.distance:.3f}</h2>"
    return f"<article>{''.join(pictures)}<div>{heading}<dl>{''.join(words)}</dl></div></article>"


def _shown(image: SharedImage) -> tuple[str, str]:
    """Returns the picture of an image, and its set, its name, and its size in pixels."""
    pixels = image.source.pixels(image.index)
    size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
    encoded = base64.b64encode(small_jpeg(pixels, SIDE, QUALITY)).decode()
    words = f"<dt>{html(image.place)}</dt><dd>{html(image.name)}<br><small>{size}</small></dd>"
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">', words
