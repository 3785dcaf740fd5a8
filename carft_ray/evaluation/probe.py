"""Real trainings on a small share of the sets, with their parts timed: what `plan` makes its forecast from.

They are made by ``run_training`` itself, as trials are, in processes of the search's executor and as many at a time:
trainings that share cores or a disk are slower, each. What ``plan`` asks for is in ``probe.json`` of the folder.
"""

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carft_ray import files
from carft_ray.data.caching.arrays import DecodedSource
from carft_ray.data.caching.packed import PackedSource
from carft_ray.data.source import DerivedSource, PixelArray, Source
from carft_ray.data.views import permutation, view_batch
from carft_ray.evaluation import shared_inputs
from carft_ray.evaluation.alpha import alpha_profile
from carft_ray.evaluation.evaluate import predict_all, subset
from carft_ray.evaluation.heads import IN_CACHE, cached_heads
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.origin import shared_origin
from carft_ray.evaluation.predictions import read_predictions, write_predictions
from carft_ray.evaluation.shared_inputs import SharedInputs, load_shared_inputs, shared_inputs_of_worker
from carft_ray.evaluation.training import RESULT_VERSION, device_of, is_compiled, prepare, run_training, target_store
from carft_ray.layout import HEADS, PREDICTIONS, RESULT, WEIGHTS
from carft_ray.learning.checkpoint import load_tensors
from carft_ray.learning.classifier import build_classifier
from carft_ray.learning.context import RunContext
from carft_ray.learning.loop import LOG_EVERY, same_attention
from carft_ray.learning.memory import micro_batch_of
from carft_ray.learning.mixing import clean_views, mix_weights, recalibrate
from carft_ray.learning.models.tower import compile_tower, compiles, shape_tower
from carft_ray.learning.target_blocks import BLOCK
from carft_ray.learning.targets import Targets
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.space import apply

PROBE = "probe.json"
EPOCHS = 2  # the first one holds what is done once, and a checkpoint whose end can be seen
NUM_VIEWS, NUM_STEPS = 32, 5  # that are timed apart from each other
MEETING_S = 60.0  # a probe waits so long for the next of the others that shall run at the same time


