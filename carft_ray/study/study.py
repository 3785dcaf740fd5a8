"""The study: an Optuna journal on disk that is the only state of a search. Nothing here knows Ray.

The journal holds three Optuna studies. The sampler sees ``search`` alone; ``baselines`` stands beside it, and so does
``confirm`` once the winner is trained again with fresh seeds.

| what happened to a training | outcome | Optuna sees |
|---|---|---|
| valid ``result.json`` | complete | COMPLETE, constraint ``trained`` = -1, those of the recipe as measured |
| cut by the pruner | pruned | PRUNED with its intermediate values, constraint ``trained`` = -1 |
| not finite; all at chance; an exception that came back | diverged / error | PRUNED, constraint ``trained`` = 1 |
| stopped; driver killed | running | nothing: RUNNING until it is recovered |
| worker, node, connection, device or disk lost | running | nothing: another attempt from the newest checkpoint |
| lost again and again without advancing | running, set aside | nothing: the next search tries it again |

An attempt advances when it leaves a newer checkpoint than the lost one before it. There is no limit while attempts
advance; after ``LOST_ATTEMPTS`` in a row that do not, the training is set aside and the others go on.

PRUNED with a constraint, because Optuna's samplers ignore FAIL and would draw the same region again. Every finished
trial has the same constraints: ``trained``, and one per constraint of the recipe (0 where nothing was measured).

A Pareto search has two directions, ID and OOD accuracy. Its sampler is also told of other points of a training's alpha
curve (``told.further_points``), as trials of their own that are no trainings (``rows.TRAINING_OF``). They are added
before the training itself is told, so that a training that is told has all of them.
"""

import contextlib
import shutil
from collections import deque
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from carft_ray import files
from carft_ray.errors import NoSuccessfulTrialError, Problem, StorageError
from carft_ray.layout import CHECKPOINTS, JOURNAL, LOG, METRICS, PREPARED, REFERENCES, RESULT, STOP, WEIGHTS
from carft_ray.recipe.constraints import constraint_names
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.region import Direction
from carft_ray.study import front, trust
from carft_ray.study.best import write_best
from carft_ray.study.identity import claim, record_recipe
from carft_ray.study.lease import Lease
from carft_ray.study.lock import gone_if_nothing_began, repair_journal, study_lock
from carft_ray.study.outcome import (
    Cut,
    Kind,
    TrialRow,
    TrialSpec,
    append_log,
    failure_error,
    progress_of,
    progress_words,
    raise_fence,
    read_cut,
    read_failure,
    read_result,
    rounded,
    trial_name,
    write_cut,
)
from carft_ray.study.proposals import pruning, space, warm_start
from carft_ray.study.proposals.optuna_private import running_trial, trial_id
from carft_ray.study.rows import (
    LATE_CUT,
    SET_ASIDE,
    TRAINING_OF,
    VALUE_ATTRIBUTE,
    ZERO_SHOT,
    best_first,
    best_row,
    confirmations,
    intermediate_values,
    is_training,
    readable,
    row_of,
    rows_of,
    storage_of,
    study_name,
    trainings,
)
from carft_ray.study.space_revisions import begin_generation, remove_half_made
from carft_ray.study.spent import ATTRIBUTE as SPENT
from carft_ray.study.spent import left_behind
from carft_ray.study.trial_attributes import constraint_values, further_points, missing_metrics, result_attributes

ERRORS = 2  # attempts that end with an exception before the study is told: it must come back once
LOST_ATTEMPTS = 5  # attempts lost in a row without advancing before a training is set aside
# attributes of a training: lost attempts in a row and how far they came, step and attempt of an error of its device
LOST, DEVICE_ERROR = "lost_attempts", "device_error"


