"""Configurations compared with the winner: intervals, paired differences with their tests, the headline.

For `confirm` (validation, fresh seeds) and `test` (test sets). What is tested is the winner minus each baseline on the
objective. The baseline of the headline was chosen before, so its interval and its p-value are its own. Those of the
other baselines are raised for their number (Holm), both alike: an interval leaves 0 out exactly where p < 0.05.
Differences on single sets, and those to other configurations, have intervals and no p-values.

Shape letters: r seeds, n images of one set. Accuracies are fractions; text is in points (percent).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray
from carft_ray.results.statistics import intervals
from carft_ray.results.statistics.headline import headline, in_points, objective_difference
from carft_ray.results.statistics.intervals import LEVEL, Interval
from carft_ray.results.statistics.optimism import seed_variances
from carft_ray.words import counted

ID_MARGIN = 0.005  # "keeps ID": at most so much may be lost
CorrectBySet = Mapping[str, BoolArray]  # bool [r, n] per set


def compare(
    spec: ObjectiveSpec,
    correct: Mapping[str, CorrectBySet],
    winner: str,
    baselines: Mapping[str, float],
    id_margin: float = ID_MARGIN,
    label: str = "validation, fresh seeds",
    searched: float | None = None,
) -> dict[str, Any]:
    """Compares the winner with the baselines and the other configurations.

    Args:
        spec: The objective and its sets.
        correct: Per configuration and set its correctness, bool [r, n], images and seeds in one order. One with r = 1
            among others with more (the zero-shot model) counts as the same for every seed in paired differences.
        winner: Name of the winner, fixed before these results were seen.
        baselines: Validation objective of each baseline, measured before these results: the highest is the
            baseline of the headline.
        id_margin: How much ID accuracy may be lost at most, a fraction.
        label: What was measured.
        searched: The search's objective of the winner, for the optimism.

    Returns:
        Plain data, intervals as of ``Interval.data``: ``label``, ``winner``, ``headline_baseline`` and ``headline``
        (None without a baseline), ``id_margin``; ``rows`` in the order given: ``name``, ``objective``, ``id_accuracy``,
        ``ood_accuracy`` (None without an OOD set), ``sets``; ``baselines`` and ``others``, the winner minus each:
        ``other``, ``objective``, ``p`` (of the headline's baseline its own, of other baselines adjusted, of others
        None), ``sets``, ``keeps_id``, ``sentence``; ``optimism`` (None without ``searched``): ``searched``, ``value`` =
        searched - mean, ``se`` = s sqrt(1 + 1 / r) with s the pooled sd between seeds, at least that of their residual
        (None with one seed); ``better_than_winner``: names of others whose whole paired interval is above the winner.

    Raises:
        ValueError: The numbers of seeds or images do not belong together.
    """
    found = {name: _difference(spec, correct, winner, name, id_margin) for name in correct if name != winner}
    p_values = {name: found[name]["objective"]["p_value"] for name in baselines}
    headline_baseline = max(baselines, key=lambda name: baselines[name], default=None)
    family = [name for name in baselines if name != headline_baseline]
    for name, (p, level) in zip(family, holm([p_values[name] for name in family]), strict=True):
        p_values[name] = p
        if level != LEVEL:
            found[name] = _difference(spec, correct, winner, name, id_margin, level)
    others = [found[name] | {"p": None} for name in found if name not in baselines]
    return {
        "label": label,
        "winner": winner,
        "headline_baseline": headline_baseline,
        "headline": None if headline_baseline is None else f"{winner}: {found[headline_baseline]['sentence']}",
        "id_margin": id_margin,
        "rows": [_row(spec, name, by_set) for name, by_set in correct.items()],
        "baselines": [found[name] | {"p": p_values[name]} for name in baselines],
        "others": others,
        "optimism": None if searched is None else _optimism(spec, correct, winner, searched),
        "better_than_winner": [each["other"] for each in others if each["objective"]["ends"][1] < 0],
    }


def holm(p_values: Sequence[float]) -> list[tuple[float, float]]:
    """Returns Holm's adjusted p-values, each with the level at which an interval says the same, in order.

    Sorted, adj_(i) = max over h <= i of min(1, (m - h + 1) p_(h)). Those below 0.05 were tested at 0.05 / (m - h + 1),
    the others at that of the first of them: an interval of that level leaves 0 out exactly where adj < 0.05, and covers
    with at least 95 %.
    """
    p = np.asarray(p_values, np.float64)
    order, factors = np.argsort(p, kind="stable"), np.arange(len(p), 0, -1)
    adjusted = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    num_shown = int((adjusted < 1 - LEVEL).sum())
    factors[num_shown:] = len(p) - num_shown
    found = [(float(each), 1 - (1 - LEVEL) / int(factor)) for each, factor in zip(adjusted, factors, strict=True)]
    return [found[place] for place in np.argsort(order)]


def keeps_id(difference: Interval, margin: float = ID_MARGIN) -> bool:
    """Returns whether an ID difference is non-inferior: lower end of the 95 % interval above -margin (a fraction)."""
    return difference.ends[0] > -margin


def row_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the configurations of a comparison (``compare``) as lines of text."""
    lines = [f"{found['label'][:1].upper()}{found['label'][1:]}, accuracies in percent with 95 % intervals:"]
    for row in found["rows"]:
        shown = {"objective": row["objective"], "ID": row["id_accuracy"], "OOD mean": row["ood_accuracy"]}
        numbers = [f"{what} {_in_points(each)}" for what, each in shown.items() if each]
        lines.append(f"    {row['name']}: {', '.join(numbers)}")
    return lines


