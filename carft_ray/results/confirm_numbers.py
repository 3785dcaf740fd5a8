"""The numbers of a confirm: what trainings with fresh seeds show of the configurations of its stages.

    confirm/summary.json  the numbers, once all of these trainings have ended

What is shown: means over fresh seeds, intervals over seeds and images, the optimism of the search, the headline
(``evidence``). These are validation images: fresh seeds remove the bias of the seeds, and not that of the images.
`test` has new images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray import files
from carft_ray.data.duplicates.shared_images import read_shared, shared_counts
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import alphas, sample_ids
from carft_ray.layout import CONFIRM, SUMMARY
from carft_ray.results.confirm_plan import PlanRow, Stage, whole_rows
from carft_ray.results.evidence import AT_ONE, compare, comparison_lines
from carft_ray.results.statistics.images import with_images
from carft_ray.results.statistics.intervals import values_by_seed
from carft_ray.results.stored import correct_at, row_correct, tables_of, trials_of
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.training import TrialRow


def choose(study: Snapshot, stage: Stage) -> str:
    """Returns the name of the trial with the largest mean objective over the fresh seeds; the first of equals.

    Raises:
        NoSuccessfulTrialError: None of them was trained with all seeds.
    """
    spec = objective_spec(study.recipe)
    means = {name: float(np.mean(values_by_seed(spec, each))) for name, each in trials_of(study, spec, stage)}
    if not means:
        rule = "at least one of the trials must train with all fresh seeds"
        raise NoSuccessfulTrialError(Problem(str(study.study_dir / CONFIRM), rule, "none did"))
    return max(means, key=lambda name: means[name])


def summarise(study: Snapshot, first: Stage, second: Stage | None) -> dict[str, Any]:
    """Compares the rows of the last stage, writes ``confirm/summary.json`` and returns its content.

    A configuration that failed with some seed has no mean over all of them: it is named, and not compared.

    Args:
        study: The study.
        first: The first stage.
        second: The second one, of ``--winner confirmed``.

    Raises:
        NoSuccessfulTrialError: The winner failed with a fresh seed.
        StorageError: Predictions are damaged, or the summary cannot be written.
    """
    study_dir, recipe, trained = study.study_dir, study.recipe, study.confirmations
    stage, spec = second or first, objective_spec(recipe)
    failed, whole = _failures(trained, stage), whole_rows(stage, trained)
    winner = next(row for row in stage.rows if row.role == "winner")
    if all(row != winner for row, _ in whole):
        step = "Confirm the next best: with --winner confirmed, it chooses among those that train."
        rule, value = "the winner must train with every fresh seed", failed[0] if failed else "one that is missing"
        raise NoSuccessfulTrialError(Problem(winner.name, rule, value, next_step=step))
    whole = [each for row, trainings in whole for each in _at_its_own_alpha(study_dir, spec, row, trainings)]
    table = tables_of(study_dir, whole[0][1])[0]
    ids = {name: sample_ids(table, name, whole[0][0].alpha) for name in spec.sets}
    facts = [
        {"name": row.name, "role": row.role, "alpha": row.alpha, "seeds": len(found), "chosen_from": row.chosen_from}
        for row, found in whole
    ]
    found = compare(
        "confirm",
        "values",
        with_images(spec, recipe, ids),
        facts,
        {row.name: row_correct(study_dir, spec, trainings, row) for row, trainings in whole},
        recipe.search.objective.id_margin,
        stage.seeds,
        searched=winner.objective,
        baselines=stage.baselines(recipe),
    )
    content = {
        **found,
        "chosen_by": "search" if second is None else "confirm",
        "failed": failed,
        "shared_images": shared_counts(read_shared(study_dir)),
    }
    files.write_json(study_dir / CONFIRM / SUMMARY, content)
    return content


def _at_its_own_alpha(
    study_dir: Path, spec: ObjectiveSpec, row: PlanRow, trainings: list[TrialRow]
) -> Iterator[tuple[PlanRow, list[TrialRow]]]:
    """Yields a row with its trainings; an ablation again at the alpha with the best mean over these seeds and images.

    That choice favours the ablation: what the penalties contribute is then not overstated.
    """
    yield row, trainings
    if row.role == "ablation":
        tables = tables_of(study_dir, trainings)  # read once for all alphas
        grid = [alpha for alpha in alphas(tables[0], spec.id_set) if alpha]
        means = [np.mean(values_by_seed(spec, correct_at(tables, spec, alpha))) for alpha in grid]
        own = grid[int(np.argmax(means))]
        if own != row.alpha:
            yield replace(row, name=f"{row.name}, its own alpha", alpha=own), trainings


def chosen_from_lines(content: Mapping[str, Any]) -> list[str]:
    """Returns a line on how many trainings each configuration of the headline is the best of."""
    compared = [row for row in content["rows"] if row["role"] in ("winner", "baseline")]
    numbers = {row["name"]: row.get("chosen_from", 0) for row in compared if not row["name"].endswith(AT_ONE)}
    numbers = {name: number for name, number in numbers.items() if number}  # the zero-shot model has none
    if len({*numbers.values()}) < 2:
        return []
    shown = ", ".join(f"{name} ({number})" for name, number in numbers.items())
    return [f"These configurations are the best of different numbers of trainings: {shown}."]


def confirm_lines(content: Mapping[str, Any]) -> list[str]:
    """Returns the content of ``confirm/summary.json`` as lines of text, without its rows."""
    twice = "The winner was chosen on other fresh seeds, not on these."
    return [
        f"{len(content['seeds'])} fresh seeds, on validation images; 95 % intervals over seeds and images (zero-shot: "
        "images).",
        "Selection bias is not covered: the search chose the winner on these images. It never used test sets.",
        *([twice] if content["chosen_by"] == "confirm" else []),
        *(f"Failed, and not compared: {line}." for line in content["failed"]),
        *comparison_lines(content),
        *chosen_from_lines(content),
        *([] if content["rows"][0]["ood_accuracy"] else ["Selected on ID only: the recipe has no ood_val."]),
    ]


def _failures(rows: Sequence[TrialRow], stage: Stage) -> list[str]:
    """Returns a line per training of the stage that ended without a result."""
    wanted = stage.trainings()
    return [
        f"{row.name}: {row.outcome}, {row.reason}"
        for row in rows
        if row.name in wanted and row.outcome not in ("complete", "running")
    ]
