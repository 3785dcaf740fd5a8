"""What TensorBoard shows of a study besides its trainings: the figure, the recipe, and trials that have no result."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from carft_ray.layout import FIGURE_PNG
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.spaces.space import apply
from carft_ray.study.outcome import TrialRow
from carft_ray.untrusted import visible

MARK = "outcome"  # ending of the event file that says how a training without a result has ended
OF_STUDY = "study-{}"  # of that of the study, with the number of trials that have ended


def write_board(recipe: Recipe, study_dir: Path, trials: Sequence[TrialRow], baselines: Sequence[TrialRow]) -> None:
    """Writes the run of the study, ``.`` in TensorBoard, and a line of the HPARAMS table for what has no result.

    The step of the figure is the number of trials that have ended. What is written already is passed over.

    Args:
        recipe: The study's.
        study_dir: The study directory; without a figure in it nothing is written of the study itself.
        trials: All trials.
        baselines: All baselines.

    Raises:
        StorageError: A file cannot be written.
    """
    from carft_ray.evaluation.scalars import EVENTS, EventFile, run_folder, varied  # loads parts of TensorBoard

    for row in (*trials, *baselines):
        folder = row.folder(study_dir)
        if row.outcome in ("complete", "running") or any(folder.glob(f"*/{EVENTS}*.{MARK}")):
            continue
        own = apply(recipe, row.values)
        marks = EventFile(run_folder(folder, own), ending=MARK)
        marks.ended(varied(recipe, own.train.model_dump(mode="json")), row.outcome)
        marks.close()
    num_ended = sum(row.outcome != "running" for row in trials)
    ending, figure = OF_STUDY.format(num_ended), study_dir / FIGURE_PNG
    if figure.exists() and not any(study_dir.glob(f"{EVENTS}*.{ending}")):
        shown = EventFile(study_dir, ending=ending)
        shown.image("figure", figure.read_bytes(), num_ended)
        shown.text("recipe", textwrap.indent(visible(dump_recipe(recipe)), "    "))
        shown.close()