def later_best(found: Mapping[str, Any], best: str) -> list[str]:
    """Returns a line where the best trial is none of the compared: the search went on, or a confirm chose another."""
    compared = {row["name"] for row in found["rows"]}
    return [] if best in compared else [f"The best trial of the search, {best}, is not in it."]


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the differences of a comparison (``compare``) as lines of text, the headline last."""
    lines = []
    if found["baselines"] or found["others"]:
        lines.append(
            f"{found['winner']} minus each other one, {found['label']}: objective in points with its 95 % interval. An "
            "interval that contains 0 shows neither better nor worse."
        )
    for each in (*found["baselines"], *found["others"]):
        tested = ""
        if each["p"] is not None:
            tested = f"; {_p(each['p'])}; {'keeps ID' if each['keeps_id'] else 'keeping ID is not shown'}"
        lines.append(f"    {each['other']}: {_in_points(each['objective'], signed=True)}{tested}")
    if found["baselines"]:
        few = len(found["baselines"]) - 1
        raised = f" p and interval of the {few} other baselines are raised for their number (Holm);" if few > 1 else ""
        lines.append(
            "    p: how often chance alone gives such a difference; below 0.05 it counts as shown, and the interval "
            f"excludes 0;{raised} {found['headline_baseline']} was fixed before. Keeps ID: at most "
            f"{counted(100 * found['id_margin'], 'point')} of ID accuracy lost."
        )
    for name in found["better_than_winner"]:
        lines.append(f"{name} is better than the winner by its paired interval; the winner was fixed before and stays.")
    if optimism := found["optimism"]:
        se = "" if optimism["se"] is None else f", standard error {100 * optimism['se']:.1f}"
        then = f"{100 * optimism['searched']:.1f} in the search, minus its mean over these seeds"
        lines.append(f"Optimism of the search: {100 * optimism['value']:+.1f} points{se} ({then}).")
    objectives = [row["objective"] for row in found["rows"]]
    num_seeds = max(each["num_seeds"] for each in objectives)
    # a row of one seed among others with more is the zero-shot model, which has none to cover
    notes = dict.fromkeys(note for each in objectives if each["num_seeds"] == num_seeds for note in each["notes"])
    lines += [f"Note: {note}." for note in notes]
    for each in found["baselines"]:
        if each["other"] == found["headline_baseline"]:
            lines.append(f"{found['headline']}; {found['label']}; 95 %, {each['objective']['over']}.")
    return lines


def _in_points(found: Mapping[str, Any], signed: bool = False) -> str:
    return in_points(found["mean"], found["ends"], signed)


def _row(spec: ObjectiveSpec, name: str, correct: CorrectBySet) -> dict[str, Any]:
    sets = {each: intervals.accuracy_interval(correct[each]).data() for each in spec.sets}
    ood = [correct[each] for each in spec.ood_sets]
    return {
        "name": name,
        "objective": intervals.objective_interval(spec, correct).data(),
        "id_accuracy": sets[spec.id_set],
        "ood_accuracy": intervals.accuracy_interval(*ood).data() if ood else None,
        "sets": sets,
    }


def _difference(
    spec: ObjectiveSpec,
    correct: Mapping[str, CorrectBySet],
    winner: str,
    other: str,
    id_margin: float,
    level: float = LEVEL,
) -> dict[str, Any]:
    num_seeds = max(len(correct[row][spec.id_set]) for row in (winner, other))
    a, b = (
        {name: np.broadcast_to(correct[row][name], (num_seeds, correct[row][name].shape[1])) for name in spec.sets}
        for row in (winner, other)
    )
    objective = objective_difference(spec, a, b, level)
    gaps = intervals.paired_differences(a, b)
    sets = {name: intervals.crossed({name: gap}, {name: 1.0}) for name, gap in gaps.items()}
    return {
        "other": other,
        "objective": objective.data(),
        "sets": {name: each.data() for name, each in sets.items()},
        "keeps_id": keeps_id(sets[spec.id_set], id_margin),
        "sentence": headline(objective, other),
    }


def _optimism(
    spec: ObjectiveSpec, correct: Mapping[str, CorrectBySet], winner: str, searched: float
) -> dict[str, float | None]:
    own, pooled = intervals.values_by_seed(spec, correct[winner]), seed_variances(spec, correct.values())
    se = math.sqrt(max(pooled) * (1 + 1 / len(own))) if pooled else None
    return {"searched": searched, "value": searched - float(np.mean(own)), "se": se}


def _p(value: float) -> str:
    if value < 1e-4:
        return "p < 0.0001"
    text = f"{value:.2g}"
    return f"p = {text}" if text != "0.05" else f"p {'<' if value < 0.05 else '>'} 0.05"  # rounding changes no verdict
