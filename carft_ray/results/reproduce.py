"""A training repeated from the manifest of its study, and whether the numbers are the same, column by column.

What the manifest says of data and model is checked first, by contents: sets are decoded again, since the cache of
decoded sets identifies files by size and date only. The training has the same threads and workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from carft_ray import environment, files
from carft_ray.data.shared.shared_images import read_shared, without_shared
from carft_ray.errors import CarftError, DataError, InterruptedRunError, Problem
from carft_ray.evaluation.origin import gpu_names, set_contents
from carft_ray.evaluation.training import prepare
from carft_ray.launch.runs.single import train_once
from carft_ray.layout import FOLDERS, PREPARED, REFERENCES
from carft_ray.learning.checkpoint import load_tensors
from carft_ray.recipe.schema import Recipe, alone
from carft_ray.results.reading.finished import Finished, open_finished
from carft_ray.study.outcome import read_result
from carft_ray.study.provenance import CHANGING, differences, identity_problems, leaves
from carft_ray.words import counted

# of result.json; all but times and the machine
COMPARED = ("objective", "alpha", "metrics", "fine_tuned", "curve", "num_images")
DECODED = "decoded"
Row = dict[str, float]


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        what: Dotted name: ``metrics.ood_accuracy``, ``predictions.nll``, ``weights``.
        then: What the study has; a text where it is no single number.
        now: What was found now.
        size: Largest absolute difference; None where there is none to take.
    """

    what: str
    then: Any
    now: Any
    size: float | None


