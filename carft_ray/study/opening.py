"""Opening a study for one search: locks, repairs, the check of its recipe, another search space."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from optuna import get_all_study_names
from optuna.storages import JournalStorage

from carft_ray import files
from carft_ray.errors import Problem, StorageError
from carft_ray.layout import FENCE, FOLDERS, JOURNAL
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study import rows
from carft_ray.study.identity import claim, record_recipe
from carft_ray.study.lock import gone_if_nothing_began, repair_journal, study_lock
from carft_ray.study.recovery import recover
from carft_ray.study.rows import storage_of
from carft_ray.study.space_revisions import begin_generation, remove_half_made
from carft_ray.study.study import Study


@contextlib.contextmanager
def open_study(study_dir: Path, recipe: Recipe, change_space: bool = False) -> Iterator[Study]:
    """Opens a study for one search, or makes it: locks, repairs, checks the recipe. Call ``recover_running`` next.

    When model or data of a new study turn out unfit before a training has begun, or it gets no Ray, it vanishes.

    Args:
        study_dir: The study directory; made when it is missing.
        recipe: The recipe of the search.
        change_space: The search space may change; a change begins another generation of the study.

    Raises:
        StorageError: Another search runs on it, the study cannot be read or written, or its journal has lost trainings.
        RecipeError: It is the study of another recipe.
        UsageError: The folder holds something that is no study.
    """
    study_dir = study_dir.resolve()  # Optuna's own lock spins for ever on a relative path
    with study_lock(study_dir) as held:
        claimed = claim(study_dir, recipe, change_space)
        files.remove_remains(study_dir)
        notes = [note for note in [held.note] if note] + repair_journal(study_dir)
        with rows.readable(study_dir):
            storage = storage_of(study_dir)
            _require_known(study_dir, storage)
            with files.writing(study_dir / JOURNAL):
                remove_half_made(storage, claimed.generation)
            if claimed.space_changes:
                before = Study(study_dir, claimed.kept, held, [], storage)
                recover(before, "trial")  # what has ended is recorded in the space that it was drawn from
                with before.journal.writing():
                    notes.append(begin_generation(storage, claimed.generation, recipe))
            elif change_space:
                notes.append("--change-space has no effect: the space is that of the study")
            if claimed.is_news:
                held.check()
                record_recipe(study_dir, recipe, claimed.space_changes)
            study = Study(study_dir, recipe, held, notes, storage)
        with gone_if_nothing_began(study_dir, claimed.is_new, study.began):
            yield study


def _require_known(study_dir: Path, storage: JournalStorage) -> None:
    """Raises a ``StorageError`` when trainings have begun that the journal does not know: it was cut or replaced."""
    studies = filter(None, (rows.stored(storage, name) for name in get_all_study_names(storage)))
    known = {trial.user_attrs.get("name") for study in studies for trial in study.get_trials(deepcopy=False)}
    begun = [path.parent for kind in FOLDERS.values() for path in sorted(study_dir.glob(f"{kind}/*/{FENCE}"))]
    if unknown := [str(folder.relative_to(study_dir)) for folder in begun if folder.name not in known]:
        value = f"one that knows nothing of {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        step = "Restore it from a copy. Without one: move those folders elsewhere, and the search begins without them."
        rule = "must be the journal of the trainings in this study"
        raise StorageError(Problem(str(study_dir / JOURNAL), rule, value, next_step=step))