class Study:
    """An open study; its lock is held. Use ``open_study``.

    Attributes:
        resolved: The recipe with absolute paths.
        notes: What was repaired, found or taken in, one sentence each.
    """

    def __init__(self, study_dir: Path, recipe: Recipe, held: Lease, notes: list[str], storage: JournalStorage) -> None:
        self.study_dir = study_dir
        self.recipe = self.resolved = recipe
        self.notes = notes
        self._lease = held
        self._storage = storage
        self._rule = front.front_rule(recipe.search.objective)
        self._constraints = constraint_names(recipe.search.constraints)
        self._references_known = not self._constraints  # whether what the constraints compare with is there
        self._studies: dict[Kind, optuna.Study] = {}
        self._open_studies("trial", "baseline")
        self._asks = True  # whether the sampler proposes new trials
        self._trusted = False  # whether a sampler may open pickles of others
        self._trials: dict[tuple[Kind, int], optuna.Trial] = {}
        self._waiting: deque[TrialSpec] = deque()
        self._known: dict[int, pruning.PrunerTrial] | None = None  # by number, once a pruner needs them
        self._kept: dict[str, TrialRow] = {}  # trials whose weights stay, by name; the best is among them
        self._knows_all = False  # whether they are of all trials, as they are once the study is recovered
        self._noted: tuple[str, float | None] | None = None  # name and alpha of what best.yaml holds

    @property
    def taken_over(self) -> bool:
        """Whether another process holds the study by now; then nothing in its folder is ours to write."""
        return self._lease.lost()

    def check_held(self) -> None:
        """Raises a ``StorageError`` when another process has taken the study over."""
        self._lease.check()

    def check_recoverable(self, trusted: bool = False) -> None:
        """Raises what ``recover_running`` would raise of the arguments of the user, before anything is written."""
        self._trusted = trusted
        self._check_trusted()
        warm_start.new_sources(self._studies["trial"], self.study_dir, self.resolved)

    def recover_running(self, trusted: bool = False) -> list[TrialRow]:
        """Takes over what an earlier search left RUNNING: tells what has finished, queues the rest for another attempt.

        Removes the weights that are not to be kept, too.

        Args:
            trusted: A study from elsewhere may be opened by a sampler that unpickles.

        Returns:
            Rows of what was told.

        Raises:
            UsageError: It is from elsewhere, its sampler unpickles, and it is not trusted.
        """
        self._trusted = trusted
        self._check_trusted()
        self._enter("baseline", self.recipe.search.baselines)
        told = self._recover("baseline") + self._recover("trial")
        with self._writing():
            self.notes += warm_start.take_in(self._studies["trial"], self.study_dir, self.resolved)
        self._known = None  # trials of another study may have some
        for row in self.rows("baseline") + [row_of("trial", trial) for trial in trainings(self._studies["trial"])]:
            self._retain(row)
        self._knows_all = True
        self._note_best()
        return told

    def recover_confirm(self, trainings: Mapping[str, dict[str, Any]]) -> list[TrialRow]:
        """As ``recover_running``, for the trainings of a confirm: only these run until the study is opened again.

        Args:
            trainings: Values over the recipe's ``train`` by name; those that are finished already are left alone.

        Returns:
            Rows of what was told.
        """
        self._asks = False
        self._open_studies("confirm")
        self._enter("confirm", trainings)
        return self._recover("confirm", trainings)

    def _recover(self, kind: Kind, wanted: Container[str] | None = None) -> list[TrialRow]:
        """Tells or queues what is RUNNING in one of the Optuna studies; None wants everything."""
        told = []
        for frozen in self._studies[kind].get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not is_training(frozen):
                continue
            spec = self._spec(kind, running_trial(self._studies[kind], frozen))
            if wanted is not None and spec.name not in wanted:
                continue
            self._spend_left_behind(spec)
            failure = read_failure(spec.folder(self.study_dir), spec.attempt)
            mended = failure is not None and failure.outcome == "fatal"  # the user had the time to mend it
            row = self.settle(spec) if spec.attempt and not mended else None
            if row:
                told.append(row)
                continue
            self._try_again(spec)
            if spec not in self._waiting and spec.name != ZERO_SHOT:  # which is told, and never trained
                self._waiting.append(spec)
        return told

    def next(self) -> TrialSpec | None:
        """Returns the next attempt to start, or None when nothing is left but what runs already.

        Baselines come first, then recovered trials, then new ones until the recipe's number is reached. No trial starts
        before the baselines that a constraint names have finished.

        Raises:
            NoSuccessfulTrialError: A baseline that a constraint names has ended without a result.
        """
        if not self._waiting and self._wants_more() and self._may_try():
            with self._writing():
                trial = space.ask(self._studies["trial"], self.recipe)
            self._waiting.append(self._spec("trial", trial))
        waiting = next((spec for spec in self._waiting if spec.kind != "trial" or self._may_try()), None)
        if waiting is None:
            return None
        self._waiting.remove(waiting)
        spec = TrialSpec(waiting.kind, waiting.number, waiting.name, waiting.values, waiting.attempt + 1)
        trial = self._trials[spec.kind, spec.number]
        with self._writing():
            trial.set_user_attr("attempt", spec.attempt)
        raise_fence(spec.folder(self.study_dir), spec.attempt)
        return spec

    def report(self, spec: TrialSpec, line: Mapping[str, Any]) -> str | None:
        """Notes an intermediate value of a running trial, and decides whether its training is cut there.

        The decision is in the trial's folder before the value is in the study, so a kill in between loses neither. A
        value that is noted already (an attempt repeats an epoch) is passed over, as is what comes after a cut. Of a
        training that has ended, the study notes that the cut would have come too late (``LATE_CUT``).

        Args:
            spec: The attempt; only trials are ever cut.
            line: A line of its ``metrics.jsonl``.

        Returns:
            Why the training is cut; it ends once it has read the file. None: it continues.
        """
        pruner = self.recipe.search.pruner
        if spec.kind != "trial" or pruner.name == "none":
            return None
        found, known = pruning.intermediate_value(self.recipe, spec.values, line), self._pruner_trials()
        before = known[spec.number].intermediate_values if spec.number in known else {}
        if found is None or found[0] in before:
            return None
        study, folder, (percent, value) = self._studies["trial"], spec.folder(self.study_dir), found
        cut = read_cut(folder)
        if cut is not None and percent > cut.percent:
            return None
        values, reason, late = {**before, percent: value}, None, None
        if cut is None:
            others = [trial for number, trial in known.items() if number != spec.number]
            reason = pruning.cut_reason(pruner, values, others)
            if reason is not None and files.exists(folder / RESULT):
                reason, late = None, reason
            if reason is not None:
                write_cut(folder, Cut(spec.attempt, percent, reason))
        trial = self._trials[spec.kind, spec.number]
        with self._writing():
            if late is not None and LATE_CUT not in trial.user_attrs:
                trial.set_user_attr(LATE_CUT, late)
            if len(study.directions) == 1:
                trial.report(value, percent)
            else:  # Optuna takes no intermediate values of a trial with two objectives
                trial.set_user_attr(f"{VALUE_ATTRIBUTE}{percent}", value)
        known[spec.number] = pruning.PrunerTrial(values, complete=False)
        return reason

    def _pruner_trials(self) -> dict[int, pruning.PrunerTrial]:
        """Returns the trials with intermediate values, by number: only these count, and nobody else writes them."""
        if self._known is None:
            self._known = {
                trial.number: pruning.PrunerTrial(values, trial.state == TrialState.COMPLETE)
                for trial in self._studies["trial"].get_trials(deepcopy=False)
                if (values := intermediate_values(trial))
            }
        return self._known

    def settle(self, spec: TrialSpec) -> TrialRow | None:
        """Tells the study how an attempt ended, by what lies in its folder. A result wins over a cut.

        Returns:
            The row; None when the folder has no verdict, or the same training gets another attempt (``waits``).

        Raises:
            CarftError: The training found a fault that is not in its values; it stays RUNNING.
        """
        folder = spec.folder(self.study_dir)
        result = read_result(folder)
        if self.recipe.search.pruner.name != "none":
            # the last lines may be new; the others cost nothing
            for line in files.read_json_lines(folder / METRICS):
                self.report(spec, line)
        if result is not None:
            self._check_measured(spec, result)
            lowest = self.recipe.search.alpha.lowest if spec.kind == "trial" and self._rule else None
            found = result_attributes(result, lowest)
            if (cut := read_cut(folder)) is not None:
                found[LATE_CUT] = cut.reason
            return self._tell(spec, TrialState.COMPLETE, found, result["objective"])
        cut = read_cut(folder)
        if cut is not None:
            return self._tell(spec, TrialState.PRUNED, {"outcome": "pruned", "reason": cut.reason})
        failure = read_failure(folder, spec.attempt)
        if failure is None:
            return None
        if failure.outcome == "fatal":
            raise failure_error(failure, f"{spec.kind} {spec.name}", folder)
        if failure.outcome == "memory":  # the micro-batch is at fault
            self.repeat(spec)
            return None
        trial = self._trials[spec.kind, spec.number]
        if failure.outcome == "lost":
            step, attempt = trial.user_attrs.get(DEVICE_ERROR) or (None, 0)
            if failure.step is None or failure.step != step or spec.attempt == attempt:
                if failure.step != step:
                    with self._writing():
                        trial.set_user_attr(DEVICE_ERROR, [failure.step, spec.attempt])
                return None
            append_log(
                folder, f"attempt {spec.attempt}: the same error of the device at the same step\n{failure.details}"
            )
        elif failure.outcome == "error":
            failed = sorted({*trial.user_attrs.get("failed_attempts", []), spec.attempt})
            with self._writing():
                trial.set_user_attr("failed_attempts", failed)
            if len(failed) < ERRORS:
                self.repeat(spec)
                return None
        outcome = "error" if failure.outcome == "lost" else failure.outcome
        return self._tell(spec, TrialState.PRUNED, {"outcome": outcome, "reason": failure.reason})

    def lost(self, spec: TrialSpec, reason: str, details: str = "") -> Literal["advanced", "repeated", "set aside"]:
        """Notes that a machine failed under an attempt: another attempt follows, or the training is set aside.

        Args:
            spec: The attempt, which ``settle`` found without a verdict.
            reason: The first cause, one line.
            details: What followed from it, for the log.

        Returns:
            Whether the attempt advanced and is repeated, did not advance and is repeated, or is the last for now.
        """
        folder, trial, reason = spec.folder(self.study_dir), self._trials[spec.kind, spec.number], rounded(reason)
        append_log(folder, "\n".join([f"attempt {spec.attempt}: lost: {reason}", *filter(None, [details.rstrip()])]))
        before, now = trial.user_attrs.get(LOST) or {}, progress_of(folder)
        advanced = now > before.get("progress", [0, 0])
        number = 1 if advanced else before.get("number", 0) + 1
        with self._writing():
            trial.set_user_attr(LOST, {"progress": now, "number": number})
        if number < LOST_ATTEMPTS:
            self.repeat(spec)
            return "advanced" if advanced else "repeated"
        raise_fence(folder, spec.attempt + 1)  # should it wake up, it writes nothing any more
        with self._writing():
            trial.set_user_attr(
                SET_ASIDE, f"{number} attempts in a row were lost and did not advance; the last: {reason}"
            )
        return "set aside"

    def stopped(self, spec: TrialSpec) -> None:
        """Writes to the log of a training why it was stopped, and from where the next search goes on with it."""
        folder, path = spec.folder(self.study_dir), self.study_dir / STOP
        why = "" if not files.exists(path) else path.read_text(errors="replace").partition("\n")[0]
        self._lease.check()
        where = f"resume goes on from {progress_words(folder)}"
        append_log(folder, f"attempt {spec.attempt}: stopped: {why or 'on request'}; {where}")

    def _try_again(self, spec: TrialSpec) -> None:
        """Forgets that a training was set aside and how many of its attempts were lost: this is another search."""
        trial = self._trials[spec.kind, spec.number]
        for name in (SET_ASIDE, LOST):
            if trial.user_attrs.get(name):
                with self._writing():
                    trial.set_user_attr(name, None)

    def set_aside(self) -> list[TrialRow]:
        """Returns the trainings of all kinds that are set aside."""
        return [row for kind in self._studies for row in self.rows(kind) if row.set_aside]

    def repeat(self, spec: TrialSpec) -> None:
        """Gives the training of an attempt another one, and does not count this one as failed."""
        self._waiting.append(spec)

    def spend(self, spec: TrialSpec, seconds: float, gpus: float) -> None:
        """Notes what an attempt took; call it before ``settle`` or ``lost``.

        Args:
            spec: The attempt.
            seconds: From its start to its end.
            gpus: GPUs that its workers held together.
        """
        trial = self._trials[spec.kind, spec.number]
        spent = {**trial.user_attrs.get(SPENT, {}), str(spec.attempt): [round(seconds, 3), gpus]}
        with self._writing():
            trial.set_user_attr(SPENT, spent)

    def gpu_seconds(self) -> float:
        """Returns GPUs x seconds of all attempts of the study."""
        return sum(row.gpu_s for row in (*self.rows(), *self.rows("baseline"), *confirmations(self.study_dir)))

    def _spend_left_behind(self, spec: TrialSpec) -> None:
        if spec.attempt and str(spec.attempt) not in self._trials[spec.kind, spec.number].user_attrs.get(SPENT, {}):
            seconds, gpus = left_behind(spec.folder(self.study_dir), spec.attempt, self.recipe.resources)
            if seconds:
                self.spend(spec, seconds, gpus)

    def add_zero_shot(self, metrics: dict[str, Any]) -> TrialRow | None:
        """Records the zero-shot model as a baseline, once.

        Args:
            metrics: What ``prepare`` returned; needs a finite ``objective``.

        Returns:
            Its row, or None when it is there already.
        """
        number = self._names("baseline").get(ZERO_SHOT)
        if number is None:
            spec = self._add("baseline", ZERO_SHOT, {"alpha": 0.0})
        elif self.rows("baseline")[number].outcome == "running":  # a kill came before it was told whole
            spec = TrialSpec("baseline", number, ZERO_SHOT, {"alpha": 0.0}, 1)
        else:
            return None
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        attributes = {"outcome": "complete", "alpha": 0.0, "metrics": numbers, "attempt": 1}
        return self._tell(spec, TrialState.COMPLETE, attributes, numbers["objective"])

    def rows(self, kind: Kind = "trial") -> list[TrialRow]:
        """Returns all trials (or baselines, or trainings of the confirm) in the order of their numbers."""
        return rows_of(kind, self._studies[kind])

    def done(self) -> bool:
        """Tells whether nothing is left to start."""
        return not self._waiting and not self._wants_more()

    def _may_try(self) -> bool:
        """Tells whether the baselines that constraints name have finished; notes their ID accuracy for the trials.

        Raises:
            NoSuccessfulTrialError: One of them never will.
        """
        if self._references_known:
            return True
        rows = {row.name: row for row in self.rows("baseline")}
        named = [rows.get(name) for name in self.recipe.search.constraints.id_drop]
        ended = [
            name
            for name, row in zip(self.recipe.search.constraints.id_drop, named, strict=True)
            if row is None or row.outcome not in ("complete", "running")
        ]
        if ended:
            raise NoSuccessfulTrialError([_without_reference(self.study_dir, name, rows.get(name)) for name in ended])
        if any(row is None or row.outcome == "running" for row in named):
            return False
        self.check_held()
        found = {row.name: row.metrics["id_accuracy"] for row in named if row is not None}
        files.write_json(self.study_dir / PREPARED / REFERENCES, found)
        self._references_known = True
        return True

    def _check_measured(self, spec: TrialSpec, result: Mapping[str, Any]) -> None:
        """Raises a ``StorageError`` when the result of a trial lacks what the search must tell of it."""
        if spec.kind != "trial":
            return
        missing, rule = missing_metrics(result["metrics"], self._constraints, self._rule is not None)
        if missing:
            place = str(spec.folder(self.study_dir) / RESULT)
            raise StorageError(Problem(place, rule, f"none of {', '.join(missing)}"))

    def _add_points(self, spec: TrialSpec, alpha: float, points: list[dict[str, float]]) -> None:
        """Tells the sampler of further points of a training; those that an earlier search has told are there."""
        study, trial = self._studies["trial"], self._trials["trial", spec.number]
        of_this = [each for each in study.get_trials(deepcopy=False) if each.user_attrs.get(TRAINING_OF) == spec.number]
        there = {each.params["alpha"] for each in of_this}
        within = trial.distributions["alpha"]
        new = further_points(points, alpha, there, lambda a: within._contains(within.to_internal_repr(a)))
        for point in new:
            frozen = optuna.trial.create_trial(
                values=[point["id_accuracy"], point["ood_accuracy"]],
                params={**trial.params, "alpha": point["alpha"]},
                distributions=trial.distributions,
                user_attrs={TRAINING_OF: spec.number},
                constraints=constraint_values("complete", point, self._constraints),
            )
            with self._writing():
                study.add_trial(frozen)

    def _tell(
        self, spec: TrialSpec, state: TrialState, attributes: dict[str, Any], objective: float | None = None
    ) -> TrialRow:
        """Writes attributes, other points, constraints, state, in this order: a kill in between leaves it RUNNING."""
        study, trial = self._studies[spec.kind], self._trials[spec.kind, spec.number]
        metrics = attributes.get("metrics", {})
        values: float | list[float] | None = objective
        constraints = constraint_values(attributes["outcome"], metrics, self._constraints)
        if spec.kind != "trial":
            constraints = {"trained": constraints["trained"]}
        elif self._rule is not None and state == TrialState.COMPLETE:
            values = [metrics["id_accuracy"], metrics["ood_accuracy"]]
        with self._writing():
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
        if isinstance(values, list):
            self._add_points(spec, attributes["alpha"], attributes["points"])
        with self._writing():
            for key, value in constraints.items():
                if key not in trial.constraints:
                    trial.set_constraint(key, value)
            study.tell(spec.number, values, state)
        if spec.kind == "trial" and state == TrialState.COMPLETE and spec.number in (known := self._known or {}):
            known[spec.number] = replace(known[spec.number], complete=True)
        row = row_of(spec.kind, self._storage.get_trial(trial_id(trial)))  # not one of all, which a list would hold
        self._retain(row)
        if spec.kind == "trial":
            self._note_best()
        return row

    def _retain(self, row: TrialRow) -> None:
        """Keeps the weights of the best ``search.keep_checkpoints`` trials and of all baselines, removes the others'.

        Called for every finished row at opening, and for each that is told: what a kill has left over goes then. A
        failed or cut training loses its checkpoints, too; a finished one has none. In a Pareto search those of all
        trainings on the front stay, since the best point moves along it; one that has left the front never comes back.
        """
        if row.outcome == "running":
            return
        spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
        if row.outcome != "complete":
            _remove(spec.folder(self.study_dir) / CHECKPOINTS)
            _remove(spec.folder(self.study_dir) / WEIGHTS)
        elif row.kind == "trial":
            self._kept[row.name] = row
            kept = sorted(self._kept.values(), key=lambda each: each.number)  # of equal points the first one counts
            ranked = best_first(kept if self._rule is None else front.stand(kept, self._rule))
            for worse in ranked[self.recipe.search.keep_checkpoints :]:
                if not worse.standing:
                    del self._kept[worse.name]
                    _remove(self.study_dir / "trials" / worse.name / WEIGHTS)

    def _note_best(self) -> None:
        """Writes ``best.yaml`` when the best trial, or its point on the front, has changed."""
        kept = sorted(self._kept.values(), key=lambda row: row.number) if self._knows_all else []
        best = best_row(kept if self._rule is None else front.stand(kept, self._rule))
        if best is not None and (best.name, best.alpha) != self._noted:
            self._lease.check()
            write_best(self.study_dir, self.resolved, best)
            self._noted = best.name, best.alpha

    def _spec(self, kind: Kind, trial: optuna.Trial) -> TrialSpec:
        """Returns a RUNNING trial's last attempt (0: none yet). Values that a kill cut off are drawn now."""
        attributes = trial.user_attrs
        with self._writing():
            if kind == "trial":
                self._check_trusted()  # nothing is drawn, so nothing is unpickled, without it
                values = space.draw(self._studies["trial"], trial, self.recipe)
                name = attributes.get("name") or trial_name(trial.number, values)
            else:
                values, name = attributes["values"], attributes["name"]
            if "name" not in attributes:
                trial.set_user_attr("name", name)
        self._trials[kind, trial.number] = trial
        return TrialSpec(kind, trial.number, name, values, attributes.get("attempt", 0))

    def _open_studies(self, *kinds: Kind) -> None:
        known = optuna.get_all_study_names(self._storage)
        for kind in kinds:
            name = study_name(self.study_dir, kind)
            rule = self._rule if kind == "trial" else None
            study = self._studies[kind] = _open(self._storage, name, name in known, 2 if rule else 1)
            if rule is not None and front.FRONT not in study.user_attrs:
                with self._writing():
                    study.set_user_attr(front.FRONT, asdict(rule))

    def _check_trusted(self) -> None:
        trust.check_trusted(self.study_dir, self.recipe, self._studies["trial"], self._trusted)

    def _wants_more(self) -> bool:
        study = self._studies["trial"]
        more = self._asks and len(trainings(study)) < self.recipe.search.trials
        return more and not space.used_up(study, self.recipe)

    def _enter(self, kind: Kind, trainings: Mapping[str, dict[str, Any]]) -> None:
        """Enters trainings with given values that are not in the study yet, and queues them."""
        names = self._names(kind)
        for name, values in trainings.items():
            if name not in names:
                self._waiting.append(self._add(kind, name, values))

    def _add(self, kind: Kind, name: str, values: dict[str, Any]) -> TrialSpec:
        study = self._studies[kind]
        with self._writing():
            frozen = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"name": name, "values": values})
            study.add_trial(frozen)
        added = study.get_trials(deepcopy=False)[-1]
        return self._spec(kind, running_trial(study, added))

    def _names(self, kind: Kind) -> dict[str, int]:
        """Returns the numbers of the baselines (or trainings of the confirm) by name."""
        return {trial.user_attrs["name"]: trial.number for trial in self._studies[kind].get_trials(deepcopy=False)}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._lease.check()
        with files.writing(self.study_dir / JOURNAL):
            yield

    def _began(self) -> bool:
        """Tells whether a training was ever started."""
        return any(row.attempt and row.name != ZERO_SHOT for row in self.rows() + self.rows("baseline"))


