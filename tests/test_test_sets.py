"""`test` opens the seal once: rows, alphas and numbers are those of the study, every read is counted, kills go on."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_host
import numpy as np
import pyarrow.compute as pc
import pytest
import short_sealed
import short_training
import torch
from logs import commits, forget_line, holding

from carft_ray.data.class_names import class_folders
from carft_ray.data.decoded import image_set
from carft_ray.data.listing import sample_id
from carft_ray.data.open_source import open_source
from carft_ray.evaluation.metrics import wilson
from carft_ray.evaluation.predictions import alphas, read_predictions
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.recipe.trial_values import apply
from carft_ray.results.confirm.configurations import PlanRow, Stage, write_plan
from carft_ray.results.confirm.summary import summarise
from carft_ray.results.page.data import page_document
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.reading.trained import open_trained
from carft_ray.results.test_sets import notes
from carft_ray.results.test_sets.summary import read_lines
from carft_ray.results.verdict_card import verdict
from carft_ray.study.ledger import Entry, read_ledger, require_unread
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_confirm, recover_running
from carft_ray.study.rows import baselines, best_row, trials
from carft_ray.training.run import run_training
from carft_ray.training.run_context import RunContext

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SETS = {"id_test": ("photo_test", 15), "cartoon": ("cartoon", 10), "painting": ("painting", 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished study, images, a recipe and a cache."""
    folder = tmp_path_factory.mktemp("sealed")
    short_sealed.make(folder, short_training)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of the study, beside the working directory's other files; no other has read these images."""
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    shutil.copytree(folder / "study", tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def read(folder, tmp_path_factory):
    """A study whose test sets were read once, and the summary."""
    study = tmp_path_factory.mktemp("read") / "study"
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    shutil.copytree(folder / "study", study)
    assert crash_host.call(["test", study, "--json"]) == 0
    return study, json.loads((study / "test" / "summary.json").read_text())


@pytest.fixture
def again(read, here):
    """A copy of that study, in the place of the one that was not read."""
    shutil.rmtree(here / "study")
    shutil.copytree(read[0], here / "study")
    return here / "study"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def right(study, name, domain, alpha):
    """Counts right answers by hand: weights mixed here, images decoded here, one at a time."""
    trained = open_trained(study, name)
    recipe, clip = trained.recipe, trained.inputs.clip
    spec = recipe.data.id_test if domain == "photo_test" else recipe.data.ood_test[domain]
    source = open_source(spec, domain, class_folders(recipe))
    classifier = trained.classifier(0.0)
    zero_shot = {key: tensor.clone() for key, tensor in classifier.state().items()}
    mixed = {
        key: (1 - alpha) * tensor + alpha * trained.fine_tuned[key] if tensor.is_floating_point() else tensor
        for key, tensor in zero_shot.items()
    }
    classifier.load_state_dict(mixed)
    images = image_set(source, clip.to_input, clip.input_key, study.parent / "own_cache")
    with torch.inference_mode():
        logits = [classifier(torch.from_numpy(images.images_NHWC[k : k + 1].copy()))[1] for k in range(len(images))]
    return np.mean([int(row.argmax()) == label for row, label in zip(logits, source.labels, strict=True)])


# what is read


def test_winner_and_every_baseline_are_read_on_all_test_sets_at_their_stored_alphas(read):
    study, summary = read
    best = best_row(trials(study))
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == [best.name, "plain", "zero_shot"] or list(rows) == [best.name, "zero_shot", "plain"]
    assert {name: row["role"] for name, row in rows.items()} == {
        best.name: "winner",
        "plain": "baseline",
        "zero_shot": "baseline",
    }
    stored = {row.name: row.alpha for row in (best, *baselines(study))}
    assert {name: row["alpha"] for name, row in rows.items()} == stored
    assert summary["sets"] == {name: count for name, (_, count) in SETS.items()}
    for name, path in {best.name: f"trials/{best.name}", "plain": "baselines/plain", "zero_shot": "zero_shot"}.items():
        table = read_predictions(study / "test" / "read-1" / f"{path}.parquet")
        assert {alpha for set_name in SETS for alpha in alphas(table, set_name)} == {stored[name]}


def test_the_numbers_are_those_of_the_models_by_hand(read):
    study, summary = read
    for row in summary["rows"]:
        name = "plain" if row["name"] == "zero_shot" else row["name"]  # any training is zero-shot at alpha 0
        found = {set_name: right(study, name, domain, row["alpha"]) for set_name, (domain, _) in SETS.items()}
        told = {set_name: row["sets"][set_name]["mean"] for set_name in SETS}
        assert told == pytest.approx(found)
        ood_mean = (found["cartoon"] + found["painting"]) / 2
        assert row["ood_accuracy"]["mean"] == pytest.approx(ood_mean)
        assert row["objective"]["mean"] == pytest.approx((found["id_test"] + ood_mean) / 2)
        assert row["id_accuracy"]["ends"] == pytest.approx(wilson(round(found["id_test"] * 15), 15))
    assert len({json.dumps(row["sets"]) for row in summary["rows"]}) > 1


def test_differences_are_paired_and_the_baseline_of_the_headline_is_the_best_on_validation(read):
    study, summary = read
    rows = {row["name"]: row for row in summary["rows"]}
    winner = summary["rows"][0]["name"]
    validation = {row.name: row.objective for row in baselines(study)}
    means = {name: row["objective"]["mean"] for name, row in rows.items()}
    assert {each["other"] for each in summary["baselines"]} == {"plain", "zero_shot"}
    for each in summary["baselines"]:
        assert each["objective"]["mean"] == pytest.approx(means[winner] - means[each["other"]])
        low, high = each["objective"]["ends"]
        assert (each["p"] < 0.05) == (low > 0 or high < 0)
        assert each["sets"].keys() == SETS.keys()
        assert each["objective"]["over"] == "over images; one training: seeds not covered"
    table = {name: row["validation_objective"] for name, row in rows.items()}
    assert table["zero_shot"] == pytest.approx(validation["zero_shot"])
    assert table["plain"] == pytest.approx(validation["plain"])
    assert summary["headline_baseline"] == max(("plain", "zero_shot"), key=table.get)
    text = "\n".join(read_lines(summary))
    assert summary["headline"] in text
    assert "OOD mean: over cartoon (10), painting (20)." in text
    assert "id_test (15 images)" in text


def test_nothing_changes_but_test_log_and_manifest_and_no_trial(folder, read):
    study, _ = read
    before, after = contents(folder / "study"), contents(study)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith(("test/", "log/"))} == {"manifest.json"}
    assert not {name for name in changed & before.keys() if name.startswith("log/")}
    added = commits(study)[len(commits(folder / "study")) :]
    assert [record["kind"] for commit in added for record in commit["records"]] == ["owner", "ledger", "released"]
    assert not [commit for commit in added if commit["operations"]]
    assert trials(study) == trials(folder / "study")
    assert baselines(study) == baselines(folder / "study")
    assert not list(study.rglob("*.tmp"))


