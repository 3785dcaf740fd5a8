"""What trainings report, as curves of TensorBoard: the driver writes them, beside each training.

Points come while it runs, and a line of the HPARAMS table when it has ended well. They are for looking at: where they
cannot be written they are left out, as what matters meets the same disk and says so.
"""

import contextlib
from pathlib import Path

from carft_ray import files
from carft_ray.errors import StorageError
from carft_ray.launch.events import BaselineFinished, Event, TrialEpoch, TrialFinished, TrialStep
from carft_ray.layout import METRICS
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.training import TrialRow, TrialSpec
from carft_ray.training.tensorboard import add_hparams, add_scalars, begin_file, run_folder, tag_of, varied


class Curves:
    """Takes the events of a search, a confirm or a training.

    Args:
        study_dir: The study directory.
        recipe: Of the study.
    """

    def __init__(self, study_dir: Path, recipe: Recipe) -> None:
        self._study_dir, self._recipe = study_dir, recipe
        self._files: dict[str, tuple[int, Path]] = {}  # of a training: its last attempt, and the file of that

    def __call__(self, event: Event) -> None:
        """Writes an event that has numbers."""
        with contextlib.suppress(StorageError):
            match event:
                case TrialStep(spec, row):
                    self._add(spec, {name: row[name] for name in row.keys() - {"step", "num_steps"}}, int(row["step"]))
                case TrialEpoch(spec, row):
                    self._add(spec, {name: row[name] for name in row if "subset/" in name}, int(row["step"]))
                case TrialFinished(row) | BaselineFinished(row) if row.digest:  # a training, with a result
                    self._end(row)

    def _add(self, spec: TrialSpec, numbers: dict[str, float], step: int) -> None:
        if not numbers:  # an epoch that was not evaluated
            return
        attempt, path = self._files.get(spec.training, (0, Path()))
        if attempt != spec.attempt:  # what the one before wrote from this step on is void
            path = begin_file(self._run_folder(spec), step)
            self._files[spec.training] = spec.attempt, path
        add_scalars(path, {tag_of(name): number for name, number in numbers.items()}, step)

    def _end(self, row: TrialRow) -> None:
        self._files.pop(row.training, None)
        rows = files.read_json_lines(self._study_dir, f"{row.training}/{METRICS}")
        metrics = {name: value for name, value in row.metrics.items() if "/" not in name} | {"alpha": row.alpha or 0.0}
        final, step = (
            {f"final/{name}": value for name, value in metrics.items()},
            rows[-1].get("step", 0) if rows else 0,
        )
        add_hparams(begin_file(self._run_folder(row)), varied(apply(self._recipe, row.values)), final, int(step))

    def _run_folder(self, spec: TrialSpec) -> Path:
        return run_folder(spec.folder(self._study_dir), apply(self._recipe, spec.values))
