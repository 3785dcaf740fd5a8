"""The picture of a search: ID against OOD accuracy, drawn from what is on disk when it has ended.

Colours can be distinguished by the colour-blind (Okabe and Ito 2008; cividis), marks differ in form too, and text is
readable when the picture is shown 800 pixels wide.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from carft_ray import files
from carft_ray.evaluation.objective import ObjectiveKind, ObjectiveSpec, objective_spec
from carft_ray.layout import FIGURE_PNG, FIGURE_SVG
from carft_ray.recipe.schema.data import plain
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.pareto_front import front_of
from carft_ray.study.rows import ZERO_SHOT, best_row, num_finished
from carft_ray.study.study import Study
from carft_ray.study.training import TrialRow, result_of
from carft_ray.words import counted

INK, GREY, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
_ACCENT = "#d55e00"  # the best trial
_MANY = 300  # dots above which they are small, and pixels in the SVG: each is some 300 bytes there
_LEGEND_COLUMNS = 4
_BASELINE_MARKS = ("*", "s", "D", "^", "v", "P", "X")
Pair = tuple[float, float]
_WIDTH, _HEIGHT, _DPI = 8.0, 6.0, 200  # inches; shown at 800 pixels one inch is 100 of them


@dataclass(frozen=True)
class Dot:
    """One trial at its chosen alpha: ID accuracy and mean accuracy over the OOD sets, fractions."""

    pair: Pair
    kl_weight: float | None  # None or 0: drawn grey
    meets: bool = True  # all constraints; else it is drawn as a cross


@dataclass(frozen=True)
class Curve:
    """The alpha curve of the best trial: its points by alpha, and the chosen one with its standard errors, if known."""

    points: Mapping[float, Pair]
    alpha: float
    chosen: Pair
    errors: tuple[float | None, float | None] = (None, None)


def id_ood_figure(
    points: Sequence[Dot],
    baselines: Mapping[str, Pair],
    best_curve: Curve | None,
    title: str,
    *,
    synthetic: bool = False,
    kind: ObjectiveKind = "weighted_mean",
    id_weight: float = 0.5,
    front: Sequence[Pair] = (),
) -> Figure:
    """Draws OOD accuracy over ID accuracy in percent: a dot per trial, named baselines, the alpha curve of the best.

    Args:
        points: The trials, coloured by KL weight on a log scale.
        baselines: Name -> (ID accuracy, mean OOD accuracy), drawn as named marks; the first one gets the star.
        best_curve: Alpha curve of the best trial, its chosen point ringed; None draws none.
        title: What was searched.
        synthetic: Whether the images are; the title then says so.
        kind: Kind of objective, for the faint lines of equal objective (none for ``worst_domain``).
        id_weight: w of ``weighted_mean``.
        front: Points of the front of a Pareto search, by rising ID accuracy; the line through them is drawn and takes
            the place of the lines of equal objective.

    Returns:
        The figure, 1,600 x 1,200 pixels.
    """
    figure, axes = canvas(_HEIGHT)
    finite = [dot for dot in points if all(map(math.isfinite, dot.pair))]
    marks = {name: pair for name, pair in baselines.items() if all(map(math.isfinite, pair))}
    shown = [*(dot.pair for dot in finite), *marks.values(), *front]
    if best_curve is not None:
        shown += [*best_curve.points.values(), best_curve.chosen]
    if not shown:
        axes.text(0.5, 0.5, "no finished trial", transform=axes.transAxes, ha="center", color=GREY, fontsize=12)
    axes.set_xlim(*limits([x for x, _ in shown]))
    axes.set_ylim(*limits([y for _, y in shown]))
    if front:
        _draw_front(axes, front)
    else:
        _iso_lines(axes, kind, id_weight)
    _draw_dots(figure, axes, [dot for dot in finite if dot.meets])
    if best_curve is not None:
        _draw_curve(axes, best_curve)
    for (name, pair), mark in zip(marks.items(), itertools.cycle(_BASELINE_MARKS)):
        size = 260 if mark == "*" else 80
        _scatter(axes, [pair], size, INK, 6, marker=mark, edgecolors="white", linewidths=1.0, label=name)
    if missing := [dot.pair for dot in finite if not dot.meets]:
        _scatter(axes, missing, 45, GREY, 3, marker="x", linewidths=1.4, label="violates a constraint")
    axes.set_xlabel("ID accuracy, %", loc="left")
    axes.set_ylabel("OOD accuracy, mean over sets, %")
    set_title(axes, title, synthetic, pad=10 + 20 * legend_above(axes))
    return figure


def _scatter(axes: Axes, pairs: Sequence[Pair], size: float, color: Any, zorder: int, **style: Any) -> Any:
    """Draws points given as fractions, in percent."""
    xs, ys = [100 * x for x, _ in pairs], [100 * y for _, y in pairs]
    return axes.scatter(xs, ys, s=size, c=color, zorder=zorder, **style)


def canvas(height: float) -> tuple[Figure, Axes]:
    """Returns a figure 8 inches wide and its empty axes."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=10.5)
    axes.xaxis.label.set_fontsize(11.5)
    axes.yaxis.label.set_fontsize(11.5)
    return figure, axes


