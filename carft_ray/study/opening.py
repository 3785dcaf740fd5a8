"""Opening a study for one search: locks, repairs, the check of its recipe, another search space."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from carft_ray import files
from carft_ray.layout import JOURNAL
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.region import Direction
from carft_ray.study import rows
from carft_ray.study.identity import claim, record_recipe
from carft_ray.study.lock import gone_if_nothing_began, repair_journal, study_lock
from carft_ray.study.recovery import recover
from carft_ray.study.rows import storage_of
from carft_ray.study.space_revisions import begin_generation, remove_half_made
from carft_ray.study.study import Study


@contextlib.contextmanager
def open_study(study_dir: Path, recipe: Recipe, may: Collection[Direction] = ()) -> Iterator[Study]:
    """Opens a study for one search, or makes it: locks, repairs, checks the recipe. Call ``recover_running`` next.

    When model or data turn out unfit before a training has begun, or a new study gets no Ray, the study vanishes.

    Args:
        study_dir: The study directory; made when it is missing.
        recipe: The recipe of the search.
        may: How the search space may change; a change begins another generation of the study.

    Raises:
        StorageError: Another search runs on it, or the study cannot be read or written.
        RecipeError: It is the study of another recipe.
        UsageError: The folder holds something that is no study.
    """
    study_dir = study_dir.resolve()  # Optuna's own lock spins for ever on a relative path
    with study_lock(study_dir) as held:
        claimed = claim(study_dir, recipe, may)
        files.remove_remains(study_dir)
        notes = [note for note in [held.note] if note] + repair_journal(study_dir)
        with rows.readable(study_dir):
            storage = storage_of(study_dir)
            with files.writing(study_dir / JOURNAL):
                remove_half_made(storage, claimed.generation)
            if claimed.space_changes:
                before = Study(study_dir, claimed.kept, held, [], storage)
                recover(before, "trial")  # what has ended is recorded in the space that it was drawn from
                with before.journal.writing():
                    notes.append(begin_generation(storage, claimed.generation, recipe))
            elif may:
                notes.append(f"{' '.join(f'--{one}' for one in may)} has no effect: the space is that of the study")
            if claimed.is_news:
                held.check()
                record_recipe(study_dir, recipe, claimed.space_changes)
            study = Study(study_dir, recipe, held, notes, storage)
        with gone_if_nothing_began(study_dir, claimed.is_new, study.began):
            yield study
