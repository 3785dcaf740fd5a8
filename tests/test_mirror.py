"""A study in a bucket: read at its address as in a folder, pulled, pushed; and what a stranger's bucket cannot do."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import report_studies
from bucket_server import SECRET, impatient, refused
from crash_host import call

import carft_ray
from carft_ray import files
from carft_ray.errors import StorageError, UsageError
from carft_ray.layout import MANIFEST, RAY_LOG
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.bucket import Bucket
from carft_ray.store.folder import Folder
from carft_ray.study import mirror
from carft_ray.study.holding import held, is_study, log_of
from carft_ray.study.mirror import MODELS, NUMBERS, fetched, named, pull, push
from carft_ray.study.opening import open_study

WEIGHTS = "fine_tuned.safetensors"


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
    push(made, server.address("a/kinds"))
    server.requests.clear()
    return server.address("a/kinds")


def contents(folder):
    """What two copies of a study have in common, by name."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in (MANIFEST, RAY_LOG, "stop")}


def printed(capsys, *words):
    capsys.readouterr()
    assert call([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands_and_functions_say_of_an_address_what_they_say_of_the_folder(address, made, tmp_path, capsys):
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


def test_a_search_that_goes_on_is_followed_and_another_study_takes_the_place_of_the_copy(server, tmp_path):
    folder, address = tmp_path / "study", server.address("study")
    with open_study(folder, report_studies.make_recipe(3)) as study:
        report_studies.fill(study, 2)
    push(folder, address)
    assert len(read_study(address).trials) == 2
    log, store = log_of(folder), Bucket(address)
    with held(log, print), log.commit({"kind": "a"}):
        pass
    for name in Folder(folder).list("log"):
        store.put(name, Folder(folder).get(name))
    assert log_of(fetched(address)).number == log.number
    assert read_study(address).trials == read_study(folder).trials
    other = report_studies.make(tmp_path / "other", 1)
    for name in store.all():
        store.remove(name)
    push(other, address)
    assert len(read_study(address).trials) == 1
    assert contents(fetched(address)).keys() == contents(other).keys()


# pull and push


def test_a_study_is_pulled_whole_and_says_that_it_is_a_copy(address, made, server, tmp_path, capsys):
    answer = printed(capsys, "pull", address, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(made)
    assert f"a/kinds/{RAY_LOG}" not in server.objects()
    assert (answer["address"], answer["commits"]) == (address, log_of(made).number)
    manifest = json.loads((tmp_path / "back" / MANIFEST).read_text())
    log = log_of(made)
    assert manifest.pop("copied_from") == {"place": address, "commit": log.number, "digest": log.digest}
    assert manifest == json.loads((made / MANIFEST).read_text())
    with open_study(tmp_path / "back", report_studies.make_recipe(4)):
        pass  # the search may go on in it


def test_what_is_there_is_never_written_over(address, made, server, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    server.put("mine/file", b"mine")
    for words in (["push", made, server.address("mine")], ["pull", address, tmp_path / "mine"]):
        assert call(words) == 2
        assert "holds file" in capsys.readouterr().err
    assert os.listdir(tmp_path / "mine") == ["file"]
    assert len([name for name in server.objects() if name.startswith("mine")]) == 1


def test_half_a_copy_is_no_study(address, made, server, tmp_path):
    for name in ("a/weights", "a/.step-00000032.1301-a0147b1cb809.tmp/weights", "a/.x.12-0f.tmp", "log/00000001"):
        files.write_bytes(tmp_path / "half" / name, b"12")
    assert mirror.files_in(tmp_path / "half") == {"a/weights": 2}
    server.strike = lambda method, path: refused(403, "AccessDenied") if "predictions" in path else None
    with pytest.raises(StorageError, match="403 AccessDenied"):
        pull(address, tmp_path / "back")
    with pytest.raises(StorageError, match="403 AccessDenied"):
        push(made, server.address("half"))
    assert not list(tmp_path.glob("*back*"))
    with pytest.raises(UsageError, match=r"must be the address of a study, but got one without manifest\.json"):
        read_study(server.address("half"))


def test_an_address_without_a_study_is_refused(server, capsys):
    for words in (["status", server.address("none")], ["pull", server.address("none"), "back"]):
        assert call(words) == 2
        assert f"{server.address('none')}: must be the address of a study" in capsys.readouterr().err
    assert call(["status", f"s3://{server.bucket}-other/none"]) == 5
    assert "404 NoSuchBucket" in capsys.readouterr().err


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
