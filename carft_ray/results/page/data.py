"""A study as one plain document: what its page is drawn from. Nothing is written, and no set is opened.

``status``, ``report``, ``confirm`` and ``test`` are the documents that these commands print with `--json`, and
``baselines`` and ``trials`` those of `ls --sort number --json`. The rest is read from stored results and predictions.

Validation images whose answer changes between zero-shot, the chosen alpha and alpha 1 are among it: a training has
kept their pictures (``training.thumbnails``), and its predictions say what has changed.
"""

import base64
import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carft_ray import __version__, files
from carft_ray.data.duplicates.shared_images import read_shared
from carft_ray.data.source import IntArray
from carft_ray.evaluation.metrics import answers, reliability
from carft_ray.evaluation.objective import ID_SET, ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import alphas, correct_matrix, read_predictions, select, sets
from carft_ray.layout import CONFIRM, LOG, TEST_DIR, THUMBNAILS
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema.data import plain
from carft_ray.recipe.schema.train import PENALTIES
from carft_ray.results.adviser import findings
from carft_ray.results.reading.status_and_ls import expected_row, status
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.report import study_report
from carft_ray.results.stored import read_compared
from carft_ray.study.importance import importances
from carft_ray.study.place import named
from carft_ray.study.provenance import provenance_of
from carft_ray.study.rows import best_first, predictions_path
from carft_ray.study.training import TrialRow
from carft_ray.training.thumbnails import changed, read_thumbnails

NUM_EXPECTED = 12  # values of trials of which the page shows what is expected
NUM_CURVES = 12  # best trials whose alpha curves are drawn
NUM_CLASSES = 5  # that a table of changed answers names
# by pattern (``thumbnails.changed``): at zero-shot, at the chosen alpha, at alpha 1; two where the last two are one
TITLES = {
    "011": "Become right",
    "010": "Right only at the chosen alpha",
    "001": "Become right only at alpha 1",
    "100": "Become wrong",
    "110": "Become wrong only at alpha 1",
    "101": "Wrong only at the chosen alpha",
    "01": "Become right",
    "10": "Become wrong",
}
Point = tuple[str, float]


def page_document(view: Overview) -> dict[str, Any]:
    """Returns all that the page of a study shows.

    Args:
        view: The study.

    Raises:
        HoldOutError: The ledger was changed, so how often the test sets were read is not known.
        StorageError, DataError: Stored results are missing, damaged or of different images.
    """
    recipe, best, study_dir = view.recipe, view.best, view.study_dir
    provenance = provenance_of(view.log)
    spec, class_names = objective_spec(recipe), provenance.get("class_names", [])
    methods = {row.name: method_of(view, row) for row in view.trials}
    predictions, points = _of_best(view)
    document: dict[str, Any] = {
        "study": named(study_dir),
        "name": recipe.name,
        "made": {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "version": __version__},
        "synthetic": plain(recipe.data.train).source == "sandbox",
        "running": view.holder is not None,
        "has_ood": bool(recipe.data.ood_val),
        "objective": {**asdict(spec), "pareto": recipe.search.objective.kind == "pareto"},
        "space": {name: one.model_dump(mode="json") for name, one in recipe.search.space.items()},
        "methods": dict(Counter(methods[row.name] for row in view.trials if row.outcome != "running")),
        "method_of": methods,
        "standing": {row.name: row.standing for row in view.trials if row.standing},
        "devices": _devices(view),
        "status": status(view),
        "report": None if best is None else study_report(view),
        "confirm": read_compared(study_dir, CONFIRM),
        "test": read_compared(study_dir, TEST_DIR),
        "expected": _expected(view),
        "repeats": [row.name for row in view.repeats],
        "models": [view.data(row) for row in (*(view.trainings_of(best) if best else ()), *view.soups)],
        "baselines": [view.data(row) for row in view.baselines],
        "trials": [view.data(row) for row in view.trials],
        "seconds": {row.name: _seconds(view, row) for row in view.rows if row.started is not None},
        "intermediate_values": {row.name: row.intermediate_values for row in view.trials if row.intermediate_values},
        "curves": _curves(view),
        "importance": importances(study_dir),
        "changes": _changes(spec, predictions, points, class_names),
        "changed_images": changed_images(view, predictions, points, class_names),
        "reliability": _reliability(spec, predictions, points),
        "ledger": [asdict(entry) for entry in view.ledger],
        "shared_images": [asdict(row) for row in read_shared(study_dir)],
        "provenance": provenance,
        "recipe": dump_recipe(recipe),
    }
    document["rivals"] = _rivals(document)
    document["tables"] = set_tables(document)
    document["health"] = findings(view, document["report"])
    return document


def _expected(view: Overview) -> list[dict[str, Any]]:
    """Returns what the best values and all baselines are expected to measure, from the best down."""
    if view.expected is None:
        return []
    found = {each.names: each for each in view.expected.by_name.values()}
    ranked = sorted(found.values(), key=lambda each: each.order)
    trials = [each for each in ranked if each.kind == "trial"][:NUM_EXPECTED]
    return [expected_row(each) for each in ranked if each in trials or each.kind == "baseline"]


