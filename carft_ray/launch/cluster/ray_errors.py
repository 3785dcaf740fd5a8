"""Why something that Ray ran has failed: the exception under Ray's wrappers, and whether a machine is at fault.

Ray moves exceptions between processes and loses what they were raised from on the way; the text of the remote
traceback, which its errors carry, keeps it. So everything is read from text.

A training is retried when a machine has failed. When one worker of a group dies, the others raise whatever
their collective library makes of it. None of these, nor a network disk that has gone, says anything of the values; a
full disk or a missing permission is no failure of a machine.
"""

import errno
import re
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from carft_ray import files
from carft_ray.errors import MachineError, NoSuccessfulTrialError, Problem
from carft_ray.files import MACHINE_ERRNOS
from carft_ray.layout import LOG
from carft_ray.study.training import TrialRow
from carft_ray.training.out_of_memory import SHORTAGE
from carft_ray.training.run_context import RunContext

LONGEST = 300  # characters of a cause
TERMINAL_CODES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
RAY_LOGS = re.compile(r"\s*Check \S+(?: files)? for more information\.")  # they vanish with a Ray of our own
# what comes before an exception: a frame, a header of Python's, or one of Ray's for another process
ABOVE = re.compile(r'\s+File ".*", line \d+|.*Traceback \(most recent call last\):|.*\bray::\S+ \(pid=')
NAMED = re.compile(r"(?P<module>(?:\w+\.)*)(?P<name>[A-Za-z_]\w*)(?:\(\w+\))?(?:: ?(?P<message>.*))?$")
DURING = "During handling of the above exception, another exception occurred:"
DIRECT = "The above exception was the direct cause of the following exception:"
# "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 1f2e) was
# 27.63GB used / 28.80GB limit (0.959)"; before Ray 2.56 without "used" and "limit"
MONITOR = re.compile(
    r"running low on memory.{0,40}Memory on the node \(IP: (?P<node>[^,)\s]+)[^)]*\).{0,200}?was "
    r"(?P<used>[\d.]+ ?[KMGT]?B)(?: used)? / (?P<limit>[\d.]+ ?[KMGT]?B)",
    re.DOTALL,
)
# what an attempt writes that ran out of memory: Python, NumPy, torch
OWN = re.compile(rf"\bMemoryError\b|\bOutOfMemoryError\b|{SHORTAGE.pattern}")
FULL = "no memory was left on"
STARTED_LATE = "worker group startup timed out"  # what Ray Train says when its workers have not come in time
STEP = "fewer trials at a time (search.max_concurrent_trials) or a smaller evaluate.batch_size need less"
DIED = re.compile(r"Worker exit detail: (.+?)(?: There are some potential root causes| Some common causes|$)")
UNKNOWN = -1
NO_THREAD = "can't start new thread"  # a limit on processes is reached
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)  # what a machine has no more of

# by name: the driver, which imports this, holds no torch. Of torch.distributed, and of Ray
TYPES = {
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"),
    *("RayActorError", "NodeDiedError", "WorkerCrashedError", "ObjectLostError", "OwnerDiedError"),
    *("LocalRayletDiedError", "RaySystemError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"),
}
# what gloo, NCCL and torch's process group say in exceptions of general types (RuntimeError, ValueError)
PEER = re.compile(
    r"connection (closed|reset|refused|aborted|timed out)|broken pipe|socket (timeout|error|closed)|closed by peer"
    r"|\bgloo\b|\bnccl|process group has not been initialized|invalid process group|timed out waiting"
    r"|process group .{0,40}(abort|destroy)|collective operation timeout|no route to host|network is unreachable"
    r"|transport endpoint",
    re.IGNORECASE,
)
# a process that reads images for a function of the user's own: no memory, or none that processes share
LOADER = re.compile(r"DataLoader worker \(.*\) is killed by signal: (Killed|Bus error)")
DEVICE = re.compile(r"CUDA (driver )?error|CUDNN_STATUS_|CUBLAS_STATUS_|cuDNN error|device-side assert|NVML")


def root_cause(error: BaseException | str) -> str:
    """Returns type and message of the exception that a failure began with, in one line.

    Args:
        error: An exception of Ray, Tune or Ray Train, raised or not; or the text of one, with a traceback or without.

    Returns:
        ``ImportError: libnever.so.9: cannot open shared object file``, say; what ``host_memory`` returns;
        or that a process died, after ``preempted:`` where its node was taken away. Empty for an empty text.
    """
    text = full_text(error)
    taken_away = not isinstance(error, str) and getattr(_unwrapped(error), "preempted", False)
    line = host_memory(_everything(error)) or _root(text.rpartition(DURING)[2].partition(DIRECT)[0]) or _root(text)
    line = f"preempted: {line}" if taken_away else line
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def full_text(error: BaseException | str) -> str:
    """Returns the traceback of an error without terminal codes, or what there is of it."""
    return _plain(error if isinstance(error, str) else "".join(traceback.format_exception(_unwrapped(error))))


def explained(error: BaseException | str) -> str:
    """Returns the root cause as the first line and, where that is not all, the whole text below it."""
    cause, text = root_cause(error), full_text(error)
    return cause if text == cause else f"{cause}\n{text}"


