"""The Python API reads a study: typed tables, nothing locked or written, nothing heavy loaded."""

import doctest
import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pytest
import short_study
import short_training
from logs import holding

import carft_ray
from carft_ray.api import studies
from carft_ray.errors import StorageError, UsageError
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.outcome import TrialRow


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    here = tmp_path_factory.mktemp("original")
    overrides = [
        f"data.cache_dir={here / 'cache'}",
        "train.epochs=1",
        "search.baselines={fine_tuning: {kl_weight: 0}, bf16: {precision: bf16}}",
    ]
    recipe = load_recipe(short_training.make(here), overrides)
    return short_study.search(here / "studies" / "quickstart", recipe)


@pytest.fixture
def study_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "study")


@pytest.mark.slow
def test_the_example_of_the_module_gives_what_it_says(original, monkeypatch):
    monkeypatch.chdir(original.parents[1])
    found = doctest.testmod(studies)
    assert (found.failed, found.attempted) == (0, 7)


@pytest.mark.slow
def test_the_table_of_trials_has_values_and_metrics_as_typed_columns(original):
    table = carft_ray.open_study(original).trials()
    results = [json.loads(path.read_text()) for path in sorted(original.glob("trials/*/*/result.json"))]
    assert table.num_rows == len(results) == 2
    assert table.column_names == [
        *("number", "name", "outcome", "objective", "alpha", "elapsed_s", "reason"),
        "learning_rate",
        *("accuracy/id_val", "accuracy/sketch", "id_accuracy", "ood_accuracy"),
        *[name for name in table.column_names if name not in set(table.column_names[:13])],
    ]
    assert table["objective"].to_pylist() == [result["objective"] for result in results]
    assert table["learning_rate"].to_pylist() == [result["train"]["learning_rate"] for result in results]
    assert table["ood_accuracy"].to_pylist() == [result["metrics"]["ood_accuracy"] for result in results]
    assert table["reason"].to_pylist() == [None, None]
    assert {str(table.schema.field(name).type) for name in ("objective", "learning_rate", "id_accuracy")} == {"double"}


@pytest.mark.slow
def test_baselines_are_a_table_too_with_null_where_a_row_has_no_value(original):
    study = carft_ray.open_study(str(original))
    table = study.baselines
    assert table.equals(study.trials(kind="baseline"))
    rows = {row["name"]: row for row in table.to_pylist()}
    assert set(rows) == {"zero_shot", "fine_tuning", "bf16"}
    assert (rows["zero_shot"]["alpha"], rows["zero_shot"]["kl_weight"]) == (0.0, None)
    assert (rows["fine_tuning"]["kl_weight"], rows["bf16"]["precision"]) == (0.0, "bf16")
    with pytest.raises(ValueError, match="'trial' or 'baseline', but got 'trials'"):
        study.trials("trials")


def test_values_of_several_kinds_share_a_column():
    rows = [TrialRow("trial", n, f"t{n}", values, 1, "complete") for n, values in enumerate(({"a": 1}, {"a": 0.5}, {}))]
    assert studies.rows_table(rows)["a"].to_pylist() == [1.0, 0.5, None]
    rows.append(TrialRow("trial", 3, "t3", {"a": "auto"}, 1, "complete"))
    assert studies.rows_table(rows)["a"].to_pylist() == ["1", "0.5", None, "auto"]
    assert studies.rows_table([]).schema.field("objective").type == pa.float64()


def test_best_metrics_and_predictions_belong_together(original):
    study = carft_ray.open_study(original)
    best = study.best
    assert best.objective == max(study.trials()["objective"].to_pylist())
    assert study.metrics(best.name) == study.metrics(str(best.number)) == best.metrics
    path = original / "trials" / best.name / "attempt-1" / "predictions" / "validation.parquet"
    assert study.predictions(best.name).equals(read_predictions(path))
    zero_shot = study.predictions("zero_shot")
    assert set(zero_shot["alpha"].to_pylist()) == {0.0}
    assert study.recipe.train.epochs == 1


def test_a_study_that_is_being_searched_can_be_read(study_dir):
    with holding(study_dir):
        before = {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")}
        study = carft_ray.open_study(study_dir)
        assert study.trials().num_rows == 2
        assert study.metrics("0")
        assert {path: path.stat().st_mtime_ns for path in study_dir.rglob("*")} == before


def test_wrong_use_is_told_in_words(study_dir, tmp_path):
    with pytest.raises(UsageError, match="did you mean"):
        carft_ray.open_study(tmp_path / "studi")
    study = carft_ray.open_study(study_dir)
    with pytest.raises(UsageError, match="did you mean 'fine_tuning'"):
        study.metrics("fine_tunimg")
    next(study_dir.glob("trials/t0000*/*/result.json")).unlink()
    with pytest.raises(StorageError, match="must be the file that the study has recorded, but got none"):
        study.predictions("0")
    (study_dir / "log" / "00000003").write_text("no journal\n{}\n")
    with pytest.raises(StorageError, match="00000003: must be a whole commit"):
        study.trials()


@pytest.mark.slow
def test_importing_the_package_and_reading_load_nothing_heavy(original):
    code = (
        "import sys, carft_ray\n"
        "heavy = lambda: [n for n in ('torch', 'ray', 'optuna', 'pyarrow', 'numpy') if n in sys.modules]\n"
        "print(heavy(), carft_ray.__version__)\n"
        f"study = carft_ray.open_study({str(original)!r})\n"
        "study.best, study.predictions('zero_shot'), study.recipe\n"
        "print([n for n in heavy() if n in ('torch', 'ray')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [f"[] {carft_ray.__version__}", "[]"]


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_studdy'"):
        _ = carft_ray.open_studdy
