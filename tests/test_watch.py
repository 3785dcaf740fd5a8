"""Watching a study from another process: the table from disk, `status --watch`, and dashboards of others over HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import crash_host
import pytest
import report_studies
from logs import commits
from optuna.storages import JournalStorage
from test_live import shown

from carft_ray.errors import StorageError
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.result import write_result
from carft_ray.study.dashboard import _Followed
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import read_live
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import baselines, trials
from carft_ray.ui.live import SearchView

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def searching(study_dir, num_finished):
    """A study of nine trials that is searched within the block: the fourth ended badly, and one trains."""
    with open_study(study_dir, report_studies.make_recipe(9)) as study:
        report_studies.fill(study, num_finished, lambda number: number == 3)
        report_studies.start(study)
        yield study


def command(*words, **more):
    """Starts a command of carft-ray."""
    argv = [sys.executable, "-m", "carft_ray.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


def ended(process):
    """Sends Ctrl-C and returns what the process wrote to standard error; it ends whatever it makes of it."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=120)[1]
    finally:
        process.kill()


def test_another_process_sees_what_runs_and_watches_until_the_search_or_ctrl_c_ends(tmp_path):
    study_dir = tmp_path / "study"
    with searching(study_dir, 5):
        [live] = read_live(study_dir)[0].values()
        lines = shown(SearchView.of(read_study(study_dir), clock=lambda: live.began + 30.2), 140)
        text, best = "\n".join(lines), read_study(study_dir).best
        assert f"★ {best.name}" in text
        assert trials(study_dir)[-1].name in text  # it runs
        for words in ("diverged", "1/10", "0:30", "56 %"):
            assert words in text, text
        tail = " ".join(lines[-2:])
        assert "5 of 9 trials finished, 1 of them failed · 1 running" in tail
        assert tail.endswith("left")

        watcher = command("status", study_dir, "--watch", "--every", "0.5")
        impatient = command("status", study_dir, "--watch", "--every", "0.5", start_new_session=True)
        line = watcher.stdout.readline()
        assert line.startswith("5 of 9 trials finished, 1 of them failed · 1 running · ")
        assert line.rstrip().endswith(f"best {100 * best.objective:.1f} % ({best.name})")
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
    """Asks a server of this machine for JSON."""
    data = None if content is None else json.dumps(content).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    asked.method = method
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def test_the_dashboard_follows_a_log_that_grows_and_never_writes_to_it(tmp_path):
    study_dir = tmp_path / "study"
    with searching(study_dir, 3) as study:
        dashboard = command("dashboard", study_dir, "--port", "0")
        try:
            url = dashboard.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), dashboard.stderr.read()
            port = int(url.rstrip("/").rpartition(":")[2])
            found = {each["study_name"]: each["study_id"] for each in ask(port, "/api/studies")["study_summaries"]}
            assert found.keys() == {"search", "baselines"}

            def asked(name="search"):
                return ask(port, f"/api/studies/{found[name]}?after=0")["trials"]

            assert len(asked()) == 4
            measured = [trial["values"] for trial in asked("baselines")]
            assert measured == [[row.objective] for row in baselines(study_dir)]
            spec = study.next()  # the search goes on
            write_result(spec.place(study_dir), {"objective": 0.9, "alpha": 0.5, "metrics": {}})
            study.settle(spec)
            end = time.monotonic() + 120
            while sum(trial["state"] == "Complete" for trial in asked()) < 4:
                assert time.monotonic() < end  # the dashboard looks every few seconds
                time.sleep(0.5)
            for row, trial in zip(trials(study_dir), asked(), strict=True):
                assert trial["number"] == row.number
                assert trial.get("values") == (None if row.objective is None else [row.objective])
                drawn = {each["name"]: each["param_external_value"] for each in trial["params"]}
                assert drawn == {name: str(value) for name, value in row.values.items()}
                assert {each["key"]: each["value"] for each in trial["user_attrs"]}["name"] == row.name

            before = commits(study_dir), sorted(path.name for path in study_dir.iterdir())
            for method, path, content in (
                ("DELETE", f"/api/studies/{found['search']}", None),
                ("POST", "/api/studies", {"study_name": "new", "directions": ["maximize"]}),
                ("PUT", f"/api/studies/{found['search']}/note", {"body": "hello", "version": 1}),
                ("POST", f"/api/trials/{asked()[3]['trial_id']}/tell", {"state": "FAIL"}),
            ):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    ask(port, path, method, content)
                with refused.value:
                    assert refused.value.code == 403
            storage = JournalStorage(_Followed(study_dir))  # what it has to write with takes nothing
            number = storage.get_all_studies()[0]._study_id
            for write in (lambda: storage.create_new_trial(number), lambda: storage.delete_study(number)):
                with pytest.raises(StorageError, match="is open for reading only"):
                    write()
            assert (commits(study_dir), sorted(path.name for path in study_dir.iterdir())) == before

            second = command("dashboard", study_dir, "--port", port)
            _, err = second.communicate(timeout=120)
            assert second.returncode == 2
            assert f"error: --port: must be free on this machine, but got {port}" in err
        finally:
            err = ended(dashboard)
    assert dashboard.returncode == 0, err
    assert "Traceback" not in err


def test_without_optuna_dashboard_there_is_one_message_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with open_study(tmp_path / "study", report_studies.make_recipe(2)) as study:
        recover_running(study)
    capsys.readouterr()
    assert crash_host.call(["dashboard", tmp_path / "study"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: dashboard: needs the package optuna-dashboard",
        "    Install it: pip install 'carft-ray[dashboard]'",
    ]
