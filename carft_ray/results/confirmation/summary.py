"""What a confirm shows: means over fresh seeds, intervals over seeds and images, optimism of the search, the headline.

Validation images, fresh seeds: the luck of the seeds is gone, that of the images is not. New images are `test`'s.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray import files
from carft_ray.data.shared.shared_images import read_shared, shared_counts, shared_lines
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import BoolArray, correct_matrix, read_predictions
from carft_ray.layout import CONFIRM, PREDICTIONS, PREPARED, RESULT, SUMMARY, ZERO_SHOT_TABLE
from carft_ray.recipe.schema import Recipe
from carft_ray.results.confirmation.plan import PlanRow, Stage, training_name
from carft_ray.results.statistics.intervals import values_by_seed
from carft_ray.results.statistics.paired import Comparison, brief, compare, comparison_lines
from carft_ray.study.rows import confirmations

LABEL = "validation images, fresh seeds"

CorrectBySet = dict[str, BoolArray]


def choose(study_dir: Path, spec: ObjectiveSpec, stage: Stage) -> str:
    """Returns the name of the trial with the largest mean objective over the fresh seeds; the first of equals.

    Raises:
        NoSuccessfulTrialError: None of them was trained with all seeds.
    """
    means = {
        row.name: float(np.mean(values_by_seed(spec, row_correct(study_dir, spec, row, stage.seeds))))
        for row in stage.rows
        if row.role != "baseline" and is_whole(study_dir, row, stage.seeds)
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
    stage, spec = second or first, objective_spec(recipe)
    failed = _failures(study_dir, stage)
    whole = [row for row in stage.rows if is_whole(study_dir, row, stage.seeds)]
    winner = next(row for row in stage.rows if row.role == "winner")
    if winner not in whole:
        step = "Confirm the next best: carft-ray confirm with --winner confirmed chooses among those that train."
        rule = "the winner must train with every fresh seed"
        raise NoSuccessfulTrialError(
            Problem(winner.name, rule, failed[0] if failed else "one that is missing", next_step=step)
        )
    baselines = [row for row in whole if row.role == "baseline"]
    rival = max(baselines, key=lambda row: row.objective, default=None)
    comparison = compare(
        spec,
        {row.name: row_correct(study_dir, spec, row, stage.seeds) for row in whole},
        winner.name,
        [row.name for row in baselines],
        rival.name if rival else None,
        id_margin=recipe.search.objective.id_margin,
        label=LABEL,
        searched=winner.objective,
    )
    shared = read_shared(study_dir)
    told = shared_lines(shared)
    short = brief(comparison)
    content = {
        **comparison.as_data(),
        "seeds": list(stage.seeds),
        "chosen_by": "search" if second is None else "confirm",
        "table": table(comparison, stage.rows),
        "failed": failed,
        "shared_images": shared_counts(shared),
        "lines": [*told, *_lines(comparison_lines(comparison), stage, second is not None, failed, recipe)],
        "brief": {
            "rows": short["rows"],
            "lines": [*told, *_lines(short["lines"], stage, second is not None, failed, recipe)],
        },
    }
    files.write_json(study_dir / CONFIRM / SUMMARY, content)
    return content


def table(comparison: Comparison, rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """Returns the rows for ``console.estimate_table``: name, role, alpha, and means with intervals, as fractions."""
    by_name = {row.name: row for row in rows}
    lines = []
    for found in comparison.rows:
        planned = by_name[found.name]
        intervals = {"ID": found.id_accuracy, "OOD mean": found.ood_accuracy, "objective": found.objective}
        lines.append(
            {
                "name": found.name,
                "role": planned.role,
                "alpha": planned.alpha,
                "seeds": found.objective.num_seeds if planned.training else 0,
                "estimates": {
                    name: [interval.mean, *interval.images_random] for name, interval in intervals.items() if interval
                },
            }
        )
    return lines


def row_correct(study_dir: Path, spec: ObjectiveSpec, row: PlanRow, seeds: Sequence[int]) -> CorrectBySet:
    """Returns per validation set which images a configuration classifies right at its alpha, bool [r, n].

    The zero-shot model has no seeds: r is 1.

    Raises:
        StorageError: Predictions are missing or damaged.
    """
    paths = [study_dir / PREPARED / ZERO_SHOT_TABLE]
    if row.training is not None:
        folders = [study_dir / CONFIRM / training_name(row.training, seed) for seed in seeds]
        paths = [folder / PREDICTIONS for folder in folders]
    evaluations = [(read_predictions(path), row.alpha) for path in paths]
    return {name: correct_matrix(evaluations, name) for name in (spec.id_set, *spec.ood_sets)}


def is_whole(study_dir: Path, row: PlanRow, seeds: Sequence[int]) -> bool:
    """Tells whether all trainings of a row have finished; the zero-shot model needs none."""
    return row.training is None or all(
        (study_dir / CONFIRM / training_name(row.training, seed) / RESULT).exists() for seed in seeds
    )


def _failures(study_dir: Path, stage: Stage) -> list[str]:
    """Returns a line per training of the stage that ended without a result."""
    wanted = stage.trainings()
    return [
        f"{row.name}: {row.outcome}, {row.reason}"
        for row in confirmations(study_dir)
        if row.name in wanted and row.outcome not in ("complete", "running")
    ]


def _lines(found: Sequence[str], stage: Stage, twice: bool, failed: Sequence[str], recipe: Recipe) -> list[str]:
    """Returns what the table does not say, with what was found of the differences."""
    lines = [f"{len(stage.seeds)} fresh seeds; {LABEL}; 95 % intervals over seeds and images (zero-shot: images)."]
    if twice:
        lines.append("The winner was chosen on other fresh seeds; these did not choose it.")
    lines += [f"Failed, and not compared: {line}." for line in failed]
    lines += found
    if not recipe.data.ood_val:
        lines.append("Selected on ID only: the recipe has no ood_val.")
    return lines
