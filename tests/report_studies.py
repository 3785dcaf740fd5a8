"""Finished and unfinished studies of many kinds with stored results and predictions, made without a training."""

import json
import math
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
from from_logits import predictions_table
from logs import holding
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial
from stand_in import SANDBOX_SET

from carft_ray import files
from carft_ray.api.answers import Report
from carft_ray.data.source import ImageSet
from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import concat, read_predictions, write_predictions
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.trial_values import apply
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.result import write_result
from carft_ray.study import rows
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure, Live, append_log, write_live
from carft_ray.study.recovery import recover_confirm, recover_running
from carft_ray.training.thumbnails import write_thumbnails

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
IMAGES = {"id_val": 160, "noisy": 80, "blurry": 80}
CLASSES = ("arrow", "bolt", "circle", "cross", "heart")


def make_recipe(trials=6, ood=True, **search):
    """The recipe of a random search: learning rate, KL weight and a categorical value."""
    validation = {name: {**SANDBOX_SET, "domain": f"{name}_photo", "split": "val"} for name in ("noisy", "blurry")}
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "kl_weight": {"low": 0.1, "high": 100, "log": True},
        "decay": {"choices": ["all", "matrices"]},
    }
    if "alpha" in search:
        space["alpha"] = {"low": 0.1, "high": 1.0}
    content = {
        "name": "kinds",
        "data": {
            "train": {**SANDBOX_SET, "split": "train"},
            "id_val": {**SANDBOX_SET, "split": "val"},
            "ood_val": validation if ood else {},
            "id_test": {**SANDBOX_SET, "split": "test"},
            "ood_test": {"sketch": {**SANDBOX_SET, "domain": "sketch", "split": "test"}} if ood else {},
        },
        "search": {
            "trials": trials,
            "space": space,
            "sampler": {"name": "random"},
            "baselines": {"fine_tuning": {"kl_weight": 0}},
            **search,
        },
    }
    return Recipe.model_validate(content)


def accuracies(train, alpha):
    """ID rises with alpha and the learning rate; OOD rises, then falls, the less the larger the KL weight is."""
    fit = 1 / (1 + math.log10(train.learning_rate / 1e-3) ** 2)
    kept = 1 / (1 + math.exp(-math.log10(train.kl_weight + 0.01)))
    ood = 0.55 + 0.25 * fit * alpha * (1.2 - alpha) + 0.08 * kept * alpha
    return {"id_val": 0.62 + 0.24 * fit * alpha, "noisy": ood, "blurry": ood - 0.08}


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
    from carft_ray.evaluation.predictions import correct

    found = {name: float(correct(table, name, alpha).mean()) for name in spec.sets}
    metrics = {f"accuracy/{name}": value for name, value in found.items()} | {"id_accuracy": found["id_val"]}
    if spec.ood_sets:
        metrics["ood_accuracy"] = float(np.mean([found[name] for name in spec.ood_sets]))
    return {**metrics, "objective": spec.value(found)}


def finish(study, spec, rng, limit=None):
    """Writes what a training of these values leaves, and settles it."""
    place, recipe = spec.place(study.study_dir), apply(study.recipe, spec.values)
    what = objective_spec(recipe)
    alphas = sorted({*GRID, spec.values.get("alpha", 1.0)})
    table = predictions(recipe.train, alphas, what.sets, rng)
    write_predictions(place / "predictions" / "validation.parquet", table)
    curve = [{"alpha": alpha, **metrics_of(table, what, alpha)} for alpha in alphas]
    missing = "violation/id_drop/strong"
    if limit is not None:
        for point in curve:
            point[missing] = limit - point["id_accuracy"]

    def rank(point):
        return -max(0.0, point.get(missing, 0.0)), point["objective"]

    best = max(curve[1:], key=rank)
    if "alpha" in spec.values:
        best = next(point for point in curve if point["alpha"] == spec.values["alpha"])
    metrics = {name: value for name, value in best.items() if name != "alpha"}
    content = {
        "objective": metrics["objective"],
        "alpha": best["alpha"],
        "metrics": metrics,
        "fine_tuned": {name: value for name, value in curve[-1].items() if name != "alpha"},
        "curve": curve,
        "moved": 0.01,
        "num_images": {"train": 64, **{name: IMAGES[name] for name in what.sets}},
        "train": recipe.train.model_dump(mode="json"),
        "elapsed_s": 0.02 + 0.01 * rng.random(),
    }
    write_result(place, content)
    study.spend(spec, content["elapsed_s"], 0.0)
    assert study.settle(spec) is not None


