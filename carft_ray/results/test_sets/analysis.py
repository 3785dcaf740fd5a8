"""The rules of selection judged on the test sets (`test --all-trials`): an analysis, which chooses nothing.

Candidates are all (trial, alpha) that the search could have chosen, of the trials whose weights are there. A rule picks
among them by validation alone; regret = best objective on the test sets - that of the pick. The oracle picks on the
test sets themselves: an upper bound, and no rule.

Shape letters: K candidates, B resamples, n images of one set. Accuracies are fractions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import BoolArray, FloatArray, correct_matrix, read_predictions
from carft_ray.layout import PREDICTIONS, WEIGHTS
from carft_ray.recipe.schema import Recipe
from carft_ray.results.reading.overview import folder_of
from carft_ray.results.reading.stored import read_stored
from carft_ray.results.statistics.bootstrap import NUM_RESAMPLES, resampled_accuracies
from carft_ray.results.statistics.selection import RULES, rule_values
from carft_ray.results.test_sets.summary import FORMAT_VERSION, ReadRecord, objective_on_test
from carft_ray.study.ledger import ANALYSIS
from carft_ray.study.rows import best_row, require_finished, trials
from carft_ray.words import counted

SEARCH, ORACLE = "search", "oracle"  # lines of the table in addition to those of the rules


@dataclass(frozen=True)
class JudgedTrial:
    """A trial that is read: its name, the alpha that validation chose, and all alphas that could have been chosen."""

    name: str
    alpha: float
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """What an analysis is of.

    Attributes:
        trials: Those with weights, in the order of the search.
        best: Name of the search's best trial.
        num_complete: Complete trials of the study, with weights or without.
    """

    trials: tuple[JudgedTrial, ...]
    best: str
    num_complete: int


@dataclass(frozen=True)
class TestRegret:
    """A line of the table.

    Attributes:
        rule: A rule of selection, ``search`` (what the study's search calls its best) or ``oracle``.
        name: Of the trial that it picks; None where the rule is not defined.
        alpha: That it picks.
        objective: Of the pick, on the test sets.
        regret: Objective of the oracle's pick - its own.
        se: Bootstrap standard error of the regret, both picks made again per resample; None: not made again.
        note: A remark.
    """

    rule: str
    name: str | None
    alpha: float | None
    objective: float | None
    regret: float | None
    se: float | None
    note: str = ""

    __test__ = False  # the word is the test sets', not pytest's


def judged_trials(study_dir: Path, recipe: Recipe) -> Judged:
    """Returns the complete trials of a study whose weights are there, with the alphas that could have been chosen.

    Raises:
        NoSuccessfulTrialError: There is none.
        StorageError, DataError: Stored predictions are missing, damaged or of different images.
    """
    rows = trials(study_dir)
    complete = [row for row in rows if row.outcome == "complete" and row.objective is not None]
    kept = [row for row in complete if (folder_of(study_dir, row) / WEIGHTS).exists()]
    best = require_finished(study_dir, best_row(rows))
    if not kept:
        step = "A search begun with --set search.keep_checkpoints=N keeps the weights of its best N trials."
        value = "none whose weights are there"
        raise NoSuccessfulTrialError(Problem(str(study_dir), "must have a finished trial", value, next_step=step))
    stored = read_stored(study_dir, recipe, kept, objective_spec(recipe))
    judged = []
    for row, candidate in zip(kept, stored.candidates, strict=True):
        alpha = row.alpha or 0.0
        allowed = {choice for choice in candidate.alphas if choice >= recipe.search.alpha.lowest - 1e-9}
        judged.append(JudgedTrial(row.name, alpha, tuple(sorted(allowed | {alpha}))))
    return Judged(tuple(judged), best.name, len(complete))


def judged_again(details: Mapping[str, Any]) -> Judged:
    """Returns what a line of the ledger has of an analysis."""
    judged = [JudgedTrial(**{**trial, "alphas": tuple(trial["alphas"])}) for trial in details["trials"]]
    return Judged(tuple(judged), details["best"], details["num_complete"])


def analyse(
    study_dir: Path, recipe: Recipe, judged: Judged, tables: Mapping[str, pa.Table], record: ReadRecord
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        study_dir: The study directory.
        recipe: Of the study.
        judged: What was read.
        tables: Predictions on the test sets by the folder of the training.
        record: Of this read.

    Raises:
        StorageError, DataError: Stored validation predictions are missing, damaged or of different images.
    """
    validation, test = objective_spec(recipe), objective_on_test(recipe)
    stored = {trial.name: read_predictions(study_dir / "trials" / trial.name / PREDICTIONS) for trial in judged.trials}
    read = {trial.name: tables[f"trials/{trial.name}"] for trial in judged.trials}
    points = [(trial.name, alpha) for trial in judged.trials for alpha in trial.alphas]
    correct = {
        name: correct_matrix([(source[trial], alpha) for trial, alpha in points], name)
        for spec, source in ((validation, stored), (test, read))
        for name in spec.sets
    }
    chosen = next(((each.name, each.alpha) for each in judged.trials if each.name == judged.best), None)
    rules = regrets_on_test(points, correct, validation, test, chosen)
    num_images = {name: int(correct[name].shape[1]) for name in test.sets}
    accuracies = {name: correct[name].mean(axis=1) for name in num_images}
    objectives = test.values(accuracies)
    found = [
        {
            "name": name,
            "alpha": alpha,
            "objective": float(objectives[k]),
            "accuracies": {set_name: float(values[k]) for set_name, values in accuracies.items()},
        }
        for k, (name, alpha) in enumerate(points)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "purpose": ANALYSIS,
        **asdict(record),
        "num_trials": len(judged.trials),
        "num_complete": judged.num_complete,
        "sets": num_images,
        "objective": {"kind": test.kind, "id_weight": test.id_weight},
        "rules": [vars(line) for line in rules],
        "candidates": found,
        "lines": [*record.lines("Analysis, test read"), *_lines(judged, len(points), num_images)],
    }


def regrets_on_test(
    points: Sequence[tuple[str, float]],
    correct: Mapping[str, BoolArray],
    validation: ObjectiveSpec,
    test: ObjectiveSpec,
    chosen: tuple[str, float] | None,
    num_resamples: int = NUM_RESAMPLES,
) -> list[TestRegret]:
    """Returns what each rule of selection has lost on the test sets, and the oracle.

    Validation and test images are resampled apart. The best value is noisy itself: all regrets are too high alike.

    Args:
        points: The candidates (trial, alpha).
        correct: Per set of both objectives, bool [K, n], in the order of ``points``.
        validation: The objective over the validation sets: all that a rule sees.
        test: The objective over the test sets.
        chosen: What the search itself chose, one of ``points``; None: it is not among them.
        num_resamples: B.
    """
    accuracies = {name: x.mean(axis=1) for name, x in correct.items()}
    again = resampled_accuracies(correct, num_resamples)
    target, spread = test.values(accuracies), test.values(again)
    now, resampled = rule_values(validation, accuracies), rule_values(validation, again)
    best = float(target.max())

    def line(rule: str, k: int, se: float | None, note: str = "") -> TestRegret:
        return TestRegret(rule, *points[k], float(target[k]), best - float(target[k]), se, note)

    lines = []
    for rule in RULES:
        if rule not in now:
            lines.append(TestRegret(rule, None, None, None, None, None, "needs an OOD validation set"))
            continue
        picks: FloatArray = np.take_along_axis(spread, resampled[rule].argmax(axis=1)[:, None], axis=1)[:, 0]
        se = float(np.std(spread.max(axis=1) - picks, ddof=1))
        lines.append(line(rule, int(now[rule].argmax()), se))
    lines.append(replace(lines[RULES.index("ood_val")], rule="leave_one_domain_out", note="same as ood_val"))
    if chosen is not None:
        lines.append(line(SEARCH, points.index(chosen), None, "the best trial at its alpha, from its fitted curve"))
    oracle = "upper bound: picked on the test images themselves, so it is no result"
    return [*lines, line(ORACLE, int(target.argmax()), None, oracle)]


def _lines(judged: Judged, num_points: int, num_images: Mapping[str, int]) -> list[str]:
    """Returns the text next to the table of an analysis."""
    some = f"{len(judged.trials)} of {counted(judged.num_complete, 'complete trial')}"
    lines = [
        f"It chooses nothing. Trials with weights, and read: {some}, {counted(num_points, 'candidate')} (trial, alpha) "
        "in all; the rules pick among these alone."
    ]
    if len(judged.trials) < judged.num_complete:
        lines.append(
            "A search keeps the weights of its best search.keep_checkpoints trials; to judge all, begin it with "
            f"--set search.keep_checkpoints={judged.num_complete}. Among the best alone every rule loses little."
        )
    images = ", ".join(f"{name} ({counted(count, 'image')})" for name, count in num_images.items())
    return [*lines, f"Objective over {images}. The best value is noisy itself, so all regrets are too high alike."]
