"""What a search does when memory is short, a training hangs, or an attempt that was believed lost wakes up."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import attempts
import crash_host
import killed_searches
import numpy as np
import pytest
import ray
import stand_in
import torch
from ray.air.execution._internal.actor_manager import RayActorManager
from study_steps import searching

from carft_ray import files
from carft_ray.errors import OutOfMemoryError
from carft_ray.launch.events import Note
from carft_ray.launch.failures.causes import host_memory
from carft_ray.launch.mailbox import Wish
from carft_ray.launch.micro_batch import fitted, memory_failure, note
from carft_ray.launch.ray_cluster.cluster import running_ray
from carft_ray.launch.ray_cluster.ray_private import one_trial_dies
from carft_ray.launch.runtime import Runner, make_runtime
from carft_ray.launch.trainings import run_trainings
from carft_ray.store.result import read_result
from carft_ray.study.opening import open_study
from carft_ray.study.rows import trials
from carft_ray.study.study import LOST_ATTEMPTS
from carft_ray.training.out_of_memory import in_batches, is_out_of_memory
from carft_ray.training.run import prepare

CPU = torch.device("cpu")


def notes(events):
    return [event.text for event in events if isinstance(event, Note)]


# want of memory on the device


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, is_one):
    assert is_out_of_memory(error) == is_one


@pytest.mark.parametrize("fits", [0, 1, 7, 100])
def test_batches_that_do_not_fit_are_halved_down_to_one_image_and_results_keep_their_order(fits):
    seen = []

    def run(positions):
        if len(positions) > fits:
            torch.empty(2**62, dtype=torch.uint8)
        seen.append(len(positions))
        return positions * 2

    if fits == 0:
        with pytest.raises(OutOfMemoryError, match="1 image of 32 x 32 pixels at a time must fit") as caught:
            in_batches(run, np.arange(50), 16, 32, CPU)
        assert "too little on the device cpu" in str(caught.value)
        assert caught.value.exit_code == 5
        return
    parts = in_batches(run, np.arange(50), 16, 32, CPU)
    assert np.concatenate(parts).tolist() == list(range(0, 100, 2))
    assert max(seen) <= min(fits, 16)
    assert in_batches(run, np.arange(0), 16, 32, CPU) == []


def with_train(**train):
    return stand_in.make_recipe(resources={"gpus_per_worker": 0}, train=train)


def test_what_fits_is_noted_once_and_never_raised(tmp_path):
    recipe = with_train(batch_size=64)
    assert fitted(recipe, tmp_path, 1) is recipe
    for failed, noted in ((64, 32), (32, 16), (64, 16)):  # the last one began before the others had noted theirs
        failure = memory_failure(OutOfMemoryError("short", failed), recipe, {}, 1)
        note(tmp_path, failure)
        assert failure.outcome == "memory"
        assert fitted(recipe, tmp_path, 1).train.micro_batch == noted
    assert fitted(with_train(batch_size=64, micro_batch=8), tmp_path, 1).train.micro_batch == 8
    assert fitted(with_train(batch_size=64), tmp_path, 8).train.micro_batch is None  # a worker's part fits already
    assert fitted(with_train(batch_size=64, precision="bf16"), tmp_path, 1).train.micro_batch is None
    assert json.loads((tmp_path / "fits.json").read_text()) == {"sandbox, auto, cpu": 16}


@pytest.mark.parametrize(
    ("values", "outcome"), [({}, "fatal"), ({"learning_rate": 1e-3}, "fatal"), ({"precision": "fp64"}, "error")]
)
def test_where_one_image_does_not_fit_the_search_ends_unless_the_values_decide_it(tmp_path, values, outcome):
    recipe = with_train(batch_size=2, micro_batch=2)
    note(tmp_path, memory_failure(OutOfMemoryError("short", 2), recipe, values, 1))
    failure = memory_failure(OutOfMemoryError("short", 1), recipe, values, 2)
    note(tmp_path, failure)
    assert failure.outcome == outcome
    assert fitted(recipe, tmp_path, 1) is recipe  # the next search begins anew


@pytest.mark.slow
def test_a_search_for_which_there_is_no_memory_at_all_ends_with_the_numbers_and_goes_on_later(tmp_path):
    recipe = stand_in.make_recipe(2, baselines={}, resources={"gpus_per_worker": 0}, train={"batch_size": 8})
    tight = Runner(stand_in.prepare, attempts.without_memory)
    searcher, events = attempts.search(tmp_path / "study", recipe, tight)
    assert searcher.failure.exit_code == 5
    assert "1 image of 32 x 32 pixels at a time must fit into memory, but got " in str(searcher.failure)
    assert [row.outcome for row in trials(tmp_path / "study")] == ["running"]
    assert len(notes(events)) == 3  # 8, 4, 2
    (tmp_path / "study" / "stop").unlink()
    searcher, _ = attempts.search(tmp_path / "study", recipe)
    assert searcher.failure is None
    assert [row.outcome for row in trials(tmp_path / "study")] == ["complete", "complete"]


@pytest.mark.whole
def test_a_search_with_too_little_memory_ends_with_the_results_of_one_with_enough(tmp_path):
    """Both under a limit of the system on the memory of each training's process: a wide one and a tight one."""
    recipe, found = attempts.sandbox_recipe(), {}
    prepare(recipe, tmp_path / "prepared")
    for name, megabytes in (("wide", 10_000), ("tight", 80)):
        study_dir = tmp_path / name
        with open_study(study_dir, recipe):
            pass
        shutil.copytree(tmp_path / "prepared", study_dir / "prepared")
        searcher, events = attempts.search(study_dir, recipe, Runner(prepare, partial(attempts.capped, megabytes)))
        assert searcher.failure is None
        found[name] = trials(study_dir)
        assert [row.outcome for row in found[name]] == ["complete", "complete"]
    # sums in another order may move an image or two of the 64 of painting
    wide = [row.objective for row in found["wide"]]
    assert [row.objective for row in found["tight"]] == pytest.approx(wide, abs=0.02)
    assert [row.attempt for row in found["wide"]] == [1, 1]
    assert not (tmp_path / "wide" / "fits.json").exists()
    [micro_batch] = json.loads((tmp_path / "tight" / "fits.json").read_text()).values()
    failed = [row.attempt - 1 for row in found["tight"]]
    # each failed attempt halves it, and the second trial begins with what the first one ended with (which may be tight)
    assert 2 ** sum(failed) * micro_batch == 512
    assert failed[1] <= 1
    assert notes(events)[0].endswith("the next attempt takes a micro-batch of 256")


