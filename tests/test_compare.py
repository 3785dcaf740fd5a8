"""Two trainings side by side: what their recipes and origins do not share, and paired differences where they can be."""

import json
import shutil
import sys

import forging
import numpy as np
import pytest
import short_study
import short_training
from from_logits import predictions_table

from carft_ray import cli
from carft_ray.errors import StorageError, UsageError
from carft_ray.evaluation.predictions import correct, read_predictions, write_predictions
from carft_ray.launch.runs.single import train_once
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.compare import compare
from carft_ray.results.reading.finished import split_target
from carft_ray.results.statistics.intervals import OVER_IMAGES

pytestmark = pytest.mark.slow


def quiet(*words):
    del words


def training(here, name, *overrides):
    recipe = load_recipe(here / "recipe.yaml", [f"data.cache_dir={here / 'cache'}", "train.epochs=1", *overrides])
    train_once(recipe, here / name, False, "", quiet, quiet, quiet)
    return here / name


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Trainings ``run`` (twice a study's kind of data) and ``faster``, and a study of two trials."""
    folder = tmp_path_factory.mktemp("here")
    recipe = load_recipe(short_training.make(folder), [f"data.cache_dir={folder / 'cache'}", "train.epochs=1"])
    short_study.search(folder / "study", recipe)
    training(folder, "run")
    training(folder, "faster", "train.learning_rate=0.05", "train.seed=3")
    return folder


def row(found, what):
    return next(each for each in found["rows"] if each["what"] == what)


def keys(rows):
    return {each["key"]: (each["a"], each["b"]) for each in rows}


def test_a_training_compared_with_itself_differs_in_nothing(here):
    found = compare(str(here / "run"), str(here / "run"))
    assert found["recipe"] == found["origin"] == []
    assert found["reasons"] == {}
    assert {each["difference"] for each in found["rows"]} == {0.0}
    assert all(each["low"] < 0 < each["high"] for each in found["rows"])  # these few images only


def test_values_that_differ_are_named_and_differences_are_those_of_the_metrics(here):
    found = compare(str(here / "run"), str(here / "faster"))
    assert keys(found["recipe"]) == {"train.learning_rate": (0.01, 0.05), "train.seed": (0, 3)}
    assert found["origin"] == []
    assert [each["what"] for each in found["rows"]] == ["objective", "id_accuracy", "ood_accuracy", "accuracy/sketch"]
    for each in found["rows"]:
        assert each["difference"] == pytest.approx(each["a"] - each["b"], abs=1e-12)
        assert each["low"] <= each["difference"] <= each["high"]
    assert found["words"] == OVER_IMAGES


def test_the_interval_is_that_of_the_paired_differences_of_the_images(here, tmp_path):
    """The normal interval of the mean of d_k = a_k - b_k, with a NumPy sum; half of the other's answers are right."""
    other = shutil.copytree(here / "run", tmp_path / "other")
    path = short_training.place_in(other) / "predictions" / "validation.parquet"
    table = read_predictions(path)
    answers = table["label"].to_numpy() + np.arange(len(table)) % 2
    column = table.schema.get_field_index("prediction")
    write_predictions(path, table.set_column(column, table.schema.field(column), [answers.astype(np.int32)]))
    forging.record(other)
    found = row(compare(str(here / "run"), str(other)), "id_accuracy")
    right = []
    for folder in map(short_training.place_in, (here / "run", other)):
        alpha = json.loads((folder / "result.json").read_text())["alpha"]
        table = read_predictions(folder / "predictions" / "validation.parquet")
        right.append(correct(table, "id_val", alpha).astype(float))
    d = right[0] - right[1]
    half = 1.959963984540054 * d.std(ddof=1) / np.sqrt(len(d))
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-12)


def test_a_study_stands_for_its_best_trial_and_a_colon_names_another(here):
    study = here / "study"
    results = {path.parents[1].name: json.loads(path.read_text()) for path in study.glob("trials/*/*/result.json")}
    best = max(sorted(results), key=lambda name: results[name]["objective"])
    found = compare(str(study), f"{study}:zero_shot")
    assert (found["a"]["trial"], found["b"]["trial"], found["b"]["alpha"]) == (best, "zero_shot", 0.0)
    assert found["a"]["objective"] == results[best]["objective"]
    assert row(found, "objective")["a"] == results[best]["metrics"]["objective"]
    between = compare(f"{study}:0", f"{study}:t0001")
    assert set(keys(between["recipe"])) == {"train.learning_rate"}