@dataclass(frozen=True)
class Reproduction:
    """What repeating a training has shown.

    Attributes:
        title: The training.
        num_numbers: Numbers of ``result.json`` that were compared.
        num_predictions: Rows of the predictions that were compared, all columns.
        weights_compared: Whether the study still had the fine-tuned weights.
        differences: What is not the same, the numbers first.
        changes: What differs now from the manifest: ``(key, then, now)``.
    """

    title: str
    num_numbers: int
    num_predictions: int
    weights_compared: bool
    differences: list[Difference]
    changes: list[tuple[str, Any, Any]]

    @property
    def same(self) -> bool:
        """Whether everything is the same, bit for bit."""
        return not self.differences

    @property
    def sentence(self) -> str:
        """What was found, in one sentence."""
        weights = ", and the weights" if self.weights_compared else ""
        return (
            f"{self.title} is reproduced: {self.num_numbers} numbers (objective, alpha, metrics, curve) and "
            f"{self.num_predictions} predictions, column by column{weights}, are the same, bit for bit."
        )

    def data(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        changes = [{"key": key, "then": then, "now": now} for key, then, now in self.changes]
        return {"same": self.same, **asdict(self), "changes": changes}

    def error(self) -> CarftError:
        """Returns the error with the largest difference and what may explain it."""
        largest = max(self.differences, key=lambda each: each.size or 0.0)
        names = ", ".join(each.what for each in self.differences[:8]) + (", ..." if len(self.differences) > 8 else "")
        value = f"{len(self.differences)} that differ ({names})"
        value += f"; the largest difference is that of {largest.what}: {largest.then} then, {largest.now} now"
        if largest.size is not None:
            value += f" ({largest.size:.3g})"
        step = "Data, weights, code, versions and hardware are those of the manifest. "
        step += "A GPU may sum in another order each time; on a CPU, please report it."
        if self.changes:
            step = "\n      ".join(["What differs now from the manifest:", *shown_changes(self.changes)])
        return CarftError(Problem(self.title, "its numbers must be the same", value, next_step=step))


def reproduce(
    finished: Finished,
    out_dir: Path,
    say: Callable[[str], None],
    progress: Callable[[Row], None],
    report: Callable[[Row], None],
) -> Reproduction:
    """Repeats a training and compares.

    Args:
        finished: A training of a study or of `train`, or the zero-shot model of a study.
        out_dir: Folder of the new training; must be new. Afterwards it is like that of `train`.
        say: Gets lines about what is being done.
        progress: Given the metrics every few steps (one worker).
        report: Given the metrics of every epoch (one worker).

    Raises:
        DataError: Images or weights are not those of the manifest; names the sets.
        StorageError: Predictions are damaged.
        UsageError: The new folder holds something.
        InterruptedRunError: Stopped on request.
    """
    out_dir = out_dir.resolve()
    files.require_new(out_dir, "--out")
    kept, then = finished.provenance, finished.predictions()
    say("comparing the images with the manifest")
    rows = read_shared(finished.folder)
    base = without_shared(finished.base, rows)
    _check({"data": set_contents(base)}, kept)
    shared = _as_computed(base, kept["preparation"], out_dir)
    of_study = finished.run_dir != finished.folder
    is_trial = of_study and finished.run_dir.parent.name == FOLDERS["trial"]
    references = finished.folder / PREPARED / REFERENCES

    def prepare_first(folder: Path) -> dict[str, Any]:
        found = prepare(shared, folder, say)
        _check(found["provenance"], kept)
        if is_trial and references.exists():
            files.write_json(folder / REFERENCES, files.read_json(references))
        return found

    if finished.is_zero_shot:
        metrics = {k: v for k, v in prepare_first(out_dir).items() if k in finished.result["metrics"]}
        result = {"objective": metrics["objective"], "alpha": 0.0, "metrics": metrics}
        return _compared(finished, then, replace(finished, run_dir=out_dir, result=result))
    was = finished.recipe if is_trial or not of_study else alone(finished.recipe)
    recipe = _as_computed(was, finished.result["environment"], out_dir)
    try:
        train_once(recipe, out_dir, False, "", say, progress, report, None, prepare_first, rows)
    except InterruptedRunError:
        step = f"Run the same command again; {out_dir} is of no further use."
        raise InterruptedRunError(Problem("", "stopped; nothing was compared", next_step=step)) from None
    return _compared(finished, then, open_finished(out_dir))


def _check(found: dict[str, Any], kept: dict[str, Any]) -> None:
    if problems := identity_problems(kept, found):
        raise DataError(problems)


def _as_computed(recipe: Recipe, where: Mapping[str, Any], out_dir: Path) -> Recipe:
    """Returns the recipe with what the first time computed with, and a cache of its own.

    One worker runs in this process, whatever the executor was: a test of the executors holds that nothing changes.
    """
    num_workers = where.get("num_workers", 1)
    resources = recipe.resources.model_copy(
        update={
            "threads": where["threads"],
            "targets": "online",
            "num_workers": num_workers,
            "executor": "inline" if num_workers == 1 else "ray-train",
            "gpus_per_worker": 0.0 if where["device"] == "cpu" else recipe.resources.gpus_per_worker,
        }
    )
    data = recipe.data.model_copy(update={"cache_dir": str(out_dir / DECODED)})
    train = recipe.train.model_copy(update={"compile": where.get("compile", recipe.train.compile)})
    return recipe.model_copy(update={"resources": resources, "data": data, "train": train})


def _compared(finished: Finished, then: pa.Table, again: Finished) -> Reproduction:
    """Compares a training, whose predictions were ``then``, with itself repeated."""
    old, new = _numbers(read_result(finished.run_dir) or finished.result), _numbers(again.result)
    found = [Difference(key, was, value, _size(was, value)) for key, was, value in differences(old, new)]
    found += table_differences(then, again.predictions())
    with_weights = finished.weights_path.is_file() and again.weights_path.is_file()
    if with_weights:
        found += _weights_differences(load_tensors(finished.weights_path), load_tensors(again.weights_path))
    where = finished.result.get("environment", {})
    changes = changes_since(finished.provenance, where)
    sources = [each.get("function_source") for each in (where, again.result.get("environment", {}))]
    if sources[0] != sources[1]:
        changes.append(("train.function", *sources))
    return Reproduction(finished.title, len(leaves(old)), len(then), with_weights, found, changes)


def changes_since(provenance: dict[str, Any], where: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns how code, versions and hardware differ now from those under which a training ran.

    Args:
        provenance: Of the manifest.
        where: ``environment`` of the training's result, by which its entry of the history is found.
    """
    entries = [provenance, *provenance.get("history", [])]
    fitting = [
        entry
        for entry in entries
        if entry["code"].get("source") == where.get("source") and entry["versions"].get("torch") == where.get("torch")
    ]
    entry = (fitting or entries)[-1]
    hardware = {**environment.hardware(), "gpus": gpu_names()}
    now = {"code": environment.code(), "versions": environment.versions(), "hardware": hardware}
    then = {key: {name: v for name, v in entry[key].items() if name != "threads"} for key in CHANGING}
    return differences(then, now)


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is compared of a result; points of the curve by their alpha."""
    parts = {key: result[key] for key in COMPARED if key in result}
    if "curve" in parts:
        parts["curve"] = {f"{point['alpha']:g}": point for point in parts["curve"]}
    return parts


def _size(then: Any, now: Any) -> float | None:
    both = (then, now)
    return abs(float(now) - float(then)) if all(isinstance(value, int | float) for value in both) else None


def table_differences(then: pa.Table, now: pa.Table) -> list[Difference]:
    """Returns a difference for every column of two tables that is not the same, row by row."""
    if then.column_names != now.column_names:
        return [Difference("predictions", ", ".join(then.column_names), ", ".join(now.column_names), None)]
    if len(then) != len(now):
        return [Difference("predictions", counted(len(then), "row"), counted(len(now), "row"), None)]
    found = []
    for name in then.column_names:
        old, new = _array(then[name]), _array(now[name])
        if old.shape != new.shape:
            found.append(Difference(f"predictions.{name}", f"{old.shape} values", f"{new.shape} values", None))
            continue
        unequal = np.flatnonzero(old != new)
        if not len(unequal):
            continue
        size, first = None, unequal[0]
        if np.issubdtype(old.dtype, np.floating):
            gaps = np.abs(old.astype(np.float64) - new.astype(np.float64))
            first, size = int(np.argmax(gaps)), float(gaps.max())
        what = f"predictions.{name} ({len(unequal)} of {counted(len(old), 'value')})"
        found.append(Difference(what, str(old[first]), str(new[first]), size))
    return found


def _array(column: pa.ChunkedArray) -> Any:
    """Returns a column as one array: lists flattened, names of sets as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return column.to_numpy()


def _weights_differences(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[Difference]:
    if sorted(then) != sorted(now):
        return [Difference("weights", f"{len(then)} tensors", f"{len(now)} other tensors", None)]
    unequal = [name for name in then if not torch.equal(then[name], now[name])]
    if not unequal:
        return []
    size = max(float((then[name].double() - now[name].double()).abs().max()) for name in unequal)
    return [Difference("weights", f"{len(then)} tensors", f"{len(unequal)} of them differ", size)]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shown_changes(changes: Sequence[tuple[str, Any, Any]]) -> list[str]:
    """Returns a line of text per change."""
    return [f"{key}: {_short(then)} then, {_short(now)} now" for key, then, now in changes]