def legend_above(axes: Axes) -> int:
    """Writes what has a label above the axes, side by side; returns the number of lines."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        style: dict[str, Any] = {"bbox_to_anchor": (0, 1.01), "borderaxespad": 0, "handlelength": 1.5}
        style |= {"loc": "lower left", "columnspacing": 1.2, "ncols": _LEGEND_COLUMNS, "frameon": False}
        axes.legend(handles, names, **style)
    return math.ceil(len(handles) / _LEGEND_COLUMNS)


def set_title(axes: Axes, title: str, synthetic: bool, pad: float = 10) -> None:
    """Writes the title ``pad`` points above the axes; it says when the images are synthetic."""
    text = f"{title} (synthetic images)" if synthetic else title
    axes.set_title(text, loc="left", fontsize=13, color=INK, pad=pad)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Returns axis ends in percent around the finite values, with space for labels and never narrower than 2 points."""
    finite = [100 * value for value in values if math.isfinite(value)] or [50.0]
    low, high = min(finite), max(finite)
    margin = max(0.12 * (high - low), (2 - (high - low)) / 2, 0.2)
    return max(-2.0, low - margin), min(102.0, high + margin)


def _iso_lines(axes: Axes, kind: ObjectiveKind, id_weight: float) -> None:
    """Draws faint lines of equal objective and says what they are."""
    if kind == "worst_domain":  # not a function of the two axes
        return
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    xs, ys = np.linspace(max(0, left), min(100, right), 60), np.linspace(max(0, bottom), min(100, top), 60)
    grid = dict(zip(("id", "ood"), np.meshgrid(xs / 100, ys / 100), strict=True))
    values = 100 * ObjectiveSpec(kind, "id", ("ood",), id_weight).values(grid)
    axes.contour(xs, ys, values, levels=8, colors=FAINT, linewidths=0.8, zorder=0)
    name = "harmonic mean" if kind == "harmonic" else f"{id_weight:g} ID + {1 - id_weight:g} OOD"
    _caption(axes, f"lines of equal objective, {name}")


def _caption(axes: Axes, text: str) -> None:
    """Says under the right end of the figure what its lines are."""
    place: dict[str, Any] = {"xytext": (0, -29), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (1, 0), ha="right", va="center", color=GREY, fontsize=9, **place)


def _draw_front(axes: Axes, front: Sequence[Pair]) -> None:
    """Draws the front as the edge of what its points dominate, and says what it is."""
    xs, ys = [100 * x for x, _ in front], [100 * y for _, y in front]
    axes.step(xs, ys, where="pre", color=INK, linewidth=1.2, zorder=2)
    _scatter(axes, front, 22, INK, 5)
    _caption(axes, "line: the front over all trials and alphas")


def _draw_dots(figure: Figure, axes: Axes, dots: Sequence[Dot]) -> None:
    from matplotlib.colors import LogNorm

    many = len(dots) > _MANY
    edge: dict[str, Any] = {"edgecolors": GREY, "linewidths": 0.3 if many else 0.6, "rasterized": many}
    size = 18 if many else 55
    _scatter(axes, [dot.pair for dot in dots if not dot.kl_weight], size, "#a8a8a8", 3, **edge)
    weights = [dot.kl_weight for dot in dots if dot.kl_weight]
    if not weights:
        return
    low, high = min(weights), max(weights)
    if high < 2 * low:
        low, high = low / 2, high * 2
    coloured = [dot.pair for dot in dots if dot.kl_weight]
    drawn = _scatter(axes, coloured, size, weights, 3, cmap="cividis", norm=LogNorm(low, high), **edge)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=22, pad=0.02, ticks=ticks, format="%.4g")
    bar.set_label("kl_weight of the trial", size=10.5)
    bar.ax.tick_params(labelsize=9.5)
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    """Draws the alpha curve; the limits of the axes are final. A point that lies on another one has no number."""
    from matplotlib.patheffects import withStroke

    xs, ys = 100 * np.array([*curve.points.values()], float).T
    x, y = (100 * accuracy for accuracy in curve.chosen)
    x_error, y_error = (100 * (error or 0.0) for error in curve.errors)
    name = f"best trial, alpha {curve.alpha:g}"
    axes.plot(xs, ys, color=_ACCENT, linewidth=1.6, marker="o", markersize=4.5, zorder=4, label=name)
    axes.errorbar([x], [y], xerr=x_error or None, yerr=y_error or None, color=_ACCENT, linewidth=1, capsize=3, zorder=5)
    axes.scatter([x], [y], s=190, facecolors="none", edgecolors=_ACCENT, linewidths=2.2, zorder=7)
    edge = [withStroke(linewidth=2, foreground="white")]  # readable over lines
    style: dict[str, Any] = {"textcoords": "offset points", "color": _ACCENT, "fontsize": 9, "path_effects": edge}
    numbered = [axes.transLimits.transform((x, y))]
    for alpha, *point in zip(curve.points, xs, ys, strict=True):
        place = axes.transLimits.transform(point)  # share of the axes
        if all(math.dist(place, other) > 0.03 for other in numbered):
            axes.annotate(f"{alpha:g}", (point[0], point[1]), xytext=(6, 5), zorder=8, **style)
            numbered.append(place)


