"""Two short trainings and one evaluation, timed: what `plan` multiplies.

``run_training`` runs as in a trial and is asked to stop after ``NUM_STEPS`` steps. It does so in a process of the
search's executor, beside as many others as will run at a time: trainings that share cores or a disk are slower, each.
The second training is the measure: the first one compiles and warms up, and stores the frozen model's targets.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carft_ray.data.cached_sets import PackedSource
from carft_ray.evaluation.predictions import write_predictions
from carft_ray.layout import ATTEMPT, HEADS, PREDICTIONS, STEP
from carft_ray.model.device import device_of
from carft_ray.recipe.schema.recipe import Recipe, with_keys
from carft_ray.store.attempt_files import write_result
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.evaluate import Mixtures, predict_all
from carft_ray.training.loop import StoppedRun
from carft_ray.training.ranks import from_rank_0
from carft_ray.training.run import live_alphas, run_training
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import shared_inputs_of_worker

NUM_STEPS = 30  # half of all steps where a training has fewer than twice as many


def run_timed(recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int) -> dict[str, Any]:
    """Runs two short trainings, then one evaluation of all validation images.

    Args:
        recipe: ``recipe.train`` holds the values of this training.
        out_dir: Folder of this training.
        prepared_dir: What ``prepare`` made.
        context: Rank, reports and stop flag.
        attempt: Number of this attempt.

    Returns:
        A result, as ``result.json`` holds it. In ``probe``, a training of E epochs takes ``fixed_s`` + E ``epoch_s``
        and ``look_s`` for each intermediate evaluation; an epoch of the first training took ``first_epoch_s``. In a
        warm process this call takes ``inside_s``, and computes for the share ``busy`` of it. ``weights``, a
        ``checkpoint``, ``predictions`` at all alphas, and the ``cache`` of the sets are in bytes.

    Raises:
        StoppedRun, DivergedError, CarftError: As ``run_training``.
    """
    inputs = shared_inputs_of_worker(recipe, context, prepared_dir)  # what a process does once is not timed
    began, cpu_began = time.perf_counter(), time.process_time()
    first, first_s = _train_a_little(recipe, out_dir / "first", prepared_dir, context, attempt)
    rows, trained_s = _train_a_little(recipe, out_dir, prepared_dir, context, attempt)
    heads = load_tensors(prepared_dir / HEADS)
    mixtures = Mixtures(inputs.clip, heads["class_head"], recipe.train, device_of(recipe))
    state = mixtures.zero_shot
    with mixtures.between(lambda: state) as mixed:
        evaluation_began = time.perf_counter()
        table = predict_all(mixed(0.5), inputs.validation, 0.5, recipe.evaluate.batch_size, context)
    result: dict[str, Any] = {"objective": 0.0, "metrics": {}}
    if context.rank != 0:
        return result
    place = out_dir / f"{ATTEMPT}{attempt}"
    write_predictions(place / PREDICTIONS, table)
    evaluate_s, image_s = time.perf_counter() - evaluation_began, _seconds_per_image(rows)
    rest_s = max(0.0, trained_s - rows[-1]["step"] * recipe.train.batch_size * image_s)
    alphas = recipe.search.alpha.measured if recipe.train.alpha is None else (0.0, recipe.train.alpha, 1.0)
    of_subset = sum(min(len(each), recipe.evaluate.subset) for each in inputs.validation) / len(table)
    decoded = sum(image_set.images_NHWC.nbytes for image_set in inputs.validation)
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    result["probe"] = {
        "inside_s": took_s - (first_s - trained_s),
        "busy": cpu_s / took_s,
        "fixed_s": rest_s + (len(alphas) - 1) * evaluate_s,  # the preparation evaluates alpha 0
        "first_epoch_s": len(inputs.train) * _seconds_per_image(first),
        "epoch_s": len(inputs.train) * image_s,
        "look_s": len(live_alphas(recipe)) * of_subset * evaluate_s,
        "weights": sum(tensor.nbytes for tensor in state.values()),
        "checkpoint": max(_num_bytes(folder) for folder in place.glob(f"{STEP}*")),
        "predictions": len(alphas) * (place / PREDICTIONS).stat().st_size,
        "cache": decoded + (inputs.train.num_bytes if isinstance(inputs.train, PackedSource) else 0),
    }
    return write_result(place, result)


def _train_a_little(
    recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int
) -> tuple[list[dict[str, float]], float]:
    """Returns the rows of progress of a short training, which rank 0 has, and its seconds."""
    began, rows = time.perf_counter(), list[dict[str, float]]()

    def should_stop() -> bool:
        is_long = bool(rows) and rows[-1]["step"] >= min(NUM_STEPS, rows[-1]["num_steps"] / 2)
        return is_long or context.should_stop()

    # an epoch of few steps is first asked to stop at its end, and one that is the last ends as a whole training
    short = with_keys(recipe, train={"epochs": max(2, recipe.train.epochs)}, evaluate={"every_epochs": 0})
    timed = dataclasses.replace(context, progress=rows.append, should_stop=should_stop)
    with contextlib.suppress(StoppedRun):
        run_training(short, out_dir, prepared_dir, timed, attempt)
    if from_rank_0(context, context.should_stop):
        raise StoppedRun("stopped on request")
    return rows, time.perf_counter() - began


def _seconds_per_image(rows: Sequence[Mapping[str, float]]) -> float:
    return statistics.fmean(1 / row["images_per_s"] for row in rows[1:] or rows)  # the first row warms up


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
