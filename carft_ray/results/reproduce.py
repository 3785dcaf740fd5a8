"""A training repeated from what its study has recorded, and whether the numbers are the same, column by column.

What the study says of data and model is checked first, by contents: sets are decoded again, since the cache of
decoded sets identifies files by size and date only. The training has the same threads and workers. On a CPU, and with
``train.deterministic``, every bit must be the same; else a GPU sums in another order each time, and of two trainings
that rounding has led apart the objective and the points of the curve are compared, within ``TOLERANCE``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from carft_ray import environment, files
from carft_ray.data.copies.shared_images import read_shared, without_shared
from carft_ray.errors import CarftError, DataError, InterruptedRunError, Problem
from carft_ray.launch.command import Plan, train_once
from carft_ray.launch.events import OnEvent
from carft_ray.launch.worker import RUNNER
from carft_ray.layout import PREPARED
from carft_ray.model.device import gpu_names
from carft_ray.recipe.schema.recipe import Recipe, alone
from carft_ray.results.reading.finished import Finished, open_finished
from carft_ray.study.provenance import CHANGING, differences, identity_problems, leaves
from carft_ray.study.training import result_of
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.origin import set_contents
from carft_ray.words import counted

# of result.json; all but times and the machine
COMPARED = ("objective", "alpha", "metrics", "fine_tuned", "curve", "num_images")
COMPARED_WITHIN = ("objective", "fine_tuned", "curve", "num_images")
TOLERANCE = 0.01  # a percentage point
DECODED = "decoded"


def sentence(found: Mapping[str, Any]) -> str:
    """Returns that a training is reproduced, in one sentence."""
    if found["tolerance"]:
        return (
            f"{found['title']} is reproduced within rounding: {found['num_numbers']} numbers (objective, curve) differ "
            f"by at most {found['tolerance']:g}. A GPU sums in a different order each time; trainings with "
            "train.deterministic: true repeat bit for bit."
        )
    weights = ", and the weights" if found["weights_compared"] else ""
    return (
        f"{found['title']} is reproduced: {found['num_numbers']} numbers (objective, alpha, metrics, curve) and "
        f"{found['num_predictions']} predictions, column by column{weights}, are the same, bit for bit."
    )


def difference_error(found: Mapping[str, Any]) -> CarftError:
    """Returns the error with the largest difference and what may explain it."""
    differing = found["differences"]
    largest = max(differing, key=lambda each: each["size"] or 0.0)
    rule = (
        f"its numbers must differ by at most {found['tolerance']:g}"
        if found["tolerance"]
        else "its numbers must be the same"
    )
    names = ", ".join(each["what"] for each in differing[:8]) + (", ..." if len(differing) > 8 else "")
    value = f"{len(differing)} that differ ({names})"
    value += f"; the largest difference is that of {largest['what']}: {largest['then']} then, {largest['now']} now"
    if largest["size"] is not None:
        value += f" ({largest['size']:.3g})"
    step = "Data, weights, code, versions and hardware are those of the study. "
    if found["tolerance"]:
        step += f"GPU sums differ between runs, which seldom explains more than {found['tolerance']:g}: compare "
        step += "with trainings of other seeds; those with train.deterministic: true repeat bit for bit."
    else:
        step += "Please report it."
    if lines := change_lines(found):
        step = "\n      ".join(["These differ from the study now:", *lines])
    return CarftError(Problem(found["title"], rule, value, next_step=step))


def change_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns what differs now from the provenance of the study, as lines of text."""
    return [f"{each['key']}: {_short(each['then'])} then, {_short(each['now'])} now" for each in found["changes"]]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def reproduce(
    finished: Finished,
    out_dir: Path,
    say: Callable[[str], None],
    on_event: OnEvent,
) -> dict[str, Any]:
    """Repeats a training and compares.

    Args:
        finished: A training of a study, or its zero-shot model.
        out_dir: Folder of the new training; must be new. Afterwards it is like that of `train`.
        say: Gets lines about what is being done.
        on_event: Told what happens in the training.

    Returns:
        Plain data: ``same``: whether everything is, within ``tolerance`` (0: bit for bit); ``title`` of the training,
        ``num_numbers`` of ``result.json`` and ``num_predictions`` that were compared, ``weights_compared``: whether
        the weights were, which the study may not have kept; ``differences``, the numbers first: ``what`` (a dotted
        name), ``then``, ``now``, ``size`` (largest absolute difference; None where there is none to take);
        ``changes`` from the provenance of the study: ``key``, ``then``, ``now``.

    Raises:
        DataError: Images or weights are not those of the study; names the sets.
        StorageError: Predictions are damaged.
        UsageError: The new folder holds something.
        InterruptedRunError: Stopped on request.
    """
    out_dir = out_dir.resolve()
    files.require_new(out_dir, "--out")
    kept, then = finished.provenance, finished.predictions()
    say("comparing the images with those of the study")
    rows = read_shared(finished.folder)
    base = without_shared(finished.base, rows)
    _check({"data": set_contents(base)}, kept)
    shared = _as_computed(base, kept["preparation"], out_dir)
    if finished.is_zero_shot:
        prepared = _prepare(shared, kept, shared, out_dir / PREPARED, say)
        metrics = {k: v for k, v in prepared.items() if k in finished.result["metrics"]}
        result = {"objective": metrics["objective"], "alpha": 0.0, "metrics": metrics}
        return _compared(finished, then, replace(finished, folder=out_dir, result=result))
    was = finished.recipe if finished.row.kind == "trial" else alone(finished.recipe)
    recipe = _as_computed(was, finished.result["environment"], out_dir)
    references = finished.result.get("references", {})
    runner = replace(RUNNER, prepare=partial(_prepare, shared, kept), train=partial(_train, references))
    try:
        train_once(Plan(recipe, out_dir, None, on_event, runner, shared=rows))
    except InterruptedRunError:
        step = "Run the same command again; the folder of --out, if one was given, must be removed first."
        raise InterruptedRunError(Problem("", "stopped; nothing was compared", next_step=step)) from None
    return _compared(finished, then, open_finished(out_dir))


