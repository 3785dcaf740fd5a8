"""A study in the tools of others: optuna-dashboard on its log, TensorBoard on its folder, asked over HTTP."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import short_training
from logs import commits

from carft_ray.launch.runs.search import run_search
from carft_ray.recipe.loading import load_recipe
from carft_ray.study.rows import baselines, trials

pytestmark = pytest.mark.slow

NUM_TRIALS = 3
OVERRIDES = (
    f"search.trials={NUM_TRIALS}",
    "search.space.kl_weight={low: 0.1, high: 10, log: true}",
    "search.baselines.plain={kl_weight: 0}",
    "train.epochs=2",
    "resources.executor=debug",
)


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    """A finished study of real trainings."""
    folder = tmp_path_factory.mktemp("dashboards")
    recipe = load_recipe(short_training.make(folder), [*OVERRIDES, f"data.cache_dir={folder / 'cache'}"])
    return run_search(recipe, folder / "study").study_dir


@contextlib.contextmanager
def server(log, program, *words):
    """Runs a server of the environment on a free port within the block; yields a function that asks it for JSON."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [str(Path(sys.executable).with_name(program)), *map(str, words), "--port", str(port)]

    def ask(path, content=None):
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield lambda *given: answered(lambda: ask(*given), process, log)
        finally:
            process.terminate()


def answered(ask, process, log, timeout_s=200):
    """Asks until there is an answer: a server needs some seconds to begin."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)


def test_optuna_dashboard_shows_every_trial_with_its_values_and_leaves_the_log_alone(study_dir, tmp_path):
    before = commits(study_dir), sorted(path.name for path in study_dir.iterdir())
    with server(tmp_path / "log", "carft-ray", "dashboard", study_dir) as ask:
        found = {study["study_name"]: study["study_id"] for study in ask("/api/studies")["study_summaries"]}
        assert found.keys() == {"search", "baselines"}
        shown = ask(f"/api/studies/{found['search']}?after=0")
        beside = ask(f"/api/studies/{found['baselines']}?after=0")
    assert (commits(study_dir), sorted(path.name for path in study_dir.iterdir())) == before

    rows = trials(study_dir)
    assert len(rows) == len(shown["trials"]) == NUM_TRIALS
    for row, trial in zip(rows, shown["trials"], strict=True):
        assert (trial["number"], trial["state"]) == (row.number, "Complete")
        assert trial["values"] == [row.objective]
        drawn = {parameter["name"]: parameter["param_internal_value"] for parameter in trial["params"]}
        assert drawn == row.values
        attributes = {attribute["key"]: attribute["value"] for attribute in trial["user_attrs"]}
        assert attributes["name"] == row.name
    assert [trial["values"] for trial in beside["trials"]] == [[row.objective] for row in baselines(study_dir)]


def test_tensorboard_has_a_row_for_every_trial_with_its_values_and_final_metrics(study_dir, tmp_path):
    wanted = [*trials(study_dir), *(row for row in baselines(study_dir) if row.name != "zero_shot")]
    names = ["final/objective", "final/id_accuracy", "final/ood_accuracy", "final/alpha"]
    request = {"startIndex": 0, "sliceSize": 100, "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS"]}
    request["colParams"] = [{"metric": {"tag": name}} for name in names]
    with server(tmp_path / "log", "tensorboard", "--logdir", study_dir, "--load_fast=false") as ask:
        end = time.monotonic() + 120
        while len(groups := ask("/data/plugin/hparams/session_groups", request).get("sessionGroups", [])) < len(wanted):
            assert time.monotonic() < end, groups  # it reads the files after it has begun to answer
            time.sleep(0.2)
        runs = ask("/data/runs")

    assert len(groups) == len(wanted) == NUM_TRIALS + 1
    assert len(runs) == len(wanted)
    shown = {}
    for group in groups:
        [session] = group["sessions"]
        metrics = {value["name"]["tag"]: value.get("value", 0.0) for value in group["metricValues"]}
        shown[Path(session["name"]).parent.name] = (group["hparams"], metrics)
    for row in wanted:
        values, metrics = shown[row.name]
        assert {name: values[name] for name in row.values} == pytest.approx(row.values)
        expected = {**row.metrics, "objective": row.objective, "alpha": row.alpha}
        assert metrics == pytest.approx({name: expected[name.removeprefix("final/")] for name in names})
