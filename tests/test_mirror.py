"""A study in a bucket: read as in a folder, pulled, copied to; and what a stranger's bucket cannot do."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import killed_searches
import pytest
import report_studies
import short_training
import stand_in
from bucket_searches import RESOURCES, SEARCH, search
from bucket_server import SECRET, contents, copied, impatient, refused
from crash_host import call, printed
from logs import write_line
from study_steps import told

import carft_ray
from carft_ray import files
from carft_ray.errors import StorageError, UsageError
from carft_ray.layout import MANIFEST, RAY_LOG, STOP, WEIGHTS
from carft_ray.results.reading.study_view import read_study
from carft_ray.store import copy as copy_module
from carft_ray.store import log as log_module
from carft_ray.store.bucket import Bucket
from carft_ray.store.copy import MODELS, NUMBERS
from carft_ray.store.folder import Folder
from carft_ray.store.log import log_of
from carft_ray.study.holding import held, is_study
from carft_ray.study.ledger import TEST, check_ledger, read_ledger, record
from carft_ray.study.opening import open_study
from carft_ray.study.place import fetched, named, own_folder, pull
from carft_ray.study.uploads import open_log, uploading

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = report_studies.make(tmp_path_factory.mktemp("made") / "kinds", 4, fails=lambda number: number == 2)
    best = read_study(folder).best
    for path in (best.place(folder), folder / "trials" / best.name / "attempt-1" / "step-3"):
        path.mkdir(exist_ok=True)
        (path / WEIGHTS).write_bytes(b"weights")
    (folder / RAY_LOG).write_text("of a process")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def address(server, made):
    copied(made, server.address("a/kinds"))
    server.put("a/kinds/log/pack-00000001", b"".join(map(Folder(made).get, Folder(made).list("log"))))
    server.requests.clear()
    return server.address("a/kinds")


def test_commands_and_functions_say_of_an_address_what_they_say_of_the_folder(address, made, server, tmp_path, capsys):
    for words in (["status"], ["ls"], ["report"], ["logs", "zero_shot"]):
        verb, *more = words
        here, there = (printed(capsys, verb, str(place), *more) for place in (made, address))
        text = json.dumps(there)
        assert json.loads(text.replace(address, named(made).replace("\\", ""))) == here
        assert SECRET not in text
    found = printed(capsys, "compare", f"{address}:fine_tuning", f"{made}:fine_tuning")
    assert (found["a"]["folder"], found["rows"][0]["difference"]) == (address, 0)
    assert printed(capsys, "compare", address, str(made))["recipe"] == []
    assert printed(capsys, "status", made.as_uri())["study"] == str(made)
    study, same = carft_ray.open_study(address), carft_ray.open_study(made)
    assert study.trials().equals(same.trials())
    assert study.predictions("fine_tuning").equals(same.predictions("fine_tuning"))
    assert call(["report", address, "--html"]) == 2
    assert call(["report", address, "--html", "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert {method for method, _ in server.requests} <= {"GET", "HEAD"}, "keys that read are enough"


def test_only_what_is_needed_and_has_changed_is_fetched(address, server):
    def names():
        found = [path.partition("a/kinds/")[2] for method, path in server.requests if method == "GET"]
        server.requests.clear()
        return sorted(name for name in found if name)

    folder = fetched(address, NUMBERS)
    first = names()
    assert not [name for name in first if "predictions" in name or name.endswith(WEIGHTS) or "step-" in name]
    assert len([name for name in first if name.startswith("log/")]) <= 4, "by packs"
    fetched(address)
    assert all(name.startswith(("log/", MANIFEST)) or "predictions" in name for name in names())
    fetched(address, MODELS)
    assert [name.rpartition("/")[2] for name in names() if "/" in name and "log/" not in name] == [WEIGHTS]
    server.put("a/kinds/best.yaml", b"changed")
    server.put("a/kinds/new.txt", b"new")
    fetched(address, NUMBERS)
    assert [name for name in names() if "log/" not in name and name != MANIFEST] == ["best.yaml", "new.txt"]
    assert (folder / "best.yaml").read_bytes() == b"changed"
    Bucket(address).remove("new.txt")
    fetched(address, NUMBERS)
    assert not (folder / "new.txt").exists()
    assert len(list(folder.rglob(WEIGHTS))) == 1, "it is there still"


def test_status_and_ls_decode_each_commit_once_of_a_folder_and_of_an_address(address, made, monkeypatch, capsys):
    numbers, decoded = [], log_module.decoded
    monkeypatch.setattr(
        log_module, "decoded", lambda data, number, *more: numbers.append(number) or decoded(data, number, *more)
    )
    all_of_them = list(range(1, log_of(made).number + 1))
    for verb in ("status", "ls"):
        for place in (str(made), address, address):
            numbers.clear()
            printed(capsys, verb, place)
            assert numbers == all_of_them, (verb, place)


def test_a_search_that_goes_on_is_followed_and_another_study_takes_the_place_of_the_copy(server, tmp_path):
    folder, address = tmp_path / "study", server.address("study")
    with open_study(folder, report_studies.make_recipe(3)) as study:
        report_studies.fill(study, 2)
    copied(folder, address)
    assert len(read_study(address).trials) == 2
    log, store = log_of(folder), Bucket(address)
    with held(log, print):
        log.write({"kind": "a"})
    for name in Folder(folder).list("log"):
        store.put(name, Folder(folder).get(name))
    assert log_of(fetched(address)).number == log.number
    assert read_study(address).trials == read_study(folder).trials
    other = report_studies.make(tmp_path / "other", 1)
    for name in store.all():
        store.remove(name)
    copied(other, address)
    assert len(read_study(address).trials) == 1
    assert contents(fetched(address)).keys() == contents(other).keys()


# pull, and copies by a program of the user


def test_a_study_is_pulled_whole_and_says_that_it_is_a_copy(address, made, server, tmp_path, capsys):
    answer = printed(capsys, "pull", address, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(made)
    assert not (tmp_path / "back" / RAY_LOG).exists()
    assert (answer["address"], answer["commits"]) == (address, log_of(made).number)
    manifest = json.loads((tmp_path / "back" / MANIFEST).read_text())
    log = log_of(made)
    assert manifest.pop("copied_from") == {"place": address, "commit": log.number, "digest": log.digest}
    assert manifest == json.loads((made / MANIFEST).read_text())
    with open_study(tmp_path / "back", report_studies.make_recipe(4)):
        pass  # the search may go on in it


def test_a_copy_that_is_made_while_test_sets_are_read_has_a_sound_ledger(server, made, tmp_path):
    folder, address = shutil.copytree(made, tmp_path / "kinds"), server.address("kinds")
    copied(folder, address)

    def strike(method, path):
        if method == "GET" and path.endswith("log/00000001"):
            server.strike = lambda method, path: None
            write_line(folder, report_studies.make_recipe(4))
            copied(folder, address)

    server.strike = strike
    pull(address, tmp_path / "back")
    assert log_of(tmp_path / "back").number == log_of(folder).number > log_of(made).number
    assert check_ledger(tmp_path / "back", log_of(tmp_path / "back")) == []


def test_what_is_there_is_never_written_over(address, made, server, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    server.put("mine/file", b"mine")
    assert call(["pull", address, tmp_path / "mine"]) == 2
    assert "contains file" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"must be a study or an empty address, .* contains file"):
        own_folder(server.address("mine"))
    assert os.listdir(tmp_path / "mine") == ["file"]
    assert len([name for name in server.objects() if name.startswith("mine")]) == 1


def test_half_a_copy_is_no_study(address, server, tmp_path):
    for name in ("a/weights", "a/.step-00000032.1301-a0147b1cb809.tmp/weights", "a/.x.12-0f.tmp", "log/00000001"):
        files.write_bytes(tmp_path / "half" / name, b"12")
    assert copy_module.files_in(tmp_path / "half") == {"a/weights"}
    server.strike = lambda method, path: refused(403, "AccessDenied") if "predictions" in path else None
    with pytest.raises(StorageError, match="403 AccessDenied"):
        pull(address, tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))


def test_an_address_without_a_study_is_refused(server, capsys):
    for words in (["status", server.address("none")], ["pull", server.address("none"), "back"]):
        assert call(words) == 2
        assert f"{server.address('none')}: must be the address of a study" in capsys.readouterr().err
    assert call(["status", f"s3://{server.bucket}-other/none"]) == 5
    assert "404 NoSuchBucket" in capsys.readouterr().err


def test_no_command_that_shows_numbers_fetches_predictions_for_what_it_suggests_next(address, server, capsys):
    for words in (["status", address], ["stop", address], ["ls", address], ["logs", address, "zero_shot"]):
        assert call(words) == 0
    assert "carft-ray report" in capsys.readouterr().err
    assert not [path for method, path in server.requests if "predictions" in path]


def test_a_killed_pull_leaves_what_the_next_one_removes(address, made, tmp_path):
    code = "import sys; from carft_ray.store import copy; from carft_ray.study import place\n"
    code += "copy.ThreadPoolExecutor = lambda *given: __import__('os')._exit(9)\n"
    code += "place.pull(sys.argv[1], place.Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, address, str(tmp_path / "pulled" / "back")]
    assert subprocess.run(command, env=killed_searches.environment(), check=False).returncode == 9
    assert len(os.listdir(tmp_path / "pulled")) == 1
    pull(address, tmp_path / "pulled" / "back")
    assert os.listdir(tmp_path / "pulled") == ["back"]
    assert contents(tmp_path / "pulled" / "back") == contents(made)


def test_a_study_may_have_any_name(made, server):
    address = server.address("address.txt")
    copied(made, address)
    assert read_study(address).trials == read_study(made).trials
    assert named(fetched(address)) == address


def test_an_address_without_its_slashes_makes_no_folder(tmp_path, monkeypatch, capsys):
    recipe = str(short_training.make(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = os.listdir()
    for words in (["search", recipe, "--study", "s3:bucket/a"], ["train", recipe, "--out", "s3:bucket/a"]):
        assert call(words) == 2
        assert "did you mean 's3://bucket/a'?" in capsys.readouterr().err
    assert call(["status", "s3:bucket/a"]) == 2
    assert os.listdir() == before


@pytest.fixture(params=["installed", "stand-in"])
def aws(request, server, tmp_path):
    """Gives a function that runs a line with `aws`: the program of this machine, or a stand-in."""
    environment = {**os.environ, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    environment.pop("PYTHONPATH", None)
    if request.param == "stand-in":
        program = tmp_path / "bin" / "aws"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/aws_stand_in.py "$@"\n')
        program.chmod(0o755)
        environment["PATH"] = f"{program.parent}{os.pathsep}{environment['PATH']}"
    elif (
        not shutil.which("aws") or subprocess.run(["aws", "--version"], env=environment, capture_output=True).returncode
    ):
        pytest.skip("needs the AWS command line")
    written = re.findall(r"(?m)^\$ (aws .*)", (ROOT / "docs" / "storage.md").read_text())

    def run(line, folder, address):
        line = written[line].replace("/srv/studies/first", str(folder)).replace("s3://my-bucket/first", address)
        return subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)

    return run


LS, SYNC, CP = range(3)


@pytest.mark.slow
def test_a_copy_by_the_lines_of_the_document_is_read_and_resumed_as_the_folder_is(aws, server, made, tmp_path, capsys):
    address, folder = server.address("made"), shutil.copytree(made, tmp_path / "made")
    large = read_study(folder).best.place(folder) / "large"
    large.write_bytes(bytes(9 * 2**20))  # a program uploads it in parts
    (large.parent / ".x.12-0f.tmp").write_text("what a kill has left")
    assert aws(LS, folder, address).stdout.strip() == ""
    assert aws(SYNC, folder, address).returncode == 0
    with pytest.raises(UsageError, match=r"must be the address of a study, but got one without manifest\.json"):
        read_study(address)
    for line in (SYNC, CP):  # the same again, as after a copy that was cut off
        done = aws(line, folder, address)
        assert done.returncode == 0, done.stderr
    assert aws(LS, folder, address).stdout.strip() != ""
    for verb in ("status", "report"):
        here, there = (printed(capsys, verb, str(place)) for place in (folder, address))
        assert json.loads(json.dumps(there).replace(address, str(folder))) == here
    pull(address, tmp_path / "back")
    assert contents(tmp_path / "back") == {k: v for k, v in contents(folder).items() if not k.endswith(".tmp")}

    address, folder = server.address("searched"), tmp_path / "searched"
    search(folder, 3)
    for name in (RAY_LOG, STOP):
        (folder / name).write_text("of a process")
    for line in (SYNC, CP):
        assert aws(line, folder, address).returncode == 0
    for place in (address, folder):
        search(place, 5)
    assert told(fetched(address)) == told(folder)
    assert not {RAY_LOG, STOP} & {path.name for path in fetched(address).iterdir()}
    assert "searched/log/pack-00000001" in server.objects()
    driven, recipe = own_folder(address), stand_in.make_recipe(5, resources=RESOURCES, **SEARCH)
    with held(log := open_log(driven), print), uploading(log):
        record(driven, log, recipe, TEST)  # writes over the manifest, if it is the copied one
    assert (
        len(read_ledger(fetched(address), log_of(fetched(address)))),
        check_ledger(fetched(address), log_of(fetched(address))),
    ) == (1, [])


def test_a_study_inside_another_one_is_refused(server, address, made, tmp_path, capsys):
    inside = f"{address}/trials/child"
    recipe = str(short_training.make(tmp_path))
    before = server.objects()
    assert call(["search", recipe, "--study", inside]) == 2
    message = capsys.readouterr().err
    assert f"{inside}: must not be inside another study, but got {address}" in message
    assert f"such as {server.address('a/child')}" in message
    assert server.objects() == before
    here = shutil.copytree(made, tmp_path / "kinds")
    assert call(["search", recipe, "--study", str(here / "child")]) == 2
    assert f"Give another place, such as {tmp_path / 'child'}" in capsys.readouterr().err
    assert not (here / "child").exists()
    inner = f"/{server.bucket}/a/new/"  # keys that hold for this address alone
    server.strike = lambda method, path: None if method != "HEAD" or path.startswith(inner) else refused(403, "")
    own_folder(server.address("a/new"))


# a stranger's bucket


@pytest.mark.parametrize("name", ["a/kinds/../up", "a/kinds/x/../../../up", "a/kinds//etc", "a/kinds/x\x1b[31m"])
def test_a_name_that_leads_out_of_the_copy_is_refused(address, server, tmp_path, name):
    server.put(name, b"x")
    for copy in (lambda: fetched(address), lambda: pull(address, tmp_path / "back")):
        with pytest.raises(StorageError):
            copy()
    assert not list(tmp_path.rglob("up"))
    assert not is_study(tmp_path / "back")


def test_a_damaged_log_is_refused_and_a_damaged_pack_is_not_believed(address, server, made, tmp_path):
    server.put("a/kinds/log/pack-00000001", b"nonsense")
    assert read_study(address).trials == read_study(made).trials
    data = server.objects()["a/kinds/log/00000003"]
    server.put("a/kinds/log/00000003", data[:-5])
    with pytest.raises(StorageError, match="log/00000003: must be a whole commit"):
        pull(address, tmp_path / "back")


def test_two_that_fetch_at_once_read_the_same(address, made):
    with ThreadPoolExecutor(3) as readers:
        found = list(readers.map(lambda _: read_study(address).trials, range(3)))
    assert found == [read_study(made).trials] * 3
