"""Methods side by side on test sets, as a figure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from carft_ray.results.figure import FAINT, GREY, canvas, legend_above, limits, set_title, write

METHOD_COLOURS = ("#222222", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9")
METHOD_MARKS = ("*", "s", "o", "D", "^", "v")


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its interval, as fractions."""

    mean: float
    low: float
    high: float


def effect_figure(
    effects: Mapping[str, Mapping[str, Estimate]],
    path_png: Path,
    path_svg: Path,
    title: str,
    *,
    words: str,
    synthetic: bool = False,
) -> None:
    """Draws methods side by side on every set: a mark at the mean and a line over the interval, in percent.

    Args:
        effects: Method -> column (``ID``, ``OOD mean``, then single sets, drawn in this order) -> estimate. A method
            may lack a column.
        path_png: Where the PNG goes.
        path_svg: Where the SVG goes.
        title: What is compared.
        words: What the intervals are over, with the number of seeds; written below the picture.
        synthetic: Whether the images are; the title then says so.

    Raises:
        StorageError: A file cannot be written.
    """
    figure, axes = canvas(4.8)
    columns = list(dict.fromkeys(column for estimates in effects.values() for column in estimates))
    step = min(0.22, 0.66 / max(1, len(effects)))
    ends: list[float] = []
    for i, (method, estimates) in enumerate(effects.items()):
        colour, mark = METHOD_COLOURS[i % len(METHOD_COLOURS)], METHOD_MARKS[i % len(METHOD_MARKS)]
        shown = [(column, e) for column, e in estimates.items() if all(map(math.isfinite, (e.mean, e.low, e.high)))]
        axes.errorbar(
            [columns.index(column) + step * (i - (len(effects) - 1) / 2) for column, _ in shown],
            [100 * e.mean for _, e in shown],
            yerr=100 * np.array([(max(0, e.mean - e.low), max(0, e.high - e.mean)) for _, e in shown]).reshape(-1, 2).T,
            fmt=mark,
            color=colour,
            markersize=10 if mark == "*" else 6,
            linewidth=1.6,
            capsize=4,
            capthick=1.6,
            label=method,
        )
        ends += [end for _, e in shown for end in (e.low, e.high)]
    for i in range(1, len(columns)):
        axes.axvline(i - 0.5, color=GREY if columns[i - 1] == "OOD mean" else FAINT, linewidth=0.8)
    axes.set_xlim(-0.5, max(0, len(columns) - 1) + 0.5)
    axes.set_ylim(*limits(ends))
    axes.set_xticks(range(len(columns)), [column.replace("_", "\n") for column in columns])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylabel("accuracy, %")
    figure.supxlabel(words, fontsize=10, color=GREY)
    set_title(axes, title, synthetic, pad=10 + 20 * legend_above(axes))
    write(figure, path_png, path_svg)
