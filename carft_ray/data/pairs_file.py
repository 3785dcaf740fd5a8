"""Pairs of images that stand in two roles, as a file to read: a CSV table, or a page with the pictures side by side."""

import base64
import csv
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from carft_ray.data.overlap import SharedImage, SharedPair
from carft_ray.data.same_picture import LIMIT
from carft_ray.errors import DataError, Problem, UsageError
from carft_ray.files import write_text

COLUMNS = ("set", "image", "sample_id", "other_set", "other_image", "other_sample_id", "found_by", "distance")
ENDINGS = (".csv", ".html")
MOST_SHOWN = 1000  # pairs of a page, about 20 kB each
SIDE = 240  # pixels of a shown picture

STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.4rem; }
article { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; border-top: 1px solid #bbb; padding: .8rem 0;
  break-inside: avoid; }
article h2 { grid-column: 1 / -1; font-size: 1rem; margin: 0 0 .5rem; }
figure { margin: 0; }
figure img { width: 240px; height: 240px; object-fit: contain; background: #e4e4e4; display: block; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; margin-top: .3rem; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } figure img { width: 5cm; height: 5cm; } }
"""


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
    write_text(path, _table(ordered) if path.suffix.lower() == ".csv" else _page(ordered))


def _table(pairs: Sequence[SharedPair]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for pair in pairs:
        images = [(each.place, each.name, each.sample_id) for each in (pair.first, pair.second)]
        rows.writerow((*images[0], *images[1], pair.how, f"{pair.distance:.3f}"))
    return text.getvalue()


def _page(pairs: Sequence[SharedPair]) -> str:
    title = f"Images in two roles: {len(pairs):,} pairs"
    counts = Counter((pair.first.place, pair.second.place, pair.how) for pair in pairs)
    lines = [f"<li>{escape(one)} and {escape(two)}: {n:,} with the {how}</li>" for (one, two, how), n in counts.items()]
    shown = "\n".join(_article(number, pair) for number, pair in enumerate(pairs[:MOST_SHOWN], start=1))
    rest = f"<p>The first {MOST_SHOWN:,} are shown; a .csv file has all.</p>" if len(pairs) > MOST_SHOWN else ""
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>Distance: the share of the picture, by contrast, that differs, 0 to 1; a pair up to {LIMIT:g}.</p>
<ul>
{"".join(lines)}
</ul>
{rest}
{shown}
</body>
</html>
"""


def _article(number: int, pair: SharedPair) -> str:
    heading = f"{number}: {pair.how}, distance {pair.distance:.3f}"
    return f"<article><h2>{heading}</h2>{_figure(pair.first)}{_figure(pair.second)}</article>"


def _figure(image: SharedImage) -> str:
    caption = f"<figcaption><b>{escape(image.place)}</b><br>{escape(image.name)}</figcaption>"
    try:
        picture = Image.fromarray(image.source.pixels(image.index))
    except DataError:
        return f"<figure><p>This file cannot be decoded.</p>{caption}</figure>"
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<figure><img alt="" src="data:image/jpeg;base64,{encoded}">{caption}</figure>'
