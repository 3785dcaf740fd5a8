"""Where numbers come from, and whether they come again: trainings done again or compared."""

import json
import math
import os
import shutil
import subprocess

import forging
import numpy as np
import pyarrow as pa
import pytest
import short_sealed
import short_study
import short_training
from logs import change, holding, kept
from scipy import stats
from sources import folder_source
from study_steps import searching

from carft_ray import environment
from carft_ray.data.same_as_study import differences_of
from carft_ray.data.source import set_digest
from carft_ray.errors import CarftError, DataError, NoSuccessfulTrialError, UsageError
from carft_ray.evaluation.predictions import correct, read_predictions, write_predictions
from carft_ray.launch.command import Plan, train_once
from carft_ray.layout import PREDICTIONS
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.compare_trainings import compare
from carft_ray.results.reading.finished import open_finished, split_target
from carft_ray.results.reproduce import columns, differing, reproduce, sentence
from carft_ray.results.statistics.intervals import OVER_IMAGES
from carft_ray.store.log import log_of
from carft_ray.study.provenance import record_provenance
from carft_ray.study.recipe_identity import claim
from carft_ray.study.snapshot import snapshot
from carft_ray.training.shared_inputs import load_shared_inputs

pytestmark = pytest.mark.slow
QUIET = 2 * [lambda word: None]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Model and images, and a study of two trials and two baselines."""
    return short_sealed.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def trained(original, tmp_path_factory):
    """A training of ``train`` on the same images."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = load_recipe(original / "recipe.yaml", [f"data.cache_dir={original / 'cache'}", "train.epochs=2"])
    train_once(Plan(recipe, folder))
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
        ("model/open_clip_model.safetensors", "model: the weights must be as in the study"),
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
    assert "Data, weights, code, versions and hardware are those of the study" in err
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
    assert "are the same, within rounding (0.01)" in sentence(found)
    change_result(here / "study", lambda result: result.update(objective=result["objective"] + 0.25))
    code, _, err = run("reproduce", here / "study", "t0000")
    assert code == CarftError.exit_code
    told = (
        "its numbers must differ by at most 0.01 without train.deterministic: true, but got 1 that differ (objective)"
    )
    assert told in err


@pytest.mark.parametrize("is_same", [True, False])
def test_what_the_study_says_otherwise_is_told_and_explains_a_difference(here, monkeypatch, run, is_same):
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
    assert [each["what"] for each in found["differences"]] == [f"predictions.nll (1 of {len(values)} values)"]
    assert 0 < found["differences"][0]["size"] < 1e-5


def test_all_that_differs_is_named_with_the_largest_difference():
    table = pa.table({"name": ["a", "b"], "label": [1, 2], "nll": [0.5, 0.25]})
    assert differing(columns(table), columns(table)) == []
    assert [each["what"] for each in differing(columns(table), columns(table.slice(1)))] == [*columns(table)]
    other = pa.table({"name": ["a", "c"], "label": [1, 3], "nll": [0.5, math.nan]})
    found = differing(columns(table), columns(other))
    sizes = {each["what"].removesuffix(" (1 of 2 values)"): each["size"] for each in found}
    assert sizes == {
        "predictions.name": None,
        "predictions.label": None,
        "predictions.nll": pytest.approx(math.nan, nan_ok=True),
    }
    then, now = {"objective": 0.5, "alpha": 1.0}, {"objective": 0.505, "id": 0.75}
    assert differing(then, now, 0.01) == [
        {"what": "alpha", "then": 1.0, "now": None, "size": None},
        {"what": "id", "then": None, "now": 0.75, "size": None},
    ]


def test_wrong_targets_are_refused_with_the_nearest(here):
    row = snapshot(here / "study").trials[0]
    short_sealed.confirm(here / "study", {f"{row.name}-seed5": {**row.values, "seed": 5}})
    assert open_finished(here / "study", f"confirm/{row.name}-seed5").name.endswith(f"confirm/{row.name}-seed5")
    for folder, trial, told in (
        ("study", "plane", "did you mean 'plain'"),
        ("study", f"confirm/{row.name}-seed6", f"did you mean 'confirm/{row.name}-seed5'"),
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


def row(found, what):
    return next(each for each in found["rows"] if each["what"] == what)


def keys(rows):
    return {each["key"] for each in rows}


def test_a_study_stands_for_its_best_trial_and_differences_are_those_of_the_metrics(here):
    study = here / "study"
    best = snapshot(study).best
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
    assert keys(compare(str(study), f"{study}:zero_shot")["origin"]) <= {"training.threads"}
    same = compare(str(here / "run"), str(here / "run"))
    assert same["recipe"] == same["origin"] == []
    assert all(each["low"] < each["difference"] == 0 < each["high"] for each in same["rows"])  # these few images only


def test_the_interval_is_that_of_the_paired_differences_of_the_images(here, trained):
    """Student's interval of the mean of d_k = a_k - b_k, with a NumPy sum; half of the other's answers are right."""
    table = read_predictions(short_training.place_in(trained) / PREDICTIONS)
    labels = table["label"].to_numpy()
    change_column(here / "run", "prediction", labels + np.arange(len(table)) % 2)
    found = row(compare(str(trained), str(here / "run")), "id_accuracy")
    alpha = json.loads((short_training.place_in(trained) / "result.json").read_text())["alpha"]
    tables = [read_predictions(short_training.place_in(folder) / PREDICTIONS) for folder in (trained, here / "run")]
    d = -np.diff([correct(each, "id_val", alpha).astype(float) for each in tables], axis=0)[0]
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    assert (found["low"], found["high"]) == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-12)
    change_column(here / "run", "label", (labels + 1) % 5)  # the same images with other labels are not compared
    assert set(compare(str(trained), str(here / "run"))["reasons"]) == {"id_val", "sketch", "objective"}


