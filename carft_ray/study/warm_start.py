"""Trials of other studies for the sampler of this one: it begins with what they have found.

They are entered in the log as finished trials with the attribute ``warm_from``. So they have numbers there, and are
no trials of the study: not counted, no rows, never its best. Each study is taken in once, with what it holds then: all
of its trials, and a record of it, in one commit.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from carft_ray.data.class_names import class_folders
from carft_ray.errors import Problem, RecipeError, UsageError, nearest
from carft_ray.layout import COMMITS
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space import place
from carft_ray.recipe.written import shown
from carft_ray.store.copy import STATE
from carft_ray.store.log import Log, log_of
from carft_ray.study import rows
from carft_ray.study.attributes import ALPHA, OUTCOME, WARM_FROM
from carft_ray.study.holding import is_study
from carft_ray.study.ledger import AGAINST, read_ledger, reads_of
from carft_ray.study.place import STUDIES, absolute, address_in, fetched, named
from carft_ray.study.provenance import provenance_of
from carft_ray.study.recipe_identity import read_manifest, study_recipe
from carft_ray.study.records import TAKEN_IN, all_of
from carft_ray.study.rows import state_and_values
from carft_ray.study.space_revisions import placed_trial
from carft_ray.words import counted, times

KEY = "search.warm_start"


def take_in(study: optuna.Study, log: Log, sources: Sequence[Path], recipe: Recipe) -> list[str]:
    """Enters the finished trials of other studies that lie in the recipe's space.

    Args:
        study: The Optuna study of the trials.
        log: By which the study is held.
        sources: Of ``new_sources``.
        recipe: The recipe with absolute paths.

    Returns:
        What was taken in and what was left out, a sentence per source that is new.

    Raises:
        StorageError: A source cannot be read.
    """
    notes = []
    for source in sources:
        number, before, name = source_id(source), _sources(log), named(source)
        if number in before:
            notes.append(f"warm start: {name} is a copy of {before[number]['path']}, which is already in use")
            continue
        taken, left_out = _placed(source, number, recipe)
        reads = num_test_reads(source, log_of(source))
        origin = {"id": number, "path": name, "test_reads": reads}
        with log.commit({"kind": TAKEN_IN, **origin, "taken": len(taken), "left_out": left_out}):
            study.add_trials(taken)
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        found = counted(len(taken) + sum(left_out.values()), "trial")
        note = f"warm start: {len(taken)} of {found} of {name} are used"
        notes.append(f"{note}; left out: {why}" if why else note)
        if reads:
            notes.append(
                f"warm start: the test sets of {name} were read {times(reads)}; this also counts for this study"
            )
    return notes


def _sources(log: Log) -> dict[str, dict[str, Any]]:
    """Returns what was taken in, by the id of the source."""
    return {record["id"]: record for _, record in all_of(log, TAKEN_IN)}


def new_sources(log: Log, study_dir: Path, recipe: Recipe) -> list[Path]:
    """Returns the studies of ``search.warm_start`` that a study has not taken in, once all of them are fit for it.

    Args:
        log: Of the study.
        study_dir: The study directory, absolute.
        recipe: The recipe with absolute paths.

    Raises:
        RecipeError: A source is no study, the study itself, or has another objective; all problems at once.
    """
    done = {record["path"] for record in _sources(log).values()}  # those may be gone by now
    try:
        written = dict.fromkeys(map(absolute, recipe.search.warm_start))  # an address may end with a slash
        sources = [fetched(source, STATE) for source in written if source not in done]
    except UsageError as error:
        raise RecipeError(error.problems) from None
    if problems := [problem for source in sources for problem in _problems(source, study_dir, log, recipe)]:
        raise RecipeError(problems)
    return sources


def num_test_reads(study_dir: Path, log: Log) -> int:
    """Returns how often the test sets were read, by studies that this one has learned from too.

    Raises:
        HoldOutError, StorageError: As ``inherited_reads``.
    """
    return len(reads_of(read_ledger(study_dir, log))) + inherited_reads(study_dir, log)


def inherited_reads(study_dir: Path, log: Log) -> int:
    """Returns how often test sets were read in the studies that this one has learned from or whose winners are its
    baselines (`confirm --against`), and in theirs.

    Args:
        study_dir: The study directory.
        log: Its log.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: There is no study, or its log is damaged.
    """
    found = {number: source.get("test_reads", 0) for number, source in _sources(log).items()}
    for entry in read_ledger(study_dir, log):
        for number, reads in entry.details.get(AGAINST, {}).items():
            found[number] = max(reads, found.get(number, 0))
    return sum(found.values())


def _placed(source: Path, number: str, recipe: Recipe) -> tuple[list[FrozenTrial], dict[str, int]]:
    """Returns the trials of a source that are taken in, and how many are not by reason."""
    log = log_of(source)
    theirs = study_recipe(source, log)
    own = theirs.train.model_dump(mode="json")  # values that its trials have in common
    with rows.readable(log) as storage:
        search = rows.stored(storage, rows.STUDY_NAMES["trial"])
        trials = [] if search is None else rows.trainings(search)
    same_pruner = theirs.evaluate == recipe.evaluate and theirs.search.pruner == recipe.search.pruner
    taken, left_out = [], Counter[str]()
    for trial in trials:
        row = rows.row_of("trial", trial)
        if state_and_values(trial)[0] not in (TrialState.COMPLETE, TrialState.PRUNED):
            left_out["not finished" if row.outcome == "running" else "lost"] += 1
            continue
        placed = place({**own, **row.values}, recipe)
        if isinstance(placed, str):
            left_out[f"with {placed} outside the space"] += 1
            continue
        origin = {"id": number, "path": named(source), "trial": row.name}
        attributes = {WARM_FROM: origin, OUTCOME: row.outcome, ALPHA: row.alpha}
        taken.append(placed_trial(trial, recipe, placed, attributes, with_values=same_pruner))
    return taken, dict(left_out)


def _problems(source: Path, study_dir: Path, log: Log, recipe: Recipe) -> Iterator[Problem]:
    key = f"{KEY}: {named(source)}"
    if not is_study(source):
        value = "no such folder" if not source.exists() else f"one without {COMMITS}/"
        others = [str(path.parent) for path in source.parent.glob(f"*/{COMMITS}")]
        yield Problem(key, "must be the folder of a study", value, nearest=nearest(str(source), others))
        return
    if source == study_dir or (is_study(study_dir) and source_id(source) == source_id(study_dir)):
        yield Problem(key, "must be another study", "this one" if source == study_dir else "a copy of this one")
        return
    their_log = log_of(source)
    their_recipe = study_recipe(source, their_log)
    ours, theirs = _objective(recipe), _objective(their_recipe)
    ours["the classes"], theirs["the classes"] = (
        _classes(study_dir, log, recipe),
        _classes(source, their_log, their_recipe),
    )
    for name in ours:
        if None not in (ours[name], theirs[name]) and ours[name] != theirs[name]:
            rule = f"must be a study with {name} of this one, {shown(ours[name])}: other objectives are not comparable"
            yield Problem(key, rule, shown(theirs[name]))


def _objective(recipe: Recipe) -> dict[str, Any]:
    """Returns by name what two studies must share, or their objectives do not compare."""
    search = recipe.search
    is_weighted = search.objective.kind == "weighted_mean" and recipe.data.ood_val
    return {
        "search.objective.kind": search.objective.kind,
        "search.objective.id_weight": search.objective.id_weight if is_weighted else None,
        "search.alpha.mode": search.alpha.mode,
        "search.constraints": search.constraints.model_dump(mode="json"),
        "the sets of data.ood_val": sorted(recipe.data.ood_val),
    }


def _classes(study_dir: Path, log: Log, recipe: Recipe) -> list[str] | None:
    """Returns the class folders in label order; None where nobody knows them: their images are gone."""
    kept = provenance_of(log).get("classes")
    if kept is not None:
        return list(kept)
    if address_in(study_dir, STUDIES) is not None:
        return None  # of a study in a bucket no file is opened that it names
    try:
        return list(class_folders(recipe))
    except OSError:
        return None


def source_id(study_dir: Path) -> str:
    """Returns what identifies a study, wherever its folder is; a copy has the same."""
    return str(read_manifest(study_dir)["id"])
