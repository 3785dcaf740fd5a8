"""A study's files on a node that does not see its folder, without Ray: the actor is an object of this process."""

import contextlib
import os
import shutil
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
import stand_in
from unseen import Here, opened, plan_of, unseen

from carft_ray import files
from carft_ray.data.cache import own_folder
from carft_ray.errors import MachineError, StorageError
from carft_ray.launch.workers import file_transfer, node_files
from carft_ray.launch.workers.file_transfer import Entry, FileServer, StudyFiles, entries
from carft_ray.launch.workers.mailbox import Mailbox, Wish
from carft_ray.launch.workers.node_files import UNSEEN, Delivery, needed, prepared_at_hand, sees
from carft_ray.launch.workers.worker import run_worker
from carft_ray.store.attempt_files import checkpoints, read_result, reported_rows
from carft_ray.training.run_context import RunContext

PLACE = "trials/t0000-0000/attempt-1"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(file_transfer, "RETRY_EVERY_S", 0.0)
    monkeypatch.setattr(file_transfer, "PIECE_BYTES", 1000)


def content(folder, prefix="trials"):
    return {each.name: (folder / each.name).read_bytes() for each in entries(folder, prefix)}


def write(folder, name, data=b"x"):
    files.write_bytes(folder / name, data)


@pytest.mark.parametrize("loses", [0, 3])
def test_files_and_folders_come_and_go_whole_whatever_answers_are_lost(tmp_path, loses):
    study, node = tmp_path / "study", tmp_path / "node"
    made = {"trials/a/attempt-1/step-00000010/w": os.urandom(4321), "trials/a/attempt-1/step-00000010/state.json": b""}
    for name, data in made.items():
        write(node, name, data)
    away = Here(study, loses)
    away.send(node, "trials/a/attempt-1/step-00000010")
    assert content(study) == made
    assert away.counts == (0, 4321)
    assert away.largest <= 1000
    write(study, "trials/a/metrics.jsonl", b"y" * 2500)
    other = tmp_path / "other"
    away.get(away.entries("trials"), other)
    assert content(other) == content(study)
    assert entries(other, "trials") == entries(study, "trials")  # the times, too
    calls = len(away.calls)
    away.get(entries(study, "trials"), other)
    assert len(away.calls) == calls  # what is there is not fetched again
    away.get([Entry("trials/a/attempt-1/step-00000020/state.json", 5, 5)], other)  # which has vanished meanwhile
    assert content(other) == content(study)
    write(node, "trials/a/attempt-1/rows.jsonl", b"1\n")
    away.send(node, "trials/a/attempt-1/rows.jsonl")
    write(node, "trials/a/attempt-1/rows.jsonl", b"1\n2\n")
    away.send(node, "trials/a/attempt-1/rows.jsonl")
    assert (study / "trials/a/attempt-1/rows.jsonl").read_bytes() == b"1\n2\n"
    away.remove("trials/a/attempt-1/rows.jsonl")
    assert content(study).keys() == {*made, "trials/a/metrics.jsonl"}


@pytest.mark.parametrize("name", ["log/00000001", "manifest.json", "../x", "trials/../../x", "/etc/passwd", ""])
def test_what_is_no_file_of_trainings_is_refused(tmp_path, name):
    write(tmp_path / "study", "log/00000001")
    away = Here(tmp_path / "study")
    for call in (
        lambda: away.entries(name),
        lambda: away.get([Entry(name, 1, 1)], tmp_path / "node"),
        lambda: away.remove(name),
        lambda: away.result(away.begin("write", name, "1-a", ".", 0, b"x"), 1),
        lambda: away.result(away.begin("finish", name, "1-a", {}), 1),
    ):
        with pytest.raises(StorageError, match="must"):
            call()
    assert (tmp_path / "study/log/00000001").read_bytes() == b"x"


@pytest.mark.parametrize("inside", ["../../x", "../../../x", "/tmp/x", "", "a/../../x"])
def test_a_file_inside_of_what_is_sent_cannot_lie_outside_of_it(tmp_path, inside):
    (tmp_path / "study").mkdir()
    server = FileServer(tmp_path / "study")
    server.write("trials/a", "1-a", "state.json", 0, b"x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="must be a name of an object"):
        server.write("trials/a", "1-a", inside, 0, b"x")
    with pytest.raises(StorageError, match="must be a name of an object"):
        server.finish("trials/a", "1-a", {inside: 1})
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StorageError, match="must be the name of an upload"):
        server.write("trials/a", "../../1", "state.json", 0, b"x")


def test_a_driver_that_is_silent_makes_the_machine_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(file_transfer, "PATIENCE_S", 0.1)
    with pytest.raises(MachineError, match="the driver's machine does not answer: no answer"):
        Here(tmp_path, loses=1).entries("trials")


