"""The journal of an open study: its Optuna studies, and all that is written to them of a training.

The journal holds three Optuna studies. The sampler sees ``search`` alone; ``baselines`` has the trainings that it is
compared with, and ``confirm`` those with fresh seeds.

PRUNED with a constraint, because Optuna's samplers ignore FAIL and would draw the same region again. Every finished
trial has the same constraints: ``trained``, and one per constraint of the recipe (0 where nothing was measured).

A Pareto search has two directions, ID and OOD accuracy. Its sampler gets other points of a training's alpha curve, too
(``front.spread_points``), as trials of their own that are no trainings (``rows.TRAINING_OF``). They are added before
the state of the training itself, so that a finished training has all of them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import JOURNAL, RESULT
from carft_ray.recipe.schema.constraints import VIOLATION, constraint_names, violations
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study import front, warm_start
from carft_ray.study.lease import Lease
from carft_ray.study.outcome import Kind, TrialRow, TrialSpec, trial_name
from carft_ray.study.proposals import space
from carft_ray.study.proposals.optuna_private import is_within, running_trial, trial_id
from carft_ray.study.proposals.pruning import PrunerTrial
from carft_ray.study.rows import TRAINING_OF, VALUE_ATTRIBUTE, intermediate_values, is_training, row_of, study_name

ROUNDING = 1e-9  # alphas are sums of steps: one that is the lowest but for rounding is within


class Journal:
    """Every write checks first that the study is still ours, and an ``OSError`` becomes a ``StorageError``.

    Attributes:
        studies: The Optuna studies that are open.
        rule: Which point of the front is the best; None: the search has one objective.
    """

    def __init__(self, study_dir: Path, recipe: Recipe, lease: Lease, storage: JournalStorage) -> None:
        self.studies: dict[Kind, optuna.Study] = {}
        self.rule = front.front_rule(recipe.search.objective)
        self._study_dir, self._recipe, self._lease, self._storage = study_dir, recipe, lease, storage
        self._constraints = constraint_names(recipe.search.constraints)
        self._trials: dict[tuple[Kind, int], optuna.Trial] = {}
        self._known: dict[int, PrunerTrial] | None = None  # by number, once a pruner needs them
        self.open("trial", "baseline")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block, the journal is written."""
        self._lease.check()
        with files.writing(self._study_dir / JOURNAL):
            yield

    def open(self, *kinds: Kind) -> None:
        """Opens or makes the Optuna studies of these kinds."""
        known = optuna.get_all_study_names(self._storage)
        for kind in kinds:
            name, rule = study_name(self._study_dir, kind), self.rule if kind == "trial" else None
            if name not in known:
                directions = [StudyDirection.MAXIMIZE] * (2 if rule else 1)
                optuna.create_study(study_name=name, storage=self._storage, directions=directions)
            sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner()
            study = optuna.load_study(study_name=name, storage=self._storage, sampler=sampler, pruner=pruner)
            self.studies[kind] = study
            if rule is not None and front.FRONT not in study.user_attrs:
                with self.writing():
                    study.set_user_attr(front.FRONT, asdict(rule))

    def numbers(self, kind: Kind) -> dict[str, int]:
        """Returns the numbers of the baselines (or trainings of the confirm) by name."""
        return {trial.user_attrs["name"]: trial.number for trial in self.studies[kind].get_trials(deepcopy=False)}

    def running(self, kind: Kind) -> list[optuna.Trial]:
        """Returns the trainings that are RUNNING."""
        study = self.studies[kind]
        found = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [running_trial(study, trial) for trial in found if is_training(trial)]

    def ask(self) -> TrialSpec:
        """Begins a new trial, with values of the sampler or of the recipe."""
        with self.writing():
            trial = space.ask(self.studies["trial"], self._recipe)
        return self.spec("trial", trial)

    def add(self, kind: Kind, name: str, values: dict[str, Any]) -> TrialSpec:
        """Enters a training with given values."""
        study = self.studies[kind]
        with self.writing():
            frozen = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"name": name, "values": values})
            study.add_trial(frozen)
        return self.spec(kind, running_trial(study, study.get_trials(deepcopy=False)[-1]))

    def spec(self, kind: Kind, trial: optuna.Trial) -> TrialSpec:
        """Returns a RUNNING trial's last attempt (0: none yet). Values that a kill cut off are drawn now."""
        attributes = trial.user_attrs
        with self.writing():
            if kind == "trial":
                values = space.draw(self.studies["trial"], trial, self._recipe)
                name = attributes.get("name") or trial_name(trial.number, values)
            else:
                values, name = attributes["values"], attributes["name"]
            if "name" not in attributes:
                trial.set_user_attr("name", name)
        self._trials[kind, trial.number] = trial
        return TrialSpec(kind, trial.number, name, values, attributes.get("attempt", 0))

    def attribute(self, spec: TrialSpec, name: str) -> Any:
        """Returns an attribute of a training; None where it has none."""
        return self._trials[spec.kind, spec.number].user_attrs.get(name)

    def note(self, spec: TrialSpec, attributes: Mapping[str, Any]) -> None:
        """Writes attributes of a training."""
        with self.writing():
            for name, value in attributes.items():
                self._trials[spec.kind, spec.number].set_user_attr(name, value)

    def take_in(self) -> list[str]:
        """Enters the trials of the recipe's ``search.warm_start``; returns what was done, a sentence each."""
        with self.writing():
            notes = warm_start.take_in(self.studies["trial"], self._study_dir, self._recipe)
        self._known = None  # trials of another study may have intermediate values
        return notes

    def pruner_trials(self) -> dict[int, PrunerTrial]:
        """Returns the trials with intermediate values, by number: only these count, and nobody else writes them."""
        if self._known is None:
            self._known = {
                trial.number: PrunerTrial(values, trial.state == TrialState.COMPLETE)
                for trial in self.studies["trial"].get_trials(deepcopy=False)
                if (values := intermediate_values(trial))
            }
        return self._known

    def report(self, spec: TrialSpec, percent: int, value: float) -> None:
        """Writes an intermediate value of a trial. Optuna takes none of a trial with two objectives."""
        if len(self.studies[spec.kind].directions) > 1:
            self.note(spec, {f"{VALUE_ATTRIBUTE}{percent}": value})
        else:
            with self.writing():
                self._trials[spec.kind, spec.number].report(value, percent)
        known = self.pruner_trials()
        before = known[spec.number].intermediate_values if spec.number in known else {}
        known[spec.number] = PrunerTrial({**before, percent: value}, complete=False)

    def complete(self, spec: TrialSpec, result: Mapping[str, Any]) -> TrialRow:
        """Writes a result.

        Args:
            spec: The attempt.
            result: Content of its ``result.json``.

        Raises:
            StorageError: The result of a trial lacks what its search needs.
        """
        lowest = None
        if spec.kind == "trial":
            lowest = self._recipe.search.alpha.lowest if self.rule else None
            missing, rule = missing_metrics(result["metrics"], self._constraints, self.rule is not None)
            if missing:
                place = str(spec.folder(self._study_dir) / RESULT)
                raise StorageError(Problem(place, rule, f"none of {', '.join(missing)}"))
        return self.tell(spec, TrialState.COMPLETE, result_attributes(result, lowest), result["objective"])

    def tell(
        self, spec: TrialSpec, state: TrialState, attributes: Mapping[str, Any], objective: float | None = None
    ) -> TrialRow:
        """Writes attributes, other points, constraints, state, in this order: a kill in between leaves it RUNNING."""
        study, trial = self.studies[spec.kind], self._trials[spec.kind, spec.number]
        metrics = attributes.get("metrics", {})
        values: float | list[float] | None = objective
        names = self._constraints if spec.kind == "trial" else ()
        self.note(spec, attributes)
        if spec.kind == "trial" and self.rule is not None and state == TrialState.COMPLETE:
            values = [metrics["id_accuracy"], metrics["ood_accuracy"]]
            self._add_points(spec, attributes["alpha"], attributes["points"])
        with self.writing():
            for key, value in constraint_values(attributes["outcome"], metrics, names).items():
                if key not in trial.constraints:
                    trial.set_constraint(key, value)
            study.tell(spec.number, values, state)
        if spec.kind == "trial" and state == TrialState.COMPLETE and spec.number in (known := self._known or {}):
            known[spec.number] = replace(known[spec.number], complete=True)
        return row_of(spec.kind, self._storage.get_trial(trial_id(trial)))  # not one of all, which a list would hold

    def _add_points(self, spec: TrialSpec, alpha: float, points: Sequence[dict[str, float]]) -> None:
        """Gives the sampler further points of a training that lie in the space; those of an earlier search stay."""
        study, trial = self.studies["trial"], self._trials["trial", spec.number]
        of_this = [each for each in study.get_trials(deepcopy=False) if each.user_attrs.get(TRAINING_OF) == spec.number]
        there = {each.params["alpha"] for each in of_this}
        within = trial.distributions["alpha"]
        for point in front.spread_points(points, alpha):
            if point["alpha"] in there or not is_within(within, point["alpha"]):
                continue
            frozen = optuna.trial.create_trial(
                values=[point["id_accuracy"], point["ood_accuracy"]],
                params={**trial.params, "alpha": point["alpha"]},
                distributions=trial.distributions,
                user_attrs={TRAINING_OF: spec.number},
                constraints=constraint_values("complete", point, self._constraints),
            )
            with self.writing():
                study.add_trial(frozen)


