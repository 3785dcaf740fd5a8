"""The model that a study delivers: chosen by validation, fixed in the ledger, tested, exported; one file throughout."""

import hashlib
import json
from dataclasses import replace

import own_functions
import pytest
import short_sealed
import short_training
from bucket_server import bucket_server

import carft_ray
from carft_ray.errors import StorageError
from carft_ray.evaluation.alpha_curve import point_at
from carft_ray.layout import WEIGHTS
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.confirm_plan import read_plan
from carft_ray.results.delivered import delivered, models_of_confirm, require_weights_of
from carft_ray.results.evidence import AT_ONE
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.folder import Folder
from carft_ray.store.log import log_of
from carft_ray.study.best import Retention
from carft_ray.study.ledger import fixed_trials, read_ledger, reads_of
from carft_ray.study.place import fetched
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import result_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")]

RAY_TRAIN = ["resources.executor=ray-train", "resources.num_workers=2", "resources.cpus_per_worker=0.5"]
CASES = {
    "folder": ["resources.executor=debug"],
    "Pareto": [
        "resources.executor=debug",
        "search.objective.kind=pareto",
        "search.alpha.mode=sample",
        "search.space.alpha={low: 0.1, high: 1}",
    ],
    "own trainer": ["resources.executor=debug"],
    "bucket": ["resources.executor=debug"],
    "inline": ["resources.executor=inline"],
    "Ray Train": RAY_TRAIN,
}


@pytest.fixture
def here(tmp_path):
    """The working directory."""
    return tmp_path


@pytest.fixture(params=[name if name == "folder" else pytest.param(name, marks=pytest.mark.whole) for name in CASES])
def searched(request, tmp_path, monkeypatch):
    """A finished search: its place, and what trains in it."""
    path = short_sealed.write(tmp_path, short_training)
    monkeypatch.chdir(tmp_path)
    overrides = [*short_sealed.settings(tmp_path, 2), "train.epochs=2", *CASES[request.param]]
    train = own_functions.few_steps if request.param == "own trainer" else None
    if train:
        overrides.append("search.baselines={}")

    def place(study):
        carft_ray.search(path, study, overrides=overrides, train=train, progress=False)
        return study, train

    if request.param != "bucket":
        yield place("study")
        return
    with bucket_server(monkeypatch) as server:
        yield place(server.address("study"))


def model_of(study_dir):
    return delivered(snapshot(study_dir))


def sha256(study, model):
    """Of the file in the study."""
    folder = fetched(study, 3)
    row = next(row for row in snapshot(folder).rows if row.training == model["runs"][0])
    return hashlib.sha256((row.place(folder) / WEIGHTS).read_bytes()).hexdigest()


def test_the_exported_model_is_the_tested_one_of_the_ledger(searched, run, tmp_path):
    study, train = searched
    first = carft_ray.export(study, "searched")
    assert (first.standing, first.trial) == ("searched", read_study(study).best.name)
    carft_ray.confirm(study, top=1, seeds=2, train=train, progress=False)
    second = carft_ray.export(study, "confirmed")
    assert second.standing == "confirmed"
    code, out, err = run("test", study, "--json", "--trust-paths")
    assert code == 0, err
    summary = json.loads(out)
    [entry] = reads_of(read_ledger(fetched(study), log_of(fetched(study))))
    fixed, measured = entry.details["models"][0], summary["model"]["rows"][0]
    third = carft_ray.export(study, "tested")
    assert (third.standing, third.trial, third.alpha) == ("tested", fixed["trial"], fixed["alpha"])
    assert third.sha256 == second.sha256 == fixed["sha256"] == measured["sha256"] == sha256(study, fixed)
    assert summary["model"]["subject"] == "model"
    assert (summary["confirmed"], summary["subject"]) == (True, "values")
    card = (tmp_path / "tested" / "README.md").read_text()
    assert fixed["sha256"] in card
    assert "on the test sets (read 1)" in card
    for name, each in measured["sets"].items():
        assert f"| {name} | {100 * each['mean']:.1f} [" in card.replace("\\", "")
    assert "mean of 2 trainings" in (tmp_path / "confirmed" / "README.md").read_text()
    assert "none is a test set" in (tmp_path / "searched" / "README.md").read_text()


@pytest.fixture
def confirmed(tmp_path_factory, tmp_path, monkeypatch):
    """A study with a finished confirm."""
    short_sealed.alone(short_sealed.shared(tmp_path_factory), tmp_path, monkeypatch)
    overrides = ["resources.executor=debug"]
    carft_ray.confirm("study", top=1, seeds=2, overrides=overrides, trust_paths=True, progress=False)
    return tmp_path / "study"


def test_each_model_is_the_best_of_its_own_trainings_on_validation(confirmed):
    study, stages = snapshot(confirmed), read_plan(confirmed)
    models = {model["role"]: model for model in models_of_confirm(study, *stages) if model["runs"]}
    for row in stages[0].rows:
        if row.role in models and row.training is not None and not row.name.endswith(AT_ONE):
            names = {row.name, *stages[0].names(row)}
            trained = [each for each in study.rows if each.name in names]
            assert len(trained) == 3
            best = max(point_at(result_of(confirmed, each)["curve"], row.alpha)["objective"] for each in trained)
            model = models.pop(row.role)
            assert model["runs"][0].split("/")[-1] in names
            assert (model["objective"], model["alpha"]) == (best, row.alpha)
            assert model["chosen_from"] == row.chosen_from + 2
    assert not models


