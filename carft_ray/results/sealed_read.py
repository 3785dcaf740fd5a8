"""Evaluation on the test sets: winner and baselines at the alphas that validation chose; every read is counted.

    study_dir/test/summary.json                  of the newest finished read
    study_dir/test/read-N/summary.json           written last: the read is finished
    study_dir/test/read-N/**/*.parquet           predictions, a file per training, under the name of its folder

The line in the ledger comes before the first image. It holds the rows with their alphas; a read that was killed
continues from there, however the study has changed since, and needs no reason. Nothing of a read enters the trials.
"""

import dataclasses
import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from carft_ray import environment, files
from carft_ray.data.cache import cache_dir
from carft_ray.data.cached_sets import Keeping, image_set
from carft_ray.data.class_names import class_folders
from carft_ray.data.duplicates.find_duplicates import digests_of_tests
from carft_ray.data.duplicates.shared_images import find_shared, read_shared, write_shared
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.sets import listing_once, open_source
from carft_ray.data.source import ImageSet, Source
from carft_ray.errors import CarftError, DataError, HoldOutError, Problem, RecipeError, StorageError
from carft_ray.evaluation.predictions import concat, read_predictions, write_predictions
from carft_ray.layout import COMMITS, HEADS, PREPARED, SUMMARY, TEST_DIR
from carft_ray.model.classifier import build_classifier
from carft_ray.model.device import device_of, set_up
from carft_ray.recipe.schema.data import TEST_ROLES
from carft_ray.recipe.schema.recipe import Recipe, with_threads
from carft_ray.results import test_summary
from carft_ray.results.delivered import require_weights_of
from carft_ray.results.reading import study_view
from carft_ray.results.reading.trained import Trained, open_run, require_weights, start_of_study
from carft_ray.results.test_summary import changed_lines, compared_rows, read_record, summarise
from carft_ray.store.log import Log
from carft_ray.study import ledger
from carft_ray.study.holding import check_fit, held
from carft_ray.study.place import named
from carft_ray.study.provenance import made_of
from carft_ray.study.recipe_identity import recipe_for_use, resume_command, study_recipe
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.snapshot import Snapshot, snapshot
from carft_ray.study.training import TrialRow
from carft_ray.study.uploads import open_log, uploading
from carft_ray.study.warm_start import inherited_reads
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.evaluate import predict_all
from carft_ray.training.run_context import RunContext
from carft_ray.training.shared_inputs import Start
from carft_ray.untrusted import visible
from carft_ray.words import counted, time_left, times


