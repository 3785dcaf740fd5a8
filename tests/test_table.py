"""The design of ``benchmarks.table`` and what it keeps of a training; nothing is trained here."""

import json

import numpy as np
from from_logits import predictions_table

from benchmarks import table
from benchmarks.trainings import Finished, Planned
from carft_ray import files
from carft_ray.evaluation.predictions import concat, write_predictions
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.trial_values import apply


def test_the_design_fills_the_space_with_valid_trainings_and_a_longer_one_begins_alike():
    points = table.design(200)
    assert points[:50] == table.design(50)
    for name, (low, high, log) in table.SPACE.items():
        values = np.array([point[name] for point in points])
        assert low <= values.min() <= values.max() <= high
        shares = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
        assert np.histogram(shares, 4, (0, 1))[0].min() > 30  # of 50 in each quarter
    recipe = load_recipe(table.RECIPE)
    assert [apply(recipe, point).train.epochs for point in points[:20]] == [point["epochs"] for point in points[:20]]


def test_a_row_keeps_curve_epochs_and_every_image_and_of_a_diverged_training_its_values_alone(tmp_path):
    finished = Finished(Planned("point 7", {"learning_rate": 1e-3}), tmp_path)
    sets, right = ("id_val", "sketch"), {0.0: [1, 0, 1, 1, 0], 1.0: [1, 1, 1, 0, 0]}
    parts = []
    for alpha, correct in right.items():
        for name, part in (("id_val", correct[:3]), ("sketch", correct[3:])):
            logits = np.array([[1.0, 0.0] if hit else [0.0, 1.0] for hit in part], np.float32)
            ids, labels = np.arange(len(part), dtype=np.uint64), np.zeros(len(part), np.int64)
            parts.append(predictions_table(name, alpha, ids, labels, logits))
    write_predictions(tmp_path / "attempt-1" / "predictions" / "validation.parquet", concat(parts))
    curve = [{"alpha": alpha, "objective": 0.5, "id_accuracy": 0.6} for alpha in right]
    metrics = {"id_accuracy": 0.6, "ood_accuracy": 0.4}
    result = {"objective": 0.5, "alpha": 1.0, "metrics": metrics, "curve": curve, "elapsed_s": 3.0}
    (tmp_path / "attempt-1" / "result.json").write_text(json.dumps(result))
    files.append_line(tmp_path / "metrics.jsonl", json.dumps({"epoch": 1, "loss": 2.0, "images_per_s": 9, "step": 4}))

    row = table.row_of(7, finished, sets)
    assert (row["point"], row["learning_rate"], row["alpha"], row["diverged"]) == (7, 1e-3, 1.0, False)
    assert row["epochs_seen"] == [{"epoch": 1, "loss": 2.0}]
    for point in row["curve"]:
        bits = np.unpackbits(np.frombuffer(point["correct"], np.uint8), count=5)
        assert bits.tolist() == right[point["alpha"]]
    (tmp_path / "diverged.txt").write_text("step 3")
    row = table.row_of(0, finished, ("id_val",))
    assert row == {"point": 0, "learning_rate": 1e-3, "seed": 0, "diverged": True}
