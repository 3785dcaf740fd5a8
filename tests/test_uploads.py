"""A search on a study in a bucket: killed, resumed by another machine, taken over; and what the bucket holds then."""

import json
import subprocess
import sys
import time

import killed_searches
import pytest
import short_training
import stand_in
from bucket_server import SECRET, impatient, refused
from crash_host import call
from study_steps import told
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_mirror import contents

from carft_ray.errors import StorageError
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.mirror import NUMBERS, own_folder, pull
from carft_ray.study.rows import best_row

RESOURCES, SEARCH = {"executor": "debug"}, {"epochs": 3, "sampler": {"name": "random"}}
ELSEWHERE = "import sys, search_driver; from carft_ray.study import uploads; uploads.UPLOAD_EVERY_S = 0.2; "
ELSEWHERE += "sys.exit(search_driver.main(*sys.argv[1:]))"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path / "here") as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a search finds in a folder."""
    return told(search(tmp_path_factory.mktemp("whole") / "study", 3).study_dir)


def search(place, trials):
    recipe = stand_in.make_recipe(trials, resources=RESOURCES, **SEARCH)
    return run_search(recipe, own_folder(place), runner=Runner(stand_in.prepare, stand_in.train))


def ended(server):
    return sum(b'"outcome"' in data for name, data in server.objects().items() if "/log/0" in name)


def searching(server, cache):
    """A search of three trials by a process with another cache, as another machine has it."""
    environment = killed_searches.environment(**server.environment, XDG_CACHE_HOME=str(cache))
    words = [server.address("study"), "3", json.dumps(RESOURCES), "", json.dumps(SEARCH)]
    return subprocess.Popen([sys.executable, "-c", ELSEWHERE, *words], env=environment)


@pytest.mark.slow
def test_a_killed_search_is_resumed_from_another_machine(server, whole, tmp_path, capsys):
    address = server.address("study")
    with searching(server, tmp_path / "elsewhere") as process:
        while ended(server) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    before = ended(server)
    search(address, 3)
    assert ended(server) >= before
    folder = own_folder(address, brings=False)
    assert told(folder) == whole
    assert told(read_study(address).study_dir) == whole
    assert call(["status", address, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["study"], status["finished"], status["search"]["running"]) == (address, 3, False)
    pull(address, tmp_path / "back")
    assert told(tmp_path / "back") == whole
    assert contents(tmp_path / "back") == contents(folder)
    for name, data in server.objects().items():
        assert SECRET not in name
        assert SECRET.encode() not in data, name


@pytest.mark.slow
def test_a_search_is_stopped_from_another_machine_and_only_the_one_that_was_asked(server, whole, tmp_path, capsys):
    address = server.address("study")
    server.put("study/requests/00000099", b"of an earlier holder")
    (hold := stand_in.tell(tmp_path) / "hold").touch()
    with searching(server, tmp_path / "elsewhere") as process:
        while not any("/rows" in name or "/step-" in name for name in server.objects()):
            assert process.poll() is None
            time.sleep(0.05)
        assert not [name for name in server.objects() if "requests/" in name]
        assert call(["stop", address, "--json"]) == 0
        assert process.wait() == 130
    answer = json.loads(capsys.readouterr().out)
    assert (answer["study"], answer["ended"], answer["finished"], answer["wanted"]) == (address, True, 0, 3)
    assert answer["asked"].startswith(f"process {process.pid} ")
    hold.unlink()
    search(address, 3)
    assert told(own_folder(address, brings=False)) == whole
    assert call(["stop", address]) == 0
    assert f"Nothing to stop: no search runs on {address}; 3 of 3 trials finished." in capsys.readouterr().err


@pytest.mark.whole
def test_what_was_trained_here_is_used_elsewhere_by_its_address(server, tmp_path, monkeypatch, capsys):
    first, single, next_one = (server.address(name) for name in ("first", "single", "next"))
    recipe = str(short_training.make(tmp_path))
    assert call(["search", recipe, "--study", first, "--executor", "debug"]) == 0
    assert call(["train", recipe, "--out", single, "--executor", "debug"]) == 0
    assert f"carft-ray evaluate {single}" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    for address in (first, single):
        to = tmp_path / f"export-{address[-3:]}"
        assert call(["export", address, "--to", to]) == 0
        assert (to / "README.md").exists()
        capsys.readouterr()
        assert call(["evaluate", address, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        best = best_row(read_study(address, NUMBERS).trials)
        assert found["metrics"]["objective"] == pytest.approx(best.objective, abs=1e-6)
    assert call(["search", recipe, "--study", next_one, "--executor", "debug", "--warm-start", first]) == 0
    assert f"2 of 2 trials of {first} taken in" in capsys.readouterr().err
    assert call(["confirm", first, "--executor", "debug", "--seeds", "2", "--against", next_one]) == 0
    assert call(["test", first]) == 3
    assert f"{first}: must be the study of a recipe with test sets" in capsys.readouterr().err
    pull(first, tmp_path / "back")
    curves = [EventAccumulator(str(path.parent)).Reload() for path in tmp_path.glob("back/trials/*/*/*tfevents*")]
    assert curves
    assert all(each.Tags()["scalars"] for each in curves)
    assert not [name for name, data in server.objects().items() if SECRET.encode() in data]


@pytest.mark.slow
def test_files_are_there_before_the_commit_of_an_end_and_the_same_machine_fetches_none_back(server, whole):
    address = server.address("study")
    search(address, 2)
    first = [path.partition("/study/")[2] for method, path in server.requests if method == "PUT"]
    server.requests.clear()
    search(address, 3)
    got = [path.partition("/study/")[2] for method, path in server.requests if method == "GET"]
    assert not [name for name in got if name.startswith(("trials/", "baselines/", "prepared/"))]
    puts = first + [path.partition("/study/")[2] for method, path in server.requests if method == "PUT"]
    objects = {name.removeprefix("study/"): data for name, data in server.objects().items()}
    ends = [name for name, data in sorted(objects.items()) if name.startswith("log/0") and b'"outcome"' in data]
    ends = [name for name in ends if b"zero_shot" not in objects[name]]
    assert len(ends) == 4
    for number, name in enumerate(ends, 1):
        before = {each for each in puts[: puts.index(name)] if each.endswith("/result.json")}
        assert len(before) >= number
    assert told(read_study(address, NUMBERS).study_dir) == whole


@pytest.mark.slow
def test_a_bucket_that_refuses_ends_the_search_and_the_next_one_goes_on(server, whole):
    address, puts = server.address("study"), []

    def strike(method, path):
        puts.append(path) if method == "PUT" else None
        return refused(400, "ExpiredToken") if method == "PUT" and len(puts) > 25 else None

    server.strike = strike
    with pytest.raises(StorageError, match="ExpiredToken"):
        search(address, 3)
    server.strike = lambda method, path: None
    search(address, 3)
    assert told(own_folder(address, brings=False)) == whole
