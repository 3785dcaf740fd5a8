"""The seal opened: winner and baselines read on the test sets, at the alphas that validation chose, every read counted.

    study_dir/test/summary.json                  of the newest finished read
    study_dir/test/read-N/summary.json           written last: the read is finished
    study_dir/test/read-N/**/*.parquet           predictions, a file per training, under the name of its folder

The line in the ledger comes before the first image. It holds the rows with their alphas; a read that was killed goes on
from there, whatever the study has become since, and needs no reason. Nothing of a read enters the trials.
"""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from carft_ray import files
from carft_ray.data.arrays import image_set
from carft_ray.data.sets import cache_dir, check_roles, check_sets, class_folders, open_source
from carft_ray.data.source import ImageSet, Source
from carft_ray.errors import DataError, HoldOutError, Problem, RecipeError
from carft_ray.evaluation.evaluate import predict_all
from carft_ray.evaluation.materials import Materials, load_materials
from carft_ray.evaluation.predictions import concat, read_predictions, write_predictions
from carft_ray.evaluation.run import device_of, num_threads
from carft_ray.learning.checkpoint import load_tensors
from carft_ray.learning.context import RunContext
from carft_ray.learning.loop import build_classifier
from carft_ray.recipe.schema import Recipe
from carft_ray.results import overview
from carft_ray.results.compared import Compared, Row, Run, compared_rows
from carft_ray.results.sealed_summary import ID_TEST, summarise
from carft_ray.results.trained import open_run, require_weights
from carft_ray.search.folder import PREPARED, repair_journal, study_lock
from carft_ray.search.identity import claim
from carft_ray.search.lease import Lease
from carft_ray.search.ledger import TEST, Entry, check_reason, mend, read_ledger, reads_of, record, told
from carft_ray.search.rows import ZERO_SHOT

TEST_DIR, SUMMARY = "test", "summary.json"


