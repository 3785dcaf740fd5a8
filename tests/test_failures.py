"""What a search does when memory is short, a training hangs or does not begin, or a lost attempt wakes up; and why."""

import importlib
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attempts
import crash_host
import killed_searches
import logs
import numpy as np
import pytest
import ray
import stand_in
import torch
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from study_steps import searching

from carft_ray import files
from carft_ray.errors import ClusterError, OutOfMemoryError, StorageError
from carft_ray.launch import search_gives_up
from carft_ray.launch.cluster.cluster import running_ray
from carft_ray.launch.cluster.ray_errors import error_of, explained, host_memory, is_full_memory, root_cause
from carft_ray.launch.cluster.ray_private import one_trial_dies
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.events import Note
from carft_ray.launch.run_trainings import run_trainings
from carft_ray.launch.workers.mailbox import Wish
from carft_ray.launch.workers.micro_batch import fits_record, fitted, memory_failure, noted
from carft_ray.launch.workers.runtime import Runner, make_runtime
from carft_ray.store.attempt_files import read_result
from carft_ray.store.log import log_of
from carft_ray.study import retries
from carft_ray.study.opening import open_study
from carft_ray.study.retries import LOST_ATTEMPTS
from carft_ray.study.snapshot import snapshot
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
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA driver error: invalid argument"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (torch.distributed.DistBackendError("NCCL error\nLast error:\nCuda failure 999 'unknown error'"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
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
    with logs.holding(tmp_path / "study") as log:
        assert fitted(recipe, noted(log), 1) is None
        for failed, fits in ((64, 32), (32, 16), (64, 16)):  # the last one began before the others had noted theirs
            failure = memory_failure(OutOfMemoryError("short", failed), recipe, {}, 1)
            log.write(fits_record(failure))
            assert failure.outcome == "memory"
            assert fitted(recipe, noted(log), 1) == fits
        found = noted(log)
    assert found == noted(log_of(tmp_path / "study")) == {"sandbox, auto, cpu": 16}
    assert fitted(with_train(batch_size=64, micro_batch=8), found, 1) is None
    assert fitted(with_train(batch_size=64), found, 8) is None  # a worker's part fits already
    assert fitted(with_train(batch_size=64, precision="bf16"), found, 1) is None


@pytest.mark.parametrize("change", [{"device": 3}, {"micro_batch": "16"}, {"micro_batch": -1}, {"micro_batch": None}])
def test_what_a_stranger_says_of_a_micro_batch_is_told(tmp_path, change):
    with logs.holding(tmp_path / "study") as log:
        log.write({"kind": "fits", "device": "cpu", "micro_batch": 16, **change})
        with pytest.raises(StorageError, match=f"study/log, commit 2: {next(iter(change))}: "):
            noted(log)


@pytest.mark.parametrize(
    ("values", "outcome"), [({}, "fatal"), ({"learning_rate": 1e-3}, "fatal"), ({"precision": "fp64"}, "error")]
)
def test_where_one_image_does_not_fit_the_search_ends_unless_the_values_decide_it(tmp_path, values, outcome):
    recipe = with_train(batch_size=2, micro_batch=2)
    with logs.holding(tmp_path / "study") as log:
        log.write(fits_record(memory_failure(OutOfMemoryError("short", 2), recipe, values, 1)))
        failure = memory_failure(OutOfMemoryError("short", 1), recipe, values, 2)
        log.write(fits_record(failure))
    assert failure.outcome == outcome
    assert fitted(recipe, noted(log_of(tmp_path / "study")), 1) is None  # the next search begins anew


@pytest.mark.slow
def test_a_search_for_which_there_is_no_memory_at_all_ends_with_the_numbers_and_goes_on_later(tmp_path):
    recipe = stand_in.make_recipe(2, baselines={}, resources={"gpus_per_worker": 0}, train={"batch_size": 8})
    tight = Runner(stand_in.prepare, attempts.without_memory)
    searcher, events = attempts.search(tmp_path / "study", recipe, tight)
    assert searcher.failure.exit_code == 5
    assert "1 image of 32 x 32 pixels at a time must fit into memory, but got " in str(searcher.failure)
    assert [row.outcome for row in snapshot(tmp_path / "study").trials] == ["running"]
    assert len(notes(events)) == 3  # 8, 4, 2
    searcher, _ = attempts.search(tmp_path / "study", recipe)
    assert searcher.failure is None
    assert [row.outcome for row in snapshot(tmp_path / "study").trials] == ["complete", "complete"]


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
        found[name] = snapshot(study_dir).trials
        assert [row.outcome for row in found[name]] == ["complete", "complete"]
    # sums in another order may move an image or two of the 64 of painting
    wide = [row.objective for row in found["wide"]]
    assert [row.objective for row in found["tight"]] == pytest.approx(wide, abs=0.02)
    assert [row.attempt for row in found["wide"]] == [1, 1]
    assert noted(log_of(tmp_path / "wide")) == {}
    [micro_batch] = noted(log_of(tmp_path / "tight")).values()
    failed = [row.attempt - 1 for row in found["tight"]]
    # each failed attempt halves it, and the second trial begins with what the first one ended with (which may be tight)
    assert 2 ** sum(failed) * micro_batch == 512
    assert failed[1] <= 1
    assert notes(events)[0].endswith("the next attempt uses a micro-batch of 256")


