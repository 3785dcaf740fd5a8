"""Jobs on a cluster, by its Jobs API: submit one for a study, follow its log.

The id of a job is made of the path of its study, so that a study has one job at a time: who submits it again is led to
the job that runs. Failures of Ray's client are one message each. Ray's client takes RAY_API_SERVER_ADDRESS and
RAY_ADDRESS before the address that it is given.
"""

import contextlib
import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from carft_ray import __version__
from carft_ray.errors import ClusterError, InterruptedRunError, Problem, UsageError, interruption
from carft_ray.launch.cluster.cluster import ENVIRONMENT
from carft_ray.launch.cluster.ray_private import job_client
from carft_ray.study.place import Place, absolute

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SILENCE_S = 30.0  # how long an answer may take
REDIRECTIONS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # "Uploading package ..."
T = TypeVar("T")
STUDY = "study"  # of a job's metadata
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
OWN_VARIABLES = (*ENVIRONMENT, STOP_WAIT)  # Ray refuses a second value of one
STOP_WAIT_S = 120  # until a job that is stopped is killed: its trainings write their checkpoints
POLL_S = 2.0
LOG_PER_S = 100_000  # characters: a long log, which comes whole each time, is asked for less often
HEAD_MAY_BE_AWAY_S = 60.0
AGENT_WITHIN_S = 60.0  # after its start a head has no agent yet
NO_AGENT = "No available agent to submit job"  # what Ray says then, and for ever where the agent's port was taken


class NoAnswerError(ClusterError):
    """The head does not answer, perhaps for the moment only."""


@dataclass(frozen=True)
class Server:
    """A cluster that has answered.

    Attributes:
        address: Of its dashboard, as in messages.
        client: Ray's client.
    """

    address: str
    client: JobSubmissionClient


def dashboard_address(written: str | None) -> str:
    """Returns the address of a dashboard, ``http://HOST:PORT``; one without a scheme gets it.

    Raises:
        UsageError: It is none.
    """
    text = DEFAULT_ADDRESS if written is None else written.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    if not re.fullmatch(r"http://[^/?@\s]+:\d{1,5}|https://[^/?@\s]+", text):
        step = "It is the address of Ray's dashboard; from outside: ssh -L 8265:127.0.0.1:8265 HEAD"
        raise UsageError(Problem("--address", f"must be like {DEFAULT_ADDRESS}", repr(written), next_step=step))
    return text


def find_token() -> tuple[str, str]:
    """Returns the token of the cluster and where it was found: where Ray looks, in its order; both empty without one.

    Raises:
        UsageError: The file that RAY_AUTH_TOKEN_PATH names cannot be read, or is empty.
    """
    if token := os.environ.get(TOKEN, "").strip():
        return token, TOKEN
    named = os.environ.get(TOKEN_PATH)
    path = Path(os.path.expanduser(named)) if named else Path.home() / ".ray" / "auth_token"
    try:
        token, cause = path.read_text(encoding="utf-8").strip(), "an empty file"
    except (OSError, UnicodeDecodeError) as error:
        token, cause = "", getattr(error, "strerror", None) or "no text"
    if named and not token:
        raise UsageError(Problem(TOKEN_PATH, "must name a file with a token", f"{path}: {cause}"))
    return token, str(path) if token else ""


def connect(written: str | None) -> Server:
    """Returns the cluster at an address, once it has answered.

    Args:
        written: The address as the user gave it; None: ``DEFAULT_ADDRESS``.

    Raises:
        ClusterError: No dashboard of a Ray answers there, or it refuses the token.
        UsageError: The address is none, or the file of the token cannot be read.
    """
    address = dashboard_address(written)
    token, _ = find_token()
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    redirected = {name: os.environ.pop(name) for name in REDIRECTIONS if name in os.environ}
    try:
        client = job_client(address, {"Authorization": f"Bearer {token}"} if token else {}, SILENCE_S)
    except AuthenticationError as error:
        raise _refused(address) from error
    except Exception as error:  # whatever another server answers
        raise _no_answer(address, error) from error
    finally:
        os.environ.update(redirected)
    return Server(address, client)


def ray_job(server: Server, *words: str) -> str:
    """Returns a line for a shell: a command of ``ray job`` about this cluster, with the token if there is one here.

    Args:
        server: The cluster.
        words: ``list``, or another command and the id of a job.
    """
    without = [word for name in REDIRECTIONS if name in os.environ for word in ("-u", name)]
    token = ["RAY_AUTH_MODE=token"] if find_token()[0] else []  # else Ray sends none
    before = ["env", *without] if without else []
    return shlex.join([*before, *token, "ray", "job", *words, "--address", server.address])