def test_an_attempt_needs_the_newest_weights_or_else_two_checkpoints_and_what_the_user_keeps():
    names = ["metrics.jsonl", "log.txt", "tensorboard/events", "attempt-1/rows.jsonl", "attempt-1/own/a/b"]
    whole = ("x", "state.json")
    names += [f"attempt-{a}/step-{step:08d}/{file}" for a, step in ((1, 5), (9, 20), (10, 10)) for file in whole]
    names += [f"attempt-{a}/step-{step:08d}/x" for a, step in ((9, 30), (10, 40))]  # what kills have left of two
    names += ["attempt-2/own/c", "attempt-10/own/d", "attempt-10/predictions/validation.parquet"]
    found = [Entry(f"trials/t/{name}", 1, 1) for name in names]
    wanted = {each.name.removeprefix("trials/t/") for each in needed(found, "trials/t")}
    steps = {f"attempt-{a}/step-{step:08d}/{file}" for a, step in ((9, 20), (10, 10)) for file in whole}
    assert wanted == {"metrics.jsonl", "attempt-10/own/d", *steps}
    weights = [Entry(f"trials/t/attempt-{a}/fine_tuned.safetensors", 1, 1) for a in (9, 10)]
    wanted = {each.name.removeprefix("trials/t/") for each in needed([*found, *weights], "trials/t")}
    assert wanted == {"metrics.jsonl", "attempt-10/own/d", "attempt-10/fine_tuned.safetensors"}


def test_a_node_knows_the_study_by_a_commit_of_its_search(tmp_path):
    for name in ("one", "other"):
        with opened(tmp_path / name) as study:
            runtime = plan_of(study, Here(study.study_dir))
            assert sees(runtime)
            assert not sees(replace(runtime, commit=(runtime.commit[0] + 1, runtime.commit[1])))
    assert not sees(replace(runtime, study_dir=tmp_path / "one" / "study"))
    assert not sees(replace(runtime, study_dir=tmp_path / "nothing"))
    assert sees(replace(runtime, study_dir=tmp_path / "nothing", files=None))  # a Ray of this machine


def test_a_preparation_elsewhere_lies_in_the_study_its_last_file_last(tmp_path):
    with opened(tmp_path) as study:
        away = Here(study.study_dir)
        write(study.study_dir, "prepared/sets/train.arrow", b"listed")
        with prepared_at_hand(unseen(plan_of(study, away))) as folder:
            assert not folder.is_relative_to(study.study_dir)
            assert (folder / "sets" / "train.arrow").read_bytes() == b"listed"
            for name in ("prepared.json", "heads.safetensors", "zero_shot.parquet"):
                write(folder, name, name.encode())
        sent = [given[0] for method, *given in away.calls if method == "finish"]
    assert sent == ["prepared/heads.safetensors", "prepared/zero_shot.parquet", "prepared/prepared.json"]
    assert {path.name for path in (tmp_path / "study" / "prepared").iterdir()} == {"sets", *map(os.path.basename, sent)}


@pytest.mark.parametrize("num_sent", [0, 1, 2])
def test_a_preparation_that_is_killed_while_it_is_sent_is_made_again_on_the_same_node(tmp_path, monkeypatch, num_sent):
    names = ["heads.safetensors", "zero_shot.parquet", "prepared.json"]

    def prepare(folder):
        if not (folder / "prepared.json").exists():
            for name in names:
                write(folder, name, name.encode())

    with opened(tmp_path) as study:
        away, left, plain = Here(study.study_dir), iter(range(num_sent)), StudyFiles.send

        def send(self, folder, name):
            if next(left, None) is None:
                raise SystemExit
            plain(self, folder, name)

        runtime = unseen(plan_of(study, away))
        with monkeypatch.context() as patched:
            patched.setattr(StudyFiles, "send", send)
            with pytest.raises(SystemExit), prepared_at_hand(runtime) as folder:
                prepare(folder)
        with prepared_at_hand(runtime) as folder:
            prepare(folder)
        assert content(study.study_dir, "prepared") == {f"prepared/{name}": name.encode() for name in names}


@pytest.mark.parametrize("loses", [0, 5])
def test_a_training_elsewhere_leaves_in_the_study_what_one_there_leaves(tmp_path, loses):
    kept = []
    for name in ("there", "elsewhere"):
        with opened(tmp_path / name, epochs=5) as study:
            away = Here(study.study_dir, loses)
            runtime = plan_of(study, away)
            spec = stand_in.spec(1)
            ended = run_worker(unseen(runtime) if name == "elsewhere" else runtime, spec, RunContext())
            assert ended == "go"
            kept.append(content(study.study_dir))
            assert read_result(spec.place(study.study_dir)) is not None
            assert [row["epoch"] for row in reported_rows(spec.folder(study.study_dir))] == [1, 2, 3, 4, 5]
    there, elsewhere = kept
    for name in [name for name in (there.keys() | elsewhere) if "/step-" not in name]:
        assert there[name] == elsewhere[name], name
    finished = [given[0] for method, *given in away.calls if method == "finish"]
    assert finished[-1].endswith("/result.json")
    assert len(checkpoints(tmp_path / "elsewhere/study/trials/t0000-0000")) == 2
    assert not list((tmp_path / "elsewhere" / "cache").rglob("trials/*"))


