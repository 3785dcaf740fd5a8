"""What people see: tables and messages. Results go to standard output, everything else to standard error.

Texts of data are no markup here, and what steers a terminal is written out (``plain``).
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from carft_ray.errors import CarftError, InterruptedRunError, together
from carft_ray.untrusted import visible, visible_line
from carft_ray.words import value_text

if TYPE_CHECKING:
    from carft_ray.data.cache import Entry
    from carft_ray.launch.cluster.node_doctor import NodeReport

_PLAIN_WIDTH = 130  # columns of a table that goes to a file or a pipe
_NAMES = {"id_val": "ID (id_val)", "id_accuracy": "ID (id_val)", "ood_accuracy": "OOD mean"}


class Messages(Console):
    """Says nothing more once its terminal or pipe is gone, where Rich would end the process: a search continues."""

    def on_broken_pipe(self) -> None:
        """Takes the place of Rich's own, which raises ``SystemExit``."""
        self.quiet = True

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        """Prints what is ready: all that Rich prints comes through here."""
        try:
            super().__exit__(exc_type, exc_value, traceback)
        except OSError:
            self.quiet = True


out = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
err = Messages(stderr=True, highlight=False, soft_wrap=True)
_documents: list[TextIO] = []  # where ``print_json`` writes in ``only_json``


def plain(text: str, style: str = "") -> Text:
    """Returns text for a terminal or a notebook as it is."""
    return Text(visible(text), style)


def show(what: str | Table = "") -> None:
    """Prints a part of the result."""
    if isinstance(what, str):
        out.print(plain(what), soft_wrap=True)
    else:
        out.print(what)


def say(what: str | Table, style: str = "") -> None:
    """Prints what happens."""
    err.print(plain(what, style) if isinstance(what, str) else what)


def sayer(show: bool) -> Callable[[str], None]:
    """Returns ``say``, or what prints nothing."""
    return say if show else lambda text: None


def warn(text: str) -> None:
    """Warns of a setting without effect or something left out."""
    say(f"warning: {text}", "yellow")


def show_error(error: CarftError) -> None:
    """Prints all problems of an error; a stop that was asked for is none."""
    if isinstance(error, InterruptedRunError):
        say(str(error), "yellow")
        return
    problems = together(error.problems)
    several = len(problems) > 1
    if several:
        say(f"error: {len(problems)} problems", "bold red")
    for problem in problems:
        say(f"{'  - ' if several else 'error: '}{problem}", "red")


def next_step(*commands: str) -> None:
    """Prints the next useful commands."""
    say("\nNext:", "bold")
    for command in commands:
        say(f"  {command}")


@contextlib.contextmanager
def only_json(asked: bool) -> Iterator[None]:
    """In the block, standard output has only what ``print_json`` writes, if that is asked for.

    What a user's own trainer prints goes to standard error.
    """
    if not asked:
        yield
        return
    _documents.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.pop()


def print_json(value: Any, asked: bool = True) -> bool:
    """Prints one JSON document to standard output where it is asked for; returns whether it is."""
    if asked:
        stream = _documents[-1] if _documents else sys.stdout
        stream.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    return asked