def ask(server: Server, call: Callable[[JobSubmissionClient], T]) -> T:
    """Returns what a call to Ray's client returns.

    Raises:
        NoAnswerError: The head does not answer.
        ClusterError: It answers with a failure.
    """
    try:
        return call(server.client)
    except AuthenticationError as error:
        raise _refused(server.address) from error
    except OSError as error:  # requests' errors are such, too
        raise _no_answer(server.address, error) from error
    except RuntimeError as error:
        text = str(error)
        rule, step = "no longer knows the job", "Was its head restarted? The same command again resumes the study."
        if "status code 404" not in text:
            rule = f"must accept the request, but got {_gist(text)}"
            step = "dashboard.log in /tmp/ray/session_latest/logs of the head says more."
        raise ClusterError(Problem(f"the cluster at {server.address}", rule, next_step=step)) from error


def _no_answer(address: str, error: BaseException) -> NoAnswerError:
    text = str(error.__context__ or error)
    cause = re.search(r"\[Errno -?\d+\] ([^\"')]+)|Read timed out", text)
    value = (cause[1] or f"silence for {SILENCE_S:g} s") if cause else _gist(text)
    step = "Is it Ray's dashboard (port 8265, not 6379)? From outside, first: ssh -L 8265:127.0.0.1:8265 HEAD"
    return NoAnswerError(Problem("--address", f"no Ray dashboard answers at {address}", value, next_step=step))


def _refused(address: str) -> ClusterError:
    _, token_from = find_token()
    step = f"`ray get-auth-token` on the head prints it; put it into ~/.ray/auth_token (mode 600) or {TOKEN}."
    value = f"the one from {token_from}" if token_from else f"none in {TOKEN}, {TOKEN_PATH} or ~/.ray/auth_token"
    return ClusterError(Problem("--address", f"{address} requires the token of the cluster", value, next_step=step))


def _gist(text: str) -> str:
    """Returns the line of an answer that says most: the last of a traceback, else the first, not too long."""
    text = re.sub(r"^Request failed with status code \d+: ", "", text.strip()).rstrip(".")
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")] or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0][:300]


def job_id(study: Place) -> str:
    """Returns the id of the first job of a study: its name, and a hash of its absolute path or its address."""
    place = absolute(study)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", place.rpartition("/")[2])[:40].strip("-") or "study"
    return f"carft-{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def described(job: JobDetails) -> dict[str, Any]:
    """Returns a job as plain data, with times in seconds since 1970; None for what is not known.

    The exit code is that of its command, as a shell has it where a signal ended it.
    """
    begun, ended_at = (None if not ms else ms / 1000 for ms in (job.start_time, job.end_time))
    code = job.driver_exit_code
    return {
        "id": job.submission_id,
        "status": job.status.value,
        "study": study_of(job),
        "exit_code": 128 - code if code is not None and code < 0 else code,
        "message": job.message,
        "begun": begun,
        "ended_at": ended_at,
        "entrypoint": job.entrypoint,
    }


def study_of(job: JobDetails) -> str:
    """Returns the study directory of a job, or its address; empty where it was not submitted by carft-ray."""
    return (job.metadata or {}).get(STUDY, "")


def jobs(server: Server) -> list[JobDetails]:
    """Returns all submitted jobs of a cluster, the newest first."""
    found = ask(server, lambda client: client.list_jobs())
    return sorted((job for job in found if job.type == JobType.SUBMISSION), key=lambda job: -(job.start_time or 0))


def running_job(server: Server, study: Place) -> JobDetails | None:
    """Returns the job that runs, or waits to run, on a study."""
    place = absolute(study)
    of_study = (job for job in jobs(server) if study_of(job) == place)
    return next((job for job in of_study if not job.status.is_terminal()), None)


def find_job(server: Server, written: str) -> JobDetails:
    """Returns a job by its id, or the newest job of a study by the path or address of that.

    Raises:
        ClusterError: There is none.
    """
    found, study = jobs(server), absolute(written)
    of_study = [job for job in found if study_of(job) == study]
    matching = [job for job in found if job.submission_id == written] or of_study
    if not matching:
        place, step = f"the cluster at {server.address}", f"See: {ray_job(server, 'list')}"
        raise ClusterError(Problem(place, "has no such job or study", written, next_step=step))
    return matching[0]


