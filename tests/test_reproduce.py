"""Two trainings side by side: one done again gives the same numbers or says why not, and any two are compared."""

import json
import os
import shutil

import forging
import numpy as np
import pyarrow as pa
import pytest
import short_sealed
import short_training
from study_steps import searching

from carft_ray import environment
from carft_ray.errors import CarftError, DataError, NoSuccessfulTrialError, UsageError
from carft_ray.evaluation.predictions import correct, read_predictions, write_predictions
from carft_ray.launch.runs.single import train_once
from carft_ray.layout import PREDICTIONS
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import single
from carft_ray.results.compare import compare
from carft_ray.results.reading.finished import open_finished, split_target
from carft_ray.results.reproduce import reproduce, sentence, table_differences
from carft_ray.results.statistics.intervals import OVER_IMAGES
from carft_ray.study.opening import open_study
from carft_ray.study.rows import trials

pytestmark = pytest.mark.slow
QUIET = 3 * [lambda *words: None]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Model and images, and a study of two trials and two baselines."""
    return short_sealed.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """A training of ``train`` on the same images."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = load_recipe(original / "recipe.yaml", [f"data.cache_dir={original / 'cache'}", "train.epochs=2"])
    train_once(recipe, folder, False, "", *QUIET)
    return folder


@pytest.fixture
def here(original, trained, tmp_path):
    """Copies at the same age of every file; they still name the images of the original."""
    shutil.copytree(original / "study", tmp_path / "study", copy_function=shutil.copy2)
    shutil.copytree(trained, tmp_path / "run", copy_function=shutil.copy2)
    return tmp_path


def again(folder, trial=None, out=None):
    return reproduce(open_finished(folder, trial), out or folder.with_name("again"), *QUIET)


