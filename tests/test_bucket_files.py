"""Nodes that do not see a study in a bucket, and read and write the bucket themselves; without Ray."""

import itertools
import json
from dataclasses import replace
from unittest import mock

import pytest
import stand_in
from bucket_server import SECRET, bucket_server, refused
from unseen import Here, opened, plan_of, unseen

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.driver import Driver
from carft_ray.launch.workers import file_transfer, node_files
from carft_ray.launch.workers.file_transfer import BucketFiles, FileServer, entries
from carft_ray.launch.workers.mailbox import Exchange, Mailbox, Post, Wish
from carft_ray.launch.workers.node_files import Delivery, needed, uses_bucket
from carft_ray.launch.workers.preparation import _sight
from carft_ray.launch.workers.worker import run_worker
from carft_ray.layout import WEIGHTS
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.attempt_files import progress_of, progress_words
from carft_ray.store.bucket import Bucket
from carft_ray.store.copy import NUMBERS
from carft_ray.study.best import Retention
from carft_ray.study.opening import open_study
from carft_ray.study.place import own_folder
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import TrialRow
from carft_ray.training.run_context import RunContext

TRAINING = "trials/t0000-0000"
PLACE = f"{TRAINING}/attempt-1"
RECIPE = stand_in.make_recipe(3, sampler={"name": "random"}, keep_checkpoints=1, baselines={})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("carft_ray.store.bucket.MAX_RETRIES", 0)
    monkeypatch.setattr(node_files, "SEND_EVERY_S", 0.01)
    with bucket_server(monkeypatch) as server:
        yield server


def bucket_plan(server, study, loses=0):
    """The runtime of nodes that do not see the folder, of a study whose log is in the bucket, too."""
    address = server.address("study")
    for number in range(1, study.log.number + 1):
        name = f"log/{number:08d}"
        Bucket(address).put(name, (study.study_dir / name).read_bytes())
    return unseen(plan_of(study, Here(study.study_dir, loses, address)), bucket=address)


def with_bucket(runtime):
    """The commit that the bucket has, of a node that has no such folder."""
    number = runtime.commit[0]
    digest = Bucket(runtime.bucket).look(f"log/{number:08d}").partition(b"\n")[0].decode()
    return replace(runtime, commit=(number, digest), study_dir=runtime.study_dir.parent / "elsewhere")


def of_trials(server):
    found = {name.removeprefix("study/"): data for name, data in server.objects().items()}
    return {name: data for name, data in found.items() if name.startswith("trials/")}


def posted(box, attempt=1):
    return box.exchange({TRAINING: Wish(attempt)})[TRAINING].records


def trained(runtime, attempt, box=None):
    rows, box = [], box or Mailbox()
    assert run_worker(replace(runtime, mailbox=box), stand_in.spec(attempt), RunContext(report=rows.append)) == "go"
    return [row["epoch"] for row in rows], posted(box, attempt)


def deny(method, code=403):
    return lambda did, path: refused(code, "AccessDenied") if did == method and "/study/" in path else None


def test_a_node_tries_the_bucket_once_for_each_search_and_leaves_nothing_there(server, tmp_path):
    with opened(tmp_path) as study:
        runtime = with_bucket(bucket_plan(server, study))
        before = server.objects()
        server.requests.clear()
        assert uses_bucket(runtime)
        assert [method for method, _ in server.requests] == ["GET", "PUT"]
        server.strike = deny("GET")
        assert uses_bucket(runtime)  # it is known
        for method in ("GET", "PUT"):
            server.strike = deny(method)
            assert not uses_bucket(replace(runtime, commit=(1, study.log.digest_of(1) if method == "PUT" else "")))
        server.strike = lambda method, path: None
        assert not uses_bucket(replace(runtime, commit=(1, "of another study")))
        assert not uses_bucket(replace(runtime, bucket=""))
        assert not uses_bucket(replace(runtime, bucket=server.address("nothing")))
        assert server.objects() == before
    kept = next((tmp_path / "cache").rglob("bucket.json")).read_text()
    assert SECRET not in kept


