"""Jobs on a cluster: submit one for a study, follow its log, stop it, list them.

The id of a job is made of the path of its study, so that a study has one job at a time: who submits it again is led to
the job that runs.
"""

import asyncio
import contextlib
import hashlib
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobType

from carft_ray import __version__
from carft_ray.errors import ClusterError, InterruptedRunError, Problem, UsageError
from carft_ray.launch.jobs.package import Found, answer, question
from carft_ray.launch.jobs.server import NoAnswerError, Server, UnknownJobError, ask
from carft_ray.launch.ray_cluster.cluster import ENVIRONMENT, START_TIMEOUT
from carft_ray.launch.stop import interruption

STUDY, KIND = "study", "carft_ray"  # of a job's metadata
SEARCH, QUESTION = "search", "question"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
OWN_VARIABLES = (*ENVIRONMENT, START_TIMEOUT, STOP_WAIT)  # Ray refuses a second value of one
STOP_WAIT_S = 120  # until a job that is stopped is killed: its trainings write their checkpoints
POLL_S = 2.0
QUESTION_POLL_S, QUESTION_S = 0.3, 180.0
HEAD_MAY_BE_AWAY_S = 60.0
STREAM_ENDS_S = 3.0  # what a log stream is given after the end of its job


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        id: Its id, for `carft-ray cluster` and `ray job`.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        study: The study directory; empty where it was not submitted by carft-ray.
        ended: Whether its status is final.
        exit_code: Of its command; None where that did not end by itself.
        error: What kind of failure kept it from running; empty for none.
        message: What Ray says of its status.
        begun, ended_at: Unix times in seconds; None where they are not known.
        entrypoint: Its shell command.
    """

    id: str
    status: str
    study: str
    ended: bool
    exit_code: int | None
    error: str
    message: str
    begun: float | None
    ended_at: float | None
    entrypoint: str


def job_id(study: Path) -> str:
    """Returns the id of the first job of a study: its name, and a hash of its absolute path."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", study.name)[:40].strip("-") or "study"
    return f"carft-{name}-{hashlib.sha256(str(study.absolute()).encode()).hexdigest()[:8]}"


def jobs(server: Server) -> list[Job]:
    """Returns all submitted jobs of a cluster, the newest first."""
    details = ask(server, lambda client: client.list_jobs())
    submitted = [one for one in details if one.type == JobType.SUBMISSION and one.submission_id]
    found = [_job(one) for one in submitted if (one.metadata or {}).get(KIND) != QUESTION]
    return sorted(found, key=lambda job: -(job.begun or 0))


def running_job(server: Server, study: Path) -> Job | None:
    """Returns the job that runs, or waits to run, on a study."""
    return next((job for job in jobs(server) if job.study == str(study.absolute()) and not job.ended), None)


def find_job(server: Server, written: str) -> Job:
    """Returns a job by its id, or the newest job of a study by the path of that.

    Raises:
        UnknownJobError: There is none.
    """
    found = jobs(server)
    for job in found:
        if job.id == written:
            return job
    study = str(Path(written).absolute())
    for job in found:
        if job.study == study:
            return job
    step = f"See: carft-ray cluster jobs --address {server.address}"
    raise UnknownJobError(
        Problem(f"the cluster at {server.address}", "has no such job or study", written, next_step=step)
    )


def submit(server: Server, study: Path, entrypoint: str, runtime_env: Mapping[str, Any]) -> tuple[Job, bool]:
    """Submits a search, unless its study has a job already.

    Args:
        server: The cluster.
        study: The study directory.
        entrypoint: The shell command.
        runtime_env: As ``runtime_env`` returns it.

    Returns:
        The job, and whether it is new.
    """
    first = job_id(study)
    taken = {job.id for job in jobs(server)}
    name = next(each for each in (first, *(f"{first}-{n}" for n in range(2, len(taken) + 3))) if each not in taken)
    metadata = {STUDY: str(study.absolute()), KIND: SEARCH, "version": __version__}
    send = partial(_submit, entrypoint=entrypoint, submission_id=name, runtime_env=dict(runtime_env), metadata=metadata)
    try:
        ask(server, send)
    except ClusterError:
        with contextlib.suppress(ClusterError):  # somebody was faster, or only the answer has not come through
            return _info(server, name), False
        raise
    return _info(server, name), True