def percent(accuracy: float | None, num_images: int | None = None) -> str:
    """Returns an accuracy in percent, with Wilson's 95 % interval over images when their number is given; ``-`` for
    None.
    """
    if accuracy is None:
        return "-"
    text = f"{100 * accuracy:.1f}"
    if num_images:
        from carft_ray.evaluation.metrics import wilson

        low, high = wilson(round(accuracy * num_images), num_images)
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def duration(seconds: float) -> str:
    """Returns a time as minutes and seconds, ``3:07``, or with hours, ``2:03:07``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)  # a clock may have gone back
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def elapsed_cell(seconds: float | None) -> str:
    """Returns how long a training took, for a table; empty for the zero-shot model, which takes no time."""
    return "" if seconds is None or seconds < 0.5 else duration(seconds)


def size_text(num_bytes: float) -> str:
    """Returns a size in three digits, ``1.23 GB`` for 1.23 * 10^9 bytes."""
    for power, unit in enumerate(("kB", "MB", "GB", "TB"), start=1):
        if unit == "TB" or num_bytes / 1000**power < 999.5:
            break
    return f"{num_bytes / 1000**power:.3g} {unit}"


def numbers(*names: str, no_wrap: bool = False) -> list[Column]:
    """Returns columns of numbers, set to the right."""
    return [Column(name, justify="right", no_wrap=no_wrap) for name in names]


def table(
    columns: Sequence[str | Column], rows: Iterable[Sequence[str]], best: Sequence[bool] = (), style: str = "bold green"
) -> Table:
    """Returns a table without lines; a first column given by its name is not wrapped.

    Args:
        columns: Names, or columns with a way of their own (``numbers``).
        rows: Texts; each cell becomes one line.
        best: For each row whether it stands out; none does where it is empty.
        style: How they do.
    """
    headers = [Column(one, no_wrap=not index) if isinstance(one, str) else one for index, one in enumerate(columns)]
    for column in headers:
        column.header = Text(visible_line(str(column.header)))
    made = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row, stands_out in zip(rows, best or itertools.repeat(False), strict=False):
        made.add_row(*(Text(visible_line(cell)) for cell in row), style=style if stands_out else None)
    return made


def accuracy_table(rows: Mapping[str, Mapping[str, float]], num_images: Mapping[str, int]) -> Table:
    """Returns a table of accuracies in percent with intervals over images: a line per model, a column per set.

    Args:
        rows: Name of the model -> metrics (``accuracy/<set>``, ``ood_accuracy``, ``objective``).
        num_images: Images per set, in the order of the columns; ``train`` is left out.
    """
    sets = {name: number for name, number in num_images.items() if name != "train"}
    ood = ["ood_accuracy"] if any("ood_accuracy" in metrics for metrics in rows.values()) else []
    lines = []
    for model, metrics in rows.items():
        cells = [percent(metrics[f"accuracy/{name}"], number) for name, number in sets.items()]
        lines.append([model, *cells, *(percent(metrics.get(name)) for name in (*ood, "objective"))])
    titles = [_NAMES.get(name, name) for name in (*sets, *ood, "objective")]
    return table(["accuracy, % [95 %]", *numbers(*titles)], lines)


def set_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table of what accuracy does not show: a line per set.

    Args:
        rows: Name of the set -> ``set_metrics``, the worst class with its ``name``.
    """
    lines = []
    for name, metrics in rows.items():
        worst = metrics["worst_class"]
        losses = [f"{metrics['nll']:.3f}", f"{metrics['brier']:.3f}", percent(metrics["ece"])]
        cells = [f"{metrics['num_images']:,}", percent(metrics["top5"]), *losses]
        lines.append([_NAMES.get(name, name), *cells, f"{worst['name']} {percent(worst['accuracy'])}"])
    titles = numbers("images", "top-5, %", "NLL, nats", "Brier", "ECE, %", "worst class, %")
    return table(["set", *titles], lines)


def objective_cell(value: float | None) -> str:
    """Returns an accuracy or objective for a table, in percent; empty without one."""
    return "" if value is None else percent(value)


def rescored_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of trials and baselines under another objective.

    Args:
        rows: ``name``, ``old_rank`` and ``new_rank`` (None for a baseline), ``alpha``, ``id_accuracy``,
            ``ood_accuracy`` (None without OOD sets), ``objective``, ``violations``.
    """
    from carft_ray.recipe.schema.search import VIOLATION, violation_words

    lines = []
    for row in rows:
        ranks = ["" if row[key] is None else str(row[key]) for key in ("old_rank", "new_rank")]
        cells = [objective_cell(row[key]) for key in ("id_accuracy", "ood_accuracy", "objective")]
        missed = violation_words({f"{VIOLATION}{name}": value for name, value in row["violations"].items()})
        lines.append([row["name"], *ranks, f"{row['alpha']:.2f}", *cells, missed])
    titles = numbers("old rank", "new rank", "alpha", "ID, %", "OOD, %", "objective, %")
    return table(["", *titles, ""], lines, [row["new_rank"] == 1 for row in rows])


def trial_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of trials and baselines.

    Args:
        rows: ``name``, ``values``, ``alpha``, ``metrics``, ``objective``, ``outcome``, ``reason``, ``elapsed_s``,
            ``best``; optionally ``expected``, ``epoch``, ``outside``, ``on_front`` and ``at_chance``.
    """
    names = list(dict.fromkeys(key for row in rows for key in row["values"] if key != "alpha"))
    has_expected, lines = any(row.get("expected") is not None for row in rows), []
    for row in rows:
        values = [value_text(row["values"].get(name, "")) for name in names]
        accuracies = [objective_cell(row["metrics"].get(name)) for name in ("id_accuracy", "ood_accuracy")]
        alpha = "" if row["alpha"] is None else f"{row['alpha']:.2f}"
        time = elapsed_cell(row["elapsed_s"])
        objectives = [objective_cell(row["objective"]), objective_cell(row.get("expected"))][: 1 + has_expected]
        name = f"soups/{row['name']}" if row.get("kind") == "soup" else row["name"]  # as `--trial` takes it
        lines.append([name, *values, alpha, *accuracies, *objectives, time, _remark(row)])
    titles = numbers(*names, "alpha", "ID, %", "OOD, %", *("objective, %", "expected, %")[: 1 + has_expected], "time")
    return table(["", *titles, Column("", max_width=40)], lines, [row["best"] for row in rows])


