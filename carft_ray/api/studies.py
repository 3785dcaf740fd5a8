"""Reading the results of a study from Python. This writes nothing and loads neither torch nor Ray.

A notebook displays a study as a table of its trials, and ``study.figure`` as a picture. The functions that train are in
``carft_ray.api.actions``.

    >>> import carft_ray
    >>> study = carft_ray.open_study("studies/quickstart")
    >>> study.recipe.search.trials
    2
    >>> study.trials().column_names[:5]
    ['number', 'name', 'outcome', 'objective', 'expected']
    >>> best = study.best
    >>> sorted(study.metrics(best.name))[:2]
    ['accuracy/id_val', 'accuracy/sketch']
    >>> study.predictions(best.name).num_rows > 0
    True

Tables are pyarrow tables: use ``study.trials().to_pandas()`` if pandas is installed. Accuracies are fractions. A
search may be running: every call reads the current state of the study.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from carft_ray import files
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.reading.finished import open_finished
from carft_ray.results.reading.study_view import read_study, require_study
from carft_ray.study.rows import best_first
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import TrialRow
from carft_ray.ui import console, notebook

Kind = Literal["trial", "baseline"]
# attributes of a row, with their types in Arrow
COLUMNS = {"number": "int64", "name": "string", "outcome": "string", "objective": "double", "expected": "double"}
COLUMNS |= {"alpha": "double", "repeat_of": "string", "elapsed_s": "double", "reason": "string"}


@dataclass(frozen=True)
class Figure:
    """A picture that displays itself in a notebook.

    Attributes:
        svg: The file.
    """

    svg: bytes

    def save(self, path: str | Path) -> Path:
        """Writes the whole file or nothing.

        Raises:
            StorageError: It cannot be written.
        """
        files.write_bytes(Path(path), self.svg)
        return Path(path)

    def _repr_svg_(self) -> str:
        return self.svg.decode()

    def __repr__(self) -> str:
        return f"Figure(<{len(self.svg)} bytes of SVG>)"


@dataclass(frozen=True)
class Study:
    """A study for reading; create it with ``open_study``.

    Attributes:
        path: The study directory, absolute.
    """

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe of the last search; all paths are absolute.

        Raises:
            RecipeError, StorageError: It cannot be read.
        """
        return snapshot(self.path).recipe

    @property
    def best(self) -> TrialRow | None:
        """The first trial of the values that are expected to be best, or None.

        It has ``name``, ``values``, ``alpha``, ``objective`` as measured, ``expected``, and ``metrics``.

        Raises:
            StorageError: The study is damaged.
        """
        return snapshot(self.path).best

    @property
    def baselines(self) -> pa.Table:
        """Zero-shot and the recipe's baselines, as ``trials`` gives them."""
        return self.trials("baseline")

    @property
    def figure(self) -> Figure:
        """ID against OOD accuracy: a dot per trial, the baselines, the alpha curve of the best.

        Raises:
            UsageError, RecipeError, StorageError: The study was removed or is damaged.
        """
        from carft_ray.results.page.page import figure_svg

        return Figure(figure_svg(read_study(self.path)))

    def trials(self, kind: Kind = "trial") -> pa.Table:
        """Returns a row per trial (or baseline), ordered by number.

        Columns: ``number``, ``name``, ``outcome``, ``objective``, ``expected`` (of its values, with a new seed),
        ``alpha`` (that of its values), ``repeat_of`` (the first training of its values), ``elapsed_s``, ``reason``;
        then every hyperparameter by its name in ``train``; then every metric (``id_accuracy``, ``ood_accuracy``,
        ``accuracy/<set>``, ...). Missing values are null.

        Args:
            kind: ``trial`` or ``baseline``.

        Raises:
            ValueError: The kind is neither of these.
            StorageError: The study is damaged.
        """
        if kind not in ("trial", "baseline"):
            raise ValueError(f"kind must be 'trial' or 'baseline', but got {kind!r}")
        now = snapshot(self.path)
        return rows_table(now.trials if kind == "trial" else now.all_baselines)

    def metrics(self, trial: str | int) -> dict[str, float]:
        """Returns the metrics of a finished trial or baseline at its alpha.

        Args:
            trial: Number or name: ``7``, ``"t0007"``, ``"t0007-3f9c"``, ``"zero_shot"``, ``"confirm/NAME"``.

        Raises:
            UsageError: There is no such trial; the message names the nearest.
            NoSuccessfulTrialError: It is not finished.
            StorageError: Its result is damaged.
        """
        return dict(open_finished(self.path, trial).result["metrics"])

    def predictions(self, trial: str | int) -> pa.Table:
        """Returns a row per image, validation set and alpha: label, prediction, and the stored logits.

        Args:
            trial: Same as in ``metrics``.

        Raises:
            UsageError, NoSuccessfulTrialError, StorageError: Same as in ``metrics``.
        """
        return open_finished(self.path, trial).predictions()

    def _repr_html_(self) -> str:
        view = read_study(self.path)
        rows = [view.data(row) for row in (*view.all_baselines, *best_first(view.trials))]
        return notebook.as_html(console.trial_table(rows))


def open_study(path: str | Path) -> Study:
    """Opens a study for reading.

    Args:
        path: The study directory, or its address, ``s3://...``, which is copied as it is now. A search may be
            running on it.

    Raises:
        UsageError: It is not a study.
        StorageError: The bucket cannot be read.
    """
    return Study(require_study(path))


def rows_table(rows: Sequence[TrialRow]) -> pa.Table:
    """Returns trials or baselines as ``Study.trials`` has them."""
    own = {
        name: pa.array([getattr(row, name) for row in rows], pa.type_for_alias(kind)) for name, kind in COLUMNS.items()
    }
    own |= {
        name: pa.array([getattr(row, name) or None for row in rows], pa.string()) for name in ("reason", "repeat_of")
    }
    values = dict.fromkeys(name for row in rows for name in row.values if name not in own)
    metrics = dict.fromkeys(name for row in rows for name in row.metrics if name not in own)
    columns = own | {name: _column([row.values.get(name) for row in rows]) for name in values}
    measured = {name: pa.array([row.metrics.get(name) for row in rows], pa.float64()) for name in metrics}
    return pa.table(columns | measured)


def _column(values: list[object]) -> pa.Array:
    """Returns hyperparameters as a column; those of several kinds (``auto`` as well as 0.5) as texts."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) > 1:
        kind = float if kinds == {int, float} else str
        values = [None if value is None else kind(str(value)) for value in values]
    return pa.array(values)