# a machine without memory

MONITOR = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 1f2e) where the task (actor ID: 3) was running was 27.63GB / 28.80GB (0.959)
Top 10 memory users: ..."""
MONITOR_NOW = """2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, \
ID: bd9a) was 27.63GB used / 28.80GB limit (0.959)
OOM kill reason: Memory usage 2088845312B exceeded threshold of 1263825792B (5.0% of 25276514304B limit)"""
FULL = "no memory was left on node 10.0.0.7 (27.63GB of 28.80GB used): Ray's memory monitor ended it"
HELP = "; fewer trials at a time (search.max_concurrent_trials) or a smaller evaluate.batch_size need less"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (MONITOR, FULL + HELP),
        (MONITOR_NOW, FULL + HELP),
        ("trial()\nMemoryError: 3 GiB", "no memory was left on its machine: MemoryError: 3 GiB" + HELP),
        ("Cuda failure 'out of memory'", "no memory was left on its machine: Cuda failure 'out of memory'" + HELP),
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
    assert re.match(f".* made no progress; the last: {left}", row.reason)
    fewer = "gets another attempt, with 1 at a time from now on instead of 2: no m"
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
        row, rows = study.settle(second), files.read_json_lines(folder, "metrics.jsonl")
    assert (row.outcome, row.attempt, row.metrics["pid"]) == ("complete", 2, process.pid)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert read_result(folder / "attempt-2")[0]["metrics"]["pid"] == process.pid
    assert (folder / "log.txt").read_text().count("attempt") == 1  # the loss


# what ends a training before its own code runs is told in one line, and kept in its log


NEVER = "ImportError: libnever.so.9: cannot open shared object file"
LOCK = "TypeError: cannot pickle '_thread.lock' object"

# texts as Ray 2.50 and 2.60 give them, shortened
OF_A_TASK = """\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=17, ip=10.0.0.7, actor_id=1f, repr=nested_trial)
  File "/site-packages/ray/tune/trainable/function_trainable.py", line 45, in <lambda>
    self._last_result = training_func(config)
                        ^^^^^^^^^^^^^^^^^^^^^
