"""Between Ray Tune and the study: Tune asks this ``Searcher`` what to run next and tells it what has ended.

Concurrency is ours (``set_max_concurrency`` returns True), and so is the end of the search. Tune gets no metric: a
report without it would end the whole run. Tune saves nothing of this; the study on disk is the truth.
"""

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from carft_ray import files
from carft_ray.errors import CarftError, MachineError, NoSuccessfulTrialError, Problem, StorageError
from carft_ray.launch.bad_nodes import BadNodes
from carft_ray.launch.budget import used_up
from carft_ray.launch.causes import error_of, explained, log_cause
from carft_ray.launch.events import (
    BaselineFinished,
    ConcurrencyChanged,
    Event,
    Note,
    Stopping,
    TrialEpoch,
    TrialFinished,
    TrialSetAside,
    TrialStarted,
)
from carft_ray.launch.executors import end_process
from carft_ray.launch.host_memory import told_of_full_memory
from carft_ray.launch.leaks import Leaks
from carft_ray.recipe.schema import BudgetPart
from carft_ray.search.folder import BUDGET_STOP, STOP
from carft_ray.search.outcome import (
    FOLDERS,
    LOG,
    METRICS,
    RESULT,
    Alive,
    Failure,
    TrialRow,
    TrialSpec,
    read_alive,
    read_failure,
)
from carft_ray.search.rows import best_row
from carft_ray.search.study import Study
from carft_ray.words import counted

FAILURES_TO_GIVE_UP = 5  # this many failed trials and not one good one: something is wrong with all of them
# so many attempts in a row lost without advancing or ended by an exception: it is neither the values nor one machine
ATTEMPTS_TO_GIVE_UP, ATTEMPTS_PER_SLOT = 12, 6  # at least, and for each training at a time
LOOK_EVERY_S = 0.5
LOOK_SHARE = 0.1  # of the time, at most
WAIT_TOLD_S = 50  # a training whose process is not there after this time gets a note that names what it lacks

