"""What a search does next and what has ended: one state machine over a study, whatever runs the trainings.

An attempt at a training is **proposed** (``propose``), **runs** once it has its resources (``started``), and has
**ended** (``ended``). Between, ``poll`` reads what was posted, the epochs of what runs, whether a stop was asked for,
and the budget; what is to end gets its order through the mailbox.
Whoever runs the trainings (``launch.tune_runner``, or this process: ``launch.run_trainings``) calls these four, each
from one thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.launch import events
from carft_ray.launch.attempt_ending import Ending, death_of, ending_of, only_node
from carft_ray.launch.budget import BUDGET_STOP, expected_end, used_up
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.cluster.ray_errors import no_successful_trial
from carft_ray.launch.leaks import Leaks
from carft_ray.launch.nodes import BadNodes, Drains
from carft_ray.launch.search_gives_up import GivingUp
from carft_ray.launch.workers import micro_batch
from carft_ray.launch.workers.attempt import Attempt, own_names
from carft_ray.launch.workers.mailbox import Exchange, Mailbox, Process
from carft_ray.layout import LOG, RESULT
from carft_ray.recipe.schema.recipe import BudgetConfig
from carft_ray.store import attempt_files
from carft_ray.store.attempt_files import append_log, log_lost
from carft_ray.store.copy import NUMBERS
from carft_ray.store.folder import RefusedError
from carft_ray.study.records import STOPPING
from carft_ray.study.running import at_a_time_record, started
from carft_ray.study.study import Study
from carft_ray.study.training import TrialSpec
from carft_ray.words import counted

POLL_EVERY_S = 0.5
POLL_SHARE = 0.1  # of the time, at most
STOP_WAITING_AFTER_S = 30.0  # a Ray Train group whose workers have not come so long after a stop is given up
STOP_UNLOGGED_S = 60.0  # time to stop after the log has failed; a search elsewhere may soon take the study over
WAIT_NOTE_AFTER_S = 50  # a training whose process is not there after this time gets a note


@dataclass(eq=False)
class Driver:
    """Asks the study, and reports to it, for whoever runs the trainings.

    Attributes:
        study: The open study.
        at_a_time: Trainings at a time.
        on_event: Given what happens.
        gpus: GPUs of each training.
        budget: Of this search; None: it has none.
        began: When the search began, of ``time.monotonic``.
        hang_timeout_s: An attempt that makes no step for so long is ended; None: none is.
        end_process: Ends the process of an attempt; returns how to learn what its threads did.
        leaks: Removes what killed trials leave; None: they leave nothing.
        bad_nodes: Nodes on which attempts fail again and again.
        drains: Nodes that are being taken away; None: there are none to ask for.
        exchange: By which it talks to what runs.
        failure: What ended the search before its time.
        out_of_budget: Which limit of the budget has ended it; empty while none has.
        is_stopping: Whether a stop was asked for, when that was last read (``check_stop``).
        has_stopped: Whether a training was stopped before its end.
    """

    study: Study
    at_a_time: AtATime
    on_event: Callable[[events.Event], None]
    gpus: float = 0.0
    budget: BudgetConfig | None = None
    began: float = field(default_factory=lambda: time.monotonic())
    hang_timeout_s: float | None = None
    end_process: Callable[[Process], Callable[[], str]] = lambda process: str
    leaks: Leaks | None = None
    bad_nodes: BadNodes = field(default_factory=BadNodes)
    drains: Drains | None = None
    exchange: Exchange = field(default_factory=lambda: Exchange(Mailbox()))
    failure: Exception | None = field(default=None, init=False)
    out_of_budget: str = field(default="", init=False)
    is_stopping: bool = field(default=False, init=False)
    has_stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}  # by the name that whoever runs them has given
        self._giving_up = GivingUp()
        self._gpu_s = self.study.gpu_seconds()  # of attempts that have ended
        self._num_before = self.study.num_begun()
        self._longest_end_s = self._longest_step_s = 0.0  # from the last epoch of a training to its result; of a step
        self._next_poll = 0.0
        self._stopping_since = 0.0
        self._told_at_a_time: tuple[int, str] | None = None  # as the log says it
        self.study.log.store.meanwhile = self.poll

    def __getstate__(self) -> dict[str, object]:
        """Nothing: Tune keeps a copy of what it was given, which nobody reads."""
        return {}

    @property
    def live(self) -> list[TrialSpec]:
        """The attempts that have not ended."""
        return [attempt.spec for attempt in self._attempts.values()]

    def holds(self, key: str) -> bool:
        """Tells whether an attempt of this name has not ended."""
        return key in self._attempts

    def propose(self, key: str) -> TrialSpec | None:
        """Returns the next attempt, or None at the limit or if none is left. None while nothing runs ends the search.

        Args:
            key: Names the attempt from now on.
        """
        if len(self._attempts) >= self.at_a_time.limit or self.failure is not None or self.check_stop():
            return None
        try:
            fits = micro_batch.noted(self.study.log)
            self.study.end = self._expected_end()
            spec = self.study.next()
        except Exception as error:  # raised again by the search, once running trainings have ended
            self._fail(error)
            return None
        if spec is not None:
            spec, now = replace(spec, fits=fits), time.monotonic()
            self._attempts[key] = Attempt(spec, now, seen=now)
            self.exchange.order(spec.training, spec.attempt)
        return spec

    def started(self, key: str) -> None:
        """Notes that an attempt has got its resources: from now on its time counts."""
        attempt = self._attempts[key]
        attempt.began = attempt.seen = time.monotonic()
        attempt.is_running = True
        self.on_event(events.TrialStarted(attempt.spec))

    def ended(self, key: str, gone: str = "", dead_rank: int | None = None) -> None:
        """Has the study record how an attempt ended; never raises: the failure ends the search.

        Args:
            key: Names the attempt; one that has ended already is passed over.
            gone: Why its processes have ended before their time (first line) and what is known besides, if they have.
            dead_rank: Which of them has died, where that is known; the others may have made something else of it.
        """
        attempt = self._attempts.pop(key, None)
        if attempt is None:
            return
        self.exchange.now()
        try:
            self.study.log.check()  # the files are those of whoever holds the study
            self._read_post(attempt)
            if attempt.gone is not None:
                for name in attempt.gone:
                    self.study.log.store.forget_files(name)
                self.study.log.store.bring(attempt.spec.attempt_name, NUMBERS)
        except StorageError as error:
            self._fail(error)
        spec, seconds = attempt.spec, self._held_s(attempt)
        if gone:
            self.exchange.order(spec.training, spec.attempt + 1)  # should it wake up, it leaves
        else:
            self.exchange.forget(spec.training)
        self._gpu_s += seconds * self.gpus
        try:
            self._report_epochs(attempt)  # the last ones
            if attempt.last_row and files.seen(spec.place(self.study.study_dir) / RESULT):
                self._longest_end_s = max(self._longest_end_s, time.monotonic() - attempt.last_row)
            if dead_rank is not None and not attempt.hung:
                attempt.failure, gone = death_of(attempt, gone, dead_rank)
            self._settle(attempt, seconds, gone)
        except Exception as failure:  # raised again by the search
            self._fail(failure)

    def ask_to_leave(self, spec: TrialSpec, reason: str) -> None:
        """Asks an attempt to write a checkpoint and end. Another one continues from there, and no failure is counted.

        It ends at the end of its metrics window. One that was asked before, or has ended, is passed over.

        Args:
            spec: The attempt.
            reason: One line, for its log.
        """
        attempt = next((each for each in self._attempts.values() if each.spec == spec), None)
        if attempt is not None and not attempt.leaves:
            self.exchange.order(spec.training, spec.attempt, "leave")
            attempt.leaves = reason

    def avoided(self) -> list[str]:
        """Returns Ray's names of the nodes on which nothing is to start: bad ones, and those that are taken away.

        Ray keeps new processes off the latter, but Tune has an idle one there run the next attempt.
        """
        return sorted({*self.bad_nodes.left_out(), *(self.drains.nodes() if self.drains else ())})

    def check_stop(self) -> bool:
        """Tells whether a stop was asked for, or the budget is used up; what runs is then asked to stop."""
        if not self.is_stopping and (self.study.stop.asked() or self._budget_ends()):
            self.is_stopping, self._stopping_since = True, time.monotonic()
            try:
                self.study.log.write({"kind": STOPPING, "reason": self.study.stop.reason})
            except StorageError as error:
                self._fail(error)
            for spec in self.live:
                self.exchange.order(spec.training, spec.attempt, "stop")
            self.on_event(events.Stopping(len(self._attempts), self.out_of_budget))
        return self.is_stopping

    def poll(self, at_once: bool = False) -> None:
        """Reads what has come of what runs, twice a second at most.

        Where this takes long (many trials, a slow file system), it is repeated less often: it never takes more than
        ``POLL_SHARE`` of the time.

        Args:
            at_once: Read now, however long ago the last time was.

        Raises:
            StorageError: Another search has taken the study over: its trainings run in the same folders. Or the log
                failed ``STOP_UNLOGGED_S`` ago; until then, what runs may write its checkpoints.
        """
        began = time.monotonic()
        if began < self._next_poll and not at_once:
            return
        try:
            self._read()
        finally:
            now = time.monotonic()
            self._next_poll = max(began + POLL_EVERY_S, now + (now - began) * (1 / POLL_SHARE - 1))

    def _read(self) -> None:
        try:
            self.study.log.check()
        except StorageError as error:
            self._fail(error)
            if isinstance(error, RefusedError):
                raise
            self.check_stop()
            if time.monotonic() - self._stopping_since >= STOP_UNLOGGED_S:
                raise
            return
        self.at_a_time.follow()
        heard = self.exchange.heard
        for attempt in list(self._attempts.values()):
            self._read_post(attempt)
            self._check_steps(attempt, heard)
        self._note_running()
        groups = [each.alive.group if each.alive else "" for each in self._attempts.values()]
        if self.leaks and (number := self.leaks.check(groups)):
            what = counted(number, "placement group")
            self.on_event(events.Note(f"removed {what} that a killed trial had left behind"))
        if not self.check_stop():
            for attempt in list(self._attempts.values()):
                self._report_epochs(attempt)
            self._leave_drained_nodes()

    def _leave_drained_nodes(self) -> None:
        """Asks what has a rank on a node that is being taken away to leave."""
        for attempt in list(self._attempts.values()) if self.drains else ():
            if self.drains and not attempt.leaves and (reason := self.drains.reason(attempt.alive)):
                self.ask_to_leave(attempt.spec, reason)

    def _held_s(self, attempt: Attempt) -> float:
        """Returns for how long an attempt has held its resources; a Ray Train group has them when its workers run."""
        waits = not attempt.is_running or (self.leaks is not None and attempt.alive is None)
        return 0.0 if waits else time.monotonic() - attempt.began

    @property
    def only_waits(self) -> bool:
        """Whether a stop was asked for, and all attempts that have not ended wait for resources, which may never come.

        A Ray Train group that has been waiting until a moment ago gets the time to see the stop by itself.
        """
        late = self.is_stopping and time.monotonic() - self._stopping_since >= STOP_WAITING_AFTER_S
        waiting = [
            not attempt.is_running or (late and self.leaks is not None and attempt.alive is None)
            for attempt in self._attempts.values()
        ]
        return self.is_stopping and bool(waiting) and all(waiting)

    def end_waiting(self) -> None:
        """Sets aside for the next search what waits for resources when this one stops."""
        for key in list(self._attempts):
            self.ended(key)

    def _read_post(self, attempt: Attempt) -> None:
        try:
            for kind, value in self.exchange.records(attempt.spec.training, attempt.spec.attempt):
                if kind == "log":
                    append_log(attempt.spec.folder(self.study.study_dir), value)
                elif kind == "step":
                    self.on_event(events.TrialStep(attempt.spec, value))
                elif kind in ("sent", "gone"):
                    names, gone = own_names(attempt.spec, value), attempt.gone or set()
                    attempt.gone = gone - names if kind == "sent" else gone | names  # removed once no node writes there
                    if kind == "sent":
                        self.study.log.store.learn(sorted(names))
                elif self.study.add_row(attempt.spec, value):
                    attempt.rows.append(value)
                    attempt.last_row = time.monotonic()
        except StorageError as error:
            self._fail(error)
        mail = self.exchange.mail(attempt.spec.training, attempt.spec.attempt)
        if mail is None:
            return
        if mail.signs.process and not attempt.alive and self.leaks is not None:
            attempt.began = time.monotonic()  # since then its workers have held their resources for it
        attempt.seen = max(attempt.seen, mail.seen) if attempt.alive else mail.seen
        attempt.failure = mail.signs.failure or attempt.failure
        attempt.alive = mail.signs.process or attempt.alive
        self._longest_step_s = max(self._longest_step_s, mail.longest_s)

    def _check_steps(self, attempt: Attempt, heard: float) -> None:
        """Ends an attempt that made no step for long, as far as was heard of it: the driver may have slept."""
        spec, alive, now = attempt.spec, attempt.alive, time.monotonic()
        if alive is None:
            if now - attempt.seen >= WAIT_NOTE_AFTER_S:
                attempt.seen = math.inf  # once
                waited = f"{spec.name} has waited {WAIT_NOTE_AFTER_S:.0f} s for its process"
                self.on_event(events.Note(f"{waited}: is the cluster full? See `ray status`"))
        elif self.hang_timeout_s is not None and heard - attempt.seen >= self.hang_timeout_s:
            attempt.seen = now  # once more after the same time, should it be needed
            attempt.hung = f"no step for {self.hang_timeout_s:g} s (resources.hang_timeout_s)"
            attempt.hung += f"; process {alive.pid} was ended; what its threads did is in {spec.training}/{LOG}"
            self.on_event(events.Note(f"{spec.name} hangs: {attempt.hung}"))
            attempt.stacks = self.end_process(alive)

    def _note_running(self) -> None:
        """Writes to the log what has begun since, and how many run at a time where that has changed."""
        records = []
        for each in self._attempts.values():
            if each.alive and not each.is_noted:
                each.is_noted = True
                records.append(started(each.spec, self._held_s(each), self.gpus, each.alive.pid, each.alive.node_id))
        if self._told_at_a_time != self.at_a_time.told:
            self._told_at_a_time = self.at_a_time.told
            records.append(at_a_time_record(*self.at_a_time.told))
        try:
            self.study.log.write(*records)
        except StorageError as error:
            self._fail(error)

    def _report_epochs(self, attempt: Attempt) -> None:
        rows, attempt.rows = attempt.rows, []
        try:
            for row in rows:
                if self.study.report(attempt.spec, row):
                    self.exchange.order(attempt.spec.training, attempt.spec.attempt, "cut")
        except Exception as failure:  # raised again by the search
            self._fail(failure)
            return
        for row in rows:
            self.on_event(events.TrialEpoch(attempt.spec, row))

    def _held_gpu_s(self) -> float:
        """Returns GPU seconds of all attempts of the study, those that run included."""
        return self._gpu_s + self.gpus * sum(map(self._held_s, self._attempts.values()))

    def _expected_end(self) -> int | None:
        """Returns at how many trials the search is expected to end; None: at those of the recipe."""
        if self.budget is None or not self.study.recipe.search.repeats:
            return None
        elapsed_s, begun = time.monotonic() - self.began, self.study.num_begun()
        end = expected_end(self.budget, elapsed_s, self._held_gpu_s(), self._num_before, begun)
        return None if end is None else min(end, self.study.recipe.search.trials)

    def _budget_ends(self) -> bool:
        """Asks what runs to stop when the budget is used up; tells whether it is."""
        if self.budget is None or self.failure is not None:
            return False
        if not self._attempts and self.study.done():  # whatever is used by now, nothing ends early
            return False
        now = time.monotonic()
        gpu_s, gpus = self._held_gpu_s(), self.gpus * len(self._attempts)
        longest_s = max(self._longest_end_s, self._longest_step_s)
        self.out_of_budget = used_up(self.budget, now - self.began, gpu_s, gpus, longest_s)
        if self.out_of_budget:
            self.study.stop.ask(f"{BUDGET_STOP}{self.out_of_budget}")
        return bool(self.out_of_budget)

    def _settle(self, attempt: Attempt, seconds: float, gone: str) -> None:
        """Has the study record how an attempt ended that took so many seconds; ``gone`` as of ``ended``."""
        spec, failure = attempt.spec, attempt.failure
        if failure is not None and failure.device:
            self.study.log.write(micro_batch.fits_record(failure))
        row = self.study.settle(spec, failure, self.study.spent(spec, seconds, self.gpus))
        if row is None:
            has_slept = attempt.began < self.exchange.woke
            self._again(attempt, ending_of(attempt, gone, self.check_stop(), has_slept, self.at_a_time))
            return
        if row.outcome == "error":
            self._count_error(attempt, row.reason)
        else:
            self._giving_up.count(False, "", self.at_a_time.most)
            for node in sorted({node for node, _ in attempt.alive.nodes}) if attempt.alive else ():
                self.bad_nodes.well(node)
        if row.kind == "baseline" and not row.repeat_of:
            self.on_event(events.BaselineFinished(row))
            return
        if row.kind == "soup":
            self.on_event(events.SoupFinished(row))
            return
        if row.kind == "confirm":  # a fresh seed, or a probe, finds nothing better and says nothing about the search
            self.on_event(events.TrialFinished(row, is_best=False))
            return
        ranked = {each.training: each for each in self.study.retention.ranked()}
        best, row = self.study.retention.best(), ranked.get(row.training, row)
        is_best = best is not None and best.name in (row.name, row.repeat_of)
        self.on_event(events.TrialFinished(row, is_best, best.name if best else "", tuple(ranked.values())))
        if row.outcome not in ("complete", "pruned"):
            self._giving_up.note(row, seconds)
        running_s = (self._held_s(each) for each in self._attempts.values() if each.spec.kind == "trial")
        if best is None and self._giving_up.is_in_vain(self.at_a_time.most, running_s):
            raise no_successful_trial(self.study.study_dir, self._giving_up.trials)

    def _again(self, attempt: Attempt, ending: Ending) -> None:
        """Gives a training without a verdict another attempt, now or in the next search, or sets it aside."""
        spec, reason, another = attempt.spec, ending.reason, "gets another attempt"
        folder = spec.folder(self.study.study_dir)

        def note(what: str) -> None:
            self.on_event(events.Note(f"{spec.name} {what}: {reason}"))

        match ending.kind:
            case "stopped":
                self.has_stopped = True
                self.study.stopped(spec)  # it stays RUNNING, for the next search
            case "left":
                attempt_files.log_left(folder, spec.attempt, reason, self.study.log.store.known(spec.training))
                self.study.repeat(spec)
                note(another)
            case "memory" | "error":  # ``settle`` has queued it
                note(another)
                if ending.kind == "error":
                    self._count_error(attempt, reason)
            case "waits":
                log_lost(folder, spec.attempt, reason)
                self.study.repeat(spec)
                note("waits again")
            case "full":
                log_lost(folder, spec.attempt, reason)
                self.study.repeat(spec)
                fitting = self.at_a_time.concurrency
                note(f"{another}, with {fitting - 1} at a time from now on instead of {fitting}")
                self.at_a_time.memory_was_full()
            case "lost":
                what = self.study.lost(spec, reason, ending.details)
                self._failed_on(ending.node)
                if what == "set aside":
                    self.on_event(events.TrialSetAside(spec, reason))
                else:
                    note(another)
                self._giving_up.count(what != "advanced", reason, self.at_a_time.most, lost=True)

    def _count_error(self, attempt: Attempt, reason: str) -> None:
        if not attempt.last_row:  # its surroundings may be broken
            self._failed_on(only_node(attempt))
        self._giving_up.count(True, reason, self.at_a_time.most)

    def _failed_on(self, node: str) -> None:
        if note := self.bad_nodes.failed(node):
            self.on_event(events.Note(note))

    def _fail(self, error: Exception) -> None:
        """Keeps the first failure, which whoever runs the trainings raises at the end, and asks what runs to stop."""
        self.failure = self.failure or error
        self.study.stop.ask(str(error))