TypeError: FailureConfig.__init__() got an unexpected keyword argument 'controller_failure_limit'"""
OF_AN_ARGUMENT = """\x1b[36mray::_prepare()\x1b[39m (pid=26150, ip=10.0.0.7)
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: libnever.so.9: cannot open shared object file
traceback: Traceback (most recent call last):
ImportError: libnever.so.9: cannot open shared object file"""
OF_A_DEATH = """The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker\
 unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the OOM killer
The actor never ran - it was cancelled before it started running."""
GONE = "The actor died unexpectedly before finishing this task."
OF_A_NODE = f"{GONE}\n\tpid: 7\nThe actor died because its node has died."
WORKER_CRASHED = ray.exceptions.WorkerCrashedError()
DIED = "its process died: Worker unexpectedly exits with a connection error code 2. End of file."


def raised(error, under=None):
    try:
        raise error from under
    except type(error) as caught:
        return caught


def task_error(cause, text='Traceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: a\nsecond'):
    return ray.exceptions.RayTaskError("f", text, cause, "ray::f", 7, "10.0.0.7")


def died(text):
    return ray.exceptions.RayActorError(error_msg=text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("", ""),
        ("no route to node7", "no route to node7"),
        (OF_A_TASK, OF_A_TASK.splitlines()[-1]),
        (OF_AN_ARGUMENT, NEVER),
        (OF_A_DEATH, DIED),
        (OF_A_NODE, f"{GONE} The actor died because its node has died."),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (ValueError("\x1b[31mred\x1b[0m"), "ValueError: red"),
        (raised(TypeError("Could not serialize"), TypeError("cannot pickle '_thread.lock' object")), LOCK),
        (task_error(ValueError("a")), "ValueError: a"),
        (raised(task_error(ValueError("a")).as_instanceof_cause()), "ValueError: a"),
        (died(OF_A_DEATH), DIED),
        (WORKER_CRASHED, "WorkerCrashedError: The worker died unexpectedly while executing this task."),
        (ControllerError(raised(task_error(ImportError("x"), OF_AN_ARGUMENT))), NEVER),
        (ControllerError(RuntimeError("the controller")), "RuntimeError: the controller"),
        (WorkerGroupError("two", {0: died(OF_A_DEATH), 1: ValueError("rank 1")}), "ValueError: rank 1"),
        (WorkerGroupError("one", {0: died(OF_A_DEATH)}), DIED),
    ],
)
def test_the_cause_is_the_exception_under_ray_s_wrappers_in_one_line(error, expected):
    assert root_cause(error) == expected
    assert explained(error).partition("\n")[0] == expected
    assert "\x1b" not in explained(error)


def test_full_memory_is_told_whichever_worker_had_none():
    failures = {0: ValueError("rank 0"), 1: ray.exceptions.OutOfMemoryError(MONITOR)}
    for error in (WorkerGroupError("two", failures), ray.exceptions.OutOfMemoryError(MONITOR), MONITOR):
        assert is_full_memory(root_cause(error))
        assert "27.63GB of 28.80GB" in root_cause(error)


def test_an_error_of_tune_is_its_pickle_or_its_text(tmp_path):
    path = tmp_path / "error.txt"
    trial = SimpleNamespace(get_pickled_error=lambda: None, error_file=str(path))
    assert error_of(trial) == ""
    path.write_text(f"Failure # 1 (occurred at 2026-01-01_00-00-00)\n{OF_A_TASK}\n")
    assert root_cause(error_of(trial)).startswith("TypeError: FailureConfig")
    trial.get_pickled_error = lambda: ValueError("pickled")
    assert root_cause(error_of(trial)) == "ValueError: pickled"


@pytest.fixture
def bad_start(tmp_path, monkeypatch):
    """Sets how trainings do not begin, and gives their Runner."""
    monkeypatch.setenv("PYTHONPATH", crash_host.PYTHONPATH)
    monkeypatch.setenv("BAD_START_DRIVER", str(os.getpid()))
    monkeypatch.setenv("BAD_START_FROM", str(tmp_path / "begins"))
    # the first lost attempt sets the trial aside, and ends the search
    monkeypatch.setattr(retries, "LOST_ATTEMPTS", 1)
    monkeypatch.setattr(search_gives_up, "ATTEMPTS_TO_GIVE_UP", 1)
    monkeypatch.setattr(search_gives_up, "ATTEMPTS_PER_SLOT", 1)

    def runner(mode, in_preparation=False):
        monkeypatch.setenv("BAD_START", mode)
        if in_preparation:
            (tmp_path / "begins").touch()
        module = importlib.import_module("bad_start")
        return Runner(module.prepare, module.Train())

    yield runner
    sys.modules.pop("bad_start", None)


def check_told(text):
    """One line of a cause without terminal codes, and perhaps a next step; what is named as a path is there."""
    assert "\x1b" not in text
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 2, text
    for path in re.findall(r"(?<![\w.])/[\w./-]*\w", text):
        assert Path(path).exists(), text


@pytest.mark.whole
def test_a_training_that_cannot_begin_leaves_its_cause_in_table_status_and_log(tmp_path, bad_start, capsys):
    """Workers of Ray Train that do not come in time are in test_kills."""
    runner = bad_start("raise")
    recipe = stand_in.make_recipe(2, baselines={}, max_concurrent_trials=1)
    study_dir = tmp_path / "study"
    with pytest.raises(ClusterError) as caught:
        run_search(Plan(recipe, study_dir, None, runner=runner))
    assert NEVER in str(caught.value)
    check_told(str(caught.value))
    [row] = [row for row in snapshot(study_dir).trials if row.set_aside]
    assert row.reason.startswith(f"1 attempts in a row made no progress; the last: {NEVER}")
    check_told(row.reason)
    for words, told in (
        (["ls", study_dir], f"set aside: {row.reason}"),
        (["status", study_dir], f"set aside: {row.reason}"),
        (["logs", study_dir, row.number], f"attempt 1: lost: {NEVER}"),
    ):
        capsys.readouterr()
        assert crash_host.call([str(word) for word in words]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert told[:60] in re.sub(r"\s+", " ", shown)  # a table wraps what is long


@pytest.mark.slow
def test_a_preparation_that_dies_and_what_cannot_be_pickled_is_one_message_and_leaves_no_half_made_study(
    tmp_path, bad_start
):
    recipe, study_dir = stand_in.make_recipe(1, baselines={}), tmp_path / "study"
    preparation = "preparation: must run to its end, but got"
    for mode, said in (("die", f"{preparation} WorkerCrashedError"), ("pickle", f"{preparation} {LOCK}\n")):
        with pytest.raises(ClusterError) as caught:
            run_search(Plan(recipe, study_dir, None, runner=bad_start(mode, in_preparation=True)))
        assert str(caught.value).startswith(said)
        check_told(str(caught.value))
        assert not ray.is_initialized()
        assert not study_dir.exists()

    (tmp_path / "begins").unlink()
    with pytest.raises(ClusterError) as caught:  # after the preparation, when Tune pickles it
        run_search(Plan(recipe, study_dir, None, runner=bad_start("pickle")))
    assert str(caught.value).startswith(f"search: Ray must run it to its end, but got {LOCK}\n")
    check_told(str(caught.value))
    assert not (study_dir / "_tune").exists()
    assert snapshot(study_dir).trials == []


def test_a_process_whose_node_was_taken_away_is_told_so():
    died = ActorDiedErrorContext(error_message="The actor died because its node has died.", actor_id=b"1" * 16)
    lost = explained(ActorDiedError(died))
    assert not lost.startswith("preempted")
    died.node_death_info.reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    lost = explained(WorkerGroupError("", {0: ActorDiedError(died)}))
    assert lost.startswith("preempted: ActorDiedError: The actor died")
