"""What runs, as records of the log say it: which attempts have begun, and how many trainings run at a time.

An attempt runs from its record until the log has what it took (``attributes.SPENT``), as long as the process that has
written the record holds the log. After a kill, an attempt has lasted until the last commit of that process.
"""

import time
from typing import Any

from carft_ray.store.log import Log
from carft_ray.study.records import AT_A_TIME, STARTED, all_of, last_of
from carft_ray.study.training import TrialRow, TrialSpec


def started(spec: TrialSpec, seconds: float, gpus: float, process: int, node: str) -> dict[str, Any]:
    """Returns the record of an attempt that has begun.

    Args:
        spec: The attempt.
        seconds: For how long it has held its resources.
        gpus: GPUs that its workers hold together.
        process: Id of the process of rank 0.
        node: Ray's name of its node; empty without Ray.
    """
    place = {"training": spec.training, "attempt": spec.attempt, "process": process, "node": node}
    return {"kind": STARTED, **place, "began": round(time.time() - seconds, 3), "gpus": gpus}


def at_a_time_record(number: int, reason: str) -> dict[str, Any]:
    """Returns the record of how many trainings run at a time from now on, and why not more."""
    return {"kind": AT_A_TIME, "number": number, "reason": reason}


def begun(log: Log) -> dict[tuple[str, int], tuple[int, dict[str, Any]]]:
    """Returns the attempts that have begun, by training and attempt: number of the commit, and the record.

    Raises:
        StorageError: A record is not what it may be.
    """
    return {(record["training"], record["attempt"]): (number, record) for number, record in all_of(log, STARTED)}


def running_since(log: Log, rows: list[TrialRow]) -> dict[tuple[str, str], float]:
    """Returns when the running attempts of trainings began, in seconds since 1970, by kind and name.

    Raises:
        StorageError: As ``begun``.
    """
    known, claimed = begun(log), log.claimed
    last = {(row.kind, row.name): known.get((row.training, row.attempt)) for row in rows if row.is_open}
    return {key: found[1]["began"] for key, found in last.items() if found is not None and found[0] > claimed}


def at_a_time(log: Log) -> tuple[int, str] | None:
    """Returns how many trainings the holder runs at a time, and why not more; None while it has not said.

    Raises:
        StorageError: The record is not what it may be.
    """
    found = last_of(log, AT_A_TIME, log.claimed)
    return (found["number"], found["reason"]) if found else None


def left_behind(log: Log) -> dict[tuple[str, int], tuple[float, float]]:
    """Returns seconds and GPUs of attempts that have begun, as if each ended with its driver, by training and attempt.

    Raises:
        StorageError: As ``begun``.
    """
    found = begun(log).items()
    return {
        key: (max(0.0, log.time_of(number) - each["began"]) + log.lasted(number), each["gpus"])
        for key, (number, each) in found
    }
