"""The study: an Optuna journal in a log that is the only state of a search. Nothing here knows Ray.

| what happened to a training | outcome | Optuna sees |
|---|---|---|
| valid ``result.json`` | complete | COMPLETE, constraint ``trained`` = -1, those of the recipe as measured |
| cut by the pruner | pruned | PRUNED with its intermediate values, constraint ``trained`` = -1 |
| not finite; at most chance; an exception that came back | diverged / error | PRUNED, constraint ``trained`` = 1 |
| stopped; driver killed | running | nothing: RUNNING until it is recovered |
| worker, node, connection, device or disk lost | running | nothing: another attempt from the newest checkpoint |
| lost again and again without advancing | running, set aside | nothing: the next search tries it again |

``retries`` decides when an exception has come back, and when a training is set aside.
"""

import contextlib
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from optuna.storages import JournalStorage
from optuna.trial import TrialState

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.layout import COMMITS, LOG, METRICS, RESULT
from carft_ray.recipe.rules import startup_trials
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store import attempt_files
from carft_ray.store.attempt_files import append_log, progress_of, read_result, reported_rows
from carft_ray.store.log import Log
from carft_ray.study import attributes as attr
from carft_ray.study import retries, rows, training, typed
from carft_ray.study.best import Retention
from carft_ray.study.holding import Stop
from carft_ray.study.journal import Journal
from carft_ray.study.ledger import fixed_trials
from carft_ray.study.proposals import optuna_samplers, pruning
from carft_ray.study.proposals.repeats import Repeat, next_repeat
from carft_ray.study.rows import ZERO_SHOT, rows_of, trainings
from carft_ray.study.snapshot import Snapshot, standing
from carft_ray.study.training import Cut, Failure, Kind, TrialRow, TrialSpec

CODE = ("function", "function_dir")  # keys of ``train`` that name code