def constraint_values(outcome: str, metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Returns all constraints of a finished trial for the sampler; values above 0 are not met.

    Args:
        outcome: Of the training.
        metrics: Of a complete one: its violations are among them.
        names: Of the recipe's constraints.

    Returns:
        ``trained``, and one for each name: what was measured of a complete trial, else 0.
    """
    measured = violations(metrics) if outcome == "complete" else {}
    trained = 1.0 if outcome in ("diverged", "error") else -1.0
    return {"trained": trained, **{name: measured.get(name, 0.0) for name in names}}


def missing_metrics(metrics: Mapping[str, float], constraints: Sequence[str], pareto: bool) -> tuple[list[str], str]:
    """Returns which metrics a trial of a study must have and has not, and the rule that it breaks."""
    wanted = [VIOLATION + name for name in constraints]
    wanted += ["id_accuracy", "ood_accuracy"] if pareto else []
    rule = f"the metrics of a trial of this study must have {', '.join(wanted)}"
    return [name for name in wanted if name not in metrics], rule


def result_attributes(result: Mapping[str, Any], lowest: float | None = None) -> dict[str, Any]:
    """Returns what is kept of a result with its trial.

    Args:
        result: Content of a ``result.json``.
        lowest: Of a trial of a Pareto search, the lowest alpha that may be chosen; then all points of its curve that
            may be on the front are kept, too, the trial's own among them.
    """
    found = {
        "outcome": "complete",
        "alpha": result.get("alpha"),
        "at_chance": bool(result.get("at_chance", False)),
        "metrics": result["metrics"],
        "elapsed_s": result.get("elapsed_s"),
    }
    if lowest is None:
        return found
    curve = [point for point in result.get("curve", []) if point["alpha"] >= lowest - ROUNDING]
    if all(point["alpha"] != result["alpha"] for point in curve):
        curve.append({"alpha": result["alpha"], **result["metrics"]})
    return {**found, "objective": result["objective"], "points": curve}
