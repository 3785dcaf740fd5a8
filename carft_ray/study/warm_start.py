"""Trials of other studies for the sampler of this one: it begins with what they have found.

They are entered in the journal as finished trials with the attribute ``warm_from``. So they have numbers there, and are
no trials of the study: not counted, no rows, never its best. Each study is taken in once, with what it holds then: one
append per trial, and a mark at the end. A kill in between costs nothing; the next search takes in what is missing.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from carft_ray.data.class_names import class_folders
from carft_ray.errors import Problem, RecipeError, nearest
from carft_ray.layout import JOURNAL
from carft_ray.recipe.loading import recipe_hash
from carft_ray.recipe.messages import shown
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space.grid import place
from carft_ray.study import rows
from carft_ray.study.identity import GENERATION, RECIPES, read_manifest
from carft_ray.study.ledger import AGAINST, read_ledger, reads_of
from carft_ray.study.provenance import PROVENANCE
from carft_ray.study.rows import WARM_FROM, is_training, state_and_values
from carft_ray.study.space_revisions import placed_trial
from carft_ray.words import counted, times

MARKS = "warm_started"  # attribute of the Optuna study: what was taken in, by the id of the source
KEY = "search.warm_start"


def take_in(study: optuna.Study, study_dir: Path, recipe: Recipe) -> list[str]:
    """Enters the finished trials of the recipe's ``search.warm_start`` that lie in its space.

    Args:
        study: The Optuna study of the trials.
        study_dir: The study directory, absolute.
        recipe: The recipe with absolute paths.

    Returns:
        What was taken in and what was left out, a sentence per source that is new.

    Raises:
        RecipeError: A source is no study, the study itself, or has another objective; all problems at once.
        StorageError: A source cannot be read.
    """
    marks: dict[str, dict[str, Any]] = dict(study.user_attrs.get(MARKS, {}))
    notes = []
    for source in new_sources(study, study_dir, recipe):
        number = source_id(source)
        if number in marks:
            notes.append(f"warm start: {source} is a copy of {marks[number]['path']}, which was taken in before")
            continue
        taken, left_out = _take(study, source, number, recipe)
        reads = len(reads_of(read_ledger(source))) + inherited_reads(source)
        marks[number] = {"path": str(source), "taken": taken, "left_out": left_out, "test_reads": reads}
        study.set_user_attr(MARKS, marks)
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        note = f"warm start: {taken} of {counted(taken + sum(left_out.values()), 'trial')} of {source} taken in"
        notes.append(f"{note}; left out: {why}" if why else note)
        if reads:
            notes.append(f"warm start: the test sets of {source} were read {times(reads)}; this counts here too")
    return notes


def new_sources(study: optuna.Study, study_dir: Path, recipe: Recipe) -> list[Path]:
    """Returns the studies of ``search.warm_start`` that ``take_in`` would take in, once all of them are fit for it.

    Args:
        study: As of ``take_in``, and so are the others.
        study_dir: The study directory.
        recipe: The recipe.

    Raises:
        RecipeError: As ``take_in``.
    """
    done = {mark["path"] for mark in study.user_attrs.get(MARKS, {}).values()}  # those may be gone by now
    sources = [Path(source) for source in dict.fromkeys(recipe.search.warm_start) if source not in done]
    if problems := [problem for source in sources for problem in _problems(source, study_dir, recipe)]:
        raise RecipeError(problems)
    return sources


def inherited_reads(study_dir: Path) -> int:
    """Returns how often test sets were read in the studies that this one has learned from or whose winners are its
    baselines (`confirm --against`), and in theirs.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: There is no study, or its journal is damaged.
    """
    with _search_of(study_dir) as search:
        marks = {} if search is None else search.user_attrs.get(MARKS, {})
    found = {number: mark.get("test_reads", 0) for number, mark in marks.items()}
    for entry in read_ledger(study_dir):
        for number, reads in entry.details.get(AGAINST, {}).items():
            found[number] = max(reads, found.get(number, 0))
    return sum(found.values())


def _take(study: optuna.Study, source: Path, number: str, recipe: Recipe) -> tuple[int, dict[str, int]]:
    """Enters what is not there yet; returns how many trials of the source are, and how many are not by reason."""
    theirs = _recipe_of(source)
    own = theirs.train.model_dump(mode="json")  # values that its trials have in common
    with _search_of(source) as search:
        trials = [] if search is None else rows.trainings(search)
    same_pruner = theirs.evaluate == recipe.evaluate and theirs.search.pruner == recipe.search.pruner
    known = [trial.user_attrs[WARM_FROM] for trial in study.get_trials(deepcopy=False) if not is_training(trial)]
    there = {(origin["id"], origin["trial"]) for origin in known if "id" in origin}
    taken, left_out = 0, Counter[str]()
    for trial in trials:
        row = rows.row_of("trial", trial)
        if state_and_values(trial)[0] not in (TrialState.COMPLETE, TrialState.PRUNED):
            left_out["not finished" if row.outcome == "running" else "lost"] += 1
            continue
        placed = place({**own, **row.values}, recipe)
        if isinstance(placed, str):
            left_out[f"with {placed} outside the space"] += 1
            continue
        taken += 1
        if (number, row.name) not in there:
            origin = {"id": number, "path": str(source), "trial": row.name}
            attributes = {WARM_FROM: origin, "outcome": row.outcome, "alpha": row.alpha}
            study.add_trial(placed_trial(trial, recipe, placed, attributes, with_values=same_pruner))
    return taken, dict(left_out)


def _problems(source: Path, study_dir: Path, recipe: Recipe) -> Iterator[Problem]:
    key = f"{KEY}: {source}"
    if not (source / JOURNAL).is_file():
        value = "no such folder" if not source.exists() else f"one without {JOURNAL}"
        others = [str(path.parent) for path in source.parent.glob(f"*/{JOURNAL}")]
        yield Problem(key, "must be the folder of a study", value, nearest=nearest(str(source), others))
        return
    if source == study_dir or source_id(source) == source_id(study_dir):
        yield Problem(key, "must be another study", "this one" if source == study_dir else "a copy of this one")
        return
    ours, theirs = _objective(recipe), _objective(_recipe_of(source))
    ours["the classes"], theirs["the classes"] = _classes(study_dir, recipe), _classes(source, _recipe_of(source))
    for name in ours:
        if None not in (ours[name], theirs[name]) and ours[name] != theirs[name]:
            rule = f"must be a study with {name} of this one, {shown(ours[name])}: other objectives do not compare"
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


def _classes(study_dir: Path, recipe: Recipe) -> list[str] | None:
    """Returns the class folders in label order; None where nobody knows them: their images are gone."""
    kept = read_manifest(study_dir).get(PROVENANCE, {}).get("classes")
    if kept is not None:
        return list(kept)
    try:
        return list(class_folders(recipe))
    except OSError:
        return None


def _recipe_of(source: Path) -> Recipe:
    return Recipe.model_validate(read_manifest(source)["recipe"])


@contextlib.contextmanager
def _search_of(source: Path) -> Iterator[optuna.Study | None]:
    """Gives the Optuna study of a study's trials to read from; None where no trial was ever begun."""
    name = rows.generation_name(read_manifest(source).get(GENERATION, 1))
    with rows.readable(source):
        yield rows.stored(rows.storage_of(source), name)


def source_id(study_dir: Path) -> str:
    """Returns what identifies a study, wherever its folder is: when it was made, and with which recipe."""
    manifest = read_manifest(study_dir)
    first = manifest[RECIPES][0]["recipe"] if manifest.get(RECIPES) else manifest["recipe"]
    text = f"{manifest.get('created')} {recipe_hash(Recipe.model_validate(first))}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