@contextlib.contextmanager
def open_study(study_dir: Path, recipe: Recipe, may: Collection[Direction] = ()) -> Iterator[Study]:
    """Opens a study for one search, or makes it: locks, repairs, checks the recipe. Call ``recover_running`` next.

    When model or data turn out unfit before a training has begun, or a new study gets no Ray, the study vanishes.

    Args:
        study_dir: The study directory; made when it is missing.
        recipe: The recipe of the search.
        may: How the search space may change; a change begins another generation of the study.

    Raises:
        StorageError: Another search runs on it, or the study cannot be read or written.
        RecipeError: It is the study of another recipe.
        UsageError: The folder holds something that is no study.
    """
    study_dir = study_dir.resolve()  # Optuna's own lock spins for ever on a relative path
    with study_lock(study_dir) as held:
        claimed = claim(study_dir, recipe, may)
        files.remove_remains(study_dir)
        notes = [note for note in [held.note] if note] + repair_journal(study_dir)
        with readable(study_dir):
            storage = storage_of(study_dir)
            with files.writing(study_dir / JOURNAL):
                remove_half_made(storage, claimed.generation)
            if claimed.space_changes:
                before = Study(study_dir, claimed.kept, held, [], storage)
                before._recover("trial")  # what has finished is told, as a trial of the space that it was drawn from
                with before._writing():
                    notes.append(begin_generation(storage, claimed.generation, claimed.recipe))
            elif may:
                notes.append(f"{' '.join(f'--{one}' for one in may)} has no effect: the space is that of the study")
            if claimed.is_news:
                held.check()
                record_recipe(study_dir, claimed)
            study = Study(study_dir, recipe, held, notes, storage)
            study.resolved = claimed.recipe
        with gone_if_nothing_began(study_dir, claimed.is_new, study._began):
            yield study


def _remove(path: Path) -> None:
    """Removes a file or folder that may be gone already."""
    with files.writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _open(storage: JournalStorage, name: str, known: bool, num_directions: int) -> optuna.Study:
    sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner()
    if known:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    directions = ["maximize"] * num_directions
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner, directions=directions)


def _without_reference(study_dir: Path, name: str, row: TrialRow | None) -> Problem:
    """Returns the message for a baseline under which no constraint can hold."""
    place = f"search.constraints.id_drop.{name}"
    rule = f"the baseline {name} must finish before a trial can begin"
    value = "none" if row is None else f"{row.outcome}: {row.reason}"
    step = "A study keeps its recipe: mend the baseline or the constraint, and begin a new study."
    if row is not None:
        spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
        step = f"See {spec.folder(study_dir) / LOG}. {step}"
    return Problem(place, rule, value, next_step=step)