def read_sealed(study: Path, reason: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Reads the test sets once, or goes on with a read that was killed; holds the study meanwhile.

    Args:
        study: The study directory.
        reason: Why they are read again, which always begins another read; None: this is the first one, or one that was
            killed goes on.
        say: Told what is being done.

    Returns:
        Content of ``summary.json``.

    Raises:
        HoldOutError: They were read already and no reason is given; or the ledger is damaged.
        RecipeError: The recipe has no test sets.
        NoSuccessfulTrialError: There is no finished trial.
        UsageError: The folder is no study, or the reason is empty.
        DataError, StorageError: As their messages say.
    """
    check_reason(reason)
    study_dir = overview.require_study(study)
    recipe = overview.study_recipe(study_dir)
    _require_test_sets(study_dir, recipe)
    with study_lock(study_dir) as held:
        claim(study_dir, recipe, study_dir)
        files.remove_remains(study_dir)
        for note in [note for note in [held.note] if note] + repair_journal(study_dir):
            say(note)
        entries = read_ledger(study_dir)
        mend(study_dir)
        reads = reads_of(entries)
        entry = reads[-1] if reads and reason is None else None
        if entry is not None and (_read_dir(study_dir, len(reads)) / SUMMARY).exists():
            raise HoldOutError(_read_already(study_dir, entry))
        sources = _open_sources(recipe)
        compared = _rows_of(study_dir, recipe, entry)
        if entry is None:
            details = {"confirmed": compared.confirmed, "rows": [dataclasses.asdict(row) for row in compared.rows]}
            sets = tuple(source.name for source in sources)
            entry = record(study_dir, recipe, TEST, sets, details, reason or "")
            say(f"written to the ledger as line {entry.number}; opening the test sets")
        else:
            say(f"going on with the read of {told(entry)}")
        number = 1 + sum(one.number < entry.number for one in reads)
        folder = _read_dir(study_dir, number)
        tables = _evaluate(study_dir, recipe, compared, sources, folder, held, say)
        summary = summarise(recipe, compared, tables, entry, entries, number)
        held.check()
        files.write_json(study_dir / TEST_DIR / SUMMARY, summary)
        files.write_json(folder / SUMMARY, summary)
    return summary


def _require_test_sets(study_dir: Path, recipe: Recipe) -> None:
    if recipe.data.id_test is not None:
        return
    value = "one without data.id_test" + ("" if recipe.data.ood_test else " and data.ood_test")
    step = (
        "A study keeps its sets for good: write data.id_test and data.ood_test into the recipe, "
        "and begin a new study with it."
    )
    raise RecipeError(Problem(str(study_dir), "must be the study of a recipe with test sets", value, next_step=step))


def _read_already(study_dir: Path, entry: Entry) -> Problem:
    folder = shlex.quote(str(study_dir))
    rule = f"its test sets were read already: {told(entry)}"
    step = f"What was found lies in {study_dir / TEST_DIR / SUMMARY}.\n    "
    step += f"Every further read is counted and told: carft-ray test {folder} --again REASON"
    return Problem(str(study_dir), rule, next_step=step)


def _read_dir(study_dir: Path, number: int) -> Path:
    return study_dir / TEST_DIR / f"read-{number}"


def _open_sources(recipe: Recipe) -> list[Source]:
    """Lists the test sets, ``id_test`` first, and checks all sets; no image is opened."""
    if problems := check_roles(recipe, Path("/")):
        raise HoldOutError(problems)
    if problems := check_sets(recipe, Path("/")):
        raise DataError(problems)
    classes = class_folders(recipe, Path("/"))
    specs = {ID_TEST: recipe.data.id_test, **recipe.data.ood_test}
    return [open_source(spec, name, classes, Path("/")) for name, spec in specs.items() if spec is not None]


def _rows_of(study_dir: Path, recipe: Recipe, entry: Entry | None) -> Compared:
    """Returns the rows of a read that goes on, or those of the study; their weights are there."""
    if entry is None:
        compared = compared_rows(study_dir, recipe)
    else:
        rows = (Row(**{**row, "runs": tuple(Run(**run) for run in row["runs"])}) for row in entry.details["rows"])
        compared = Compared(tuple(rows), entry.details["confirmed"])
    for run in _runs(compared):
        require_weights(study_dir, study_dir / run, recipe)
    return compared


def _runs(compared: Compared) -> dict[str, list[float]]:
    """Returns the trainings of all rows by folder, with the alphas at which they are read."""
    runs: dict[str, list[float]] = {}
    for row in compared.rows:
        for run in row.runs:
            runs[run.folder] = sorted({*runs.get(run.folder, []), row.alpha})
    return runs


def _evaluate(
    study_dir: Path,
    recipe: Recipe,
    compared: Compared,
    sources: Sequence[Source],
    folder: Path,
    held: Lease,
    say: Callable[[str], None],
) -> dict[str, pa.Table]:
    """Reads every training at its alphas, and zero-shot; what is there already is not read again.

    Returns:
        Predictions by the folder of the training, zero-shot by its name.
    """
    torch.set_num_threads(num_threads(recipe))
    materials = load_materials(recipe, Path("/"))
    sets: list[ImageSet] = []

    def test_sets() -> list[ImageSet]:
        if not sets:
            sets.extend(_decoded(source, materials, recipe) for source in sources)
        return sets

    jobs: dict[str, list[float]] = _runs(compared)
    if any(not row.runs for row in compared.rows):
        jobs = {ZERO_SHOT: [0.0], **jobs}
    tables: dict[str, pa.Table] = {}
    for number, (name, alphas) in enumerate(jobs.items(), start=1):
        path = folder / f"{name}.parquet"
        at = ", ".join(f"{alpha:.2f}" for alpha in alphas)
        if path.exists():
            say(f"{number}/{len(jobs)} {name} at alpha {at}: read before")
        else:
            say(f"{number}/{len(jobs)} {name} at alpha {at}")
            table = _predict(study_dir, recipe, materials, name, alphas, test_sets())
            held.check()
            write_predictions(path, table)
        tables[name] = read_predictions(path)
    return tables


def _decoded(source: Source, materials: Materials, recipe: Recipe) -> ImageSet:
    clip = materials.clip
    images = image_set(source, clip.to_input, clip.input_key, cache_dir(recipe, Path("/")))
    return dataclasses.replace(images, name=source.name)


def _predict(
    study_dir: Path,
    recipe: Recipe,
    materials: Materials,
    name: str,
    alphas: Sequence[float],
    sets: Sequence[ImageSet],
) -> pa.Table:
    batch_size = recipe.evaluate.batch_size
    if name == ZERO_SHOT:
        heads = load_tensors(study_dir / PREPARED / "heads.safetensors")
        classifier = build_classifier(materials.clip, heads["class_head"], recipe.train, device_of(recipe))
        return predict_all(classifier, sets, 0.0, batch_size, RunContext())
    trained = open_run(study_dir, study_dir / name, recipe, name)
    return concat([predict_all(trained.classifier(alpha), sets, alpha, batch_size, RunContext()) for alpha in alphas])