def fail(study, spec, outcome="diverged", reason="loss not finite at step 3 <b>"):
    spec.folder(study.study_dir).mkdir(parents=True, exist_ok=True)
    study.spend(spec, 0.01, 0.0)
    study.settle(spec, Failure(outcome, reason, spec.attempt))


def fill(study, num, fails=lambda number: False, limit=None):
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
            finish(study, spec, rng, limit)
        ended += spec.kind == "trial"


def make(study_dir, num=6, recipe=None, fails=lambda number: False, limit=None):
    """Writes a finished study; returns its directory."""
    with open_study(study_dir, recipe or make_recipe(num)) as study:
        fill(study, num, fails, limit)
    return study_dir


def multiply(study_dir, num):
    """Brings a finished study to so many trials; new ones have the results of those before, at values near by."""
    with holding(study_dir) as log, rows.readable(log) as storage, log.commit():
        search, rng = rows.stored(storage, rows.STUDY_NAMES["trial"]), np.random.default_rng(1)
        sources = search.get_trials(deepcopy=False)
        for number in range(len(sources), num):
            source = sources[number % len(sources)]
            name, old, new = f"t{number:04d}-{number:04x}", source.user_attrs["name"], dict(source.params)
            for key, one in source.distributions.items():
                if isinstance(one, FloatDistribution):
                    new[key] = float(np.clip(new[key] * 10 ** rng.normal(0, 0.1), one.low, one.high))
            known = {key: getattr(source, key) for key in ("state", "values", "distributions", "system_attrs")}
            trial = create_trial(**known, params=new, user_attrs={**source.user_attrs, "name": name})
            trial.datetime_start = sources[0].datetime_start + timedelta(seconds=number)
            search.add_trial(trial)
            before, folder = study_dir / "trials" / old, study_dir / "trials" / name
            (folder / "attempt-1" / "predictions").mkdir(parents=True)
            for path in filter(Path.is_file, before.rglob("*")):
                (folder / path.relative_to(before)).hardlink_to(path)
    return study_dir