def host_memory(text: str) -> str:
    """Returns in one line that memory was full and what helps, from the text of an error; empty for another error."""
    if is_full_memory(text):
        return text
    if found := MONITOR.search(text):
        where = f"{FULL} node {found['node']} ({found['used']} of {found['limit']} used): Ray's memory monitor ended it"
    elif OWN.search(text):
        line = next(line for line in reversed(text.strip().splitlines()) if OWN.search(line))
        where = f"{FULL} its machine: {line.strip()[:200]}"
    else:
        return ""
    return f"{where}; {STEP}"


def is_full_memory(reason: str) -> bool:
    """Tells whether a reason is one of ``host_memory``."""
    return reason.startswith(FULL)


def error_of(tune_trial: Any) -> BaseException | str:
    """Returns the error of a failed trial of Tune, or its text: the pickled error appears a little later."""
    error: BaseException | None = tune_trial.get_pickled_error()
    if error is not None:
        return error
    path = getattr(tune_trial, "error_file", None)
    with files.passing_faults():
        if path is not None and files.seen(Path(path)):
            return Path(path).read_text(errors="replace").partition("\n")[2]  # the first line says when
    return ""


def _unwrapped(error: BaseException) -> BaseException:
    """Returns the exception inside one of Ray Train: that of its controller, or of a worker that was not just ended."""
    inner = getattr(error, "controller_failure", None) or getattr(error, "health_check_failure", None)
    failures = getattr(error, "worker_failures", None) or {}
    if failures:
        inner = min(failures.values(), key=lambda each: isinstance(each, ray.exceptions.RayActorError))
    return error if inner is None else _unwrapped(inner)


def _everything(error: BaseException | str) -> str:
    """Returns all texts of an error: of several workers, any may be the one that had no memory."""
    failures = getattr(error, "worker_failures", None) or {}
    return _plain("\n".join(str(each) for each in (*failures.values(), error)))


def _plain(text: str) -> str:
    return TERMINAL_CODES.sub("", text).strip()


def _root(text: str) -> str:
    """Returns the last exception of a text: the first line at the margin after what comes before an exception."""
    lines = text.strip().splitlines() or [""]
    position, above = 0, True
    for number, line in enumerate(lines):
        if ABOVE.match(line):
            above = True
        elif above and line.strip() and not line[0].isspace():
            position, above = number, False
    found = NAMED.match(lines[position].strip())
    if found and not found["module"].startswith("ray."):
        return f"{found['name']}: {found['message']}" if found["message"] else found["name"]
    # an error of Ray itself says first that something has failed, and why at its end; what is indented are numbers
    rest = [line.strip() for line in lines[position:] if not line[:1].isspace()]
    text = RAY_LOGS.sub("", " ".join(rest))
    if died := DIED.search(text):
        return f"its process died: {died[1]}"
    return text.removeprefix(found["module"]) if found else text


def lost_rank(error: BaseException, context: RunContext) -> int | None:
    """Returns the worker whose machine has failed, when an exception shows that a worker, node, disk or GPU has failed.

    Being out of memory on a GPU is handled before.

    Args:
        error: The exception; what it was raised from counts, too.
        context: Of the worker that met it. One that is alone has no peer to lose.

    Returns:
        Its rank; ``UNKNOWN`` for a peer that is not named. None: it is another exception.
    """
    for each in _chain(error):
        if isinstance(each, MachineError):
            return UNKNOWN if each.rank is None else each.rank
        if isinstance(each, OSError) and each.errno in (*MACHINE_ERRNOS, *EXHAUSTED):
            return context.rank
        if isinstance(each, RuntimeError) and NO_THREAD in str(each):
            return context.rank
        if is_death(each):
            return UNKNOWN
        if type(each).__name__ == "AcceleratorError" or DEVICE.search(str(each)) or LOADER.search(str(each)):
            return context.rank
        if context.world_size > 1 and isinstance(each, RuntimeError | ValueError) and PEER.search(str(each)):
            return UNKNOWN
    return None


def is_death(error: BaseException) -> bool:
    """Tells whether Ray or torch.distributed says that a process or its node has gone."""
    return any(kind.__name__ in TYPES for kind in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def set_aside_error(rows: Sequence[TrialRow], resume_command: str) -> MachineError:
    """Returns the error for trainings that are set aside: each with its reason, and the command that tries them again.

    Args:
        rows: Of the trainings.
        resume_command: The command.
    """
    problems = [Problem(row.name, f"is set aside: {row.reason}") for row in rows]
    problems[-1] = replace(problems[-1], next_step=f"Nothing is lost. Correct the cause, then: {resume_command}")
    return MachineError(problems)


def no_successful_trial(study_dir: Path, rows: Sequence[TrialRow]) -> NoSuccessfulTrialError:
    """Returns the error for a search without an objective: the commonest reason, and where its log is.

    Args:
        study_dir: The study directory.
        rows: The trials that have ended; none is complete.
    """
    failed = [row for row in rows if row.outcome != "pruned"]
    if not failed:
        step = "Begin another study with a milder search.pruner, or with name: none."
        rule = f"no trial was trained to its end: the pruner has cut all {len(rows)}"
        return NoSuccessfulTrialError(Problem("search", rule, next_step=step))
    [(reason, count)] = Counter(row.reason for row in failed).most_common(1)
    row = next(row for row in failed if row.reason == reason)
    log = row.folder(study_dir) / LOG
    step = f"See {log}." if files.seen(log) else ""
    cut = f"the pruner has cut {len(rows) - len(failed)}; " if len(failed) < len(rows) else ""
    rule = f"no trial succeeded; {cut}{count} of {len(failed)} failed in this way: {reason}"
    return NoSuccessfulTrialError(Problem("search", rule, next_step=step))
