"""Jobs on a cluster: submit one for a study, follow its log.

The id of a job is made of the path of its study, so that a study has one job at a time: who submits it again is led to
the job that runs.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobType

from carft_ray import __version__
from carft_ray.errors import ClusterError, InterruptedRunError, Problem, UsageError
from carft_ray.launch.jobs.server import NoAnswerError, Server, ask, ray_job
from carft_ray.launch.ray_cluster.cluster import ENVIRONMENT
from carft_ray.launch.stop import interruption
from carft_ray.study.mirror import Place, absolute

STUDY = "study"  # of a job's metadata
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
OWN_VARIABLES = (*ENVIRONMENT, STOP_WAIT)  # Ray refuses a second value of one
STOP_WAIT_S = 120  # until a job that is stopped is killed: its trainings write their checkpoints
POLL_S = 2.0
LOG_PER_S = 100_000  # characters: a long log, which comes whole each time, is asked for less often
HEAD_MAY_BE_AWAY_S = 60.0
AGENT_WITHIN_S = 60.0  # after its start a head has no agent yet
NO_AGENT = "No available agent to submit job"  # what Ray says then, and for ever where the agent's port was taken


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

    It sets no variable that ``launch.ray_cluster.cluster`` sets: Ray would refuse the second of them.

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