def rendered(figure: Figure, form: str) -> bytes:
    """Returns a figure as ``png`` or ``svg``: of the same study the same bytes each time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "carft-ray"}):
        figure.savefig(buffer, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else {})
    return buffer.getvalue()


def write(figure: Figure, *paths: Path) -> None:
    """Writes a figure as PNG or SVG, by the ending of each path, whole or not at all.

    Raises:
        StorageError: A file cannot be written.
    """
    for path in paths:
        files.write_bytes(path, rendered(figure, path.suffix[1:]))


@contextlib.contextmanager
def figure_at_the_end(study: Study, num_before: int) -> Iterator[None]:
    """Draws the figure of a study when the block ends, by an error or an interruption too.

    Without a complete trial there is none, and nothing is drawn once another process has taken the study over. What has
    ended the block comes before what goes wrong with the figure.

    Args:
        study: The study.
        num_before: Trials that were finished before this search; an error before another one is draws nothing.

    Raises:
        StorageError: The figure cannot be written.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception, KeyboardInterrupt):
            if num_finished(study.searched()) > num_before:
                _draw(study)
        raise
    _draw(study)


def _draw(study: Study) -> None:
    if not study.log.is_lost and best_row(study.rows()) is not None:
        now = study.snapshot()
        figure = study_figure(study.recipe, study.study_dir, now.trials, now.baselines)
        write(figure, study.study_dir / FIGURE_PNG, study.study_dir / FIGURE_SVG)


def study_figure(recipe: Recipe, study_dir: Path, trials: Sequence[TrialRow], baselines: Sequence[TrialRow]) -> Figure:
    """Draws ID against OOD accuracy, a dot per trial, with the baselines and the alpha curve of the best.

    Args:
        recipe: The study's.
        study_dir: The study directory.
        trials: All trials, with their standing in a Pareto search.
        baselines: All baselines.

    Raises:
        StorageError: The result of the best trial is damaged.
    """

    def pair(row: TrialRow) -> Pair:
        return row.metrics["id_accuracy"], row.metrics["ood_accuracy"]

    dots = [
        Dot(pair(row), row.values.get("kl_weight", recipe.train.kl_weight), meets=not row.violation)
        for row in trials
        if "ood_accuracy" in row.metrics
    ]
    named = sorted(baselines, key=lambda row: row.name != ZERO_SHOT)
    marks = {row.name.replace("_", " "): pair(row) for row in named if "ood_accuracy" in row.metrics}
    num_pruned = sum(row.outcome == "pruned" for row in trials)
    return id_ood_figure(
        dots,
        marks,
        _curve(study_dir, best_row(trials)),
        f"{recipe.name}: {counted(len(dots), 'trial')}" + (f", {num_pruned} more pruned" if num_pruned else ""),
        synthetic=plain(recipe.data.train).source == "sandbox",
        kind=objective_spec(recipe).kind,
        id_weight=recipe.search.objective.id_weight,
        front=[point.pair for point in front_of(trials)] if recipe.search.objective.kind == "pareto" else (),
    )


def _curve(study_dir: Path, best: TrialRow | None) -> Curve | None:
    content = None if best is None else result_of(study_dir, best)
    if best is None or not content or "ood_accuracy" not in best.metrics or not content.get("curve"):
        return None
    points, metrics, counts = content["curve"], best.metrics, content.get("num_images", {})
    accuracies = {name: metrics.get(f"accuracy/{name}") for name in counts}
    variances = {name: a * (1 - a) / counts[name] for name, a in accuracies.items() if a is not None}
    ood = [name for name in variances if name != "id_val"]
    if not ood or "id_val" not in variances or any("ood_accuracy" not in point for point in points):
        return None
    errors = (variances["id_val"] ** 0.5, sum(variances[name] for name in ood) ** 0.5 / len(ood))
    curve = {point["alpha"]: (point["id_accuracy"], point["ood_accuracy"]) for point in points}
    return Curve(curve, best.alpha or 0.0, (metrics["id_accuracy"], metrics["ood_accuracy"]), errors)
