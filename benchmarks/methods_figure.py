"""Many methods as figures: accuracies on test sets with their intervals, and the fronts of their searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from carft_ray.results.figure import FAINT, GREY, INK, canvas, set_title, write

MARKED = ("#d55e00", "#0072b2")  # of the first method and of plain fine-tuning
LINES = ("-", "--", "-.", (0, (1, 1.5)))
AGAIN = "_seed_"  # between a method and the seed of the sampler with which it was searched once more


@dataclass(frozen=True)
class Row:
    """One configuration: what to call it, its accuracies by column as mean and ends (fractions), and its colour."""

    name: str
    columns: Mapping[str, tuple[float, float, float]]
    colour: str = INK


def forest(rows: Sequence[Row], title: str, words: str, synthetic: bool, *paths: Path) -> None:
    """Draws a row per configuration and a panel per column: a dot at the mean, a line over the interval, in percent.

    Args:
        rows: From top to bottom; all have the same columns.
        title: What is compared.
        words: What the intervals are over, with the number of seeds; written below the panels.
        synthetic: Whether the images are; the title then says so.
        paths: Where PNG and SVG go.

    Raises:
        StorageError: A file cannot be written.
    """
    figure = Figure(figsize=(8.0, 1.5 + 0.3 * len(rows)), layout="constrained")
    columns = list(rows[0].columns)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        for place, row in enumerate(reversed(rows)):
            mean, low, high = (100 * value for value in row.columns[column])
            axes.plot([low, high], [place, place], color=row.colour, linewidth=1.6)
            axes.plot([mean], [place], "o", color=row.colour, markersize=5)
        axes.set_xlabel(f"{column}, %", fontsize=10)
        axes.grid(axis="both", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    set_title(panels[0], title, synthetic)
    figure.supxlabel(words, fontsize=9, color=GREY)
    write(figure, *paths)


def fronts_figure(
    fronts: Mapping[str, Sequence[tuple[float, float]]], title: str, synthetic: bool, *paths: Path
) -> None:
    """Draws the front of each search, OOD over ID accuracy in percent; the first two methods in colour.

    Args:
        fronts: By method the pairs that no other of its pairs is better than in both, by rising ID accuracy. A
            method that was searched once more (``AGAIN``) has the colour of the first search.
        title: What is compared.
        synthetic: Whether the images are; the title then says so.
        paths: Where PNG and SVG go.

    Raises:
        StorageError: A file cannot be written.
    """
    figure, axes = canvas(5.5)
    marked = dict(zip(fronts, MARKED, strict=False))
    for index, (name, pairs) in enumerate(fronts.items()):
        colour = marked.get(name.partition(AGAIN)[0])
        axes.step(
            [100 * pair[0] for pair in pairs],
            [100 * pair[1] for pair in pairs],
            where="pre",
            color=colour or str(0.3 + 0.06 * (index % 6)),
            linewidth=2.2 if colour else 1.2,
            linestyle="-" if name in marked else ":" if colour else LINES[index % len(LINES)],
            marker="o" if colour else ".",
            markersize=4,
            label=name,
            zorder=3 if colour else 2,
        )
    axes.set_xlabel("ID accuracy, %")
    axes.set_ylabel("OOD accuracy, mean, %")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.legend(fontsize=9, frameon=False)
    figure.supxlabel("validation sets; all trainings of each search at all alphas measured", fontsize=10, color=GREY)
    set_title(axes, title, synthetic)
    write(figure, *paths)