def test_another_training_or_alpha_says_that_it_was_not_tested(confirmed, run):
    fixed, _ = model_of(confirmed)
    other = next(row.name for row in snapshot(confirmed).trials if row.name != fixed["trial"])
    assert run("test", "study", "--trust-paths")[0] == 0
    code, _, err = run("export", "study", "--to", "same", "--trust-paths", "--trial", fixed["trial"])
    assert code == 0
    assert err.startswith(
        f"{fixed['trial']} at alpha {fixed['alpha']:g}: the model that `test` has fixed and measured."
    )
    for number, words in enumerate((["--trial", other], ["--alpha", "0.35"])):
        code, _, err = run("export", "study", "--to", f"other-{number}", "--trust-paths", *words)
        assert code == 0, err
        assert f"not tested; the study delivers {fixed['trial']} at alpha {fixed['alpha']:g}." in err.splitlines()[0]
        card = (confirmed.parent / f"other-{number}" / "README.md").read_text()
        assert "not tested" in card
        assert "test sets (read" not in card


def test_other_weights_than_those_of_the_ledger_are_refused(confirmed):
    fixed, _ = model_of(confirmed)
    row = next(row for row in snapshot(confirmed).rows if row.training == fixed["runs"][0])
    require_weights_of(confirmed, row, fixed)
    with pytest.raises(StorageError, match="must have the weights that the ledger has fixed, SHA-256 000000000000"):
        require_weights_of(confirmed, row, {**fixed, "sha256": "0" * 64})


def fail(study_dir, name):
    """A training of a confirm that has failed, as the study would have it."""
    plan = json.loads((study_dir / "confirm" / "plan.json").read_text())
    for row in plan["first"]["rows"]:
        if row["training"] == name:
            row["training"] = "gone"
    (study_dir / "confirm" / "plan.json").write_text(json.dumps(plan))
    summary = json.loads((study_dir / "confirm" / "summary.json").read_text())
    summary["failed"] = [f"gone-seed{seed}: diverged, the loss is not finite" for seed in plan["first"]["seeds"]]
    (study_dir / "confirm" / "summary.json").write_text(json.dumps(summary))


def test_a_baseline_without_all_its_seeds_is_named_and_nothing_is_shown(confirmed, run):
    fail(confirmed, "plain")
    code, out, err = run("test", "study", "--json", "--trust-paths")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["missing"] == ["plain"]
    assert summary["shown"] is False
    assert "plain" in {row["name"] for row in summary["model"]["rows"]}  # its search has trained it
    assert summary["model"]["missing"] == []
    report = carft_ray.report("study")
    assert "Without a result, and not compared: plain. So no improvement is shown." in report.numbers["lines"]
    assert "measured higher than" in report.card() or "no improvement" in report.card()
    assert "improves on" not in report.card().split("This model")[0]


def test_a_card_has_no_numbers_of_another_comparison(confirmed):
    """As after a second stage that was stopped: the summary is of the first one."""
    path = confirmed / "confirm" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "seeds": [7, 8]}))
    carft_ray.export("study", "out", trust_paths=True)
    card = (confirmed.parent / "out" / "README.md").read_text()
    assert "with fresh seeds" not in card
    assert "none is a test set" in card


def test_what_a_confirm_and_a_test_have_fixed_stays_when_better_trials_follow(confirmed, run):
    [row] = [row for row in snapshot(confirmed).trials if row.name == read_plan(confirmed)[0].winner]
    assert fixed_trials(log_of(confirmed)) == {row.name}
    assert run("test", "study", "--trust-paths")[0] == 0
    model, _ = model_of(confirmed)
    assert fixed_trials(log_of(confirmed)) >= {row.name, model["trial"].removeprefix("confirm/")}
    recipe = load_recipe(confirmed / "resolved.yaml", ["search.keep_checkpoints=1"])
    retention = Retention(confirmed, recipe, Folder(confirmed), fixed_trials(log_of(confirmed)))
    retention.ended(row)
    retention.ended(replace(row, name="t0009-0000", number=9, objective=1.0))
    retention.keep_best()
    assert (row.place(confirmed) / WEIGHTS).exists()


SUMMARIES = {
    "sets": None,
    "read": "one",
    "reason": 5,
    "elsewhere": [{}],
    "changed_sets": 5,
    "searches_after_a_read": -1,
    "confirmed": "yes",
    "missing": [5],
    "model": {},
}


@pytest.mark.parametrize("key", SUMMARIES)
def test_a_strangers_summary_is_one_message(confirmed, run, key):
    assert run("test", "study", "--trust-paths")[0] == 0
    for path in (confirmed / "test").rglob("summary.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: SUMMARIES[key]}))
    for words in (["report", "study"], ["report", "study", "--card", "text"], ["export", "study", "--to", "out"]):
        code, _, err = run(*words, *(["--trust-paths"] if words[0] == "export" else []))
        assert code == 5, (words, err)
        assert "summary.json" in err
    assert not (confirmed.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": []}, "first.seeds"),
        ({"seeds": [3, 3]}, "seeds must differ"),
        ({"rows": []}, "one of the rows must be the winner"),
    ],
)
def test_a_strangers_plan_is_one_message(confirmed, run, change, words):
    path = confirmed / "confirm" / "plan.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "first": {**plan["first"], **change}}))
    code, _, err = run("report", "study")
    assert (code, words in err) == (5, True), err
    plan["first"]["rows"][0]["more"] = 1
    path.write_text(json.dumps(plan))
    assert run("report", "study")[0] == 5


def test_a_model_whose_weights_are_gone_is_none_and_the_next_best_of_its_values_is(confirmed):
    [row] = [row for row in snapshot(confirmed).trials if row.name == read_plan(confirmed)[0].winner]
    (row.place(confirmed) / WEIGHTS).unlink()
    fixed, standing = model_of(confirmed)
    assert (standing, fixed["trial"].startswith("confirm/")) == ("confirmed", True)
