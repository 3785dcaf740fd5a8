"""What the report says of the best trial's alpha curve, and of its OOD accuracy beyond that of its ID accuracy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carft_ray.errors import DataError, Problem, nearest
from carft_ray.evaluation.metrics import alpha_area
from carft_ray.evaluation.objective import ID_SET
from carft_ray.evaluation.robustness import (
    CAVEAT,
    MIN_MODELS,
    Robustness,
    above_line,
    read_reference,
)
from carft_ray.results.pareto import placed
from carft_ray.results.reading.overview import Overview, folder_of
from carft_ray.study.outcome import TrialRow, read_result


def curve_line(view: Overview, best: TrialRow) -> str:
    """Returns a sentence on the alpha curve of the best trial, as measured; empty where alpha was not profiled."""
    points = (read_result(folder_of(view.study_dir, best)) or {}).get("curve", [])
    if len(points) < 3:
        return ""
    area = alpha_area([point["alpha"] for point in points], [point["objective"] for point in points])
    text = f"Alpha curve: area under the objective {100 * area:.1f} %; best ID at alpha {_best(points, 'id_accuracy')}"
    if "ood_accuracy" in points[0]:
        text += f", best OOD mean at alpha {_best(points, 'ood_accuracy')}"
    return f"{text}; chosen {best.alpha or 0:.2f}."


def robustness(view: Overview, best: TrialRow, reference: Path | None) -> dict[str, list[Robustness]]:
    """Returns per OOD validation set how far the best trial lies above lines through other models.

    The line through the study's own plain fine-tuning (trials and baselines with a KL weight of 0, at alpha 1) is
    left out where the study has too few of them; that through reference models needs their file.

    Args:
        view: The study.
        best: Its best trial.
        reference: CSV as ``evaluation.robustness.read_reference`` wants it; None: none.

    Raises:
        DataError: The file cannot be used.
    """
    result = placed(read_result(folder_of(view.study_dir, best)) or {}, best)
    metrics, num_images = result.get("metrics", {}), result.get("num_images", {})
    known = {} if reference is None else read_reference(reference)
    sets = [name for name in view.recipe.data.ood_val if f"accuracy/{name}" in metrics and name in num_images]
    if reference is not None and not set(known) & set(sets):
        named = tuple(f"acc_ood/{name}" for name in sets)
        given = ", ".join(f"acc_ood/{name}" for name in known)
        rule = "must have a column for at least one OOD validation set of the study"
        raise DataError(Problem(str(reference), rule, given, named, nearest(given, named)))
    plain = _plain(view)
    found: dict[str, list[Robustness]] = {}
    for name in sets:
        model = (metrics["id_accuracy"], metrics[f"accuracy/{name}"])
        images = (num_images[ID_SET], num_images[name])
        lines = [above_line("effective_robustness", known[name], model, images)] if name in known else []
        if len(plain) >= MIN_MODELS:
            models = {one: (at["id_accuracy"], at[f"accuracy/{name}"]) for one, at in plain.items()}
            lines.append(above_line("gain_over_ft_line", models, model, images))
        found[name] = lines
    return {name: lines for name, lines in found.items() if lines}


def robustness_lines(found: Mapping[str, list[Robustness]]) -> list[str]:
    """Returns them as lines of text, with what must be known beside them."""
    lines = [f"{name}: {one.words}." for name, several in found.items() for one in several]
    has_reference = any(one.measure == "effective_robustness" for several in found.values() for one in several)
    return [*lines, CAVEAT] if has_reference else lines


def _plain(view: Overview) -> dict[str, dict[str, Any]]:
    """Returns the metrics at alpha 1 of every finished training without KL term."""
    base = view.recipe.train.kl_weight
    rows = [row for row in (*view.trials, *view.baselines) if row.values.get("kl_weight", base) == 0]
    results = {row.name: (read_result(folder_of(view.study_dir, row)) or {}).get("fine_tuned") for row in rows}
    return {name: metrics for name, metrics in results.items() if metrics}


def _best(points: list[dict[str, float]], metric: str) -> str:
    return f"{max(points, key=lambda point: point[metric])['alpha']:.2f}"
