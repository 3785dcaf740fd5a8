"""The sentence on what a search has gained over a baseline, and intervals in words."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from carft_ray.evaluation.metrics import LEVEL
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.evaluation.predictions import BoolArray
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.statistics.intervals import (
    Interval,
    ValuesBySet,
    crossed,
    mean_accuracies,
    values_by_seed,
    worst_domain_notes,
)
from carft_ray.study.training import TrialRow


def headline(
    difference: Interval, baseline: str, is_measured_again: bool = True, adjusted_p: float | None = None
) -> str:
    """Returns the one sentence about winner - baseline, in points: shown where p < 0.05, with the 95 % interval.

    Underscores in the name of the baseline are written as spaces.

    ``improves on ... by`` and ``worse than ... by`` are followed by how much, without a sign: mean and interval are of
    baseline - winner in the second. Where neither is shown the difference winner - baseline has its sign.

    Args:
        difference: Winner - baseline.
        baseline: Its name.
        is_measured_again: With fresh seeds, or on images that did not choose. What a search alone has measured is
            ``measured higher than`` or ``measured lower than``, and no improvement.
        adjusted_p: The p-value adjusted for several comparisons: it decides in place of the difference's own, and the
            sentence contains it. The interval may then exclude 0 although nothing is shown.
    """
    (low, high), baseline = difference.ends, baseline.replace("_", " ")
    p, told = difference.p_value, ""
    if adjusted_p is not None:
        p, told = adjusted_p, f", adjusted {p_words(adjusted_p)}"
    better, worse = (
        ("improves on", "worse than") if is_measured_again else ("measured higher than", "measured lower than")
    )
    if p >= 1 - LEVEL:
        points = in_points(difference.mean, difference.ends, signed=True)
        return f"no improvement over {baseline} shown ({points} points{told})"
    if difference.mean > 0:
        return f"{better} {baseline} by {in_points(difference.mean, (low, high))} points{told}"
    return f"{worse} {baseline} by {in_points(-difference.mean, (-high, -low))} points{told}"


def in_points(mean: float, ends: Sequence[float], signed: bool = False) -> str:
    """Returns a mean and the ends of its interval in points."""
    form = "+.1f" if signed else ".1f"
    low, high = ends
    return f"{100 * mean:{form}} {_ends(low, high, form)}"


def p_words(value: float) -> str:
    """Returns a p-value in words; rounding never moves it across 0.05."""
    if value < 1e-4:
        return "p < 0.0001"
    text = f"{value:.2g}"
    return f"p = {text}" if text != "0.05" else f"p {'<' if value < 0.05 else '>'} 0.05"


def _ends(low: float, high: float, form: str) -> str:
    """Returns the ends of an interval in points; one that is not 0 is not shown as 0, so that its side of 0 shows."""
    forms = [form if end == 0 or abs(end) >= 0.0005 else form.replace("f", "g") for end in (low, high)]
    return f"[{100 * low:{forms[0]}}, {100 * high:{forms[1]}}]"


def against_baseline(
    recipe: Recipe,
    best: TrialRow,
    baselines: Sequence[TrialRow],
    chosen: Mapping[str, Mapping[str, BoolArray]],
) -> dict[str, Any] | None:
    """Returns the best trial against the baseline with the highest objective, as JSON; None without a baseline.

    Args:
        recipe: The study's recipe.
        best: The best trial.
        baselines: Complete baselines.
        chosen: Of ``results.stored.read_stored``, of all of them.
    """
    if not baselines:
        return None
    rival = max(baselines, key=lambda row: row.objective or 0.0)
    one, other = (chosen[row.name] for row in (best, rival))
    difference = objective_difference(objective_spec(recipe), one, other)
    sentence, of = headline(difference, rival.name, is_measured_again=False), ""
    if recipe.search.objective.kind == "pareto":
        weight = recipe.search.objective.id_weight
        of = f" by {weight:g} ID + {1 - weight:g} OOD"
    measured = f"Measured at their alphas{of}, on the images used for selection"
    return {
        "baseline": rival.name,
        "mean": difference.mean,
        "ends": difference.ends,
        "words": difference.words,
        "sentence": sentence,
        "line": f"{measured}: {best.name}: {sentence}; 95 %, {difference.words}.",
    }


def objective_difference(spec: ObjectiveSpec, correct_a: ValuesBySet, correct_b: ValuesBySet) -> Interval:
    """Returns the paired interval of the objective of configuration a minus that of b.

    For a linear objective this is ``crossed`` on the differences of correctness. Otherwise the images enter as
    (w_aj x_ajqk - w_bj x_bjqk) / w_j with the derivatives at each configuration's own mean accuracies and w_j the
    larger of the two.

    Args:
        spec: The objective and its sets.
        correct_a: Correctness of a per set, bool [r, n_j].
        correct_b: Correctness of b, the same images in the same order, seeds paired by index.
    """
    weights_a, weights_b = (spec.weights(mean_accuracies(correct)) for correct in (correct_a, correct_b))
    weights = {name: max(w, weights_b[name]) for name, w in weights_a.items() if w or weights_b[name]}
    differences = {
        name: weights_a[name] / w * np.asarray(correct_a[name], np.float64)
        - weights_b[name] / w * np.asarray(correct_b[name], np.float64)
        for name, w in weights.items()
    }
    pairs = zip(values_by_seed(spec, correct_a), values_by_seed(spec, correct_b), strict=True)
    interval = crossed(differences, weights, [a - b for a, b in pairs])
    notes = dict.fromkeys([*worst_domain_notes(spec, correct_a), *worst_domain_notes(spec, correct_b)])
    return replace(interval, notes=(*interval.notes, *notes))
