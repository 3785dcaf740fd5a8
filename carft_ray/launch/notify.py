"""Notices of how a search goes, posted to an address that the user names on the command line.

Never in the recipe, which may come from somebody else. Each is one JSON object:

    event       best | failed_trial | finished | stopped | failed
    text        the same in a sentence; the key that Slack shows
    study       name of the recipe, and study_dir its folder
    trial       its name, where it is about one; objective and alpha of a best

They are sent while the search continues, in the order of the events, each within ten seconds. One that fails is a
warning at the end, never an error. So is one that is answered by a redirect, which is not followed: it would be asked
for with a GET that has no notice in it. Events of one kind about trials come at most once in 30 s.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

from carft_ray.errors import CarftError, InterruptedRunError, Problem, UsageError
from carft_ray.launch.events import Event, Stopping, TrialFinished, TrialSetAside
from carft_ray.launch.outbox import Ended, Receiver
from carft_ray.words import counted

TIMEOUT_S = 10.0
AT_MOST_EVERY_S = 30.0

Kind = Literal["best", "failed_trial", "finished", "stopped", "failed"]
Notice = dict[str, Any]


def webhook(url: str | None, name: str, study_dir: Path) -> dict[str, Receiver]:
    """Returns the receiver of the notices of a search or a confirm by its option; none without an address.

    Args:
        url: Its address.
        name: Of the recipe.
        study_dir: The study directory.

    Raises:
        UsageError: The address cannot be used.
    """
    if url is None:
        return {}
    if not url.startswith(("http://", "https://")):
        raise UsageError(Problem("--notify-url", "must begin with http:// or https://", repr(url)))
    return {"--notify-url": partial(_post_all, url, _Notices(name, study_dir.absolute()))}


class _Notices:
    """Turns events into notices, and leaves out those that come too often."""

    def __init__(self, name: str, study_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._about = {"study": name, "study_dir": str(study_dir)}
        self._clock = clock
        self._last: dict[str, float] = {}
        self._num_ended = 0
        self._best = self._out_of_budget = ""

    def of(self, event: Event) -> Notice | None:
        """Returns the notice of an event, where it gets one."""
        match event:
            case Stopping():
                self._out_of_budget = event.reason
            case TrialSetAside(spec):
                return self._rarely("failed_trial", event.line(), {"trial": spec.name})
            case TrialFinished(row, is_best):
                self._num_ended += 1
                if is_best:
                    self._best = f"{row.name}, objective {100 * (row.objective or 0.0):.1f} %"
                    more = {"trial": row.name, "objective": row.objective, "alpha": row.alpha}
                    return self._rarely("best", f"new best {self._best}", more)
                if row.outcome not in ("complete", "pruned"):
                    return self._rarely("failed_trial", event.line(), {"trial": row.name})
            case Ended(error):
                return self._end(error)
        return None

    def _end(self, error: BaseException | None) -> Notice:
        """Returns the notice of how it ended: well, by a request to stop, or with an error."""
        found = f"; new best {self._best}" if self._best else ""
        so_far = f"{counted(self._num_ended, 'training')} ended in this run{found}"
        if error is None:
            early = f"ended early, {self._out_of_budget}" if self._out_of_budget else "finished"
            return self._notice("finished", f"{early}; {so_far}", {})
        if isinstance(error, KeyboardInterrupt | InterruptedRunError):
            return self._notice("stopped", f"stopped; {so_far}", {})
        reason = str(error) if isinstance(error, CarftError) else f"{type(error).__name__}: {error}"
        return self._notice("failed", f"failed: {reason}; {so_far}", {})

    def _rarely(self, kind: Kind, text: str, more: dict[str, Any]) -> Notice | None:
        now = self._clock()
        if now - self._last.get(kind, -math.inf) < AT_MOST_EVERY_S:
            return None
        self._last[kind] = now
        return self._notice(kind, text, more)

    def _notice(self, kind: Kind, text: str, more: dict[str, Any]) -> Notice:
        return {"event": kind, "text": f"{self._about['study']}: {text}", **self._about, **more}


def _post_all(url: str, notices: _Notices, events: Iterator[Event]) -> Iterator[str]:
    """Posts the notices of events; yields what went wrong."""
    for notice in filter(None, map(notices.of, events)):
        if fault := _post(url, json.dumps(notice).encode()):
            yield fault


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any, **named: Any) -> None:
        """Follows none: the answer is an ``HTTPError``."""


def _post(url: str, body: bytes) -> str:
    """Posts the JSON; returns what went wrong, empty for nothing. The address may hold a secret and is not shown."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(_NoRedirect).open(asked, timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                return f"not sent: the server redirects ({error.code}){_towards(url, error.headers.get('Location'))}"
            return f"the server answered {error.code} {error.reason}"
    except http.client.HTTPException as error:  # its text may have the address
        return f"the server's answer is not HTTP ({type(error).__name__})"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _towards(url: str, location: str | None) -> str:
    """Returns where a redirect leads and what to give instead, without the path, which may hold a secret."""
    there, here = urlsplit(urljoin(url, location or "")), urlsplit(url)
    if not location or not there.netloc:
        return ""
    path = "with the same path" if (there.path, there.query) == (here.path, here.query) else "with its new path"
    return f"; give {there.scheme}://{there.netloc.rpartition('@')[2]} {path}"