def estimate_table(rows: Sequence[Mapping[str, Any]], sets: Sequence[str] = (), title: str = "%, [95 %]") -> Table:
    """Returns the table of what `confirm` or `test` has measured: means in percent with their 95 % intervals.

    Args:
        rows: ``name``, ``role``, ``alpha``, ``seeds``, and ``mean`` and ``ends`` of ``id_accuracy``, ``ood_accuracy``
            (None without OOD sets) and ``objective``, as fractions; of each of its ``sets``, too.
        sets: Sets whose means have columns of their own.
        title: Heading of the first column.
    """
    columns = {"ID": "id_accuracy", "OOD mean": "ood_accuracy", "objective": "objective"}
    columns = {title: key for title, key in columns.items() if rows[0][key]}
    lines = []
    for row in rows:
        estimates = (map(percent, (row[key]["mean"], *row[key]["ends"])) for key in columns.values())
        cells = [f"{mean} [{low}, {high}]" for mean, low, high in estimates]
        means = [percent(row["sets"][name]["mean"]) for name in sets]
        lines.append([row["name"], f"{row['alpha']:.2f}", str(row["seeds"] or "-"), *cells, *means, row["role"]])
    titles = numbers("alpha", "seeds", *columns, *sets, no_wrap=True)
    return table([title, *titles, ""], lines, [row["role"] == "winner" for row in rows])


def _remark(row: Mapping[str, Any]) -> str:
    from carft_ray.recipe.schema.search import violation_words

    if row["outcome"] == "complete":
        standing = "best" if row["best"] else "on the front" if row.get("on_front") else ""
        outside = "outside the space" if row.get("outside") else ""
        chance = f"{'alpha 1.00 ' if row['alpha'] else ''}not shown above chance" if row.get("at_chance") else ""
        return ", ".join(part for part in (standing, outside, chance, violation_words(row["metrics"])) if part)
    outcome = str(row["outcome"]).replace("_", " ")
    if row["reason"]:
        return f"{outcome}: {row['reason']}"
    return f"{outcome}, epoch {row['epoch']} done" if row.get("epoch") else outcome


