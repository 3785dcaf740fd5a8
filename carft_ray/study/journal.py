"""The journal of an open study: its Optuna studies, and all that is written to them of a training.

What belongs together is one commit of the log: a trial with its values and name, a training's attributes with its
points, constraints and state. No ``Trial`` of Optuna's outlives a commit.

The log holds three Optuna studies. The sampler sees ``search`` alone; ``baselines`` has the trainings that it is
compared with, and ``confirm`` those with fresh seeds.

PRUNED with a constraint, because Optuna's samplers ignore FAIL and would draw the same region again. Every finished
trial has the same constraints: ``trained``, and one per constraint of the recipe (0 where nothing was measured).

A Pareto search has two directions, ID and OOD accuracy. Its sampler gets other points of a training's alpha curve, too
(``pareto_front.spread_points``), as trials of their own that are no trainings (``attributes.TRAINING_OF``).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from carft_ray.errors import Problem, StorageError
from carft_ray.layout import RESULT
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import VIOLATION, constraint_names, violations
from carft_ray.store.log import Log
from carft_ray.study import attributes as attr
from carft_ray.study import pareto_front, warm_start
from carft_ray.study.proposals import optuna_samplers
from carft_ray.study.proposals.optuna_private import is_within, running_trial, trial_id
from carft_ray.study.proposals.pruning import PrunerTrial
from carft_ray.study.rows import STUDY_NAMES, intermediate_values, is_training, row_of, values_of
from carft_ray.study.training import Kind, TrialRow, TrialSpec


class Journal:
    """Every write is a commit of the log, which is refused when the study is no longer ours.

    Attributes:
        studies: The Optuna studies that are open.
        rule: Which point of the front is the best; None: the search has one objective.
    """

    def __init__(self, study_dir: Path, recipe: Recipe, log: Log, storage: JournalStorage) -> None:
        self.studies: dict[Kind, optuna.Study] = {}
        self.rule = pareto_front.front_rule(recipe.search)
        self._study_dir, self._recipe, self._log, self._storage = study_dir, recipe, log, storage
        self._constraints = constraint_names(recipe.search.constraints)
        self._ids: dict[tuple[Kind, int], int] = {}  # of trainings in the storage
        self._known: dict[int, PrunerTrial] | None = None  # by number, once a pruner needs them
        with log.commit():
            self.open("trial", "baseline")

    def open(self, *kinds: Kind) -> None:
        """Opens or makes the Optuna studies of these kinds."""
        known = optuna.get_all_study_names(self._storage)
        for kind in kinds:
            name, rule = STUDY_NAMES[kind], self.rule if kind == "trial" else None
            if name not in known:
                directions = [StudyDirection.MAXIMIZE] * (2 if rule else 1)
                optuna.create_study(study_name=name, storage=self._storage, directions=directions)
            sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner()
            study = optuna.load_study(study_name=name, storage=self._storage, sampler=sampler, pruner=pruner)
            self.studies[kind] = study
            if rule is not None and attr.FRONT not in study.user_attrs:
                study.set_user_attr(attr.FRONT, asdict(rule))

    def has(self, kind: Kind) -> bool:
        """Tells whether the log has the Optuna study of a kind."""
        return STUDY_NAMES[kind] in optuna.get_all_study_names(self._storage)

    def numbers(self, kind: Kind) -> dict[str, int]:
        """Returns the numbers of the baselines (or trainings of the confirm) by name."""
        return {trial.user_attrs[attr.NAME]: trial.number for trial in self.studies[kind].get_trials(deepcopy=False)}

    def running(self, kind: Kind) -> list[TrialSpec]:
        """Returns the last attempts of the trainings that are RUNNING; 0: there was none yet."""
        found = self.studies[kind].get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [self._spec(kind, trial) for trial in found if is_training(trial)]

    def ask(self) -> TrialSpec:
        """Begins a new trial, with values of the sampler or of the recipe."""
        study = self.studies["trial"]
        with self._log.commit():
            trial = optuna_samplers.ask(study, self._recipe)
            trial.set_user_attr(attr.NAME, trial_name(trial.number, optuna_samplers.draw(study, trial, self._recipe)))
            return self._spec("trial", self._storage.get_trial(trial_id(trial)))

    def add(self, kind: Kind, name: str, values: dict[str, Any]) -> TrialSpec:
        """Enters a training with given values, or a soup of what is given (``typed.Soup``)."""
        of_soup = {attr.VALUES: {}, attr.SOUP: values}
        return self._add(kind, {attr.NAME: name, **(of_soup if kind == "soup" else {attr.VALUES: values})})

    def repeat(self, first: TrialRow, seed: int) -> TrialSpec:
        """Enters a training of the same values with another seed."""
        attributes: dict[str, Any] = {attr.REPEAT_OF: first.name, attr.SEED: seed}
        values = {name: value for name, value in first.values.items() if name != "seed"}
        if first.kind != "trial":
            return self._add(first.kind, {attr.NAME: f"{first.name}-seed{seed}", attr.VALUES: values, **attributes})
        trials = self.studies["trial"].get_trials(deepcopy=False)
        [frozen] = (trial for trial in trials if trial.number == first.number)
        attributes[attr.NAME] = trial_name(len(trials), {**values, "seed": seed})
        return self._add("trial", attributes, params=frozen.params, distributions=frozen.distributions)

    def _add(self, kind: Kind, attributes: Mapping[str, Any], **drawn: Any) -> TrialSpec:
        study = self.studies[kind]
        study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes), **drawn))
        return self._spec(kind, study.get_trials(deepcopy=False)[-1])

    def _spec(self, kind: Kind, trial: FrozenTrial) -> TrialSpec:
        attributes, values = trial.user_attrs, values_of(trial)
        places = {name: place for place, name in enumerate(self._recipe.search.space)}
        values = dict(sorted(values.items(), key=lambda pair: places.get(pair[0], len(places))))
        self._ids[kind, trial.number] = trial_id(trial)
        name, attempt, soup = attributes.get(attr.NAME, ""), attributes.get(attr.ATTEMPT, 0), attributes.get(attr.SOUP)
        return TrialSpec(kind, trial.number, name, values, attempt, soup=soup)

    def _trial(self, spec: TrialSpec) -> FrozenTrial:
        return self._storage.get_trial(self._ids[spec.kind, spec.number])

    def attribute(self, spec: TrialSpec, name: str) -> Any:
        """Returns an attribute of a training; None where it has none."""
        return self._trial(spec).user_attrs.get(name)

    def note(self, spec: TrialSpec, attributes: Mapping[str, Any]) -> None:
        """Writes attributes of a training."""
        with self._log.commit():
            for name, value in attributes.items():
                self._storage.set_trial_user_attr(self._ids[spec.kind, spec.number], name, value)

    def take_in(self, sources: Sequence[Path]) -> list[str]:
        """Enters the trials of studies of ``search.warm_start``; returns what was done, a sentence each."""
        notes = warm_start.take_in(self.studies["trial"], self._log, sources, self._recipe)
        self._known = None  # trials of another study may have intermediate values
        return notes

    def pruner_trials(self) -> dict[int, PrunerTrial]:
        """Returns the trials with intermediate values, by number: only these count, and nobody else writes them."""
        if self._known is None:
            self._known = {}
            for trial in self.studies["trial"].get_trials(deepcopy=False):
                self._see(trial)
        return self._known

    def _see(self, trial: FrozenTrial) -> None:
        if self._known is not None and (values := intermediate_values(trial)):
            self._known[trial.number] = PrunerTrial(values, trial.state == TrialState.COMPLETE)

    def report(self, spec: TrialSpec, percent: int, value: float) -> None:
        """Writes an intermediate value of a trial. Optuna takes none of a trial with two objectives."""
        if len(self.studies[spec.kind].directions) > 1:
            self.note(spec, {f"{attr.LOOK}{percent}": value})
        else:
            self._storage.set_trial_intermediate_value(self._ids[spec.kind, spec.number], percent, value)
        self._see(self._trial(spec))

    def complete(
        self, spec: TrialSpec, result: Mapping[str, Any], more: Mapping[str, Any], foresee: Callable[[TrialRow], None]
    ) -> TrialRow:
        """Writes a result.

        Args:
            spec: The attempt.
            result: Content of its ``result.json``.
            more: Further attributes, such as the SHA-256 of that file.
            foresee: Given the row before its files are uploaded (``Retention.foresee``).

        Raises:
            StorageError: The result of a trial lacks what its search needs.
        """
        lowest = self._recipe.search.alpha.lowest if spec.kind in ("trial", "baseline") else None
        if spec.kind == "trial":
            missing, rule = missing_metrics(result["metrics"], self._constraints, self.rule is not None)
            if missing:
                place = str(spec.place(self._study_dir) / RESULT)
                raise StorageError(Problem(place, rule, f"none of {', '.join(missing)}"))
        attributes = {**result_attributes(result, lowest), **more}
        if spec.kind == "trial" and self.rule is not None:
            attributes[attr.OBJECTIVE] = result["objective"]
        known = {name: attributes[name] for name in (attr.OUTCOME, attr.MEASURED, attr.ALPHA)}
        points = tuple(attributes.get(attr.POINTS, ()))
        foresee(TrialRow(**vars(spec), **known, objective=result["objective"], points=points))
        self._log.store.has_ended(spec.attempt_name)
        return self.tell(spec, TrialState.COMPLETE, attributes, result["objective"])

    def tell(
        self, spec: TrialSpec, state: TrialState, attributes: Mapping[str, Any], objective: float | None = None
    ) -> TrialRow:
        """Writes attributes, other points, constraints, state."""
        study, metrics = self.studies[spec.kind], attributes.get(attr.MEASURED, {})
        values: float | list[float] | None = objective
        names = self._constraints if spec.kind == "trial" else ()
        self._log.store.keep_files()
        with self._log.commit():
            self.note(spec, attributes)
            if spec.kind == "trial" and self.rule is not None and state == TrialState.COMPLETE:
                values = [metrics["id_accuracy"], metrics["ood_accuracy"]]
                self._add_points(spec, attributes[attr.ALPHA], attributes[attr.POINTS])
            trial = running_trial(study, self._trial(spec))
            for key, value in constraint_values(attributes[attr.OUTCOME], metrics, names).items():
                trial.set_constraint(key, value)
            study.tell(spec.number, values, state)
        ended = self._trial(spec)  # not one of all, which a list would hold
        if spec.kind == "trial":
            self._see(ended)
        return row_of(spec.kind, ended)

    def _add_points(self, spec: TrialSpec, alpha: float, points: Sequence[dict[str, float]]) -> None:
        """Gives the sampler further points of a training that lie in the space."""
        study, trial = self.studies["trial"], self._trial(spec)
        within = trial.distributions["alpha"]
        for point in pareto_front.spread_points(points, alpha):
            if not is_within(within, point["alpha"]):
                continue
            frozen = optuna.trial.create_trial(
                values=[point["id_accuracy"], point["ood_accuracy"]],
                params={**trial.params, "alpha": point["alpha"]},
                distributions=trial.distributions,
                user_attrs={attr.TRAINING_OF: spec.number},
                constraints=constraint_values("complete", point, self._constraints),
            )
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
        lowest: Of a trial or baseline, the lowest alpha that may be chosen; then all points of its curve from there
            on are kept, too, its own among them.
    """
    found = {
        attr.OUTCOME: "complete",
        attr.ALPHA: result.get("alpha"),
        attr.AT_CHANCE: bool(result.get("at_chance", False)),
        attr.MEASURED: result["metrics"],
        attr.ELAPSED_S: result.get("elapsed_s"),
    }
    if lowest is None:
        return found
    own = result.get("alpha")
    curve = [point for point in result.get("curve", []) if point["alpha"] >= lowest - attr.ROUNDING]
    if own is not None and all(point["alpha"] != own for point in curve):
        curve.append({"alpha": own, **result["metrics"]})
    return {**found, attr.POINTS: curve}


def trial_name(number: int, values: Mapping[str, Any]) -> str:
    """Returns the name of a trial's folder: number and hash of the values."""
    text = json.dumps(values, sort_keys=True)
    return f"t{number:04d}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
