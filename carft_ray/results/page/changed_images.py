"""Validation images whose answer changes between zero-shot, the chosen alpha and alpha 1, with their thumbnails.

A training has kept the pictures (``training.thumbnails``), and its predictions say what has changed: no set is
opened.
"""

import base64
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from carft_ray import files
from carft_ray.evaluation.objective import ID_SET
from carft_ray.evaluation.predictions import alphas, read_predictions, select, sets
from carft_ray.layout import THUMBNAILS
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.stored import predictions_path
from carft_ray.training.thumbnails import changed, read_thumbnails

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


def points_of_best(view: Overview) -> list[Point]:
    """Returns the points at which the best trial is compared with itself, by name; where it is at alpha 1, two."""
    best = view.best
    if best is None or not predictions_path(view.study_dir, best).exists():
        return []
    known = alphas(read_predictions(predictions_path(view.study_dir, best)), ID_SET)
    wanted = {"zero-shot": 0.0, "chosen": best.alpha or 0.0, "fine-tuned": 1.0}
    if wanted["chosen"] == wanted["fine-tuned"]:
        del wanted["fine-tuned"]
    return [(name, alpha) for name, alpha in wanted.items() if alpha in known]


def changed_images(view: Overview, points: Sequence[Point], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the images of the best trial whose answers change and of which there is a picture, by pattern.

    Args:
        view: The study; with ``evaluate.thumbnails: 0`` none is shown, whatever a training has kept.
        points: Of ``points_of_best``.
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
    table = read_predictions(predictions_path(view.study_dir, best))
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
