"""A training repeated as its study has recorded it, and compared: its numbers, the columns of predictions, its weights.

What the study says of data and model is checked first, by contents: sets are decoded again, since the cache of
decoded sets identifies files by size and dates only. On a CPU, and with ``train.deterministic``, every bit must be the
same; else a GPU sums in another order each time, and of two trainings that rounding has led apart the objective and the
points of the curve are compared, within ``TOLERANCE``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carft_ray import files
from carft_ray.data.class_names import class_folders
from carft_ray.data.duplicates.shared_images import read_shared, without_shared
from carft_ray.data.same_as_study import require_same
from carft_ray.errors import CarftError, InterruptedRunError, Problem
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.launch.command import Plan, run, train_once
from carft_ray.launch.events import OnEvent
from carft_ray.launch.workers.worker import RUNNER
from carft_ray.layout import ATTEMPT, CONFIRM, PREDICTIONS, PREPARED, WEIGHTS
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe, alone, single, with_keys
from carft_ray.results.compare_trainings import origin
from carft_ray.results.reading.finished import Finished, open_finished
from carft_ray.study.provenance import differences, leaves
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.origin import set_contents
from carft_ray.training.run_context import RunContext
from carft_ray.training.soup import run_soup
from carft_ray.words import counted

# of result.json; all but times and the machine
COMPARED = ("objective", "alpha", "metrics", "curve", "num_images")
COMPARED_WITHIN = ("objective", "curve", "num_images")
TOLERANCE = 0.01  # a percentage point
DECODED = "decoded"
MEMBERS = "members"  # of a soup that is made again


def sentence(found: Mapping[str, Any]) -> str:
    """Returns that a training is reproduced, in one sentence."""
    parts = [f"{found['num_numbers']} numbers"]
    parts += [f"{found['num_predictions']} predictions"] if found["num_predictions"] else []
    parts += ["the weights"] if found["weights_compared"] else []
    how = f"within rounding ({found['tolerance']:g})" if found["tolerance"] else "bit for bit"
    return f"{found['title']} is reproduced: {', '.join(parts)} are the same, {how}."


def difference_error(found: Mapping[str, Any]) -> CarftError:
    """Returns the error with the largest difference and what may explain it."""
    differing, rule = found["differences"], "its numbers must be the same"
    if found["tolerance"]:
        rule = f"its numbers must differ by at most {found['tolerance']:g} without train.deterministic: true"
    largest = max(differing, key=lambda each: each["size"] or 0.0)
    names = ", ".join(each["what"] for each in differing[:8]) + (", ..." if len(differing) > 8 else "")
    value = f"{len(differing)} that differ ({names}); the largest difference is that of {largest['what']}: "
    value += f"{largest['then']} then, {largest['now']} now"
    step = "Data, weights, code, versions and hardware are those of the study. Please report it."
    if lines := change_lines(found):
        step = "\n      ".join(["These differ from the study now:", *lines])
    return CarftError(Problem(found["title"], rule, value, next_step=step))


def change_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns what differs now from the training of the study, as lines of text."""
    return [f"{each['key']}: {each['then']} then, {each['now']} now" for each in found["changes"]]