def _prepare(
    shared: Recipe, kept: dict[str, Any], recipe: Recipe, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Prepares what the first time has prepared, with what it computed with (``shared``), whatever ``recipe`` says."""
    found = RUNNER.prepare(shared, folder, say)
    _check(found["provenance"], kept)
    return found


def _train(references: Mapping[str, float], *given: Any) -> dict[str, Any]:
    """Runs a training whose constraints compare with what they compared with the first time."""
    recipe, out_dir, prepared_dir, context, attempt = given
    return RUNNER.train(recipe, out_dir, prepared_dir, replace(context, references=references), attempt)


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


def _compared(finished: Finished, then: pa.Table, again: Finished) -> dict[str, Any]:
    """Compares a training, whose predictions were ``then``, with itself repeated."""
    where = finished.result.get("environment", {})
    device = where.get("device") or finished.provenance.get("preparation", {}).get("device")
    tolerance = 0.0 if device == "cpu" or finished.recipe.train.deterministic else TOLERANCE
    compared = COMPARED_WITHIN if tolerance else COMPARED
    old = _numbers(result_of(finished.folder, finished.row) or finished.result, compared)
    found = [_difference(*each, _size(*each[1:])) for each in differences(old, _numbers(again.result, compared))]
    found = [each for each in found if each["size"] is None or each["size"] > tolerance]
    if not tolerance:
        found += table_differences(then, again.predictions())
    with_weights = not tolerance and finished.weights_path.is_file() and again.weights_path.is_file()
    if with_weights:
        found += _weights_differences(load_tensors(finished.weights_path), load_tensors(again.weights_path))
    changes = changes_since(finished.provenance, where)
    sources = [each.get("function_source") for each in (where, again.result.get("environment", {}))]
    if sources[0] != sources[1]:
        changes.append(("train.function", *sources))
    return {
        "same": not found,
        "title": finished.title,
        "num_numbers": len(leaves(old)),
        "num_predictions": 0 if tolerance else len(then),
        "tolerance": tolerance,
        "weights_compared": with_weights,
        "differences": found,
        "changes": [{"key": key, "then": was, "now": value} for key, was, value in changes],
    }


def changes_since(provenance: dict[str, Any], where: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns how code, versions and hardware differ now from those under which a training ran.

    Args:
        provenance: Of the study.
        where: ``environment`` of the training's result, by which its entry of the history is found.
    """
    entries = [provenance, *provenance.get("history", [])]
    ran_on = (where.get("source"), where.get("torch"))
    fitting = [each for each in entries if (each["code"].get("source"), each["versions"].get("torch")) == ran_on]
    entry = (fitting or entries)[-1]
    hardware = {**environment.hardware(), "gpus": gpu_names()}
    now = {"code": environment.code(), "versions": environment.versions(), "hardware": hardware}
    then = {key: {name: v for name, v in entry[key].items() if name != "threads"} for key in CHANGING}
    return differences(then, now)


def _numbers(result: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns what is compared of a result; points of the curve by their alpha."""
    parts = {key: result[key] for key in keys if key in result}
    if "curve" in parts:
        parts["curve"] = {f"{point['alpha']:g}": point for point in parts["curve"]}
    return parts


def _difference(what: str, then: Any, now: Any, size: float | None = None) -> dict[str, Any]:
    return {"what": what, "then": then, "now": now, "size": size}


def _size(then: Any, now: Any) -> float | None:
    both = (then, now)
    return abs(float(now) - float(then)) if all(isinstance(value, int | float) for value in both) else None


def table_differences(then: pa.Table, now: pa.Table) -> list[dict[str, Any]]:
    """Returns a difference for every column of two tables that is not the same, row by row."""
    if then.column_names != now.column_names:
        return [_difference("predictions", ", ".join(then.column_names), ", ".join(now.column_names))]
    if len(then) != len(now):
        return [_difference("predictions", counted(len(then), "row"), counted(len(now), "row"))]
    found = []
    for name in then.column_names:
        if then[name].equals(now[name]):
            continue  # before numbers of Python's are made
        pairs = zip(then[name].to_pylist(), now[name].to_pylist(), strict=True)
        unequal = [pair for pair in pairs if pair[0] != pair[1]]
        if unequal:
            has_size = pa.types.is_floating(then[name].type)
            old, new = max(unequal, key=lambda pair: _size(*pair) or 0.0) if has_size else unequal[0]
            what = f"predictions.{name} ({len(unequal)} of {counted(len(then), 'row')})"
            found.append(_difference(what, str(old), str(new), _size(old, new) if has_size else None))
    return found


def _weights_differences(then: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    if then.keys() != now.keys():
        return [_difference("weights", f"{len(then)} tensors", f"{len(now)} other tensors")]
    unequal = [name for name in then if not torch.equal(then[name], now[name])]
    if not unequal:
        return []
    size = max(float((then[name].double() - now[name].double()).abs().max()) for name in unequal)
    return [_difference("weights", f"{len(then)} tensors", f"{len(unequal)} of them differ", size)]
