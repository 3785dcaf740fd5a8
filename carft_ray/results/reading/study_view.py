"""A study as commands read it, and the log of one training: nothing is claimed, nothing written, no torch loaded."""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from carft_ray import files
from carft_ray.errors import Problem, StorageError, UsageError, nearest
from carft_ray.layout import COMMITS, LOG, MANIFEST, METRICS, STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import violations
from carft_ray.recipe.space import num_trials
from carft_ray.store.copy import PER_IMAGE, STATE
from carft_ray.store.heartbeat import SILENT_FOR_S
from carft_ray.store.log import log_of
from carft_ray.study.holding import foreign_names, is_study, stopping, unbegun
from carft_ray.study.place import Place, bring, fetched, fetched_with_log, named
from carft_ray.study.recipe_identity import require_format, resume_command
from carft_ray.study.rows import ZERO_SHOT, all_rows, readable
from carft_ray.study.running import at_a_time, running_since
from carft_ray.study.snapshot import Snapshot, snapshot
from carft_ray.study.training import TrialRow, result_of
from carft_ray.untrusted import MOST_TEXT_BYTES
from carft_ray.words import counted

STATES = ("complete", "pruned", "diverged", "error", "running", "stopped", "waiting", "set_aside")
READ_EVERY_S = 0.5


@dataclass(frozen=True)
class Overview(Snapshot):
    """A study at one moment, and who runs on it.

    Attributes:
        holder: Who runs the search, in words; None: no search runs on the study.
        stopping: A stop was asked for and the live search has not ended yet.
        since: When the running attempts of trainings began, in seconds since 1970, by kind and name.
        at_a_time: How many the search runs at a time at this moment, and why not more; None where it does not say.
    """

    holder: str | None = None
    stopping: bool = False
    since: Mapping[tuple[str, str], float] = field(default_factory=dict)
    at_a_time: tuple[int, str] | None = None

    @classmethod
    def from_snapshot(cls, study: Snapshot, **more: Any) -> Self:
        """Returns a study that was read, and who runs on it; without ``more``, nobody."""
        return cls(**{each.name: getattr(study, each.name) for each in fields(Snapshot)}, **more)

    @property
    def held_s(self) -> float | None:
        """For how many seconds its holder has had it, whatever the clocks show; None without one."""
        if self.holder is None:
            return None
        return self.log.lasted(self.log.claimed) + min(max(time.time() - self.log.time, 0.0), SILENT_FOR_S)

    @property
    def what(self) -> str:
        """What runs on it, in a word."""
        return "search" if self.recipe.search.space else "training"

    def state(self, row: TrialRow) -> str:
        """Returns a row's outcome; of one that has none yet, whether it runs, was stopped, waits or is set aside."""
        if row.outcome != "running":
            return row.outcome
        if row.set_aside:
            return "set_aside"
        if self.holder is None:
            return "stopped" if row.attempt else "waiting"
        return "running" if (row.kind, row.name) in self.since else "waiting"

    def counts(self) -> dict[str, int]:
        """Returns how many trials are in each state."""
        found = [self.state(row) for row in self.searched]
        return {state: found.count(state) for state in STATES}

    def data(self, row: TrialRow) -> dict[str, Any]:
        """Returns a training as JSON."""
        best = self.best
        return {
            "number": row.number,
            "kind": row.kind,
            "name": row.name,
            "values": row.values if row.name == ZERO_SHOT or row.soup else {**self._own_values, **row.values},
            "members": self._members(row),
            "outcome": self.state(row),
            "epoch": last_epoch(self.study_dir, row) if row.outcome == "running" else None,
            "reason": row.reason,
            "alpha": row.alpha,
            "objective": row.objective,
            "at_chance": row.at_chance,
            "metrics": row.metrics,
            "violations": violations(row.metrics),
            "on_front": row.standing > 0,
            "expected": row.expected,
            "repeat_of": row.repeat_of,
            "elapsed_s": row.elapsed_s,
            "outside": row.outside,
            "best": best is not None and row.kind == best.kind and row.name == best.name,
            "attempt": row.attempt,
            "started": None if row.started is None else row.started.isoformat(timespec="seconds"),
        }

    def result(self, row: TrialRow) -> dict[str, Any]:
        """Returns the content of a row's ``result.json``; empty without one."""
        return result_of(self.study_dir, row)

    def _members(self, row: TrialRow) -> list[str]:
        """Returns the trainings that are in a soup, or are to be; none of a training."""
        asked = [each["name"] for each in (row.soup or {}).get("members", ())]
        used = self.result(row).get("soup", {}).get("members") if asked else None
        return [name.rpartition("/")[0] for name in used or asked]

    @functools.cached_property
    def _own_values(self) -> dict[str, Any]:
        """The values of ``train`` that trainings have where they were given no other.

        Those that a training or the search space names, but for what is drawn on a condition.
        """
        own, space = self.recipe.train.model_dump(mode="json"), self.recipe.search.space
        names = dict.fromkeys([*space, *(name for row in self.rows for name in row.values)])
        left_out = {"alpha", "seed", *(name for name, parameter in space.items() if parameter.when)}
        return {name: own[name] for name in names if name in own and name not in left_out}


