"""Notices of how a search goes, to a command or an address that the user names on the command line.

Never in the recipe, which must not name code to run. Each is one JSON object:

    event       best | failed_trial | finished | stopped | failed
    text        the same in a sentence; the key that Slack shows
    study       name of the recipe, and study_dir its folder
    trial       its name, where it is about one; objective and alpha of a best

A command gets it on its standard input, and the event as CARFT_RAY_EVENT; an address gets it by HTTP POST. Both run
while the search continues, in the order of the events, and have ten seconds. One that fails is a note, never an error.
Events of one kind about trials come at most once in 30 s; how many were left out is in the next one.
"""

import contextlib
import http.client
import json
import math
import os
import queue
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from carft_ray.errors import CarftError, InterruptedRunError, Problem, UsageError
from carft_ray.launch.events import Event, OnEvent, Shared, Stopping, TrialFinished, TrialSetAside
from carft_ray.words import counted

TIMEOUT_S = 10.0
AT_MOST_EVERY_S = 30.0
EVENT = "CARFT_RAY_EVENT"

Kind = Literal["best", "failed_trial", "finished", "stopped", "failed"]


@contextlib.contextmanager
def notifying(
    command: str | None, url: str | None, name: str, study_dir: Path, warn: Callable[[str], None]
) -> Iterator[Callable[[OnEvent], OnEvent]]:
    """Notifies while a search or a confirm runs, and of how the block ended; waits for the last notice.

    Args:
        command: Split into words as a shell would; no shell runs. None: no command.
        url: Address of a webhook, or None.
        name: Of the recipe.
        study_dir: The study directory.
        warn: Given the notices that failed, once per fault, at the end and in the calling thread.

    Yields:
        A function that lets the one who takes events share them with the notices.

    Raises:
        UsageError: Command or address cannot be used.
    """
    _check(command, url)
    if command is None and url is None:
        yield lambda on_event: on_event
        return
    notices, faults = _Notices(name, study_dir.absolute()), list[str]()
    given = (notices.waiting, command, url, faults)
    thread = threading.Thread(target=_send_all, args=given, name="notify", daemon=True)
    thread.start()
    try:
        yield lambda on_event: Shared(on_event, notices.take)
    except BaseException as error:
        notices.end(error)
        raise
    else:
        notices.end(None)
    finally:
        notices.waiting.put(None)
        thread.join(3 * TIMEOUT_S)
        for fault in dict.fromkeys(faults):
            warn(fault)


class _Notices:
    """Turns events into notices, and holds back those that come too often.

    Attributes:
        waiting: Notices to be sent; None after the last one.
    """

    def __init__(self, name: str, study_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.waiting = queue.SimpleQueue[dict[str, Any] | None]()
        self._about = {"study": name, "study_dir": str(study_dir)}
        self._clock = clock
        self._last: dict[str, float] = {}
        self._left_out = Counter[str]()
        self._num_ended = 0
        self._best = self._out_of_budget = ""

    def take(self, event: Event) -> None:
        """Takes an event of a search in; returns at once."""
        match event:
            case Stopping():
                self._out_of_budget = event.reason
            case TrialSetAside(spec):
                self._rarely("failed_trial", f"{spec.name}: set aside, {event.reason}", {"trial": spec.name})
            case TrialFinished(row, is_best):
                self._num_ended += 1
                if is_best:
                    self._best = f"{row.name}, objective {100 * (row.objective or 0.0):.1f} %"
                    more = {"trial": row.name, "objective": row.objective, "alpha": row.alpha}
                    self._rarely("best", f"new best {self._best}", more)
                elif row.outcome not in ("complete", "pruned"):
                    self._rarely("failed_trial", f"{row.name}: {row.outcome}, {row.reason}", {"trial": row.name})

    def end(self, error: BaseException | None) -> None:
        """Puts a notice of how it ended: well, by a request to stop, or with an error."""
        found = f"; new best {self._best}" if self._best else ""
        so_far = f"{counted(self._num_ended, 'training')} ended in this run{found}"
        if error is None:
            early = f"ended early, {self._out_of_budget}" if self._out_of_budget else "finished"
            self._put("finished", f"{early}; {so_far}", {})
        elif isinstance(error, KeyboardInterrupt | InterruptedRunError):
            self._put("stopped", f"stopped; {so_far}", {})
        else:
            reason = str(error) if isinstance(error, CarftError) else f"{type(error).__name__}: {error}"
            self._put("failed", f"failed: {reason}; {so_far}", {})

    def _rarely(self, kind: Kind, text: str, more: dict[str, Any]) -> None:
        now = self._clock()
        if now - self._last.get(kind, -math.inf) < AT_MOST_EVERY_S:
            self._left_out[kind] += 1
            return
        self._last[kind] = now
        left_out = self._left_out.pop(kind, 0)
        self._put(kind, text + (f" ({left_out} more since the last notice)" if left_out else ""), more)

    def _put(self, kind: Kind, text: str, more: dict[str, Any]) -> None:
        self.waiting.put({"event": kind, "text": f"{self._about['study']}: {text}", **self._about, **more})


def _send_all(waiting: Any, command: str | None, url: str | None, faults: list[str]) -> None:
    while (content := waiting.get()) is not None:
        body = json.dumps(content).encode()
        if command is not None and (fault := _run(command, body, content["event"])):
            faults.append(f"--notify-command: {fault}")
        if url is not None and (fault := _post(url, body)):
            faults.append(f"--notify-url: {fault}")


def _check(command: str | None, url: str | None) -> None:
    problems = []
    try:
        if command is not None and not shlex.split(command):
            problems.append(Problem("--notify-command", "must be a command", repr(command)))
    except ValueError as error:
        problems.append(Problem("--notify-command", f"must be a command ({error})", repr(command)))
    if url is not None and not url.startswith(("http://", "https://")):
        problems.append(Problem("--notify-url", "must begin with http:// or https://", repr(url)))
    if problems:
        raise UsageError(problems)


def _run(command: str, body: bytes, event: str) -> str:
    """Runs the command; returns what went wrong, empty for nothing."""
    try:
        done = subprocess.run(
            shlex.split(command),
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            env={**os.environ, EVENT: event},
            start_new_session=True,  # Ctrl-C is for the search
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {TIMEOUT_S:g} s and was ended"
    except OSError as error:
        return str(error)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"ended with exit code {done.returncode}{': ' + said[-1] if said else ''}" if done.returncode else ""


def _post(url: str, body: bytes) -> str:
    """Posts the JSON; returns what went wrong, empty for nothing. The address may hold a secret and is not shown."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"the server answered {error.code} {error.reason}"
    except http.client.HTTPException as error:  # its text may have the address
        return f"the server's answer is no HTTP ({type(error).__name__})"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
