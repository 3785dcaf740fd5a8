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
from carft_ray.study import pareto_front
from carft_ray.study.expected import Expectation, expectation, stand
from carft_ray.study.pareto_front import front_rule
from carft_ray.study.rows import best_row, rank
from carft_ray.study.training import TrialRow

WHOLE = 3  # values, of which no training goes
OF_THE_BEST = (WEIGHTS, THUMBNAILS)  # files of a trial that stay while it is one of the best


class Retention:
    """Keeps weights and thumbnails of the best ``search.keep_checkpoints`` trials, of all trainings of the best three
    values, of those that the ledger has fixed, and of the best training of each baseline, no others.

    The best trials are those of the values that are expected to be best, of equal values the ones that measured most
    at their alpha. Of a failed or cut training no attempt's files stay, of a complete one those of its result, without
    checkpoints. In a Pareto search those of all trainings on the front stay, since the best point moves along it.

    Args:
        study_dir: The study directory.
        recipe: Of the study.
        store: Of the study's log: it is told what goes.
        fixed: Names of trials that stay in any case: the ledger has fixed them (``ledger.fixed_trials``).
    """

    def __init__(self, study_dir: Path, recipe: Recipe, store: Store, fixed: Collection[str] = ()) -> None:
        self._study_dir, self._recipe, self._store = study_dir, recipe, store
        self._rule, self._fixed = front_rule(recipe.search), fixed
        self._rows: dict[str, TrialRow] = {}  # trials and baselines that have ended, by folder
        self._ranking: tuple[list[TrialRow], list[TrialRow]] = [], []  # of which rows, and these from the best down
        self._expected: Expectation | None = None  # of these rows
        self._without: set[str] = set()  # folders of trainings without weights
        self._cleared: set[str] = set()  # folders from which everything was removed
        self._noted: tuple[str, float | None] | None = None  # name and alpha of what best.yaml holds

    def ended(self, row: TrialRow) -> None:
        """Removes what is not kept any longer, now that a training has ended."""
        if row.outcome == "running":
            return
        folder = row.folder(self._study_dir)
        here = [path for pattern in (f"{ATTEMPT}*", f"{ATTEMPT}*/*") for path in folder.glob(pattern)]
        names = {path.relative_to(self._study_dir).as_posix() for path in here}
        names |= {*self._store.known(row.training)}
        for name in sorted(names):
            attempt, _, inside = name.removeprefix(f"{row.training}/").partition("/")
            place, what = f"{row.training}/{attempt}", inside.partition("/")[0]
            if attempt.startswith(ATTEMPT) and not (row.outcome == "complete" and place == row.attempt_name):
                self._remove(place)
            elif what.startswith(STEP) or what in (OWN, ROWS):
                self._remove(f"{place}/{what}")
        if f"{row.attempt_name}/{WEIGHTS}" not in names:
            self._without.add(row.training)
        if row.kind in ("trial", "baseline"):
            self._rows[row.training] = row

    def keep_best(self) -> None:
        """Removes weights and thumbnails of what is not among the best any longer; writes ``best.yaml`` if it changed.

        Call it once all trainings that have ended are known.
        """
        for worse in self._worse(self._rows):
            if worse.training not in self._cleared:
                for name in OF_THE_BEST:
                    self._remove(f"{worse.attempt_name}/{name}")
                self._cleared.add(worse.training)
                self._without.add(worse.training)
        best = self.best()
        if best is not None and (best.name, best.alpha) != self._noted:
            write_best(self._study_dir, self._recipe, best)
            self._noted = best.name, best.alpha

    def foresee(self, row: TrialRow) -> None:
        """Of a complete training whose end is not written yet, has copies leave out what ``keep_best`` will remove."""
        if row.training in [worse.training for worse in self._worse({**self._rows, row.training: row})]:
            for name in OF_THE_BEST:
                self._store.forget_files(f"{row.attempt_name}/{name}")

    def _worse(self, rows: Mapping[str, TrialRow]) -> list[TrialRow]:
        """Returns the trials and baselines among those by folder whose weights do not stay."""
        ranked = self._ranked(rows)
        trials = [row for row in ranked if row.kind == "trial"]
        there = [row for row in trials if row.training not in self._without]  # what is gone takes nobody's place
        first = there[: self._recipe.search.keep_checkpoints]
        kept, best = (
            {row.training for row in first},
            [*dict.fromkeys(row.repeat_of or row.name for row in first)][:WHOLE],
        )
        kept |= {row.training for row in there if (row.repeat_of or row.name) in best}  # a soup needs all of them
        repeated, worse = set[str](), [row for row in trials if row.training not in kept]
        for row in ranked:
            if row.kind == "baseline":
                values = row.repeat_of or row.name
                worse += [row] if values in repeated else []
                repeated.add(values)
        return [row for row in worse if not row.standing and row.name not in self._fixed]

    def _remove(self, name: str) -> None:
        self._store.forget_files(name)
        path = self._study_dir / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # an attempt that was taken for lost may still write there
        else:
            files.remove(path)

    def expected(self) -> Expectation | None:
        """Returns what is expected of the values that were tried, by the trainings that have ended."""
        self._ranked(self._rows)
        return self._expected

    def best(self) -> TrialRow | None:
        """Returns the best of the trials that have ended, with its standing in a Pareto search."""
        return best_row(row for row in self.ranked() if row.kind == "trial")

    def ranked(self) -> list[TrialRow]:
        """Returns the complete trials and baselines from the best down, with what is expected of their values."""
        return self._ranked(self._rows)

    def _ranked(self, rows: Mapping[str, TrialRow]) -> list[TrialRow]:
        """Returns the complete rows, from the best down; of equal values those first that measured most."""
        given = sorted(rows.values(), key=lambda row: row.number)  # of equal points the first one counts
        if given != self._ranking[0]:
            trials, baselines = ([row for row in given if row.kind == kind] for kind in ("trial", "baseline"))
            if self._rule is None:
                self._expected = found = expectation(self._recipe, trials, baselines)
                stood = [*stand(trials, found), *stand(baselines, found)]
            else:
                stood = [*pareto_front.stand(trials, self._rule), *baselines]
            complete = [row for row in stood if row.outcome == "complete"]
            self._ranking = (
                given,
                sorted(complete, key=lambda row: (*rank(row)[:-1], -(row.objective or 0), row.number)),
            )
        return self._ranking[1]


def write_best(study_dir: Path, recipe: Recipe, best: TrialRow) -> None:
    """Writes the best values as a recipe, with their alpha fixed; where the file says the same, nothing is written.

    Args:
        study_dir: The study directory.
        recipe: Of the study, with absolute paths.
        best: Their first trial, with its standing in a Pareto search.

    Raises:
        StorageError: It cannot be read or written.
    """
    trust = trust_word(recipe)
    head = f"# The best values of this study, {best.name}. Train them: carft-ray train {BEST} --out FOLDER{trust}\n"
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
