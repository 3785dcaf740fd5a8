"""Every kind of record that a study's log holds, once: its name, who writes it, its type. Nothing else looks for any.

Two more kinds belong to the log itself: who has claimed it, and that it was released (``store.log``).
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from carft_ray.layout import COMMITS
from carft_ray.store.log import Log
from carft_ray.study import typed

RECIPE = "recipe"  # that of the study from then on; ``recipe_identity``
PROVENANCE = "provenance"  # where its numbers come from; ``provenance``
TEST_SETS = "test sets"  # digests of the test sets' images when the search began; ``ledger.note_test_sets``
LEDGER = "ledger"  # a line of the ledger; ``ledger.record``
TAKEN_IN = "taken in"  # a study of ``search.warm_start``; ``warm_start.take_in``
STARTED = "started"  # an attempt; ``running.started``
AT_A_TIME = "at_a_time"  # how many trainings run at a time from then on; ``running.at_a_time_record``
FITS = "fits"  # a micro-batch that may fit into a device's memory; ``launch.workers.micro_batch``
STOPPING = "stopping"  # the search stops, for its ``reason``; an empty one takes that back; ``launch.driver``

TYPES: Mapping[str, type[BaseModel]] = {
    RECIPE: typed.RecipeRecord,
    PROVENANCE: typed.ProvenanceRecord,
    TEST_SETS: typed.TestSets,
    LEDGER: typed.LedgerRecord,
    TAKEN_IN: typed.TakenIn,
    STARTED: typed.Started,
    AT_A_TIME: typed.AtATime,
    FITS: typed.Fits,
    STOPPING: typed.Stopping,
}
Numbered = tuple[int, dict[str, Any]]  # a record and the number of its commit


def all_of(log: Log, kind: str) -> list[Numbered]:
    """Returns the records of a kind, as far as a log was read, each with the number of its commit.

    Args:
        log: The log.
        kind: One of ``TYPES``.

    Raises:
        StorageError: One is not what it may be.
    """
    return [_checked(log, each) for each in log.records if each[1].get("kind") == kind]


def last_of(log: Log, kind: str, since: int = 0) -> dict[str, Any] | None:
    """Returns the last record of a kind, as far as a log was read; None without one.

    Args:
        log: The log.
        kind: One of ``TYPES``.
        since: Only this commit and later ones count.

    Raises:
        StorageError: It is not what it may be.
    """
    for each in reversed(log.records):
        if each[0] < since:
            break
        if each[1].get("kind") == kind:
            return _checked(log, each)[1]
    return None


def _checked(log: Log, each: Numbered) -> Numbered:
    typed.checked(TYPES[each[1]["kind"]], each[1], f"{log}/{COMMITS}, commit {each[0]}")
    return each
