"""Finished and unfinished studies of many kinds with stored results and predictions, made without a training."""

import json
import math

import numpy as np
import stand_in
import torch
from stand_in import SANDBOX_SET

from carft_ray.api.answers import Report
from carft_ray.data.source import ImageSet
from carft_ray.evaluation import predictions as stored
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import concat, correct, read_predictions, write_predictions
from carft_ray.layout import PREDICTIONS, THUMBNAILS
from carft_ray.recipe.loading import apply, dump_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.attempt_files import append_log, write_result
from carft_ray.study.opening import open_study
from carft_ray.study.running import started
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import Failure
from carft_ray.training.evaluate import answers, answers_between
from carft_ray.training.thumbnails import write_thumbnails

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
IMAGES = {"id_val": 160, "noisy": 80, "blurry": 80}
CLASSES = ("arrow", "bolt", "circle", "cross", "heart")


def make_recipe(trials=6, ood=True, **search):
    """The recipe of a random search: learning rate, KL weight and a categorical value."""
    content = stand_in.make_recipe(trials).model_dump(mode="json", exclude_unset=True)
    content |= {"name": "kinds", "train": {}}
    content["data"]["id_test"] = {**SANDBOX_SET, "split": "test"}
    if ood:
        ood_val = {name: {**SANDBOX_SET, "domain": f"{name}_photo", "split": "val"} for name in ("noisy", "blurry")}
        ood_test = {"sketch": {**SANDBOX_SET, "domain": "sketch", "split": "test"}}
        content["data"] |= {"ood_val": ood_val, "ood_test": ood_test}
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "kl_weight": {"low": 0.1, "high": 100, "log": True},
        "decay": {"choices": ["all", "matrices"]},
        **({"alpha": {"low": 0.1, "high": 1.0}} if "alpha" in search else {}),
    }
    baselines = {"fine_tuning": {"kl_weight": 0}}
    content["search"] |= {"space": space, "sampler": {"name": "random"}, "baselines": baselines, **search}
    return Recipe.model_validate(content)


def accuracies(train, alpha):
    """ID rises with alpha and the learning rate; OOD rises, then falls, the less the larger the KL weight is."""
    fit = 1 / (1 + math.log10(train.learning_rate / 1e-3) ** 2)
    kept = 1 / (1 + math.exp(-math.log10(train.kl_weight + 0.01)))
    ood = 0.55 + 0.25 * fit * alpha * (1.2 - alpha) + 0.08 * kept * alpha
    return {"id_val": 0.62 + 0.24 * fit * alpha, "noisy": ood, "blurry": ood - 0.08}


def predictions_table(set_name, alpha, sample_ids, labels, logits_NC, groups=None):
    """Predictions as a model with these class logits of N images has them; arrays or lists."""
    logits = torch.from_numpy(np.asarray(logits_NC, np.float32))
    answer = answers if groups is None else answers_between(groups, logits.device)
    found = answer(logits, torch.from_numpy(np.asarray(labels, np.int64)))
    return stored.predictions_table(set_name, alpha, sample_ids, labels, found.numpy())


def predictions(train, alphas, sets, rng):
    """Predictions of those accuracies; images have a difficulty of their own, and labels go round the classes."""
    tables = []
    for alpha in alphas:
        for name in sets:
            count = IMAGES[name]
            labels, hard = np.arange(count) % len(CLASSES), (np.arange(count) * 37 % count + 0.5) / count
            shared = np.random.default_rng(7).normal(0, 0.04, count)  # the same images are hard for all
            right = hard + shared + rng.normal(0, 0.015 * alpha, count) < accuracies(train, alpha)[name]
            logits = rng.normal(0, 0.3, (count, len(CLASSES))).astype(np.float32)
            logits[np.arange(count), np.where(right, labels, (labels + 1) % len(CLASSES))] += 2 + 2 * rng.random(count)
            tables.append(predictions_table(name, alpha, np.arange(count, dtype=np.uint64), labels, logits))
    return concat(tables)


def metrics_of(table, spec, alpha):
    found = {name: float(correct(table, name, alpha).mean()) for name in spec.sets}
    metrics = {f"accuracy/{name}": value for name, value in found.items()} | {"id_accuracy": found["id_val"]}
    if spec.ood_sets:
        metrics["ood_accuracy"] = float(np.mean([found[name] for name in spec.ood_sets]))
    return {**metrics, "objective": spec.value(found)}


