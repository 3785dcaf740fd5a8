"""Watching a study from another process: the table from disk, `status --watch`, and the dashboard."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from logs import commits
from stand_in import make_recipe
from test_live import shown

from carft_ray.errors import StorageError
from carft_ray.layout import RESOLVED
from carft_ray.recipe.loading import dump_recipe
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.result import write_result
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure, Live, append_log, read_live, write_live
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import trials
from carft_ray.ui.live import SearchView

BASE = Path(__file__).parent
ROOT = BASE.parent


def fill(study, num_finished):
    """Finishes trials of an open study, every seventh badly, and leaves two that run."""
    study_dir = study.study_dir
    (study_dir / RESOLVED).write_text(dump_recipe(study.recipe))
    recover_running(study)
    study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
    for number in range(num_finished):
        spec = study.next()
        folder = spec.folder(study_dir)
        folder.mkdir(parents=True, exist_ok=True)
        study.spend(spec, 50.0 + number % 10, 0.0)
        if number % 7 == 3:
            assert study.settle(spec, Failure("diverged", "loss not finite", 1)) is not None
        else:
            metrics = {"id_accuracy": 0.5, "ood_accuracy": 0.4}
            content = {"objective": 0.3 + 0.001 * number, "alpha": 0.5, "metrics": metrics}
            write_result(spec.place(study_dir), content)
            assert study.settle(spec) is not None
    live = {}
    for _ in range(2):
        spec = study.next()
        folder = spec.folder(study_dir)
        folder.mkdir(parents=True, exist_ok=True)
        append_log(folder, "attempt 1: starts on here")
        (folder / "metrics.jsonl").write_text('{"epoch": 1, "subset/id_accuracy": 0.61, "subset/objective": 0.55}\n')
        live[spec.training] = Live(1, time.time() - 30, 30.0, 0.0, 10, 1, "n")
    write_live(study_dir, live)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A study of 200 trials that runs: 195 ended, two train."""
    study_dir = tmp_path_factory.mktemp("large") / "study"
    with open_study(study_dir, make_recipe(200, baselines={})) as study:
        fill(study, 195)
        yield study_dir


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50)])
def test_a_study_of_two_hundred_trials_fits_on_the_terminal(large, width, height):
    newest = max(live.began for live in read_live(large)[0].values())
    lines = shown(SearchView.of(read_study(large), clock=lambda: newest + 30.2), width, height)
    text = "\n".join(lines)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    rows = trials(large)
    best = max(rows, key=lambda row: row.objective or 0)
    assert f"★ {best.name}" in text
    assert text.count("…") == 3  # those that ended last, a failed one among them
    assert "diverged" in text
    assert all(row.name in text for row in rows[-2:])  # they run
    assert "1/2" in text
    assert "0:30" in text
    assert "98 %" in text  # the bar
    tail = " ".join(lines[-2:])
    assert "195 of 200 trials finished, 28 of them failed · 2 running" in tail
    assert "elapsed" in tail
    assert tail.endswith("left")