def read_study(place: Place, need: int = PER_IMAGE) -> Overview:
    """Reads a study.

    Args:
        place: Its folder, or its address.
        need: As of ``study.place.fetched``.

    Raises:
        UsageError: There is none.
        RecipeError, StorageError: Its resolved recipe or its log is damaged, or its bucket cannot be read.
    """
    folder, log = fetched_with_log(place, need)
    study_dir = require_study(folder)
    found = snapshot(study_dir, log)
    holder, log = found.log.holder(), found.log
    since = running_since(log, found.rows) if holder else {}
    asked = holder is not None and bool(stopping(log, log.claimed) or (study_dir / STOP).exists())
    running = (row for row in found.rows if row.outcome == "running")
    bring(study_dir, [f"{row.training}/{METRICS}" for row in running])  # by which the epoch is shown
    number = at_a_time(log) if holder else None
    return Overview.from_snapshot(found, holder=holder, stopping=asked, since=since, at_a_time=number)


def studies_in(folder: Path) -> list[Path]:
    """Returns the studies directly in a folder, by name."""
    found = []
    with contextlib.suppress(PermissionError):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            with contextlib.suppress(PermissionError):  # a folder of another user
                if is_study(path):
                    found.append(path)
    return found


def require_study(place: Place, rule: str = "must be a study", need: int = PER_IMAGE) -> Path:
    """Returns a study's folder as an absolute path; of one in a bucket that of its copy, brought up to date.

    Raises:
        UsageError: It is no study; names the nearest one next to it, or those inside it.
        StorageError: The bucket cannot be read, or another release has written the study.
    """
    folder = fetched(place, need)
    if is_study(folder):
        return folder.resolve()
    if files.exists(folder / MANIFEST):
        require_format(files.read_object(folder, MANIFEST), str(folder / MANIFEST))
    name, inside = named(folder), tuple(str(path) for path in studies_in(folder))
    near = nearest(str(folder), [str(path) for path in studies_in(folder.parent)])
    step = f"Begin one: carft-ray search RECIPE --study {name}"
    if not folder.exists():
        value = "no such folder"
    elif not folder.is_dir():
        value, step = "a file", "Give the folder that `search --study` was given."
    else:
        missing = MANIFEST if files.exists(folder / COMMITS) else f"{COMMITS}/"
        value, step = f"one without {missing}", "Give the folder that `search --study` was given."
        if missing == MANIFEST and not foreign_names(folder) and (log := log_of(folder)).number:
            value, step = unbegun(log, name) if log.holds_only_claims else (value, step)
    raise UsageError(Problem(name, rule, value, inside, near, step))


def require_search(folder: Path, recipe: Recipe) -> None:
    """Raises a ``UsageError`` for the recipe of a `train` whose training a folder holds: there is nothing to search."""
    if not recipe.search.space:
        step = f"Continue it: {resume_command(folder)}\n    To search, give another folder with --study."
        raise UsageError(Problem(str(folder), "must be the study of a search", "one training", next_step=step))


