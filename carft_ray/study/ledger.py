"""The ledger of a study: who read its test sets, when, and what was fixed before. Records of the log, in its order.

Each commit of the log holds the hash of the one before, so none can be edited, removed from the middle or put in
another order (``store.log``). The manifest notes in ``ledger`` how many lines there are, and number and hash of the
commit with the last one, so that a log whose end is gone shows. It is written second: a kill leaves it one line behind,
and the next write mends that. A line that is in the log counts. Every other difference is reported by ``check_ledger``.

What this cannot show: someone who rewrites log and manifest together, or puts both back to an older copy. It keeps
honest people from forgetting a read, and makes hiding one an act of forgery.
"""

import contextlib
import getpass
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from optuna.storages import JournalStorage

from carft_ray import __version__, files
from carft_ray.errors import DataError, HoldOutError, Problem, UsageError
from carft_ray.layout import COMMITS, MANIFEST, TEST_DIR
from carft_ray.recipe import space
from carft_ray.recipe.loading import recipe_hash
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.log import Log
from carft_ray.study import typed
from carft_ray.study.holding import is_study
from carft_ray.study.recipe_identity import read_manifest
from carft_ray.study.records import LEDGER, TEST_SETS, all_of, last_of
from carft_ray.study.rows import all_rows, searched
from carft_ray.study.training import TrialRow

Purpose = Literal["winner fixed", "test", "search went on"]
WINNER_FIXED: Purpose = "winner fixed"
TEST: Purpose = "test"  # winner and baselines
WENT_ON: Purpose = "search went on"
AGAINST = "against"  # in the details of WINNER_FIXED: reads of the studies whose winners are baselines, by their ids
# keys of a record ``TEST_SETS``, also in the details of a read: digests of images, and of images with their classes
DIGESTS, WITH_CLASSES = "digests", "with_classes"


def note_test_sets(log: Log, digests: Callable[..., dict[str, str]]) -> None:
    """Notes once in a study which images its test sets have; nothing if one cannot be read now.

    Args:
        log: By which the study is held.
        digests: ``digests_of_tests`` of its recipe.

    Raises:
        StorageError: It cannot be written.
    """
    if not noted_test_sets(log):
        with contextlib.suppress(DataError):
            if found := digests():
                log.write({"kind": TEST_SETS, DIGESTS: found, WITH_CLASSES: digests(with_classes=True)})