def test_a_node_with_the_bucket_leaves_there_what_one_without_leaves_in_the_folder(server, tmp_path):
    with opened(tmp_path / "one", epochs=4) as study:
        runtime = bucket_plan(server, study)
        trained(replace(runtime, bucket=""), 1)
        through_ray = {
            each.name: (study.study_dir / each.name).read_bytes() for each in entries(study.study_dir, TRAINING)
        }
    with opened(tmp_path / "other", epochs=4) as study:
        runtime = with_bucket(bucket_plan(server, study))
        server.requests.clear()
        epochs, records = trained(runtime, 1)
        assert entries(study.study_dir, "trials") == []
        assert [method for method, *_ in runtime.files.calls] == ["entries"] * 2
    assert epochs == [1, 2, 3, 4]
    there = of_trials(server)
    assert {name: there[name] for name in through_ray} == through_ray
    sent = [name for kind, names in records if kind == "sent" for name in names]
    assert sent[-1] == f"{PLACE}/result.json"
    assert set(sent) == there.keys()
    assert "DELETE" not in {method for method, _ in server.requests}
    assert "MB came from the bucket" in [text for kind, text in records if kind == "log"][-1]
    assert not list((tmp_path / "other/cache").rglob("trials/*"))


@pytest.mark.parametrize("kinds", ["bucket bucket", "bucket ray", "bucket sees", "ray bucket"])
def test_an_attempt_continues_on_a_node_of_another_kind(server, tmp_path, kinds):
    first, second = kinds.split()
    with opened(tmp_path, epochs=4) as study:
        plan = bucket_plan(server, study)
        runtimes = {"bucket": with_bucket(plan), "ray": plan, "sees": replace(plan, commit=(1, study.log.digest_of(1)))}
        node = tmp_path / "killed"
        away = plan.files if first == "ray" else BucketFiles(plan.bucket, plan.files, PLACE, lambda kind, value: None)
        delivery = Delivery(away, node, stand_in.spec(1))
        for epoch in (1, 2, 3):
            files.write_bytes(node / PLACE / "rows.jsonl", b'{"step": 10}\n' * epoch)
            stand_in.save(node / TRAINING, 1, epoch)
            delivery.checkpoints()
        half = f"{TRAINING}/attempt-1/step-00000040/weights.safetensors"  # a kill between two files
        Bucket(plan.bucket).put(half, b"half")
        epochs, records = trained(runtimes[second], 2)
        assert epochs == [4]
        assert "from step 30" in records[0][1]
        assert not files.exists(study.study_dir / half)


def test_a_half_checkpoint_is_not_among_the_newest_two(server, tmp_path):
    store = Bucket(server.address("study"))
    for step, names in ((10, ("state.json", "w")), (20, ("state.json", "w")), (30, ("w",)), (40, ("w",))):
        for name in names:
            store.put(f"{PLACE}/step-{step:08d}/{name}", b"x")
    (tmp_path / "study").mkdir()
    found = FileServer(tmp_path / "study", server.address("study")).entries(TRAINING)
    assert {each.name.split("/")[3] for each in needed(found, TRAINING)} == {"step-00000010", "step-00000020"}


