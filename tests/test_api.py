"""The Python API: its functions do what the commands do, and a study is read as typed tables; nothing is printed."""

import doctest
import inspect
import json
import logging
import shutil
import subprocess
import sys
import threading
from unittest import mock

import own_functions
import pyarrow as pa
import pytest
import short_training
import typer.main
from logs import commits, holding, rewrite
from test_debug import numbers as results

import carft_ray
from carft_ray.api import actions, checks, studies
from carft_ray.cli import app
from carft_ray.data import sets
from carft_ray.errors import DataError, RecipeError, UsageError
from carft_ray.evaluation.metrics import wilson
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.launch.events import Note, Started, TrialEpoch, TrialFinished, TrialStep
from carft_ray.recipe.written import parse_yaml
from carft_ray.study.training import TrialRow, TrialSpec
from carft_ray.training import shared_inputs
from carft_ray.ui import notebook, progress


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    short_training.make(folder)
    return folder


@pytest.fixture(scope="module")
def overrides(here):
    short = {"resources.executor": "debug", "train.epochs": 1, "search.trials": 2}
    return {**short, "search.baselines": {"fine_tuning": {"kl_weight": 0}}, "data.cache_dir": here / "cache"}


@pytest.fixture(scope="module")
def original(here, overrides):
    return carft_ray.search(here / "recipe.yaml", here / "studies" / "quickstart", overrides=overrides, progress=False)


@pytest.fixture
def study_dir(original, tmp_path):
    return shutil.copytree(original.path, tmp_path / "study")


@pytest.mark.slow
def test_a_path_a_dictionary_and_a_recipe_are_one_recipe(here, monkeypatch):
    monkeypatch.chdir(here)
    written = parse_yaml((here / "recipe.yaml").read_text(), "recipe.yaml").value
    by_path = carft_ray.load_recipe("recipe.yaml", {"train.epochs": 2})
    assert by_path == carft_ray.load_recipe(by_path) == carft_ray.load_recipe(here / "recipe.yaml", ["train.epochs=2"])
    assert carft_ray.load_recipe(by_path, {"data.cache_dir": "\U0001f4f7"}).data.cache_dir == str(here / "\U0001f4f7")
    train = {**written["data"]["train"], "path": here / "images", "domains": ("photo",)}  # as Python writes them
    content = {**written, "data": {**written["data"], "train": train}, "train": {**written["train"], "epochs": 2}}
    assert by_path == carft_ray.load_recipe(content)
    with pytest.raises(RecipeError) as caught:
        carft_ray.load_recipe({**written, "train": {"learning_rate": -1.0, "epoch": 3}}, {"search.trials": 0})
    places = [problem.place for problem in caught.value.problems]
    assert {*places} == {"train.epoch", "train.learning_rate", "--set search.trials=0"}
    assert "did you mean 'epochs'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("command", [carft_ray.search, carft_ray.train])
def test_after_a_kill_before_the_recipe_was_written_the_same_call_goes_on(
    here, overrides, study_dir, tmp_path, command
):
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(study_dir / "manifest.json", killed)
    (killed / ".manifest.json.12-0f.tmp").write_text("half of")
    shutil.copytree(study_dir / "log", killed / "log")
    rewrite(killed, commits(killed)[:1])
    found = command(here / "recipe.yaml", killed, overrides=overrides, progress=False)
    assert isinstance(found, carft_ray.Study) or found.numbers["objective"]
    assert not list(killed.rglob("*.tmp"))