def test_an_attempt_continues_elsewhere_from_what_the_one_before_has_left(tmp_path):
    with opened(tmp_path, epochs=4) as study:
        stand_in.save(study.study_dir / "trials/t0000-0000", 1, 3)
        runtime = unseen(plan_of(study, Here(study.study_dir)))
        rows, box = [], Mailbox()
        run_worker(replace(runtime, mailbox=box), stand_in.spec(2), RunContext(report=rows.append))
        posted = box.exchange({"trials/t0000-0000": Wish(2)})["trials/t0000-0000"].records
    assert [row["epoch"] for row in rows] == [4]
    texts = [value for kind, value in posted if kind == "log"]
    assert "from step 30" in texts[0]
    assert "MB came through Ray" in texts[1]


def test_rows_are_there_before_the_checkpoint_that_has_them_and_old_ones_go(tmp_path):
    node, study = tmp_path / "node", tmp_path / "study"
    away, place = Here(study), PLACE
    delivery = Delivery(away, node, stand_in.spec(1))
    for epoch in range(1, 5):
        write(node, f"{place}/rows.jsonl", b"row\n" * epoch)
        stand_in.save(node / "trials/t0000-0000", 1, epoch)
        delivery.checkpoints()
        assert [path.name for _, path in checkpoints(study / "trials/t0000-0000")] == [
            f"step-{10 * each:08d}" for each in range(epoch, max(0, epoch - 2), -1)
        ]
    sent = [given[0].removeprefix(f"{place}/") for method, *given in away.calls if method == "finish"]
    assert sent == [name for each in range(1, 5) for name in ("rows.jsonl", f"step-{10 * each:08d}")]


def test_a_checkpoint_that_vanishes_while_it_is_sent_leaves_nothing(tmp_path):
    node, study, place = tmp_path / "node", tmp_path / "study", PLACE
    stand_in.save(node / "trials/t0000-0000", 1, 1)
    write(node, f"{place}/step-00000010/weights", b"x" * 5000)
    away, plain = Here(study), FileServer.write

    def write_and_remove(*given):
        plain(*given)
        shutil.rmtree(node / place / "step-00000010", ignore_errors=True)

    away.server.write = write_and_remove.__get__(away.server)
    Delivery(away, node, stand_in.spec(1)).checkpoints()
    assert list((study / place).iterdir()) == []


def test_what_the_user_keeps_goes_with_its_report_and_what_he_removes_is_removed(tmp_path):
    node, study, place = tmp_path / "node", tmp_path / "study", PLACE
    delivery = Delivery(Here(study), node, stand_in.spec(1))
    write(node, f"{place}/own/one.pt")
    write(node, f"{place}/own/deep/two.pt")
    delivery.own()
    (node / place / "own/one.pt").unlink()
    write(node, f"{place}/own/deep/two.pt", b"new")
    delivery.own()
    assert content(study) == {f"{place}/own/deep/two.pt": b"new"}


@pytest.mark.parametrize("place", [FileServer, stand_in])  # of the node, too
@pytest.mark.parametrize("error", [StorageError("No space left"), OSError(28, "No space left")])
def test_a_disk_that_is_full_or_broken_ends_the_training_as_on_the_drivers_machine(tmp_path, monkeypatch, error, place):
    monkeypatch.setattr(node_files, "SEND_EVERY_S", 0.01)
    full = mock.Mock(side_effect=error)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", mock.Mock(side_effect=OSError))  # which only a hang needs
    with opened(tmp_path, epochs=200) as study:
        runtime = unseen(plan_of(study, Here(study.study_dir)))
        monkeypatch.setattr(place, "save" if place is stand_in else "write", full)
        failure = run_worker(runtime, stand_in.spec(1), RunContext())
    assert (failure.outcome, failure.exit_code) == ("fatal", 5)
    assert "No space left" in failure.reason
    assert not [thread for thread in threading.enumerate() if thread.name == "delivery"]


def test_old_folders_of_other_studies_go(tmp_path):
    with opened(tmp_path) as study:
        runtime = plan_of(study, Here(study.study_dir))
        place = node_files.here(runtime)
        old, new, others = ("0" * 32, "1" * 32, "2" * 32)
        for name, days in ((old, 8), (new, 1), (others, 99)):
            with contextlib.nullcontext() if name == others else own_folder(place.parent.parent, UNSEEN, name):
                write(place.parent / name / "trials" / "t0", "x")
            os.utime(place.parent / name, 2 * (time.time() - days * 24 * 3600,))
        (place.parent / ("3" * 32)).symlink_to(place.parent / old)
        assert node_files.here(runtime) == place
        assert {path.name for path in place.parent.iterdir()} == {new, others, "3" * 32, place.name}