def runtime_env(
    working_dir: Path | None, modules: Sequence[Path] = (), pip: str = "", variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns the runtime environment of a search.

    It sets no variable that ``launch.ray_cluster.cluster`` sets: Ray would refuse the second of them.

    Args:
        working_dir: The folder that is sent; None for nothing.
        modules: Folders of modules that are sent.
        pip: A requirement that Ray installs.
        variables: Variables of the environment of the job and of its trainings.
    """
    found: dict[str, Any] = {"env_vars": {**(variables or {}), STOP_WAIT: str(STOP_WAIT_S)}}
    if working_dir is not None:
        found["working_dir"] = str(working_dir)
    if modules:
        found["py_modules"] = [str(path) for path in modules]
        found["excludes"] = ["__pycache__", ".git"]
    if pip:
        found["pip"] = [pip]
    return found


def environment_of(names: Sequence[str]) -> dict[str, str]:
    """Returns variables of this environment that a job gets, by name.

    Raises:
        UsageError: A name is none, is not set here, or is one that carft-ray sets itself.
    """
    problems = []
    for name in names:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            step = "Set it here, and give its name alone: a value on a command line is seen by every user of a machine."
            value = name.partition("=")[0] or "''"
            problems.append(Problem("--env", "must be the name of a variable alone", value, next_step=step))
        elif name in OWN_VARIABLES:
            problems.append(Problem(f"--env {name}", "must be a variable that carft-ray does not set itself"))
        elif name not in os.environ:
            problems.append(Problem(f"--env {name}", "must be set here, since its value is passed on", "none"))
    if problems:
        raise UsageError(problems)
    return {name: os.environ[name] for name in names}


def ask_package(server: Server, study: Path) -> Found:
    """Returns what the Python of the cluster's jobs has: runs a job of seconds that says it.

    Raises:
        ClusterError: It has no Python, or the job does not run.
    """
    name = f"{job_id(study)}-question-{secrets.token_hex(4)}"
    ask(server, partial(_submit, entrypoint=question(), submission_id=name, metadata={KIND: QUESTION}))
    end = time.monotonic() + QUESTION_S
    while not (job := _info(server, name)).ended:
        if time.monotonic() > end:
            with contextlib.suppress(ClusterError):
                ask(server, lambda client: client.stop_job(name))
            step = "See what else runs there: carft-ray cluster jobs"
            value = f"{job.status} for {QUESTION_S:.0f} s"
            raise ClusterError(Problem("the cluster", "must run a job of seconds", value, next_step=step))
        time.sleep(QUESTION_POLL_S)
    if job.exit_code is None:
        raise ended_error(job)
    return answer(log_of(server, name))  # not deleted: Ray 2.60 then lists it as failed


def follow(server: Server, name: str, write: Callable[[str], None]) -> Job:
    """Writes the log of a job as it grows, until the job has ended, however often the stream of the log breaks.

    Args:
        server: The cluster.
        name: Id of the job.
        write: Takes pieces of the log, each once and in order.

    Returns:
        The job at its end.

    Raises:
        ClusterError: The head has been away for a minute, or no longer knows the job.
    """
    pieces: queue.Queue[tuple[int, str]] = queue.Queue()  # where a piece ends in the log, and its text
    shown = 0
    stream: threading.Thread | None = None
    last_answer = next_stream = time.monotonic()
    next_poll = last_answer + POLL_S

    def take(timeout_s: float) -> bool:
        nonlocal shown
        try:
            end, text = pieces.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            return False
        if end > shown:
            write(text[max(0, len(text) - (end - shown)) :])
            shown = end
        return True

    while True:
        now = time.monotonic()
        if (stream is None or not stream.is_alive()) and now >= next_stream:
            stream = threading.Thread(target=_stream, args=(server, name, pieces), name="log-stream", daemon=True)
            stream.start()
            next_stream = now + POLL_S
        while take(next_poll - time.monotonic()):
            pass
        if time.monotonic() < next_poll:
            continue
        try:
            job = _info(server, name)
            last_answer = time.monotonic()
        except NoAnswerError as error:
            if time.monotonic() - last_answer > HEAD_MAY_BE_AWAY_S:
                attach = f"carft-ray submit --attach {name} --address {server.address}"
                step, place = f"The job may run on. When it answers: {attach}", f"the cluster at {server.address}"
                raise ClusterError(Problem(place, "no longer answers", next_step=step)) from error
            stream = None  # it may hang without an end
            next_poll = time.monotonic() + POLL_S
            continue
        except UnknownJobError as error:
            step = "Its head was started anew. Nothing finished is lost: the same command again resumes the study."
            place = f"the cluster at {server.address}"
            raise ClusterError(Problem(place, f"no longer knows the job {name}", next_step=step)) from error
        if job.ended:
            break
        next_poll = time.monotonic() + POLL_S
    if stream is not None:
        stream.join(STREAM_ENDS_S)
    while take(0):
        pass
    with contextlib.suppress(ClusterError):  # the node that has the log may be gone
        write(log_of(server, name)[shown:])
    return job


def log_of(server: Server, name: str) -> str:
    """Returns the log of a job as far as it is."""
    return ask(server, lambda client: client.get_job_logs(name))


def stop(server: Server, job: Job) -> None:
    """Asks a job to stop; its trainings have ``STOP_WAIT_S`` for their checkpoints."""
    ask(server, lambda client: client.stop_job(job.id))


def wait_until_ended(server: Server, name: str) -> Job:
    """Returns a job once it has ended."""
    while not (job := _info(server, name)).ended:
        time.sleep(POLL_S)
    return job


def exit_code(job: Job) -> int | None:
    """Returns the exit code of the command of a job that has ended; as a shell has it where a signal ended it."""
    return job.exit_code if job.exit_code is None or job.exit_code >= 0 else 128 - job.exit_code


def ended_error(job: Job, resume_command: str = "") -> ClusterError | InterruptedRunError:
    """Returns the error of a job that has ended without an exit code: it was stopped, or never ran.

    Args:
        job: The job.
        resume_command: The command that resumes its study.
    """
    if job.status == JobStatus.STOPPED.value:
        return interruption(f"the job {job.id} was stopped", resume_command)
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    value = next((line for line in reversed(lines) if re.search("(?i)error|fail|no ", line)), lines[0] if lines else "")
    rule, step = _NOT_RUN.get(job.error, ("must run to its end", "The same command again resumes the study."))
    return ClusterError(Problem(f"the job {job.id}", rule, value[:300], next_step=step))


_NOT_RUN = {
    "RUNTIME_ENV_SETUP_FAILURE": (
        "its environment must be made on the head",
        "With --package pip the nodes must reach PyPI. Full text: carft-ray cluster jobs --json",
    ),
    "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE": ("must find a place on the head", "Is the head alive?"),
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT": (
        "must start within the time of the head (RAY_JOB_START_TIMEOUT_SECONDS)",
        "Is the head busy? Then submit again.",
    ),
    "JOB_SUPERVISOR_ACTOR_DIED": (
        "its supervisor on the head died",
        "Was the head out of memory? The same command again resumes the study.",
    ),
}


def _submit(client: Any, **given: Any) -> str:
    name: str = client.submit_job(**given)
    return name


def _info(server: Server, name: str) -> Job:
    return _job(ask(server, lambda client: client.get_job_info(name)))


def _job(details: JobDetails) -> Job:
    begun, ended_at = (None if not ms else ms / 1000 for ms in (details.start_time, details.end_time))
    return Job(
        id=details.submission_id or "",
        status=details.status.value,
        study=(details.metadata or {}).get(STUDY, ""),
        ended=details.status.is_terminal(),
        exit_code=details.driver_exit_code,
        error=str(getattr(details.error_type, "value", details.error_type) or ""),
        message=details.message or "",
        begun=begun,
        ended_at=ended_at,
        entrypoint=details.entrypoint,
    )


def _stream(server: Server, name: str, pieces: "queue.Queue[tuple[int, str]]") -> None:
    """Puts the log of a job, from its beginning, into a queue until the stream ends."""

    async def read() -> None:
        end = 0
        async for text in server.client.tail_job_logs(name):
            end += len(text)
            pieces.put((end, text))

    with contextlib.suppress(Exception):  # whatever broke it: the status tells whether the job has ended
        asyncio.run(read())
