"""What a confirm shows: means over fresh seeds, intervals over seeds and images, optimism of the search, the headline.

Validation images, fresh seeds: the luck of the seeds is gone, that of the images is not. `test` has new images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray import files
from carft_ray.data.copies.shared_images import read_shared, shared_counts
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions
from carft_ray.layout import CONFIRM, PREDICTIONS, PREPARED, SUMMARY, ZERO_SHOT_TABLE
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.confirmation import PlanRow, Stage
from carft_ray.results.statistics.intervals import values_by_seed
from carft_ray.results.statistics.paired import compare, comparison_lines
from carft_ray.study.rows import confirmations
from carft_ray.study.training import TrialRow, file_of

LABEL = "validation images, fresh seeds"


def choose(study_dir: Path, spec: ObjectiveSpec, stage: Stage) -> str:
    """Returns the name of the trial with the largest mean objective over the fresh seeds; the first of equals.

    Raises:
        NoSuccessfulTrialError: None of them was trained with all seeds.
    """
    complete = complete_trainings(confirmations(study_dir))
    means = {
        row.name: float(np.mean(values_by_seed(spec, row_correct(study_dir, spec, trainings, row))))
        for row, trainings in whole_rows(stage, complete)
        if row.role != "baseline"
    }
    if not means:
        rule = "at least one of the trials must train with all fresh seeds"
        raise NoSuccessfulTrialError(Problem(str(study_dir / CONFIRM), rule, "none did"))
    return max(means, key=lambda name: means[name])


def summarise(study_dir: Path, recipe: Recipe, first: Stage, second: Stage | None) -> dict[str, Any]:
    """Compares the rows of the last stage, writes ``confirm/summary.json`` and returns its content.

    A configuration that failed with some seed has no mean over all of them: it is named, and not compared.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.
        first: The first stage.
        second: The second one, of ``--winner confirmed``.

    Raises:
        NoSuccessfulTrialError: The winner failed with a fresh seed.
        StorageError: Predictions are damaged, or the summary cannot be written.
    """
    stage, spec, trained = second or first, objective_spec(recipe), confirmations(study_dir)
    failed, whole = _failures(trained, stage), whole_rows(stage, complete_trainings(trained))
    winner = next(row for row in stage.rows if row.role == "winner")
    if all(row != winner for row, _ in whole):
        step = "Confirm the next best: with --winner confirmed, it chooses among those that train."
        rule, value = "the winner must train with every fresh seed", failed[0] if failed else "one that is missing"
        raise NoSuccessfulTrialError(Problem(winner.name, rule, value, next_step=step))
    found = compare(
        spec,
        {row.name: row_correct(study_dir, spec, trainings, row) for row, trainings in whole},
        winner.name,
        {row.name: row.objective for row, _ in whole if row.role == "baseline"},
        id_margin=recipe.search.objective.id_margin,
        label=LABEL,
        searched=winner.objective,
    )
    for (row, _), each in zip(whole, found["rows"], strict=True):
        each |= {"role": row.role, "alpha": row.alpha, "seeds": each["objective"]["num_seeds"] if row.training else 0}
    content = {
        **found,
        "seeds": list(stage.seeds),
        "chosen_by": "search" if second is None else "confirm",
        "failed": failed,
        "shared_images": shared_counts(read_shared(study_dir)),
    }
    files.write_json(study_dir / CONFIRM / SUMMARY, content)
    return content


def confirm_lines(content: Mapping[str, Any]) -> list[str]:
    """Returns the content of ``confirm/summary.json`` as lines of text, without its rows."""
    twice = "The winner was chosen on other fresh seeds, not on these."
    return [
        f"{len(content['seeds'])} fresh seeds; {LABEL}; 95 % intervals over seeds and images (zero-shot: images).",
        "Not covered: the search chose the winner on these images. It never used test sets.",
        *([twice] if content["chosen_by"] == "confirm" else []),
        *(f"Failed, and not compared: {line}." for line in content["failed"]),
        *comparison_lines(content),
        *([] if content["rows"][0]["ood_accuracy"] else ["Selected on ID only: the recipe has no ood_val."]),
    ]


def complete_trainings(rows: Sequence[TrialRow]) -> dict[str, TrialRow]:
    """Returns the trainings with fresh seeds that are complete, by name."""
    return {row.name: row for row in rows if row.outcome == "complete"}


def whole_rows(stage: Stage, complete: Mapping[str, TrialRow]) -> list[tuple[PlanRow, list[TrialRow]]]:
    """Returns the rows of which all trainings are complete, with these by seed; the zero-shot model needs none."""
    rows = [(row, stage.names(row)) for row in stage.rows]
    return [(row, [complete[name] for name in names]) for row, names in rows if all(name in complete for name in names)]


def row_correct(
    study_dir: Path, spec: ObjectiveSpec, trainings: Sequence[TrialRow], row: PlanRow
) -> dict[str, BoolArray]:
    """Returns per validation set which images a configuration classifies right at its alpha, bool [r, n].

    The zero-shot model has no seeds: r is 1.

    Raises:
        StorageError: Predictions are missing or damaged.
    """
    paths = [file_of(study_dir, each, PREDICTIONS) for each in trainings]
    zero_shot = files.inside(study_dir, f"{PREPARED}/{ZERO_SHOT_TABLE}")
    tables = [read_predictions(path) for path in paths or [zero_shot]]
    return {name: correct_matrix([(table, row.alpha) for table in tables], name) for name in spec.sets}


def _failures(rows: Sequence[TrialRow], stage: Stage) -> list[str]:
    """Returns a line per training of the stage that ended without a result."""
    wanted = stage.trainings()
    return [
        f"{row.name}: {row.outcome}, {row.reason}"
        for row in rows
        if row.name in wanted and row.outcome not in ("complete", "running")
    ]
