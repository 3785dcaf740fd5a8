"""What is kept of the best trials: weights, thumbnails, and ``best.yaml``, the best one as a recipe that `train` runs.

Both follow every training that ends. At opening all trainings are gone through once: what a kill has left over goes,
and ``best.yaml`` is written where the kill came first.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from carft_ray import files
from carft_ray.layout import ATTEMPT, BEST, OWN, ROWS, STEP, THUMBNAILS, WEIGHTS
from carft_ray.recipe.loading import apply, dump_recipe, trust_word
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import violation_words
from carft_ray.store.folder import Store
from carft_ray.study.pareto_front import front_rule, stand
from carft_ray.study.rows import best_first, best_row
from carft_ray.study.training import TrialRow

OF_THE_BEST = (WEIGHTS, THUMBNAILS)  # files of a trial that stay while it is one of the best


class Retention:
    """Keeps weights and thumbnails of the best ``search.keep_checkpoints`` trials, of those that the ledger has fixed,
    and of all baselines, no others.

    Of a failed or cut training no attempt's files stay, of a complete one those of its result, without checkpoints. In
    a Pareto search those of all trainings on the front stay, since the best point moves along it; one that has left the
    front never comes back.

    Args:
        study_dir: The study directory.
        recipe: Of the study.
        store: Of the study's log: it is told what goes.
        fixed: Names of trials that stay in any case: the ledger has fixed them (``ledger.fixed_trials``).
    """

    def __init__(self, study_dir: Path, recipe: Recipe, store: Store, fixed: Collection[str] = ()) -> None:
        self._study_dir, self._recipe, self._store = study_dir, recipe, store
        self._rule, self._fixed = front_rule(recipe.search), fixed
        self._kept: dict[str, TrialRow] = {}  # trials whose weights stay, by name; the best is among them
        self._noted: tuple[str, float | None] | None = None  # name and alpha of what best.yaml holds

    def ended(self, row: TrialRow) -> None:
        """Removes what is not kept any longer, now that a training has ended."""
        if row.outcome == "running":
            return
        folder = row.folder(self._study_dir)
        here = [path for pattern in (f"{ATTEMPT}*", f"{ATTEMPT}*/*") for path in folder.glob(pattern)]
        names = {path.relative_to(self._study_dir).as_posix() for path in here}
        for name in sorted({*names, *self._store.known(row.training)}):
            attempt, _, inside = name.removeprefix(f"{row.training}/").partition("/")
            place, what = f"{row.training}/{attempt}", inside.partition("/")[0]
            if attempt.startswith(ATTEMPT) and not (row.outcome == "complete" and place == row.attempt_name):
                self._remove(place)
            elif what.startswith(STEP) or what in (OWN, ROWS):
                self._remove(f"{place}/{what}")
        if row.outcome == "complete" and row.kind == "trial":
            self._kept[row.name] = row
            for worse in self._worse(self._kept):
                del self._kept[worse.name]
                for name in OF_THE_BEST:
                    self._remove(f"{worse.attempt_name}/{name}")

    def foresee(self, row: TrialRow) -> None:
        """Of a complete training whose end is not written yet, has copies leave out what ``ended`` will remove."""
        if row.kind == "trial" and row.name in [worse.name for worse in self._worse({**self._kept, row.name: row})]:
            for name in OF_THE_BEST:
                self._store.forget_files(f"{row.attempt_name}/{name}")

    def _worse(self, rows: Mapping[str, TrialRow]) -> list[TrialRow]:
        """Returns the trials among those by name whose weights do not stay."""
        ranked = best_first(self._ranked(rows))
        worse = ranked[self._recipe.search.keep_checkpoints :]
        return [row for row in worse if not row.standing and row.name not in self._fixed]

    def _remove(self, name: str) -> None:
        self._store.forget_files(name)
        path = self._study_dir / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # an attempt that was taken for lost may still write there
        else:
            files.remove(path)

    def note_best(self) -> None:
        """Writes ``best.yaml`` when the best trial, or its point on the front, has changed."""
        best = self.best()
        if best is not None and (best.name, best.alpha) != self._noted:
            write_best(self._study_dir, self._recipe, best)
            self._noted = best.name, best.alpha

    def best(self) -> TrialRow | None:
        """Returns the best of the trials that have ended, with its standing in a Pareto search.

        What is not kept is neither on the front nor will be, so it counts for nothing: no trial is looked at twice.
        """
        return best_row(self._ranked(self._kept))

    def _ranked(self, rows: Mapping[str, TrialRow]) -> list[TrialRow]:
        kept = sorted(rows.values(), key=lambda row: row.number)  # of equal points the first one counts
        return kept if self._rule is None else stand(kept, self._rule)


def write_best(study_dir: Path, recipe: Recipe, best: TrialRow) -> None:
    """Writes the best trial as a recipe, with its alpha fixed; where the file says the same, nothing is written.

    Args:
        study_dir: The study directory.
        recipe: Of the study, with absolute paths.
        best: The trial, with its standing in a Pareto search.

    Raises:
        StorageError: It cannot be read or written.
    """
    trust = trust_word(recipe)
    head = f"# The best trial of this study, {best.name}. Run it: carft-ray train {BEST} --out FOLDER{trust}\n"
    head += "".join(f"# {line}\n" for line in constraint_lines(best))
    if not recipe.data.ood_val:
        head += "# Selected on ID only: the recipe has no ood_val.\n"
    path = study_dir / BEST
    content = (head + dump_recipe(apply(recipe, {**best.values, "alpha": best.alpha}))).encode()
    if not files.exists(path) or files.read_whole(study_dir, BEST) != content:
        files.write_bytes(path, content)


def constraint_lines(best: TrialRow | None) -> list[str]:
    """Returns a line that says plainly when not even the best trial meets the constraints."""
    missed = violation_words(best.metrics) if best is not None else ""
    if best is None or not missed:
        return []
    return [f"No trial meets all constraints; {best.name} violates them least: it {missed}."]
