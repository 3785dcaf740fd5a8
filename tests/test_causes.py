"""A failure has a cause: what ends a training before its own code runs is told in one line, and kept in its log."""

import importlib
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import crash_host
import pytest
import ray
import stand_in
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from carft_ray.errors import ClusterError
from carft_ray.launch import driver
from carft_ray.launch.failures.causes import error_of, explained, is_full_memory, root_cause
from carft_ray.launch.runs.search import run_search
from carft_ray.launch.runtime import Runner
from carft_ray.study import study
from carft_ray.study.rows import trials

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
OF_MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 1f2e) was 27.63GB / 28.80GB (0.959), which exceeds the threshold of 0.95."""
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
    failures = {0: ValueError("rank 0"), 1: ray.exceptions.OutOfMemoryError(OF_MEMORY)}
    for error in (WorkerGroupError("two", failures), ray.exceptions.OutOfMemoryError(OF_MEMORY), OF_MEMORY):
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
    monkeypatch.setattr(study, "LOST_ATTEMPTS", 1)
    monkeypatch.setattr(driver, "ATTEMPTS_TO_GIVE_UP", 1)
    monkeypatch.setattr(driver, "ATTEMPTS_PER_SLOT", 1)

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
        run_search(recipe, study_dir, None, runner=runner)
    assert NEVER in str(caught.value)
    check_told(str(caught.value))
    [row] = [row for row in trials(study_dir) if row.set_aside]
    assert row.reason.startswith(f"1 attempts in a row did not advance; the last: {NEVER}")
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
            run_search(recipe, study_dir, None, runner=bad_start(mode, in_preparation=True))
        assert str(caught.value).startswith(said)
        check_told(str(caught.value))
        assert not ray.is_initialized()
        assert not study_dir.exists()

    (tmp_path / "begins").unlink()
    with pytest.raises(ClusterError) as caught:  # after the preparation, when Tune pickles it
        run_search(recipe, study_dir, None, runner=bad_start("pickle"))
    assert str(caught.value).startswith(f"search: Ray must run it to its end, but got {LOCK}\n")
    check_told(str(caught.value))
    assert not (study_dir / "_tune").exists()
    assert trials(study_dir) == []


def test_a_process_whose_node_was_taken_away_is_told_so():
    died = ActorDiedErrorContext(error_message="The actor died because its node has died.", actor_id=b"1" * 16)
    lost = explained(ActorDiedError(died))
    assert not lost.startswith("preempted")
    died.node_death_info.reason = NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    lost = explained(WorkerGroupError("", {0: ActorDiedError(died)}))
    assert lost.startswith("preempted: ActorDiedError: The actor died")