def submit(
    server: Server, study: Place, entrypoint: str, runtime_env: Mapping[str, Any], tell: Callable[[str], None]
) -> str:
    """Submits a search; waits for the agent of the head, which starts jobs.

    Args:
        server: The cluster.
        study: The study directory, or the address of the study.
        entrypoint: The shell command.
        runtime_env: As ``runtime_env`` returns it.
        tell: Told what is waited for, once.

    Returns:
        The id of the job.

    Raises:
        ClusterError: The head has had no agent for ``AGENT_WITHIN_S``; or as of ``ask``.
    """
    first = job_id(study)
    taken = {job.submission_id for job in jobs(server)}
    name = next(each for each in (first, *(f"{first}-{n}" for n in range(2, len(taken) + 3))) if each not in taken)
    given: dict[str, Any] = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": dict(runtime_env)}
    given["metadata"] = {STUDY: absolute(study), "version": __version__}
    end, is_told = time.monotonic() + AGENT_WITHIN_S, False
    while True:
        try:
            return ask(server, lambda client: client.submit_job(**given))
        except ClusterError as error:
            if NO_AGENT not in str(error):
                raise
            if time.monotonic() >= end:
                rule = f"must have an agent that starts jobs; it had none for {AGENT_WITHIN_S:g} s"
                step = "Another Ray on the head probably uses its port, 52365. Start the head with a free one: "
                step += "ray start --head --dashboard-agent-listen-port 52366"
                raise ClusterError(Problem(f"the cluster at {server.address}", rule, next_step=step)) from error
        if not is_told:
            tell(f"The agent of the head, which starts jobs, is not running yet; waiting {AGENT_WITHIN_S:g} s at most.")
            is_told = True
        time.sleep(POLL_S)


def runtime_env(working_dir: Path | None, modules: Sequence[Path], variables: Mapping[str, str]) -> dict[str, Any]:
    """Returns the runtime environment of a search.

    It sets no variable that ``launch.cluster.cluster`` sets: Ray would refuse the second of them.

    Args:
        working_dir: The folder that is sent; None for nothing.
        modules: Folders of modules that are sent.
        variables: Variables of the environment of the job and of its trainings.
    """
    found: dict[str, Any] = {"env_vars": {**variables, STOP_WAIT: str(STOP_WAIT_S)}}
    if working_dir is not None:
        found["working_dir"] = str(working_dir)
    if modules:
        found |= {"py_modules": [str(path) for path in modules], "excludes": ["__pycache__", ".git"]}
    return found


def environment_of(names: Sequence[str]) -> dict[str, str]:
    """Returns variables of this environment that a job gets, by name.

    Raises:
        UsageError: One is not set here, or is one that carft-ray sets itself.
    """
    wrong = [name for name in names if name in OWN_VARIABLES or name not in os.environ]
    if wrong:
        rule = "must be the name of a variable that is set here, and that carft-ray does not set itself"
        step = "Give only the name: every user of a machine can see a value on a command line."
        raise UsageError([Problem("--env", rule, name.partition("=")[0] or "''", next_step=step) for name in wrong])
    return {name: os.environ[name] for name in names}


def follow(server: Server, name: str, write: Callable[[str], None]) -> JobDetails:
    """Writes the log of a job as it grows, until the job has ended.

    Args:
        server: The cluster.
        name: Id of the job.
        write: Takes pieces of the log, each once and in order.

    Returns:
        The job at its end.

    Raises:
        ClusterError: The head has been away for a minute, or no longer knows the job.
    """
    shown, heard = 0, time.monotonic()
    while True:
        try:
            job = ask(server, lambda client: client.get_job_info(name))
            heard = time.monotonic()
            with contextlib.suppress(ClusterError):  # the node that has the log may be gone
                log = ask(server, lambda client: client.get_job_logs(name))
                write(log[shown:])
                shown = max(shown, len(log))
            if job.status.is_terminal():
                return job
        except NoAnswerError as error:
            if time.monotonic() - heard > HEAD_MAY_BE_AWAY_S:
                step = f"The job may still run. Follow it: carft-ray submit --attach {name} --address {server.address}"
                raise ClusterError(Problem(server.address, "no longer answers", next_step=step)) from error
        time.sleep(max(POLL_S, shown / LOG_PER_S))


def ended_error(job: JobDetails, resume_command: str = "") -> ClusterError | InterruptedRunError:
    """Returns the error of a job that has ended without an exit code: it was stopped, or never ran.

    Args:
        job: The job.
        resume_command: The command that resumes its study.
    """
    if job.status == JobStatus.STOPPED:
        return interruption(f"the job {job.submission_id} was stopped", resume_command)
    value = " ".join((job.message or "").split())[-300:]
    step = "The same command again resumes the study."
    return ClusterError(Problem(f"the job {job.submission_id}", "must run to its end", value, next_step=step))