def total_trials(written: str, overview: Overview) -> int:
    """Returns the number of trials that a study shall have.

    Args:
        written: A total (``20``), or how many more (``+4``). A study whose trials have not all ended gets no more by
            ``+4``: it is the command of before once more, after a stop or a crash.
        overview: The study.

    Raises:
        UsageError: It is no number, or less than the trials that have begun.
    """
    digits = written.strip().removeprefix("+")
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        rule = "must be a whole number of trials from 1, or +N for N more"
        raise UsageError(Problem("--trials", rule, repr(written)))
    begun, total = len(overview.searched), overview.recipe.search.trials
    if written.strip().startswith("+"):
        is_done = overview.num_finished >= num_trials(overview.recipe)
        return max(total, begun) + int(digits) if is_done else total
    if int(digits) < begun:
        waiting = begun - overview.num_finished
        have = counted(overview.num_finished, "finished trial") + (f" and {waiting} begun" if waiting else "")
        rule = f"must be at least {begun}: the study has {have}"
        raise UsageError(Problem("--trials", rule, digits, next_step="For more trials: --trials +N."))
    return int(digits)


def last_epoch(study_dir: Path, row: TrialRow) -> int | None:
    """Returns the number of the last epoch that a training has finished, or None."""
    rows = files.read_json_lines(study_dir, f"{row.training}/{METRICS}")
    return int(rows[-1].get("epoch", 0)) or None if rows else None


def find_row(rows: Sequence[TrialRow], written: str, place: str = "TRIAL") -> TrialRow:
    """Returns the trial or baseline that a user means: ``7``, ``t7``, ``t0007``, or the full name.

    Args:
        rows: Of the study.
        written: What the user wrote.
        place: Where, for the message.

    Raises:
        UsageError: There is none, or several.
    """
    by_name = {row.name: row for row in rows}
    if written in by_name:
        return by_name[written]
    digits = written.removeprefix("t")
    if digits.isascii() and digits.isdigit():
        for row in rows:
            if row.kind == "trial" and row.number == int(digits):
                return row
    begun = [row for row in rows if written and row.name.startswith(written)]
    if len(begun) == 1:
        return begun[0]
    names = tuple(by_name)
    near = nearest(written, names) or nearest(written, [f"t{row.number:04d}" for row in rows if row.kind == "trial"])
    raise UsageError(Problem(place, "must be the number or name of a trial or baseline", repr(written), names, near))


def read_log(study_dir: Path, training: str) -> list[str] | None:
    """Returns the lines of a log, or None when there is none yet.

    Args:
        study_dir: The study directory.
        training: Folder of the training within the study (``TrialSpec.training``).

    Raises:
        StorageError: It cannot be read, or is larger than ``untrusted.MOST_TEXT_BYTES``.
    """
    content = _content(study_dir, training)
    if content is not None and len(content) > MOST_TEXT_BYTES:
        rule = f"must have at most {MOST_TEXT_BYTES:,} bytes, since it is read whole"
        raise StorageError(Problem(str(study_dir / training / LOG), rule))
    return None if content is None else content.decode(errors="replace").splitlines()


def follow_log(place: Place, training: str) -> Iterator[str]:
    """Yields the whole lines of a log, old ones and new ones, until its training has ended or no search is left.

    Raises:
        StorageError: It cannot be read.
    """
    study_dir = fetched(place, STATE).resolve()
    position, log = 0, log_of(study_dir)
    with readable(log) as storage:
        over = False
        while not over:
            fetched(place, STATE)
            bring(study_dir, [f"{training}/{LOG}"])
            if log.follow() or not position:  # before the last reading
                rows = [row for group in all_rows(storage).values() for row in group]
                over = any(row.training == training and row.outcome != "running" for row in rows)
            over = over or log.holder() is None
            content = _content(study_dir, training, position) or b""
            whole = content if over else content[: content.rfind(b"\n") + 1]
            position += len(whole)
            yield from whole.decode(errors="replace").splitlines()
            if not over:
                time.sleep(READ_EVERY_S)


def _content(study_dir: Path, training: str, position: int = 0) -> bytes | None:
    name = f"{training}/{LOG}"
    try:
        with files.open_inside(study_dir, name) as file:
            file.seek(position)
            return file.read(MOST_TEXT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.storage_error(study_dir / name, error, "must be readable") from error