class FirstImages(DerivedSource):
    """The first images of a source."""

    def __init__(self, source: Source, number: int) -> None:
        super().__init__(source)
        self.labels, self.sample_ids = source.labels[:number], source.sample_ids[:number]
        self.fingerprint = f"{source.fingerprint}, the first {number}"

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3]."""
        return self.images.pixels(index)


def share_of(inputs: SharedInputs, recipe: Recipe, largest_batch: int) -> SharedInputs:
    """Returns a share: ten steps of the largest batch, and of each set the images of an evaluation or of a batch."""
    train = FirstImages(inputs.train, min(len(inputs.train), LOG_EVERY * largest_batch))
    number = max(recipe.evaluate.subset, recipe.evaluate.batch_size)
    validation = tuple(subset(image_set, number) for image_set in inputs.validation)
    return dataclasses.replace(inputs, train=train, validation=validation, key=f"share of {inputs.key}")


def probe_prepare(recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Prepares for a share of the sets, and returns how long each part took and how large everything is.

    Args:
        recipe: The study's recipe.
        folder: Where the preparation is kept.
        say: Called with how far the embedding of the sentences is, which no search does again on this machine.

    Returns:
        ``inside_s`` in all, ``open_s`` for model and sets once they are in the cache, ``origin_s`` for their hashes,
        ``heads_s`` from the cache, ``zero_shot_s`` of ``num_evaluated`` images; ``num_train`` (``num_share`` of them in
        the share), ``num_validation``, ``num_contexts``, ``cache_bytes``.
    """
    began = time.perf_counter()
    inputs = load_shared_inputs(recipe, prepared_dir=folder)  # sets that it decodes stay in the cache
    clip, device = inputs.clip, device_of(recipe)
    torch.set_num_threads(recipe.resources.threads_per_worker)
    cached_heads(recipe, clip, inputs.class_names, inputs.templates, device, say)  # and so do the heads
    shared_inputs._loaded.clear()
    again = time.perf_counter()
    inputs = load_shared_inputs(recipe, prepared_dir=folder)
    open_s = time.perf_counter() - again
    shared_origin(recipe, inputs, device_of(recipe))
    origin_s = time.perf_counter() - again - open_s
    share = share_of(inputs, recipe, files.read_json(folder.parent / PROBE)["largest_batch"])
    marks: list[tuple[str, float]] = []
    decided = {"compile": compiles(recipe.train, len(inputs.train), device)}  # as for the whole set
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=decided)})
    prepare(recipe, folder, lambda text: marks.append((text, time.perf_counter())), share)
    marks.append(("end", time.perf_counter()))
    spent = [(text, after - at) for (text, at), (_, after) in itertools.pairwise(marks)]

    def total(words: str) -> float:
        return sum(seconds for text, seconds in spent if text.startswith(words))

    kept = 0  # of the training set
    if isinstance(inputs.train, DecodedSource):
        kept = len(inputs.train) * int(np.prod(share.train.pixels(0).shape))
    elif isinstance(inputs.train, PackedSource):
        kept = inputs.train.num_bytes
    num_validation = sum(map(len, inputs.validation))
    return {
        "inside_s": time.perf_counter() - began,
        "open_s": open_s,
        "origin_s": origin_s,
        "heads_s": total(IN_CACHE),
        "zero_shot_s": total("evaluating zero-shot"),
        "num_evaluated": sum(map(len, share.validation)),
        "num_share": len(share.train),
        "num_train": len(inputs.train),
        "num_validation": num_validation,
        "num_contexts": len(inputs.templates),
        "cache_bytes": int(num_validation * np.prod(inputs.validation[0].images_NHWC.shape[1:]) + kept),
    }


def probe_training(
    recipe: Recipe, out_dir: Path, prepared_dir: Path, context: RunContext, attempt: int
) -> dict[str, Any]:
    """Runs the trainings that ``probe.json`` names on a share of the sets; ``probe`` of the result holds the times.

    Args:
        recipe: The study's recipe.
        out_dir: Folder of this probe, ``probe-<wave>-<number>``.
        prepared_dir: What ``probe_prepare`` made.
        context: Rank, reports and stop flag.
        attempt: Number of this attempt.

    Raises:
        StoppedRun, DivergedError, CarftError: As ``run_training``.
    """
    asked = files.read_json(prepared_dir.parent / PROBE)
    share = share_of(shared_inputs_of_worker(recipe, context, prepared_dir), recipe, asked["largest_batch"])
    if context.rank == 0:
        _meet(out_dir, asked["peers"], context.should_stop)
    began = time.perf_counter()
    measured, storing_s = {}, 0.0
    for name, values in asked["trainings"].items():
        kind = "stored" if name.startswith("stored") else "online"
        of_kind = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"targets": kind})})
        applied = apply(of_kind, values)
        at = time.perf_counter()
        _store_targets(applied, prepared_dir, share)  # those of an earlier training, as it were
        storing_s += time.perf_counter() - at
        measured[name] = _timed(applied, out_dir / name, prepared_dir, context, share)
    others = _evaluation(recipe, out_dir / next(iter(measured)), prepared_dir, context, share)
    others |= _input(recipe, prepared_dir, context, share)
    result = {
        "format_version": RESULT_VERSION,
        "objective": 0.0,
        "metrics": {},
        "probe": {
            "inside_s": time.perf_counter() - began - storing_s,
            "storing_s": storing_s,
            "trainings": measured,
            **others,
        },
    }
    if context.rank == 0:
        for name in measured:
            shutil.rmtree(out_dir / name)
        files.write_json(out_dir / RESULT, result)
    return result