def test_a_target_is_a_folder_or_a_folder_and_a_trial(here):
    assert split_target("a/b") == ("a/b", None)
    assert split_target("a/b:confirm/x") == ("a/b", "confirm/x")
    (here / "run:1").mkdir()
    assert split_target(f"{here}/run:1")[1] is None
    for wrong in (":7", "a:"):
        with pytest.raises(UsageError, match="DIR or DIR:TRIAL"):
            split_target(wrong)


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

    def other(provenance):
        if "data" in provenance:
            provenance["data"]["sketch"]["digest"] = "0" * 64
        provenance["versions"]["numpy"] = "1.0"

    def leave_out(recipe):
        recipe["data"]["ood_val"] = {}
        recipe["search"]["objective"]["id_weight"] = 0.25

    change(here / "run", "provenance", other)
    found = compare(str(trained), str(here / "run"))
    assert keys(found["origin"]) == {"data.sketch.digest", "versions.numpy"}
    assert "the contents of the images differ" in found["reasons"]["sketch"]
    assert found["reasons"]["objective"] == "it needs all its sets, and sketch cannot be compared"
    assert row(found, "accuracy/sketch")["difference"] is row(found, "ood_accuracy")["difference"] is None
    assert row(found, "id_accuracy")["difference"] == 0
    change(here / "run", "recipe", leave_out)
    found = compare(str(trained), str(here / "run"))
    assert found["reasons"] == {
        "sketch": "only run:train has this set",
        "ood_accuracy": "it is the mean of other sets",
        "objective": "the recipes define it differently",
    }
    assert (row(found, "accuracy/sketch")["b"], row(found, "objective")["difference"]) == (None, None)


def test_a_training_of_a_later_search_is_compared_as_that_search_ran(here, trained):
    def begun_elsewhere(provenance):
        if "data" in provenance:
            here = {key: dict(provenance[key]) for key in ("code", "versions", "hardware")}
            provenance["history"] = [{"at": "2026-01-01T00:00:00+00:00", **here}]
            provenance["versions"] |= {"torch": "1.0", "numpy": "1.0"}

    change(here / "run", "provenance", begun_elsewhere)
    assert compare(str(trained), str(here / "run"))["origin"] == []


def provenance(folder):
    return kept(folder, "provenance")[-1]


def test_a_claimed_folder_says_at_once_what_needs_no_data(original, tmp_path):
    with holding(tmp_path) as log:
        claim(tmp_path, log, load_recipe(original / "study" / "resolved.yaml", ["search.sampler.seed=11"]))
    found = provenance(tmp_path)
    assert found["seeds"] == {"sampler": 11, "train": 0}
    assert found["code"] == environment.code()
    assert found["versions"] == environment.versions()
    assert found["hardware"]["threads"] == 1
    images = {"source": "folder", "path": str(original / "images")}
    test_sets = {"id_test": "photo_test", "ood_test.cartoon": "cartoon", "ood_test.painting": "painting"}
    assert found["test_sets"] == {name: {**images, "domains": [domain]} for name, domain in test_sets.items()}
    assert "data" not in found


@pytest.mark.parametrize("name", ["run", "study"])
def test_after_the_preparation_the_log_says_data_and_model(original, here, name):
    recipe, found = load_recipe(original / "study" / "resolved.yaml"), provenance(here / name)
    expected = {}
    for set_name, domain in (("train", "photo"), ("id_val", "photo_val"), ("sketch", "sketch")):
        source = folder_source(original / "images", (domain,), None, set_name)
        expected[set_name] = {"digest": set_digest(source), "num_images": len(source)}
    assert found["data"] == expected
    assert found["classes"] == found["class_names"] == list(short_training.CLASSES)
    assert found["templates"] == list(recipe.prompts.templates)
    assert found["model"].keys() == {"weights_hash", "config_hash"}
    assert found["model"]["weights_hash"] == load_shared_inputs(recipe).clip.weights_hash
    assert (found["augmentation"]["image_size"], found["augmentation"]["crop_scale"]) == (16, [0.9, 1.0])
    assert found["preparation"] == {"device": "cpu", "threads": environment.usable_cores(), "compile": False}
    assert found["hardware"]["gpus"] == []
    made_on = json.loads(next(here.glob(f"{name}/trials/*/*/result.json")).read_text())["environment"]
    assert made_on["source"] == environment.source_digest()
    assert (made_on["device"], made_on["threads"], made_on["num_workers"], made_on["compile"]) == ("cpu", 1, 1, False)