# how often


def test_the_first_read_works_and_ends_with_a_table_and_the_next_command(run, here):
    code, out, err = run("test", "study")
    assert code == 0, err
    winner = best_row(trials(here / "study")).name
    assert re.search(rf"^{winner} .*winner", out, re.M)
    assert out.startswith("test sets, %")
    assert "OOD mean" in out
    assert "1/3 zero_shot" in err
    assert "Next:" in err
    assert "Test read 1" in err
    [entry] = read_ledger(here / "study")
    assert (entry.purpose, entry.sets, entry.reason) == ("test", ("id_test", "cartoon", "painting"), "")


def test_a_second_read_is_refused_and_says_when_and_by_whom(run, again):
    [entry] = read_ledger(again)
    before = contents(again)
    code, out, err = run("test", "study")
    assert (code, out) == (8, "")
    assert f"{entry.time} by {entry.user} (line 1 of the ledger)" in err
    assert "--again REASON" in err
    assert {name: text for name, text in contents(again).items() if name != "lock"} == {
        name: text for name, text in before.items() if name != "lock"
    }


def test_again_reads_once_more_and_is_counted(run, again, read):
    code, out, err = run("test", "study", "--again", "a reviewer asked", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["read"], summary["reason"], summary["ledger_line"]) == (2, "a reviewer asked", 2)
    assert summary["rows"] == read[1]["rows"]
    assert any(line.startswith("Test read 2") and "reason: a reviewer asked" in line for line in read_lines(summary))
    assert summary.pop("study") == str(again)
    assert json.loads((again / "test" / "summary.json").read_text()) == summary
    assert json.loads((again / "test" / "read-1" / "summary.json").read_text()) == read[1]
    assert [entry.reason for entry in read_ledger(again)] == ["", "a reviewer asked"]


