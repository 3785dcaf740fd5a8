"""Which files of a study get into its bucket, and when; what the driver does while they are on their way."""

import json
import time

import pytest
import stand_in
from bucket_server import impatient
from crash_host import call

from carft_ray import files
from carft_ray.errors import InterruptedRunError
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.stop import ask_to_stop
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import RESULT, STATE, THUMBNAILS, WEIGHTS
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.attempt_files import progress_of, progress_words
from carft_ray.store.copy import ALL, NUMBERS
from carft_ray.study import uploads
from carft_ray.study.opening import open_study
from carft_ray.study.place import own_folder
from carft_ray.study.retries import LOST_ATTEMPTS
from carft_ray.study.take_over import recover_running


@pytest.fixture
def server(monkeypatch, tmp_path):
    with impatient(monkeypatch, tmp_path / "cache") as server:
        yield server


def searched(address, trials, on_event=lambda event: None, **search):
    recipe = stand_in.make_recipe(trials, resources={"executor": "debug"}, sampler={"name": "random"}, **search)
    return run_search(
        Plan(recipe, own_folder(address), on_event=on_event, runner=Runner(stand_in.prepare, stand_in.train))
    )


def put(server, last):
    names = [path.partition("/study/")[2] for method, path in server.requests if method == "PUT"]
    return [name for name in names if name.endswith(f"/{last}")]


@pytest.mark.slow
def test_weights_go_up_only_of_baselines_and_of_trials_that_were_the_best_of_those_with_weights(server, monkeypatch):
    monkeypatch.setattr(uploads, "UPLOAD_EVERY_S", 0.02)
    best = []

    def note(event):
        if isinstance(event, TrialFinished) and event.is_best:
            best.append(f"{event.row.attempt_name}/{WEIGHTS}")

    outcome = searched(server.address("study"), 6, note, keep_checkpoints=1)
    assert 1 <= len(best) < 6
    sent = [name for name in put(server, WEIGHTS) if name.startswith("trials/")]
    assert {*best} <= {*sent}
    assert len(sent) < 6
    assert len(put(server, RESULT)) == 7
    there = [name for name in server.objects() if name.endswith(WEIGHTS)]
    assert [name for name in there if "/trials/" in name] == [f"study/{sent[-1]}"]
    assert outcome.study.best.outcome == "complete"


@pytest.mark.slow
def test_a_stop_is_obeyed_while_the_weights_of_another_training_are_on_their_way(server, monkeypatch):
    monkeypatch.setattr(uploads, "UPLOAD_EVERY_S", 0.1)
    address, stopping = server.address("study"), []

    def strike(method, path):
        if method == "PUT" and "trials/" in path and path.endswith(WEIGHTS) and ask_to_stop(address):
            end = time.monotonic() + 30
            while not stopping and time.monotonic() < end:
                time.sleep(0.02)
            stopping.append(not stopping)

    server.strike = strike
    with pytest.raises(InterruptedRunError):
        searched(address, 4, lambda event: isinstance(event, Stopping) and stopping.append(event))
    assert isinstance(stopping[0], Stopping)
    server.strike = lambda method, path: None
    searched(address, 4)
    assert [row.outcome for row in read_study(address).trials] == ["complete"] * 4


def test_of_a_training_that_has_not_ended_checkpoints_go_up_and_what_may_be_dropped_waits(server):
    place = "trials/t/attempt-1"
    with open_study(own_folder(server.address("study")), stand_in.make_recipe(1)) as study:
        for name in (WEIGHTS, RESULT, THUMBNAILS, f"step-00000005/{WEIGHTS}"):
            files.write_text(study.study_dir / place / name, "{}")

        def there():
            study.log.store.upload_new(checkpoints=False)
            study.log.store.upload_new(checkpoints=True)
            return {name.removeprefix(f"study/{place}/") for name in server.objects() if place in name}

        assert there() == {f"step-00000005/{WEIGHTS}", THUMBNAILS}
        study.log.store.forget_files(f"{place}/{WEIGHTS}")
        study.log.store.has_ended(place)
        assert there() == {f"step-00000005/{WEIGHTS}", THUMBNAILS, RESULT}


def test_a_checkpoint_that_a_kill_has_kept_from_the_bucket_is_no_progress(server):
    address, recipe = server.address("study"), stand_in.make_recipe(1, baselines={})
    with open_study(own_folder(address), recipe) as study:
        spec = study.next()
    stand_in.save(spec.folder(study.study_dir), 1, 10)  # the kill comes before its upload,
    server.put(f"study/{spec.training}/attempt-1/step-00000200/{WEIGHTS}", b"half")  # and before the last of another
    with open_study(own_folder(address), recipe) as study:
        folder, known = spec.folder(study.study_dir), study.log.store.known(spec.training)
        assert [path.name for path in folder.glob("*/*")] == ["step-00000100"], "its folder stays"
        assert progress_of(folder, known) == [0, 0]
        assert progress_words(folder, known) == "its beginning"
        recover_running(study)
        for number in range(1, LOST_ATTEMPTS + 2):
            spec = study.next()
            stand_in.save(folder, spec.attempt, number)
            assert study.lost(spec, "its node is gone") == "advanced"


def test_what_nodes_put_into_the_bucket_is_brought_when_it_is_needed_and_goes_as_the_rest_does(server):
    folder, place = own_folder(server.address("study")), "trials/t/attempt-1"
    steps = [f"{place}/step-{number:08d}/{STATE}" for number in (5, 10, 15)]
    with open_study(folder, stand_in.make_recipe(1)) as study:
        store = study.log.store
        for name in (*steps, f"{place}/{RESULT}", f"{place}/{WEIGHTS}"):
            server.put(f"study/{name}", b"{}")
            store.learn([name])
        store.upload_new(checkpoints=True)
        assert not server.objects().keys() & {f"study/{steps[0]}"}, "newer ones are there"
        store.bring(place, NUMBERS)
        assert [path.name for path in (folder / place).iterdir()] == [RESULT]
        server.requests.clear()
        store.has_ended(place)
        store.upload_new(checkpoints=False)
        assert not server.requests, "what came from there does not go up again"
        store.forget_files(f"{place}/{WEIGHTS}")
        store.upload_new(checkpoints=False)
        assert {name.removeprefix("study/") for name in server.objects() if place in name} == {
            *steps[1:],
            f"{place}/{RESULT}",
        }
        store.bring("trials/t", ALL)
        assert all((folder / name).exists() for name in steps[1:])


@pytest.mark.slow
def test_a_search_on_this_machine_is_shown_from_its_folder(server, capsys):
    address = server.address("study")

    def look(event):
        if isinstance(event, TrialFinished):
            server.requests.clear()
            assert call(["status", address, "--json"]) == 0
            read = [path for method, path in server.requests if "/log/" not in path]
            shown.append((json.loads(capsys.readouterr().out)["finished"], read))

    shown = []
    searched(address, 3, look)
    assert shown == [(1, []), (2, []), (3, [])]
