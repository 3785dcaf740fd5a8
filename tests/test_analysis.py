"""`test --all-trials` judges the rules of selection on the test sets: counted as a read, and it chooses nothing."""

import json
import shutil

import crash_host
import numpy as np
import pytest
import short_sealed
import short_training

from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import accuracy, read_predictions, select
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.test_sets.analysis import regrets_on_test
from carft_ray.study.ledger import read_ledger, require_unread
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, trials

pytestmark = pytest.mark.slow

VALIDATION = ObjectiveSpec("weighted_mean", "id_val", ("a", "b"), 0.4)
TEST = ObjectiveSpec("harmonic", "id_test", ("c",))
POINTS = [(f"t{i}", alpha) for i in range(5) for alpha in (0.4, 0.8)]
NUM_TRIALS, NUM_KEPT = 3, 2


def random_correct(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"id_val": 40, "a": 30, "b": 20, "id_test": 50, "c": 60}
    return {name: rng.random((len(POINTS), n)) < 0.6 for name, n in sizes.items()}


# the table


def test_regrets_agree_with_plain_loops():
    correct = random_correct()
    means = [{name: x[k].mean() for name, x in correct.items()} for k in range(len(POINTS))]
    target = [2 * m["id_test"] * m["c"] / (m["id_test"] + m["c"]) for m in means]
    rules = {
        "id_val": [m["id_val"] for m in means],
        "ood_val": [(m["a"] + m["b"]) / 2 for m in means],
        "objective": [0.4 * m["id_val"] + 0.3 * (m["a"] + m["b"]) for m in means],
        "worst_domain": [min(m["a"], m["b"]) for m in means],
    }
    rules["leave_one_domain_out"] = rules["ood_val"]
    lines = {each.rule: each for each in regrets_on_test(POINTS, correct, VALIDATION, TEST, POINTS[3], 200)}
    assert list(lines) == [*rules, "search", "oracle"]
    for rule, values in rules.items():
        k = int(np.argmax(values))
        found = lines[rule]
        assert (found.name, found.alpha) == POINTS[k]
        assert found.objective == pytest.approx(target[k])
        assert found.regret == pytest.approx(max(target) - target[k])
        assert found.se > 0
    assert lines["leave_one_domain_out"].note == "same as ood_val"
    search, oracle = lines["search"], lines["oracle"]
    assert ((search.name, search.alpha), search.regret) == (POINTS[3], pytest.approx(max(target) - target[3]))
    assert (oracle.regret, oracle.se, oracle.objective) == (0.0, None, pytest.approx(max(target)))
    assert oracle.note.startswith("upper bound")


def test_one_candidate_that_is_best_everywhere_leaves_no_regret():
    correct = {name: np.zeros_like(x) for name, x in random_correct().items()}
    for x in correct.values():
        x[4] = True
    lines = regrets_on_test(POINTS, correct, VALIDATION, TEST, None, 50)
    assert {(each.name, each.alpha, each.regret, each.se or 0.0) for each in lines} == {(*POINTS[4], 0.0, 0.0)}
    assert "search" not in {each.rule for each in lines}


def test_rules_without_an_ood_set_say_so_and_test_images_move_no_pick():
    alone = ObjectiveSpec("weighted_mean", "id_val", ())
    lines = {each.rule: each for each in regrets_on_test(POINTS, random_correct(), alone, TEST, None, 20)}
    for rule in ("ood_val", "worst_domain", "leave_one_domain_out"):
        assert (lines[rule].name, lines[rule].regret) == (None, None)
    other = {**random_correct(), **{name: random_correct(1)[name] for name in ("id_test", "c")}}
    again = {each.rule: each for each in regrets_on_test(POINTS, other, alone, TEST, None, 20)}
    assert [again[rule].name for rule in ("id_val", "objective")] == [lines["id_val"].name, lines["objective"].name]
    assert again["oracle"].objective != lines["oracle"].objective


# the read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished study of three trials, of which two have kept their weights."""
    folder = tmp_path_factory.mktemp("analysis")
    settings = [f"search.keep_checkpoints={NUM_KEPT}", "search.baselines={}"]
    short_sealed.make(folder, short_training, *settings, trials=NUM_TRIALS)
    return folder


