"""`carft-ray report` on a small study with stored predictions; nothing is trained here."""

import json
import shutil
from pathlib import Path

import crash_host
import forging
import numpy as np
import pytest
from from_logits import predictions_table
from logs import forget_line, write_line

from carft_ray.evaluation.objective import objective_spec
from carft_ray.evaluation.predictions import concat, correct, read_predictions, write_predictions
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.page.data import page_document
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.report import OWN_CHOICES, study_report
from carft_ray.results.statistics.optimism import correct_best, ranking_noise
from carft_ray.results.stored import confirmed
from carft_ray.results.verdict_card import verdict
from carft_ray.store.result import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure
from carft_ray.study.recovery import recover_confirm, recover_running

BASE = Path(__file__).parent
SETS = {"id_val": 60, "noisy": 40, "blurry": 40}
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def make_recipe(**train):
    def images(domain, split):
        return {"source": "sandbox", "domain": domain, "split": split, "num_per_class": 4}

    return Recipe.model_validate(
        {
            "name": "small",
            "data": {
                "train": images("photo", "train"),
                "id_val": images("photo", "val"),
                "ood_val": {"noisy": images("noisy_photo", "val"), "blurry": images("blurry_photo", "val")},
            },
            "train": train,
            "search": {
                "trials": 6,
                "space": {"kl_weight": {"low": 0.1, "high": 10, "log": True}},
                "baselines": {"plain": {"kl_weight": 0}},
            },
        }
    )


def predictions(rng, alphas, lift):
    """Predictions whose accuracy rises with ``lift`` and has its best between the ends."""
    tables = []
    for alpha in alphas:
        for name, n in SETS.items():
            labels = np.arange(n) % 3
            right = np.arange(n) * 7 % n / n + rng.normal(0, 0.03, n) < 0.5 + 4 * lift * alpha * (1.4 - alpha)
            logits = np.zeros((n, 3), np.float32)
            logits[np.arange(n), np.where(right, labels, (labels + 1) % 3)] = 1
            tables.append(predictions_table(name, alpha, np.arange(n, dtype=np.uint64), labels, logits))
    return concat(tables)


def write_training(place, table, objective, alpha):
    write_predictions(place / "predictions" / "validation.parquet", table)
    metrics = {"id_accuracy": 0.8, "ood_accuracy": 0.5}
    content = {"objective": objective, "alpha": alpha, "metrics": metrics, "elapsed_s": 61.0, "moved": 0.02}
    write_result(place, content)


def make_study(study_dir, recipe, alpha=0.65):
    rng = np.random.default_rng(0)
    stored = sorted({*GRID, alpha})
    with open_study(study_dir, recipe) as study:
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        recover_running(study)
        study.add_zero_shot({"objective": 0.5, "id_accuracy": 0.5, "ood_accuracy": 0.5})
        write_predictions(study_dir / "prepared" / "zero_shot.parquet", predictions(rng, (0.0,), 0))
        for lift in (0.02, 0.1, 0.12, 0.11, 0.05):
            spec = study.next()
            write_training(spec.place(study_dir), predictions(rng, stored, lift), 0.5 + 1.96 * lift, alpha)
            study.settle(spec)
        spec = study.next()
        spec.folder(study_dir).mkdir(parents=True, exist_ok=True)
        study.settle(spec, Failure("diverged", "loss not finite", spec.attempt, details="Traceback ..."))
    return study_dir


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("studies") / "small", make_recipe())


@pytest.fixture
def study_dir(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "small"))