def method_of(view: Overview, row: TrialRow) -> str:
    """Returns the method of a training: your own function, plain fine-tuning, CAR-FT, or the penalties that it has; and
    whether a linear probe comes first, or the teacher moves.
    """
    train = view.recipe.train
    if train.function is not None:
        return "own trainer"
    names = [name.removesuffix("_weight") for name in PENALTIES if row.values.get(name, getattr(train, name))]
    known = {(): "plain fine-tuning", ("kl",): "CAR-FT"}
    name = known.get(tuple(names)) or f"penalties: {', '.join(names)}"
    probed = "linear probe, then " if row.values.get("probe_epochs", train.probe_epochs) else ""
    teacher = row.values.get("teacher", train.teacher)
    return f"{probed}{name}" + (" with a moving teacher" if names and teacher == "average" else "")


def set_tables(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tables of accuracy per set, the best evidence first: test, confirm, search.

    Each has ``label``, ``sets`` and ``rows`` of ``name``, ``role``, ``alpha`` and ``cells``: per set None, or ``mean``,
    ``low`` and ``high``. ``differences`` are rows of the winner minus each baseline.
    """
    found = (document["test"], document["confirm"], (document["report"] or {}).get("evidence"))
    return [_table(each) for each in found if each]


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
    has_ood, names = found["rows"][0]["ood_accuracy"] is not None, [*found["rows"][0]["sets"]]

    def cells(row: Mapping[str, Any]) -> list[dict[str, float] | None]:
        shown = [
            *(row["sets"][name] for name in names),
            *([row.get("ood_accuracy")] if has_ood else []),
            row["objective"],
        ]
        return [each and {"mean": each["mean"], "low": each["ends"][0], "high": each["ends"][1]} for each in shown]

    rows = [{**{key: row.get(key) for key in ("name", "role", "alpha")}, "cells": cells(row)} for row in found["rows"]]
    return {
        "label": f"{found['label'][:1].upper()}{found['label'][1:]}",
        "sets": [*names, *(("ood_mean",) if has_ood else ()), "objective"],
        "rows": rows,
        "differences": [
            {"name": f"{found['winner']} - {gap['other']}", "cells": cells(gap)} for gap in found["baselines"]
        ],
    }


def _rivals(document: Mapping[str, Any]) -> list[str]:
    """Returns the baselines of a confirm that are winners of other studies."""
    own = [row["name"] for row in document["baselines"]]
    rows = (document["confirm"] or {}).get("rows", ())
    found = [row["name"] for row in rows if row["role"] == "baseline"]
    return [name for name in found if name.removesuffix(", alpha 1") not in own]


def _seconds(view: Overview, row: TrialRow) -> list[float]:
    """Returns when the first attempt at a training began, in seconds since 1970, and how long all have taken."""
    began = row.started.timestamp() if row.started else 0.0
    with contextlib.suppress(ValueError, IndexError, OverflowError):  # none has begun yet
        line = files.first_line(view.study_dir, f"{row.training}/{LOG}")
        began = datetime.fromisoformat(line.split()[0]).timestamp()
    return [round(began, 2), round(max(row.elapsed_s or 0.0, row.spent_s), 2)]


def _devices(view: Overview) -> dict[str, str]:
    """Returns on what kind of device each finished trial ran."""
    found = {row.name: view.result(row).get("environment", {}).get("device") for row in view.trials}
    return {name: device for name, device in found.items() if device}


def _curves(view: Overview) -> list[dict[str, Any]]:
    """Returns the measured alpha curves of the best trials and of the baselines."""
    best = [row for row in best_first(view.trials) if row.outcome == "complete"][:NUM_CURVES]
    found = []
    for row in (*best, *view.baselines):
        points = view.result(row).get("curve") or []
        if row.outcome == "complete" and len(points) > 1:
            kept = ("alpha", "id_accuracy", "ood_accuracy", "objective")
            points = [{name: point[name] for name in kept if name in point} for point in points]
            found.append({"name": row.name, "kind": row.kind, "alpha": row.alpha, "points": points})
    return found


def _of_best(view: Overview) -> tuple[pa.Table, list[Point]]:
    """Returns the predictions of the best trial, and the points at which it is compared with itself, by name.

    Where it is at alpha 1, these are two; none where there is no best trial, or no predictions of it.
    """
    best = view.best
    if best is None or not (path := predictions_path(view.study_dir, best)).exists():
        return pa.table({}), []
    table = read_predictions(path)
    wanted = {"zero-shot": 0.0, "chosen": best.alpha or 0.0, "fine-tuned": 1.0}
    if wanted["chosen"] == wanted["fine-tuned"]:
        del wanted["fine-tuned"]
    known = alphas(table, ID_SET)
    return table, [(name, alpha) for name, alpha in wanted.items() if alpha in known]


def _changes(
    spec: ObjectiveSpec, table: pa.Table, points: Sequence[Point], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns per validation set how many answers of the best trial change between its alphas, and of which classes.

    ``steps`` are between zero-shot, the chosen alpha and alpha 1: numbers of images that become ``right`` and
    ``wrong``, and the classes of most of them.
    """
    found = []
    for name in spec.sets if len(points) > 1 else ():
        correct_RN = correct_matrix([(table, alpha) for _, alpha in points], name)
        part = select(table, name, points[0][1])
        labels_N = part["label"].to_numpy()[np.argsort(part["sample_id"].to_numpy(), kind="stable")]
        steps = []
        for (first, before_N), (second, after_N) in itertools.pairwise(zip(points, correct_RN, strict=True)):
            right, wrong = ~before_N & after_N, before_N & ~after_N
            step = {
                "from": first[0],
                "to": second[0],
                "alphas": [first[1], second[1]],
                "right": int(right.sum()),
                "wrong": int(wrong.sum()),
                "classes_right": _most(labels_N[right], class_names),
                "classes_wrong": _most(labels_N[wrong], class_names),
            }
            steps.append(step)
        found.append({"set": name, "num_images": int(correct_RN.shape[1]), "steps": steps})
    return found


def _most(labels: IntArray, class_names: Sequence[str]) -> list[list[Any]]:
    counts = Counter(labels.tolist()).most_common(NUM_CLASSES)
    names = dict(enumerate(class_names))
    return [[names.get(label, f"class {label}"), count] for label, count in counts]


def _reliability(spec: ObjectiveSpec, table: pa.Table, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Returns the reliability diagrams of the best trial on ID and on all OOD images, at zero-shot, its alpha and 1."""
    found = []
    for role, names in (("ID", (spec.id_set,)), ("OOD", spec.ood_sets)):
        for name, alpha in points if names else ():
            part = pa.concat_tables([select(table, each, alpha) for each in names])
            found.append({"role": role, "model": name, "alpha": alpha, "bins": reliability(answers(part))})
    return found


def changed_images(
    view: Overview, table: pa.Table, points: Sequence[Point], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the images of the best trial whose answers change and of which there is a picture, by pattern.

    Args:
        view: The study; with ``evaluate.thumbnails: 0`` none is shown, whatever a training has kept.
        table: Predictions of the best trial.
        points: At which it is compared with itself.
        class_names: In label order.

    Returns:
        Of each pattern that an image has ``title``, ``num_images`` (of all sets, with and without a picture) and
        ``images``: ``set``, ``label``, ``answers`` (``model``, ``alpha``, ``answer``, ``right``) and ``picture``, an
        address that holds it. Empty where there is no picture.
    """
    best, most = view.best, view.recipe.evaluate.thumbnails
    if best is None or len(points) < 2 or not most:
        return []
    pictures = read_thumbnails(files.inside(view.study_dir, f"{best.attempt_name}/{THUMBNAILS}")).slice(0, most)
    if not len(pictures):
        return []
    known: dict[str, dict[int, bytes]] = {}
    for row in pictures.to_pylist():
        known.setdefault(row["set"], {})[row["sample_id"]] = row["jpeg"]
    names = dict(enumerate(class_names))
    found: dict[str, dict[str, Any]] = {}
    for set_name in sets(table):
        shown = known.get(set_name, {})
        rows = [_by_id(select(table, set_name, alpha), list(shown)) for _, alpha in points]
        for pattern, ids in changed(table, set_name, [alpha for _, alpha in points]).items():
            group = found.setdefault(pattern, {"title": TITLES[pattern], "num_images": 0, "images": []})
            group["num_images"] += len(ids)
            group["images"] += [
                _image(set_name, shown[each], points, [row[each] for row in rows], names)
                for each in ids.tolist()
                if each in shown
            ]
    return [found[pattern] for pattern in TITLES if pattern in found and found[pattern]["images"]]


def _by_id(part: pa.Table, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Returns label and prediction of some images."""
    part = part.filter(pc.is_in(part["sample_id"], pa.array(ids, pa.uint64())))
    labels, predictions = (part[name].to_pylist() for name in ("label", "prediction"))
    return dict(zip(part["sample_id"].to_pylist(), zip(labels, predictions, strict=True), strict=True))


def _image(
    set_name: str, jpeg: bytes, points: Sequence[Point], rows: Sequence[tuple[int, int]], names: dict[int, str]
) -> dict[str, Any]:
    label = rows[0][0]
    return {
        "set": set_name,
        "label": names.get(label, f"class {label}"),
        "answers": [
            {"model": model, "alpha": alpha, "answer": names.get(answer, f"class {answer}"), "right": answer == label}
            for (model, alpha), (_, answer) in zip(points, rows, strict=True)
        ],
        "picture": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
    }
