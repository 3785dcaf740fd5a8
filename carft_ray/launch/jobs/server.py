"""The Jobs API of a cluster: its address, the token, and calls to Ray's client, whose failures are one message each.

Ray's client takes RAY_API_SERVER_ADDRESS and RAY_ADDRESS before the address that it is given.
"""

import logging
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from carft_ray.errors import ClusterError, Problem, UsageError
from carft_ray.launch.ray_cluster.ray_private import job_client

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SILENCE_S = 30.0  # how long an answer may take
REDIRECTIONS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # "Uploading package ..."
T = TypeVar("T")


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