def test_checkpoints_that_are_not_whole_replace_none(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open_study(own_folder(server.address("study")), stand_in.make_recipe(1)) as study:
        store = study.log.store

        def left(*names):
            for name in names:
                store.put(f"{PLACE}/step-{name}", b"x")
            store.learn([f"{PLACE}/step-{name}" for name in names])
            store.upload_new(checkpoints=True)
            return sorted(name.partition("/step-")[2] for name in of_trials(server))

        whole = [f"{step}/{name}" for step in (10, 20) for name in ("state.json", "w")]
        assert left(*whole, "30/w", "40/w") == [*whole, "30/w", "40/w"]
        assert left("50/state.json") == ["20/state.json", "20/w", "30/w", "40/w", "50/state.json"]


def test_a_newer_file_of_the_drivers_folder_comes_from_there(server, tmp_path):
    study, node, name = tmp_path / "study", tmp_path / "node", f"{PLACE}/own/model"
    address = server.address("study")
    Bucket(address).put(name, b"old")
    Bucket(address).put(f"{PLACE}/own/other", b"of the bucket")
    files.write_bytes(study / name, b"new")
    away = BucketFiles(address, Here(study, address=address), PLACE, lambda kind, value: None)
    away.get(away.entries(TRAINING), node)
    assert (node / name).read_bytes() == b"new"
    assert (node / PLACE / "own/other").read_bytes() == b"of the bucket"


def test_a_bucket_that_fails_meanwhile_leaves_the_rest_to_ray(server, tmp_path):
    with opened(tmp_path, epochs=4) as study:
        runtime = with_bucket(bucket_plan(server, study))
        server.strike = lambda method, path: refused(403, "ExpiredToken") if "step-00000030" in path else None
        epochs, records = trained(runtime, 1)
        there = {each.name for each in entries(study.study_dir, TRAINING)}
    assert epochs == [1, 2, 3, 4]
    assert {f"{PLACE}/{name}" for name in ("result.json", WEIGHTS, "step-00000040/state.json")} <= there
    assert f"{PLACE}/result.json" not in of_trials(server)
    told = [text for kind, text in records if kind == "log" and "through Ray from here on" in text]
    assert len(told) == 1
    assert "ExpiredToken" in told[0]
    assert SECRET not in str(records)
    assert "an-id-of-the-tests" not in str(records)


def test_what_the_user_removes_is_told_and_nothing_else_may_be_written(server, tmp_path):
    told = []
    away = BucketFiles(server.address("study"), Here(tmp_path / "study"), PLACE, lambda *record: told.append(record))
    delivery = Delivery(away, tmp_path, stand_in.spec(1))
    for name in ("one", "two"):
        files.write_bytes(tmp_path / PLACE / "own" / name, b"x")
    delivery.own()
    (tmp_path / PLACE / "own/one").unlink()
    delivery.own()
    assert told[-1] == ("gone", [f"{PLACE}/own/one"])
    assert len(of_trials(server)) == 2
    for name in (f"{TRAINING}/attempt-2/rows.jsonl", "prepared/prepared.json", "log/00000001", f"{PLACE}/../x"):
        with pytest.raises(StorageError, match="must be"):
            away.send(tmp_path, name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_before_any_upload_leaves_what_the_next_attempt_ends_with_the_same_result(server, tmp_path, monkeypatch):
    """``SystemExit`` ends the thread that uploads, and the attempt at its end."""
    results, plain = [], Bucket.upload
    for number in range(9):
        left = iter(range(number))

        def upload(self, name, path, left=left):
            if next(left, None) is None:
                raise SystemExit
            plain(self, name, path)

        with opened(tmp_path / str(number), epochs=2) as study:
            runtime = with_bucket(bucket_plan(server, study))
            Bucket(runtime.bucket).remove("trials")
            with monkeypatch.context() as patched:
                patched.setattr(Bucket, "upload", upload)
                try:
                    trained(runtime, 1)
                except SystemExit:
                    pass
                else:
                    break
            epochs, _ = trained(runtime, 2)
            there = of_trials(server)
            saved = [name for name in there if name.startswith(f"{PLACE}/step-")]
            assert epochs == ([] if f"{PLACE}/{WEIGHTS}" in there else [1, 2][len(saved) :])
            results.append(json.loads(there[f"{TRAINING}/attempt-2/result.json"]))
    assert len(results) >= 4
    assert [each == results[0] for each in results] == [True] * len(results)


def test_the_driver_learns_of_an_attempts_own_files_and_brings_its_numbers_before_it_judges(tmp_path, monkeypatch):
    with opened(tmp_path) as study:
        calls, box = [], Mailbox()
        for name in ("learn", "bring", "forget_files"):
            monkeypatch.setattr(study.log.store, name, lambda *given, name=name: calls.append((name, *given)))
        driver = Driver(study, AtATime(1), lambda event: None, exchange=Exchange(box))
        spec = driver.propose("one")
        driver.started("one")
        place = spec.attempt_name
        bad = [
            f"{spec.training}/attempt-2/x",
            "log/00000001",
            f"{place}/../../x",
            f"{place}x/y",
            place,
            "x" * 2000,
            3,
            None,
        ]
        records = [("sent", [f"{place}/own/a", f"{place}/own/b", *bad]), ("gone", [f"{place}/own/a", *bad])]
        records += [("sent", "text"), ("gone", [f"{place}/own/b"]), ("sent", [f"{place}/own/b"]), ("sent", None)]
        box.post(Post(spec.training, 1, records=tuple(records)))
        driver.exchange.now()
        driver.poll(at_once=True)
        assert calls == [
            ("learn", [f"{place}/own/a", f"{place}/own/b"]),
            ("learn", []),
            ("learn", [f"{place}/own/b"]),
            ("learn", []),
        ]
        calls.clear()
        driver.ended("one", "its node is gone")
        assert calls == [("forget_files", f"{place}/own/a"), ("bring", place, NUMBERS)]
        calls.clear()
        driver.propose("two")
        driver.ended("two", "its node is gone")
        assert "bring" not in [name for name, *_ in calls]  # it has put nothing into the bucket


def test_what_is_only_in_the_bucket_counts_as_progress_and_goes_when_the_training_has_ended(tmp_path):
    known = [f"{TRAINING}/attempt-1/step-00000030/state.json", f"{TRAINING}/tensorboard/events", f"{TRAINING}/log.txt"]
    folder = tmp_path / TRAINING
    assert progress_of(folder, known) == [0, 30]
    assert progress_words(folder, known) == "step 30 (epoch 1)"
    assert progress_of(folder, [*known, f"{TRAINING}/attempt-1/{WEIGHTS}"]) == [1, 30]
    known += [f"{TRAINING}/attempt-2/step-00000040/state.json", f"{TRAINING}/attempt-2/{WEIGHTS}"]
    store = mock.Mock(known=lambda training: known)
    row = TrialRow("trial", 0, "t0000-0000", {}, 2, "complete", objective=0.5)
    Retention(tmp_path, stand_in.make_recipe(1), store).ended(row)
    forgotten = {call.args[0].removeprefix(f"{TRAINING}/") for call in store.forget_files.mock_calls}
    assert {"attempt-1", "attempt-2/step-00000040"} <= forgotten
    assert not forgotten & {"attempt-2", f"attempt-2/{WEIGHTS}"}


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ([], "all 3 nodes see /s"),
        ([("a", False)], "1 of 3 nodes do not see /s: its files go through Ray (a)"),
        ([("a", True), ("b", True)], "2 of 3 nodes do not see /s: 2 of them use the bucket"),
        ([("a", False), ("a", False)], "2 of 3 nodes do not see /s: its files go through Ray (a)"),
        (
            [("b", True), ("c", False), ("a", True)],
            "3 of 3 nodes do not see /s: 2 of them use the bucket, the files of 1 go through Ray (c)",
        ),
    ],
)
def test_the_line_says_how_nodes_that_do_not_see_the_folder_have_its_files(without, words):
    assert _sight("/s", 3, without) == words