def test_other_images_under_the_same_names_are_not_compared(here, tmp_path):
    """Sample ids are those of the names: only the contents tell."""
    for name in ("images", "model"):
        shutil.copytree(here / name, tmp_path / name)
    shutil.copy(here / "recipe.yaml", tmp_path)
    short_training.write_image(tmp_path / "images" / "sketch" / "star" / "0.png", 4, 4321)
    other = training(tmp_path, "other")
    found = compare(str(here / "run"), str(other))
    assert "data.sketch.digest" in keys(found["origin"])
    assert "the contents of the images differ" in found["reasons"]["sketch"]
    assert row(found, "accuracy/sketch")["difference"] is None
    assert row(found, "ood_accuracy")["difference"] is None
    assert found["reasons"]["objective"] == "it needs all its sets, and sketch cannot be compared"
    assert row(found, "id_accuracy")["difference"] is not None
    assert row(found, "objective")["a"] is not None


def test_a_set_of_one_side_only_and_another_objective_are_not_compared(here):
    alone = training(here, "alone", "data.ood_val={}", "search.objective.id_weight=0.25")
    found = compare(str(here / "run"), str(alone))
    assert found["reasons"] == {
        "sketch": "only run:train has this set",
        "ood_accuracy": "it is the mean of other sets",
        "objective": "the recipes define it differently",
    }
    assert (row(found, "accuracy/sketch")["b"], row(found, "objective")["difference"]) == (None, None)
    assert row(found, "id_accuracy")["difference"] is not None


def test_the_same_images_with_other_labels_are_not_compared(here, tmp_path):
    shutil.copytree(here / "run", tmp_path / "run")
    inside = short_training.place_in(tmp_path / "run")
    path = inside / "predictions" / "validation.parquet"
    table = read_predictions(path)
    alpha = json.loads((inside / "result.json").read_text())["alpha"]
    ids = np.unique(table.filter(np.array(table["set"].to_pylist()) == "id_val")["sample_id"].to_numpy())
    parts = [
        predictions_table(name, alpha, ids, np.zeros(len(ids), int), np.zeros((len(ids), 5), np.float32))
        for name in ("id_val", "sketch")
    ]
    import pyarrow as pa

    write_predictions(path, pa.concat_tables(parts).unify_dictionaries().combine_chunks())
    forging.record(tmp_path / "run")
    assert set(compare(str(here / "run"), str(tmp_path / "run"))["reasons"]) == {"id_val", "sketch", "objective"}


def test_another_version_of_a_library_is_part_of_the_explanation(here, tmp_path):
    shutil.copytree(here / "run", tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["provenance"]["versions"]["numpy"] = "1.0"
    path.write_text(json.dumps(manifest))
    path = short_training.place_in(tmp_path / "run") / "result.json"
    result = json.loads(path.read_text())
    result["environment"]["commit"] = "c0ffee"
    path.write_text(json.dumps(result))
    forging.record(tmp_path / "run")
    found = keys(compare(str(here / "run"), str(tmp_path / "run"))["origin"])
    assert set(found) == {"versions.numpy", "training.commit"}


def test_a_target_is_a_folder_or_a_folder_and_a_trial(tmp_path):
    assert split_target("a/b") == (split_target("a/b")[0], None)
    assert [str(part) for part in split_target("a/b:confirm/x")] == ["a/b", "confirm/x"]
    (tmp_path / "run:1").mkdir()
    assert split_target(f"{tmp_path}/run:1")[1] is None
    for wrong in (":7", "a:"):
        with pytest.raises(UsageError, match="DIR or DIR:TRIAL"):
            split_target(wrong)


def test_wrong_targets_are_refused(here, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'zero_shot'"):
        compare(str(here / "study"), f"{here / 'study'}:zero_shott")
    with pytest.raises(UsageError, match="no such folder"):
        compare(str(here / "run"), str(here / "rum"))
    shutil.copytree(here / "study", tmp_path / "study")
    for path in (tmp_path / "study" / "trials").glob("*/*/result.json"):
        path.unlink()
    with pytest.raises(StorageError, match="must be the file that the study has recorded, but got none"):
        compare(str(here / "run"), str(tmp_path / "study"))


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["carft-ray", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_the_command_shows_both_sides_and_the_json_is_the_whole_answer(here, monkeypatch, capsys):
    assert run(monkeypatch, "compare", here / "run", here / "faster", "--json") == 0
    assert json.loads(capsys.readouterr().out) == compare(str(here / "run"), str(here / "faster"))
    assert run(monkeypatch, "compare", here / "run", here / "faster") == 0
    output = capsys.readouterr()
    for text in (
        "train.learning_rate",
        "A: run:train, alpha",
        "B: faster:train, alpha",
        "ID (id_val)",
        "sketch",
        "A - B, points",
    ):
        assert text in output.out
    assert "over images; one training: seeds not covered" in output.err
    assert f"carft-ray reproduce {here / 'run'}" in output.err
    assert run(monkeypatch, "compare", here / "run", here / "runn") == 2
