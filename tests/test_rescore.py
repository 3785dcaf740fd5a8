"""A study that is ranked anew by another objective, from its stored predictions."""

import json
import shutil

import pytest
import short_sealed
import short_study
import short_training
import stand_in
from study_steps import contents

from carft_ray.errors import HoldOutError, StorageError, UsageError
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import accuracy, read_predictions, select, sets, write_predictions
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.rescore import asked_objective, rescore
from carft_ray.study.opening import open_study
from carft_ray.study.rows import best_first
from carft_ray.training.run import prepare

pytestmark = pytest.mark.slow


def searched(folder, *settings):
    """A study of real trainings of a fraction of a second, made as the search makes it, without Ray."""
    always = [
        f"data.cache_dir={folder / 'cache'}",
        "data.ood_val.fog={source: folder, path: images, domains: [cartoon]}",
        "data.ood_test.night={source: folder, path: images, domains: [painting]}",
        "search.baselines={plain: {kl_weight: 0}, half: {alpha: 0.5}}",
        "search.keep_checkpoints=1",
        "train.epochs=2",
    ]
    recipe = load_recipe(short_sealed.write(folder, short_training), [*always, *settings])
    return short_study.search(folder / "study", recipe)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("profile"), "search.trials=4")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    drawn = ["search.alpha.mode=sample", "search.space.alpha={low: 0.2, high: 1}"]
    return searched(tmp_path_factory.mktemp("sample"), "search.trials=2", *drawn)


@pytest.fixture
def here(tmp_path):
    """The working directory."""
    return tmp_path


@pytest.fixture(params=["profile", "sample"])
def view(request):
    return read_study(request.getfixturevalue(f"{request.param}d"))


def test_the_own_objective_gives_exactly_what_the_search_stored(view):
    answer = rescore(view, asked_objective(view.recipe))
    assert answer["objective"] == answer["own_objective"]
    rows = {row.name: row for row in (*view.baselines, *view.trials)}
    assert [row["name"] for row in answer["baselines"]] == ["plain", "half", "zero_shot"]
    for row in (*answer["baselines"], *answer["trials"]):
        stored = rows[row["name"]]
        assert (row["objective"], row["alpha"]) == (stored.objective, stored.alpha)
        assert (row["old_objective"], row["old_alpha"]) == (stored.objective, stored.alpha)
        assert row["id_accuracy"] == stored.metrics["id_accuracy"]
        assert row["ood_accuracy"] == stored.metrics["ood_accuracy"]
        assert row["old_rank"] == row["new_rank"]
    assert [row["new_rank"] for row in answer["trials"]] == list(range(1, len(view.trials) + 1))
    assert answer["trials"][0]["name"] == view.best.name
    assert all(row["new_rank"] is None for row in answer["baselines"])
    _, half, zero_shot = rescore(view, asked_objective(view.recipe, "worst_domain"))["baselines"]
    assert (half["alpha"], zero_shot["alpha"]) == (0.5, 0.0)  # a fixed alpha stays what it is


@pytest.mark.parametrize(
    ("asked", "spec"),
    [
        (("harmonic", None, None), ObjectiveSpec("harmonic", "id_val", ("sketch", "fog"))),
        (("worst_domain", None, "fog"), ObjectiveSpec("worst_domain", "id_val", ("fog",))),
        ((None, 0.9, " fog , sketch"), ObjectiveSpec("weighted_mean", "id_val", ("sketch", "fog"), 0.9)),
        ((None, 0.0, "sketch,sketch"), ObjectiveSpec("weighted_mean", "id_val", ("sketch",), 0.0)),
    ],
)
def test_another_objective_is_that_of_the_stored_accuracies(view, asked, spec):
    assert asked_objective(view.recipe, *asked) == spec
    rows, stored = rescore(view, spec)["trials"], [row.name for row in best_first(view.trials)]
    assert [row["old_rank"] for row in rows] == [stored.index(row["name"]) + 1 for row in rows]
    assert [row["expected"] for row in rows] == sorted((row["expected"] for row in rows), reverse=True)
    for row in rows:
        trial = next(each for each in view.trials if each.name == row["name"])
        table = read_predictions(trial.place(view.study_dir) / "predictions" / "validation.parquet")
        values = {
            alpha: spec.value({name: accuracy(select(table, name, alpha)) for name in sets(table)})
            for alpha in {*table["alpha"].to_pylist()}
        }
        assert row["alpha"] == trial.values.get("alpha", row["alpha"]) > 0
        assert row["objective"] == pytest.approx(values[row["alpha"]], abs=1e-12)
        assert row["objective"] <= max(value for alpha, value in values.items() if alpha > 0) + 1e-12
        assert row["id_accuracy"] == accuracy(select(table, "id_val", row["alpha"]))


