"""The study: an Optuna journal on disk that is the only state of a search. Nothing here knows Ray.

The journal holds three Optuna studies. The sampler sees ``search`` alone; ``baselines`` stands beside it, and so does
``confirm`` once the winner is trained again with fresh seeds.

| what happened to a training | outcome | Optuna sees |
|---|---|---|
| valid ``result.json`` | complete | COMPLETE, constraint ``trained`` = -1 |
| not finite; an exception that came back | diverged / error | PRUNED, constraint ``trained`` = 1 |
| its processes were lost, again and again | error | FAIL: no verdict on the values |
| stopped; driver killed; one process lost | running | nothing: RUNNING until it is adopted |

PRUNED with a constraint, because Optuna's samplers ignore FAIL and would draw the same region again.
"""

import contextlib
import shutil
from collections import deque
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from carft_ray import files
from carft_ray.recipe.schema import Recipe
from carft_ray.search import space
from carft_ray.search.folder import JOURNAL, claim, gone_if_nothing_began, repair_journal, study_lock
from carft_ray.search.lease import Lease
from carft_ray.search.outcome import (
    CHECKPOINTS,
    WEIGHTS,
    Kind,
    TrialRow,
    TrialSpec,
    failure_error,
    read_failure,
    read_result,
    trial_name,
)
from carft_ray.search.rows import (
    STUDY_NAMES,
    ZERO_SHOT,
    best_first,
    confirmations,
    readable,
    row_of,
    rows_of,
    storage_of,
)
from carft_ray.search.spent import ATTRIBUTE as SPENT
from carft_ray.search.spent import left_behind

# attempts that may fail before the study is told: an exception must come back once, a process may be lost twice
MAX_FAILED_ATTEMPTS = {"error": 2, "lost": 3}


