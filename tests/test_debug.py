"""The debug executor: a search in this process, without Ray, with the numbers of the inline executor."""

import errno
import io
import json
import os
import signal
from pathlib import Path

import pytest
import ray
import short_training
import stand_in
from crash_host import call
from PIL import Image

from carft_ray import files
from carft_ray.data.sandbox import render
from carft_ray.errors import CarftError, InterruptedRunError, StorageError
from carft_ray.launch.command import Plan, run_search, train_once
from carft_ray.launch.events import Note, Started, TrialEpoch, TrialFinished
from carft_ray.launch.stop import stop_on_signal
from carft_ray.launch.workers.runtime import Runner
from carft_ray.layout import STOP
from carft_ray.recipe.rules import broken_rules
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.folder import Folder
from carft_ray.store.log import log_of
from carft_ray.study.holding import stopping
from carft_ray.study.snapshot import snapshot
from carft_ray.ui import console
from carft_ray.ui.progress import search_shown

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STAND_IN = Runner(stand_in.prepare, stand_in.train)
DEBUG = {"resources": {"executor": "debug"}}


def numbers(study):
    """Everything that a study's trainings have found, by their numbers, and what the sampler proposed."""
    found = {}
    for path in sorted(study.glob("*/*/*/result.json")):
        result = json.loads(path.read_text())
        del result["elapsed_s"]
        rows = map(json.loads, (path.parents[1] / "metrics.jsonl").read_text().splitlines())
        result["rows"] = [{**row, "images_per_s": None} for row in rows]
        found[path.parents[1].name.partition("-")[0]] = result
    return found


SMALL = """\
format_version: 1
name: small
model: {name: sandbox}
data:
  cache_dir: cache
  train: {source: folder, path: images, domains: [train]}
  id_val: {source: folder, path: images, domains: [id_val]}
  ood_val: {sketch: {source: folder, path: images, domains: [ood_val]}}
  id_test: {source: folder, path: images, domains: [id_test]}
  ood_test: {cartoon: {source: folder, path: images, domains: [ood_test]}}
prompts: {templates: ["a photo of a {}", "a sketch of a {}", "a cartoon of a {}"]}
train: {epochs: 2, batch_size: 10}
search:
  trials: 4
  space: {learning_rate: {choices: [1e-5, 1e-4, 1e-3, 1]}}
  sampler: {name: grid}
  baselines: {fine_tuning: {kl_weight: 0, learning_rate: 1e-4}}
resources: {executor: debug}
"""