TrialKey = tuple[str, int]  # name and attempt


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray is untyped here
    """Asks and tells the study for Tune.

    Args:
        study: The open study.
        concurrency: Trainings at a time.
        on_event: Told what happens.
        gpus: GPUs of one training.
        budget: Of this search; None: it has none.
        began: When the search began, of ``time.monotonic``.

    Attributes:
        failure: What ended the search before its time.
        out_of_budget: Which limit of the budget has ended it; empty while none has.
        longest_end_s: The longest that a training took to end, or to make a step, so far.
    """

    def __init__(
        self,
        study: Study,
        concurrency: int,
        on_event: Callable[[Event], None],
        gpus: float = 0.0,
        budget: BudgetPart | None = None,
        began: float | None = None,
    ) -> None:
        super().__init__()
        self.study = study
        self.concurrency = concurrency
        self.on_event = on_event
        self.failure: Exception | None = None
        self._stopped = False
        self.tune_trials: list[Any] = []  # Tune's own, for ``_settle_ended``
        self._live: dict[str, TrialSpec] = {}
        self._ended: list[TrialRow] = []  # trials told in this search
        self._failed_in_a_row = 0  # attempts
        self._only_lost = True  # these were all lost, none ended with an exception
        self.bad_nodes = BadNodes()
        self.nodes: dict[TrialKey, list[str]] = {}  # of running attempts, by name and attempt, once they have said so
        self._gpus = gpus
        self._budget = budget
        self._began_search = time.monotonic() if began is None else began
        self._began: dict[str, float] = {}  # when live attempts began
        self._gpu_s = study.gpu_seconds()  # of attempts that have ended
        self.out_of_budget = ""
        self.longest_end_s = 0.0
        self.hung: dict[TrialKey, str] = {}  # why an attempt was ended from outside, by name and attempt
        best = best_row(study.rows())
        self._best = best

    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for. Looks at the file: a worker may have seen it a moment ago."""
        if not self._stopped and (files.seen(self.study.study_dir / STOP) or self._budget_ends()):
            self._stopped = True
            self.on_event(Stopping(len(self._live), self.out_of_budget))
        return self._stopped

    def begins(self, trial_id: str) -> None:
        """Notes that an attempt has got its resources: from now on it counts."""
        self._began[trial_id] = time.monotonic()

    def _budget_ends(self) -> bool:
        """Asks what runs to stop when the budget is used up; tells whether it is."""
        if self._budget is None or self.failure is not None:
            return False
        now = time.monotonic()
        gpu_s = self._gpu_s + self._gpus * sum(now - began for began in self._began.values())
        gpus, elapsed_s = self._gpus * len(self._began), now - self._began_search
        self.out_of_budget = used_up(self._budget, elapsed_s, gpu_s, gpus, self.longest_end_s)
        if self.out_of_budget:
            try:
                files.write_text(self.study.study_dir / STOP, f"{BUDGET_STOP}{self.out_of_budget}\n")
            except StorageError as error:
                self._fail(error)
        return bool(self.out_of_budget)

    @property
    def live(self) -> list[TrialSpec]:
        """What Tune holds at the moment."""
        return list(self._live.values())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Returns what to run next; None to be asked again; ``FINISHED`` at the end. Never None with nothing live."""
        self._settle_ended()
        if len(self._live) >= self.concurrency:
            return None
        spec = None
        if self.failure is None and not self.stopped:
            try:
                spec = self.study.next()
            except Exception as error:  # raised again by the search, once running trainings have ended
                self._fail(error)
        if spec is not None:
            self._live[trial_id] = spec
            self.begins(trial_id)
            return {"spec": dataclasses.asdict(spec), "avoid": self.bad_nodes.left_out()}
        return None if self._live else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells the study; never raises, since Tune would lose the message and go on."""
        spec = self._live.pop(trial_id, None)
        if spec is None:
            return
        seconds = time.monotonic() - self._began.pop(trial_id)
        self._gpu_s += seconds * self._gpus
        try:
            self.study.spend(spec, seconds, self._gpus)
            self._see_end(spec)
            self._settle(spec, self._error(trial_id) if error else str((result or {}).get("lost", "")))
        except Exception as failure:  # raised again by the search
            self._fail(failure)

    def report(self, spec: TrialSpec, line: dict[str, Any]) -> None:
        """Tells the study of a look at a running training, which may be cut then; never raises."""
        try:
            self.study.report(spec, line)
        except Exception as failure:  # raised again by the search
            self._fail(failure)

    def _see_end(self, spec: TrialSpec) -> None:
        """Learns from a finished training how long its end takes: from its last epoch to its result."""
        folder = spec.folder(self.study.study_dir)
        with contextlib.suppress(OSError):
            seconds = (folder / RESULT).stat().st_mtime - (folder / METRICS).stat().st_mtime
            self.longest_end_s = max(self.longest_end_s, seconds)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Says that the limit is ours."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Reads nothing."""

    def _settle_ended(self) -> None:
        """Settles what Tune holds as ended without having said so (a reused actor that could not be reset)."""
        ended = {trial.trial_id for trial in self.tune_trials if trial.status in ("TERMINATED", "ERROR")}
        for trial_id in ended & self._live.keys():
            self.on_trial_complete(trial_id, error=True)

    def _settle(self, spec: TrialSpec, gone: str) -> None:
        """Tells the study how an attempt ended.

        Args:
            spec: The attempt.
            gone: Why its processes have ended before their time (first line) and what is known besides, if they have.
        """
        folder, key = spec.folder(self.study.study_dir), (spec.name, spec.attempt)
        row, nodes = self.study.settle(spec), self.nodes.pop(key, [])
        if row is None:
            if self.stopped:
                self.study.stopped(spec)  # it stays RUNNING, for the next search
                return
            failure = read_failure(folder, spec.attempt)
            if failure is None or failure.outcome == "lost":
                self._lost(spec, failure, gone)
                return
            self.on_event(Note(f"{spec.name} gets another attempt: {failure.reason}"))
            if failure.outcome == "memory":
                return
        self._count_failures(failed=row is None or row.outcome == "error", reason=row.reason if row else "")
        if row is None:
            return
        if row.outcome != "error":
            for node in nodes:
                self.bad_nodes.well(node)
        if row.kind == "baseline":
            self.on_event(BaselineFinished(row))
        else:
            if row.outcome != "pruned":  # neither well nor badly
                self._ended.append(row)
            if row.kind == "trial":  # a fresh seed finds nothing better
                self._best = self._best_with(row)
            name = self._best.name if self._best and row.kind == "trial" else ""
            self.on_event(TrialFinished(row, row.name == name, name))
            self._give_up_if_hopeless()

    def _lost(self, spec: TrialSpec, failure: Failure | None, gone: str) -> None:
        """Gives an attempt under which a machine has failed another one, or sets its training aside.

        Args:
            spec: The attempt.
            failure: What its workers have left of it.
            gone: As of ``_settle``.
        """
        reason, _, details = gone.partition("\n")
        reason = self.hung.get((spec.name, spec.attempt), reason) or "its process ended without a word"
        alive = None
        with files.passing_faults():
            alive = read_alive(spec.folder(self.study.study_dir), spec.attempt)
        node = alive.node_id if alive and len(alive.nodes) == 1 else ""  # of several, it is not known which
        if failure is not None:
            reason, details, node = failure.reason, failure.details, failure.node
        addresses = ", ".join(dict.fromkeys(address for _, address in alive.nodes)) if alive else ""
        if addresses and addresses not in reason:
            reason = f"{reason} (on {addresses})"
        if told_of_full_memory(reason) and self.concurrency > 1:
            log_cause(spec.folder(self.study.study_dir), spec.attempt, reason)
            self._run_fewer(spec, reason)
            return
        what = self.study.lost(spec, reason, details)
        if note := self.bad_nodes.failed(node):
            self.on_event(Note(note))
        if what == "set aside":
            self.on_event(TrialSetAside(spec, reason))
        else:
            self.on_event(Note(f"{spec.name} gets another attempt: {reason}"))
        self._count_failures(failed=what != "advanced", reason=reason, lost=True)

    def _best_with(self, row: TrialRow) -> TrialRow | None:
        """Returns the best trial now that one more has ended; a new point of a front may change which one is."""
        if self.study.recipe.search.objective.kind == "pareto":
            return best_row(self.study.rows())
        return best_row([row] if self._best is None else [self._best, row])

    def _run_fewer(self, spec: TrialSpec, reason: str) -> None:
        """Repeats an attempt for which there was no memory, with one training fewer at a time from now on."""
        self.concurrency -= 1
        self.study.repeat(spec)
        text = f"{spec.name} gets another attempt, with {self.concurrency} at a time from now on"
        self.on_event(Note(f"{text}, no more {self.concurrency + 1}: {reason}"))
        self.on_event(ConcurrencyChanged(self.concurrency, "memory was full"))

    def _count_failures(self, failed: bool, reason: str, lost: bool = False) -> None:
        """Raises when one attempt after the other is lost or ends with an exception, whatever was found before.

        The limit grows with the number of trainings at a time, so that losing half of a cluster ends no search.
        """
        self._only_lost = lost and (self._only_lost or not self._failed_in_a_row)
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        if self._failed_in_a_row >= max(ATTEMPTS_TO_GIVE_UP, ATTEMPTS_PER_SLOT * self.concurrency):
            rule = f"{self._failed_in_a_row} attempts in a row failed; the last one: {reason}"
            step = "What is finished is kept. Mend the cause, then run the same command again."
            kind = MachineError if self._only_lost else NoSuccessfulTrialError
            raise kind(Problem("search", rule, next_step=step))

    def _give_up_if_hopeless(self) -> None:
        if self._best is None and len(self._ended) >= FAILURES_TO_GIVE_UP:
            raise no_successful_trial(self.study, self._ended)

    def _fail(self, error: Exception) -> None:
        """Keeps the first failure and asks what runs to stop."""
        if self.failure is None:
            self.failure = error
            if self.study.taken_over:
                return  # the stop file is the other search's; ours ends at the Watcher's next look
            with contextlib.suppress(CarftError):  # on a full disk what runs ends by itself
                files.write_text(self.study.study_dir / STOP, f"{error}\n")

    def _error(self, trial_id: str) -> str:
        """Returns what Tune knows of a failed trial (``causes.explained``)."""
        trial = next((trial for trial in self.tune_trials if trial.trial_id == trial_id), None)
        return "" if trial is None else explained(error_of(trial))