def finish(study, spec, rng):
    """Writes what a training of these values leaves, and settles it."""
    place, recipe = spec.place(study.study_dir), apply(study.recipe, spec.values)
    what = objective_spec(recipe)
    alphas = sorted({*GRID, spec.values.get("alpha", 1.0)})
    table = predictions(recipe.train, alphas, what.sets, rng)
    write_predictions(place / PREDICTIONS, table)
    curve = [{"alpha": alpha, **metrics_of(table, what, alpha)} for alpha in alphas]
    best = max(curve[1:], key=lambda point: point["objective"])
    if "alpha" in spec.values:
        best = next(point for point in curve if point["alpha"] == spec.values["alpha"])
    metrics = {key: value for key, value in best.items() if key != "alpha"}
    content = {"objective": best["objective"], "alpha": best["alpha"], "metrics": metrics}
    content |= {"curve": curve, "moved": 0.01, "train": recipe.train.model_dump(mode="json")}
    content["num_images"] = {"train": 64, **{name: IMAGES[name] for name in what.sets}}
    content["elapsed_s"] = 0.02 + 0.01 * rng.random()
    write_result(place, content)
    assert study.settle(spec, spent=study.spent(spec, content["elapsed_s"], 0.0)) is not None


def fail(study, spec, outcome="diverged", reason="loss not finite at step 3 <b>"):
    spec.folder(study.study_dir).mkdir(parents=True, exist_ok=True)
    study.settle(spec, Failure(outcome, reason, spec.attempt), study.spent(spec, 0.01, 0.0))


def fill(study, num, fails=lambda number: False):
    """Ends baselines and ``num`` trials of an open study."""
    study_dir, rng = study.study_dir, np.random.default_rng(0)
    (study_dir / "resolved.yaml").write_text(dump_recipe(study.recipe))
    recover_running(study)
    what = objective_spec(study.recipe)
    zero_shot = predictions(study.recipe.train, (0.0,), what.sets, rng)
    write_predictions(study_dir / "prepared" / "zero_shot.parquet", zero_shot)
    study.add_zero_shot(metrics_of(zero_shot, what, 0.0))
    ended = 0
    while ended < num and (spec := study.next()) is not None:
        if spec.kind == "trial" and fails(spec.number):
            fail(study, spec)
        else:
            finish(study, spec, rng)
        ended += spec.kind == "trial"


def make(study_dir, num=6, recipe=None, fails=lambda number: False):
    with open_study(study_dir, recipe or make_recipe(num)) as study:
        fill(study, num, fails)
    return study_dir


def keep_thumbnails(study_dir, number=48, side=128):
    """Writes what the best trial keeps of its images: squares, each of a colour of its own."""
    view, sets = read_study(study_dir), []
    for name in objective_spec(view.recipe).sets:
        ids = np.arange(IMAGES[name], dtype=np.uint64)
        colours = np.random.default_rng(3).integers(0, 256, (len(ids), 1, 1, 3), np.uint8)
        images = np.broadcast_to(colours, (len(ids), side, side, 3))
        sets.append(ImageSet(name, images, np.arange(len(ids)) % len(CLASSES), ids))
    place = view.best.place(study_dir)
    write_thumbnails(place / THUMBNAILS, read_predictions(place / PREDICTIONS), view.best.alpha, sets, number)


def start(study):
    """Leaves a trial that trains."""
    spec = study.next()
    append_log(spec.folder(study.study_dir), "attempt 1: starts on here")
    (spec.folder(study.study_dir) / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n")
    study.log.write(started(spec, 1.0, 0.0, 1, ""))


METHODS = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "kl_weight": {"choices": [0, 1, 10]}}
KINDS = {
    "one": {"num": 1},
    "two": {"num": 2},
    "thirty": {"num": 30, "fails": lambda number: number % 7 == 3},
    "all failed": {"num": 5, "fails": lambda number: True},
    "no OOD set": {"num": 8, "recipe": make_recipe(8, ood=False)},
    "Pareto": {"num": 8, "recipe": make_recipe(8, objective={"kind": "pareto"}, alpha={"mode": "sample"})},
    "several methods": {"num": 18, "recipe": make_recipe(18, space=METHODS)},
    "no baseline": {"num": 4, "recipe": make_recipe(4, baselines={})},
}


def write_page(view, path):
    report = Report(view)
    report.save(path)
    return report.document