def cli(*words, **more):
    command = [sys.executable, "-m", "carft_ray.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


def ended(process):
    """Sends Ctrl-C and returns what the process wrote to standard error; it ends whatever it makes of it."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=120)[1]
    finally:
        process.kill()


@pytest.mark.slow
def test_watch_prints_lines_off_a_terminal_ends_with_the_search_and_with_ctrl_c(tmp_path):
    study_dir = tmp_path / "study"
    with open_study(study_dir, make_recipe(9, baselines={})) as study:
        fill(study, 5)
        watcher = cli("status", study_dir, "--watch", "--every", "0.5")
        impatient = cli("status", study_dir, "--watch", "--every", "0.5", start_new_session=True)
        line = watcher.stdout.readline()
        assert line.startswith("5 of 9 trials finished, 1 of them failed · 2 running · ")
        assert line.rstrip().endswith(f"best 30.4 % ({trials(study_dir)[4].name})")
        impatient.stdout.readline()
        err = ended(impatient)
        assert (impatient.returncode, "Traceback" in err) == (0, False)
        assert "The search continues." in err
    out, err = watcher.communicate(timeout=120)
    assert watcher.returncode == 0, err
    assert "5 of 9 trials finished." in out
    assert "No search runs on it." in err
    assert "carft-ray resume" in err


def ask(port, path, method="GET", content=None):
    data = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    asked.method = method
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def shown_trials(port, number):
    return ask(port, f"/api/studies/{number}?after=0")["trials"]


@pytest.mark.slow
def test_the_dashboard_follows_a_log_that_grows_and_never_writes_to_it(tmp_path):
    study_dir = tmp_path / "study"
    with open_study(study_dir, make_recipe(9, baselines={})) as study:
        fill(study, 3)
        dashboard = cli("dashboard", study_dir, "--port", "0")
        try:
            url = dashboard.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), dashboard.stderr.read()
            port = int(url.rstrip("/").rpartition(":")[2])
            found = {each["study_name"]: each["study_id"] for each in ask(port, "/api/studies")["study_summaries"]}
            number = found["search"]
            assert len(ask(port, f"/api/studies/{number}?after=0")["trials"]) == 5
            spec = study.next()  # the search goes on
            write_result(spec.place(study_dir), {"objective": 0.9, "alpha": 0.5, "metrics": {}})
            study.settle(spec)
            end = time.monotonic() + 120
            while sum(trial["state"] == "Complete" for trial in shown_trials(port, number)) < 4:
                assert time.monotonic() < end  # the dashboard looks every few seconds
                time.sleep(0.5)

            before = commits(study_dir), sorted(path.name for path in study_dir.iterdir())
            for method, path, content in (
                ("DELETE", f"/api/studies/{number}", None),
                ("POST", "/api/studies", {"study_name": "new", "directions": ["maximize"]}),
                ("PUT", f"/api/studies/{number}/note", {"body": "hello", "version": 1}),
                ("POST", f"/api/trials/{shown_trials(port, number)[3]['trial_id']}/tell", {"state": "FAIL"}),
            ):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    ask(port, path, method, content)
                with refused.value:
                    assert refused.value.code == 403
            assert (commits(study_dir), sorted(path.name for path in study_dir.iterdir())) == before

            with socket.socket() as taken:  # the port is taken by the first
                assert taken.connect_ex(("127.0.0.1", port)) == 0
            second = cli("dashboard", study_dir, "--port", port)
            _, err = second.communicate(timeout=120)
            assert second.returncode == 2
            assert f"error: --port: must be free on this machine, but got {port}" in err
        finally:
            err = ended(dashboard)
    assert dashboard.returncode == 0, err
    assert "Traceback" not in err


def test_the_log_of_the_dashboard_takes_no_commit(tmp_path):
    from optuna.storages import JournalStorage

    from carft_ray.study.dashboard import _Followed

    with open_study(tmp_path / "study", make_recipe(2)) as study:
        recover_running(study)
        before = commits(tmp_path / "study")
        storage = JournalStorage(_Followed(tmp_path / "study"))
        number = storage.get_all_studies()[0]._study_id
        for write in (lambda: storage.create_new_trial(number), lambda: storage.delete_study(number)):
            with pytest.raises(StorageError, match="is open for reading only"):
                write()
        assert commits(tmp_path / "study") == before


@pytest.mark.slow
def test_without_optuna_dashboard_there_is_one_message_with_the_command_that_installs_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['optuna_dashboard'] = None\n")
    with open_study(tmp_path / "study", make_recipe(2)) as study:
        recover_running(study)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "carft_ray.cli", "dashboard", str(tmp_path / "study")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines == [
        "error: dashboard: needs the package optuna-dashboard",
        "    Install it: pip install 'carft-ray[dashboard]'",
    ]
