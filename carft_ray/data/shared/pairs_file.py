"""Pairs of images that stand in two roles, as a file to read: a CSV table, or a page with the pictures side by side."""

import base64
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template

from carft_ray.data.images import small_jpeg
from carft_ray.data.shared.overlap import SharedImage, SharedPair
from carft_ray.data.shared.same_picture import LIMIT
from carft_ray.data.shared.shared_images import COLUMNS as ALL_COLUMNS
from carft_ray.data.shared.shared_images import csv_of, rows_of
from carft_ray.errors import DataError, Problem, UsageError
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
        UsageError: Another ending than .csv or .html.
        StorageError: The file cannot be written.
    """
    check_pairs_path(path)
    ordered = sorted(pairs, key=lambda pair: (pair.first.place, pair.second.place, pair.distance))
    is_table = path.suffix.lower() == ".csv"
    write_text(path, csv_of(rows_of(ordered), COLUMNS) if is_table else _page(ordered))


def _page(pairs: Sequence[SharedPair]) -> str:
    title = f"Images in two roles: {counted(len(pairs), 'pair')}"
    counts: dict[tuple[str, str], Counter[str]] = {}
    for pair in pairs:
        counts.setdefault((pair.first.place, pair.second.place), Counter())[pair.how] += 1
    lines = [
        f"<li>{html(one)} and {html(two)}: {', '.join(f'{n:,} with the {how}' for how, n in found.items())}</li>"
        for (one, two), found in counts.items()
    ]
    names = [image.name for pair in pairs for image in (pair.first, pair.second)]
    prefix = os.path.commonprefix(names)  # noqa: RUF071  (not every name is a path)
    common = prefix[: prefix.rfind("/") + 1]
    shown = "\n".join(_article(number, pair, common) for number, pair in enumerate(pairs[:MOST_SHOWN], start=1))
    rest = f"<p>The first {MOST_SHOWN:,} are shown; a .csv file has all.</p>" if len(pairs) > MOST_SHOWN else ""
    below = f"<p>All names count from {_breakable(common)}</p>" if common else ""
    return _PAGE.substitute(title=title, counts="".join(lines), limit=f"{LIMIT:g}", below=below, rest=rest, pairs=shown)


def _article(number: int, pair: SharedPair, common: str) -> str:
    apart = "" if pair.how == "same bytes" else f", distance {pair.distance:.3f}"
    pictures, words = zip(*(_shown(image, common) for image in (pair.first, pair.second)), strict=True)
    heading = f"<h2>{number}: {pair.how}{apart}</h2>"
    return f"<article>{''.join(pictures)}<div>{heading}<dl>{''.join(words)}</dl></div></article>"


def _shown(image: SharedImage, common: str) -> tuple[str, str]:
    """Returns the picture of an image, and its set, its name without the common folder, and its size in pixels."""
    words = f"<dt>{html(image.place)}</dt><dd>{_breakable(image.name.removeprefix(common))}"
    try:
        pixels = image.source.pixels(image.index)
    except DataError:
        return "<p>This file cannot be decoded.</p>", f"{words}</dd>"
    size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
    encoded = base64.b64encode(small_jpeg(pixels, SIDE, QUALITY)).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{encoded}">', f"{words}<br><small>{size}</small></dd>"


def _breakable(name: str) -> str:
    """Returns a path that may be broken behind its slashes."""
    return html(name).replace("/", "/<wbr>")