def reproduce(finished: Finished, out_dir: Path, say: Callable[[str], None], on_event: OnEvent) -> dict[str, Any]:
    """Repeats a training, or a soup with its members, and compares.

    Args:
        finished: A training of a study, or its zero-shot model.
        out_dir: Folder of the new training; must be new. Afterwards it is like that of `train`.
        say: Gets lines about what is being done.
        on_event: Told what happens in the training.

    Returns:
        Plain data: ``same``: whether everything is, within ``tolerance`` (0: bit for bit); ``title`` of the training,
        ``num_numbers`` of ``result.json`` and ``num_predictions`` that were compared, ``weights_compared``: whether
        the weights were, which the study may not have kept; ``differences``, the numbers first: as of ``differing``;
        ``changes`` of code, versions, hardware: ``key``, ``then``, ``now``.

    Raises:
        DataError: Images or weights are not those of the study; names the sets.
        StorageError: Predictions are damaged.
        UsageError: The new folder holds something.
        InterruptedRunError: Stopped on request.
    """
    out_dir = out_dir.resolve()
    files.require_new(out_dir, "--out")
    if finished.row.soup is not None:
        return _reproduce_soup(finished, finished.row.soup, out_dir, say, on_event)
    kept, then, shared = finished.provenance, finished.predictions(), read_shared(finished.folder)
    say("comparing the images with those of the study")
    base = without_shared(finished.base, shared)
    require_same(kept, {"classes": list(class_folders(base)), "data": set_contents(base)})
    prepare = partial(_prepare, _as_computed(base, kept["preparation"], out_dir), kept)
    train = partial(_train, finished.result.get("references", {}))
    was = finished.recipe if finished.row.kind == "trial" else alone(finished.recipe)
    recipe = single(_as_computed(was, _environment(finished), out_dir))
    plan = Plan(recipe, out_dir, None, on_event, replace(RUNNER, prepare=prepare, train=train), shared=shared)
    try:
        if finished.is_zero_shot:
            run(replace(plan, given=lambda study: {}, alone=True), lambda ran: None)
        else:
            train_once(plan)
    except InterruptedRunError:
        step = "Run the same command again; the folder of --out, if one was given, must be removed first."
        raise InterruptedRunError(Problem("", "stopped; nothing was compared", next_step=step)) from None
    again = open_finished(out_dir, ZERO_SHOT if finished.is_zero_shot else None)
    numbers = partial(_numbers, _result(again))
    return _compared(finished, then, numbers, again.predictions, again.weights_path, origin(again))


def _reproduce_soup(
    finished: Finished, soup: Mapping[str, Any], out_dir: Path, say: Callable[[str], None], on_event: OnEvent
) -> dict[str, Any]:
    """Repeats each member in ``out_dir/members``, then the soup of what has come of them; compares the soup alone."""
    then, members, changes = finished.predictions(), list[dict[str, Any]](), list[dict[str, Any]]()
    for index, member in enumerate(soup["members"], start=1):
        name = member["name"].rpartition("/")[0]
        called = name if name.startswith(f"{CONFIRM}/") else name.partition("/")[2]
        say(f"training member {index} of {len(soup['members'])} again: {called}")
        place = Path(MEMBERS) / str(index)
        changes += reproduce(open_finished(finished.folder, called), out_dir / place, say, on_event)["changes"]
        [row] = snapshot(out_dir / place).trials
        sha256 = result_of(out_dir / place, row)["files"][WEIGHTS]["sha256"]
        members.append({**member, "name": f"{place}/{row.attempt_name}", "sha256": sha256})
    recipe = _as_computed(apply(finished.base, soup["train"]), _environment(finished), out_dir)
    references = finished.result.get("references", {})
    context, prepared = RunContext(references=references), out_dir / MEMBERS / "1" / PREPARED
    say("making the soup again")
    result = run_soup({**soup, "members": members}, recipe, out_dir, prepared, context, 1, study_dir=out_dir)
    place = out_dir / f"{ATTEMPT}1"
    numbers, predictions = partial(_numbers, result), partial(read_predictions, place / PREDICTIONS)
    found = _compared(finished, then, numbers, predictions, place / WEIGHTS, origin(replace(finished, result=result)))
    return {**found, "changes": [*{each["key"]: each for each in (*changes, *found["changes"])}.values()]}


def _prepare(shared: Recipe, kept: Mapping[str, Any], *given: Any) -> dict[str, Any]:
    """Prepares what the first time has prepared, with what it computed with (``shared``), whatever the recipe says."""
    _, folder, say, _ = given
    return RUNNER.prepare(shared, folder, say, kept)


def _train(references: Mapping[str, float], *given: Any) -> dict[str, Any]:
    """Runs a training whose constraints compare with what they compared with the first time."""
    recipe, out_dir, prepared_dir, context, attempt = given
    return RUNNER.train(recipe, out_dir, prepared_dir, replace(context, references=references), attempt)


def _environment(finished: Finished) -> Mapping[str, Any]:
    """Returns what a training computed with; of the zero-shot model, what the preparation did."""
    where: Mapping[str, Any] = finished.result.get("environment") or finished.provenance["preparation"]
    return where