def test_an_empty_reason_is_a_usage_error(run, again):
    assert run("test", "study", "--again", " ")[0] == 2


def test_a_removed_line_is_told_and_stops_the_next_read(run, again):
    forget_line(again, 1)
    code, _, err = run("test", "study", "--again", "why not")
    assert code == 8
    assert "must have the ledger of which manifest.json tells" in err


# other studies of the same images


def test_a_new_study_of_the_same_images_is_told_who_has_read_them(run, here, folder):
    """Whatever its folder and its images' names: what counts is their bytes. Nothing is refused for it."""
    assert run("test", "study", "--json")[0] == 0
    recipe = load_recipe(here / "study" / "resolved.yaml")
    images = here / "moved"
    shutil.copytree(folder / "images", images)
    for path in images.glob("cartoon/*/*.png"):
        path.rename(path.with_name(f"renamed_{path.name}"))
    short_sealed.search(
        here / "again",
        load_recipe(
            here / "study" / "resolved.yaml",
            [
                "data.id_test.path=" + str(images),
                "data.ood_test.cartoon.path=" + str(images),
                "data.ood_test.painting=null",
                f"data.train.path={images}",
                f"data.id_val.path={images}",
                *(f"data.ood_val.{name}.path={images}" for name in recipe.data.ood_val),
            ],
        ),
    )
    code, _, err = run("test", "again")
    assert code == 0, err
    told, words = "Other studies have read these very images, too, once:", " ".join(err.split())
    assert words.index(told) < words.index("1/3")  # before the first image is opened
    assert words.count(told) == 2  # and with the numbers
    assert f"{told} {here / 'study'} (" in words
    summary = json.loads((here / "again" / "test" / "summary.json").read_text())
    [other] = summary["elsewhere"]
    assert (other["study"], other["sets"]) == (str(here / "study"), ["id_test", "cartoon"])
    line = verdict(page_document(read_study(here / "again")))[3]
    assert not line.passed
    assert f"other studies have read these very images once: {here / 'study'}" in line.text
    assert run("test", "again", "--again", "once more", "--json")[0] == 0  # its own first read is in its own ledger
    assert len(json.loads((here / "again" / "test" / "summary.json").read_text())["elsewhere"]) == 1


def entry_named(name, study="one"):
    return Entry(1, "2026-11-28T05:00:00+00:00", study, "hash", "version", "test", details={notes.NAME: name})


def test_reads_noted_at_the_same_time_are_all_there(folder, here):
    recipe = load_recipe(here / "study" / "resolved.yaml")
    with ThreadPoolExecutor(8) as pool:
        names = [f"{number:016x}" for number in range(24)]
        list(pool.map(lambda name: notes.note(here / name, recipe, [entry_named(name)]), names))
    found, problems = notes.note(here, recipe, [entry_named("last")])
    assert problems == []
    assert sorted(one["study"] for one in found) == [str(here / name) for name in names]


