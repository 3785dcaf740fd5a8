"""The world of real trainings of ``python -m benchmarks.selection``: what a search asks for is trained, on validation.

    benchmarks/tables/NAME-trained.jsonl    one line per training: values, seed, curve of the measures of the table

The first line tells what is trained. Trainings of the seed table and of this file are not run again, whichever search
or rule asks for them, so a killed run continues on another machine, too. Fine-tuned weights are not kept. No test set
is read.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emulators import MEASURES, FloatArray, SeedTable, Values, curve_of, identity
from benchmarks.seed_table import check_start, start_of
from benchmarks.trainings import Finished, Planned, open_bench, run_one
from carft_ray import files

FRESH = (1000, 1001, 1002)  # seeds of the truth, which no search has


class Trained:
    """Trainings that are run when a search asks for them; see the module.

    Args:
        table: Of the recipe, with trainings that are there.
        out: Folder of the others.
        path: File of their curves, which grows with ``collect``.

    Raises:
        UsageError: The file or the table is of another recipe or model.
    """

    is_exact: bool = False
    most: int | None = None
    num_points: int | None = None

    def __init__(self, table: SeedTable, out: Path, path: Path) -> None:
        self.alphas, self.frozen, self._table, self._path = table.alphas, table.frozen, table, path
        self._bench = open_bench(table.recipe, out, reads_tests=False)
        self._start = start_of(self._bench, table.recipe, len(table.names))
        check_start("the seed table", table.words, self._start)
        self._known: dict[tuple[str, int], FloatArray] = {
            (identity(values), seed): curves[seed]
            for values, curves in zip(table.values, table.curves, strict=True)
            for seed in range(len(curves))
        }
        for line in self._lines():
            self._known[identity(line["values"]), line["seed"]] = np.array(line["curve"])

    def nearest(self, values: Values, tried: Iterable[Values]) -> dict[str, Any]:
        """Returns the values themselves."""
        return dict(values)

    def measured(self, values: Values, seed: int, search: int = 0) -> FloatArray:
        """As of ``World``; the same in all searches."""
        if (identity(values), seed) in self._known:
            return self._known[identity(values), seed]
        plain = {name: value for name, value in values.items() if name != "seed"}
        planned = Planned("training", {**plain, "seed": self._table.recipe.train.seed + seed})
        folder = self._bench.training_dir(planned)
        if not self._bench.is_finished(planned):
            run_one(self._bench, planned)
        training = Finished(planned, folder)
        frozen = np.tile(self.frozen, (len(self.alphas), 1))
        curve = frozen if training.diverged else curve_of(training.result, self.alphas)
        files.write_json(folder / "curve.json", {"values": plain, "seed": seed, "curve": curve.tolist()})
        self._known[identity(values), seed] = curve
        return curve

    def truth(self, values: Values, num_used: int = 0, search: int = 0) -> FloatArray:
        """As of ``World``: the mean of the fresh seeds."""
        return np.asarray(np.mean([self.measured(values, seed) for seed in FRESH], axis=0))

    def collect(self) -> None:
        """Writes the curves of all trainings, those of other processes included, to the file."""
        lines = {(identity(line["values"]), line["seed"]): line for line in self._lines()}
        for path in sorted(self._bench.folder.glob("trainings/*/curve.json")):
            line = json.loads(path.read_text())
            lines[identity(line["values"]), line["seed"]] = line
        head = {**self._start, "sets": "validation", "measures": MEASURES, "alphas": self.alphas}
        texts = [json.dumps(line) for line in (head, *lines.values())]
        files.write_text(self._path, "\n".join(texts) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        """Returns the lines of the file after its first; none where there is no file."""
        if not self._path.exists():
            return []
        head, *lines = map(json.loads, self._path.read_text().splitlines())
        check_start(str(self._path), head, self._start)
        return lines
