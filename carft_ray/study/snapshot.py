"""A study at one moment, read once from its log: nothing is claimed, and nothing written."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from carft_ray.errors import Problem, StorageError
from carft_ray.layout import COMMITS
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.log import Log, log_of
from carft_ray.study.expected import Expectation, expectation, stand
from carft_ray.study.holding import is_study
from carft_ray.study.ledger import Entry, read_ledger
from carft_ray.study.pareto_front import front_rule
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.rows import all_rows, best_row, num_finished, readable, searched
from carft_ray.study.training import Kind, TrialRow


@dataclass(frozen=True)
class Snapshot:
    """A study at one moment.

    Attributes:
        study_dir: The study directory.
        log: As far as it was read.
        recipe: Of the last search, or of the command that holds the study.
        trials: In the order of their numbers; ``running`` ones may run, wait, or belong to a dead search. Complete ones
            stand at the alpha of their values (``study.expected``), of a Pareto search at their point of the front.
        baselines: Zero-shot and the recipe's baselines, without their repeats.
        confirmations: Trainings with fresh seeds, of a confirm; none before one has begun.
        repeats: Of the baselines.
        soups: Means of weights (``study.soups``).
        expected: Of its tried values; None before a trial is complete, and of a Pareto search.
    """

    study_dir: Path
    log: Log
    recipe: Recipe
    trials: list[TrialRow]
    baselines: list[TrialRow]
    confirmations: list[TrialRow] = field(default_factory=list)
    repeats: list[TrialRow] = field(default_factory=list)
    expected: Expectation | None = None
    soups: list[TrialRow] = field(default_factory=list)

    @functools.cached_property
    def best(self) -> TrialRow | None:
        """The first training of the best values (``study.rows.rank``); of a Pareto search the training at its best
        point."""
        return best_row(self.trials)

    def trainings_of(self, row: TrialRow) -> list[TrialRow]:
        """Returns the complete trainings of a row's values, itself among them."""
        each = self.expected.by_name.get(row.name) if self.expected else None
        names = each.names if each else ()
        found = [one for one in (*self.all_baselines, *self.trials) if one.name in names]
        return found if row in found else [row]

    @functools.cached_property
    def ledger(self) -> list[Entry]:
        """The lines of its ledger.

        Raises:
            HoldOutError, StorageError: As ``ledger.read_ledger``.
        """
        return read_ledger(self.study_dir, self.log)

    @property
    def rows(self) -> list[TrialRow]:
        """All trainings: baselines, trials, those of a confirm, and soups."""
        return [*self.all_baselines, *self.trials, *self.confirmations, *self.soups]

    @property
    def searched(self) -> list[TrialRow]:
        """The trainings that count as trials (``rows.searched``)."""
        return searched(self.trials, self.repeats)

    @property
    def all_baselines(self) -> list[TrialRow]:
        """Baselines, then their repeats."""
        return [*self.baselines, *self.repeats]

    @property
    def num_finished(self) -> int:
        """Trials that have ended, well or not; repeats of baselines are among them."""
        return num_finished(self.searched)

    def of(self, kind: Kind) -> list[TrialRow]:
        """Returns the trainings of a kind."""
        return {
            "trial": self.trials,
            "baseline": self.baselines,
            "confirm": self.confirmations,
            "soup": self.soups,
        }[kind]


def snapshot(study_dir: Path, log: Log | None = None) -> Snapshot:
    """Reads a study, from the beginning of its log each time.

    Args:
        study_dir: The study directory.
        log: Its log, where it has been read by now and no storage of Optuna was opened over it.

    Raises:
        StorageError: There is no study, or its log or recipe is damaged.
    """
    if not is_study(study_dir):
        raise StorageError(Problem(str(study_dir), "must be a study", f"no {COMMITS}/ in it"))
    log = log or log_of(study_dir)
    with readable(log) as storage:
        rows = all_rows(storage)
    return standing(study_dir, log, study_recipe(study_dir, log), rows)


def standing(study_dir: Path, log: Log, recipe: Recipe, rows: Mapping[Kind, list[TrialRow]]) -> Snapshot:
    """Returns a study with what its values are expected to measure.

    Args:
        study_dir: The study directory.
        log: Its log.
        recipe: Of the study.
        rows: Its trainings, as the log has them.
    """
    trials, baselines = rows["trial"], rows["baseline"]
    found = None if front_rule(recipe.search) else expectation(recipe, trials, baselines)
    trials, baselines = stand(trials, found), stand(baselines, found)
    first = [row for row in baselines if not row.repeat_of]
    repeats = [row for row in baselines if row.repeat_of]
    return Snapshot(study_dir, log, recipe, trials, first, rows["confirm"], repeats, found, rows["soup"])
