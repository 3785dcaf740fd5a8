"""Test: the seal is opened once, every read is counted, a killed one goes on."""

import contextlib
import io
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import crash_host
import numpy as np
import pytest
import short_sealed
import short_training
import stand_in
import torch
from logs import change, commits, goes_on, holding

from carft_ray import environment
from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.class_names import class_folders
from carft_ray.data.duplicates import find_duplicates as find
from carft_ray.data.listing import sample_id
from carft_ray.data.sets import open_source
from carft_ray.errors import InterruptedRunError
from carft_ray.evaluation.metrics import wilson
from carft_ray.evaluation.predictions import alphas, correct, read_predictions, sample_ids
from carft_ray.launch.command import Plan, computing
from carft_ray.launch.workers.runtime import Runner
from carft_ray.recipe.loading import load_recipe
from carft_ray.results import confirm_plan, test_summary
from carft_ray.results.confirm_numbers import confirm_lines, summarise
from carft_ray.results.confirm_plan import PlanRow, Stage, write_plan
from carft_ray.results.page.data import page_document
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.reading.trained import open_trained
from carft_ray.results.study_card import verdict
from carft_ray.results.test_summary import read_lines
from carft_ray.study.ledger import Entry
from carft_ray.study.opening import open_study
from carft_ray.study.rows import best_row
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of

pytestmark = pytest.mark.slow

