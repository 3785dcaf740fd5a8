"""Searches over a real local Ray with stand-in trainings. Each test ends the Ray that it started."""

import json
import os
import signal
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest import mock

import crash_host
import pytest
import ray
import stand_in
from killed_searches import driver, finish, finished
from study_steps import failed, searching

from carft_ray.errors import CarftError, ClusterError, DataError, NoSuccessfulTrialError
from carft_ray.launch.cluster import cluster
from carft_ray.launch.cluster.cluster import running_ray
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Started, TrialFinished
from carft_ray.launch.workers.runtime import Runner
from carft_ray.results.figure import figure_at_the_end
from carft_ray.study.rows import best_row
from carft_ray.study.snapshot import snapshot

RUNNER = Runner(stand_in.prepare, stand_in.train)
HALVING = {"pruner": {"name": "successive_halving", "first": 0.25}, "baselines": {}, "max_concurrent_trials": 1}


@pytest.fixture(autouse=True)
def workers_find_the_stand_in(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", crash_host.PYTHONPATH)


@pytest.mark.slow
def test_an_inline_search_ends_with_a_best_trial_whatever_its_trials_do(tmp_path):
    stand_in.tell(
        tmp_path, **{"1": "raise", "2": "nan", "3": "diverge", "4": "die_once", "5": "raise_once", "6": "slow_end"}
    )
    study_dir = tmp_path / "study"
    output = finished(driver(study_dir, 8))
    # nothing of Ray's reaches the terminal
    known = ("Preparing", "Decided", "Started", "Trial", "Baseline", "Note", "best")
    assert [line for line in output.splitlines() if not line.startswith(known)] == []
    assert output.splitlines()[-1].endswith("new 8")
    rows = snapshot(study_dir).trials
    assert [row.outcome for row in rows] == ["complete", "error", "diverged", "diverged"] + ["complete"] * 4
    assert [row.attempt for row in rows] == [1, 2, 1, 1, 2, 2, 1, 1]
    assert rows[1].reason == "RuntimeError: the stand-in was told to raise"
    assert "Traceback" in (study_dir / "trials" / rows[1].name / "log.txt").read_text()
    assert rows[2].reason == "objective is nan"
    assert not (study_dir / "_tune").exists()
    assert not (study_dir / "stop").exists()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray, "init", None)  # nothing is left to do, so no Ray is started
        again = run_search(Plan(stand_in.make_recipe(8, epochs=4), study_dir, None, runner=RUNNER))
    assert again.num_new == 0
    assert again.study.trials == rows
    assert {row.name for row in again.study.baselines} == {"zero_shot", "plain"}


