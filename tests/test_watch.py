"""Watching a search: its live table, the table from disk, `status --watch`, and the dashboard of Optuna."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import crash_host
import pytest
import report_studies
import stand_in
from logs import commits, take
from optuna.storages import JournalStorage
from rich.console import Console

from carft_ray.errors import StorageError
from carft_ray.launch import events
from carft_ray.results.reading import study_view
from carft_ray.results.reading.study_view import Overview, read_study
from carft_ray.store.attempt_files import append_log, write_result
from carft_ray.store.folder import Folder
from carft_ray.store.log import Log
from carft_ray.study.opening import open_study
from carft_ray.study.place import log_at
from carft_ray.study.records import STOPPING
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import TrialRow, TrialSpec
from carft_ray.ui import console, live, progress
from carft_ray.ui.live import SearchView


def shown(view, width=110, height=30):
    """The lines on the screen, without colours."""
    console = Console(file=io.StringIO(), width=width, height=height, soft_wrap=True, color_system=None)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def spec(number, attempt=1, kind="trial"):
    name = f"t{number:04d}-abcd" if kind == "trial" else f"base{number}"
    return TrialSpec(kind, number, name, {"learning_rate": 1e-4 * (number + 1), "kl_weight": 0.5}, attempt)


def row(number, objective=None, outcome="complete", kind="trial", reason=""):
    metrics = {} if objective is None else {"id_accuracy": objective + 0.1, "ood_accuracy": objective - 0.1}
    of = spec(number, kind=kind)
    return TrialRow(kind, number, of.name, of.values, 1, outcome, reason, objective, 0.5, metrics, None, 61.0)


def running(view, numbers, epoch=0):
    for number in numbers:
        view.update(events.TrialStarted(spec(number)))
        if epoch:
            metrics = {"epoch": epoch, "subset/id_accuracy": 0.61, "subset/ood_accuracy": 0.5, "subset/objective": 0.55}
            view.update(events.TrialEpoch(spec(number), metrics))


def test_a_search_from_its_first_to_its_last_event():
    now = [0.0]
    view = live.SearchView(4, clock=lambda: now[0])
    assert shown(view) == ["starting Ray · 0:00 elapsed"]
    view.update(events.Preparing())
    assert shown(view)[-1].startswith("preparing: model, sets")
    view.update(events.BaselineFinished(row(0, 0.3, kind="baseline")))
    view.update(events.ConcurrencyChanged(1, "memory"))  # before it says how many: nothing to change
    view.update(events.Started(8, 0, 2, "2 CPUs"))
    assert shown(view)[-1] == "0 of 8 trials finished · 2 at a time (2 CPUs) · 0:00 elapsed"
    running(view, [0])
    now[0] = 30
    running(view, [1], epoch=2)
    now[0] = 60
    view.update(events.TrialFinished(row(0, 0.4), is_best=True))
    header, baseline, best, runs, note, bar, last = (" ".join(line.split()) for line in shown(view))
    assert header == "learning_rate kl_weight epoch ID, % OOD, % objective, % time"
    assert baseline == "base0 0.0001 0.5 40.0 20.0 30.0 1:01"
    assert best == "★ t0000-abcd 0.0001 0.5 50.0 30.0 40.0 1:01"
    assert runs == "t0001-abcd 0.0002 0.5 2/4 61.0 50.0 55.0 0:30"
    assert note == "running trials: accuracies on a subset, at the best of a few alphas"
    assert bar == "━" * 5 + "─" * 35 + " 12 %"
    # the running one needs 30 s more, six others 60 s each, two at a time
    assert last == "1 of 8 trials finished · 2 at a time (2 CPUs) · 1:00 elapsed · about 3:15 left"
    assert view.update(events.ConcurrencyChanged(1, "memory")) is None
    assert shown(view)[-1].endswith("1 at a time (memory) · 1:00 elapsed · about 6:30 left")
    view.update(events.TrialFinished(row(1, 0.6), is_best=True))
    assert [line.split()[:2] for line in shown(view)[2:4]] == [["★", "t0001-abcd"], ["t0000-abcd", "0.0001"]]
    view.update(events.Stopping(2))
    assert shown(view)[-1].startswith("stopping; saving checkpoints of 2 trainings · 2 of 8 trials finished")


def test_fine_tuned_weights_at_chance_are_told_beside_what_was_measured(tmp_path):
    rows = [row(0, 0.5), replace(row(1, 0.57), at_chance=True)]
    view = Overview(Path(), Log(Folder(tmp_path)), stand_in.make_recipe(2), rows, [])
    table = console.trial_table([view.data(each) for each in rows])
    assert ["alpha 1.00 not shown above chance" in cell for cell in table.columns[-1].cells] == [False, True]
    line = events.TrialFinished(rows[1], is_best=False).line()
    assert "ID 67.0, OOD 47.0, objective 57.0 % at alpha 0.50; alpha 1.00 not shown above chance" in line


def test_what_must_not_be_overlooked_gets_a_line_above():
    view = live.SearchView(4)
    assert view.update(events.Note("moved a torn line")) == "warning: moved a torn line"
    assert view.update(events.Decided("targets: stored")) == "targets: stored"
    assert view.update(events.TrialFinished(row(0, 0.5), is_best=True)) is None
    told = view.update(events.TrialFinished(row(1, outcome="diverged", reason="loss not finite"), is_best=False))
    assert told == "t0001-abcd learning_rate=0.0002 kl_weight=0.5: diverged, loss not finite"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (110, 12), (60, 8)])
def test_two_hundred_trials_fit_on_the_terminal_with_all_that_matters(width, height):
    finished = [row(number, 0.001 * number) for number in range(180)]
    view = live.SearchView(4, [row(0, 0.1, kind="baseline"), *finished])
    view.update(events.Started(200, 180, 16, "search.max_concurrent_trials"))
    running(view, range(180, 196), epoch=1)
    lines = shown(view, width, height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert all(words in text for words in ("180 of 200 trials finished", "★ t0179-abcd", "t0180-abcd"))
    hidden = 16 - text.count("1/4")
    assert (f"and {hidden} more, running" in text) == (hidden > 0)


def test_another_attempt_takes_the_row_of_the_first_and_a_terminal_without_stars_gets_an_asterisk(monkeypatch):
    view = live.SearchView(4, [row(0, 0.4)])
    running(view, [3], epoch=2)
    view.update(events.TrialStarted(spec(3, attempt=2)))
    [line] = [line for line in shown(view) if "t0003" in line]
    assert "0/4" in line
    monkeypatch.setattr(Console, "encoding", "ascii")
    assert shown(view)[1].startswith("* t0000")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_table_goes_and_the_cursor_comes_back_however_the_search_ends(tmp_path, error):
    console = Console(file=io.StringIO(), force_terminal=True, width=110, height=30, soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt), progress.search_shown(True, tmp_path, 4, console) as on_event:
        on_event(events.Started(8, 0, 2, "2 CPUs"))
        on_event(events.TrialStarted(spec(0)))
        on_event(events.Note("a journal was mended"))
        if error:
            raise error
    written = console.file.getvalue()
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    assert "warning: a journal was mended" in written
    assert "0 of 8 trials finished" in written
    assert written.rindex("\x1b[2K") > written.rindex("elapsed")  # the last thing is that its lines are erased


def test_without_a_terminal_there_are_lines(tmp_path, capsys):
    with progress.search_shown(True, tmp_path, 4) as on_event:
        on_event(events.TrialFinished(row(7, 0.3), is_best=False))  # recovered: it had finished before
        on_event(events.Started(8, 1, 2, "2 CPUs"))
        on_event(events.ConcurrencyChanged(3, "3 CPUs"))
        on_event(events.TrialFinished(row(0, 0.4), is_best=True))
    first, second, changed, third = capsys.readouterr().err.splitlines()
    assert first.startswith("[0:00] t0007-abcd learning_rate=")
    assert (second, changed) == (
        "[0:00] 7 trials to go, 2 at a time (2 CPUs)",
        "[0:00] from now on 3 at a time (3 CPUs)",
    )
    assert re.fullmatch(r"\[0:00\] 2/8 t0000-abcd .* <- best so far", third)


@pytest.mark.parametrize(
    ("others", "told"), [({}, ""), ({"class_kl": 0.01234, "l2_sp": 21.5}, ", class_kl 0.0123, l2_sp 21.5")]
)
def test_the_line_of_an_epoch_shows_the_penalties_that_have_a_weight(capsys, others, told):
    row = {"epoch": 2.0, "loss": 1.0, "ce": 0.5, "kl": 0.1, "context_entropy": 1.0, **others, "grad_norm": 3.0}
    with progress.training_shown(True) as on_event:
        on_event(events.TrialEpoch(spec(0), {**row, "images_per_s": 10.0}))
    line = capsys.readouterr().err
    assert line == f"epoch 2: loss 1.000, CE 0.500, KL 0.1000{told}, context entropy 1.00 nats\n"


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


@pytest.mark.slow
def test_another_process_sees_what_runs_and_watches_until_the_search_or_ctrl_c_ends(tmp_path):
    study_dir = tmp_path / "study"
    with searching(study_dir, 5):
        [began] = read_study(study_dir).since.values()
        text = " ".join(shown(SearchView.of(read_study(study_dir), clock=lambda: began + 30.2), 140))
        best, counted = read_study(study_dir).best, "5 of 9 trials finished, 1 of them failed · 1 running · "
        for words in (
            f"★ {best.name}",
            snapshot(study_dir).trials[-1].name,
            "diverged",
            "1/10",
            "0:30",
            "56 %",
            counted,
        ):
            assert words in text, text
        assert text.endswith("left")
        watcher = command("status", study_dir, "--watch", "--every", "0.5")
        impatient = command("status", study_dir, "--watch", "--every", "0.5", start_new_session=True)
        line = watcher.stdout.readline()
        assert line.startswith(counted)
        assert line.rstrip().endswith(f"expected best {100 * best.expected:.1f} % ({best.name})")
        impatient.stdout.readline()
        err = ended(impatient)
        assert (impatient.returncode, "Traceback" in err) == (0, False)
        assert "The search continues." in err
    out, err = watcher.communicate(timeout=120)
    assert watcher.returncode == 0, err
    assert "5 of 9 trials finished." in out
    assert "No search is running." in err
    assert "carft-ray resume" in err


@pytest.mark.slow
def test_the_dashboard_follows_a_log_that_grows_and_never_writes_to_it(tmp_path, monkeypatch, capsys):
    study_dir = tmp_path / "study"
    with searching(study_dir, 3) as study:
        dashboard = command("dashboard", study_dir, "--port", "0")
        try:
            url = dashboard.stdout.readline().strip().rstrip("/")
            assert url.startswith("http://127.0.0.1:"), dashboard.stderr.read()

            def ask(path, method="GET", content=None):
                data = None if content is None else json.dumps(content).encode()
                headers = {"Content-Type": "application/json"}
                asked = urllib.request.Request(f"{url}/api/{path}", data, headers, method=method)
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    return json.load(answer)

            def asked(name="search"):
                return ask(f"studies/{found[name]}?after=0")["trials"]

            found = {each["study_name"]: each["study_id"] for each in ask("studies")["study_summaries"]}
            assert found.keys() == {"search", "baselines"}
            assert len(asked()) == 4
            measured = [trial["values"] for trial in asked("baselines")]
            assert measured == [[row.objective] for row in snapshot(study_dir).baselines]
            spec = study.next()  # the search goes on
            write_result(spec.place(study_dir), {"objective": 0.9, "alpha": 0.5, "metrics": {}})
            study.settle(spec)
            end = time.monotonic() + 120
            while sum(trial["state"] == "Complete" for trial in asked()) < 4:
                assert time.monotonic() < end  # the dashboard looks every few seconds
                time.sleep(0.5)
            for row, trial in zip(snapshot(study_dir).trials, asked(), strict=True):
                assert trial.get("values") == (None if row.objective is None else [row.objective])
                drawn = {each["name"]: each["param_external_value"] for each in trial["params"]}
                assert drawn == {name: str(value) for name, value in row.values.items()}

            before = commits(study_dir), sorted(path.name for path in study_dir.iterdir())
            for method, path, content in (
                ("DELETE", f"studies/{found['search']}", None),
                ("POST", "studies", {"study_name": "new", "directions": ["maximize"]}),
                ("PUT", f"studies/{found['search']}/note", {"body": "hello", "version": 1}),
                ("POST", f"trials/{asked()[3]['trial_id']}/tell", {"state": "FAIL"}),
            ):
                with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                    ask(path, method, content)
                refused.value.close()
            storage = JournalStorage(log_at(study_dir))  # a log that was not claimed takes nothing
            number = storage.get_all_studies()[0]._study_id
            for write in (lambda: storage.create_new_trial(number), lambda: storage.delete_study(number)):
                with pytest.raises(StorageError, match="is open for reading only"):
                    write()
            assert (commits(study_dir), sorted(path.name for path in study_dir.iterdir())) == before

            port = url.rpartition(":")[2]
            for host in (f"rebound.example:{port}", "127.0.0.1.rebound.example", ""):  # DNS rebinding
                asked_there = urllib.request.Request(f"{url}/api/studies", headers={"Host": host})
                with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                    urllib.request.urlopen(asked_there, timeout=60)
                assert b"search" not in refused.value.read()
            for host in (f"LOCALHOST:{port}", "127.0.0.1"):
                asked_there = urllib.request.Request(f"{url}/api/studies", headers={"Host": host})
                with urllib.request.urlopen(asked_there, timeout=60) as answer:
                    assert json.load(answer)["study_summaries"]
            second = command("dashboard", study_dir, "--port", port)
            _, err = second.communicate(timeout=120)
            assert second.returncode == 2
            assert f"error: --port: must be free on this machine, but got {port}" in err
        finally:
            err = ended(dashboard)
    assert dashboard.returncode == 0, err
    assert "Traceback" not in err
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    assert crash_host.call(["dashboard", study_dir]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: dashboard: needs the package optuna-dashboard",
        "    Install it: pip install 'carft-ray[dashboard]'",
    ]


def test_a_log_is_followed_from_before_its_first_line_while_another_machine_searches(tmp_path, monkeypatch):
    study_dir = tmp_path / "study"
    with open_study(study_dir, stand_in.make_recipe(1, baselines={})) as study:
        spec = study.next()
    owner = take(study_dir)

    def work():
        for commit in (study_dir / "log").iterdir():
            os.utime(commit, (1, 1))  # as after minutes without a heartbeat
        owner.write({"kind": STOPPING, "reason": ""})
        yield
        append_log(spec.folder(study_dir), "attempt 1: starts")
        yield
        owner.release()
        yield

    steps = work()
    monkeypatch.setattr(study_view, "time", SimpleNamespace(sleep=lambda seconds: next(steps)))
    (line,) = study_view.follow_log(study_dir, spec.training)
    assert line.endswith(" attempt 1: starts")
    assert next(steps, "over") == "over"