# a machine without memory

MONITOR = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 1f2e) where the task (actor ID: 3) was running was 27.63GB / 28.80GB (0.959)
Top 10 memory users: ..."""
MONITOR_NOW = """2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, \
ID: bd9a) was 27.63GB used / 28.80GB limit (0.959)
OOM kill reason: Memory usage 2088845312B exceeded threshold of 1263825792B (5.0% of 25276514304B limit)"""
FULL = "no memory was left on node 10.0.0.7 (27.63GB of 28.80GB used): Ray's memory monitor ended it"
HELP = "; fewer trials at a time (search.max_concurrent_trials) or a smaller evaluate.batch_size take less"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (MONITOR, FULL + HELP),
        (MONITOR_NOW, FULL + HELP),
        ("trial()\nMemoryError: 3 GiB", "no memory was left on its machine: MemoryError: 3 GiB" + HELP),
        ("The actor died unexpectedly before finishing this task.", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_an_end_for_want_of_memory_is_told_from_other_ends(text, line):
    assert host_memory(text) == line
    assert host_memory(line) == line


@pytest.mark.whole
def test_rays_own_memory_monitor_is_understood_and_the_search_runs_fewer_trials(tmp_path, monkeypatch):
    """A real Ray that takes any machine for full: every process of a trial is ended."""
    monkeypatch.setenv("PYTHONPATH", crash_host.PYTHONPATH)
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    events = []
    stand_in.tell(tmp_path, seconds=100)
    recipe = stand_in.make_recipe(1, baselines={}, resources={"gpus_per_worker": 0})
    with searching(tmp_path / "study", recipe) as study:
        with running_ray(None, tmp_path / "ray.log") as there:
            plan = make_runtime(recipe, study.study_dir, there, attempts.STAND_IN)
            plan = replace(plan, capacity=replace(plan.capacity, concurrency=2))
            run_trainings(study, plan, events.append)
        [row] = study.rows()
    assert (row.set_aside, row.attempt) == (True, 1 + LOST_ATTEMPTS)
    left = r"no memory was left on node [\d.]+ \([\d.]+GB of [\d.]+GB used\): Ray's memory monitor ended it; "
    assert re.match(f".* did not advance; the last: {left}", row.reason)
    fewer = "gets another attempt, with 1 at a time from now on, no longer 2: no m"
    assert notes(events)[0].startswith(f"{row.name} {fewer}")


def test_tune_takes_a_process_that_the_monitor_ended_for_a_dead_trial():
    """As it is, Tune would end the whole run: the exception is neither that of an actor nor that of a task."""
    told = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: told.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    full = ray.exceptions.OutOfMemoryError(MONITOR_NOW)
    other = ray.exceptions.RayActorError(error_msg="it died")
    with one_trial_dies():
        for error in (full, other):
            RayActorManager._actor_task_failed(manager, tracked_actor_task=task, exception=error)
    assert isinstance(told[0], ray.exceptions.RayActorError)
    assert host_memory(str(told[0])) == FULL + HELP
    assert told[1] is other


# attempts that wake up


@pytest.mark.slow
def test_an_attempt_that_wakes_up_after_another_has_begun_ends_and_counts_for_nothing(tmp_path):
    """The first process is stopped after its first epoch and woken while the next attempt runs; both are held."""
    study_dir = tmp_path / "study"
    hold = stand_in.tell(tmp_path, tell_pid=True) / "hold"
    hold.touch()
    recipe = stand_in.make_recipe(1, epochs=6, baselines={}, resources={"gpus_per_worker": 0})
    with searching(study_dir, recipe) as study, attempts.Mailboxes(ctx=attempts._forks) as mailboxes:
        box = mailboxes.Mailbox()
        plan = attempts.plan_of(study, mailbox=box)
        first = study.next()
        folder = first.folder(study_dir)
        zombie = attempts.start(plan, first)
        orders = {first.training: Wish(1)}

        def rows():
            return [kind for signs in box.exchange(orders).values() for kind, _ in signs.records if kind == "row"]

        killed_searches.wait_until(rows, "an epoch")
        os.kill(zombie.pid, signal.SIGSTOP)
        assert study.lost(first, "its node is lost") != "set aside"
        second = study.next()
        process = attempts.start(plan, second)
        orders = {second.training: Wish(2, "go")}

        def runs():
            return [signs.process.pid for signs in box.exchange(orders).values()] == [process.pid]

        killed_searches.wait_until(runs, "the next one runs")
        os.kill(zombie.pid, signal.SIGCONT)
        zombie.join(120)
        assert zombie.exitcode == 0  # quietly, at its next look for a stop
        assert box.exchange(orders)[second.training].process.pid == process.pid
        hold.unlink()
        process.join(120)
        row, rows = study.settle(second), files.read_json_lines(folder / "metrics.jsonl")
    assert (row.outcome, row.attempt, row.metrics["pid"]) == ("complete", 2, process.pid)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert read_result(folder / "attempt-2")[0]["metrics"]["pid"] == process.pid
    assert (folder / "log.txt").read_text().count("attempt") == 1  # the loss
