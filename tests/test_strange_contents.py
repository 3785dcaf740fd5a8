"""Files of a stranger's study that never end, are far too large, lead elsewhere, or hold what cannot be: one message.

Each command ends at once, with the file in its message; `ls` of the folder shows the study as a row beside the others.
"""

import json
import math
import os
import shutil
import signal

import crash_host
import forging
import logs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import report_studies

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.evaluation import predictions
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.store.attempt_files import progress_of, progress_words, read_result
from carft_ray.study import take_over
from carft_ray.study.opening import open_study
from carft_ray.study.rows import best_first
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running
from carft_ray.training import thumbnails

READERS = ("status {} --json", "ls {} --json", "logs {} {best}", "report {} --html --out page.html", "report {} --json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return report_studies.make(tmp_path_factory.mktemp("sound") / "study", 3, report_studies.make_recipe(3))


@pytest.fixture
def study_dir(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound, tmp_path / "studies" / "other")
    return shutil.copytree(sound, tmp_path / "studies" / "strange")


@pytest.fixture(autouse=True)
def _ends():
    """A command that waits for ever ends with an error."""

    def end(number, frame):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ended(command, study_dir, capsys):
    """Runs a command on a study; returns its exit code and what it said."""
    capsys.readouterr()
    code = crash_host.call(command.format(study_dir, best=ended.best).split())
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    assert "internal error" not in err, err
    return code, out, err


def each_is_told(study_dir, capsys, *words, readers=READERS):
    """Each reader gives a result or one message; some give a message, with all these words."""
    said = []
    for command in readers:
        code, _, err = ended(command, study_dir, capsys)
        assert code in (0, StorageError.exit_code), (command, err)
        assert code == 0 or err.count("error: ") == 1
        said += [err] * bool(code)
    assert said
    for err in said:
        assert all(word in " ".join(err.split()) for word in words), err
    code, out, _ = ended("ls {} --json", study_dir.parent, capsys)
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["studies"]}
    assert rows["other"]["trials"]["complete"] == 3
    assert {*rows} == {"other", "strange"}
    return rows["strange"]


@pytest.fixture(autouse=True)
def _best(sound):
    ended.best = best_first(snapshot(sound).trials)[0].name