def _input(recipe: Recipe, prepared_dir: Path, context: RunContext, share: SharedInputs) -> dict[str, float]:
    """Returns ``view_s``, of one thread, and ``step_s``, of the device with views that are there: seconds an image.

    ``step_s`` is 0 on a CPU, where the same cores do both.
    """
    device, train, indices = device_of(recipe), recipe.train, np.arange(min(len(share.train), NUM_VIEWS))
    began = time.perf_counter()
    ids, size = share.train.sample_ids[indices], share.clip.image_size
    views_BHWC = view_batch(share.train, indices, ids, train.seed, 0, train.crop_scale, size)
    view_s = (time.perf_counter() - began) / len(indices)
    return {"view_s": view_s, "step_s": _step_s(recipe, prepared_dir, context, share, views_BHWC, device)}


def _step_s(
    recipe: Recipe,
    prepared_dir: Path,
    context: RunContext,
    share: SharedInputs,
    views_BHWC: PixelArray,
    device: torch.device,
) -> float:
    if device.type == "cpu":
        return 0.0
    class_head_CD = load_tensors(prepared_dir / HEADS)["class_head"]
    classifier = build_classifier(share.clip, class_head_CD, recipe.train, device).train()
    shape_tower(classifier, recipe.train)
    size = micro_batch_of(recipe.train, context.world_size)
    if is_compiled(recipe, prepared_dir):
        compile_tower(classifier, size)
    pixels_BHWC = torch.from_numpy(np.resize(views_BHWC, (size, *views_BHWC.shape[1:]))).to(device)
    began = 0.0
    for turn in range(NUM_STEPS + 2):  # the first two find their kernels
        if turn == 2:
            torch.cuda.synchronize(device)
            began = time.perf_counter()
        classifier(pixels_BHWC)[1].float().logsumexp(dim=1).sum().backward()
        classifier.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / NUM_STEPS / size


def _meet(out_dir: Path, peers: int, should_stop: Callable[[], bool]) -> None:
    """Waits until the probes of this wave have all come as far: they must be as slow as trials at the same time.

    Eight processes on two busy cores take minutes to start: the wait begins anew with each that has come.
    """
    wave, met, end = out_dir.name.rpartition("-")[0], 0, 0.0
    files.write_text(out_dir.parent / f"{out_dir.name}.met", "")
    while met < peers and not should_stop():
        before, met = met, len(list(out_dir.parent.glob(f"{wave}-*.met")))
        end = time.monotonic() + MEETING_S if met > before else end
        if time.monotonic() >= end:
            return
        time.sleep(0.05)


def _store_targets(recipe: Recipe, prepared_dir: Path, share: SharedInputs) -> None:
    """Stores the targets that a training of two epochs reads; where it reads none, nothing is done."""
    device, train = device_of(recipe), recipe.train
    torch.set_num_threads(recipe.resources.threads_per_worker)  # part of the store's key
    context_head_TD = load_tensors(prepared_dir / HEADS)["context_head"]
    store = target_store(recipe, share, context_head_TD, prepared_dir)
    if store is None:
        return
    num_images = len(share.train)
    with same_attention(), Targets(share.clip, context_head_TD, share.train, train, device, store) as targets:
        for visit in range(EPOCHS):
            order = permutation(train.seed, visit, num_images)
            for first in range(0, num_images, BLOCK):
                targets.of(targets.parts(visit, order, first, min(BLOCK, num_images - first)))