def _as_computed(recipe: Recipe, where: Mapping[str, Any], out_dir: Path) -> Recipe:
    """Returns the recipe with what the first time computed with, and a cache of its own.

    One worker runs in this process, whatever the executor was: a test of the executors holds that nothing changes.
    """
    num_workers = where.get("num_workers", 1)
    gpus = 0.0 if where["device"] == "cpu" else recipe.resources.gpus_per_worker
    computed = {"threads": where["threads"], "num_workers": num_workers, "gpus_per_worker": gpus}
    computed |= {"executor": "inline" if num_workers == 1 else "ray-train", "targets": "online"}
    data, train = {"cache_dir": str(out_dir / DECODED)}, {"compile": where.get("compile", recipe.train.compile)}
    return with_keys(recipe, resources=computed, data=data, train=train)


def _compared(
    finished: Finished,
    predictions: pa.Table,
    numbers_again: Callable[[Sequence[str]], dict[str, Any]],
    predictions_again: Callable[[], pa.Table],
    weights_again: Path,
    origin_again: Mapping[str, Any],
) -> dict[str, Any]:
    """Compares a training, whose predictions were read before, with itself repeated."""
    is_exact = _environment(finished)["device"] == "cpu" or finished.recipe.train.deterministic
    tolerance, keys = (0.0, COMPARED) if is_exact else (TOLERANCE, COMPARED_WITHIN)
    numbers, paths = _numbers(_result(finished), keys), (finished.weights_path, weights_again)
    found = differing(numbers, numbers_again(keys), tolerance)
    with_weights = is_exact and all(path.is_file() for path in paths)
    if is_exact:
        found += differing(columns(predictions), columns(predictions_again()))
    if with_weights:
        then, now = map(load_tensors, paths)
        found += differing(then, now)
    changes = [each for each in differences(origin(finished), origin_again) if each[0] != "hardware.threads"]
    return {
        "same": not found,
        "title": finished.title,
        "num_numbers": len(numbers),
        "num_predictions": len(predictions) if is_exact else 0,
        "tolerance": tolerance,
        "weights_compared": with_weights,
        "differences": found,
        "changes": [{"key": key, "then": was, "now": value} for key, was, value in changes],
    }


def differing(then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float = 0.0) -> list[dict[str, Any]]:
    """Returns where two sides are not the same.

    Args:
        then: Numbers or arrays by name.
        now: The same of the other side.
        tolerance: Floating-point numbers may differ by so much.

    Returns:
        Per name that differs ``what`` (with how many do, of an array), ``then`` and ``now`` (numbers, or shapes), and
        ``size``: the largest difference of floating-point numbers, None of others.
    """
    found = []
    for what in {**then, **now}:
        old, new = (np.asarray(side.get(what)) for side in (then, now))
        if np.array_equal(old, new):
            continue
        size, name = None, what
        if old.shape == new.shape and old.ndim:
            name = f"{what} ({(old != new).sum()} of {counted(old.size, 'value')})"
        if old.shape == new.shape and old.dtype.kind == new.dtype.kind == "f":
            size = float(np.abs(new - old).max())
        if size is None or not size <= tolerance:
            found.append({"what": name, "then": _shown(old), "now": _shown(new), "size": size})
    return found


def _shown(value: npt.NDArray[Any]) -> Any:
    return f"shape {value.shape}" if value.ndim else value.item()


def columns(predictions: pa.Table) -> dict[str, Any]:
    """Returns the columns of predictions by name, as arrays."""
    return {f"predictions.{name}": predictions[name].to_numpy() for name in predictions.column_names}


def _result(finished: Finished) -> dict[str, Any]:
    return result_of(finished.folder, finished.row) or finished.result


def _numbers(result: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns what is compared of a result, by dotted name; points of the curve by their alpha."""
    parts = {key: result[key] for key in keys if key in result}
    if "curve" in parts:
        parts["curve"] = {f"{point['alpha']:g}": point for point in parts["curve"]}
    return leaves(parts)