class Study:
    """An open study; its lock is held. Use ``open_study``.

    Attributes:
        notes: What was repaired or found at opening, one sentence each.
    """

    def __init__(self, study_dir: Path, recipe: Recipe, held: Lease, notes: list[str]) -> None:
        self.study_dir = study_dir
        self.recipe = recipe
        self.notes = notes
        self._lease = held
        storage = storage_of(study_dir)
        self._storage = storage
        self._studies: dict[Kind, optuna.Study] = {}
        self._open_studies("trial", "baseline")
        self._asks = True  # whether the sampler proposes new trials
        self._trials: dict[tuple[Kind, int], optuna.Trial] = {}
        self._waiting: deque[TrialSpec] = deque()
        self._kept: dict[str, TrialRow] = {}  # trials whose weights stay, by name

    @property
    def taken_over(self) -> bool:
        """Whether another process holds the study by now; then nothing in its folder is ours to write."""
        return self._lease.lost()

    def check_held(self) -> None:
        """Raises a ``StorageError`` when another process has taken the study over."""
        self._lease.check()

    def adopt(self) -> list[TrialRow]:
        """Takes over what an earlier search left RUNNING: tells what has finished, queues the rest for another attempt.

        Removes the weights that are not to be kept, too.

        Returns:
            Rows of what was told.
        """
        self._enter("baseline", self.recipe.search.baselines)
        told = self._take_over("baseline") + self._take_over("trial")
        for row in self.rows("baseline") + self.rows():
            self._retain(row)
        return told

    def adopt_confirm(self, trainings: Mapping[str, dict[str, Any]]) -> list[TrialRow]:
        """As ``adopt``, for the trainings of a confirm: these and no others run until the study is opened again.

        Args:
            trainings: Values over the recipe's ``train`` by name; those that are finished already are left alone.

        Returns:
            Rows of what was told.
        """
        self._asks = False
        self._open_studies("confirm")
        self._enter("confirm", trainings)
        return self._take_over("confirm", trainings)

    def _take_over(self, kind: Kind, wanted: Container[str] | None = None) -> list[TrialRow]:
        """Tells or queues what is RUNNING in one of the Optuna studies; None wants everything."""
        told = []
        for frozen in self._studies[kind].get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            spec = self._spec(kind, optuna.trial.Trial(self._studies[kind], frozen._trial_id))
            if wanted is not None and spec.name not in wanted:
                continue
            self._spend_left_behind(spec)
            failure = read_failure(spec.folder(self.study_dir), spec.attempt)
            mended = failure is not None and failure.outcome == "fatal"  # the user had the time to mend it
            row = self.settle(spec) if spec.attempt and not mended else None
            if row:
                told.append(row)
            elif spec not in self._waiting and spec.name != ZERO_SHOT:  # which is told, and never trained
                self._waiting.append(spec)
        return told

    def next(self) -> TrialSpec | None:
        """Returns the next attempt to start, or None when nothing is left but what runs already.

        Baselines come first, then adopted trials, then new ones until the recipe's number is reached.
        """
        if not self._waiting and self._wants_more():
            with self._writing():
                trial = self._studies["trial"].ask()
            self._waiting.append(self._spec("trial", trial))
        if not self._waiting:
            return None
        waiting = self._waiting.popleft()
        spec = TrialSpec(waiting.kind, waiting.number, waiting.name, waiting.values, waiting.attempt + 1)
        trial = self._trials[spec.kind, spec.number]
        with self._writing():
            trial.set_user_attr("attempt", spec.attempt)
        return spec

    def settle(self, spec: TrialSpec) -> TrialRow | None:
        """Tells the study how an attempt ended, by what lies in its folder.

        Returns:
            The row; None when the folder has no answer, or the same training gets another attempt.

        Raises:
            CarftError: The training found a fault that is not in its values; it stays RUNNING.
        """
        folder = spec.folder(self.study_dir)
        result = read_result(folder)
        if result is not None:
            return self._tell(spec, TrialState.COMPLETE, _attributes(result), result["objective"])
        failure = read_failure(folder, spec.attempt)
        if failure is None:
            return None
        if failure.outcome == "fatal":
            raise failure_error(failure, f"{spec.kind} {spec.name}", folder)
        if failure.outcome == "error" and self._again(spec, "error"):
            return None
        attributes = {"outcome": failure.outcome, "reason": failure.reason}
        return self._tell(spec, TrialState.PRUNED, attributes)

    def lost(self, spec: TrialSpec, reason: str) -> TrialRow | None:
        """Notes that the processes of an attempt are gone without a word.

        Returns:
            The row when it was the last attempt, told as FAIL; None when the training gets another one.
        """
        if self._again(spec, "lost"):
            return None
        return self._tell(spec, TrialState.FAIL, {"outcome": "error", "reason": reason})

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

    def tell_zero_shot(self, metrics: dict[str, Any]) -> TrialRow | None:
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

    def waits(self, spec: TrialSpec) -> bool:
        """Tells whether the training of an attempt is queued for another one."""
        return any((waiting.kind, waiting.number) == (spec.kind, spec.number) for waiting in self._waiting)

    def _again(self, spec: TrialSpec, how: str) -> bool:
        """Queues another attempt unless too many have failed; the failed attempts are kept with the trial."""
        trial = self._trials[spec.kind, spec.number]
        failed = sorted({*trial.user_attrs.get("failed_attempts", []), spec.attempt})
        with self._writing():
            trial.set_user_attr("failed_attempts", failed)
        if len(failed) >= MAX_FAILED_ATTEMPTS[how]:
            return False
        self._waiting.append(spec)
        return True

    def _tell(
        self, spec: TrialSpec, state: TrialState, attributes: dict[str, Any], objective: float | None = None
    ) -> TrialRow:
        """Writes attributes, constraint and state, in this order: a kill in between leaves the trial RUNNING."""
        study, trial = self._studies[spec.kind], self._trials[spec.kind, spec.number]
        with self._writing():
            for key, value in attributes.items():
                trial.set_user_attr(key, value)
            if "trained" not in trial.constraints:
                trial.set_constraint("trained", -1.0 if state == TrialState.COMPLETE else 1.0)
            study.tell(spec.number, objective, state)
        row = row_of(spec.kind, study.get_trials(deepcopy=False)[spec.number])
        self._retain(row)
        return row

    def _retain(self, row: TrialRow) -> None:
        """Keeps the weights of the best ``search.keep_checkpoints`` trials and of all baselines, removes the others'.

        Called for every finished row at opening, and for each that is told: what a kill has left over goes then. A
        failed training loses its checkpoints, too; a finished one has none.
        """
        if row.outcome == "running":
            return
        spec = TrialSpec(row.kind, row.number, row.name, row.values, row.attempt)
        if row.outcome != "complete":
            _remove(spec.folder(self.study_dir) / CHECKPOINTS)
            _remove(spec.folder(self.study_dir) / WEIGHTS)
        elif row.kind == "trial":
            self._kept[row.name] = row
            if len(self._kept) > self.recipe.search.keep_checkpoints:
                worst = best_first(self._kept.values())[-1]
                del self._kept[worst.name]
                _remove(self.study_dir / "trials" / worst.name / WEIGHTS)

    def _spec(self, kind: Kind, trial: optuna.Trial) -> TrialSpec:
        """Returns a RUNNING trial's last attempt (0: none yet). Values that a kill cut off are drawn now."""
        attributes = trial.user_attrs
        with self._writing():
            if kind == "trial":
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
            name = STUDY_NAMES[kind]
            self._studies[kind] = _open(self._storage, name, name in known)

    def _wants_more(self) -> bool:
        return self._asks and len(self._studies["trial"].get_trials(deepcopy=False)) < self.recipe.search.trials

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
        return self._spec(kind, optuna.trial.Trial(study, added._trial_id))

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
def open_study(study_dir: Path, recipe: Recipe, base_dir: Path) -> Iterator[Study]:
    """Opens a study for one search, or makes it: locks, repairs, checks the recipe. Call ``adopt`` next.

    When model or data turn out unfit before a training has begun, or a new study gets no Ray, the study vanishes.

    Args:
        study_dir: The study directory; made when it is missing.
        recipe: The recipe of the search.
        base_dir: Folder from which the recipe's relative paths count.

    Raises:
        StorageError: Another search runs on it, or the study cannot be read or written.
        RecipeError: It is the study of another recipe.
        UsageError: The folder holds something that is no study.
    """
    study_dir = study_dir.resolve()  # Optuna's own lock spins for ever on a relative path
    with study_lock(study_dir) as held:
        is_new = claim(study_dir, recipe, base_dir)
        files.remove_remains(study_dir)
        notes = [note for note in [held.note] if note] + repair_journal(study_dir)
        with readable(study_dir):
            study = Study(study_dir, recipe, held, notes)
        with gone_if_nothing_began(study_dir, is_new, study._began):
            yield study


def _remove(path: Path) -> None:
    """Removes a file or folder that may be gone already."""
    with files.writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _open(storage: JournalStorage, name: str, known: bool) -> optuna.Study:
    sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner()
    if known:
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    return optuna.create_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner, direction="maximize")


def _attributes(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "outcome": "complete",
        "alpha": result.get("alpha"),
        "metrics": result["metrics"],
        "elapsed_s": result.get("elapsed_s"),
    }