def _timed(
    recipe: Recipe, folder: Path, prepared_dir: Path, context: RunContext, share: SharedInputs
) -> dict[str, float]:
    """Runs one training of two epochs; returns the seconds of its parts.

    Returns:
        ``image_s`` a training image (of all workers together), ``look_s`` an evaluation during the training,
        ``save_s`` a checkpoint, ``rest_s`` everything else with ``num_alphas`` evaluations of the share at its end.
    """
    every = 1 if recipe.evaluate.every_epochs or recipe.search.pruner.name != "none" else 0
    short = apply(recipe, {"epochs": EPOCHS})
    short = short.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"every_epochs": every})})
    windows: list[tuple[int, float]] = []  # images, seconds
    evaluations: list[float] = []
    saves: list[float] = []
    at = {"images": 0, "progress": 0.0, "report": 0.0}

    def progress(row: dict[str, float]) -> None:
        in_epoch = int(row["step"] - (row["epoch"] - 1) * row["num_steps"] / EPOCHS)
        images = min(in_epoch * recipe.train.batch_size, len(share.train))
        windows.append((images - int(at["images"]), (images - at["images"]) / row["images_per_s"]))
        at["images"] = images % len(share.train)
        at["progress"] = time.perf_counter()

    def report(row: dict[str, float]) -> None:
        at["report"] = time.perf_counter()
        evaluations.append(at["report"] - at["progress"])

    def should_stop() -> bool:
        if at["report"] and not saves:
            saves.append(time.perf_counter() - at["report"])
        return context.should_stop()

    began = time.perf_counter()
    timed = dataclasses.replace(context, progress=progress, report=report, should_stop=should_stop)
    result = run_training(short, folder, prepared_dir, timed, 1, share)
    total_s = time.perf_counter() - began
    if context.rank != 0:
        return {}
    steady = windows[1:] if len(windows) > 2 else windows  # the first one also warms up
    trained_s, save_s = sum(seconds for _, seconds in windows), saves[0] if saves else 0.0
    return {
        "image_s": sum(seconds for _, seconds in steady) / sum(images for images, _ in steady),
        "look_s": sum(evaluations) / len(evaluations) if every else 0.0,
        "save_s": save_s,
        "rest_s": max(0.0, total_s - trained_s - sum(evaluations) - EPOCHS * save_s),
        "num_alphas": sum(point.get("evaluated", 1.0) for point in result["curve"])
        - float(not recipe.train.recalibrate_batches),
    }


def _evaluation(
    recipe: Recipe, folder: Path, prepared_dir: Path, context: RunContext, share: SharedInputs
) -> dict[str, float]:
    """Times an evaluation of the share and what is done with its predictions; returns sizes of files, too.

    Returns:
        ``mix_s`` to mix weights, ``recalibrate_s`` for statistics from the training images of the share (0 without
        ``recalibrate_batches``), ``evaluate_s`` for the share at one alpha, ``table_s`` for its curve and file,
        ``num_evaluated`` images, ``weights_bytes`` and ``predictions_bytes`` of the share.
    """
    heads = load_tensors(prepared_dir / HEADS)
    classifier = build_classifier(share.clip, heads["class_head"], recipe.train, device_of(recipe))
    state, views_NHWC = classifier.state(), clean_views(share.clip, share.train, recipe.train.recalibrate_batches)
    began = time.perf_counter()
    classifier.load_state_dict(mix_weights(state, state, 0.5))
    mixed = time.perf_counter()
    recalibrate(classifier, views_NHWC)
    recalibrated = time.perf_counter()
    predict_all(classifier, share.validation, 0.5, recipe.evaluate.batch_size, context)
    evaluated = time.perf_counter()
    if context.rank != 0:
        return {}
    path = folder / PREDICTIONS
    table = read_predictions(path)
    if recipe.train.alpha is None:
        alpha_profile(table, objective_spec(recipe), recipe.search.alpha.lowest)
    write_predictions(folder / "again.parquet", table)
    return {
        "mix_s": mixed - began,
        "recalibrate_s": recalibrated - mixed,
        "evaluate_s": evaluated - recalibrated,
        "table_s": time.perf_counter() - evaluated,
        "num_evaluated": sum(map(len, share.validation)),
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "predictions_bytes": path.stat().st_size,
    }