def keep_thumbnails(study_dir, number=48, side=128):
    """Writes what the best trial keeps of its images: gradients with a square, of a colour for each class."""
    view = read_study(study_dir)
    place = view.best.place(study_dir)
    sets = []
    for name in objective_spec(view.recipe).sets:
        ids, rng = np.arange(IMAGES[name], dtype=np.uint64), np.random.default_rng(3)
        labels = np.arange(IMAGES[name]) % len(CLASSES)
        ramp = np.linspace(0, 255, side, dtype=np.uint8)
        images = np.broadcast_to(ramp[None, :, None, None], (len(ids), side, side, 3)).copy()
        colours = rng.integers(0, 256, (len(CLASSES), 3), np.uint8)
        images[:, side // 4 : -side // 4, side // 4 : -side // 4] = colours[labels][:, None, None]
        sets.append(ImageSet(name, images, labels, ids))
    table = read_predictions(place / "predictions" / "validation.parquet")
    write_thumbnails(place / "predictions" / "thumbnails.parquet", table, view.best.alpha, sets, number)


def start(study):
    """Leaves a trial that trains."""
    spec = study.next()
    append_log(spec.folder(study.study_dir), "attempt 1: starts on here")
    (spec.folder(study.study_dir) / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n")
    write_live(study.study_dir, {spec.training: Live(spec.attempt, time.time(), 1.0, 0.0, 1, 1, "")})


STRICT = {
    "baselines": {"strong": {"kl_weight": 0, "learning_rate": 1e-3}},
    "constraints": {"id_drop": {"strong": 0.05}},
}
METHODS = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "kl_weight": {"choices": [0, 1, 10]}}
KINDS = {
    "one": {"num": 1},
    "two": {"num": 2},
    "thirty": {"num": 30, "fails": lambda number: number % 7 == 3},
    "all failed": {"num": 5, "fails": lambda number: True},
    "no OOD set": {"num": 8, "recipe": make_recipe(8, ood=False)},
    "Pareto": {"num": 8, "recipe": make_recipe(8, objective={"kind": "pareto"}, alpha={"mode": "sample"})},
    "constraints": {"num": 12, "recipe": make_recipe(12, **STRICT), "limit": 0.86875 - 0.05},
    "several methods": {"num": 18, "recipe": make_recipe(18, space=METHODS)},
    "no baseline": {"num": 4, "recipe": make_recipe(4, baselines={})},
}


def levels(level, sets, seed=0, alpha=0.6):
    """Predictions in which a share ``level`` of each set, or (ID, OOD), is right, other images with each seed."""
    of_id, of_ood = level if isinstance(level, tuple) else (level, level)
    tables, rng = [], np.random.default_rng(seed)
    for name in sets:
        count = IMAGES.get(name, 160)
        labels = np.arange(count) % len(CLASSES)
        right = (np.arange(count) + 0.5) / count + rng.normal(0, 0.02, count) < (
            of_id if name.startswith("id_") else of_ood
        )
        logits = np.zeros((count, len(CLASSES)), np.float32)
        logits[np.arange(count), np.where(right, labels, (labels + 1) % len(CLASSES))] = 1
        tables.append(predictions_table(name, alpha, np.arange(count, dtype=np.uint64), labels, logits))
    return concat(tables)


def confirm_study(study_dir, recipe, winner, level, seeds):
    """Writes a confirm in which the winner has a level and the baseline 0.6; returns its summary."""
    from carft_ray.results.confirm import configurations, summary

    rows = (
        configurations.PlanRow(winner, "winner", winner, 0.6, {}, 0.7),
        configurations.PlanRow("fine_tuning", "baseline", "fine_tuning", 0.6, {}, 0.65),
        configurations.PlanRow("zero_shot", "baseline", None, 0.0, {}, 0.5),
    )
    stage, sets = configurations.Stage(winner, tuple(seeds), rows), objective_spec(recipe).sets
    tables = {
        name: levels(0.6 if number else level, sets, 10 * seed + number)
        for number, row in enumerate(rows[:2])
        for seed, name in zip(seeds, stage.names(row), strict=True)
    }
    with open_study(study_dir, recipe) as study:
        recover_confirm(study, {name: {} for name in tables})
        while spec := study.next():
            write_predictions(spec.place(study_dir) / "predictions" / "validation.parquet", tables[spec.name])
            write_result(spec.place(study_dir), {"objective": 0.5, "metrics": {}})
            study.settle(spec)
    write_predictions(study_dir / "prepared" / "zero_shot.parquet", levels(0.5, sets, alpha=0.0))
    return summary.summarise(study_dir, recipe, stage, None)


def read_test_sets(study_dir, recipe, winner, level, seeds, reads=1, went_on=False, confirmed=True):
    """Writes reads of the test sets in which the winner has a level and the baseline 0.6; returns the summary.

    Without a confirm the one training of each that the search made is read.
    """
    from logs import write_line

    from carft_ray.results.test_sets import summary
    from carft_ray.study import ledger

    sets = summary.objective_on_test(recipe).sets
    entries = []
    for number in range(reads):
        if number and went_on:
            write_line(study_dir, recipe, ledger.WENT_ON, details={"trials": 9}, reason="more")
        entries.append(write_line(study_dir, recipe, sets=sets, reason="again" if number else ""))
    if went_on and reads == 1:
        write_line(study_dir, recipe, ledger.WENT_ON, details={"trials": 9}, reason="more")
    runs = {name: [f"confirm/{name}-{seed}" for seed in seeds] for name in (winner, "fine_tuning")}
    rows = [
        {"name": winner, "role": "winner", "alpha": 0.6, "objective": 0.7, "runs": runs[winner]},
        {"name": "fine_tuning", "role": "baseline", "alpha": 0.6, "objective": 0.65, "runs": runs["fine_tuning"]},
        {"name": "zero_shot", "role": "baseline", "alpha": 0.0, "objective": 0.5, "runs": []},
    ]
    tables = {run: levels(level, sets, 10 * seed) for run, seed in zip(runs[winner], seeds, strict=True)}
    others = zip(runs["fine_tuning"], seeds, strict=True)
    tables |= {run: levels(0.6, sets, 10 * seed + 1) for run, seed in others}
    tables["zero_shot"] = levels(0.5, sets, alpha=0.0)
    lines = ledger.read_ledger(study_dir)
    content = summary.summarise(
        recipe,
        {"confirmed": confirmed, "seeds": list(seeds), "rows": rows},
        (),
        tables,
        summary.read_record(entries[-1], lines, reads),
    )
    files.write_json(study_dir / "test" / "summary.json", content)
    return content


def write_page(view, path):
    """Writes the page of a study; returns its document."""
    report = Report(view)
    report.save(path)
    return report.document


def of_kinds(folder):
    """Returns a function that gives the study of a kind, made in the folder when it is first asked for."""
    found = {}

    def study(kind):
        if kind not in found:
            found[kind] = make(folder / kind.replace(" ", "_"), **KINDS[kind])
        return found[kind]

    return study