def test_what_is_wrong_with_a_note_is_a_line_and_stops_nothing(run, here, folder):
    recipe, place = load_recipe(here / "study" / "resolved.yaml"), folder / "cache" / notes.FOLDER
    place.mkdir()
    whole = {"study": "x\x1b[31m", "time": "t", "user": "u", "sets": notes.set_digests(recipe)}
    (place / "good.json").write_text(json.dumps(whole))
    damaged = {"deep": "[" * 10**5, "half": '{"study": ', "list": "[1]", "sets": json.dumps({"sets": [3]})}
    for name, text in damaged.items():
        (place / f"{name}.json").write_text(text)
    os.mkfifo(place / "pipe.json")
    found, problems = notes.note(here, recipe, [entry_named("../../beyond")])
    assert [one["study"] for one in found] == ["x\\x1b[31m"]
    assert len(problems) == len(damaged) + 1
    assert all(any(f"{name}.json" in line for line in problems) for name in (*damaged, "pipe"))
    assert not list(here.parent.rglob("beyond*"))
    shutil.rmtree(place)
    place.write_text("no folder")
    code, _, err = run("test", "study")
    assert code == 0, err
    assert "this read is not noted for other studies of these images" in err
    place.unlink()


# kills

KILLED = """
import os, sys
from carft_ray.results.test_sets import sealed_read as sealed

plain, calls = sealed.predict_all, []

def dying(*args):
    calls.append(args)
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    return plain(*args)

sealed.predict_all = dying
sealed.read_sealed(__import__("pathlib").Path(sys.argv[1]), None, str)
"""