def study_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of the studies in a folder.

    Args:
        rows: ``name``, and either ``problem`` or ``wanted``, ``trials`` (a count per state), ``best_objective``,
            ``running``.
    """
    states = list(dict.fromkeys(state for row in rows for state, count in row.get("trials", {}).items() if count))
    lines = []
    for row in rows:
        if row["problem"] is not None:
            first = row["problem"].splitlines()[0]
            lines.append([row["name"], *[""] * (len(states) + 2), f"cannot be read: {first}"])
            continue
        counts = [str(row["trials"][state] or "") for state in states]
        best = objective_cell(row["best_objective"])
        lines.append([row["name"], str(row["wanted"]), *counts, best, "runs" if row["running"] else ""])
    broken = [row["problem"] is not None for row in rows]
    return table(["study", *numbers("wanted", *states, "objective, %"), ""], lines, broken, "red")


def differing_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of what two trainings do not share.

    Args:
        title: Heading of the first column.
        rows: ``key``, ``a``, ``b``.
    """
    sides = ("a", "b")
    lines = [[row["key"], *("-" if row[side] is None else value_text(row[side]) for side in sides)] for row in rows]
    return table([Column(title), *(Column(name, overflow="fold") for name in ("A", "B"))], lines)


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Returns the numbers of two trainings side by side, in percent, with the paired difference in points.

    Args:
        found: What ``results.compare_trainings.compare`` returns.
    """
    lines = []
    for row in found["rows"]:
        cells = [percent(row[side]) for side in ("a", "b")]
        difference = "not comparable"
        if row["difference"] is not None:
            difference = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        lines.append([_NAMES.get(row["what"], row["what"].removeprefix("accuracy/")), *cells, difference])
    titles = [f"{side.upper()}: {found[side]['name']}, alpha {found[side]['alpha']:.2f}" for side in ("a", "b")]
    return table(["accuracy, %", *numbers(*titles, "A - B, points")], lines)


def cache_table(entries: Sequence["Entry"]) -> Table:
    """Returns the table of the entries of the cache."""
    lines = []
    for one in entries:
        built, used = (datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M") for time in (one.created, one.last_used))
        images = f"{one.num_images:,}" if one.num_images else ""
        cells = [images, one.image_size, size_text(one.num_bytes), built if one.created else "", used]
        lines.append([one.name or "?", one.kind, one.source, *cells, "in use" if one.in_use else ""])
    counts = numbers("images", "pixels", "size", "built", "last used", no_wrap=True)
    return table(["set or model", "kind", "source", *counts, ""], lines)


def checkup_table(sets: Mapping[str, Mapping[str, Any]], zero_shot: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns the table of what the doctor found in the sets: a line per set; columns without a value are left out.

    Args:
        sets: Key path -> ``num_images``; optionally ``num_expected`` and what ``data.records.image_facts`` returns.
        zero_shot: Set -> ``accuracy`` and ``num_images`` of the zero-shot model.
    """
    rows = {}
    for place, one in sets.items():
        expected, measured = one.get("num_expected"), zero_shot.get(place.rpartition(".")[2])
        of_expected = "" if expected in (None, one["num_images"]) else f" of {expected:,}"
        side = one.get("short_side")
        rows[place.removeprefix("data.")] = {
            "images": f"{one['num_images']:,}{of_expected}",
            "classes": str(one["num_classes"]),
            "per class": _range(one["images_per_class"]),
            "short side, px": "" if side is None else _range(side),
            "MB": f"{one['megabytes']:.1f}" if "megabytes" in one else "",
            "unreadable": str(one.get("num_unreadable", "") or ("" if side is None else 0)),  # test images: not known
            "repeated": str(one.get("num_twice", "")),
            "zero-shot, % [95 %]": percent(measured["accuracy"], int(measured["num_images"])) if measured else "",
        }
    columns = dict.fromkeys(name for row in rows.values() for name, text in row.items() if text)
    lines = [[place, *map(row.__getitem__, columns)] for place, row in rows.items()]
    return table(["set", *numbers(*columns)], lines)


def node_table(reports: Sequence["NodeReport"]) -> Table:
    """Returns the table of what the nodes of a cluster have; columns without a value are left out."""
    from carft_ray.launch.cluster.capacity import node_of

    rows = {}
    for one in reports:
        machine, node = one.found.machine if one.found else {}, node_of(one.resources)
        rows[one.name] = {
            "CPUs": f"{node.num_cpus:g}",
            "GPUs": f"{node.num_gpus:g} {node.accelerator}".strip() if node.num_gpus else "",
            "memory": f"{machine['memory_gb']:.0f} GB" if machine else "",
            "cache free": f"{machine['cache_free_gb']:.0f} GB" if machine else "",
            "": one.fault,
        }
    columns = dict.fromkeys(name for row in rows.values() for name, text in row.items() if text)
    lines = [[name, *map(row.__getitem__, columns)] for name, row in rows.items()]
    return table(["node", *numbers(*columns)], lines, [bool(one.fault) for one in reports], "red")


def _range(of: Mapping[str, Any]) -> str:
    return f"{of['min']}" if of["min"] == of["max"] else f"{of['min']} to {of['max']}"