@pytest.mark.whole
def test_an_interrupted_search_is_finished_by_the_same_command(tmp_path):
    # seconds that a stopped training cleans up; Tune would give it 2
    stand_in.tell(tmp_path, slow_stop=3, **{"1": "hold", "2": "hold", "3": "hold"})
    study_dir = tmp_path / "study"
    process = driver(study_dir, 4)
    missing = ["TrialFinished t0000", "TrialEpoch t0001"]  # which is held in the middle of its training
    while missing:
        line = process.stdout.readline()
        assert line, missing
        missing = [start for start in missing if not line.startswith(start)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the driver and all of Ray
    code, output = finish(process)
    assert code == 130, output
    assert "Traceback" not in output
    assert "Stopping" in output
    assert "of 4 trials finished" in output
    assert "Resume with: carft-ray resume" in output
    stopped = {row.name: row for row in snapshot(study_dir).trials}
    done = {name for name, row in stopped.items() if row.outcome == "complete"}
    assert {row.outcome for row in stopped.values()} == {"complete", "running"}
    assert best_row(stopped.values()).name in (study_dir / "best.yaml").read_text().splitlines()[0]

    stand_in.tell(tmp_path)
    output = finished(driver(study_dir, 4))
    assert not any(f"TrialStarted {name} " in output for name in done)
    rows = snapshot(study_dir).trials
    assert [row.number for row in rows] == list(range(4))
    assert [row.outcome for row in rows] == ["complete"] * 4
    assert max(row.attempt for row in rows) > 1
    for row in rows:  # resumed, not begun again: each epoch stands once in the metrics
        epochs = (study_dir / "trials" / row.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in epochs] == [1, 2, 3, 4]
        if row.name in done:
            own = {"expected": None, "order": None}  # which all trials decide
            assert replace(row, **own) == replace(stopped[row.name], **own)


def train_and_name_the_processes(recipe, out_dir, prepared_dir, context, attempt):
    from carft_ray.training.ranks import gather

    pids = gather(context, os.getpid())
    if context.rank == 0:
        (out_dir / "pids.json").write_text(json.dumps(pids))
    return stand_in.train(recipe, out_dir, prepared_dir, context, attempt)


@pytest.mark.slow
def test_ray_train_starts_its_workers_once_and_never_has_two_placement_groups_however_trials_end(tmp_path):
    """One is trained to its end, one is cut at a rung, one diverges, one after the other."""
    stand_in.tell(tmp_path, paced=True, **{"2": "diverge"})
    resources = {"executor": "ray-train", "num_workers": 2, "cpus_per_worker": 0.5}
    recipe = stand_in.make_recipe(3, epochs=4, resources=resources, **HALVING)
    left, seen = [], []

    def on_event(event):
        seen.append(event)
        if isinstance(event, TrialFinished):
            groups = ray.util.placement_group_table().values()
            groups = [group for group in groups if "CPU" in str(group["bundles"])]  # Tune's own holds none
            left.append(sum(group["state"] != "REMOVED" for group in groups))

    runner = Runner(stand_in.prepare, train_and_name_the_processes)
    result = run_search(Plan(recipe, tmp_path / "study", None, on_event, runner))
    assert not ray.is_initialized()
    assert left == [1, 1, 0]  # that of the next training; a failure ends it
    assert [event.reason for event in seen if isinstance(event, Started)] == ["search.max_concurrent_trials"]
    good, _, bad = result.study.trials
    assert [row.outcome for row in result.study.trials] == ["complete", "pruned", "diverged"]
    assert good.metrics["ranks"] == 3  # 1 + 2, added by torch.distributed
    assert bad.reason == "loss not finite at step 3"
    folders = [row.folder(tmp_path / "study") for row in result.study.trials]
    assert [bool(list(folder.glob("*/result.json"))) for folder in folders] == [True, False, False]
    assert len((folders[1] / "metrics.jsonl").read_text().splitlines()) < 4  # the group has ended by itself
    assert not list(folders[1].glob("attempt-*"))
    pids = [json.loads((folder / "pids.json").read_text()) for folder in folders]
    assert pids[0] == pids[1] == pids[2]


@pytest.mark.slow
def test_a_fault_in_the_preparation_or_in_a_trial_ends_the_search_with_its_exit_code(tmp_path):
    missing = stand_in.tell(tmp_path, **{"1": "no_data"}) / "no_data"
    missing.touch()
    recipe = stand_in.make_recipe(4, resources={"executor": "debug"})
    with pytest.raises(DataError, match="there is no data"):
        run_search(Plan(recipe, tmp_path / "study", None, runner=RUNNER))
    assert not (tmp_path / "study").exists()  # free for the mended recipe
    missing.unlink()
    with pytest.raises(CarftError, match=r"trial t0001-(?s:.*)a file of the training set is gone") as caught:
        run_search(Plan(recipe, tmp_path / "study", None, runner=RUNNER, around=figure_at_the_end))
    assert caught.value.exit_code == 4
    complete, failed = snapshot(tmp_path / "study").trials
    assert (complete.outcome, failed.outcome) == ("complete", "running")
    assert complete.name in (tmp_path / "study" / "best.yaml").read_text().splitlines()[0]
    assert (tmp_path / "study" / "figure.png").exists()


def test_a_study_of_failed_trials_ends_with_their_reason_without_ray(tmp_path):
    recipe = stand_in.make_recipe(3, baselines={})
    with searching(tmp_path / "study", recipe) as study:
        while (spec := study.next()) is not None:
            study.settle(spec, failed(spec, "diverged", "loss not finite"))
    with pytest.raises(NoSuccessfulTrialError, match="3 of 3 failed in this way: loss not finite") as caught:
        run_search(Plan(recipe, tmp_path / "study", runner=RUNNER))
    assert caught.value.exit_code == 6
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", "must be host:port or auto"),
        ("127.0.0.1:99999", "no Ray answers"),
        ("127.0.0.1:{web}", "no Ray answers at .*: a server of another kind"),
    ],
)
def test_an_address_of_nothing_is_one_message_at_once(tmp_path, monkeypatch, address, told):
    monkeypatch.setattr(ray, "init", None)  # which would try for two minutes
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = address.format(web=web.server_port)
        with pytest.raises(ClusterError, match=told) as caught, running_ray(address, tmp_path / "ray.log"):
            pass
        web.shutdown()
    assert caught.value.exit_code == 5


def test_a_head_that_comes_up_is_waited_for(tmp_path, monkeypatch):
    faults, said = iter(["refused", "refused", ""]), []
    monkeypatch.setattr(cluster, "_greet", lambda host, port: next(faults))
    monkeypatch.setattr(cluster, "CHECK_HEAD_EVERY_S", 0.01)
    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=ConnectionError("it was reached")))
    ray_at = running_ray("10.0.0.7:6379", tmp_path / "ray.log", wait_s=60.0, say=said.append)
    with pytest.raises(ClusterError, match="it was reached"), ray_at:
        pass
    assert said == ["waiting: no Ray answers at 10.0.0.7:6379 yet"]
