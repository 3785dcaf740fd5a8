"""Weights & Biases, MLflow and a webhook get what a search does; none of them is a reason for it to fail."""

import dataclasses
import importlib.util
import json
import logging
import socketserver
import struct
import threading
from datetime import datetime
from pathlib import Path

import pytest
import short_training
from killed_searches import wait_until

import carft_ray
from carft_ray import files
from carft_ray.errors import ClusterError, InterruptedRunError
from carft_ray.launch import events, notify, outbox
from carft_ray.launch import tracking as module
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.notify import AT_MOST_EVERY_S, _Notices, webhook
from carft_ray.launch.outbox import Ended, sending
from carft_ray.launch.tracking import trackers
from carft_ray.recipe.loading import load_recipe
from carft_ray.store.attempt_files import read_result, write_result
from carft_ray.study.training import TrialRow, TrialSpec

pytestmark = pytest.mark.slow
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
DEBUG = {"resources.executor": "debug", "train.epochs": 1, "search.trials": 2}
DEBUG["search.baselines"] = {"plain": {"kl_weight": 0}}
BOTH = {"tracking.wandb": {"project": "mine", "offline": True}, "tracking.mlflow.experiment": "mine"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    short_training.make(folder)
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def search(here, study_dir, caplog, **more):
    """Searches; returns the study and what was warned of."""
    caplog.clear()
    overrides = {**DEBUG, "data.cache_dir": here / "cache", **more}
    with caplog.at_level(logging.WARNING, "carft_ray"):
        study = carft_ray.search(here / "recipe.yaml", study_dir, overrides=overrides, progress=False)
    return study, [one.getMessage() for one in caplog.records if "tracking" in one.getMessage()]


def tracking(recipe, study_dir, warn):
    return sending(trackers(recipe, study_dir, warn), warn)


def notifying(url, name, study_dir, warn):
    return sending(webhook(url, name, study_dir), warn)


def records(path):
    """The records of an offline run of Weights & Biases: a log as LevelDB has it, in blocks of 32 kB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)  # check sum, length; 1 whole, 2 to 4 a part
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            found.append(Record())
            found[-1].ParseFromString(parts)
            parts = b""
    return found


def items(of):
    return {each.key or ".".join(each.nested_key): json.loads(each.value_json) for each in of}


@pytest.mark.whole
@QUIET
def test_both_hold_values_metrics_and_curves_once(here, tmp_path, caplog):
    import mlflow

    study, warned = search(here, tmp_path / "study", caplog, **BOTH)
    assert warned == []
    rows = {row["name"]: row for row in (*study.trials().to_pylist(), *study.baselines.to_pylist())}
    best = study.best
    epochs = files.read_json_lines(study.path / "trials" / best.name, "metrics.jsonl")
    of_epochs = [(one["step"], one["loss"]) for one in epochs]
    of_curve = [(one["alpha"], one["id_accuracy"]) for one in read_result(best.place(study.path))[0]["curve"]]

    found = {}
    for path in (study.path / "tracking" / "wandb").glob("offline-run-*/*.wandb"):
        parts = records(path)
        [run] = [one.run for one in parts if one.WhichOneof("record_type") == "run"][:1]
        found[run.display_name] = run, parts
    assert found.keys() == rows.keys()
    assert len({run.run_group for run, _ in found.values()}) == 1
    run, parts = found[best.name]
    assert items(run.config.update)["learning_rate"] == best.values["learning_rate"]
    summary = dict(item for one in parts for item in items(one.summary.update).items())
    assert (summary["objective"], summary["outcome"]) == (best.objective, "complete")
    logged = [items(one.history.item) for one in parts if one.WhichOneof("record_type") == "history"]
    curve = [(one["curve/alpha"], one["curve/id_accuracy"]) for one in logged if "curve/alpha" in one]
    assert curve == of_curve
    assert [(one["training/step"], one["training/loss"]) for one in logged if "training/step" in one] == of_epochs

    mlflow_alone = load_recipe(here / "recipe.yaml", ["tracking.mlflow.experiment=mine"])
    with tracking(mlflow_alone, study.path, pytest.fail) as shared:  # told again, it takes the place of its run
        shared(lambda event: None)(module.TrialFinished(best, is_best=True))
    client = mlflow.MlflowClient((study.path / "tracking" / "mlflow").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == len(by_name) == len(rows)
    for name, run in by_name.items():
        assert run.data.tags["carft_ray.study"].startswith("short-")
        assert run.data.metrics["objective"] == rows[name]["objective"]
        assert run.info.status == "FINISHED"
    run = by_name[best.name]
    assert run.data.params["learning_rate"] == str(best.values["learning_rate"])
    history = client.get_metric_history(run.info.run_id, "curve/id_accuracy")
    assert {(one.step, one.value) for one in history} == {(round(100 * alpha), value) for alpha, value in of_curve}
    history = client.get_metric_history(run.info.run_id, "training/loss")
    assert [(one.step, one.value) for one in history] == of_epochs


@QUIET
def test_a_tracker_that_fails_is_one_warning_and_the_search_is_whole(here, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    study, [warned] = search(here, tmp_path / "study", caplog, **{"tracking.mlflow.experiment": "mine"})
    assert warned.startswith("tracking.mlflow: MlflowException: ")
    assert warned.endswith("; the study is not affected")
    assert study.trials().num_rows == 2


def test_a_library_that_is_missing_is_a_warning_and_without_a_training_nothing_is_opened(here, tmp_path, monkeypatch):
    recipe, told = load_recipe(here / "recipe.yaml", ["tracking.wandb.project=mine"]), []
    for tracked in (load_recipe(here / "recipe.yaml"), recipe):
        with tracking(tracked, tmp_path / "study", pytest.fail):
            pass
    assert not (tmp_path / "study").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with tracking(recipe, tmp_path, told.append):
        assert told == ["tracking.wandb has no effect: wandb is not installed (pip install 'carft-ray[wandb]')"]


class Client(module._Client):
    """Keeps what a library would be told."""

    def begin(self, name, kind, values):
        self.told.append((name, kind, values))

    def log(self, name, numbers, step):
        self.told.append((name, step, numbers))

    def end(self, name, numbers, outcome, reason=""):
        self.told.append((name, outcome, numbers))
        del self.runs[name]


def test_epochs_are_told_while_a_training_runs_each_of_them_once(here, tmp_path, monkeypatch):
    told = Client.told = []
    monkeypatch.setitem(module.CLIENTS, "mlflow", Client)
    files.write_json(tmp_path / "manifest.json", {"format_version": 2, "id": "0123456789ab"})
    recipe = load_recipe(here / "recipe.yaml", ["tracking.mlflow.experiment=mine"])
    spec = TrialSpec("trial", 0, "t0000-abcd", {"learning_rate": 0.1}, 1)
    other = dataclasses.replace(spec, number=1, name="t0001-abcd")
    content = {"objective": 0.5, "alpha": 0.4, "metrics": {}, "curve": [{"alpha": 0.2, "id_accuracy": 0.6}]}
    write_result(spec.place(tmp_path), content)
    digest = read_result(spec.place(tmp_path))[1]
    row = TrialRow("trial", 0, spec.name, spec.values, 1, "complete", objective=0.5, alpha=0.4, digest=digest)

    def row_of(step):
        return {"step": step, "num_steps": 9, "epoch": step // 3, "loss": 1 / step}

    def write(of, *steps):
        lines = [json.dumps({**row_of(step), "note": "text"}) for step in steps]
        files.write_text(of.folder(tmp_path) / "metrics.jsonl", "".join(f"{line}\n" for line in lines))

    with tracking(recipe, tmp_path, pytest.fail) as shared:
        on_event = shared(lambda event: None)
        write(spec, 3)
        on_event(events.TrialEpoch(spec, {}))
        wait_until(lambda: len(told) >= 2, told)
        write(spec, 3, 6)
        write(other, 3)
        on_event(events.TrialEpoch(spec, {}))
        on_event(events.TrialEpoch(other, {}))
        wait_until(lambda: len(told) >= 5, told)
        on_event(events.TrialEpoch(spec, {}))  # another attempt repeats an epoch
        write(spec, 3, 6, 9)
        on_event(module.TrialFinished(row, is_best=True))

    def epoch(of, step):
        return of.name, step, {f"training/{name}": value for name, value in row_of(step).items()}

    assert told == [
        (spec.name, "trial", spec.values),
        epoch(spec, 3),
        epoch(spec, 6),
        (other.name, "trial", spec.values),
        epoch(other, 3),
        epoch(spec, 9),
        (spec.name, 20.0, {"curve/alpha": 0.2, "curve/id_accuracy": 0.6}),
        (spec.name, "complete", {"objective": 0.5, "alpha": 0.4}),
        (other.name, "stopped", {}),
    ]


@QUIET
def test_a_training_that_is_stopped_is_a_run_that_was_ended_until_it_is_resumed(here, tmp_path):
    import mlflow

    recipe = load_recipe(here / "recipe.yaml", ["tracking.mlflow.experiment=mine"])
    spec = TrialSpec("trial", 0, "t0000-abcd", {"learning_rate": 0.1}, 1)
    files.write_json(tmp_path / "manifest.json", {"format_version": 2, "id": "0123456789ab"})
    files.write_text(spec.folder(tmp_path) / "metrics.jsonl", '{"step": 3, "loss": 0.5}\n')
    client = mlflow.MlflowClient((tmp_path / "tracking" / "mlflow").as_uri())

    def run():
        [experiment] = [one for one in client.search_experiments() if one.name == "mine"]
        [found] = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == spec.name]
        return found

    with tracking(recipe, tmp_path, pytest.fail) as shared:
        shared(lambda event: None)(events.TrialEpoch(spec, {}))
    assert (run().info.status, run().data.metrics) == ("KILLED", {"training/step": 3, "training/loss": 0.5})
    with tracking(recipe, tmp_path, pytest.fail) as shared:
        row = TrialRow("trial", 0, spec.name, spec.values, 1, "complete", objective=0.5, alpha=0.4)
        shared(lambda event: None)(module.TrialFinished(row, is_best=True))
    assert run().info.status == "FINISHED"
    assert run().data.metrics == {"training/step": 3, "training/loss": 0.5, "objective": 0.5, "alpha": 0.4}


def test_a_copy_of_a_study_has_runs_of_its_own(here, tmp_path):
    """Else its search would remove those of the original, whose trainings have the same names."""
    recipe, groups = load_recipe(here / "recipe.yaml"), []
    for name, more in (("original", {}), ("moved", {}), ("copy", {"copied_from": "s3://bucket/original"})):
        files.write_json(tmp_path / name / "manifest.json", {"format_version": 2, "id": "0123456789ab", **more})
        groups.append(module._Client(recipe, tmp_path / name).group)
    assert groups[0] == groups[1] == f"{recipe.name}-0123456789ab"
    assert groups[2].startswith(f"{groups[0]}-")


# notices: a real server gets them

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def ended(number, objective=0.5, outcome="complete", reason="", is_best=False):
    objective = objective if outcome == "complete" else None
    row = TrialRow("trial", number, f"t{number:04d}-abcd", {}, 1, outcome, reason, objective, 0.4, {}, datetime.now())
    return TrialFinished(row, is_best)


class Hook(socketserver.StreamRequestHandler):
    def handle(self):
        head = dict(line.decode().lower().split(":", 1) for line in list(iter(self.rfile.readline, b"\r\n"))[1:])
        assert head["content-type"].strip() == "application/json"
        self.server.got.append(json.loads(self.rfile.read(int(head["content-length"]))))
        self.wfile.write(self.server.answers.pop(0) if self.server.answers else OK)


@pytest.fixture
def server():
    """A server on this machine, with what it was sent and its answers."""
    with socketserver.TCPServer(("127.0.0.1", 0), Hook) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        running.got, running.answers = [], []
        running.url = f"http://127.0.0.1:{running.server_address[1]}/hook?token=secret"
        yield running
        running.shutdown()


def test_a_webhook_gets_the_notices_in_order(server):
    shown, warned = [], []
    with notifying(server.url, "pets", Path("studies/pets"), warned.append) as beside:
        on_event = beside(shown.append)
        on_event(ended(0, 0.613, is_best=True))
        on_event(ended(1, outcome="diverged", reason="loss not finite"))
        on_event(ended(2))
    assert (warned, len(shown)) == ([], 3)
    best, failed, end = server.got
    about = {"study": "pets", "study_dir": str(Path("studies/pets").absolute())}
    about |= {"trial": "t0000-abcd", "objective": 0.613, "alpha": 0.4}
    assert best == {"event": "best", "text": "pets: new best t0000-abcd, objective 61.3 %", **about}
    assert (failed["event"], failed["text"]) == ("failed_trial", "pets: t0001-abcd: diverged, loss not finite")
    assert end["text"] == "pets: finished; 3 trainings ended in this run; new best t0000-abcd, objective 61.3 %"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InterruptedRunError("stopped; 3 of 8"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (ClusterError("no Ray"), "failed: no Ray"),
        (ZeroDivisionError("by 0"), "failed: ZeroDivisionError: by 0"),
    ],
)
def test_the_end_says_how_it_came_and_the_error_goes_on(server, error, told):
    with pytest.raises(type(error)), notifying(server.url, "pets", Path("pets"), pytest.fail):
        raise error
    [content] = server.got
    assert content["event"] == told.partition(":")[0]
    assert content["text"] == f"pets: {told}; 0 trainings ended in this run"


def test_notices_about_trials_come_now_and_then_and_an_end_by_the_budget_is_told_as_such():
    now = [100.0]
    notices, happened = _Notices("pets", Path("pets"), clock=lambda: now[0]), []
    for number in range(5):
        happened.append(notices.of(ended(number, outcome="error", reason="boom")))
        happened.append(notices.of(ended(10 + number, 0.1 * number, is_best=True)))
    now[0] += AT_MOST_EVERY_S
    happened.append(notices.of(ended(5, outcome="error", reason="boom")))
    happened.append(notices.of(Stopping(2, "the wall time is used up")))
    happened.append(notices.of(Ended(None)))
    failed, best, later, end = (each["text"] for each in happened if each is not None)
    assert (failed, later) == ("pets: t0000-abcd: error, boom", "pets: t0005-abcd: error, boom")
    assert best == "pets: new best t0010-abcd, objective 0.0 %"
    assert end.startswith("pets: ended early, the wall time is used up; 11 trainings")


def test_an_answer_that_is_none_is_a_warning_and_the_next_notice_is_sent(server):
    for answer, warning in (
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "the server answered 500 Internal Server"),
        (b"no http at all\r\n\r\n", "the server's answer is not HTTP ("),
        (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", "the server's answer is not HTTP ("),
    ):
        server.got, server.answers, warned = [], [answer], []
        with notifying(server.url, "s", Path("s"), warned.append) as beside:
            beside(lambda event: None)(ended(0, is_best=True))
        assert len(server.got) == 2
        [told] = warned
        assert told.startswith(f"--notify-url: {warning}")
        assert "secret" not in told


@pytest.mark.parametrize(
    ("location", "instead"),
    [
        ("https://other.example:8443/hook?token=secret", "; give https://other.example:8443 with the same path"),
        ("https://other.example/services/secret2", "; give https://other.example with its new path"),
        ("", ""),
        ("http://me:secret@other.example:99999/", "; give http://other.example:99999 with its new path"),
    ],
)
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_its_notice_is_told_as_not_sent(server, code, location, instead):
    answer, warned = f"HTTP/1.1 {code} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode(), []
    server.answers += [answer, answer]
    with notifying(server.url, "s", Path("s"), warned.append) as beside:
        beside(lambda event: None)(ended(0, is_best=True))
    assert warned == [f"--notify-url: not sent: the server redirects ({code}){instead}; the study is not affected"]
    assert len(server.got) == 2  # nothing was asked for with a GET


def test_the_search_waits_for_no_server_that_is_missing_or_does_not_answer(monkeypatch):
    monkeypatch.setattr(notify, "TIMEOUT_S", 1.0)
    warned = []
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:  # it accepts, no more
        for port in (silent.server_address[1], 9):
            with notifying(f"http://127.0.0.1:{port}/", "s", Path("s"), warned.append) as beside:
                before = len(warned)
                beside(lambda event: None)(ended(0, is_best=True))
                assert len(warned) == before  # nothing was waited for
    assert warned[0] == "--notify-url: timed out; the study is not affected"
    assert "refused" in warned[1]


# the outbox


def test_a_receiver_that_is_slow_or_fails_delays_no_other_and_what_it_does_not_get_is_told(monkeypatch):
    monkeypatch.setattr(outbox, "MOST_WAITING", 2)
    goes_on, got, warned = threading.Event(), {"slow": [], "failing": [], "other": []}, []

    def slow(events):
        for event in events:
            got["slow"].append(event)
            assert goes_on.wait(60)
        return ["it was slow", "it was slow"]

    def failing(events):
        got["failing"].append(next(events))
        raise ValueError("gone\nfor good")

    def other(events):
        got["other"].extend(events)
        return ()

    receivers = {"a": slow, "b": failing, "c": other}
    happened = [Stopping(number) for number in range(6)]
    with sending(receivers, warned.append) as shared:
        on_event = shared(lambda event: None)
        for number, event in enumerate(happened):
            on_event(event)
            wait_until(lambda: len(got["slow"]) == 1 and len(got["other"]) == number + 1, got)  # noqa: B023  # now
        goes_on.set()
    assert [event for event in got["slow"] if isinstance(event, Stopping)] == happened[:3]
    assert got["failing"] == happened[:1]
    assert got["other"][:-1] == happened
    assert all(isinstance(got[name][-1], Ended) and got[name][-1].error is None for name in ("slow", "other"))
    assert warned == [
        "a: more than 2 events were waiting, and the further ones were dropped; the study is not affected",
        "a: it was slow; the study is not affected",
        "b: ValueError: gone; the study is not affected",
    ]


def test_what_a_receiver_has_not_got_some_time_after_the_end_is_dropped_and_told(monkeypatch):
    monkeypatch.setattr(outbox, "PATIENCE_S", 0.1)
    released, warned = threading.Event(), []

    def stuck(events):
        yield "a fault before"
        released.wait(60)

    with sending({"a": stuck}, warned.append) as shared:
        shared(lambda event: None)(Stopping(0))
    released.set()
    ends = "a fault before", "not everything was sent within 0.1 s"
    assert warned == [f"a: {end}; the study is not affected" for end in ends]