@pytest.mark.parametrize(
    ("folder", "trial"), [("study", None), ("study", "plain"), ("study", "zero_shot"), ("run", None)]
)
def test_every_training_is_reproduced(here, folder, trial):
    found = again(here / folder, trial)
    assert found["differences"] == found["changes"] == []
    assert found["weights_compared"] == (trial != "zero_shot")
    assert "the same, bit for bit" in sentence(found)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("images/sketch/heart/1.png", "data.ood_val.sketch: the contents of this set must be those of the"),
        ("model/open_clip_model.safetensors", "model: the weights must be as in the manifest"),
    ],
)
def test_other_images_or_weights_are_named_and_nothing_is_left_behind(here, original, run, path, told):
    """One bit is another; size and date are those of before."""
    study, times = short_sealed.copy(original, here / "own"), (original / path).stat()
    content = bytearray((here / "own" / path).read_bytes())
    content[len(content) // 2] ^= 1
    (here / "own" / path).write_bytes(content)
    os.utime(here / "own" / path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, _, err = run("reproduce", study, "t0000", "--out", here / "again")
    assert code == DataError.exit_code == 4
    assert told in err
    assert "data.id_val" not in err
    assert not (here / "again").exists()


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_result(study_dir, change):
    """Changes the stored result of the first trial."""
    change_json(next(study_dir.glob("trials/t0000*/attempt-1/result.json")), change)
    forging.record(study_dir)


def change_column(folder, name, values):
    """Changes the stored predictions of a training of ``train``."""
    path = short_training.place_in(folder) / PREDICTIONS
    table = read_predictions(path)
    index = table.schema.get_field_index(name)
    column = pa.array(values, table.schema.field(index).type)
    write_predictions(path, table.set_column(index, table.schema.field(index), column))
    forging.record(folder)


def test_another_number_ends_with_the_largest_difference_and_no_explanation(here, run):
    def change(result):
        result["metrics"]["accuracy/sketch"] += 0.25
        result["objective"] += 0.001

    change_result(here / "study", change)
    code, out, err = run("reproduce", here / "study", "t0000", "--json")
    assert code == CarftError.exit_code == 1
    assert "2 that differ (objective, metrics.accuracy/sketch); the largest difference is that of" in err
    assert "Data, weights, code, versions and hardware are those of the manifest" in err
    found = json.loads(out)
    sizes = {each["what"]: round(each["size"], 6) for each in found["differences"]}
    assert (found["same"], sizes) == (False, {"metrics.accuracy/sketch": 0.25, "objective": 0.001})


def test_a_gpu_repeats_a_training_within_rounding(here, run):
    """Where it is not deterministic; the training is one that a CPU has made, under another name."""

    def change(result):
        result["environment"]["device"] = "NVIDIA H100 80GB HBM3"
        result["objective"] += 0.001

    change_result(here / "study", change)
    code, out, _ = run("reproduce", here / "study", "t0000", "--json")
    found = json.loads(out)
    assert (code, found["same"], found["tolerance"]) == (0, True, 0.01)
    assert "is reproduced within rounding" in sentence(found)
    change_result(here / "study", lambda result: result.update(objective=result["objective"] + 0.25))
    code, _, err = run("reproduce", here / "study", "t0000")
    assert code == CarftError.exit_code
    assert "its numbers must differ by at most 0.01, but got 1 that differ (objective)" in err
    assert "train.deterministic: true" in err


@pytest.mark.parametrize("is_same", [True, False])
def test_what_the_manifest_says_otherwise_is_told_and_explains_a_difference(here, monkeypatch, run, is_same):
    if not is_same:
        change_result(here / "study", lambda result: result.update(objective=0.1))
    then = environment.versions()
    monkeypatch.setattr(environment, "versions", lambda: {**then, "numpy": "99.0"})
    monkeypatch.setattr(environment, "hardware", lambda: {"platform": "here", "cpu": "fast", "cores": 99})
    code, out, err = run("reproduce", here / "study", "t0000", "--out", here / "kept")
    assert code == (0 if is_same else 1)
    assert ("is reproduced: " in out) == is_same
    assert f"versions.numpy: {then['numpy']} then, 99.0 now" in err
    assert "hardware.cores" in err
    assert (short_training.place_in(here / "kept") / "result.json").exists()


def test_a_prediction_that_differs_in_the_last_bit_is_found(here):
    table = read_predictions(short_training.place_in(here / "run") / PREDICTIONS)
    values = table["nll"].to_numpy().copy()
    values[3] = np.nextafter(values[3], np.inf)
    change_column(here / "run", "nll", values)
    found = again(here / "run")
    assert [each["what"] for each in found["differences"]] == [f"predictions.nll (1 of {len(values)} rows)"]
    assert 0 < found["differences"][0]["size"] < 1e-5
    assert table_differences(table, table.slice(1))[0]["now"] == f"{len(table) - 1} rows"
    assert table_differences(table, table.select(["nll"]))[0]["now"] == "nll"
    assert table_differences(pa.table({"a": [1, 2]}), pa.table({"a": [1, 3]}))[0]["size"] is None


def test_wrong_targets_are_refused_with_the_nearest(here):
    row = trials(here / "study")[0]
    short_sealed.confirm(here / "study", {f"{row.name}-seed5": {**row.values, "seed": 5}})
    assert open_finished(here / "study", f"confirm/{row.name}-seed5").name.endswith(f"confirm/{row.name}-seed5")
    for folder, trial, told in (
        ("study", "plane", "did you mean 'plain'"),
        ("study", f"confirm/{row.name}-seed6", f"did you mean 'confirm/{row.name}-seed5'"),
        ("run", "1", "number or name of a trial or baseline"),
        ("studi", None, "no such folder"),
        ("", None, "must be a study or the folder of a training"),
    ):
        with pytest.raises(UsageError, match=told):
            open_finished(here / folder, trial)
    for trial in ("0", "zero_shot"):
        with pytest.raises(UsageError, match="--out"):
            again(here / "study", trial, here / "run")


def test_an_unfinished_trial_is_refused_with_the_command_that_goes_on(here):
    recipe = load_recipe(here / "study" / "resolved.yaml", ["search.trials=3"])
    with searching(here / "study", recipe) as study:
        assert study.next().number == 2
    with pytest.raises(NoSuccessfulTrialError, match="carft-ray resume"):
        open_finished(here / "study", "2")
    with open_study(here / "begun", single(recipe)) as study:
        study.enter("trial", {"train": {}})
    with pytest.raises(NoSuccessfulTrialError, match="--resume"):
        open_finished(here / "begun")


# two trainings compared


def row(found, what):
    return next(each for each in found["rows"] if each["what"] == what)


def keys(rows):
    return {each["key"] for each in rows}


def test_a_study_stands_for_its_best_trial_and_differences_are_those_of_the_metrics(here):
    study = here / "study"
    best = max(trials(study), key=lambda row: row.objective)
    found = compare(str(study), f"{study}:plain")
    assert (found["a"]["trial"], found["b"]["trial"]) == (best.name, "plain")
    assert row(found, "objective")["a"] == best.objective
    assert keys(found["recipe"]) == {"train.kl_weight", "train.learning_rate"}
    assert found["origin"] == []
    assert [each["what"] for each in found["rows"]] == ["objective", "id_accuracy", "ood_accuracy", "accuracy/sketch"]
    for each in found["rows"]:
        assert each["difference"] == pytest.approx(each["a"] - each["b"], abs=1e-12)
        assert each["low"] <= each["difference"] <= each["high"]
    assert found["words"] == OVER_IMAGES
    assert compare(str(study), f"{study}:zero_shot")["b"]["alpha"] == 0.0
    same = compare(str(here / "run"), str(here / "run"))
    assert same["recipe"] == same["origin"] == []
    assert all(each["low"] < each["difference"] == 0 < each["high"] for each in same["rows"])  # these few images only


def test_the_interval_is_that_of_the_paired_differences_of_the_images(here, trained):
    """The normal interval of the mean of d_k = a_k - b_k, with a NumPy sum; half of the other's answers are right."""
    table = read_predictions(short_training.place_in(trained) / PREDICTIONS)
    labels = table["label"].to_numpy()
    change_column(here / "run", "prediction", labels + np.arange(len(table)) % 2)
    found = row(compare(str(trained), str(here / "run")), "id_accuracy")
    alpha = json.loads((short_training.place_in(trained) / "result.json").read_text())["alpha"]
    tables = [read_predictions(short_training.place_in(folder) / PREDICTIONS) for folder in (trained, here / "run")]
    d = -np.diff([correct(each, "id_val", alpha).astype(float) for each in tables], axis=0)[0]
    half = 1.959963984540054 * d.std(ddof=1) / np.sqrt(len(d))
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-12)
    change_column(here / "run", "label", (labels + 1) % 5)  # the same images with other labels are not compared
    assert set(compare(str(trained), str(here / "run"))["reasons"]) == {"id_val", "sketch", "objective"}


def test_a_target_is_a_folder_or_a_folder_and_a_trial(here, run):
    assert split_target("a/b") == ("a/b", None)
    assert split_target("a/b:confirm/x") == ("a/b", "confirm/x")
    (here / "run:1").mkdir()
    assert split_target(f"{here}/run:1")[1] is None
    for wrong in (":7", "a:"):
        with pytest.raises(UsageError, match="DIR or DIR:TRIAL"):
            split_target(wrong)
    assert run("compare", here / "run", here / "runn")[0] == 2


def test_the_command_shows_both_sides_and_the_json_is_the_whole_answer(here, run):
    words = [f"{here / 'study'}:{name}" for name in ("t0000", "plain")]
    assert json.loads(run("compare", *words, "--json")[1]) == compare(*words)
    code, out, err = run("compare", *words)
    assert code == 0
    for text in ("train.learning_rate", "A: study:t0000", ", alpha", "B: study:plain", "ID (id_val)", "A - B, points"):
        assert text in out
    assert "over images; one training: seeds not covered" in err
    assert f"carft-ray reproduce {here / 'study'}" in err


def test_what_was_measured_on_other_images_or_defined_otherwise_is_not_compared(here, trained):
    """Sample ids are those of the names: only the contents tell."""

    def change(manifest):
        manifest["provenance"]["data"]["sketch"]["digest"] = "0" * 64
        manifest["provenance"]["versions"]["numpy"] = "1.0"

    def leave_out(manifest):
        manifest["recipe"]["data"]["ood_val"] = {}
        manifest["recipe"]["search"]["objective"]["id_weight"] = 0.25

    change_json(here / "run" / "manifest.json", change)
    found = compare(str(trained), str(here / "run"))
    assert keys(found["origin"]) == {"data.sketch.digest", "versions.numpy"}
    assert "the contents of the images differ" in found["reasons"]["sketch"]
    assert found["reasons"]["objective"] == "it needs all its sets, and sketch cannot be compared"
    assert row(found, "accuracy/sketch")["difference"] is row(found, "ood_accuracy")["difference"] is None
    assert row(found, "id_accuracy")["difference"] == 0
    change_json(here / "run" / "manifest.json", leave_out)
    found = compare(str(trained), str(here / "run"))
    assert found["reasons"] == {
        "sketch": "only run:train has this set",
        "ood_accuracy": "it is the mean of other sets",
        "objective": "the recipes define it differently",
    }
    assert (row(found, "accuracy/sketch")["b"], row(found, "objective")["difference"]) == (None, None)
