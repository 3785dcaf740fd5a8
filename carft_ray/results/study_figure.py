"""The figure of a study, drawn from what is on disk when a search has ended, however it has ended."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from carft_ray.evaluation.objective import objective_spec
from carft_ray.layout import FIGURE_PNG, FIGURE_SVG
from carft_ray.recipe.schema.data import plain
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.figure import Curve, Dot, Pair, id_ood_figure, write
from carft_ray.study.front import front_of
from carft_ray.study.rows import ZERO_SHOT, best_row, num_finished
from carft_ray.study.study import Study
from carft_ray.study.training import TrialRow, result_of
from carft_ray.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def figure_at_the_end(study: Study, num_before: int) -> Iterator[None]:
    """Draws the figure of a study when the block ends, by an error or an interruption too.

    Without a complete trial there is none, and nothing is drawn once another process has taken the study over. What has
    ended the block comes before what goes wrong with the figure.

    Args:
        study: The study.
        num_before: Trials that were finished before this search; an error before another one is draws nothing.

    Raises:
        StorageError: The figure cannot be written.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception, KeyboardInterrupt):
            if num_finished(study.rows()) > num_before:
                _draw(study)
        raise
    _draw(study)


def _draw(study: Study) -> None:
    if not study.log.is_lost and best_row(study.rows()) is not None:
        figure = study_figure(study.recipe, study.study_dir, study.rows(), study.rows("baseline"))
        write(figure, study.study_dir / FIGURE_PNG, study.study_dir / FIGURE_SVG)


def study_figure(
    recipe: Recipe, study_dir: Path, trials: Sequence[TrialRow], baselines: Sequence[TrialRow]
) -> "Figure":
    """Draws ID against OOD accuracy, a dot per trial, with the baselines and the alpha curve of the best.

    Args:
        recipe: The study's.
        study_dir: The study directory.
        trials: All trials, with their standing in a Pareto search.
        baselines: All baselines.

    Raises:
        StorageError: The result of the best trial is damaged.
    """

    def pair(row: TrialRow) -> Pair:
        return row.metrics["id_accuracy"], row.metrics["ood_accuracy"]

    dots = [
        Dot(*pair(row), row.values.get("kl_weight", recipe.train.kl_weight), meets=not row.violation)
        for row in trials
        if "ood_accuracy" in row.metrics
    ]
    named = sorted(baselines, key=lambda row: row.name != ZERO_SHOT)
    marks = {row.name.replace("_", " "): pair(row) for row in named if "ood_accuracy" in row.metrics}
    num_pruned = sum(row.outcome == "pruned" for row in trials)
    return id_ood_figure(
        dots,
        marks,
        _curve(study_dir, best_row(trials)),
        f"{recipe.name}: {counted(len(dots), 'trial')}" + (f", {num_pruned} more pruned" if num_pruned else ""),
        synthetic=plain(recipe.data.train).source == "sandbox",
        kind=objective_spec(recipe).kind,
        id_weight=recipe.search.objective.id_weight,
        front=[point.pair for point in front_of(trials)] if recipe.search.objective.kind == "pareto" else (),
    )


def _curve(study_dir: Path, best: TrialRow | None) -> Curve | None:
    content = None if best is None else result_of(study_dir, best)
    if best is None or not content or "ood_accuracy" not in best.metrics or not content.get("curve"):
        return None
    points, metrics, counts = content["curve"], best.metrics, content.get("num_images", {})
    accuracies = {name: metrics.get(f"accuracy/{name}") for name in counts}
    variances = {name: a * (1 - a) / counts[name] for name, a in accuracies.items() if a is not None}
    ood = [name for name in variances if name != "id_val"]
    if not ood or "id_val" not in variances or any("ood_accuracy" not in point for point in points):
        return None
    return Curve(
        alphas=[point["alpha"] for point in points],
        id_accuracies=[point["id_accuracy"] for point in points],
        ood_accuracies=[point["ood_accuracy"] for point in points],
        chosen_alpha=best.alpha or 0.0,
        chosen_id_accuracy=metrics["id_accuracy"],
        chosen_ood_accuracy=metrics["ood_accuracy"],
        id_se=variances["id_val"] ** 0.5,
        ood_se=sum(variances[name] for name in ood) ** 0.5 / len(ood),
    )
