"""The ledger of a study: who read its test sets, when, and what was fixed before. A line each, chained by hashes.

``ledger.jsonl`` holds one JSON object per line; ``previous`` is the SHA-256 of the line before. Two more places know
of it, so that lines which are gone show:

    study.journal   attribute ``ledger`` of the Optuna study ``search``: the text of every line
    manifest.json   ``ledger``: the number of lines, and the hash of the last one

A line is written to the journal, then to the file, then to the manifest. So a kill leaves one of two states, and the
next write mends both: the journal is one line ahead of the two others, or the manifest one line behind. A line that is
in the journal counts. Every other difference is reported by ``check_ledger``.

What this cannot show: someone who rewrites journal, file and manifest together, or puts all three back to an older
copy. It keeps honest people from forgetting a read, and makes hiding one an act of forgery.
"""

import getpass
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import optuna

from carft_ray import __version__, files
from carft_ray.errors import HoldOutError, Problem, StorageError, UsageError
from carft_ray.layout import JOURNAL, LEDGER, MANIFEST
from carft_ray.recipe.loading import recipe_hash
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space import grid
from carft_ray.study.identity import claim
from carft_ray.study.lock import repair_journal, study_lock
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import STUDY_NAMES, readable, rows_by_kind, storage_of, stored
from carft_ray.words import counted

ATTRIBUTE = "ledger"  # of the journal, and key of the manifest

Purpose = Literal["winner fixed", "test", "search went on"]
WINNER_FIXED: Purpose = "winner fixed"
TEST: Purpose = "test"  # winner and baselines
WENT_ON: Purpose = "search went on"
AGAINST = "against"  # in the details of WINNER_FIXED: reads of the studies whose winners are baselines, by their ids


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
        previous: SHA-256 of the line before; empty in the first.
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
    previous: str = ""


@dataclass(frozen=True)
class _Copies:
    """The three places as they are.

    Attributes:
        lines: Whole lines of the file.
        rest: Bytes after the last whole line.
        journal: Lines that the journal knows.
        noted: Number of lines and last hash in the manifest.
    """

    lines: list[str]
    rest: bytes
    journal: list[str]
    noted: tuple[int, str]

    @property
    def is_ahead(self) -> bool:
        """Whether a kill struck after the journal and before the file."""
        return len(self.journal) == self.noted[0] + 1 and self.lines == self.journal[:-1]


def read_ledger(study_dir: Path) -> list[Entry]:
    """Returns the lines of the ledger, one that a kill has left only in the journal included.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: The study cannot be read.
    """
    copies = _read(study_dir)
    _require_whole(study_dir, copies)
    return [_entry(line) for line in copies.journal]


def check_ledger(study_dir: Path) -> list[Problem]:
    """Returns what is wrong with the ledger: lines edited, removed, put in another order, or not written by carft-ray.

    Nothing is written. What a kill leaves is no problem. The module says what cannot be found.

    Raises:
        StorageError: The study cannot be read.
    """
    return _problems(study_dir, _read(study_dir))


def _problems(study_dir: Path, copies: _Copies) -> list[Problem]:
    place = str(study_dir / LEDGER)
    known, (count, head) = copies.journal, copies.noted
    problems = []
    if count not in (len(known), len(known) - 1) or head != _head(known[:count]):
        rule = f"must say of {LEDGER} what {JOURNAL} says: {counted(len(known), 'line')}, or one less after a kill"
        problems.append(Problem(str(study_dir / MANIFEST), rule, f"{counted(count, 'line')} or another hash"))
    if copies.is_ahead:
        return problems
    if copies.rest:
        rest = f"{counted(len(copies.rest), 'byte')} without an end"
        problems.append(Problem(place, "its last line must be whole", rest))
    if copies.lines != known:
        pairs = zip_longest(copies.lines, known)
        first = next(number for number, (line, written) in enumerate(pairs, start=1) if line != written)
        rule = f"must have the {counted(len(known), 'line')} that {JOURNAL} has; it differs from line {first} on"
        problems.append(Problem(place, rule, counted(len(copies.lines), "line")))
    elif any(_entry(line).previous != _head(known[:index]) for index, line in enumerate(known)):
        problems.append(Problem(place, "each line must hold the hash of the one before", "a broken chain"))
    if problems:
        step = f"Restore {LEDGER}, {JOURNAL} and {MANIFEST} from a copy"
        problems[-1] = replace(problems[-1], next_step=f"{step}: how often the test sets were read is not known.")
    return problems


def _require_whole(study_dir: Path, copies: _Copies) -> None:
    if problems := _problems(study_dir, copies):
        raise HoldOutError(problems)


def record(
    study_dir: Path,
    recipe: Recipe,
    purpose: Purpose,
    sets: tuple[str, ...] = (),
    details: dict[str, Any] | None = None,
    reason: str = "",
) -> Entry:
    """Writes a line: to the journal, the file, the manifest. Mends what a kill has left first.

    The lock must be held, and ``repair_journal`` done.

    Args:
        study_dir: The study directory, absolute.
        recipe: The recipe of the study.
        purpose: What the line is for.
        sets: Sets that it is about.
        details: More, as JSON can hold it.
        reason: Why it is done again.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: It cannot be written.
    """
    _require_whole(study_dir, _read(study_dir))
    mend(study_dir)
    lines = _read(study_dir).journal
    entry = Entry(
        number=len(lines) + 1,
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        user=_user(),
        recipe_hash=recipe_hash(recipe),
        version=__version__,
        purpose=purpose,
        sets=tuple(sets),
        details=details or {},
        reason=reason,
        previous=_head(lines),
    )
    lines.append(json.dumps(asdict(entry), allow_nan=False))
    with readable(study_dir), files.writing(study_dir / JOURNAL):
        search = optuna.load_study(study_name=STUDY_NAMES["trial"], storage=storage_of(study_dir))
        search.set_user_attr(ATTRIBUTE, lines)
    mend(study_dir)
    return _entry(lines[-1])