@pytest.mark.whole
def test_a_read_that_was_killed_goes_on_under_its_line(run, here, read):
    study, number = here / "study", 3
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, study, str(number)], env=environment, timeout=600)
    assert done.returncode == 9
    assert not (study / "test" / "summary.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in study.glob("test/**/*.parquet")}
    assert len(kept) == number - 1
    code, out, err = run("test", "study", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert len(read_ledger(study)) == 1
    assert (summary["read"], summary["rows"], summary["baselines"]) == (1, read[1]["rows"], read[1]["baselines"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run("test", "study")[0] == 8


@pytest.mark.parametrize("gone", ["", "summary.json", "summary.json zero_shot.parquet"], ids=["all", "last", "two"])
def test_a_read_without_its_last_files_goes_on_with_the_rows_of_its_line(run, again, read, gone):
    """Whatever the study has become since: here a confirm was begun, which would be compared now."""
    for name in gone.split():
        (again / "test" / "read-1" / name).unlink()
    if not gone:
        shutil.rmtree(again / "test")
    (again / "confirm").mkdir()
    (again / "confirm" / "plan.json").write_text("{}")
    code, _, err = run("test", "study")
    assert code == 0, err
    assert "continuing the read of" in err
    assert ("read before" in err) == bool(gone)
    assert json.loads((again / "test" / "summary.json").read_text()) == read[1]
    assert json.loads((again / "test" / "read-1" / "summary.json").read_text()) == read[1]
    assert len(read_ledger(again)) == 1


def test_a_reason_begins_another_read_though_one_is_not_finished(run, again):
    """As when its weights are gone by now: it cannot be finished, and stays counted."""
    (again / "test" / "read-1" / "summary.json").unlink()
    code, out, err = run("test", "study", "--again", "the first was cut off", "--json")
    assert code == 0, err
    assert json.loads(out)["read"] == 2
    assert run("test", "study")[0] == 8


# confirm


def train(study_dir, trainings, wanted):
    """Runs those of the trainings of a confirm whose names are wanted."""
    recipe = load_recipe(study_dir / "resolved.yaml")
    with open_study(study_dir, recipe) as study:
        recover_confirm(study, {name: trainings[name] for name in wanted})
        while spec := study.next():
            chosen = apply(recipe, spec.values)
            run_training(chosen, spec.folder(study_dir), study_dir / "prepared", RunContext(), spec.attempt)
            study.settle(spec)


@pytest.fixture
def planned(here):
    """The study with the plan of a confirm: winner and a baseline at two alphas on two fresh seeds, and zero-shot."""
    study = here / "study"
    recipe = load_recipe(study / "resolved.yaml")
    best = best_row(trials(study))
    plain = next(row for row in baselines(study) if row.name == "plain")
    rows = (
        PlanRow("plain, alpha 1", "baseline", "plain", 1.0, plain.values, 0.1),
        PlanRow("plain", "baseline", "plain", plain.alpha, plain.values, 0.2),
        PlanRow("zero_shot", "baseline", None, 0.0, {}, 0.1),
        PlanRow(best.name, "winner", best.name, best.alpha, best.values, 0.3),
    )
    stage = Stage(best.name, (101, 102), rows)
    write_plan(study, stage, None)
    return study, recipe, stage


def test_the_rows_of_a_confirm_are_read_with_all_their_seeds_once_it_is_finished(run, planned):
    confirmed, recipe, stage = planned
    trainings = {name: {**each, "alpha": 0.6} for name, each in stage.trainings().items()}  # and 0 and 1
    train(confirmed, trainings, trainings.keys() - {"plain-seed102"})
    code, _, err = run("test", "study")
    assert code == 6
    assert "one without all seeds of plain, alpha 1, plain" in err
    assert read_ledger(confirmed) == []
    train(confirmed, trainings, ["plain-seed102"])
    summarise(confirmed, recipe, stage, None)
    code, out, err = run("test", "study", "--json")
    assert code == 0, err
    summary = json.loads(out)
    best = best_row(trials(confirmed))
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == [best.name, "plain, alpha 1", "plain", "zero_shot"]
    assert summary["confirmed"]
    assert summary["seeds"] == [101, 102]
    assert [row["seeds"] for row in summary["rows"]] == [2, 2, 2, 0]
    assert rows["plain"]["runs"] == rows["plain, alpha 1"]["runs"]
    read_dir = confirmed / "test" / "read-1"
    trainings = {f"confirm/{name}-seed{seed}.parquet" for name in (best.name, "plain") for seed in (101, 102)}
    assert {str(path.relative_to(read_dir)) for path in read_dir.rglob("*.parquet")} == {
        "zero_shot.parquet",
        *trainings,
    }
    assert rows[best.name]["objective"]["over"] == "over seeds and images"
    assert {each["objective"]["num_seeds"] for each in summary["baselines"]} == {2}
    table = read_predictions(confirmed / "test" / "read-1" / "confirm" / "plain-seed101.parquet")
    assert alphas(table, "id_test") == sorted({rows["plain"]["alpha"], 1.0})


# what is refused before the seal is broken


def test_a_study_without_test_sets_is_told_to_begin_another(run, here, folder):
    manifest = json.loads((here / "study" / "manifest.json").read_text())
    manifest["recipe"]["data"] |= {"id_test": None, "ood_test": {}}
    (here / "study" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run("test", "study")
    assert code == 3
    assert "without data.id_test and data.ood_test" in err
    assert "begin a new study" in err


def test_a_study_without_a_finished_trial_is_told(run, here, folder):
    recipe = load_recipe(here / "study" / "resolved.yaml", ["search.trials=1"])
    with open_study(here / "empty", recipe) as study:
        recover_running(study)
        (study.study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
    code, _, err = run("test", "empty")
    assert code == 6
    assert "must have a finished trial" in err


def test_lost_weights_are_told_before_the_seal_is_broken(run, here):
    best = best_row(trials(here / "study"))
    (here / "study" / "trials" / best.name / "attempt-1" / "fine_tuned.safetensors").unlink()
    code, _, err = run("test", "study")
    assert code == 5
    assert "its weights are gone" in err
    assert read_ledger(here / "study") == []


def test_a_study_in_use_is_told(run, here):
    with holding(here / "study"):
        code, _, err = run("test", "study")
    assert code == 5
    assert "is in use" in err
    assert read_ledger(here / "study") == []


def test_missing_test_images_are_told_before_the_seal_is_broken(run, here, folder):
    shutil.copytree(folder / "images", here / "images")
    manifest = here / "study" / "manifest.json"
    resolved = here / "study" / "resolved.yaml"
    for path in (manifest, resolved):
        path.write_text(path.read_text().replace(str(folder / "images"), str(here / "images")))
    shutil.rmtree(here / "images" / "cartoon" / "star")
    code, _, err = run("test", "study")
    assert code == 4
    assert "cartoon" in err
    assert "star" in err
    assert read_ledger(here / "study") == []


def test_images_of_a_test_set_that_are_found_only_now_are_refused_or_counted_apart(run, here, folder):
    """The folder of the test set was not there when the study began; one of its images was trained on."""
    shutil.copytree(folder / "images", here / "images")
    for path in (here / "study" / "manifest.json", here / "study" / "resolved.yaml"):
        path.write_text(path.read_text().replace(str(folder / "images"), str(here / "images")))
    trained = sorted((here / "images" / "photo" / "star").iterdir())[0]
    test = sorted((here / "images" / "cartoon" / "star").iterdir())[0]
    shutil.copy(trained, test)
    code, _, err = run("test", "study")
    assert code == 8
    assert "data.ood_test.cartoon: must not share images with data.train, and does; it could not be read when" in err
    assert str(test) in err
    assert read_ledger(here / "study") == []
    assert run("resume", "study", "--set", "data.shared_images=keep")[0] == 0
    code, out, err = run("test", "study", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["shared_images"] == {"data.ood_test.cartoon": {"stays": 1}, "data.train": {"stays": 1}}
    without = summary["without_shared_images"]
    assert without["sets"] == {**summary["sets"], "cartoon": summary["sets"]["cartoon"] - 1}
    table = read_predictions(here / "study" / "test" / "read-1" / "zero_shot.parquet")
    zero_shot = next(row for row in summary["rows"] if row["name"] == "zero_shot")
    part = table.filter(pc.field("set") == "cartoon").to_pandas()
    right = part["prediction"] == part["label"]
    alone = part["sample_id"] != sample_id(f"cartoon/star/{test.name}")
    assert zero_shot["sets"]["cartoon"]["mean"] == pytest.approx(right.mean())
    fewer = next(row for row in without["rows"] if row["name"] == "zero_shot")
    assert fewer["sets"]["cartoon"]["mean"] == pytest.approx(right[alone].mean())


def test_a_folder_that_is_no_study_is_a_usage_error(run):
    assert run("test", "nothing")[0] == 2


# a search that goes on


def test_after_a_read_resume_needs_a_reason(run, again):
    code, _, err = run("resume", "study", "--trials", "+1")
    assert code == 8
    assert "its test sets were read" in err
    assert "--again REASON" in err
    assert len(read_ledger(again)) == 1


def test_after_a_read_resume_with_nothing_to_do_needs_no_reason(run, again):
    code, _, err = run("resume", "study")
    assert code == 0, err
    assert "Nothing to do" in err


def test_a_read_after_the_search_went_on_says_so(run, again):
    recipe = load_recipe(again / "resolved.yaml", ["search.trials=3"])
    assert require_unread(again, recipe, "a wider range")
    short_sealed.search(again, recipe)
    assert len(trials(again)) == 3
    code, out, err = run("test", "study", "--again", "after a wider range", "--json")
    assert code == 0, err
    assert "The search was continued once after a test read." in read_lines(json.loads(out))
    assert json.loads(out)["ledger_line"] == 3
