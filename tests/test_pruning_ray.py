"""Cuts over a real local Ray with stand-in trainings: inline, by a group of two workers, and with a killed driver."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import stand_in

from carft_ray.launch.events import TrialFinished
from carft_ray.launch.executors import Runner
from carft_ray.launch.search import run_search
from carft_ray.search.rows import trials

HERE = Path(__file__).parent
SEARCH = {"pruner": {"name": "successive_halving", "first": 0.25}, "baselines": {}, "concurrency": 1}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def workers_find_the_stand_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))


@pytest.fixture
def base_dir(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


def told(study_dir):
    return [(row.number, row.values, row.outcome, row.reason, row.objective) for row in trials(study_dir)]


def test_a_group_of_two_workers_ends_by_itself_when_it_is_cut_and_leaves_no_placement_group(tmp_path, base_dir):
    (base_dir / "modes.json").write_text(json.dumps({"seconds": 1.5}))
    resources = {"executor": "ray-train", "num_workers": 2, "cpus_per_worker": 0.5}
    recipe = stand_in.make_recipe(2, epochs=4, resources=resources, **SEARCH)
    left = []

    def on_event(event):
        if isinstance(event, TrialFinished):
            groups = ray.util.placement_group_table().values()
            left.extend(g for g in groups if "CPU" in str(g["bundles"]) and g["state"] != "REMOVED")

    result = run_search(recipe, base_dir, tmp_path / "study", None, on_event, Runner(stand_in.prepare, stand_in.train))
    assert left == []
    outcomes = [row.outcome for row in result.trials]
    assert set(outcomes) == {"complete", "pruned"}
    for row in result.trials:
        folder = tmp_path / "study" / "trials" / row.name
        assert (folder / "result.json").exists() == (row.outcome == "complete")
        if row.outcome == "pruned":  # cut at a rung and not trained to its end
            assert len((folder / "metrics.jsonl").read_text().splitlines()) < 4
            assert not (folder / "checkpoint").exists()


def test_a_driver_killed_between_two_rungs_cuts_after_it_what_it_would_have_cut(tmp_path, base_dir):
    """Inline, one at a time, so that the order is that of the numbers."""
    (base_dir / "modes.json").write_text(json.dumps({"seconds": 0.8}))

    def driver(study_dir):
        command = [sys.executable, str(HERE / "search_driver.py"), str(study_dir), str(base_dir), "3", "{}", ""]
        return subprocess.Popen(
            [*command, json.dumps(SEARCH)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = driver(tmp_path / "whole")
    output, errors = whole.communicate(timeout=150)
    assert whole.returncode == 0, output + errors
    assert errors == ""
    expected = told(tmp_path / "whole")
    assert {outcome for _, _, outcome, _, _ in expected} == {"complete", "pruned"}

    study_dir = tmp_path / "killed"
    process = driver(study_dir)
    while not any(row.looks.keys() >= {25} and row.number for row in _rows(study_dir)):  # a later trial, first rung
        assert process.poll() is None
        time.sleep(0.3)
    process.kill()
    process.communicate(timeout=60)
    assert any(row.outcome == "running" for row in trials(study_dir))
    process = driver(study_dir)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, output + errors
    assert errors == ""
    assert told(study_dir) == expected


def _rows(study_dir):
    return trials(study_dir) if (study_dir / "study.journal").exists() else []
