"""What each method costs against plain fine-tuning: a step, and the memory of a training.

The quickstart's model, images and recipe with ``--method NAME``, one thread. All methods take turns. Targets are
online; those of ``car_ft`` are measured stored, too.

    step    processor time of a step of the product's loop, after its first epoch, against one of ``fine_tuning`` in the
            same turn; beside ``lp_ft`` how long its linear probe takes, in such steps
    memory  a training in a process of its own: its peak above what the process held with model and images open, against
            that of ``fine_tuning``. It is that of a CPU and of a tiny model. Linux only
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row, apart, held_mb, median_row, peak_mb
from benchmarks.speed_steps import Task, loop_times, open_task
from carft_ray.recipe.methods import METHOD, methods

PLAIN, STORED = "fine_tuning", "car_ft"
Side = tuple[str, str]  # name of a method, and the folder of its stored targets; none: they are online


def _task(name: str, epochs: int, settings: Sequence[str]) -> Task:
    return open_task([f"train.epochs={epochs}", *settings, f"{METHOD}={name}"])


def _times(task: Task, folder: str) -> tuple[float, float]:
    return loop_times(task, task.train, Path(folder) if folder else None)


def training_mb(name: str, folder: str, epochs: int, settings: Sequence[str]) -> float:
    """Trains with a method, in a process of its own; returns the peak of its memory above that before."""
    task = _task(name, epochs, settings)
    before = held_mb()
    _times(task, folder)
    return peak_mb() - before


def method_rows(
    turns: int, epochs: int = 3, settings: Sequence[str] = (), names: Sequence[str] = tuple(methods())
) -> list[Row]:
    """Measures the named methods; the first turn, which fills the store, does not count."""
    with tempfile.TemporaryDirectory(prefix="carft-methods-") as folder:
        sides: list[Side] = [*((name, "") for name in names), (STORED, folder)]
        tasks = {side: _task(side[0], epochs, settings) for side in sides}
        begins, steps = ({side: list[float]() for side in sides} for _ in range(2))
        for turn in range(turns + 1):
            for side in sides:
                times = _times(tasks[side], side[1])
                if turn:
                    begins[side].append(times[0])
                    steps[side].append(times[1])
        peaks = {side: apart(training_mb, *side, epochs, settings) for side in sides}
    plain = (PLAIN, "")
    plain_s = statistics.median(steps[plain])
    rows = [Row(f"step of {PLAIN}, ms, batch {tasks[plain].train.batch_size}", 1000 * plain_s)]
    for side in sides:
        more = statistics.median(begins[side]) - statistics.median(begins[plain])
        detail = f"before it a linear probe of {more / plain_s:.0f} steps" if tasks[side].train.probe_epochs else ""
        if side != plain:
            ratios = [one / other for one, other in zip(steps[side], steps[plain], strict=True)]
            rows.append(median_row(f"step of {_text(side)} / of {PLAIN}", ratios, detail=detail))
    rows.append(Row(f"memory of a training of {PLAIN}, MB", peaks[plain], digits=0))
    for side in sides:
        if side != plain:
            detail = f"{peaks[side]:,.0f} MB"
            rows.append(Row(f"memory of {_text(side)} / of {PLAIN}", peaks[side] / peaks[plain], detail=detail))
    return rows


def _text(side: Side) -> str:
    return f"{side[0]}, targets stored" if side[1] else side[0]
