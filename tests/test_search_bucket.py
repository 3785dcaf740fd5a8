"""A search on a study in a bucket: uploads and removals, faults; resumed and stopped by another machine."""

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import killed_searches
import pytest
import report_studies
import short_training
import stand_in
from bucket_searches import RESOURCES, SEARCH, ended, search
from bucket_server import CUT, DONE_503, SECRET, contents, impatient, refused
from crash_host import call, printed
from logs import goes_on
from study_steps import told
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from carft_ray import files
from carft_ray.errors import DataError, HoldOutError, StorageError
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import MANIFEST, RAY_LOG, WEIGHTS
from carft_ray.recipe.schema.recipe import BudgetConfig
from carft_ray.results.reading.study_view import read_study
from carft_ray.store import heartbeat
from carft_ray.store import log as log_module
from carft_ray.store.bucket import Bucket
from carft_ray.store.copy import NUMBERS
from carft_ray.store.folder import Folder, UnknownError
from carft_ray.store.heartbeat import identity
from carft_ray.store.log import Log, log_of
from carft_ray.study.holding import held
from carft_ray.study.ledger import TEST, read_ledger, record
from carft_ray.study.opening import open_study
from carft_ray.study.place import fetched, own_folder, pull
from carft_ray.study.rows import best_row
from carft_ray.study.uploads import open_log, uploading