def read_sealed(
    study: Path, reason: str | None, say: Callable[[str], None], trust_paths: bool = False
) -> dict[str, Any]:
    """Reads the test sets once, or continues a read that was killed; holds the study meanwhile.

    Args:
        study: The study directory.
        reason: Why they are read again, which always begins another read; None: this is the first one, or one that was
            killed continues.
        say: Gets lines about what is being done.
        trust_paths: As of ``recipe_for_use``.

    Returns:
        Content of ``summary.json``.

    Raises:
        HoldOutError: They were read already and no reason is given; or the ledger is damaged.
        RecipeError: The recipe has no test sets.
        NoSuccessfulTrialError: There is no finished trial.
        UsageError: The folder is no study, or the reason is empty; or as ``recipe_for_use``.
        DataError, StorageError: As their messages say.
    """
    ledger.check_reason(reason)
    study_dir = study_view.require_study(study)
    check_fit(study_dir)
    log = open_log(study_dir)
    log.follow()
    recipe = recipe_for_use(study_dir, study_recipe(study_dir, log), "test {}", trust_paths=trust_paths)
    _require_test_sets(study_dir, recipe)
    _read_to_continue(study_dir, log, reason)  # it may be refused: before anything is written
    with held(log, say), uploading(log):
        files.remove_remains(study_dir)
        entries, entry = ledger.read_ledger(study_dir, log), _read_to_continue(study_dir, log, reason)
        recipe_here = with_threads(recipe, environment.usable_cores())  # no trials run beside it
        set_up(recipe_here)
        kept = made_of(log)
        start = start_of_study(recipe_here, kept)
        sources = _open_sources(recipe)
        if entry is None:
            _compare_before_first_read(study_dir, recipe, say)
        now = dataclasses.replace(snapshot(study_dir, log), recipe=recipe)
        compared = compared_rows(now) if entry is None else ledger.fixed_in(entry)
        models = compared.get("models") or []  # an earlier carft-ray has fixed none
        runs = _alphas_by_run([*compared["rows"], *models])
        trained = _trainings(now, runs.keys() - {ZERO_SHOT})
        for row in trained.values():
            require_weights(study_dir, row, recipe)
        for model in models:
            for run in model["runs"]:
                require_weights_of(study_dir, trained[run], model)
        digests, problems = _digests(recipe)
        noted = ledger.noted_test_sets(log)
        if entry is None:
            if reason is None:
                problems += _require_noted(study_dir, noted, digests)
            sets = tuple(source.name for source in sources)
            details = {**compared, test_summary.NOTE_NAME: secrets.token_hex(8), **digests}
            entry = ledger.record(study_dir, log, recipe, ledger.TEST, sets, details, reason or "")
            say(f"written to the ledger as line {entry.number}; opening the test sets")
        else:
            _require_as_begun(study_dir, entry, digests)
            say(f"continuing the read of {ledger.describe(entry)}")
        number = 1 + sum(one.number < entry.number for one in ledger.reads_of(entries))
        elsewhere, more = list[test_summary.OtherRead](), list[str]()
        if digests:
            elsewhere, more = test_summary.note_read(study_dir, recipe, [*entries, entry], digests[ledger.DIGESTS])
        for line in (*problems, *more, *test_summary.lines_of_other_reads(elsewhere)):
            say(line)
        changed = _changed(noted, digests)
        for line in changed_lines(changed):
            say(line)
        folder = _read_dir(study_dir, number)
        models = partial(open_run, study_dir, recipe=recipe_here, inputs=start, kept=kept)
        tables = _evaluate(study_dir, recipe_here, start, models, runs, trained, sources, folder, log, say)
        record = {**read_record(entry, entries, number, elsewhere), "changed_sets": changed}
        content = summarise(recipe, compared, read_shared(study_dir), tables, record)
        log.check()
        files.write_json(study_dir / TEST_DIR / SUMMARY, content)
        files.write_json(folder / SUMMARY, content)
    return content


def _require_test_sets(study_dir: Path, recipe: Recipe) -> None:
    if recipe.data.id_test is not None:
        return
    value = "one without data.id_test" + ("" if recipe.data.ood_test else " and data.ood_test")
    step = "A study keeps its sets: write data.id_test and data.ood_test into the recipe, and begin a new study."
    raise RecipeError(Problem(named(study_dir), "must be the study of a recipe with test sets", value, next_step=step))


