"""An attempt at a training as the driver knows it, and which files of the study it may say that it has written."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from carft_ray.errors import StorageError
from carft_ray.launch.workers.mailbox import Process
from carft_ray.store.folder import check_name
from carft_ray.study.training import Failure, TrialSpec

LONGEST_NAME = 1024  # of a file, as in a bucket


@dataclass
class Attempt:
    """An attempt that was proposed and has not ended.

    Attributes:
        spec: The attempt.
        began: When it was proposed, and once it runs, when it got its resources, of ``time.monotonic``.
        is_running: Whether it has its resources.
        rows: Of epochs that the study has not judged.
        last_row: When the last one came, of ``time.monotonic``; 0: none has.
        alive: Its process, once it has posted.
        failure: How it ended, where it has posted that.
        seen: Its last step, or when it was ended or missed last, of ``time.monotonic``.
        hung: Why it was ended from outside; empty where it was not.
        stacks: Gives what its threads did then.
        leaves: Why it was asked to leave; empty where it was not.
        is_noted: Whether the log says that it has begun.
        gone: What its node has put into the bucket of the study and has removed since; None: it puts nothing there.
    """

    spec: TrialSpec
    began: float
    is_running: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    last_row: float = 0.0
    alive: Process | None = None
    failure: Failure | None = None
    seen: float = 0.0
    hung: str = ""
    stacks: Callable[[], str] = str
    leaves: str = ""
    is_noted: bool = False
    gone: set[str] | None = None


def own_names(spec: TrialSpec, names: object) -> set[str]:
    """Returns those names that are of files of an attempt: processes of others may write to the mailbox, too."""
    found = set()
    for name in names if isinstance(names, list) else ():
        with contextlib.suppress(StorageError):
            is_short = isinstance(name, str) and len(name) <= LONGEST_NAME
            if is_short and check_name(name).startswith(f"{spec.attempt_name}/"):
                found.add(name)
    return found