def noted_test_sets(log: Log) -> dict[str, dict[str, str]]:
    """Returns what ``note_test_sets`` has noted, ``digests`` and ``with_classes`` by set; empty if it has not.

    Raises:
        StorageError: carft-ray has not written it.
    """
    noted = last_of(log, TEST_SETS)
    return {} if noted is None else {name: noted.get(name) or {} for name in (DIGESTS, WITH_CLASSES)}


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    Attributes:
        number: Counts from 1.
        time: ISO 8601 with the zone.
        user: Name of the account that ran the command.
        recipe_hash: ``recipe_hash`` of the recipe at that time.
        version: Of carft-ray.
        purpose: What the line is for.
        sets: Sets that it is about.
        details: More, by purpose; JSON.
        reason: What the user gave with ``--again``; empty where none was needed.
    """

    number: int
    time: str
    user: str
    recipe_hash: str
    version: str
    purpose: Purpose
    sets: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def read_ledger(study_dir: Path, log: Log) -> list[Entry]:
    """Returns the lines of the ledger.

    Args:
        study_dir: The study directory.
        log: Its log.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: The study cannot be read.
    """
    if problems := check_ledger(study_dir, log):
        raise HoldOutError(problems)
    return [entry for _, entry in _entries(log)]


def check_ledger(study_dir: Path, log: Log) -> list[Problem]:
    """Returns what is wrong with the ledger: the log is not the one of which the manifest tells.

    Nothing is written. What a kill leaves is no problem. The module says what cannot be found.

    Args:
        study_dir: The study directory.
        log: Its log.

    Raises:
        StorageError: The study cannot be read.
    """
    noted = read_manifest(study_dir).get(LEDGER)
    for _ in range(2):
        entries = _entries(log)
        if noted in (_note(log, entries), _note(log, entries[:-1])):
            return []
        log.follow()  # it may have been written meanwhile
    rule = f"must have the ledger that {MANIFEST} describes, {json.dumps(noted)}"
    step = f"Restore {COMMITS}/ and {MANIFEST} from a copy: it is unknown how often the test sets were read."
    value = json.dumps(_note(log, entries))
    return [Problem(str(study_dir / COMMITS), rule, value, next_step=step)]


def record(
    study_dir: Path,
    log: Log,
    recipe: Recipe,
    purpose: Purpose,
    sets: tuple[str, ...] = (),
    details: dict[str, Any] | None = None,
    reason: str = "",
) -> Entry:
    """Writes a line, and notes it in the manifest.

    Args:
        study_dir: The study directory, absolute.
        log: By which the study is held.
        recipe: The recipe of the study.
        purpose: What the line is for.
        sets: Sets that it is about.
        details: More, as JSON can hold it.
        reason: Why it is done again.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: It cannot be written.
    """
    entry = Entry(
        number=len(read_ledger(study_dir, log)) + 1,
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        user=_user(),
        recipe_hash=recipe_hash(recipe),
        version=__version__,
        purpose=purpose,
        sets=tuple(sets),
        details=details or {},
        reason=reason,
    )
    if _note_last(study_dir, log):  # a kill has left it behind; it must never be two lines behind
        log.store.keep_files()
    log.write({"kind": LEDGER, "line": asdict(entry)})
    _note_last(study_dir, log)
    return entry


def _note_last(study_dir: Path, log: Log) -> bool:
    """Notes the last line in the manifest; returns whether it was not there."""
    manifest, note = read_manifest(study_dir), _note(log, _entries(log))
    if is_behind := manifest.get(LEDGER) != note:
        log.check()
        files.write_json(study_dir / MANIFEST, {**manifest, LEDGER: note})
    return is_behind


def _entries(log: Log) -> list[tuple[int, Entry]]:
    """Returns the lines, each with the number of its commit."""
    found = [(number, record["line"]) for number, record in all_of(log, LEDGER)]
    return [(number, Entry(**{**line, "sets": tuple(line["sets"])})) for number, line in found]


def _note(log: Log, entries: Sequence[tuple[int, Entry]]) -> dict[str, Any] | None:
    """Returns what the manifest says of these lines; None of none."""
    if not entries:
        return None
    number = entries[-1][0]
    return {"count": len(entries), "commit": number, "hash": log.digest_of(number)}


def reads_of(entries: list[Entry]) -> list[Entry]:
    """Returns the lines that are reads of the test sets."""
    return [entry for entry in entries if entry.purpose == TEST]


def read_folder(number: int) -> str:
    """Returns the folder, in a study, of a read of the test sets, from 1."""
    return f"{TEST_DIR}/read-{number}"


def fixed_in(entry: Entry) -> dict[str, Any]:
    """Returns what a read has fixed: ``rows``, ``models``, ... (``typed.Fixed``).

    Raises:
        StorageError: carft-ray has not written it.
    """
    found: dict[str, Any] = typed.checked(typed.Fixed, entry.details, LEDGER)
    return found


def fixed_trials(log: Log) -> set[str]:
    """Returns the names of the trials that were fixed as winners of a confirm, or read on the test sets.

    Raises:
        StorageError: A line is not as carft-ray writes it.
    """
    found = set()
    for _, entry in _entries(log):
        if entry.purpose == WINNER_FIXED:
            found.add(str(entry.details.get("winner")))
        elif entry.purpose == TEST and entry.details.get("rows"):
            read = fixed_in(entry)
            rows = (*read["rows"], *read.get("models", ()))
            found |= {run.rpartition("/")[2] for row in rows for run in row["runs"]}
    return found


def going_on(
    study_dir: Path, log: Log, storage: JournalStorage, recipe: Recipe, reason: str | None
) -> dict[str, Any] | None:
    """Returns the details of a line "search went on", which holds for all searches up to as many trials.

    None if a search needs no such line: its test sets were not read, it has nothing to train, or a line allows it.

    Args:
        study_dir: The folder of the study, absolute, which need not be there yet.
        log: Its log.
        storage: Optuna's, over the log.
        recipe: The recipe of the search.
        reason: What was given with ``--again``.

    Raises:
        HoldOutError: A reason is needed, or the ledger is not as carft-ray has written it.
        StorageError: The study cannot be read.
    """
    entries = read_ledger(study_dir, log) if is_study(study_dir) else []
    if not (reads := reads_of(entries)):
        return None
    by_kind, wanted, given = all_rows(storage), space.num_trials(recipe), recipe.search.baselines
    trials = searched(by_kind["trial"], by_kind["baseline"])
    if not needs_reason(entries, trials, by_kind["baseline"], wanted, given):
        return None
    if reason is None:
        rule = f"its test sets were read: {describe(reads[-1])}; what was seen may influence later trials"
        step = "To continue, add --again REASON; every report will show the reason."
        raise HoldOutError(Problem(str(study_dir), rule, next_step=step))
    return {"trials": wanted, "trials_before": len(trials), "baselines": sorted(given)}


def needs_reason(
    entries: list[Entry],
    trials: Sequence[TrialRow],
    baselines: Sequence[TrialRow],
    wanted: int,
    given: Collection[str],
) -> bool:
    """Tells whether a search would train more than a ledger allows without a reason: its test sets were read.

    Args:
        entries: The ledger.
        trials: Of the study.
        baselines: Of the study.
        wanted: Trials that the study shall have.
        given: Names of the baselines that it shall have. A reason for as many trials and for all new baselines, given
            after the last read, is enough.
    """
    reads, new = reads_of(entries), {*given} - {row.name for row in baselines}
    has_begun = len(trials) >= wanted and not new
    if not reads or (has_begun and all(row.outcome != "running" for row in (*trials, *baselines))):
        return False
    went_on = [entry.details for entry in entries if entry.purpose == WENT_ON and entry.number > reads[-1].number]
    return not any(each.get("trials", 0) >= wanted and new <= {*each.get("baselines", ())} for each in went_on)


def check_reason(reason: str | None) -> None:
    """Raises a ``UsageError`` when a reason is given that says nothing."""
    if reason is not None and not reason.strip():
        raise UsageError(Problem("--again", "needs a reason, which the ledger keeps", repr(reason)))


def describe(entry: Entry) -> str:
    """Returns when and by whom a line was written, for messages."""
    return f"{entry.time} by {entry.user} (line {entry.number} of the ledger)"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an account without a name, as in some containers
        return f"user {os.getuid()}"
