"""One commit of a log, as its object holds it: a line with the BLAKE2 of the next, and a line of JSON.

    number       of the commit, from 1
    previous     the BLAKE2 of the commit before; empty in the first
    time         when it was made, in seconds since 1970, by the clock of its writer
    owner        a word of the process that wrote it, for this log alone
    records      our own, each an object with a ``kind``
    operations   Optuna's

``store.log`` says when a commit exists, and who may write it.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from carft_ray.errors import Problem, StorageError
from carft_ray.layout import COMMITS
from carft_ray.untrusted import parse_json

Commit = dict[str, Any]
_LATEST = 2**38  # of times: later ones are no dates
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass
class Pending:
    """What the next commit will hold, as JSON: nobody can change it any more."""

    operations: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python from looking for garbage within the block, which makes many objects and next to none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def decoded(data: bytes, number: int, previous: str, place: str) -> Commit:
    """Returns the commit that an object holds, or raises a ``StorageError`` when it is damaged or another one."""
    body, step = data.partition(b"\n")[2][:-1], f"Restore {COMMITS}/ from a copy of the study."
    try:
        commit: Commit = parse_json(body)
        found = commit["number"], commit["previous"]
        lists = *commit["records"], *commit["operations"]
        is_whole = isinstance(commit["owner"], str) and 0 <= commit["time"] < _LATEST
        is_whole &= all(isinstance(each, dict) for each in lists)
        is_whole &= data == sealed(body)
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise StorageError(Problem(place, "must be a whole commit", "a damaged one", next_step=step))
    if found != (number, previous):
        rule, value = (f"commit {n} after {before or 'none'}" for n, before in ((number, previous), found))
        raise StorageError(Problem(place, f"must be {rule}", value, next_step=step))
    return commit


def sealed(body: bytes) -> bytes:
    """Returns the object of a commit: the BLAKE2 of its body, and the body."""
    return b"%s\n%s\n" % (hashlib.blake2b(body, digest_size=32).hexdigest().encode(), body)


def digest_in(data: bytes) -> str:
    """Returns the BLAKE2 that an object of the log names of itself."""
    return data.partition(b"\n")[0].decode()


def as_json(value: Any) -> tuple[str, Any]:
    """Returns a value as JSON, and what will be read from that."""
    text = _ENCODER.encode(value)
    return text, parse_json(text)


def commit_name(number: int) -> str:
    """Returns the name of a commit in the store."""
    return f"{COMMITS}/{number:08d}"
