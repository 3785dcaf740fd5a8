"""A training of a study done again gives the same numbers, or says why not. The trainings are real and short."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forging
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import short_study
import short_training
from safetensors.torch import load_file, save_file

from carft_ray import cli, environment
from carft_ray.errors import CarftError, DataError, NoSuccessfulTrialError, StorageError, UsageError
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.launch.runs.single import train_once
from carft_ray.recipe.loading import load_recipe
from carft_ray.recipe.schema.recipe import single
from carft_ray.results.reading.finished import open_finished
from carft_ray.results.reproduce import reproduce, sentence, table_differences
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_confirm, recover_running

pytestmark = pytest.mark.slow


def quiet(*words):
    del words


def again(folder, trial=None, out=None):
    finished = open_finished(folder, trial)
    return reproduce(finished, out or folder.with_name("again"), quiet, quiet, quiet)


def run(monkeypatch, *words):
    """Runs a command; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["carft-ray", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Model, images, a study of two trials and two baselines, and a training of ``train``."""
    here = tmp_path_factory.mktemp("original")
    overrides = [
        f"data.cache_dir={here / 'cache'}",
        "train.epochs=2",
        "search.baselines={fine_tuning: {kl_weight: 0}, longer: {epochs: 3}}",
    ]
    recipe = load_recipe(short_training.make(here), overrides)
    short_study.search(here / "study", recipe)
    train_once(recipe, here / "run", False, "", quiet, quiet, quiet)
    return here


@pytest.fixture
def here(original, tmp_path):
    """A copy at the same age of every file; the study still names the images of the original."""
    for name in ("study", "run"):
        shutil.copytree(original / name, tmp_path / name, copy_function=shutil.copy2)
    return tmp_path


@pytest.mark.parametrize("trial", [None, "0", "t0001", "fine_tuning", "longer", "zero_shot"])
def test_every_training_of_a_study_is_reproduced(here, trial):
    found = again(here / "study", trial)
    assert found["differences"] == []
    assert found["changes"] == []
    assert found["weights_compared"] == (trial != "zero_shot")
    assert "the same, bit for bit" in sentence(found)


def test_a_training_of_train_is_reproduced(here):
    found = again(here / "run")
    assert found["same"]
    assert found["num_predictions"] == len(
        read_predictions(short_training.place_in(here / "run") / "predictions" / "validation.parquet")
    )


def test_a_confirmation_is_reproduced_by_the_name_of_its_folder(here, original):
    """It is a training like a trial, with a seed of its own."""
    name = next((here / "study" / "trials").iterdir()).name
    recipe = load_recipe(original / "study" / "resolved.yaml", ["train.seed=5"])
    train_once(recipe, here / "seed5", False, "", quiet, quiet, quiet)
    with open_study(here / "study", load_recipe(original / "study" / "resolved.yaml")) as study:
        recover_confirm(study, {f"{name}-seed5": {}})
        spec = study.next()
        shutil.copytree(short_training.place_in(here / "seed5"), spec.place(study.study_dir))
        study.settle(spec)
    assert again(here / "study", f"confirm/{name}-seed5")["same"]
    with pytest.raises(UsageError, match=f"did you mean 'confirm/{name}-seed5'"):
        open_finished(here / "study", f"confirm/{name}-seed6")


def test_the_new_training_can_be_kept_and_is_one_like_any_other(here):
    again(here / "study", "0", here / "kept")
    assert again(here / "kept", None, here / "twice")["same"]


@pytest.fixture
def flipped(original):
    """One bit of one PNG is flipped; size and date stay. Mended afterwards."""
    path = original / "images" / "sketch" / "heart" / "1.png"
    kept, times = path.read_bytes(), path.stat()
    changed = bytearray(kept)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    yield path
    path.write_bytes(kept)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_one_flipped_bit_behind_the_same_size_and_date_names_the_set(here, flipped, monkeypatch, capsys):
    assert run(monkeypatch, "reproduce", here / "study", "t0000") == DataError.exit_code == 4
    text = capsys.readouterr().err
    assert "data.ood_val.sketch: the contents of this set must be those of the manifest" in text
    assert "data.id_val" not in text
    assert not (here / "again").exists()


def test_other_weights_are_named_and_nothing_is_left_behind(here, original):
    path = original / "model" / "open_clip_model.safetensors"
    kept = path.read_bytes()
    state = load_file(path)
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, path)
    try:
        with pytest.raises(DataError, match="model: the weights must be as in the manifest"):
            again(here / "study", "0")
    finally:
        path.write_bytes(kept)
    assert not (here / "again").exists()


def change_result(study_dir, trial, change):
    path = next((study_dir / "trials").glob(f"{trial}*")) / "attempt-1" / "result.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))
    forging.record(study_dir)


def test_another_number_ends_with_the_largest_difference_and_no_explanation(here, monkeypatch, capsys):
    def change(result):
        result["metrics"]["accuracy/sketch"] += 0.25
        result["objective"] += 0.001

    change_result(here / "study", "t0000", change)
    assert run(monkeypatch, "reproduce", here / "study", "t0000", "--json") == CarftError.exit_code == 1
    output = capsys.readouterr()
    assert "2 that differ (objective, metrics.accuracy/sketch); the largest difference is that of" in output.err
    assert "Data, weights, code, versions and hardware are those of the manifest" in output.err
    found = json.loads(output.out)
    assert found["same"] is False
    assert {each["what"]: round(each["size"], 6) for each in found["differences"]} == {
        "metrics.accuracy/sketch": 0.25,
        "objective": 0.001,
    }


def test_a_gpu_repeats_a_training_within_rounding(here, monkeypatch, capsys):
    """Where it is not deterministic; the training is one that a CPU has made, under another name."""

    def change(result):
        result["environment"]["device"] = "NVIDIA H100 80GB HBM3"
        result["objective"] += 0.001

    change_result(here / "study", "t0000", change)
    assert run(monkeypatch, "reproduce", here / "study", "t0000", "--json") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["tolerance"] == 0.01
    assert "report it" not in output.err
    found = again(here / "study", "0")
    assert "is reproduced within rounding" in sentence(found)
    assert "bit for bit" in sentence(found)  # by which key
    change_result(here / "study", "t0000", lambda result: result.update(objective=result["objective"] + 0.25))
    assert run(monkeypatch, "reproduce", here / "study", "t0000") == CarftError.exit_code
    text = capsys.readouterr().err
    assert "its numbers must differ by at most 0.01, but got 1 that differ (objective)" in text
    assert "train.deterministic: true" in text
    assert "report it" not in text


def test_a_difference_is_explained_by_what_the_manifest_says_otherwise(here, monkeypatch, capsys):
    change_result(here / "study", "t0000", lambda result: result.update(objective=0.1))
    then = environment.versions()
    monkeypatch.setattr(environment, "versions", lambda: {**then, "numpy": "99.0"})
    monkeypatch.setattr(environment, "hardware", lambda: {"platform": "here", "cpu": "fast", "cores": 99})
    assert run(monkeypatch, "reproduce", here / "study", "t0000") == 1
    text = capsys.readouterr().err
    assert f"versions.numpy: {then['numpy']} then, 99.0 now" in text
    assert "hardware.cores" in text


def test_changes_are_told_even_when_the_numbers_agree(here, monkeypatch, capsys):
    then = environment.versions()
    monkeypatch.setattr(environment, "versions", lambda: {**then, "ray": "99.0"})
    assert run(monkeypatch, "reproduce", here / "run", "--out", here / "kept") == 0
    output = capsys.readouterr()
    assert output.out.startswith("run:train is reproduced: ")
    assert f"versions.ray: {then['ray']} then, 99.0 now" in output.err
    assert (short_training.place_in(here / "kept") / "result.json").exists()


def test_a_prediction_that_differs_in_the_last_bit_is_found(here):
    path = next((here / "study" / "trials").glob("t0000*")) / "attempt-1" / "predictions" / "validation.parquet"
    table = pq.read_table(path)
    values = table["nll"].to_numpy().copy()
    values[3] = np.nextafter(values[3], np.inf)
    index = table.schema.get_field_index("nll")
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(values)), path)
    forging.record(here / "study")
    found = again(here / "study", "0")
    assert [each["what"] for each in found["differences"]] == [f"predictions.nll (1 of {len(values)} rows)"]
    assert 0 < found["differences"][0]["size"] < 1e-5


def test_tables_of_other_rows_or_columns_are_no_columns_to_compare():
    table = pa.table({"a": [1, 2], "b": [1.0, 2.0]})
    assert table_differences(table, table) == []
    assert table_differences(table, table.slice(1))[0]["then"] == "2 rows"
    assert table_differences(table, table.select(["a"]))[0]["now"] == "a"
    other = pa.table({"a": [1, 3], "b": [1.25, 2.5]})
    assert [(each["what"], each["now"], each["size"]) for each in table_differences(table, other)] == [
        ("predictions.a (1 of 2 rows)", "3", None),
        ("predictions.b (2 of 2 rows)", "2.5", 0.5),
    ]


def test_wrong_targets_are_refused_with_the_nearest(here, tmp_path):
    name = next((here / "study" / "trials").glob("t0001*")).name
    with pytest.raises(UsageError, match=f"did you mean {name!r}"):
        open_finished(here / "study", name[:-1] + "x")
    with pytest.raises(UsageError, match="did you mean 'fine_tuning'"):
        open_finished(here / "study", "fine_tunning")
    with pytest.raises(UsageError, match="number or name of a trial or baseline"):
        open_finished(here / "run", "1")
    with pytest.raises(UsageError, match="no such folder"):
        open_finished(here / "studi")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="must be a study or the folder of a training"):
        open_finished(tmp_path / "other")


def test_an_unfinished_trial_is_refused_with_the_command_that_goes_on(here):
    recipe = load_recipe(here / "study" / "resolved.yaml", ["search.trials=3"])
    with open_study(here / "study", recipe) as study:
        recover_running(study)
        assert study.next().number == 2
    with pytest.raises(NoSuccessfulTrialError, match="carft-ray resume"):
        open_finished(here / "study", "2")
    with open_study(here / "begun", single(recipe)) as study:
        study.enter("trial", {"train": {}})
    with pytest.raises(NoSuccessfulTrialError, match="--resume"):
        open_finished(here / "begun")


@pytest.mark.parametrize("name", ["manifest.json", "result.json", "validation.parquet"])
def test_a_damaged_file_of_a_study_is_named(here, name):
    path = next(here.glob("run/**/" + name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StorageError, match=name):
        again(here / "run")


def test_the_new_folder_must_be_new(here):
    with pytest.raises(UsageError, match="--out"):
        again(here / "study", "0", here / "run")
    with pytest.raises(UsageError, match="--out"):
        again(here / "study", "zero_shot", here / "run")


@pytest.mark.whole
def test_a_trial_of_a_real_search_is_reproduced(tmp_path):
    """Trained in a process of Ray with threads of its own; done again in that of the command."""
    settings = [f"data.cache_dir={tmp_path / 'cache'}", "search.trials=1"]
    recipe = short_training.make(tmp_path)
    words = [word for setting in settings for word in ("--set", setting)]
    for command in (
        ["search", recipe, *words, "--study", tmp_path / "study"],
        ["reproduce", tmp_path / "study", "0"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "carft_ray.cli", *map(str, command)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    assert "the same, bit for bit" in done.stdout