ELSEWHERE = "import sys, search_driver; from carft_ray.study import uploads; uploads.UPLOAD_EVERY_S = 0.2; "
ELSEWHERE += "sys.exit(search_driver.main(*sys.argv[1:]))"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a search finds in a folder."""
    return told(search(tmp_path_factory.mktemp("whole") / "study", 3).study.study_dir)


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
    folder = own_folder(address, need=None)
    assert told(folder) == whole
    assert told(read_study(address).study_dir) == whole
    assert call(["status", address, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["study"], status["finished"], status["search"]["running"]) == (address, 3, False)
    pull(address, tmp_path / "back")
    assert told(tmp_path / "back") == whole
    back, here = contents(tmp_path / "back"), contents(folder)
    assert back.items() >= here.items()
    assert {name.rpartition("/")[2] for name in back.keys() - here.keys()} == {WEIGHTS}  # of what was trained elsewhere
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
    assert told(own_folder(address, need=None)) == whole
    assert call(["stop", address]) == 0
    assert f"Nothing to stop: no search is running on {address}; 3 of 3 trials finished." in capsys.readouterr().err


@pytest.mark.whole
def test_what_was_trained_here_is_used_elsewhere_by_its_address(server, tmp_path, monkeypatch, capsys):
    first, single, next_one = (server.address(name) for name in ("first", "single", "next"))
    written = short_training.make(tmp_path)
    photos, sketches = ("{source: folder, path: images, domains: [" + name for name in ("photo_val]", "sketch]"))
    sets = f"  id_test: {photos}, part: [0.5, 1]}}\n  ood_test:\n    other: {sketches}, part: [0.5, 1]}}\nprompts:"
    text = re.sub(r"\[(photo_val|sketch)\]", r"\g<0>, part: [0, 0.5]", written.read_text())
    written.write_text(text.replace("prompts:", sets))
    recipe = str(written)
    assert call(["search", recipe, "--study", first, "--executor", "debug"]) == 0
    assert call(["train", recipe, "--out", single, "--executor", "debug"]) == 0
    assert f"carft-ray evaluate {single}" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    for address in (first, single):
        to = tmp_path / f"export-{address[-3:]}"
        assert call(["export", address, "--to", to, "--trust-paths"]) == 0
        assert (to / "README.md").exists()
        capsys.readouterr()
        assert call(["evaluate", address, "--json", "--trust-paths"]) == 0
        found = json.loads(capsys.readouterr().out)
        best = best_row(read_study(address, NUMBERS).trials)
        assert found["metrics"]["objective"] == pytest.approx(best.objective, abs=1e-6)
    assert call(["search", recipe, "--study", next_one, "--executor", "debug", "--warm-start", first]) == 0
    assert f"2 of 2 trials of {first} are used" in capsys.readouterr().err
    confirm = ["confirm", first, "--executor", "debug", "--seeds", "2", "--against", next_one]
    assert call(confirm) == 2, "this machine has not written the study"
    assert call([*confirm, "--trust-paths"]) == 0
    assert call(["test", first]) == 0, capsys.readouterr().err  # the summary of the confirm is in the bucket
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
    (own_folder(address) / RAY_LOG).write_text("of a process")
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
    assert RAY_LOG not in objects
    assert told(read_study(address, NUMBERS).study_dir) == whole


def searched(address, trials, prepare=stand_in.prepare, on_event=lambda event: None):
    recipe = stand_in.make_recipe(trials, resources=RESOURCES, keep_checkpoints=2, **SEARCH)
    return run_search(Plan(recipe, own_folder(address), on_event=on_event, runner=Runner(prepare, stand_in.train)))


def below(server, name):
    return {each for each in server.objects() if each.startswith(f"{name}/")}


@pytest.mark.slow
def test_what_others_remove_from_the_folder_stays_in_the_bucket_and_what_the_search_removes_goes(server):
    address, gone = server.address("study"), []

    def clean(event):  # as a cleaner does, by age
        if isinstance(event, TrialFinished) and not gone:
            gone.extend(event.row.training + "/" + path.name for path in event.row.folder(folder).iterdir())
            shutil.rmtree(event.row.folder(folder))

    folder = own_folder(address, need=None)
    searched(address, 5, on_event=clean)
    there = below(server, "study")
    assert gone
    assert {name for name in gone if not any(each.startswith(f"study/{name}") for each in there)} == set()
    assert len([name for name in there if name.startswith("study/trials/") and name.endswith(WEIGHTS)]) <= 2 + 1
    assert not [name for name in there if "/step-" in name or name.endswith("/rows.jsonl")]
    view = read_study(address)
    assert all(view.result(row)["objective"] == row.objective for row in view.trials)
    search(address, 5)  # brings them back, and goes on
    assert (folder / gone[0]).exists()


def test_checkpoints_that_newer_ones_have_replaced_go_and_the_newest_two_stay_whatever_happens_to_the_folder(server):
    folder = own_folder(server.address("study"))
    names = [f"trials/t/attempt-{attempt}/step-{step:08d}" for attempt, step in ((1, 5), (1, 10), (2, 15), (2, 20))]
    with open_study(folder, stand_in.make_recipe(1)) as study:
        for name in names:
            files.write_text(folder / name / "state.json", "{}")
            study.log.store.upload_new(checkpoints=True)
        for name in names:
            files.remove(folder / name)
        study.log.store.upload_new(checkpoints=True)
        assert below(server, "study/trials") == {f"study/{name}/state.json" for name in names[2:]}


def test_a_result_comes_after_the_other_files_so_that_a_kill_in_between_loses_no_row(server):
    """Whoever finds a result on another machine takes the training for finished, with the rows that are there."""
    with open_study(own_folder(server.address("study")), stand_in.make_recipe(1)) as study:
        names = [f"trials/t/{name}" for name in ("attempt-1/result.json", "attempt-1/rows.jsonl", "metrics.jsonl")]
        for name in names:
            files.write_text(study.study_dir / name, "{}")
        server.requests.clear()
        study.log.store.has_ended("trials/t/attempt-1")
        study.log.store.keep_files()
        put = [path.partition("/study/")[2] for method, path in server.requests if method == "PUT"]
        assert {*put} >= {*names}
        assert [name for name in put if name in names][-1] == names[0]


def test_a_manifest_that_the_bucket_refuses_at_first_is_put_again(server):
    """A study without it cannot be found; with an old one its ledger looks cut."""
    address, refusals = server.address("study"), []

    def strike(method, path):
        if method == "PUT" and path.endswith("study/manifest.json") and len(refusals) < 2:
            refusals.append(path)
            return refused(503, "SlowDown")
        return None

    server.strike = strike
    with open_study(own_folder(address), stand_in.make_recipe(1)) as study:
        manifest = study.study_dir / MANIFEST
        assert server.objects()["study/manifest.json"] == manifest.read_bytes()
        refusals.clear()
        files.write_json(manifest, {**json.loads(manifest.read_text()), "created": "later"})
        study.log.store.keep_files()
        assert server.objects()["study/manifest.json"] == manifest.read_bytes()
        server.put("study/manifest.json", b"of another")  # the holder of the log puts its own over it
        files.write_json(manifest, {**json.loads(manifest.read_text()), "created": "later still"})
        study.log.store.keep_files()
        assert server.objects()["study/manifest.json"] == manifest.read_bytes()
    assert len(refusals) == 2


def test_an_unfit_new_study_removes_only_what_it_has_written(server):
    def prepare(recipe, folder, say=None, made_of=None):
        server.put("study/child/manifest.json", b"{}")  # meanwhile, by somebody else
        raise DataError("there is no data")

    with pytest.raises(DataError):
        searched(server.address("study"), 1, prepare)
    assert server.objects().keys() == {"study/child/manifest.json"}


def test_an_unfit_new_study_that_is_half_removed_leaves_an_address_that_can_be_used(server, monkeypatch):
    recipe, plain = report_studies.make_recipe(3), Bucket.delete
    for number in range(20):
        address, left = server.address(f"study-{number}"), iter(range(number))

        def delete(self, names, left=left):
            for name in names:
                if next(left, None) is None:
                    raise StorageError("403 AccessDenied")
                plain(self, [name])

        def turns_out_unfit(study, delete=delete):
            study.log.write({"kind": "a"})
            monkeypatch.setattr(Bucket, "delete", delete)
            raise DataError("there is no data")

        with pytest.raises(DataError), open_study(own_folder(address), recipe) as study:
            turns_out_unfit(study)
        monkeypatch.setattr(Bucket, "delete", plain)
        is_gone = not any(name.startswith(f"study-{number}/") for name in server.objects())
        with open_study(own_folder(address), recipe) as study:
            assert study.log.number > 0
        if is_gone:
            break
    assert 3 < number < 19


def test_an_unfit_new_study_removes_nothing_that_others_have_put_there_before_it_listed_the_bucket(server):
    def prepare(recipe, folder, say=None, made_of=None):
        raise DataError("there is no data")

    def strike(method, path):
        if method == "PUT" and path.endswith("/log/00000001"):
            server.put("study/manifest.json", b"{}")
            server.put("study/notes.txt", b"of somebody else")

    server.strike = strike
    with pytest.raises(DataError):
        searched(server.address("study"), 1, prepare)
    assert server.objects().keys() == {"study/manifest.json", "study/notes.txt"}


def test_an_answer_that_lacks_what_is_there_removes_nothing(server, monkeypatch):
    address, late = server.address("study"), iter([refused(404, "NoSuchKey")])
    folder = own_folder(address)
    with held(log := open_log(folder), print), uploading(log):
        files.write_text(folder / MANIFEST, "{}")
        files.write_text(folder / "file", "ours")
        log.store.keep_files()
        newest = f"log/{log.number:08d}"
        server.strike = lambda method, path: next(late, None) if method == "GET" and path.endswith(newest) else None
        assert own_folder(address) == folder
        assert next(late, None) is None
        assert (folder / "file").read_text() == "ours"
        server.put(f"study/{newest}", b"of another study")
        with pytest.raises(StorageError, match=r"which is now another one, but got one that process .* is using"):
            own_folder(address)
        assert (folder / "file").exists()
        server.put(f"study/{newest}", Folder(folder).get(newest))
    listed = Bucket.all
    monkeypatch.setattr(Bucket, "all", lambda *given, **more: {MANIFEST: listed(*given, **more)[MANIFEST]})
    with held(log := open_log(folder), print), uploading(log):
        assert (folder / "file").exists()


def test_after_an_answer_that_is_unknown_nothing_more_is_uploaded(server, monkeypatch):
    monkeypatch.setattr(log_module, "UNCLEAR_FOR_S", 0.5)
    folder = own_folder(server.address("study"))

    def lose():
        files.write_text(folder / MANIFEST, "{}")
        server.strike = lambda method, path: CUT if "/log/" in path else None
        log.write({"kind": "a"})

    with pytest.raises(UnknownError), held(log := open_log(folder), print), uploading(log):
        lose()
    assert [path for method, path in server.requests if method == "PUT" and "/log/" not in path] == []


def elsewhere(server):
    """The log of a study that a process of another machine holds."""
    log = Log(Bucket(server.address("study")))
    log.claim(me={**identity(), "host": "node7", "pid": 12, "since": "noon"})
    return log


def begun(server):
    """The address of a study that nobody holds."""
    address = server.address("study")
    with open_study(own_folder(address), report_studies.make_recipe(3)):
        pass
    return address


def test_a_search_on_a_machine_whose_clock_is_behind_is_seen_and_asked_to_stop(server, monkeypatch, capsys):
    address = begun(server)
    with monkeypatch.context() as behind:
        behind.setattr(time, "time", lambda now=time.time: now() - 600)
        elsewhere(server)
    assert read_study(address).holder == "process 12 on node7, since noon"
    assert call(["stop", address, "--no-wait"]) == 0
    assert "Asked process 12 on node7, since noon to stop" in capsys.readouterr().err
    assert len([name for name in server.objects() if "/requests/" in name]) == 1


@pytest.mark.parametrize("runs", [True, False])
def test_a_search_that_seems_to_be_silent_is_asked_and_runs_if_a_heartbeat_follows(server, monkeypatch, capsys, runs):
    address = begun(server)
    log = elsewhere(server)
    monkeypatch.setattr(heartbeat, "BEAT_AFTER_S", 0.0)
    monkeypatch.setattr("carft_ray.launch.stop.HEARD_S", 60.0 if runs else 0.0)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 600)  # the clock here, not that of the store

    def search():
        while not any("/requests/" in name for name in server.objects()):
            time.sleep(0.01)
        log.beat()
        log.release()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(search) if runs else None
        assert call(["stop", address, "--json"]) == 0
        assert done is None or done.result() is None
    answer = json.loads(capsys.readouterr().out)
    assert answer["asked"] == ("process 12 on node7, since noon" if runs else None)
    assert len([name for name in server.objects() if "/requests/" in name]) == 1


@pytest.mark.slow
def test_a_bucket_shows_that_a_search_was_asked_to_stop_and_what_has_ended_it(server, monkeypatch, capsys):
    address = server.address("study")

    def status():
        return printed(capsys, "status", address)

    def use_up(event):
        ahead[0] = 3600 if isinstance(event, TrialFinished) else ahead[0]
        if isinstance(event, Stopping):
            seen.append(status()["search"]["stopping"])

    ahead, seen = [0], []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("carft_ray.launch.driver.time", clock)
    recipe = stand_in.make_recipe(4, resources=RESOURCES, **SEARCH)
    budgeted = recipe.model_copy(update={"budget": BudgetConfig(wall_time=3600)})
    runner = Runner(stand_in.prepare, stand_in.train)
    assert run_search(Plan(budgeted, own_folder(address), on_event=use_up, runner=runner)).out_of_budget
    assert seen == [True]
    assert status()["budget"]["ended"] == "the wall time is used up (budget.wall_time, 3600 s)"
    ahead[0] = 0
    search(address, 4)  # this one was not asked
    assert status()["budget"]["ended"] == ""


@pytest.mark.slow
def test_a_bucket_that_refuses_ends_the_search_and_the_next_one_goes_on(server, whole, tmp_path, monkeypatch):
    address, puts = server.address("study"), []
    (no_data := stand_in.tell(tmp_path) / "no_data").touch()
    with pytest.raises(DataError):
        search(address, 3)
    assert not server.objects()
    no_data.unlink()

    def strike(method, path):
        puts.append(path) if method == "PUT" else None
        return refused(400, "ExpiredToken") if method == "PUT" and len(puts) > 25 else None

    server.strike = strike
    with pytest.raises(StorageError, match="ExpiredToken"):
        search(address, 3)
    lost = iter([DONE_503])  # one answer
    server.strike = lambda method, path: next(lost, None) if method == "PUT" and "/log/0" in path else None
    search(address, 3)
    assert told(own_folder(address, need=None)) == whole
    folder, recipe = own_folder(address), stand_in.make_recipe(4, resources=RESOURCES, **SEARCH)
    with held(log := open_log(folder), print), uploading(log):
        record(folder, log, recipe, TEST)
    assert goes_on(folder, recipe, "because")
    assert read_ledger(fetched(address), log_of(fetched(address)))[-1].reason == "because"
    before, log = server.objects().keys(), open_log(folder)
    with pytest.raises(StorageError, match="must not be removed while a search"), held(log, print), uploading(log):
        files.remove(folder)
    assert before <= server.objects().keys()
    Log(Bucket(address)).claim(me={"host": "node7"})  # and soon falls silent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(HoldOutError, match="its test sets were read"):
        goes_on(own_folder(address), stand_in.make_recipe(5, resources=RESOURCES, **SEARCH), None)


def test_a_driver_that_slept_during_a_takeover_uploads_removes_and_puts_over_nothing(server, tmp_path, monkeypatch):
    """It falls asleep in a batch, before one of its requests; meanwhile another machine takes over and reads tests."""
    address, recipe = server.address("study"), report_studies.make_recipe(3)
    with open_study(own_folder(address), recipe) as study:
        report_studies.fill(study, 1)
    folder, log = own_folder(address), open_log(own_folder(address))
    log.follow()
    before = {}

    def take_over(method, path):
        if method == "PUT" and path.endswith("study/manifest.json"):
            server.strike = lambda method, path: None
            other = log_of(folder)
            other.store, other._holder = Bucket(address), ("", {})
            other.claim(me={"host": "node7", "boot": "another", "pid": 12})
            other.write({"kind": "of the other"})
            server.put("study/manifest.json", b"of the other")
            before.update(server.objects())

    def sleep():
        with held(log, print), uploading(log):
            manifest = json.loads((folder / MANIFEST).read_text())
            files.write_json(folder / MANIFEST, {**manifest, "ledger": "an old note"})
            files.write_text(folder / "trials" / "new.txt", "of a driver that slept")
            log.store.forget_files("best.yaml")
            files.remove(folder / "best.yaml")
            server.strike = take_over
            log.store.keep_files()

    with pytest.raises(StorageError, match="has taken the study over"):
        sleep()
    assert "study/best.yaml" in before
    assert server.objects() == before