@pytest.fixture(scope="module")
def read(folder, tmp_path_factory):
    """A copy of the study, its trials read, and the summary."""
    study = tmp_path_factory.mktemp("read") / "study"
    shutil.copytree(folder / "study", study)
    assert crash_host.call(["test", study, "--all-trials", "--json"]) == 0
    return study, json.loads((study / "test" / "analysis.json").read_text())


@pytest.fixture
def again(read, folder, tmp_path, monkeypatch):
    """A copy of that study, ``study`` in the working directory; no other has read these images."""
    shutil.rmtree(folder / "cache" / "test_reads", ignore_errors=True)
    shutil.copytree(read[0], tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "study"


@pytest.fixture
def run(capsys):
    def call(*words):
        capsys.readouterr()
        code = crash_host.call(words)
        captured = capsys.readouterr()
        assert "Traceback (" not in captured.err
        return code, captured.out, captured.err

    return call


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_trials_with_weights_are_read_at_every_alpha_that_could_be_chosen(folder, read):
    study, summary = read
    kept = [row for row in trials(study) if (study / "trials" / row.name / "fine_tuned.safetensors").exists()]
    assert (len(kept), summary["num_trials"], summary["num_complete"]) == (NUM_KEPT, NUM_KEPT, NUM_TRIALS)
    recipe = load_recipe(study / "resolved.yaml")
    results = {row.name: json.loads((study / "trials" / row.name / "result.json").read_text()) for row in kept}
    assert all({*recipe.search.alpha.measured} <= {*result["chosen_from"]} for result in results.values())
    expected = {
        (name, alpha)
        for name, result in results.items()
        for alpha in {*result["chosen_from"], result["alpha"]}
        if alpha >= recipe.search.alpha.lowest
    }
    assert {(each["name"], each["alpha"]) for each in summary["candidates"]} == expected
    assert f"{NUM_KEPT} of {NUM_TRIALS} complete trials" in "\n".join(summary["lines"])
    assert f"--set search.keep_checkpoints={NUM_TRIALS}" in "\n".join(summary["lines"])
    [entry] = read_ledger(study)
    assert (entry.purpose, entry.sets, entry.reason) == ("analysis", ("id_test", "cartoon", "painting"), "")
    assert summary["sets"] == {"id_test": 15, "cartoon": 10, "painting": 20}
    assert trials(study) == trials(folder / "study")
    before, after = contents(folder / "study"), contents(study)
    changed = {name for name in before | after if before.get(name) != after.get(name) and name != "lock"}
    beside = {name for name in changed if not name.startswith("test/")}
    assert beside == {"ledger.jsonl", "manifest.json", "study.journal"}
    assert not (study / "test" / "summary.json").exists()


def test_the_numbers_are_those_of_the_stored_predictions(read):
    study, summary = read
    spec = objective_spec(load_recipe(study / "resolved.yaml"))
    assert spec.kind == "weighted_mean"
    by_validation, by_test = [], []
    for each in summary["candidates"]:
        table = read_predictions(study / "test" / "read-1" / "trials" / f"{each['name']}.parquet")
        found = {name: accuracy(select(table, name, each["alpha"])) for name in summary["sets"]}
        assert each["accuracies"] == pytest.approx(found)
        by_test.append((found["id_test"] + (found["cartoon"] + found["painting"]) / 2) / 2)
        assert each["objective"] == pytest.approx(by_test[-1])
        stored = read_predictions(study / "trials" / each["name"] / "predictions" / "validation.parquet")
        by_validation.append(sum(accuracy(select(stored, name, each["alpha"])) for name in ("id_val", "sketch")) / 2)
    lines = {each["rule"]: each for each in summary["rules"]}
    best = best_row(trials(study))
    assert (lines["search"]["name"], lines["search"]["alpha"]) == (best.name, best.alpha)
    assert lines["oracle"]["objective"] == pytest.approx(max(by_test))
    assert lines["objective"]["regret"] == pytest.approx(max(by_test) - by_test[int(np.argmax(by_validation))])
    assert all(each["regret"] >= 0 for each in lines.values())


def test_it_counts_as_a_read_for_every_command(run, again, read):
    for words in (["test", "study"], ["test", "study", "--all-trials"], ["resume", "study", "--trials", "+1"]):
        code, out, err = run(*words)
        assert (code, out) == (8, ""), err
        assert "its test sets were read" in err
        assert "--again REASON" in err
    recipe = load_recipe(again / "resolved.yaml", ["search.trials=4"])
    assert require_unread(again, recipe, "it shall go on")
    code, out, err = run("test", "study", "--again", "winner and baselines")
    assert code == 0, err
    assert "Test read 2" in err
    assert "The search was continued once after a test read." in err
    assert json.loads((again / "test" / "analysis.json").read_text()) == read[1]
    code, out, err = run("test", "study", "--all-trials", "--again", "once more", "--json")
    assert code == 0, err
    third = json.loads(out)
    assert (third["read"], third["reason"], third["rules"]) == (3, "once more", read[1]["rules"])
    assert "The search was continued" in "\n".join(third["lines"])
    assert [entry.purpose for entry in read_ledger(again)] == ["analysis", "search went on", "test", "analysis"]


def test_a_killed_analysis_goes_on_and_a_read_of_the_other_kind_is_told_of_it(run, again, read):
    for gone in ("read-1/summary.json", "analysis.json", f"read-1/trials/{read[1]['rules'][0]['name']}.parquet"):
        (again / "test" / gone).unlink()
    code, _, err = run("test", "study")
    assert code == 8
    assert "That read is not finished; continue it: carft-ray test" in err
    code, out, err = run("test", "study", "--all-trials")
    assert code == 0, err
    assert "continuing the read of" in err
    assert "read before" in err
    assert json.loads((again / "test" / "analysis.json").read_text()) == read[1]
    assert len(read_ledger(again)) == 1
    assert "oracle" in out
    assert "upper bound" in out


def test_report_shows_the_table_afterwards(run, again, folder):
    code, out, err = run("report", "study")
    assert code == 0, err
    assert "Analysis, test read 1" in out
    assert "It chooses nothing" in out
    assert "leave_one_domain_out" in out.split("Analysis, test read 1")[1]
    assert "upper bound" in out.split("Analysis, test read 1")[1]
    assert "test sets were read once" in out
    code, out, _ = run("report", folder / "study")
    assert (code, "Analysis" in out) == (0, False)


def test_nothing_else_reads_what_it_has_stored(run, again, folder):
    """Spoiled predictions of the test sets, and none at all, change no choice of any command."""
    for path in again.glob("test/**/*.parquet"):
        path.write_bytes(b"spoiled")
    for words in (
        ["report"],
        ["rescore", "--objective", "worst_domain", "--json"],
        ["ls", "--json"],
        ["status", "--json"],
        ["evaluate", "--json"],
    ):
        found = [run(words[0], study, *words[1:]) for study in ("study", folder / "study")]
        assert [code for code, _, _ in found] == [0, 0], found
        if words[0] == "report":  # which tells of the read, and of nothing else
            told = [out.split("\nAnalysis")[0].replace("were read once", "were read 0 times") for _, out, _ in found]
        else:
            told = [without_place(out) for _, out, _ in found]
        if words[0] == "status":
            assert [json.loads(out)["ledger"]["test_reads"] for _, out, _ in found] == [1, 0]
        assert told[0] == told[1]
    recipe = load_recipe(again / "resolved.yaml")
    with open_study(again, recipe) as study:
        recover_running(study)
        assert best_row(study.rows()) == best_row(trials(folder / "study"))
        assert study.done()


def without_place(out):
    answer = json.loads(out)
    for key in ("study", "name", "times", "written", "folder", "ledger"):
        answer.pop(key, None)
    return answer


def test_lost_weights_of_all_trials_are_told(run, folder, tmp_path):
    shutil.copytree(folder / "study", tmp_path / "study")
    for path in tmp_path.glob("study/trials/*/fine_tuned.safetensors"):
        path.unlink()
    code, _, err = run("test", tmp_path / "study", "--all-trials")
    assert code == 6
    assert "none whose weights are there" in err
    assert read_ledger(tmp_path / "study") == []