def _compare_before_first_read(study_dir: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Compares the test sets with the others again: one that can be read now may not have been when the list was made.

    Raises:
        HoldOutError: Images of a test set were trained or chosen with, and the list does not know it.
    """
    known = read_shared(study_dir)
    found = find_shared(recipe, cache_dir(recipe), say)
    pairs = {(row.images[0][:2], row.images[1][:2]) for row in known}
    new = [
        row
        for row in found
        if (row.images[0][:2], row.images[1][:2]) not in pairs
        and {row.set.split(".")[1], row.other_set.split(".")[1]} & {*TEST_ROLES}
    ]
    if not new:
        return
    if recipe.data.shared_images == "keep":
        write_shared(study_dir, [*known, *new])
        return
    problems = []
    for sets in dict.fromkeys((row.set, row.other_set) for row in new):
        rows = [row for row in new if (row.set, row.other_set) == sets]
        rule = f"must not share images with {sets[0]}, but it does; it could not be read when the study began"
        value = f"{counted(len(rows), 'pair')}, such as {rows[0].image} and {rows[0].other_image}"
        problems.append(Problem(sets[1], rule, value))
    step = (
        "Begin a new study, which leaves them out of training and validation. Or get numbers with and without them: "
        f"{resume_command(study_dir)} --set data.shared_images=keep"
    )
    problems[-1] = dataclasses.replace(problems[-1], next_step=step)
    raise HoldOutError(problems)


def _read_to_continue(study_dir: Path, log: Log, reason: str | None) -> ledger.Entry | None:
    """Returns the last read when it was killed and this one continues it; None when this is another one.

    Raises:
        HoldOutError: They were read already and no reason is given, here or in a study that this one has learned from.
    """
    reads = ledger.reads_of(ledger.read_ledger(study_dir, log))
    if reason is not None:
        return None
    again = f"Every further read is counted and reported: {_again(study_dir)}"
    if not reads and (number := inherited_reads(study_dir, log)):
        rule = (
            "the test sets of studies that it has learned from (search.warm_start) or is compared with "
            f"(confirm --against) were read {times(number)}"
        )
        raise HoldOutError(Problem(str(study_dir), rule, next_step=again))
    if reads and (_read_dir(study_dir, len(reads)) / SUMMARY).exists():
        rule = f"its test sets were read already: {ledger.describe(reads[-1])}"
        step = f"Its results are in {study_dir / TEST_DIR / SUMMARY}.\n    {again}"
        raise HoldOutError(Problem(str(study_dir), rule, next_step=step))
    return reads[-1] if reads else None


def _digests(recipe: Recipe) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns digests of the test sets as the ledger notes them, and no line; if they cannot be made, a line alone."""
    digests = partial(digests_of_tests, recipe, cache_dir(recipe))
    try:
        with listing_once():
            return {ledger.DIGESTS: digests(), ledger.WITH_CLASSES: digests(with_classes=True)}, []
    except (CarftError, OSError) as error:
        return {}, [f"it is unknown whether these images have changed or other studies have read them: {error}"]


def _changed(before: Mapping[str, Any], digests: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns the sets whose images, or their classes, are not as before; what was not noted is not compared."""
    pairs = [(before.get(key) or {}, now) for key, now in digests.items()]
    return sorted({name for was, now in pairs for name in now if was.get(name, now[name]) != now[name]})


def _require_noted(
    study_dir: Path, noted: Mapping[str, Mapping[str, str]], digests: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Compares the test sets with those of the beginning of the search.

    Returns:
        A line that names what was not noted then, and is not compared.

    Raises:
        DataError: Images, or their classes, are others.
    """
    problems = []
    for name in _changed(noted, digests):
        key = next(key for key, now in digests.items() if noted[key].get(name, now[name]) != now[name])
        rule = "its images must be those with which the search began"
        if key == ledger.WITH_CLASSES:
            rule = "its images must have the classes that they had when the search began"
        hashes = [each[key][name][:12] for each in (noted, digests)]
        place = f"data.{name}" if name == test_summary.ID_TEST else f"data.ood_test.{name}"
        problems.append(Problem(place, f"{rule}, digest {hashes[0]}", f"digest {hashes[1]} now"))
    if problems:
        step = "The test sets are still sealed. Restore them. Or read them as they are now, with a reason that every "
        step += f"report shows: {_again(study_dir)}"
        raise DataError([*problems[:-1], dataclasses.replace(problems[-1], next_step=step)])
    unknown = {name for key, now in digests.items() for name in now if name not in noted.get(key, {})}
    names = ", ".join(sorted(unknown))
    return [f"not compared with the beginning of the search, which has not noted it: {names}"] if unknown else []


def _require_as_begun(study_dir: Path, entry: ledger.Entry, digests: Mapping[str, Mapping[str, str]]) -> None:
    """Refuses to continue a read with other images: its configurations would be compared on different ones."""
    if changed := _changed(entry.details, digests):
        rule = "must have the images with which this read began"
        step = f"Restore them, and the read continues. Or read all of them: {_again(study_dir)}"
        raise HoldOutError(Problem(f"{study_dir}: {', '.join(changed)}", rule, "others", next_step=step))


def _again(study_dir: Path) -> str:
    return f"carft-ray test {shlex.quote(named(study_dir))} --again REASON"


def _read_dir(study_dir: Path, number: int) -> Path:
    return study_dir / ledger.read_folder(number)


def _open_sources(recipe: Recipe) -> list[Source]:
    """Lists the test sets, ``id_test`` first, and checks all sets; no image is opened."""
    if problems := check_roles(recipe):
        raise HoldOutError(problems)
    if problems := check_sets(recipe):
        raise DataError(problems)
    classes = class_folders(recipe)
    specs = {"id_test": recipe.data.id_test, **recipe.data.ood_test}
    cache = cache_dir(recipe)
    return [open_source(spec, name, classes, cache) for name, spec in specs.items() if spec is not None]


def _alphas_by_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the trainings by folder, with the alphas at which they are read; zero-shot by its name, at 0."""
    runs = {ZERO_SHOT: [0.0]} if any(not row["runs"] for row in rows) else {}
    for row in rows:
        for run in row["runs"]:
            runs[run] = sorted({*runs.get(run, []), row["alpha"]})
    return runs


def _trainings(study: Snapshot, names: Iterable[str]) -> dict[str, TrialRow]:
    """Returns trainings by their folder in the study.

    Raises:
        StorageError: A line of the ledger names one that the study has not.
    """
    known = {row.training: row for row in study.rows}
    for name in names:
        if name not in known:
            rule = "the ledger must name trainings of the study"
            raise StorageError(Problem(str(study.study_dir / COMMITS), rule, visible(repr(name))))
    return {name: known[name] for name in names}


def _evaluate(
    study_dir: Path,
    recipe: Recipe,
    start: Start,
    opened: Callable[..., Trained],
    runs: Mapping[str, Sequence[float]],
    trained: Mapping[str, TrialRow],
    sources: Sequence[Source],
    folder: Path,
    log: Log,
    say: Callable[[str], None],
) -> dict[str, pa.Table]:
    """Reads every training at its alphas; what is there already is not read again.

    Returns:
        Predictions by the folder of the training, zero-shot by its name.
    """
    clip, batch_size = start.clip, recipe.evaluate.batch_size
    paths = {name: folder / f"{name}.parquet" for name in runs}
    missing = {name: len(alphas) for name, alphas in runs.items() if not paths[name].exists()}
    sets: list[ImageSet] = []
    if missing:
        keeping = Keeping(cache_dir(recipe), recipe.data.cache_gb)
        sets += [image_set(each, clip.to_input, clip.input_key, keeping) for each in sources]

    def predicted(row: TrialRow | None, alphas: Sequence[float]) -> pa.Table:
        """Returns the predictions of a training, or of the zero-shot model (None)."""
        if row is None:
            heads = load_tensors(files.inside(study_dir, f"{PREPARED}/{HEADS}"))
            classifier = build_classifier(clip, heads["class_head"], recipe.train, device_of(recipe))
            return predict_all(classifier, sets, 0.0, batch_size, RunContext())
        with opened(row, name=row.name).mixtures() as mixed:
            return concat([predict_all(mixed(alpha), sets, alpha, batch_size, RunContext()) for alpha in alphas])

    tables: dict[str, pa.Table] = {}
    on_progress, done, total = time_left(say, "evaluations"), 0, sum(missing.values())
    on_progress(done, total)
    for number, (name, alphas) in enumerate(runs.items(), start=1):
        path, at = paths[name], ", ".join(f"{alpha:.2f}" for alpha in alphas)
        say(f"{number}/{len(runs)} {name} at alpha {at}{'' if name in missing else ': read before'}")
        if name in missing:
            table = predicted(trained.get(name), alphas)
            log.check()
            write_predictions(path, table)
            done += missing[name]
            on_progress(done, total)
        tables[name] = read_predictions(path)
    return tables