def test_a_test_set_is_refused_with_one_message(profiled):
    for asked in ("night", "id_test", "ood_test", "fog,night", "nowhere,id_test"):
        with pytest.raises(HoldOutError, match="must be validation sets: no selection may use a test set") as error:
            asked_objective(read_study(profiled).recipe, sets=asked)
        assert (error.value.exit_code, len(error.value.problems)) == (8, 1)


def test_all_wrong_words_are_told_at_once_with_the_nearest_match(profiled):
    recipe = read_study(profiled).recipe
    with pytest.raises(UsageError) as error:
        asked_objective(recipe, "harmonik", float("nan"), "sketsh,id_val")
    text = str(error.value)
    assert "--objective: must be a kind of objective, but got 'harmonik'; did you mean 'harmonic'?" in text
    assert "--id-weight: must be a number from 0 to 1, but got nan" in text
    assert "but got 'sketsh'; did you mean 'sketch'? (allowed: sketch, fog)" in text
    assert "id_val is always in, but got 'id_val' (allowed: sketch, fog)" in text
    with pytest.raises(UsageError, match="--sets: must name an OOD validation set, but got ' ,'"):
        asked_objective(recipe, sets=" ,")


def test_missing_damaged_and_older_predictions_are_named_and_zero_shot_is_evaluated_anew(profiled, tmp_path):
    view = read_study(shutil.copytree(profiled, tmp_path / "study"))
    path = view.trials[0].place(view.study_dir) / "predictions" / "validation.parquet"
    sound = path.read_bytes()
    for spoil in (lambda: path.write_bytes(b"nonsense"), path.unlink):
        spoil()
        with pytest.raises(StorageError, match=str(path)):
            rescore(view, objective_spec(view.recipe))
    path.write_bytes(sound)
    prepared = view.study_dir / "prepared"
    path, content = prepared / "zero_shot.parquet", json.loads((prepared / "prepared.json").read_text())
    table = read_predictions(path)
    write_predictions(path, table.replace_schema_metadata({**table.schema.metadata, b"format_version": b"1"}))
    (prepared / "prepared.json").write_text(json.dumps({**content, "key": content["key"].split(": ", 1)[1]}))
    with pytest.raises(StorageError, match=f"{path}: format_version of predictions must be 4, but got 1"):
        rescore(view, objective_spec(view.recipe))
    again = prepare(view.recipe, prepared, lambda text: None)
    assert read_predictions(path).schema == table.schema
    assert again["objective"] == pytest.approx(content["metrics"]["objective"])


def test_the_command_shows_ranks_and_changes_nothing(run, profiled):
    before = contents(profiled)
    code, out, err = run("rescore", profiled, "--objective", "worst_domain", "--sets", "fog")
    assert code == 0, err
    head, _, _, *rows = out.splitlines()
    assert head.startswith("Objective: worst_domain. The lowest accuracy of fog counts;")
    assert [row.split()[0] for row in rows[:3]] == ["plain", "half", "zero_shot"]
    assert len(rows) == 7
    assert max(map(len, rows)) <= 80
    assert "The study was not changed." in err
    for only in ("fog", "sketch"):  # a study keeps the weights of its best
        words = (profiled, "--objective", "worst_domain", "--sets", only)
        first = json.loads(run("rescore", *words, "--json")[1])["trials"][0]["name"]
        has_weights = (profiled / "trials" / first / "attempt-1" / "fine_tuned.safetensors").exists()
        assert (f"carft-ray evaluate {profiled} --trial {first}" in run("rescore", *words)[2]) == has_weights
    answer = json.loads(run("rescore", profiled, "--objective", "harmonic", "--id-weight", "0.2", "--json")[1])
    assert (answer["objective"]["kind"], answer["objective"]["id_weight"]) == ("harmonic", None)
    code, out, err = run("rescore", profiled, "--sets", "fog,night")
    assert (code, out) == (8, "")
    assert "--sets: must be validation sets: no selection may use a test set" in err
    assert contents(profiled) == before


def test_a_study_without_a_finished_trial_has_no_ranks(run, tmp_path):
    recipe = stand_in.make_recipe(2)
    with open_study(tmp_path / "empty", recipe):
        (tmp_path / "empty" / "resolved.yaml").write_text(dump_recipe(recipe))
    code, out, err = run("rescore", tmp_path / "empty")
    assert (code, out) == (6, "")
    assert err.startswith(f"error: {tmp_path / 'empty'}: must have a finished trial, but got none")
