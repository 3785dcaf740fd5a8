"""Opening a study for one search: claims its log, checks its recipe, moves to another recipe and search space."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from optuna.storages import JournalStorage

from carft_ray import files
from carft_ray.errors import ClusterError, DataError, HoldOutError, Problem, RecipeError, StorageError
from carft_ray.layout import ATTEMPT, COMMITS, FOLDERS, PREPARED, STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.store.folder import PROBE
from carft_ray.store.log import Log
from carft_ray.study import ledger, rows
from carft_ray.study.holding import check_fit, foreign_names, held, take_back_stop
from carft_ray.study.recipe_identity import claim, class_of, compare, recipe_record
from carft_ray.study.space_revisions import move_trials
from carft_ray.study.study import Study
from carft_ray.study.take_over import recover
from carft_ray.study.trust import note_written, to_record
from carft_ray.study.uploads import open_log, uploading
from carft_ray.study.warm_start import new_sources

NO_REASON_NEEDED = "--again has no effect: no test set was read, nothing remains to train, or an earlier reason applies"


@contextlib.contextmanager
def open_study(
    study_dir: Path,
    recipe: Recipe,
    change_space: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    keeps_recipe: bool = False,
    is_search: bool = False,
    again: str | None = None,
) -> Iterator[Study]:
    """Opens a study for one search, or makes it: claims it and checks the recipe. Call ``recover_running`` next.

    When model or data of a new study turn out unfit before a training has begun, or it gets no Ray, it vanishes.

    Args:
        study_dir: The study directory; made when it is missing.
        recipe: The recipe of the search.
        change_space: The search space may change; a change moves the trials to it.
        tell: Told what is waited for, and from whom the study was taken over.
        keeps_recipe: A study that exists keeps its recipe: what differs holds only this time.
        is_search: The sampler will propose trials: after a read of the test sets, more of them need a reason.
        again: That reason; the ledger keeps it.

    Raises:
        HoldOutError: The test sets were read and no reason is given, or the ledger is not as carft-ray has written it.
        StorageError: Another search runs on it, the study cannot be read or written, or its log has lost trainings.
        RecipeError: It is the study of another recipe, or a study of ``search.warm_start`` is unfit.
        UsageError: The folder holds something that is no study, or the reason is empty.
    """
    ledger.check_reason(again)
    study_dir = study_dir.resolve()
    check_fit(study_dir)
    log = open_log(study_dir)
    log.follow()
    num_seen, (kept, differences) = log.number, compare(study_dir, log, recipe, change_space)  # before a write
    sources = [] if keeps_recipe else new_sources(log, study_dir, recipe)
    is_bare = not foreign_names(study_dir)
    with contextlib.ExitStack() as stack:
        with rows.readable(log) as storage:
            _require_known(study_dir, log, storage)
            goes_on = ledger.going_on(study_dir, log, storage, recipe, again) if is_search else None
            stack.enter_context(held(log, tell))
            files.remove(study_dir / STOP)  # it was asked of another command; from here on, of this one
            take_back_stop(log)
            stack.enter_context(uploading(log))
            if log.claimed > num_seen + 1:  # another search came between
                kept, differences = compare(study_dir, log, recipe, change_space)
                goes_on = ledger.going_on(study_dir, log, storage, recipe, again) if is_search else None
            if kept is None:
                claim(study_dir, log, recipe)
            else:
                note_written(study_dir, recipe)
            files.remove_remains(study_dir)
            for path in (study_dir / COMMITS).glob(f"{PROBE}*"):  # of a search that was killed at its first write
                files.remove(path)
            notes, moves = list[str](), any(class_of(one.path) == "space" for one in differences)
            if goes_on is not None:
                ledger.record(study_dir, log, recipe, ledger.WENT_ON, details=goes_on, reason=again or "")
            elif again is not None:
                notes.append(NO_REASON_NEEDED)
            if change_space and not moves:
                notes.append("--change-space has no effect: the search space is the same as in the study")
            if moves:
                recover(Study(study_dir, recipe, log, [], storage), "trial")  # what has ended, in the space before
            if kept is not None and differences and not keeps_recipe:
                with log.commit(recipe_record(to_record(study_dir, kept, recipe))):
                    notes += move_trials(storage, recipe) if moves else []
            study = Study(study_dir, recipe, log, notes, storage, sources)
        with gone_if_nothing_began(study_dir, log, is_bare and kept is None, study.began):
            yield study


def _require_known(study_dir: Path, log: Log, storage: JournalStorage) -> None:
    """Raises a ``StorageError`` when trainings have begun that the log does not know: it was cut or replaced."""
    while unknown := _unknown(study_dir, storage):
        if log.follow():  # a search that runs has begun them since; the claim says that
            continue
        value = f"one without {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        step = "Restore it from a copy. If there is none, move those folders away; the search then starts without them."
        rule = "must be the log of the trainings in this study"
        raise StorageError(Problem(str(study_dir / COMMITS), rule, value, next_step=step))


def _unknown(study_dir: Path, storage: JournalStorage) -> list[str]:
    known = {row.name for found in rows.all_rows(storage).values() for row in found}
    there = [path for kind in FOLDERS.values() for path in sorted(study_dir.glob(f"{kind}/*"))]
    others = [path for path in there if path.name not in known and any(path.glob(f"{ATTEMPT}*"))]
    return [str(path.relative_to(study_dir)) for path in others]


@contextlib.contextmanager
def gone_if_nothing_began(folder: Path, log: Log, is_new: bool, began: Callable[[], bool]) -> Iterator[None]:
    """Deletes a study created by this call if setup fails before any training: a corrected recipe may use its name.

    So when Ray does not start. When Ray ends during the preparation, what is prepared stays for the same command. What
    another search has taken over stays, too.

    Args:
        folder: A claimed folder.
        log: By which it is held.
        is_new: Whether this call has made all that is in it; another one stays.
        began: Tells whether a training has begun in it; then it stays.
    """
    try:
        yield
    except (RecipeError, DataError, HoldOutError, ClusterError) as error:
        stays = isinstance(error, ClusterError) and files.exists(folder / PREPARED)
        if is_new and not stays and not log.is_lost and not began():
            log.abandon()
            shutil.rmtree(folder, ignore_errors=True)
        raise