def test_ten_id_and_five_ood_images_are_enough_from_the_search_to_the_test_sets(tmp_path, monkeypatch, capsys):
    sets = (("train", "photo", 20), ("id_val", "photo", 10), ("id_test", "photo", 10), ("ood_val", "sketch", 5))
    for part, (name, domain, count) in enumerate((*sets, ("ood_test", "cartoon", 5))):
        for index in range(count):
            folder = tmp_path / "images" / name / ("star", "arrow")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(domain, "train", folder.name, 100 * part + index)[0]).save(folder / f"{index}.png")
    (tmp_path / "r.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    for line in ("search r.yaml --study s", "report s", "confirm s --top 1 --seeds 2", "test s"):
        assert call(line.split()) == 0, capsys.readouterr().err
    view = read_study(tmp_path / "s")
    for row in view.trials:  # only what has lost all that it knew has diverged: at a learning rate of 1
        assert row.outcome == "complete" or (row.outcome, row.values["learning_rate"]) == ("diverged", 1), row
    assert {row.outcome for row in (*view.baselines, *view.confirmations)} == {"complete"}
    assert "no improvement over" in capsys.readouterr().out  # five images show none


@pytest.mark.whole
def test_a_search_without_ray_has_the_numbers_of_one_with_it_bit_for_bit(tmp_path, monkeypatch):
    recipe = short_training.make(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for executor in ("inline", "debug"):
        assert call(["search", recipe, "--study", tmp_path / executor, "--executor", executor]) == 0
    with_ray, without = numbers(tmp_path / "inline"), numbers(tmp_path / "debug")
    assert len(without) == 2
    assert without == with_ray
    assert not (tmp_path / "debug" / "ray.log").exists()


def test_all_events_of_a_search_come_and_a_trial_that_raises_is_a_verdict_after_its_second_attempt(tmp_path):
    stand_in.tell(tmp_path, **{"1": "raise", "2": "no_memory_once"})
    events = []
    result = run_search(Plan(stand_in.make_recipe(3, **DEBUG), tmp_path / "study", None, events.append, STAND_IN))
    assert not ray.is_initialized()
    assert [(row.outcome, row.attempt) for row in result.study.trials] == [
        ("complete", 1),
        ("error", 2),
        ("complete", 2),
    ]
    assert any("another attempt: no memory was left on its machine: MemoryError" in event.line() for event in events)
    assert [event.concurrency for event in events if isinstance(event, Started)] == [1]
    assert len([event for event in events if isinstance(event, TrialFinished)]) == 3
    assert any(isinstance(event, TrialEpoch) for event in events)


def test_ctrl_c_stops_after_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    stand_in.tell(tmp_path, **{"0": "hold"})
    recipe = stand_in.make_recipe(2, baselines={}, **DEBUG)

    def on_event(event):
        if isinstance(event, TrialEpoch):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError, match="0 of 2 trials finished"):
        run_search(Plan(recipe, tmp_path / "study", None, on_event, STAND_IN))
    stand_in.tell(tmp_path)
    result = run_search(Plan(recipe, tmp_path / "study", runner=STAND_IN))
    assert [row.outcome for row in result.study.trials] == ["complete"] * 2
    assert result.study.trials[0].attempt == 2


def test_a_stop_that_comes_when_all_trainings_have_finished_ends_nothing(tmp_path):
    def on_event(event):
        if isinstance(event, TrialEpoch) and event.spec.name.startswith("t0001") and event.metrics["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = run_search(Plan(stand_in.make_recipe(2, **DEBUG), tmp_path / "study", None, on_event, STAND_IN))
    assert [row.outcome for row in result.study.trials] == ["complete"] * 2
    assert not (tmp_path / "study" / STOP).exists()


def test_a_signal_writes_nothing_itself_and_its_name_is_the_reason_in_the_log(tmp_path):
    stand_in.tell(tmp_path, **{"0": "hold"})
    numbers = []

    def on_event(event):
        if isinstance(event, TrialEpoch):
            before = log_of(tmp_path / "study").number
            os.kill(os.getpid(), signal.SIGINT)
            numbers.append(log_of(tmp_path / "study").number - before)

    with pytest.raises(InterruptedRunError, match="0 of 2 trials finished"):
        run_search(Plan(stand_in.make_recipe(2, baselines={}, **DEBUG), tmp_path / "study", None, on_event, STAND_IN))
    assert numbers == [0]
    assert stopping(log_of(tmp_path / "study")) == "SIGINT"
    assert not (tmp_path / "study" / STOP).exists()


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_terminal_that_closes_asks_to_stop_once_unless_its_signal_is_ignored(before):
    asked, outside = [], signal.signal(signal.SIGHUP, before)
    try:
        with stop_on_signal(asked.append):
            for _ in range(2):  # of the kernel and of the shell
                os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, outside)
    assert asked == ([] if before is signal.SIG_IGN else ["SIGHUP"])


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("is_live", [False, True])
def test_messages_to_a_terminal_or_pipe_that_is_gone_end_nothing(tmp_path, monkeypatch, error, is_live):
    tried = []

    class Gone(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise error

    monkeypatch.setattr(console, "err", console.Messages(file=Gone(), force_terminal=is_live, _environ={}))
    with search_shown(True, tmp_path / "study", 2) as show:
        show(Note("one"))
        assert tried
        tried.clear()
        show(Note("two"))
    assert tried == []


def test_a_signal_stops_a_search_whose_disk_is_full(tmp_path, monkeypatch):
    stand_in.tell(tmp_path, **{"0": "hold"})
    recipe = stand_in.make_recipe(2, baselines={}, **DEBUG)

    def full(folder, name, data):
        raise StorageError("the disk is full")

    def on_event(event):
        if isinstance(event, TrialEpoch):
            monkeypatch.setattr(Folder, "put_new", full)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StorageError, match="the disk is full"):
        run_search(Plan(recipe, tmp_path / "study", None, on_event, STAND_IN))
    monkeypatch.undo()
    stand_in.tell(tmp_path)
    result = run_search(Plan(recipe, tmp_path / "study", runner=STAND_IN))
    assert [row.outcome for row in result.study.trials] == ["complete"] * 2


def test_an_attempt_whose_folder_cannot_be_made_is_no_verdict(tmp_path):
    recipe, study = stand_in.make_recipe(1, **DEBUG), tmp_path / "study"
    place = study / "baselines" / "plain" / "attempt-1"
    with pytest.raises(CarftError, match="attempt-1: must be writable"):
        run_search(
            Plan(recipe, study, None, lambda one: isinstance(one, Started) and files.write_text(place, ""), STAND_IN)
        )


@pytest.mark.whole
def test_a_training_of_two_workers_takes_ray(tmp_path, monkeypatch):
    alone = stand_in.make_recipe(resources={"executor": "debug", "num_workers": 2})
    assert [finding.rule for finding in broken_rules(alone)] == ["must be 1 with executor: debug"]
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")
    recipe, said = stand_in.make_recipe(1, resources={"num_workers": 2, "cpus_per_worker": 0.5}), []
    stand_in.tell(tmp_path, rain="die_once")  # of its name, train, what is the number in that of a trial
    result, _ = train_once(Plan(recipe, tmp_path / "run", None, lambda event: said.append(event.line()), STAND_IN))
    assert "training with 2 Ray Train workers" in said
    assert result["metrics"]["ranks"] == 1 + 2
    assert [row.attempt for row in snapshot(tmp_path / "run").trials] == [2]
