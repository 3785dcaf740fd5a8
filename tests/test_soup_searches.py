"""Soups of the trainings of replayed searches (``benchmarks.soup_searches``), with real trainings of a tiny model."""

import json

import pyarrow.parquet as pq
import pytest
import short_sealed
import short_training

from benchmarks import seed_table, soup_searches, soups
from carft_ray.recipe.loading import dump_recipe, load_recipe

pytestmark = [
    pytest.mark.whole,
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.filterwarnings("ignore:The balance properties of Sobol"),
]


def test_soups_of_replayed_searches_are_made_once_and_read_without_weights(tmp_path, monkeypatch, capsys):
    path = short_sealed.write(tmp_path, short_training)
    sealed = [f"data.{name}.part=[0.2, 1]" for name in ("id_test", "ood_test.cartoon", "ood_test.painting")]
    short = ["train.epochs=1", "search.alpha.grid=[0, 0.5, 1]", "evaluate.every_epochs=0"]
    recipe = load_recipe(path, [*short_sealed.settings(tmp_path, 4), *sealed, *short])
    path.write_text(dump_recipe(recipe))
    for module in (seed_table, soup_searches):
        monkeypatch.setattr(module, "TABLES", tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    out = ["--processes", "1"]
    assert seed_table.main([str(path), "--out", str(tmp_path / "out"), "--configurations", "6", *out]) == 0
    words = [str(path), "--trainings", str(tmp_path / "out"), "--searches", "2", "--length", "4", "--tests", "2", *out]
    assert soups.main(words) == 0
    first = capsys.readouterr().out
    assert "| no repeats: greedy | 2 |" in first
    assert "test sets, % |" in first
    made = tmp_path / "tables" / "short-soups.parquet"
    was = made.read_bytes()
    for folder in (tmp_path / "out", tmp_path / "images", tmp_path / "model"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    assert soups.main(words) == 0
    assert capsys.readouterr().out.endswith(first.splitlines()[-1] + "\n")
    assert made.read_bytes() == was
    for row in pq.read_table(made).to_pylist():
        members = json.loads(row["members"])
        assert {tuple(each) for each in json.loads(row["used"])} <= {tuple(each) for each in members}
        [best] = [each for each in row["curve"] if each["alpha"] == row["alpha"]]
        assert best["objective"] == row["objective"] == max(each["objective"] for each in row["curve"] if each["alpha"])