def test_a_later_search_adds_other_versions_to_the_history_and_keeps_the_first(here, monkeypatch):
    study_dir, recipe = here / "study", load_recipe(here / "study" / "resolved.yaml")
    first = provenance(study_dir)
    record_provenance(study_dir, log_of(study_dir), recipe, None)  # without findings
    short_study.search(study_dir, recipe, num_attempts=0)
    assert provenance(study_dir) == first
    for number, version in enumerate(("9.8", "9.8", "9.9"), start=1):
        monkeypatch.setattr(environment, "versions", lambda version=version: {**first["versions"], "torch": version})
        short_study.search(study_dir, recipe, num_attempts=0)
        history = provenance(study_dir)["history"]
        assert [entry["versions"]["torch"] for entry in history] == ["9.8", "9.9"][: max(1, number - 1)]
    now = provenance(study_dir)
    now.pop("history")
    assert now == first


def test_a_study_does_not_go_on_where_names_views_or_what_auto_means_are_others():
    """Labels that are numbers have the names of their classes from elsewhere: the contents of the sets do not tell."""
    known = {"data": {}, "model": {"weights_hash": "ab"}}
    known |= {"classes": ["cat", "dog"], "augmentation": {"view_version": 1}, "preparation": {"compile": True}}
    assert differences_of(known, dict(known)) == []
    for part, now, told in (
        ("model", {"weights_hash": "cd"}, 'model: the weights must be as in the study, "ab", but got "cd"'),
        ("classes", ["dog", "cat"], "data.classes: the classes must be as in the study, hash "),
        ("augmentation", {"view_version": 2}, "code: the training views must be as in the study, 1, but got 2"),
        ("preparation", {"compile": False}, "train.compile: the meaning of auto must be as in the study, true, but"),
    ):
        (problem,) = differences_of(known, {**known, part: now})
        assert str(problem).startswith(told)
    assert differences_of({"data": {}, "model": 1}, {"data": {}}) == []  # of a test set, which has no views


def test_images_may_move_or_be_touched_and_are_no_others(original, tmp_path):
    study_dir = short_sealed.copy(original, tmp_path)
    recipe = (study_dir / "resolved.yaml").read_text()
    before, prepared = provenance(study_dir), (study_dir / "prepared" / "prepared.json").read_bytes()
    os.utime(tmp_path / "images" / "photo" / "star" / "0.png")
    shutil.copytree(tmp_path / "images", tmp_path / "another")

    def among(images, cache):
        """The recipe with another cache: a process keeps what it has loaded for one, and this must look again."""
        (tmp_path / "moved.yaml").write_text(recipe.replace(f"{tmp_path}/images", f"{tmp_path}/{images}"))
        return load_recipe(tmp_path / "moved.yaml", [f"data.cache_dir={tmp_path / cache}"])

    short_study.search(study_dir, among("images", "cache3"), num_attempts=0)
    assert (study_dir / "prepared" / "prepared.json").read_bytes() != prepared
    assert provenance(study_dir) == before
    short_study.search(study_dir, among("another", "cache4"), num_attempts=0)
    assert kept(study_dir, "recipe")[-1]["data"]["train"]["path"] == str(tmp_path / "another")
    short_training.write_image(tmp_path / "another" / "photo_val" / "star" / "0.png", 4, 12345)
    with pytest.raises(DataError, match=r"data\.id_val: the contents"):
        short_study.search(study_dir, among("another", "cache5"))


def test_git_state_tells_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.git_state(package) == (None, None)
    git("init")
    assert environment.git_state(package) == (None, None)  # not tracked: an installation inside somebody's checkout
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = environment.git_state(package)
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "notes.txt").write_text("beside the package")
    assert environment.git_state(package) == (commit, False)
    (package / "more.py").write_text("")
    assert environment.git_state(package) == (commit, True)
    monkeypatch.setenv("PATH", "")  # where there is no git
    assert environment.git_state(package) == (None, None)


def test_the_digest_of_the_code_changes_with_every_file(tmp_path):
    digests = [environment.source_digest(tmp_path)]
    for name, text in (("a.py", ""), ("b/c.py", "1"), ("b/c.py", "2"), ("b/d.py", "2")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        digests.append(environment.source_digest(tmp_path))
    (tmp_path / "readme.md").write_text("")
    assert environment.source_digest(tmp_path) == digests[-1]
    assert len(set(digests)) == 5