class Study:
    """An open study, held by its log. Use ``open_study``.

    Attributes:
        log: By which it is held.
        stop: Whether the command that holds it is to stop.
        recipe: Of the search, with absolute paths.
        notes: What was repaired, found or taken in, one sentence each.
        sources: Studies of ``search.warm_start`` whose trials it has not taken in.
    """

    def __init__(
        self,
        study_dir: Path,
        recipe: Recipe,
        log: Log,
        notes: list[str],
        storage: JournalStorage,
        sources: Sequence[Path] = (),
    ) -> None:
        self.study_dir = study_dir
        self.recipe = recipe
        self.notes, self.sources = notes, sources
        self.log, self._storage = log, storage
        self.stop = Stop(study_dir, log)
        self.journal = Journal(study_dir, recipe, log, storage)
        self.retention = Retention(study_dir, recipe, log.store, fixed_trials(log))
        self._references: dict[str, float] = {}  # ID accuracies of the baselines that constraints name, once known
        self.asks = True  # whether the sampler proposes new trials
        self.end: int | None = None  # at how many trials the budget is expected to end the search
        self.waiting: deque[TrialSpec] = deque()
        self._last_steps: dict[str, float] = {}  # of the rows of trainings, by folder
        self.knows_all = False  # whether all trials were retained or not, as they are once the study is recovered

    def next(self) -> TrialSpec | None:
        """Returns the next attempt to start, or None when nothing is left but what runs already.

        Baselines come first, then recovered trials, then new ones and repeats until the recipe's number is reached. No
        trial starts before the baselines that a constraint names have finished.

        Raises:
            NoSuccessfulTrialError: A baseline that a constraint names has ended without a result.
            StorageError: The log names code for a training that the recipe does not name.
        """
        waiting = next((spec for spec in self.waiting if self._may_start(spec)), None)
        if waiting is not None:
            self._require_named(waiting)
            self.waiting.remove(waiting)
        elif self.waiting or not (self._wants_more() and self._may_try()):
            return None
        repeat = None if waiting else self._repeat()
        with self.log.commit():
            begun = waiting or (self.journal.repeat(repeat.first, repeat.seed) if repeat else self.journal.ask())
            spec = replace(begun, attempt=begun.attempt + 1, references=self._references)
            self.journal.note(spec, {attr.ATTEMPT: spec.attempt})
        return spec

    def _require_named(self, spec: TrialSpec) -> None:
        """Refuses code that only the log names: whoever decides on ``--trust`` has seen only the recipe's."""
        named = (self.recipe.train.model_dump(include={*CODE}), *self.recipe.search.baselines.values())
        for key in CODE:
            if (value := spec.values.get(key)) is not None and all(one.get(key) != value for one in named):
                raise typed.wrong(
                    f"{self.log}/{COMMITS}: {spec.kind} {spec.name}", f"{key} must be the recipe's", value
                )

    def add_row(self, spec: TrialSpec, row: Mapping[str, Any]) -> bool:
        """Adds an epoch to ``metrics.jsonl``; what an earlier attempt has reported from its step on is void.

        ``settle`` flushes the file: until then the attempt has its rows in a file of its own.

        Args:
            spec: The attempt.
            row: What it has reported.

        Returns:
            Whether the file had it not: an attempt that continues says again what was reported before.

        Raises:
            StorageError: The file cannot be written.
        """
        name = f"{spec.training}/{METRICS}"
        path = self.study_dir / name
        is_new = row["step"] > self._last_steps.get(spec.training, math.inf)
        known = [] if is_new else files.read_json_lines(self.study_dir, name)
        if row in known:
            return False
        kept = [each for each in known if each.get("step", 0) < row["step"]]
        if len(kept) < len(known):
            files.write_text(path, "".join(json.dumps(each) + "\n" for each in (*kept, row)))
        else:
            with files.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            files.append_line(path, json.dumps(row), is_flushed=False)
        self._last_steps[spec.training] = row["step"]
        return True

    def report(self, spec: TrialSpec, line: Mapping[str, Any]) -> str | None:
        """Notes an intermediate value of a running trial, and decides whether its training is cut there.

        Value and decision are one commit. A value that is noted already (an attempt repeats an epoch) is passed over,
        as is what comes after a cut.

        Args:
            spec: The attempt; only trials are ever cut, and no repeats.
            line: A line of its ``metrics.jsonl``.

        Returns:
            Why the training is cut: it must be told to end. None: it continues.
        """
        pruner = self.recipe.search.pruner
        if spec.kind != "trial" or pruner.name == "none" or self.journal.attribute(spec, attr.REPEAT_OF):
            return None  # a repeat that ended early would hide that its values are worse
        found, known = pruning.intermediate_value(self.recipe, spec.values, line), self.journal.pruner_trials()
        before = known[spec.number].intermediate_values if spec.number in known else {}
        if found is None or found[0] in before:
            return None
        percent, value = found
        cut, reason = self._cut(spec), None
        if cut is not None and percent > cut.percent:
            return None
        if cut is None and not files.exists(spec.place(self.study_dir) / RESULT):  # else it would come too late
            others = [trial for number, trial in known.items() if number != spec.number]
            reason = pruning.cut_reason(pruner, {**before, percent: value}, others)
        with self.log.commit():
            self.journal.report(spec, percent, value)
            if reason is not None:
                self.journal.note(spec, {attr.CUT: asdict(Cut(spec.attempt, percent, reason))})
        return reason

    def _cut(self, spec: TrialSpec) -> Cut | None:
        found = self.journal.attribute(spec, attr.CUT)
        return found and Cut(**found)

    def settle(
        self, spec: TrialSpec, failure: Failure | None = None, spent: Mapping[str, Any] | None = None
    ) -> TrialRow | None:
        """Records how an attempt ended, by what lies in its folder. A result wins over a cut, and a cut over a failure.

        Args:
            spec: The attempt.
            failure: How it failed, where it says so.
            spent: As ``spent`` returns it; in the same commit as a verdict. None: it is noted already.

        Returns:
            The row; None when there is no verdict, or the same training gets another attempt.

        Raises:
            CarftError: The training found a fault that is not in its values; it stays RUNNING.
        """
        folder = spec.folder(self.study_dir)
        found = read_result(spec.place(self.study_dir))
        if failure is not None and failure.outcome != "lost":  # which is logged with its cause
            training.log_failure(folder, failure)
        reported, known = reported_rows(folder), files.read_json_lines(folder, METRICS)
        for row in reported if any(row not in known for row in reported) else ():  # some may not have come
            self.add_row(spec, row)
        with files.writing(folder / METRICS), contextlib.suppress(FileNotFoundError):
            files.fsync_file(folder / METRICS)
        if self.recipe.search.pruner.name != "none":
            for line in files.read_json_lines(folder, METRICS):  # the last lines may be new; the others cost nothing
                self.report(spec, line)
        cut, more = self._cut(spec), spent or {}
        if found is not None:
            result, more = found[0], {attr.DIGEST: found[1], **more}
            return self._ended(self.journal.complete(spec, result, more, self.retention.foresee))
        if cut is not None:
            append_log(folder, f"attempt {cut.attempt}: {cut.reason}")
            return self._pruned(spec, "pruned", cut.reason, more)
        if failure is not None and self._is_verdict(spec, folder, failure):
            return self._pruned(spec, failure.outcome, failure.reason, more)
        self.journal.note(spec, more)
        if failure is not None and failure.outcome == "fatal":
            raise training.failure_error(failure, f"{spec.kind} {spec.name}", folder)
        if failure is not None and failure.outcome in ("memory", "error"):  # of ``memory`` the micro-batch is at fault
            self.repeat(spec)
        return None

    def _is_verdict(self, spec: TrialSpec, folder: Path, failure: Failure) -> bool:
        if failure.outcome == "error":
            return retries.is_verdict(self._count(spec, folder, is_error=True))
        return failure.outcome == "diverged"

    def _count(self, spec: TrialSpec, folder: Path, is_error: bool = False) -> dict[str, Any]:
        return retries.count(self.journal, spec, progress_of(folder, self.log.store.known(spec.training)), is_error)

    def _pruned(self, spec: TrialSpec, verdict: str, reason: str, more: Mapping[str, Any]) -> TrialRow:
        attributes = {attr.OUTCOME: verdict, attr.REASON: reason, **more}
        return self._ended(self.journal.tell(spec, TrialState.PRUNED, attributes))

    def _ended(self, row: TrialRow) -> TrialRow:
        self.retention.ended(row)
        if row.kind in ("trial", "baseline") and self.knows_all:
            self.retention.keep_best()
        return row

    def fail(self, spec: TrialSpec, reason: str) -> TrialRow:
        """Records that a training can never run."""
        return self._pruned(spec, "error", reason, {})

    def lost(self, spec: TrialSpec, reason: str, details: str = "") -> Literal["advanced", "repeated", "set aside"]:
        """Notes that a machine failed under an attempt: another attempt follows, or the training is set aside.

        Args:
            spec: The attempt, which ``settle`` found without a verdict.
            reason: The first cause, one line.
            details: What followed from it, for the log.

        Returns:
            Whether the attempt advanced and is repeated, did not advance and is repeated, or is the last for now.
        """
        folder = spec.folder(self.study_dir)
        attempt_files.log_lost(folder, spec.attempt, reason, details)
        found = self._count(spec, folder)
        if not retries.is_last(found):
            self.repeat(spec)
            return "advanced" if retries.has_advanced(found) else "repeated"
        why = f"{found['number']} attempts in a row made no progress; the last: {reason}"
        self.journal.note(spec, {attr.SET_ASIDE: why})
        return "set aside"

    def stopped(self, spec: TrialSpec) -> None:
        """Writes to the log of a training why it was stopped, and from where the next search resumes it."""
        folder = spec.folder(self.study_dir)
        self.log.check()
        where = f"resume continues from {attempt_files.progress_words(folder, self.log.store.known(spec.training))}"
        append_log(folder, f"attempt {spec.attempt}: stopped: {self.stop.reason}; {where}")

    def repeat(self, spec: TrialSpec) -> None:
        """Gives the training of an attempt another one, and does not count this one as failed."""
        self.waiting.append(spec)

    def spent(self, spec: TrialSpec, seconds: float, gpus: float) -> dict[str, Any]:
        """Returns the attribute of a training that notes what an attempt took, for ``settle``.

        Args:
            spec: The attempt.
            seconds: From its start to its end.
            gpus: GPUs that its workers held together.
        """
        before = self.journal.attribute(spec, attr.SPENT) or {}
        return {attr.SPENT: {**before, str(spec.attempt): [round(seconds, 3), gpus]}}

    def gpu_seconds(self) -> float:
        """Returns GPUs x seconds of all attempts of the study."""
        return sum(row.gpu_s for found in rows.all_rows(self._storage).values() for row in found)

    def add_zero_shot(self, metrics: dict[str, Any]) -> TrialRow | None:
        """Records the zero-shot model as a baseline, once.

        Args:
            metrics: What ``prepare`` returned; needs a finite ``objective``.

        Returns:
            Its row, or None when it is there already.
        """
        if ZERO_SHOT in self.journal.numbers("baseline"):
            return None
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        attributes = {attr.OUTCOME: "complete", attr.ALPHA: 0.0, attr.MEASURED: numbers, attr.ATTEMPT: 1}
        attributes[attr.AT_CHANCE] = bool(metrics.get("at_chance", False))
        with self.log.commit():
            spec = self.journal.add("baseline", ZERO_SHOT, {"alpha": 0.0})
            row = self.journal.tell(spec, TrialState.COMPLETE, attributes, numbers["objective"])
        return self._ended(row)

    def rows(self, kind: Kind = "trial") -> list[TrialRow]:
        """Returns all trials (or baselines, or trainings of the confirm) in the order of their numbers."""
        return rows_of(kind, self.journal.studies[kind])

    def snapshot(self) -> Snapshot:
        """Returns the study as it is now."""
        return standing(self.study_dir, self.log, self.recipe, rows.all_rows(self._storage))

    def searched(self) -> list[TrialRow]:
        """Returns the trainings that count as trials of the search (``rows.searched``)."""
        return rows.searched(self.rows(), self.rows("baseline"))

    def num_begun(self) -> int:
        """Returns how many trainings that count as trials have begun."""
        repeats = (attr.REPEAT_OF in trial.user_attrs for trial in trainings(self.journal.studies["baseline"]))
        return len(trainings(self.journal.studies["trial"])) + sum(repeats)

    def done(self) -> bool:
        """Tells whether nothing is left to start."""
        return not self.waiting and not self._wants_more()

    def _may_start(self, spec: TrialSpec) -> bool:
        if spec.kind == "soup":
            return self._may_try()  # its points are compared with the baselines, too
        return spec.kind != "trial" or not self.asks or self._may_try()  # of given values all is known already

    def _may_try(self) -> bool:
        """Tells whether the baselines that constraints name have finished; keeps their ID accuracies for the trials.

        Raises:
            NoSuccessfulTrialError: One of them never will.
        """
        if self._references.keys() >= self.recipe.search.constraints.id_drop.keys():
            return True
        baselines = {row.name: row for row in self.rows("baseline")}
        named = {name: baselines.get(name) for name in self.recipe.search.constraints.id_drop}
        begun = {name for name, row in named.items() if row is not None and row.outcome == "running"}
        known = {name for name, row in named.items() if row is not None and "id_accuracy" in row.metrics}
        if without := [name for name in named if name not in begun | known]:
            raise NoSuccessfulTrialError([_without_reference(self.study_dir, each, named[each]) for each in without])
        if begun:
            return False
        self._references = {name: row.metrics["id_accuracy"] for name, row in named.items() if row is not None}
        return True

    def _wants_more(self) -> bool:
        study, begun = self.journal.studies["trial"], self.num_begun()
        more = self.asks and begun < self.recipe.search.trials and not self._is_worth_less(begun)
        return more and (not optuna_samplers.used_up(study, self.recipe) or self._repeat() is not None)

    def _is_worth_less(self, begun: int) -> bool:
        """Tells whether ``search.stop_gain`` ends the search; not before the sampler has begun."""
        limit = self.recipe.search.stop_gain
        if limit is None or begun < startup_trials(self.recipe):
            return False
        expected = self.retention.expected()
        return expected is not None and expected.is_worth_less(limit)

    def _repeat(self) -> Repeat | None:
        """Returns which training is repeated next; None if new values are next."""
        study = self.journal.studies["trial"]
        if not self.recipe.search.repeats or optuna_samplers.points_left(study, self.recipe):
            return None
        ended = optuna_samplers.used_up(study, self.recipe)
        if self.recipe.search.sampler.name == "grid" and not ended:
            return None
        expected = self.retention.expected()
        return next_repeat(self.recipe, self.rows(), self.rows("baseline"), expected, 0 if ended else self.end)

    def enter(self, kind: Kind, trainings: Mapping[str, dict[str, Any]]) -> None:
        """Enters trainings with given values that are not in the study yet, and queues them."""
        known = self.journal.numbers(kind)
        with self.log.commit():
            self.waiting += [self.journal.add(kind, name, trainings[name]) for name in trainings if name not in known]

    def began(self) -> bool:
        """Tells whether a training was ever started."""
        return any(row.attempt and row.name != ZERO_SHOT for row in self.rows() + self.rows("baseline"))


def _without_reference(study_dir: Path, name: str, row: TrialRow | None) -> Problem:
    """Returns the message for a baseline under which no constraint can hold."""
    value, step = "none", "A study keeps its recipe: correct the baseline or the constraint, and start a new study."
    if row is not None:
        value, step = f"{row.outcome}: {row.reason}", f"See {row.folder(study_dir) / LOG}. {step}"
    rule = f"the baseline {name} must finish before a trial can begin"
    return Problem(f"search.constraints.id_drop.{name}", rule, value, next_step=step)