def run(capsys, *words):
    capsys.readouterr()
    code = crash_host.call(["report", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def complete(view):
    return [row for row in view.trials if row.outcome == "complete"]


@pytest.mark.slow
def test_counts_and_corrections(original):
    view = read_study(original)
    found = study_report(view)
    assert found["counts"]["trials"]["complete"] == 4
    assert found["counts"]["trials"]["diverged"] == 1
    assert (found["counts"]["trainings"], found["counts"]["alphas"], found["counts"]["test_reads"]) == (6, 5 * 6, 0)
    spec = objective_spec(view.recipe)
    rows = complete(view)
    tables = [
        read_predictions(original / "trials" / row.name / "attempt-1" / "predictions" / "validation.parquet")
        for row in rows
    ]
    matrices = {name: np.stack([correct(table, name, 0.65) for table in tables]) for name in SETS}
    objectives = [row.objective for row in rows]
    noise = ranking_noise(spec, objectives, matrices)
    assert found["noise"]["image"] == pytest.approx(noise.variance)
    assert found["corrected"]["value"] == correct_best(objectives, noise.variance).value
    assert found["best"]["name"] == view.best.name
    assert found["headline"]["baseline"] == "plain"


@pytest.mark.slow
def test_trainings_on_different_kinds_of_gpus_are_told(study_dir):
    for folder, device in zip(
        sorted((study_dir / "trials").glob("*/*/result.json")), ("H100", "A100", "H100"), strict=False
    ):
        content = json.loads(folder.read_text())
        folder.write_text(json.dumps({**content, "environment": {"device": device}}))
    forging.record(study_dir)
    found = study_report(read_study(study_dir))
    assert found["counts"]["devices"] == {"H100": 2, "A100": 1}
    assert found["lines"][1] == "They ran on different devices, which round differently: 2 on H100, 1 on A100."


@pytest.mark.slow
def test_a_trainer_of_ones_own_may_have_chosen_and_every_text_says_that_nobody_counted(original, tmp_path):
    study_dir = make_study(tmp_path / "own", make_recipe(function="mine:fit"))
    for path, is_own in ((study_dir, True), (original, False)):
        found = study_report(read_study(path))
        assert (OWN_CHOICES in found["lines"]) == is_own
        cost = verdict(page_document(read_study(path)))[-1].text
        assert ("chosen on the labelled validation sets is not counted" in cost) == is_own


@pytest.mark.slow
def test_text_tells_what_each_number_corrects_and_ends_with_the_next_command(study_dir, capsys):
    code, out, err = run(capsys, study_dir)
    assert code == 0
    corrected = json.loads(run(capsys, study_dir, "--json")[1])["corrected"]
    for words in (
        "small: trials: 4 complete, 1 diverged.",
        "6 trainings and 30 evaluated alphas chose on these validation images; test sets were read 0 times.",
        f"Corrected: {100 * corrected['value']:.1f} %. The luck expected of the best of 4 values is subtracted, "
        f"{100 * corrected['optimism']:.1f} points: that of images alone: that of the seeds is still in it",
        "measured higher than plain by" if "higher than" in out else "no improvement over plain shown",
    ):
        assert words in out, words
    assert f"carft-ray resume {study_dir}" in err  # it is not finished


@pytest.mark.slow
def test_json_is_one_document_and_the_same_twice(study_dir, capsys):
    code, out, _ = run(capsys, study_dir, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(run(capsys, study_dir, "--json")[1])


@pytest.mark.slow
def test_test_reads_are_counted_and_a_damaged_summary_is_told(study_dir, capsys):
    for purpose in ("winner fixed", "test", "test"):
        write_line(study_dir, make_recipe(), purpose)
    _, out, err = run(capsys, study_dir)
    assert f"carft-ray export {study_dir}" in err
    assert "test sets were read 2 times" in out
    (study_dir / "confirm").mkdir()
    (study_dir / "confirm" / "summary.json").write_text("[]")
    assert run(capsys, study_dir)[0] == 5


@pytest.mark.slow
def test_a_ledger_that_lost_a_line_is_no_ground_for_a_report(study_dir, capsys):
    for _ in range(2):
        write_line(study_dir, make_recipe())
    forget_line(study_dir, 2)
    code, out, err = run(capsys, study_dir)
    assert (code, out) == (8, "")
    assert "must have the ledger of which manifest.json tells" in err


@pytest.mark.slow
def test_confirmed_configurations_give_the_seed_noise(study_dir):
    rng = np.random.default_rng(1)
    spec = objective_spec(make_recipe())
    values = {"values": {}, "objective": 0.6}
    rows = [
        {"name": "t0001", "role": "winner", "training": "t0001", "alpha": 0.6, **values},
        {"name": "unfinished", "role": "candidate", "training": "t0002", "alpha": 0.6, **values},
        {"name": "plain", "role": "baseline", "training": "plain", "alpha": 1.0, **values},
        {"name": "zero_shot", "role": "baseline", "training": None, "alpha": 0.0, **values},
    ]
    lifts = {f"{row['training']}-seed{10 + n}": 0.05 * n for row in (rows[0], rows[2]) for n in (1, 2, 3)}
    with open_study(study_dir, make_recipe()) as study:
        recover_confirm(study, {name: {} for name in lifts})
        while held := study.next():
            write_training(held.place(study_dir), predictions(rng, (0.6, 1.0), lifts[held.name]), 0.6, 0.6)
            study.settle(held)
    stage = {"winner": "t0001", "seeds": [11, 12, 13], "rows": rows}
    plan = {"first": stage, "second": None}
    (study_dir / "confirm" / "plan.json").write_text(json.dumps(plan))
    found = confirmed(study_dir, spec)
    assert [by_set["id_val"].shape for by_set in found] == [(3, 60)]
    both = {"first": {**stage, "seeds": [11, 12], "rows": rows[:2]}, "second": {**stage, "rows": [rows[0]]}}
    (study_dir / "confirm" / "plan.json").write_text(json.dumps(both))
    assert [len(by_set["id_val"]) for by_set in confirmed(study_dir, spec)] == [2, 3]
    (study_dir / "confirm" / "plan.json").write_text(json.dumps(plan))
    report = study_report(read_study(study_dir))
    assert report["noise"]["seed"] > 0
    assert any("images and seeds, the latter from 1 confirmed" in line for line in report["lines"])


def test_a_study_without_a_finished_trial_is_told_so(tmp_path, capsys):
    recipe = make_recipe()
    with open_study(tmp_path / "new", recipe):
        (tmp_path / "new" / "resolved.yaml").write_text(dump_recipe(recipe))
    code, _, err = run(capsys, tmp_path / "new")
    assert code == 6
    assert "must have a finished trial" in err


@pytest.mark.slow
def test_missing_predictions_and_no_study_are_told(study_dir, tmp_path, capsys):
    best = read_study(study_dir).best.name
    (study_dir / "trials" / best / "attempt-1" / "predictions" / "validation.parquet").unlink()
    assert run(capsys, study_dir)[0] == 5
    assert run(capsys, tmp_path / "nothing")[0] == 2