def put(path, kind):
    """Puts a thing in place of a file."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(2 * 10**12)


PLACES = {
    "stop": "stop",
    "log": "trials/{best}/log.txt",
    "manifest": "manifest.json",
    "commit": "log/00000002",
    "result": "trials/{best}/attempt-1/result.json",
    "predictions": "trials/{best}/attempt-1/predictions/validation.parquet",
    "zero-shot": "prepared/zero_shot.parquet",
    "shared": "shared_images.csv",
    "plan": "confirm/plan.json",
    "summary": "test/summary.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "device", "terabytes"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_a_device_or_terabytes_in_place_of_a_file_of_a_study_is_told(study_dir, capsys, place, kind):
    path = study_dir / PLACES[place].format(best=ended.best)
    put(path, kind)
    if place in ("stop", "log") and kind == "terabytes":  # of both a reader of the first line reads no more
        for command in READERS[:1]:
            assert ended(command, study_dir, capsys)[0] == 0
        return
    words = {"pipe": "pipe, device or socket", "device": "must not lead out of", "terabytes": "2,000,000,000,000"}
    if place == "manifest":  # a pipe or a device is none: then the folder is no study
        return
    row = each_is_told(study_dir, capsys, path.name if kind != "device" else words[kind])
    assert place not in ("commit",) or path.name in row["problem"]


@pytest.mark.parametrize("place", ["log", "result", "predictions", "commit", "manifest", "folder"])
def test_nothing_is_read_through_a_link_out_of_a_study(study_dir, capsys, tmp_path, place):
    path = study_dir / PLACES.get(place, "trials/{best}").format(best=ended.best)
    if place == "log":
        path.write_text("2026-11-30T10:00:00+00:00 my secret line\n")
    secret = path.rename(tmp_path / "secret")
    path.symlink_to(secret)
    readers = READERS if place != "predictions" else READERS[3:]
    told = 0
    for command in readers:
        code, out, err = ended(command, study_dir, capsys)
        assert "my secret line" not in out + err
        assert code in (0, StorageError.exit_code), err
        told += "must not lead out of" in err
    assert told


def test_a_link_to_itself_is_told(study_dir, capsys):
    path = study_dir / PLACES["result"].format(best=ended.best)
    path.unlink()
    path.symlink_to(path.name)
    each_is_told(study_dir, capsys, "result.json", "a loop of links", readers=READERS[3:])


def test_a_link_within_a_study_is_followed(study_dir, capsys):
    path = study_dir / "trials" / ended.best / "log.txt"
    (study_dir / "kept.txt").write_text("a line\n")
    path.symlink_to("../../kept.txt")
    code, out, _ = ended("logs {} {best}", study_dir, capsys)
    assert (code, out.splitlines()[0]) == (0, "a line")


HUGE, DEEP = 10**30, json.loads("[" * 300 + "]" * 300)
# what an attribute of each trial is made
ATTRIBUTES = {
    "attempts_s": [
        {"1": [40_000_000_000, "a"]},
        {"1": [1]},
        {"1": [1e300, 1e300]},
        {"1": [HUGE, HUGE]},
        3,
        {"1": None},
    ],
    "metrics": [{"id_accuracy": "x"}, {"id_accuracy": HUGE}, {"ood_accuracy": 0.5}, [], None, {"id_accuracy": -1}],
    "elapsed_s": [HUGE, "1", math.inf, -1],
    "alpha": [2, "x", math.nan, [], HUGE],
    "values": [3, {"kl_weight": HUGE}, {"kl_weight": math.nan}, DEEP],
    "attempt": ["1", -1, HUGE, 1.5],
    "reason": [5, {"a": 1}],
    "outcome": ["won", 3],
    "digest": [5],
    "at_chance": ["yes"],
}


def with_attribute(study_dir, name, value):
    """Gives each trial of a study an attribute, as a stranger would who makes all hashes again."""
    found = logs.commits(study_dir)
    for operation in (each for commit in found for each in commit["operations"]):
        if {name, "at_chance"} & operation.get("user_attr", {}).keys():
            operation["user_attr"] = {name: value}
    logs.rewrite(study_dir, found)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_in_the_log_that_cannot_be_is_told_and_costs_no_other_study(study_dir, capsys, sound, name):
    for value in ATTRIBUTES[name]:
        shutil.rmtree(study_dir / "log")
        shutil.copytree(sound / "log", study_dir / "log")
        with_attribute(study_dir, name, value)
        row = each_is_told(study_dir, capsys, "log/")
        assert row["problem"], value


# what a key of the best trial's result is made
RESULTS = {
    "metrics": [{"id_accuracy": "x"}, {"ood_accuracy": 0.5}, {"id_accuracy": 5}, 3],
    "alpha": ["x", 7, HUGE],
    "curve": [
        3,
        [3],
        [{"alpha": "x"}],
        [{"id_accuracy": 0.5}],
        [{"alpha": 0.5, "id_accuracy": -3, "ood_accuracy": -1}],
    ],
    "num_images": [{"id_val": 0}, {"id_val": "x"}, {"id_val": HUGE}, 3],
    "files": [
        3,
        {"fine_tuned.safetensors": 3},
        {"predictions/validation.parquet": {}},
        {"predictions/validation.parquet": {"bytes": 2**32 + 1, "sha256": ""}},
        {"fine_tuned.safetensors": {"bytes": 2**36 + 1, "sha256": ""}},
    ],
    "environment": [3],
    "train": [3],
    "references": [3, {"plain": "x"}, {"plain": 2}],
    "objective": ["x", HUGE],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_that_cannot_be_is_told(study_dir, capsys, name):
    best = best_first(snapshot(study_dir).trials)[0]
    path, sound = best.place(study_dir) / "result.json", (best.place(study_dir) / "result.json").read_text()
    digest = best.digest
    for value in RESULTS[name]:
        path.write_text(json.dumps({**json.loads(sound), name: value}))
        found = read_result(best.place(study_dir))
        if found is not None:
            logs.replace(study_dir, digest, found[1])
            digest = found[1]
        each_is_told(study_dir, capsys, "result.json", readers=READERS[3:])


RUNS = {
    "kind": "started",
    "training": "trials/t0000",
    "attempt": 1,
    "process": 1,
    "node": "",
    "began": 1.0,
    "gpus": 0.0,
}
RUNNING = [{**RUNS, "began": "now"}, {**RUNS, "gpus": None}, {**RUNS, "attempt": "1"}, {"kind": "started"}]
RUNNING += [{"kind": "at_a_time", "number": "2", "reason": ""}, {"kind": "at_a_time"}]


@pytest.mark.parametrize("record", RUNNING)
def test_what_a_stranger_says_of_running_trainings_is_told(study_dir, capsys, record):
    with logs.holding(study_dir) as log:
        log.write(record)
        for command in READERS[:1]:
            code, _, err = ended(command, study_dir, capsys)
            assert code == 5
            assert "commit " in err


@pytest.mark.parametrize(
    "provenance",
    [
        3,
        {"data": {"train": {"digest": "a", "num_images": "a"}}},
        {"class_names": [1]},
        {"code": {"a": HUGE}},
        {"test_sets": 3},
        {},
    ],
)
def test_a_provenance_that_cannot_be_is_told(study_dir, capsys, provenance):
    if isinstance(provenance, dict) and provenance:
        provenance = {**logs.kept(study_dir, "provenance")[-1], **provenance}
    with logs.holding(study_dir) as log:
        log.write({"kind": "provenance", "provenance": provenance})
    each_is_told(study_dir, capsys, "log", readers=READERS[3:])


def test_a_parameter_whose_name_is_no_text_is_told(study_dir, capsys):
    found = logs.commits(study_dir)
    for operation in [each for commit in found for each in commit["operations"] if "param_name" in each]:
        operation["param_name"] = 40_000_000_000
    logs.rewrite(study_dir, found)
    each_is_told(study_dir, capsys, "log/", "params")


@pytest.mark.parametrize("row", [{}, {"step": "a"}, {"step": None, "epoch": [1]}, {"step": 1, "subset/objective": "a"}])
def test_a_row_of_a_training_that_cannot_be_counts_for_nothing(study_dir, capsys, row):
    recipe = report_studies.make_recipe(4)
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        spec = study.next()
        folder = spec.folder(study_dir)
        (folder / "attempt-1" / "own").mkdir(parents=True)
        (folder / "attempt-1" / "own" / "state").touch()
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert ended("status {}", study_dir, capsys)[0] == 0
        assert progress_of(folder) == [0, 0]
        assert progress_words(folder)
        assert study.add_row(spec, {"step": 3, "num_steps": 9, "epoch": 1})
        assert study.settle(spec) is None


TOOK = [
    {"elapsed_s": []},
    {"elapsed_s": "1"},
    {"environment": [3]},
    {"environment": {"device": "cuda", "num_workers": []}},
]


@pytest.mark.parametrize("took", TOOK)
def test_what_an_attempt_that_was_left_behind_took_is_a_number_or_told(study_dir, took):
    place = best_first(snapshot(study_dir).trials)[0].place(study_dir)
    resources = report_studies.make_recipe(3).resources
    result = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text(json.dumps({**result, "elapsed_s": 2.5, "environment": {"num_workers": 2}}))
    assert take_over._of_result(place, resources) == (2.5, 0.0)
    (place / "result.json").write_text(json.dumps({**result, **took}))
    with pytest.raises(StorageError, match=r"result\.json: (elapsed_s|environment)"):
        take_over._of_result(place, resources)


def test_rows_of_a_training_in_very_many_small_lines_are_told(tmp_path, monkeypatch):
    """256 MB of them were 10 GB."""
    monkeypatch.setattr(files, "MOST_VALUES", 2**10)
    for content, count in ((b"{}\n", 2**9), (b'{"step": 1}\n', 2**9), (b"1\n", 2**10)):
        (tmp_path / "metrics.jsonl").write_bytes(content * count)
        files.read_json_lines(tmp_path, "metrics.jsonl")
        (tmp_path / "metrics.jsonl").write_bytes(content * (count + 1))
        with pytest.raises(StorageError, match=r"metrics\.jsonl: must have at most 1,024 values"):
            files.read_json_lines(tmp_path, "metrics.jsonl")


def test_a_library_that_does_not_say_its_version_and_a_clock_that_was_set_back_are_no_damage(study_dir, capsys):
    [provenance] = logs.kept(study_dir, "provenance")
    logs.change(study_dir, "provenance", lambda kept: kept.update(versions={**provenance["versions"], "pillow": None}))
    found = logs.commits(study_dir)
    for operation in [each for commit in found for each in commit["operations"]]:
        if operation.get("datetime_complete"):
            operation["datetime_complete"] = "2020-01-01T00:00:00.000000+00:00"  # before it began
    logs.rewrite(study_dir, found)
    for command in READERS:
        assert ended(command, study_dir, capsys)[0] == 0, command
    assert all(row.elapsed_s is not None and row.elapsed_s >= 0 for row in snapshot(study_dir).trials)


@pytest.mark.parametrize("content", [3, {}, {"rows": [3]}, {"rows": []}])
def test_a_summary_or_a_plan_that_cannot_be_is_told(study_dir, capsys, content):
    for name in ("confirm/plan.json", "test/summary.json"):
        (study_dir / name).parent.mkdir(exist_ok=True)
        (study_dir / name).write_text(json.dumps(content))
        each_is_told(study_dir, capsys, name.rpartition("/")[2], readers=READERS[3:])
        (study_dir / name).unlink()


def test_a_small_file_of_very_many_answers_is_told_before_it_is_read(tmp_path):
    """25 MB of it held 33 GB."""
    rows, path = 2**20, tmp_path / "many.parquet"
    zeros = {
        field.name: pa.array(np.zeros(rows, np.int8)).cast(field.type)
        for field in predictions.SCHEMA
        if field.name != "set"
    }
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["id_val"]))
    table = pa.table({"set": names, **zeros}, schema=predictions.SCHEMA)
    with pq.ParquetWriter(path, predictions.SCHEMA, compression="zstd") as writer:
        for _ in range(70):
            writer.write_table(table)
    assert path.stat().st_size < 2**22
    told = r"many.parquet: .* one of 73,400,320 rows; carft-ray reads at most 67,108,864"
    with pytest.raises(StorageError, match=told):
        read_predictions(path)


def test_a_long_name_of_a_set_in_very_many_rows_is_told(tmp_path, monkeypatch):
    """A file of a megabyte held 640 GB of it."""
    rows = 2**8 + 1
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 2**16]))
    zeros = [pa.array(np.zeros(rows)).cast(field.type) for field in list(predictions.SCHEMA)[1:]]
    path = tmp_path / "validation.parquet"
    pq.write_table(pa.table([names, *zeros], schema=predictions.SCHEMA), path)
    assert len(read_predictions(path)) == rows
    monkeypatch.setattr(predictions, "MOST_TABLE_BYTES", 2**24)
    told = "the names of sets must have at most 16,777,216 bytes in all rows, but got 16,842,752"
    with pytest.raises(StorageError, match=told):
        read_predictions(path)


def test_thumbnails_that_unpack_to_far_more_than_they_state_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(thumbnails, "MOST_BYTES", 2**20)
    path, picture = tmp_path / "thumbnails.parquet", {"set": "id_val", "sample_id": 1, "jpeg": b"x" * 2**16}
    for rows, kept in ((9, 9), (17, 0)):  # the bytes once, since they have a dictionary
        pq.write_table(pa.Table.from_pylist([picture] * rows, thumbnails.SCHEMA), path)
        assert len(thumbnails.read_thumbnails(path)) == kept
    pq.write_table(pa.table({"other": ["x" * 2**16] * 17}), path)
    assert thumbnails.read_thumbnails(path).equals(thumbnails.SCHEMA.empty_table())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("alpha", [7.0, math.nan, None]),
        ("confidence", [math.nan, math.inf, None]),
        ("label", [-1, None]),
        ("rank", [9]),
    ],
)
def test_answers_that_cannot_be_are_told(study_dir, capsys, name, values):
    best = best_first(snapshot(study_dir).trials)[0]
    path = best.place(study_dir) / "predictions" / "validation.parquet"
    table = read_predictions(path)
    index = table.column_names.index(name)
    for value in values:
        column = [value, *table[name].to_pylist()[1:]]
        pq.write_table(table.set_column(index, table.schema.field(name), [pa.array(column, table[name].type)]), path)
        forging.record(study_dir)
        each_is_told(study_dir, capsys, "validation.parquet", name, readers=READERS[3:4])
