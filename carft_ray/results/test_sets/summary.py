"""What a read of the test sets compares and what it finds: rows, intervals, paired differences, the headline, text.

The rows come from a finished confirm (several fresh seeds) where there is one, else from the search itself (one
training each). No torch is loaded.
"""

import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray import files
from carft_ray.data.shared.shared_images import SharedRow, shared_counts, shared_lines
from carft_ray.errors import NoSuccessfulTrialError, Problem
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import correct_matrix, sample_ids
from carft_ray.layout import CONFIRM, SUMMARY
from carft_ray.recipe.schema import Recipe
from carft_ray.results.confirmation.plan import Role, Stage, last_stage
from carft_ray.results.confirmation.summary import whole_rows
from carft_ray.results.reading.overview import folder_of
from carft_ray.results.statistics.intervals import Interval
from carft_ray.results.statistics.paired import Difference, compare, comparison_lines, row_lines
from carft_ray.results.statistics.paired import Row as ComparedRow
from carft_ray.results.test_sets import notes
from carft_ray.study.ledger import WENT_ON, Entry
from carft_ray.study.rows import ZERO_SHOT, baselines, best_row, require_finished, trials
from carft_ray.words import counted, times

FORMAT_VERSION = 1
ID_TEST = "id_test"


ROLES: tuple[Role, ...] = ("winner", "candidate", "baseline")


@dataclass(frozen=True)
class Run:
    """One training of a row.

    Attributes:
        seed: Of data order and views.
        folder: Its folder, relative to the study directory.
    """

    seed: int
    folder: str