def no_successful_trial(study: Study, rows: list[TrialRow]) -> NoSuccessfulTrialError:
    """Returns the error for a search without an objective: the commonest reason, and where its log is."""
    failed = [row for row in rows if row.outcome not in ("complete", "pruned")]
    if not failed:
        step = "Begin another study with a milder search.pruner, or with name: none."
        rule = f"no trial was trained to its end: the pruner has cut all {len(rows)}"
        return NoSuccessfulTrialError(Problem("search", rule, next_step=step))
    [(reason, count)] = Counter(row.reason for row in failed).most_common(1)
    row = next(row for row in failed if row.reason == reason)
    spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
    log = spec.folder(study.study_dir) / LOG
    step = f"See {log}." if files.seen(log) else ""
    rule = f"no trial succeeded; {count} of {len(failed)} failed in this way: {reason}"
    return NoSuccessfulTrialError(Problem("search", rule, next_step=step))


class Watcher(tune.Callback):  # type: ignore[misc]  # Ray is untyped here
    """Looks after running trainings from Tune's loop: starts, epochs, the stop file, trainings that hang.

    Args:
        searcher: Knows what runs.
        hang_timeout_s: An attempt that makes no step for so long is ended; None: none is.
        leaks: Removes what killed trials leave; None: they leave nothing.
        why_waiting: Says why a process does not come.
        end: Ends its process.
    """

    def __init__(
        self,
        searcher: StudySearcher,
        hang_timeout_s: float | None = None,
        leaks: Leaks | None = None,
        why_waiting: Callable[[], str] = lambda: "is the cluster full?",
        end: Callable[[Alive], None] = end_process,
    ) -> None:
        self.searcher = searcher
        self.hang_timeout_s = hang_timeout_s
        self.leaks = leaks
        self.why_waiting = why_waiting
        self.end = end
        self._next_look = 0.0
        self._offsets: dict[str, int] = {}  # bytes of metrics.jsonl already read, by name
        self._alive: dict[TrialKey, Alive] = {}  # as it was read once; only its time changes
        self._steps: dict[TrialKey, tuple[int, float]] = {}  # last step, and when it was first seen here

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Lends Tune's list of trials to the searcher, and looks at the files twice a second.

        Where a look takes long (many trials, a slow file system), it is repeated less often: it never takes more than
        ``LOOK_SHARE`` of the time.
        """
        self.searcher.tune_trials = trials
        if time.monotonic() < self._next_look:
            return
        began = time.monotonic()
        try:
            self._look()
        finally:
            now = time.monotonic()
            self._next_look = max(began + LOOK_EVERY_S, now + (now - began) * (1 / LOOK_SHARE - 1))

    def _look(self) -> None:
        try:
            self.searcher.study.check_held()
        except StorageError as error:  # ends Tune's run, and our trainings with it: others run in the same folders now
            self.searcher.failure = error
            raise
        for spec in self.searcher.live:
            self._look_for_life(spec)
        if self.leaks and (number := self.leaks.look(self.searcher.live)):
            what = counted(number, "placement group")
            self.searcher.on_event(Note(f"removed {what} that a killed trial had left behind"))
        if self.searcher.stopped:
            return
        for spec in self.searcher.live:
            self._tell_epochs(spec)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tells that a training begins."""
        self.searcher.begins(trial.trial_id)
        spec = TrialSpec(**trial.config["spec"])
        path = spec.folder(self.searcher.study.study_dir) / METRICS
        self._offsets[spec.name] = files.read_new_lines(path, 0)[1]
        self.searcher.on_event(TrialStarted(spec))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Suspects that a trial whose process died has left a placement group."""
        if self.leaks:
            self.leaks.suspect(TrialSpec(**trial.config["spec"]), self.searcher.live)

    def _look_for_life(self, spec: TrialSpec) -> None:
        key, now = (spec.name, spec.attempt), time.monotonic()
        alive = self._alive.get(key)
        with files.passing_faults():  # then nothing is new
            alive = read_alive(spec.folder(self.searcher.study.study_dir), spec.attempt, alive)
        if alive:
            self._alive[key] = alive
            self.searcher.nodes[key] = sorted({node for node, _ in alive.nodes})
        last_step = alive.last_step_ns if alive else 0
        before, since = self._steps.get(key, (-1, now))
        if last_step != before:
            if before > 0:
                self.searcher.longest_end_s = max(self.searcher.longest_end_s, (last_step - before) / 1e9)
            self._steps[key] = (last_step, now)
        elif alive is None:
            if now - since >= WAIT_TOLD_S:
                self._steps[key] = (last_step, math.inf)  # told once
                note = f"{spec.name} has waited {WAIT_TOLD_S:.0f} s for its process: {self.why_waiting()}"
                self.searcher.on_event(Note(note))
        elif self.hang_timeout_s is not None and now - since >= self.hang_timeout_s:
            self._steps[key] = (last_step, now)  # once more after the same time, should it be needed
            reason = f"no step for {self.hang_timeout_s:g} s (resources.hang_timeout_s); process {alive.pid} was ended"
            reason += f"; what its threads did is in {FOLDERS[spec.kind]}/{spec.name}/{LOG}"
            self.searcher.hung[key] = reason
            self.searcher.on_event(Note(f"{spec.name} hangs: {reason}"))
            self.end(alive)

    def _tell_epochs(self, spec: TrialSpec) -> None:
        offset = self._offsets.get(spec.name)
        if offset is None:
            return
        path = spec.folder(self.searcher.study.study_dir) / METRICS
        rows, self._offsets[spec.name] = files.read_new_lines(path, offset)
        for line in rows:
            self.searcher.report(spec, line)
        if rows:
            self.searcher.on_event(TrialEpoch(spec, rows[-1]))
