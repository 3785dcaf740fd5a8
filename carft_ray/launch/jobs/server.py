"""The Jobs API of a cluster: its address, the token, and calls to Ray's client, each with a time limit and one message.

Ray's client has no time limit, and takes RAY_API_SERVER_ADDRESS and RAY_ADDRESS before the address that it is given.
"""

import contextlib
import http.client
import json
import logging
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from carft_ray import environment
from carft_ray.errors import ClusterError, Problem, UsageError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
FIRST_ANSWER_S = 10.0
ANSWER_S = 60.0  # an upload of 100 MiB included
REDIRECTIONS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client would follow them
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # "Uploading package ..."
T = TypeVar("T")


class NoAnswerError(ClusterError):
    """The head does not answer, perhaps for the moment only."""


class UnknownJobError(ClusterError):
    """The cluster has no job of this name."""


@dataclass(frozen=True)
class Server:
    """A cluster that has answered.

    Attributes:
        address: Of its dashboard, as in messages.
        client: Ray's client.
        token_from: Where the token was found; empty without one.
        ray_version: Of the head.
    """

    address: str
    client: JobSubmissionClient
    token_from: str
    ray_version: str


def dashboard_address(written: str | None) -> str:
    """Returns the address of a dashboard, ``http://HOST:PORT``; one without a scheme gets it.

    Raises:
        UsageError: It is none.
    """
    text = DEFAULT_ADDRESS if written is None else written.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    parts = urlsplit(text)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or parts.scheme == "https")
    except ValueError:
        good = False
    if not good or parts.path or parts.query or parts.username:
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
        ClusterError: Nobody answers there, or no dashboard of a Ray that can be used, or it refuses the token.
        UsageError: The address is none, or the file of the token cannot be read.
    """
    address = dashboard_address(written)
    token, token_from = find_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    version = _ray_version(address, headers, token_from)
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)

    def make() -> JobSubmissionClient:
        return JobSubmissionClient(address, headers=dict(headers))

    with _unset(REDIRECTIONS):
        client = _answered(address, token_from, make)
    return Server(address, client, token_from, version)


def ask(server: Server, call: Callable[[JobSubmissionClient], T]) -> T:
    """Returns what a call to Ray's client returns.

    Raises:
        NoAnswerError: The head does not answer within the time, or refuses connections.
        UnknownJobError: There is no such job.
        ClusterError: It answers with another failure.
    """
    return _answered(server.address, server.token_from, lambda: call(server.client))


def _answered(address: str, token_from: str, call: Callable[[], T]) -> T:
    """Calls in a thread, which stays behind where the head hangs."""
    found: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:  # raised again below, as one of ours
            failed.append(error)

    thread = threading.Thread(target=run, name="ask-cluster", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if failed:
        raise _told(address, token_from, failed[0]) from failed[0]
    if not found:
        raise _no_answer(address, f"silence for {ANSWER_S:g} s")
    return found[0]


def _ray_version(address: str, headers: dict[str, str], token_from: str) -> str:
    """Asks a server whether it is the dashboard of a Ray that can be used; returns its version."""
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    answer: Any = None
    try:
        with urllib.request.urlopen(request, timeout=FIRST_ANSWER_S) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _refused(address, token_from) from error
        raise _not_ray(address, f"status {error.code}") from error
    except TimeoutError as error:
        raise _no_answer(address, f"silence for {FIRST_ANSWER_S:g} s") from error
    except urllib.error.URLError as error:
        silent = isinstance(error.reason, TimeoutError)
        raise _no_answer(address, f"silence for {FIRST_ANSWER_S:g} s" if silent else _cause(error.reason)) from error
    except (http.client.HTTPException, ConnectionError) as error:
        raise _not_ray(address, "a server of another kind") from error
    except ValueError:
        pass
    version = answer.get("ray_version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise _not_ray(address, "another web page")
    needed = environment.needed("ray")
    with contextlib.suppress(InvalidVersion):
        if any(not one.contains(Version(version).base_version) for one in needed if one.operator.startswith(">")):
            step = "Install a newer Ray on all nodes of the cluster, and start it again."
            raise ClusterError(Problem("address", f"{address} must run Ray {needed}", version, next_step=step))
    return version


def _told(address: str, token_from: str, error: Exception) -> ClusterError:
    """Returns the one message for a failure of Ray's client."""
    text = str(error).strip()
    if isinstance(error, ClusterError):
        return error
    if isinstance(error, AuthenticationError):
        return _refused(address, token_from)
    if isinstance(error, OSError):  # requests' errors are such, too
        return _no_answer(address, _cause(error))
    place, status = f"the cluster at {address}", re.search(r"status code (\d+)", text)
    if status and status[1] == "404":
        step = "These are there: carft-ray cluster jobs"
        return UnknownJobError(Problem(place, "knows no such job", _gist(text), next_step=step))
    for sign, rule, step in _FAILURES:
        if re.search(sign, text):
            return ClusterError(Problem(place, rule, next_step=step))
    if status:
        return ClusterError(Problem(place, "must accept the request", _gist(text), next_step=_SEE_HEAD))
    return _not_ray(address, f"{type(error).__name__}: {_gist(text)}")


_SEE_HEAD = "The head's log says more: dashboard.log in /tmp/ray/session_latest/logs there."
_FAILURES = (
    (
        "No space left|Errno 28|Disk quota",
        "has no space left",
        "Free some on the head, in /tmp/ray above all, then run the same command again.",
    ),
    (
        "Request Entity Too Large|413",
        "takes at most 100 MiB at once",
        "Put large files on the disk that the nodes share, and name their paths in the recipe.",
    ),
    (
        "No available agent",
        "has no agent that starts jobs",
        "Its head may still be starting; or another Ray on that machine has its port: give each its own "
        "--dashboard-agent-listen-port.",
    ),
)


def _no_answer(address: str, cause: str) -> NoAnswerError:
    step = "Does the cluster run? From outside, first: ssh -L 8265:127.0.0.1:8265 HEAD"
    return NoAnswerError(Problem("address", f"no Ray answers at {address}", cause, next_step=step))


def _not_ray(address: str, value: str) -> ClusterError:
    port = urlsplit(address).port
    step = "Its port is 8265 if `ray start` was given no --dashboard-port."
    step += " 6379 is the port of Ray itself." if port == 6379 else ""
    return ClusterError(Problem("address", f"{address} must be the dashboard of a Ray", value, next_step=step))


def _refused(address: str, token_from: str) -> ClusterError:
    step = f"`ray get-auth-token` on the head prints it; put it into ~/.ray/auth_token (mode 600) or {TOKEN}."
    value = f"the one from {token_from}" if token_from else f"none in {TOKEN}, {TOKEN_PATH} or ~/.ray/auth_token"
    return ClusterError(Problem("address", f"{address} wants the token of the cluster", value, next_step=step))


def _cause(reason: object) -> str:
    if isinstance(reason, socket.gaierror):
        return "an unknown host"
    if isinstance(reason, ConnectionRefusedError):
        return "a refused connection"
    return getattr(reason, "strerror", None) or _gist(str(reason)) or type(reason).__name__


def _gist(text: str) -> str:
    """Returns the line of an answer that says most: the last of a traceback, else the first, not too long."""
    text = re.sub(r"^Request failed with status code \d+: ", "", text.strip()).rstrip(".")
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    line = "" if not lines else lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


@contextlib.contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block, variables of the environment are not set."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