@dataclass(frozen=True)
class Row:
    """One configuration with its alpha, which is never chosen again.

    Attributes:
        name: Unique among the rows.
        role: ``winner`` (exactly one), ``candidate`` or ``baseline``.
        alpha: Mixing coefficient, 0 for zero-shot.
        objective: On the validation sets, in the search: what chose it.
        runs: Its trainings, in the order of the seeds that all rows share; none for zero-shot.
    """

    name: str
    role: Role
    alpha: float
    objective: float
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Compared:
    """All rows of a study.

    Attributes:
        confirmed: Whether they were trained on fresh seeds after the search.
        rows: The winner first, then candidates, then baselines.
    """

    confirmed: bool
    rows: tuple[Row, ...]

    @property
    def winner(self) -> Row:
        """The row with that role."""
        return next(row for row in self.rows if row.role == "winner")

    @property
    def baselines(self) -> tuple[Row, ...]:
        """Rows with that role."""
        return tuple(row for row in self.rows if row.role == "baseline")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings."""
        return tuple(run.seed for run in self.winner.runs)


def compared_rows(study_dir: Path, recipe: Recipe) -> Compared:
    """Returns the rows of a study: of its confirm, else of its search.

    Args:
        study_dir: The study directory.
        recipe: Its recipe.

    Raises:
        NoSuccessfulTrialError: The search has no finished trial, or a confirm was begun and is not finished.
        StorageError: The study or the plan of its confirm is damaged.
    """
    stage = last_stage(study_dir)
    if stage is not None:
        return _of_confirm(study_dir, stage)
    best = require_finished(study_dir, best_row(trials(study_dir)))
    rows: list[Row] = []
    for row in (best, *baselines(study_dir)):
        if row.objective is None or row.alpha is None:
            continue
        folder = folder_of(study_dir, row).relative_to(study_dir).as_posix()
        runs = () if row.name == ZERO_SHOT else (Run(recipe.train.seed, folder),)
        rows.append(Row(row.name, "winner" if row is best else "baseline", row.alpha, row.objective, runs))
    return Compared(False, tuple(rows))


def compared_again(details: Mapping[str, Any]) -> Compared:
    """Returns the rows that a line of the ledger has of a read."""
    rows = (Row(**{**row, "runs": tuple(Run(**run) for run in row["runs"])}) for row in details["rows"])
    return Compared(details["confirmed"], tuple(rows))


def _of_confirm(study_dir: Path, stage: Stage) -> Compared:
    """Returns the rows that have a mean over all seeds, as the summary of the confirm has them."""
    path = study_dir / CONFIRM / SUMMARY
    summary = files.read_json(path) if path.exists() else {}
    failed = {line.split(":")[0] for line in summary.get("failed", ())}
    whole = whole_rows(study_dir, stage)
    unfinished = [row.name for row in stage.rows if row not in whole and not failed & {*stage.names(row)}]
    has_winner = any(row.role == "winner" for row in whole)
    if unfinished or not has_winner or summary.get("seeds") != list(stage.seeds):
        step = f"Finish it: carft-ray confirm {shlex.quote(str(study_dir))}\n    "
        step += f"Or move {study_dir / CONFIRM} away, and one training of each is compared."
        value = f"one without all seeds of {', '.join(unfinished)}" if unfinished else "one without its summary"
        rule = "a confirm that was begun must be finished"
        raise NoSuccessfulTrialError(Problem(str(study_dir / CONFIRM), rule, value, next_step=step))
    rows = []
    for row in whole:
        names = stage.names(row)  # none of the zero-shot model
        runs = tuple(Run(seed, f"{CONFIRM}/{name}") for seed, name in zip(stage.seeds, names, strict=False))
        rows.append(Row(row.name, row.role, row.alpha, row.objective, runs))
    return Compared(True, tuple(sorted(rows, key=lambda row: ROLES.index(row.role))))


@dataclass(frozen=True)
class ReadRecord:
    """Which read of the test sets it was, as its summary has it.

    Attributes:
        read: Counts from 1.
        reason: Of the user; empty for the first read.
        time: ISO 8601.
        user: Name of the account.
        ledger_line: Its line in the ledger.
        searches_after_a_read: How often the search had continued after an earlier read.
        elsewhere: Reads of the same images by other studies, as far as they are noted (``notes``).
    """

    read: int
    reason: str
    time: str
    user: str
    ledger_line: int
    searches_after_a_read: int
    elsewhere: tuple[notes.OtherRead, ...] = ()

    def lines(self, title: str) -> list[str]:
        """Returns the first lines of a summary."""
        reason = f"; reason: {self.reason}" if self.reason else ""
        again = f"The search was continued {times(self.searches_after_a_read)} after a test read."
        first = f"{title} {self.read}, {self.time} by {self.user}{reason}."
        return [first, *([again] if self.searches_after_a_read else []), *notes.lines(self.elsewhere)]


def read_record(
    entry: Entry, before: Sequence[Entry], number: int, elsewhere: Sequence[notes.OtherRead] = ()
) -> ReadRecord:
    """Returns the record of a read.

    Args:
        entry: The line of this read in the ledger.
        before: The lines that the ledger held when it began.
        number: Which read it is, from 1.
        elsewhere: Reads of the same images by other studies.
    """
    went_on = sum(one.purpose == WENT_ON and one.number < entry.number for one in before)
    return ReadRecord(number, entry.reason, entry.time, entry.user, entry.number, went_on, tuple(elsewhere))


def objective_on_test(recipe: Recipe) -> ObjectiveSpec:
    """Returns the objective of a recipe over its test sets."""
    return replace(objective_spec(recipe), id_set=ID_TEST, ood_sets=tuple(recipe.data.ood_test))


def summarise(
    recipe: Recipe, compared: Compared, shared: Sequence[SharedRow], tables: Mapping[str, pa.Table], record: ReadRecord
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
        recipe: Of the study.
        compared: The rows that were read.
        shared: The study's list of images in two roles: where it has test images, the numbers are given without
            these, too.
        tables: Predictions on the test sets by the folder of the training, zero-shot by its name.
        record: Of this read.
    """
    spec, winner = objective_on_test(recipe), compared.winner
    evaluations = {
        row.name: [(tables[run.folder], row.alpha) for run in row.runs] or [(tables[ZERO_SHOT], 0.0)]
        for row in compared.rows
    }
    correct = {row: {name: correct_matrix(found, name) for name in spec.sets} for row, found in evaluations.items()}
    compare_rows = functools.partial(
        compare,
        spec,
        winner=winner.name,
        baselines={row.name: row.objective for row in compared.baselines},
        id_margin=recipe.search.objective.id_margin,
    )
    comparison = compare_rows(correct=correct, label="test sets")
    table, alpha = evaluations[winner.name][0]
    alone = {name: ~np.isin(sample_ids(table, name, alpha), _shared_ids(shared, name)) for name in spec.sets}
    both, without_shared = [comparison], None
    if not all(mask.all() for mask in alone.values()) and all(mask.any() for mask in alone.values()):
        fewer = {row: {name: x[:, alone[name]] for name, x in by_set.items()} for row, by_set in correct.items()}
        without = compare_rows(correct=fewer, label="test sets without images that are in other roles")
        both.insert(0, without)
        without_shared = {
            "sets": {name: int(mask.sum()) for name, mask in alone.items()},
            "rows": {row.name: _accuracies(row) for row in without.rows},
            "differences": {each.other: _difference_data(each) for each in without.baselines},
            "headline": without.headline,
        }
    num_images = {name: len(mask) for name, mask in alone.items()}
    begin = [*record.lines("Test read"), *_lines(compared, num_images), *shared_lines(shared)]
    return {
        "format_version": FORMAT_VERSION,
        **asdict(record),
        "confirmed": compared.confirmed,
        "seeds": list(compared.seeds),
        "sets": num_images,
        "ood_mean_over": list(spec.ood_sets),
        "objective": {"kind": spec.kind, "id_weight": spec.id_weight},
        "rows": [_row_data(row, found) for row, found in zip(compared.rows, comparison.rows, strict=True)],
        "differences": {each.other: _difference_data(each) for each in comparison.baselines},
        "baseline": comparison.headline_baseline,
        "headline": comparison.headline,
        "shared_images": shared_counts(shared),
        "without_shared_images": without_shared,
        "row_lines": [line for each in reversed(both) for line in row_lines(each)],
        "lines": [*begin, *(line for each in both for line in comparison_lines(each))],
    }