def test_a_recipe_that_was_changed_in_python_is_checked_again_and_warnings_are_logged_once(here, caplog):
    recipe = carft_ray.load_recipe(here / "recipe.yaml")
    gone = recipe.data.train.model_copy(update={"path": str(here / "nowhere")})
    with pytest.raises(DataError, match="nowhere"):
        carft_ray.load_recipe(recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": gone})}))
    train = recipe.train.model_copy(update={"epochs": 0})
    with pytest.raises(RecipeError, match=r"train\.epochs"):
        carft_ray.search(recipe.model_copy(update={"train": train}), here / "never")
    assert not (here / "never").exists()
    with caplog.at_level(logging.WARNING, "carft_ray"):
        carft_ray.load_recipe(carft_ray.load_recipe(here / "recipe.yaml", {"train.ema_decay": 0}))
    assert len([record for record in caplog.records if "ema_decay" in record.getMessage()]) == 1


@pytest.mark.slow
def test_a_search_is_that_of_the_command_line_bit_for_bit(run, here, original, overrides):
    words = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    code, out, _ = run("search", here / "recipe.yaml", "--study", here / "by_command", *words, "--json")
    assert code == 0
    assert results(here / "by_command") == results(original.path)
    by_command = json.loads(out)
    for answer in (by_command, numbers := json.loads(json.dumps(original.numbers))):
        for row in (answer["best"], *answer["rows"]):
            del row["name"], row["elapsed_s"], row["started"]
        for key in ("study", "elapsed_s", "best_recipe", "figure"):
            del answer[key]
        answer["lines"] = [line for line in answer["lines"] if not line.startswith("Best: ")]
    assert by_command == numbers


@pytest.mark.slow
def test_a_search_prints_nothing_and_gives_a_study_that_displays_itself(original, here, overrides, tmp_path, capsys):
    again = carft_ray.search(here / "recipe.yaml", original.path, overrides=overrides, progress=False)
    assert capsys.readouterr() == ("", "")
    assert again.numbers["new_trials"] == 0
    assert isinstance(again, carft_ray.Study)
    assert again.best.name in str(again)
    assert again.best.name in again._repr_html_()
    assert again.lines[0].startswith(f"Best: {again.best.name}, expected ")
    assert again.lines[1].startswith("8 more trainings are worth about ")
    said = "Measured numbers of the best trial helped to choose it, so they are too high; none is from a test set."
    assert again.lines[-1] == said
    figure = original.figure
    assert "<svg" in figure._repr_svg_()
    assert figure.save(tmp_path / "figure.svg").read_bytes() == figure.svg
    assert original.best.name in carft_ray.open_study(original.path)._repr_html_()


@pytest.mark.slow
def test_a_training_is_measured_again_and_exported(here, overrides, tmp_path, capsys):
    here = shutil.copytree(here, tmp_path / "here", ignore=shutil.ignore_patterns("studies"))
    trained = carft_ray.train(here / "recipe.yaml", tmp_path / "run", overrides=overrides, progress=False)
    assert capsys.readouterr() == ("", "")
    result = json.loads((short_training.place_in(tmp_path / "run") / "result.json").read_text())
    assert {key: trained.numbers[key] for key in result} == result
    assert carft_ray.evaluate(tmp_path / "run").numbers["metrics"] == pytest.approx(result["metrics"])
    exported = carft_ray.export(tmp_path / "run", tmp_path / "model", alpha=0.5)
    assert (exported.alpha, exported.folder, [*exported.formats]) == (0.5, tmp_path / "model", ["open_clip"])
    again = carft_ray.evaluate(tmp_path / "run")
    low, high = wilson(round(15 * again.numbers["metrics"]["id_accuracy"]), 15)
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in str(again)
    (here / "images" / "photo_val" / "star" / "0.png").unlink()
    with pytest.raises(DataError, match=r"14 images instead of 15; photo_val/star/0\.png is missing"):  # looks again
        carft_ray.evaluate(tmp_path / "run")


@pytest.mark.slow
def test_a_report_has_numbers_page_and_card_and_writes_nothing_unasked(study_dir, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")}
    report = carft_ray.report(study_dir)
    assert report.numbers["best"]["name"] == carft_ray.open_study(study_dir).best.name
    assert str(report) == "\n".join(report.numbers["lines"])
    assert report._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')
    assert "sandbox=" in report._repr_html_()
    assert report.card().count("\n") >= 5
    with pytest.raises(UsageError, match="did you mean 'latex'"):
        report.card("latx")
    assert {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")} == before
    assert report.save(tmp_path / "page.html").read_text().lower().startswith("<!doctype html")
    assert report.save() == study_dir / "report.html"


@pytest.mark.slow
def test_wrong_use_is_an_exception_of_the_command(study_dir, tmp_path, here):
    for use, error, message in (
        (lambda: carft_ray.open_study(tmp_path / "studi"), UsageError, "did you mean"),
        (lambda: carft_ray.report(tmp_path), UsageError, "must be a study"),
        (lambda: carft_ray.resume(study_dir, 1), UsageError, "must be at least 2"),
        (lambda: carft_ray.evaluate(study_dir, trial=99), UsageError, "a trial or baseline, but got '99'"),
        (lambda: carft_ray.evaluate(study_dir, alpha=1.5), UsageError, r"must be from 0 to 1, but got 1\.5"),
        (lambda: carft_ray.open_study(study_dir).metrics("fine_tunimg"), UsageError, "did you mean 'fine_tuning'"),
        (lambda: carft_ray.confirm(study_dir, seeds=1), UsageError, "must be at least 2, but got 1"),
        (lambda: carft_ray.search(here / "recipe.yaml", study_dir), RecipeError, "baselines"),
        (lambda: carft_ray.resume(study_dir, adress="auto"), TypeError, "unexpected keyword argument 'adress'"),
    ):
        with pytest.raises(error, match=message):
            use()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_fine_tuning_of_ones_own_is_searched_resumed_and_confirmed(here, overrides, tmp_path):
    calls = []

    def mine(values, context):
        calls.append(values["learning_rate"])
        return own_functions.few_steps(values, context)

    found = carft_ray.search(here / "recipe.yaml", tmp_path / "own", overrides=overrides, train=mine, progress=False)
    assert len(calls) == 3  # with the baseline
    assert calls[1:] == found.trials()["learning_rate"].to_pylist()
    with pytest.raises(UsageError, match="names code that a training would run"):
        carft_ray.resume(tmp_path / "own", "+1", progress=False)
    longer = carft_ray.resume(tmp_path / "own", "+1", train=mine, progress=False)
    assert (len(calls), longer.numbers["new_trials"]) == (4, 1)
    confirmed = carft_ray.confirm(tmp_path / "own", top=1, seeds=2, train=mine, progress=False)
    assert confirmed.numbers == json.loads((tmp_path / "own" / "confirm" / "summary.json").read_text())
    assert longer.best.name in confirmed._repr_html_()
    assert longer.best.name in str(confirmed)
    assert len(calls) == 8  # of the best, and of the baseline
    assert carft_ray.evaluate(tmp_path / "own").numbers["name"] == f"own/{longer.best.name}"


@pytest.mark.parametrize("verb", ["search", "resume", "confirm", "train", "evaluate", "export", "report"])
def test_every_option_of_a_command_has_its_parameter(verb):
    """Those that a recipe has as a key are overrides in Python; what is printed is no matter of a function."""
    in_recipe = {"set_", "method", "executor", "num_workers", "wall_time", "budget"}
    of_the_terminal = {"json_", "debug", "details", "help"}
    of_the_page = {"html", "card", "tables", "out"} if verb == "report" else set()
    renamed = {"format_": "formats", "no_ablation": "ablation"}
    options = {each.name for each in typer.main.get_command(app).commands[verb].params}
    parameters = {*inspect.signature(getattr(carft_ray, verb)).parameters}
    if verb == "resume":
        parameters |= {*inspect.signature(carft_ray.search).parameters}
    asked = options - in_recipe - of_the_terminal - of_the_page
    assert {renamed.get(name, name) for name in asked} <= parameters


@pytest.mark.slow
def test_trials_and_baselines_are_tables_of_typed_columns(original):
    study = carft_ray.open_study(str(original.path))
    table = study.trials()
    results = [json.loads(path.read_text()) for path in sorted(original.path.glob("trials/*/*/result.json"))]
    assert table.num_rows == len(results) == 2
    assert table.column_names[:14] == [
        *("number", "name", "outcome", "objective", "expected", "alpha", "repeat_of", "elapsed_s", "reason"),
        "learning_rate",
        *("accuracy/id_val", "accuracy/sketch", "id_accuracy", "ood_accuracy"),
    ]
    assert table["learning_rate"].to_pylist() == [result["train"]["learning_rate"] for result in results]
    assert table["ood_accuracy"].to_pylist() == [result["metrics"]["ood_accuracy"] for result in results]
    assert {str(table.schema.field(name).type) for name in ("objective", "learning_rate", "id_accuracy")} == {"double"}
    assert study.baselines.equals(study.trials(kind="baseline"))
    rows = {row["name"]: (row["alpha"], row["kl_weight"]) for row in study.baselines.to_pylist()}
    assert (rows.keys(), rows["zero_shot"], rows["fine_tuning"][1]) == ({"zero_shot", "fine_tuning"}, (0.0, None), 0.0)
    with pytest.raises(ValueError, match="'trial' or 'baseline', but got 'trials'"):
        study.trials("trials")


def test_values_of_several_kinds_share_a_column():
    rows = [TrialRow("trial", n, f"t{n}", values, 1, "complete") for n, values in enumerate(({"a": 1}, {"a": 0.5}, {}))]
    assert studies.rows_table(rows)["a"].to_pylist() == [1.0, 0.5, None]
    rows.append(TrialRow("trial", 3, "t3", {"a": "auto"}, 1, "complete"))
    assert studies.rows_table(rows)["a"].to_pylist() == ["1", "0.5", None, "auto"]
    assert studies.rows_table([]).schema.field("objective").type == pa.float64()


@pytest.mark.slow
def test_best_metrics_and_predictions_belong_together_also_while_a_search_runs(study_dir):
    with holding(study_dir):
        before = {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")}
        study = carft_ray.open_study(study_dir)
        best = study.best
        assert best.expected == max(study.trials()["expected"].to_pylist())
        assert study.metrics(best.name) == study.metrics(str(best.number)) == best.metrics
        path = study_dir / "trials" / best.name / "attempt-1" / "predictions" / "validation.parquet"
        assert study.predictions(best.name).equals(read_predictions(path))
        assert set(study.predictions("zero_shot")["alpha"].to_pylist()) == {0.0}
        assert study.recipe.train.epochs == 1
        assert {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")} == before


@pytest.mark.slow
def test_nothing_heavy_is_loaded_until_a_function_needs_it(original, here):
    code = (
        "import sys, carft_ray\n"
        "print({'torch', 'ray', 'optuna', 'pyarrow', 'numpy', 'pydantic', 'rich'} & {*sys.modules})\n"
        f"carft_ray.search, carft_ray.load_recipe({str(here / 'recipe.yaml')!r})\n"
        f"study = carft_ray.open_study({str(original.path)!r})\n"
        "study.best, study.predictions('zero_shot'), study.recipe\n"
        "print({'torch', 'ray', 'matplotlib', 'plotly', 'IPython'} & {*sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_a_search_and_a_training_are_one_output_of_a_notebook(tmp_path, monkeypatch, capsys):
    assert not notebook.in_notebook()
    ipython = mock.Mock(HTML=str)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    assert notebook.in_notebook()

    def versions():
        """What each output has shown, one after the other."""
        return [call.args[0] for call in ipython.mock_calls if call[0] in ("display", "display().update")]

    with progress.search_shown(True, tmp_path, 4) as on_event:
        on_event(Note("a journal was mended"))
        on_event(Started(8, 0, 2, "2 CPUs"))
        for number in range(8):
            metrics = {"id_accuracy": 0.1 * number, "ood_accuracy": 0.1 * number}
            found = {"alpha": 0.5, "objective": 0.1 * number, "metrics": metrics}
            row = TrialRow("trial", number, f"t{number:04d}-abcd", {"learning_rate": 1e-4}, 1, "complete", **found)
            on_event(TrialFinished(row, is_best=True))
    assert ipython.display.call_count == 1
    assert len(versions()) <= 4  # at most two in a second
    for text in ("warning: a journal was mended", "8 of 8 trials finished", "best 70.0 % (t0007-abcd)"):
        assert text in versions()[-1]
    step = {"epoch": 1, "step": 3, "num_steps": 9, "loss": 1.0, "ce": 0.5, "kl": 0.1, "learning_rate": 1e-4}
    with progress.training_shown(True) as on_event:
        spec = TrialSpec("trial", 0, "train", {}, 1)
        on_event(TrialStep(spec, {**step, "images_per_s": 10.0}))
        assert "3/9" in versions()[-1]
        for epoch in range(1, 9):
            on_event(TrialEpoch(spec, {**step, "epoch": epoch, "context_entropy": 1.0, "images_per_s": 10.0}))
    assert ipython.display.call_count == 2
    assert versions()[-1].count("context entropy") == notebook.NUM_LINES
    assert "epoch 8: loss 1.000" in versions()[-1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_examples_of_the_modules_give_what_they_say(original, here, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    found = doctest.testmod(studies)
    assert (found.failed, found.attempted) == (0, 7)
    recipe = (here / "recipe.yaml").read_text().replace("path: images", f"path: {here / 'images'}")
    recipe = recipe.replace("local-dir:model", f"local-dir:{here / 'model'}").replace("epochs: 3", "epochs: 1")
    (tmp_path / "recipe.yaml").write_text(f"{recipe}resources: {{executor: debug}}\n")
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(actions)
    assert (found.failed, found.attempted) == (0, 5)


def test_two_threads_run_commands_of_their_own_and_what_is_open_is_forgotten_after_both(monkeypatch):
    forgotten, first, second = [], threading.Event(), threading.Event()
    monkeypatch.setattr(checks, "require_versions", lambda: None)
    monkeypatch.setattr(shared_inputs, "forget_inputs", lambda: forgotten.append(None))
    listings = []

    def longer():
        with checks.command():
            listings.append(sets._kept.get())
            first.set()
            second.wait(60)

    thread = threading.Thread(target=longer)
    thread.start()
    assert first.wait(60)
    with checks.command(), checks.command():  # the second one belongs to the first
        listings.append(sets._kept.get())
    assert forgotten == []
    second.set()
    thread.join()
    assert listings[1] is not None
    assert listings[0] is not listings[1]
    assert len(forgotten) == 1