def test_the_files_of_the_driver_say_whether_nodes_may_use_the_bucket(server, tmp_path, monkeypatch):
    monkeypatch.setattr(file_transfer, "StudyFiles", lambda folder, address="": Here(folder, address=address))
    monkeypatch.setattr(file_transfer, "started_here", lambda make, name, *given, threads: given)
    with opened(tmp_path) as study:
        plan = with_bucket(bucket_plan(server, study))
        asked = study.study_dir, plan.bucket, plan.commit
        assert file_transfer.start_files(*asked)[1] == plan.bucket
        server.strike = deny("PUT")
        assert file_transfer.start_files(*asked)[1] == ""
        assert file_transfer.start_files(study.study_dir, "", plan.commit)[1] == ""


def searched(server, name, nodes):
    """Searches three trials, the second of which is lost once; which kind of node each attempt has, ``nodes`` says."""
    address, turns = server.address(name), itertools.cycle(nodes)
    with open_study(own_folder(address), RECIPE) as study:
        recover_running(study)
        plan, box, epochs = plan_of(study, Here(study.study_dir, address=address)), Mailbox(), []
        driver = Driver(study, AtATime(1), lambda event: None, exchange=Exchange(box))
        while (spec := driver.propose("one")) is not None:
            driver.started("one")
            kind = next(turns)
            runtime = replace(plan, bucket=address, mailbox=box)
            if kind != "sees":
                runtime = replace(runtime, study_dir=study.study_dir.parent / "elsewhere")
            is_lost = (spec.number, spec.attempt) == (1, 1)
            context = RunContext(report=lambda row: epochs.append(row["epoch"]), should_stop=lambda lost=is_lost: lost)
            run_worker(unseen(runtime) if kind == "ray" else runtime, spec, context)
            driver.ended("one")
        assert driver.failure is None
        assert epochs == [1, 2] * 3
    found = {path.partition("/")[2] for path in server.objects() if path.startswith(f"{name}/trials/")}
    return {path for path in found if "tensorboard" not in path}


@pytest.mark.slow
def test_a_search_leaves_the_same_in_the_bucket_however_its_nodes_have_the_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    left = []
    for name, nodes in {"a": ["sees"], "b": ["bucket"], "c": ["ray", "bucket", "sees"], "d": ["bucket", "ray"]}.items():
        left.append(searched(server, name, nodes))
        assert [row.outcome for row in read_study(server.address(name)).trials] == ["complete"] * 3
    [weights] = [path for path in left[0] if path.endswith(WEIGHTS)]
    assert left == [left[0]] * 4
    late = [f"a/{weights.removesuffix(WEIGHTS)}step-00000090/w", f"a/{weights.partition('/attempt-')[0]}/attempt-9/x"]
    for name in late:  # of nodes that were killed, or taken for lost
        server.put(name, b"x")
    with open_study(own_folder(server.address("a")), RECIPE) as study:
        recover_running(study)
    assert not server.objects().keys() & set(late)
    assert f"a/{weights}" in server.objects()