def _shared_ids(shared: Sequence[SharedRow], name: str) -> list[int]:
    """Returns the sample ids of a test set's images that are in other roles, too."""
    places = {f"data.{role}" for role in (name, f"{name}.of", f"ood_test.{name}", f"ood_test.{name}.of")}
    return [image[1] for row in shared for image in row.images if image[0] in places and row.done == row.other_done]


def _row_data(row: Row, found: ComparedRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": row.role,
        "alpha": row.alpha,
        "num_seeds": len(row.runs),
        "runs": [run.folder for run in row.runs],
        "validation_objective": row.objective,
        "test": _accuracies(found),
    }


def _accuracies(row: ComparedRow) -> dict[str, Any]:
    found = {**row.sets, "objective": row.objective}
    if row.ood_accuracy is not None:
        found["ood_mean"] = row.ood_accuracy
    return {name: _plain(interval) for name, interval in found.items()}


def _difference_data(difference: Difference) -> dict[str, Any]:
    return {
        "objective": {**_plain(difference.objective), "p": difference.p},
        "sets": {name: _plain(interval) for name, interval in difference.sets.items()},
        "keeps_id": difference.keeps_id,
    }


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        "mean": interval.mean,
        "interval": list(interval.ends),
        "over": interval.words,
        "num_seeds": interval.num_seeds,
        "notes": list(interval.notes),
    }


def _lines(compared: Compared, num_images: Mapping[str, int]) -> list[str]:
    """Returns what was read, as lines of text."""
    sets = f"ID: {ID_TEST} ({counted(num_images[ID_TEST], 'image')})."
    if ood := [f"{name} ({count})" for name, count in num_images.items() if name != ID_TEST]:
        sets += f" OOD mean: over {', '.join(ood)}."
    seeds = f"{len(compared.seeds)} fresh seeds" if compared.confirmed else "one training each"
    return [sets, f"{seeds}; alphas and the baseline of the headline were chosen on the validation sets."]