def mend(study_dir: Path) -> None:
    """Brings file and manifest to what the journal knows. The lock must be held, and the ledger be without problems."""
    copies = _read(study_dir)
    if copies.is_ahead:
        files.append_line(study_dir / LEDGER, copies.journal[-1])
    if len(copies.journal) != copies.noted[0]:
        manifest = files.read_json(study_dir / MANIFEST)
        manifest[ATTRIBUTE] = {"count": len(copies.journal), "head": _head(copies.journal)}
        files.write_json(study_dir / MANIFEST, manifest)


def reads_of(entries: list[Entry]) -> list[Entry]:
    """Returns the lines that are reads of the test sets."""
    return [entry for entry in entries if entry.purpose == TEST]


def require_unread(study_dir: Path, recipe: Recipe, reason: str | None, change_space: bool = False) -> bool:
    """Refuses a search that would train more on a study whose test sets were read, unless a reason is given.

    With one, the ledger gets a line "search went on", which holds for all searches up to as many trials. A search that
    has nothing to train needs no reason. Takes and leaves the lock.

    Args:
        study_dir: The folder of the study, which need not be there yet.
        recipe: The recipe of the search.
        reason: What was given with ``--again``.
        change_space: The search space may change.

    Returns:
        Whether the reason was written down.

    Raises:
        HoldOutError: A reason is needed, or the ledger is not as carft-ray has written it.
        UsageError: The reason is empty.
        RecipeError: It is the study of another recipe.
        StorageError: The study is in use or cannot be read.
    """
    check_reason(reason)
    study_dir = study_dir.resolve()
    if not (study_dir / JOURNAL).is_file():
        return False
    entries, by_kind, wanted = read_ledger(study_dir), rows_by_kind(study_dir), grid.num_trials(recipe)
    if not needs_reason(entries, by_kind["trial"], by_kind["baseline"], wanted):
        return False
    if reason is None:
        rule = f"its test sets were read: {describe(reads_of(entries)[-1])}"
        rule += "; trials that follow may be chosen by what was seen"
        step = "To continue, and have every report say so, add --again REASON."
        raise HoldOutError(Problem(str(study_dir), rule, next_step=step))
    with study_lock(study_dir):
        claim(study_dir, recipe, change_space)
        repair_journal(study_dir)
        details = {"trials": wanted, "trials_before": len(by_kind["trial"])}
        record(study_dir, recipe, WENT_ON, details=details, reason=reason)
    return True


def needs_reason(entries: list[Entry], trials: Sequence[TrialRow], baselines: Sequence[TrialRow], wanted: int) -> bool:
    """Tells whether a search would train more than a ledger allows without a reason: its test sets were read.

    Args:
        entries: The ledger.
        trials: Of the study.
        baselines: Of the study.
        wanted: Trials that the study shall have; a reason for as many, given after the last read, is enough.
    """
    reads = reads_of(entries)
    if not reads or (len(trials) >= wanted and all(row.outcome != "running" for row in (*trials, *baselines))):
        return False
    went_on = [entry for entry in entries if entry.purpose == WENT_ON and entry.number > reads[-1].number]
    return all(entry.details.get("trials", 0) < wanted for entry in went_on)


def check_reason(reason: str | None) -> None:
    """Raises a ``UsageError`` when a reason is given that says nothing."""
    if reason is not None and not reason.strip():
        raise UsageError(Problem("--again", "must give a reason, which the ledger keeps", repr(reason)))


def describe(entry: Entry) -> str:
    """Returns when and by whom a line was written, for messages."""
    return f"{entry.time} by {entry.user} (line {entry.number} of {LEDGER})"


def _read(study_dir: Path) -> _Copies:
    path = study_dir / LEDGER
    with files.writing(path):
        content = path.read_bytes() if files.exists(path) else b""
    *whole, rest = content.split(b"\n")
    with readable(study_dir):
        search = stored(storage_of(study_dir), STUDY_NAMES["trial"])
        journal = list(search.user_attrs.get(ATTRIBUTE, [])) if search else []
        for line in journal:
            _entry(line)
    manifest = files.read_json(study_dir / MANIFEST) if files.exists(study_dir / MANIFEST) else {}
    if not isinstance(manifest, dict):
        value = f"a {type(manifest).__name__}"
        raise StorageError(Problem(str(study_dir / MANIFEST), "must be the manifest of a study", value))
    noted = manifest.get(ATTRIBUTE, {})
    try:
        count, head = int(noted.get("count", 0)), str(noted.get("head", ""))
    except (AttributeError, TypeError, ValueError) as error:
        place = f"{study_dir / MANIFEST}: {ATTRIBUTE}"
        raise StorageError(Problem(place, "must have count and head", str(noted))) from error
    return _Copies([line.decode(errors="replace") for line in whole], rest, journal, (count, head))


def _entry(line: str) -> Entry:
    content = json.loads(line)
    return Entry(**{**content, "sets": tuple(content["sets"])})


def _head(lines: list[str]) -> str:
    return hashlib.sha256(lines[-1].encode()).hexdigest() if lines else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an account without a name, as in some containers
        return f"user {os.getuid()}"
