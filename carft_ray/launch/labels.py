"""Places for the labels of a scatter plot, so that they hit neither each other nor the marks."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches, of label text: height of a line, width of a letter
_TEXT_HEIGHT, _TEXT_WIDTH, _SMALL_TEXT_WIDTH = 0.155, 0.08, 0.068
# inches between a mark and its label, and the directions that are tried, in order
_DISTANCES = (0.16, 0.28, 0.45, 0.7, 1.0, 1.4)
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))

_Box = tuple[float, float, float, float]  # left, bottom, right, top


class Label(NamedTuple):
    """A text for the mark at (x, y), in data coordinates; ``needed`` ones are never left out."""

    text: str
    x: float
    y: float
    colour: str
    needed: bool


def place_labels(figure: "Figure", axes: "Axes", labels: Sequence[Label], taken: Sequence[tuple[float, float]]) -> None:
    """Writes each label at the first place around its mark that hits no label, no mark and no edge.

    The places are tried from near to far; a far one gets a thin line to its mark. A label that must be there but finds
    no free place takes the one that hits least; one that may be left out (an alpha value) is left out then, and also
    where its mark lies on one that has a label.

    Args:
        figure: The figure, complete but for the labels.
        axes: Where; its limits are final.
        labels: The most important first.
        taken: Places covered by marks and lines, in data coordinates.
    """
    figure.draw_without_rendering()  # fixes the layout
    inch = figure.dpi_scale_trans.inverted()
    to_inches = axes.transData + inch
    edges = axes.get_window_extent().transformed(inch)
    marks = to_inches.transform(np.asarray(taken, float).reshape(-1, 2)) if len(taken) else np.zeros((0, 2))
    boxes: list[_Box] = []
    named: list[tuple[float, float]] = []
    for label in labels:
        mark = to_inches.transform((label.x, label.y))
        if not label.needed and any(math.dist(mark, other) < 0.12 for other in named):
            continue
        width = (_TEXT_WIDTH if label.needed else _SMALL_TEXT_WIDTH) * len(label.text)
        best: tuple[float, float, float] | None = None  # hits, centre
        for distance in _DISTANCES if label.needed else (0.1,):
            for dx, dy in _DIRECTIONS:
                x = float(mark[0]) + dx * (distance + width / 2)
                y = float(mark[1]) + dy * (distance + _TEXT_HEIGHT / 2)
                box = (x - width / 2, y - _TEXT_HEIGHT / 2, x + width / 2, y + _TEXT_HEIGHT / 2)
                inside = (np.abs(marks - (x, y)) < (width / 2 + 0.05, _TEXT_HEIGHT / 2 + 0.05)).all(axis=1)
                hits = float(inside.sum()) + 20 * sum(_overlap(box, other) for other in boxes)
                hits += 50 * (box[0] < edges.x0 or box[2] > edges.x1 or box[1] < edges.y0 or box[3] > edges.y1)
                if best is None or hits < best[0]:
                    best = (hits, x, y)
            if best is not None and best[0] == 0:
                break
        if best is None or (best[0] > 0 and not label.needed):
            continue
        named.append((float(mark[0]), float(mark[1])))
        _, x, y = best
        boxes.append((x - width / 2, y - _TEXT_HEIGHT / 2, x + width / 2, y + _TEXT_HEIGHT / 2))
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkB": 7}
        gap = math.hypot(max(0, abs(x - mark[0]) - width / 2), max(0, abs(y - mark[1]) - _TEXT_HEIGHT / 2))
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(72 * (x - float(mark[0])), 72 * (y - float(mark[1]))),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=10.5 if label.needed else 9,
            color=label.colour,
            zorder=8,
            arrowprops=line if gap > 0.3 else None,
        )


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