SETS = {"id_test": ("photo_test", 15), "cartoon": ("cartoon", 10), "painting": ("painting", 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished study, images, a recipe and a cache."""
    return short_sealed.shared(tmp_path_factory)


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """The working directory with a copy of the study; no other has read these images."""
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    shutil.copytree(folder / "study", tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def read(folder, tmp_path_factory):
    """A study whose test sets were read once, the summary, and what the command wrote to each stream."""
    study = tmp_path_factory.mktemp("read") / "study"
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    shutil.copytree(folder / "study", study)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert crash_host.call(["test", study]) == 0
    return study, json.loads((study / "test" / "summary.json").read_text()), out.getvalue(), err.getvalue()


@pytest.fixture
def again(read, here):
    """A copy of that study, in the place of the one that was not read."""
    shutil.rmtree(here / "study")
    return Path(shutil.copytree(read[0], here / "study"))


def contents(folder):
    """What lies in a folder; the lock is of who holds it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def summary_of(run, study, *words):
    code, out, err = run("test", study, *words, "--json")
    assert code == 0, err
    return json.loads(out)


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
    images = image_set(source, clip.to_input, clip.input_key, Keeping(study.parent / "own_cache"))
    with torch.inference_mode():
        logits = [classifier(torch.from_numpy(images.images_NHWC[k : k + 1].copy()))[1] for k in range(len(images))]
    return np.mean([int(row.argmax()) == label for row, label in zip(logits, source.labels, strict=True)])


def test_winner_and_every_baseline_are_read_on_all_test_sets_at_their_stored_alphas(read):
    study, summary, out, err = read
    best, others = best_row(snapshot(study).trials), {row.name: row for row in snapshot(study).baselines}
    expected = [(best.name, "winner", best.alpha)] + [(row.name, "baseline", row.alpha) for row in others.values()]
    assert sorted((row["name"], row["role"], row["alpha"]) for row in summary["rows"]) == sorted(expected)
    assert summary["sets"] == {name: count for name, (_, count) in SETS.items()}
    paths = {best.name: f"trials/{best.name}", "plain": "baselines/plain", "zero_shot": "zero_shot"}
    for name, _, alpha in expected:
        table = read_predictions(study / "test" / "read-1" / f"{paths[name]}.parquet")
        assert [alphas(table, set_name) for set_name in SETS] == [[alpha]] * len(SETS)
    assert re.search(rf"^{best.name} .*winner", out, re.M)
    assert all(words in err for words in ("1/3 zero_shot", "Next:", "Test read 1"))
    [entry] = snapshot(study).ledger
    assert (entry.purpose, entry.sets, entry.reason) == ("test", tuple(SETS), "")
    assert summary["subject"] == "model"  # one training each: nothing is said about their values
    assert {gap["other"] for gap in summary["baselines"]} == {*others}
    text = "\n".join(read_lines(summary))
    for words in (summary["headline"], "OOD mean: over cartoon (10), painting (20).", "id_test (15 images)"):
        assert words in text


def test_the_numbers_are_those_of_the_models_by_hand(read):
    study, summary, *_ = read
    for row in summary["rows"]:
        name = "plain" if row["name"] == "zero_shot" else row["name"]  # any training is zero-shot at alpha 0
        found = {set_name: right(study, name, domain, row["alpha"]) for set_name, (domain, _) in SETS.items()}
        assert {set_name: row["sets"][set_name]["mean"] for set_name in SETS} == pytest.approx(found)
        ood_mean = (found["cartoon"] + found["painting"]) / 2
        assert row["ood_accuracy"]["mean"] == pytest.approx(ood_mean)
        assert row["objective"]["mean"] == pytest.approx((found["id_test"] + ood_mean) / 2)
        assert row["id_accuracy"]["ends"] == pytest.approx(wilson(round(found["id_test"] * 15), 15))
    assert len({json.dumps(row["sets"]) for row in summary["rows"]}) > 1


def test_it_computes_with_all_cores_however_few_a_trial_has(run, here, monkeypatch):
    monkeypatch.setattr(environment, "usable_cores", lambda: 3)
    assert run("test", "study")[0] == 0
    assert torch.get_num_threads() == 3


def test_nothing_changes_but_test_log_and_manifest_and_no_trial(folder, read):
    study = read[0]
    before, after = contents(folder / "study"), contents(study)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name for name in changed if name in before or not name.startswith(("test/", "log/"))} == {"manifest.json"}
    added = commits(study)[len(commits(folder / "study")) :]
    assert [record["kind"] for commit in added for record in commit["records"]] == ["owner", "ledger", "released"]
    assert not [commit for commit in added if commit["operations"]]
    assert snapshot(study).trials == snapshot(folder / "study").trials


@pytest.mark.parametrize("words", ["test study", "resume study --trials +1"])
def test_without_a_reason_a_second_read_or_more_trials_are_refused_and_nothing_is_written(run, again, words):
    [entry] = snapshot(again).ledger
    before = contents(again)
    code, out, err = run(*words.split())
    assert (code, out) == (8, "")
    assert f"{entry.time} by {entry.user} (line 1 of the ledger)" in err
    assert "--again REASON" in err
    assert contents(again) == before
    assert run("test", "study", "--again", " ")[0] == 2
    assert run("resume", "study")[0] == 0  # nothing to do


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_a_reason_reads_once_more_and_is_counted(run, again, read, is_cut_off):
    """Also where the first read is not finished: its weights may be gone by now. It stays counted."""
    if is_cut_off:
        (again / "test" / "read-1" / "summary.json").unlink()
    summary = summary_of(run, again, "--again", "a reviewer asked")
    assert (summary["read"], summary["reason"], summary["ledger_line"]) == (2, "a reviewer asked", 2)
    assert summary["rows"] == read[1]["rows"]
    assert any(line.startswith("Test read 2") and "reason: a reviewer asked" in line for line in read_lines(summary))
    assert summary.pop("study") == str(again)
    assert json.loads((again / "test" / "summary.json").read_text()) == summary
    assert [entry.reason for entry in snapshot(again).ledger] == ["", "a reviewer asked"]
    assert run("test", "study")[0] == 8


def test_a_read_after_the_search_went_on_says_so(run, again):
    recipe = load_recipe(again / "resolved.yaml", ["search.trials=3"])
    assert goes_on(again, recipe, "a wider range")
    short_sealed.search(again, recipe)
    assert len(snapshot(again).trials) == 3
    summary = summary_of(run, again, "--again", "after a wider range")
    assert "The search was continued once after a test read." in read_lines(summary)
    assert summary["ledger_line"] == 3


def test_another_study_of_the_same_images_is_told_who_has_read_them(run, here, folder):
    """Whatever its folder and its images' names: what counts is their bytes. Nothing is refused for it."""
    assert run("test", "study", "--json")[0] == 0
    other = short_sealed.copy(folder, here / "moved")
    for path in (here / "moved" / "images").glob("cartoon/*/*.png"):
        path.rename(path.with_name(f"renamed_{path.name}"))
    (here / "moved" / "images" / "painting" / "star" / "0.png").unlink()
    code, _, err = run("test", other, "--trust-paths")  # its cache is that of the other study
    assert code == 0, err
    told, words = f"Other studies have also read these images once: {here / 'study'} (", " ".join(err.split())
    assert words.index(told) < words.index("1/3")  # before the first image is opened
    assert words.count(told) == 2  # and with the numbers
    [elsewhere] = json.loads((other / "test" / "summary.json").read_text())["elsewhere"]
    assert (elsewhere["study"], elsewhere["sets"]) == (str(here / "study"), ["id_test", "cartoon"])
    line = verdict(page_document(read_study(other)))[3]
    assert not line.passed
    assert told in line.text
    again = summary_of(run, other, "--trust-paths", "--again", "once more")
    assert len(again["elsewhere"]) == 1  # its own first read is in its own ledger


@pytest.mark.parametrize("is_changed", [False, True])
def test_images_of_a_test_set_that_have_changed_since_the_search_are_told(run, here, folder, is_changed):
    study = short_sealed.copy(folder, here / "moved")
    recipe, image = load_recipe(study / "resolved.yaml"), here / "moved" / "images" / "painting" / "star" / "0.png"
    debug = recipe.resources.model_copy(update={"executor": "debug"})
    with open_study(study, recipe) as opened:  # as a search does
        runner, stop = Runner(stand_in.prepare, stand_in.train), InterruptedRunError
        plan = Plan(recipe.model_copy(update={"resources": debug}), study, runner=runner)
        with computing(plan, opened, stop, str):
            pass
    if is_changed:
        image.write_bytes(image.with_name("1.png").read_bytes())
    because = ["--again", "an image was mended"] * is_changed  # without it, it is refused
    code, out, err = run("test", study, "--trust-paths", *because)
    assert code == 0, err
    line, words = "The images of painting have changed since the search began.", " ".join(f"{err} {out}".split())
    assert words.count(line) == 2 * is_changed  # before the first image is opened, and with the numbers
    assert json.loads((study / "test" / "summary.json").read_text())["changed_sets"] == ["painting"] * is_changed


def entry_named(name, study="one"):
    return Entry(
        1, "2026-11-28T05:00:00+00:00", study, "hash", "version", "test", details={test_summary.NOTE_NAME: name}
    )


def test_reads_noted_at_the_same_time_are_all_there(here):
    recipe, digests = load_recipe(here / "study" / "resolved.yaml"), {"id_test": "of its images"}
    with ThreadPoolExecutor(8) as pool:
        names = [f"{number:016x}" for number in range(24)]
        list(pool.map(lambda name: test_summary.note_read(here / name, recipe, [entry_named(name)], digests), names))
    found, problems = test_summary.note_read(here, recipe, [entry_named("last")], digests)
    assert problems == []
    assert sorted(one["study"] for one in found) == [str(here / name) for name in names]


def test_what_is_wrong_with_a_note_is_a_line_and_stops_nothing(run, here, folder):
    recipe, place = load_recipe(here / "study" / "resolved.yaml"), folder / "cache" / test_summary.NOTES
    place.mkdir()
    whole = {"study": "x\x1b[31m", "time": "t", "user": "u", "sets": find.digests_of_tests(recipe, folder / "cache")}
    (place / "good.json").write_text(json.dumps(whole))
    damaged = {"deep": "[" * 10**5, "half": '{"study": ', "list": "[1]", "sets": json.dumps({"sets": [3]})}
    for name, text in damaged.items():
        (place / f"{name}.json").write_text(text)
    os.mkfifo(place / "pipe.json")
    found, problems = test_summary.note_read(here, recipe, [entry_named("../../beyond")], whole["sets"])
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


def test_a_killed_read_does_not_go_on_with_other_images(run, again, read, folder):
    """Else a configuration that was read before would be compared with others on other images of the same names."""
    (again / "test" / "read-1" / "summary.json").unlink()
    image = min((folder / "images" / "cartoon").rglob("*.png"))
    before = image.read_bytes()
    try:
        short_training.write_image(image, 0, 999)
        code, _, err = run("test", "study")
    finally:
        image.write_bytes(before)
    assert code == 8
    assert "cartoon: must have the images with which this read began, but got others" in " ".join(err.split())
    assert f"carft-ray test {again} --again REASON" in " ".join(err.split())
    assert len(snapshot(again).ledger) == 1
    assert run("test", "study")[0] == 0


@pytest.mark.parametrize("gone", ["", "summary.json", "summary.json zero_shot.parquet"], ids=["all", "last", "two"])
def test_a_read_without_its_last_files_goes_on_with_the_rows_of_its_line(run, again, read, gone, monkeypatch):
    """Whatever the study has become since: here a confirm was begun, which would be compared now."""
    for name in gone.split():
        (again / "test" / "read-1" / name).unlink()
    if not gone:
        shutil.rmtree(again / "test")
    kept = {path: path.stat().st_mtime_ns for path in again.glob("test/**/*.parquet")}
    (again / "confirm").mkdir()
    (again / "confirm" / "plan.json").write_text("{}")
    monkeypatch.setattr("carft_ray.words.FIRST_AFTER_S", 0.0)
    code, _, err = run("test", "study")
    assert code == 0, err
    assert "continuing the read of" in err
    assert bool(re.search(r"evaluations: \d+ of \d+, about \d+ s left", err)) == (not gone)
    assert ("read before" in err) == bool(gone)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not predicted again
    for path in ("summary.json", "read-1/summary.json"):
        assert json.loads((again / "test" / path).read_text()) == read[1]
    assert len(snapshot(again).ledger) == 1


def test_an_ablation_is_shown_at_the_alpha_that_suits_it_best_too_and_takes_no_part_in_the_family(here):
    study, recipe = here / "study", load_recipe(here / "study" / "resolved.yaml")
    best = best_row(snapshot(study).trials)
    winner = PlanRow(best.name, "winner", best.name, 0.6, best.values, 0.3)
    [ablation] = confirm_plan.without_penalties(recipe, winner)
    stage = Stage(best.name, (101, 102), (winner, ablation))
    write_plan(study, stage, None)
    short_sealed.confirm(study, stage.trainings())
    rows = [row for row in snapshot(study).confirmations if row.name.startswith(f"{ablation.training}-seed")]
    curves = [{point["alpha"]: point["objective"] for point in result_of(study, row)["curve"]} for row in rows]
    assert [*curves[0]] == list(recipe.search.alpha.measured)
    means = {alpha: np.mean([curve[alpha] for curve in curves]) for alpha in curves[0] if alpha}
    best_alpha, *_, other = sorted(means, key=means.get, reverse=True)
    for alpha, expected in ((best_alpha, [best_alpha]), (other, [other, best_alpha])):
        summary = summarise(snapshot(study), replace(stage, rows=(winner, replace(ablation, alpha=alpha))), None)
        found = [row for row in summary["rows"] if row["role"] == "ablation"]
        assert [row["alpha"] for row in found] == expected
        assert [row["objective"]["mean"] for row in found] == pytest.approx([means[each] for each in expected])
        assert [row["name"] for row in found][1:] == [f"{ablation.name}, its own alpha"][: len(expected) - 1]
        assert summary["baselines"] == []


def test_the_rows_of_a_confirm_are_read_with_all_their_seeds_once_it_is_finished(run, here):
    study = here / "study"
    before = snapshot(study)
    best, plain = before.best, next(row for row in before.baselines if row.name == "plain")
    rows = (
        PlanRow("plain, alpha 1", "baseline", "plain", 1.0, plain.values, 0.1),
        PlanRow("plain", "baseline", "plain", plain.alpha, plain.values, 0.2),
        PlanRow("zero_shot", "baseline", None, 0.0, {}, 0.1),
        PlanRow(best.name, "winner", best.name, best.alpha, best.values, 0.3),
    )
    stage = Stage(best.name, (101, 102), rows)
    write_plan(study, stage, None)
    trainings = {name: {**each, "alpha": 0.6} for name, each in stage.trainings().items()}  # and 0 and 1
    short_sealed.confirm(study, trainings, num_attempts=len(trainings) - 1)
    code, _, err = run("test", "study")
    assert code == 6
    assert "one without all seeds of" in err
    assert snapshot(study).ledger == []
    short_sealed.confirm(study, trainings)
    summarise(snapshot(study), stage, None)
    summary = summary_of(run, study)
    assert (summary["confirmed"], summary["seeds"]) == (True, [101, 102])
    seeds = {best.name: 2, "plain, alpha 1": 2, "plain": 2, "zero_shot": 0}
    assert {row["name"]: row["seeds"] for row in summary["rows"]} == seeds
    read_dir = study / "test" / "read-1"
    models = {model["runs"][0].split("/")[-1] for model in summary["model"]["rows"] if model["runs"]}
    assert {path.stem for path in read_dir.rglob("*.parquet")} == {*trainings, "zero_shot", *models}
    assert summary["rows"][0]["objective"]["over"] == "over seeds and images"
    assert {each["objective"]["num_seeds"] for each in summary["baselines"]} == {2}
    table = read_predictions(read_dir / "confirm" / "plain-seed101.parquet")
    assert alphas(table, "id_test") == sorted({summary["rows"][2]["alpha"], 1.0})
    report = page_document(read_study(study))["report"]
    assert report["lines"][-1].startswith(summary["headline"])
    assert {*confirm_lines(json.loads((study / "confirm" / "summary.json").read_text()))} < {*report["lines"]}
    assert report["noise"] > 0


def test_what_is_lost_or_in_use_is_told_before_the_seal_is_broken(run, here, folder):
    def refused(code, told):
        found, _, err = run("test", "study")
        assert (found, told in err) == (code, True), err
        assert snapshot(study).ledger == []

    shutil.rmtree(here / "study")
    study, images = short_sealed.copy(folder, here), here / "images" / "cartoon" / "star"
    with holding(study):
        refused(5, "is in use")
    images.rename(here / "gone")
    refused(4, "star")
    (here / "gone").rename(images)
    (best_row(snapshot(study).trials).place(study) / "fine_tuned.safetensors").unlink()
    refused(5, "its weights were removed")
    change(study, "recipe", lambda recipe: recipe["data"].update({"id_test": None, "ood_test": {}}))
    refused(3, "without data.id_test and data.ood_test")


def test_images_of_a_test_set_that_are_found_only_now_are_refused_or_counted_apart(run, here, folder):
    """The folder of the test set was not there when the study began; one of its images was trained on."""
    shutil.rmtree(here / "study")
    short_sealed.copy(folder, here)
    test = here / "images" / "cartoon" / "star" / "0.png"
    shutil.copy(here / "images" / "photo" / "star" / "0.png", test)
    code, _, err = run("test", "study")
    assert code == 8
    assert "data.ood_test.cartoon: must not share images with data.train, but it does; it could not be read when" in err
    assert str(test) in err
    assert snapshot(here / "study").ledger == []
    assert run("resume", "study", "--set", "data.shared_images=keep")[0] == 0
    summary = summary_of(run, here / "study")
    assert summary["shared_images"] == {"data.ood_test.cartoon": {"stays": 1}, "data.train": {"stays": 1}}
    without = summary["without_shared_images"]
    assert without["sets"] == {**summary["sets"], "cartoon": summary["sets"]["cartoon"] - 1}
    table = read_predictions(here / "study" / "test" / "read-1" / "zero_shot.parquet")
    right, ids = correct(table, "cartoon", 0.0), sample_ids(table, "cartoon", 0.0)
    alone = right[ids != sample_id(f"cartoon/star/{test.name}")]
    for rows, answers in ((summary["rows"], right), (without["rows"], alone)):
        zero_shot = next(row for row in rows if row["name"] == "zero_shot")
        assert zero_shot["sets"]["cartoon"]["mean"] == pytest.approx(answers.mean())


@pytest.mark.parametrize("key", ["sketch", "id_val"])
def test_a_confirm_with_a_recipe_that_was_changed_to_see_a_test_set_is_refused(here, run, key):
    def see(recipe):
        data = recipe["data"]
        of = data["ood_val"]["sketch"] if key == "sketch" else data["id_val"]
        of["domains"] = ["cartoon" if key == "sketch" else "photo_test"]

    change(here / "study", "recipe", see)
    code, _, err = run("confirm", "study", "--top", "1", "--seeds", "2")
    assert code == 8
    assert "must not share images with data." in err
    assert not (here / "study" / "confirm").exists()
