"""Configurations compared with the winner: intervals, paired differences with their tests, the headline.

For `confirm` (validation, fresh seeds) and `test` (test sets). What is tested is the winner minus each baseline on the
objective. The baseline of the headline was chosen before, so its p-value is its own. The p-values of the other
baselines are adjusted for their number (Holm), and decide what is shown. All intervals are 95 % intervals, so that of
another baseline may exclude 0 although nothing is shown. Differences on single sets, and those to other configurations,
have intervals and no p-values.

The best of N noisy values is too high. ``correct_best`` says by how much: it shrinks the trials' values towards their
median and simulates the choice (luck of images, and of seeds once some configurations are confirmed). Everything here
reads validation results only.

Shape letters: N trials, r seeds, n images of one set. Accuracies are fractions; text is in points (percent).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray
from carft_ray.results.statistics import intervals
from carft_ray.results.statistics.intervals import (
    Interval,
    ValuesBySet,
    headline,
    in_points,
    objective_difference,
    p_words,
    residual_variance,
    values_by_seed,
)
from carft_ray.words import counted

ID_MARGIN = 0.005  # "keeps ID": at most so much may be lost
CorrectBySet = Mapping[str, BoolArray]  # bool [r, n] per set
NUM_DRAWS = 2000


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
    differences = {name: _difference(spec, correct[winner], correct[name]) for name in correct if name != winner}
    headline_baseline = max(baselines, key=lambda name: baselines[name], default=None)
    family = [name for name in baselines if name != headline_baseline]
    adjusted: dict[str, float] = {}
    if len(family) > 1:
        adjusted = dict(zip(family, holm([differences[name][0].p_value for name in family]), strict=True))
    compared: dict[str, dict[str, Any]] = {}
    for name, (objective, sets) in differences.items():
        compared[name] = {
            "other": name,
            "objective": objective.data(),
            "p": adjusted.get(name, objective.p_value) if name in baselines else None,
            "sets": {each: interval.data() for each, interval in sets.items()},
            "keeps_id": keeps_id(sets[spec.id_set], id_margin),
            "sentence": headline(objective, name, adjusted_p=adjusted.get(name)),
        }
    others = [each for name, each in compared.items() if name not in baselines]
    return {
        "label": label,
        "winner": winner,
        "headline_baseline": headline_baseline,
        "headline": None if headline_baseline is None else f"{winner}: {compared[headline_baseline]['sentence']}",
        "id_margin": id_margin,
        "rows": [_row(spec, name, by_set) for name, by_set in correct.items()],
        "baselines": [compared[name] for name in baselines],
        "others": others,
        "optimism": None if searched is None else _optimism(spec, correct, winner, searched),
        "better_than_winner": [each["other"] for each in others if each["objective"]["ends"][1] < 0],
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p-values, in order: adj_(i) = max over h <= i of min(1, (m - h + 1) p_(h))."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return [float(each) for each in adjusted]


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
    return [] if best in compared else [f"The best trial of the search, {best}, is not in this comparison."]


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Returns the differences of a comparison (``compare``) as lines of text, the headline last."""
    lines, num_adjusted = [], len(found["baselines"]) - 1
    if found["baselines"] or found["others"]:
        lines.append(
            f"{found['winner']} minus each other configuration, {found['label']}: objective in points with its "
            "95 % interval. An interval that contains 0 shows neither better nor worse."
        )
    for each in (*found["baselines"], *found["others"]):
        tested = ""
        if each["p"] is not None:
            adjusted = "adjusted " if num_adjusted > 1 and each["other"] != found["headline_baseline"] else ""
            kept = "keeps ID" if each["keeps_id"] else "keeping ID is not shown"
            tested = f"; {adjusted}{p_words(each['p'])}; {kept}"
        lines.append(f"    {each['other']}: {_in_points(each['objective'], signed=True)}{tested}")
    if found["baselines"]:
        adjusted = ""
        if num_adjusted > 1:
            adjusted = (
                f" The p of the {num_adjusted} other baselines is adjusted for their number (Holm). The adjusted p "
                "decides, even if the interval excludes 0."
            )
        lines.append(
            "    p: how often chance alone gives so large a difference. Below 0.05 the difference counts as shown. "
            f"{found['headline_baseline']} was chosen before this measurement.{adjusted} Keeps ID: at most "
            f"{counted(100 * found['id_margin'], 'point')} of ID accuracy lost."
        )
    for name in found["better_than_winner"]:
        lines.append(f"By its paired interval {name} is better than the winner. The winner was fixed before and stays.")
    if optimism := found["optimism"]:
        se = "" if optimism["se"] is None else f", standard error {100 * optimism['se']:.1f}"
        then = f"{100 * optimism['searched']:.1f} in the search, minus the winner's mean over these seeds"
        lines.append(f"Optimism of the search: {100 * optimism['value']:+.1f} points{se} ({then}).")
    objectives = [row["objective"] for row in found["rows"]]
    num_seeds = max(each["num_seeds"] for each in objectives)
    # a row of one seed among others with more is the zero-shot model, which has none to cover
    notes = dict.fromkeys(note for each in objectives if each["num_seeds"] == num_seeds for note in each["notes"])
    lines += [f"Note: {note}." for note in notes]
    line = headline_line(found)
    return [*lines, line] if line else lines


def headline_line(found: Mapping[str, Any]) -> str:
    """Returns the headline of a comparison (``compare``) as a line of text; empty without a baseline."""
    against = next((each for each in found["baselines"] if each["other"] == found["headline_baseline"]), None)
    if against is None:
        return ""
    return f"{found['headline']}; {found['label']}; 95 % interval {against['objective']['over']}."


def _in_points(found: Mapping[str, Any], signed: bool = False) -> str:
    return in_points(found["mean"], found["ends"], signed)


def _row(spec: ObjectiveSpec, name: str, correct: CorrectBySet) -> dict[str, Any]:
    sets = {each: intervals.accuracy_interval({each: correct[each]}).data() for each in spec.sets}
    ood = {each: correct[each] for each in spec.ood_sets}
    return {
        "name": name,
        "objective": intervals.objective_interval(spec, correct).data(),
        "id_accuracy": sets[spec.id_set],
        "ood_accuracy": intervals.accuracy_interval(ood, spec.images).data() if ood else None,
        "sets": sets,
    }


def _difference(spec: ObjectiveSpec, winner: CorrectBySet, other: CorrectBySet) -> tuple[Interval, dict[str, Interval]]:
    """Returns the winner minus another one: on the objective, and on each set."""
    num_seeds = max(len(rows[spec.id_set]) for rows in (winner, other))
    a, b = (
        {name: np.broadcast_to(rows[name], (num_seeds, rows[name].shape[1])) for name in spec.sets}
        for rows in (winner, other)
    )
    gaps = intervals.paired_differences(a, b)
    sets = {name: intervals.crossed({name: gap}, {name: 1.0}) for name, gap in gaps.items()}
    return objective_difference(spec, a, b), sets


def _optimism(
    spec: ObjectiveSpec, correct: Mapping[str, CorrectBySet], winner: str, searched: float
) -> dict[str, float | None]:
    own, pooled = intervals.values_by_seed(spec, correct[winner]), seed_variances(spec, correct.values())
    se = math.sqrt(max(pooled) * (1 + 1 / len(own))) if pooled else None
    return {"searched": searched, "value": searched - float(np.mean(own)), "se": se}


def ranking_noise(
    spec: ObjectiveSpec, objectives: Sequence[float], correct: ValuesBySet, confirmed: Sequence[ValuesBySet] = ()
) -> tuple[float, float | None]:
    """Returns the noise that ranks trials of equal worth: (sigma_img^2, sigma_seed^2).

    These are the parts of the variance of one trial's objective that are not shared by all trials; the second is None
    before any configuration is confirmed.

    sigma_img^2 = sum_j w_j^2 MS_E_j / n_j with MS_E the residual of trials x images over the trials with J >= median
    (over all where these are fewer than two); the binomial variance would count luck that all trials share.
    sigma_seed^2 = max(0, pooled variance between seeds - pooled sum_j w_j^2 MS_E_j / n_j of seeds x images). It is an
    upper bound: what a seed does to all configurations alike is in it.

    Args:
        spec: The objective.
        objectives: J of the completed trials, [N].
        correct: Per set the trials' correctness at their alphas, bool [N, n].
        confirmed: Per confirmed configuration its correctness over fresh seeds, bool [r, n]; r = 1 is not used.
    """
    values = np.asarray(objectives, np.float64)
    upper = np.flatnonzero(values >= np.median(values))
    upper = upper if len(upper) > 1 else np.arange(len(values))
    image = residual_variance(spec, {name: np.asarray(correct[name])[upper] for name in spec.sets})
    pooled = seed_variances(spec, confirmed)
    return image, max(0.0, pooled[0] - pooled[1]) if pooled else None


def seed_variances(spec: ObjectiveSpec, confirmed: Iterable[ValuesBySet]) -> tuple[float, float] | None:
    """Returns the variance of J between seeds and its part sum_j w_j^2 MS_E_j / n_j, pooled over configurations.

    By chance the first may be the smaller one. None where no configuration has two seeds.

    Args:
        spec: The objective.
        confirmed: Per configuration its correctness over seeds, bool [r, n] per set.
    """
    total = residual = dof = 0.0
    for by_set in confirmed:
        y = values_by_seed(spec, by_set)
        if len(y) > 1:
            total += (len(y) - 1) * float(np.var(y, ddof=1))
            residual += (len(y) - 1) * residual_variance(spec, by_set)
            dof += len(y) - 1
    return (total / dof, residual / dof) if dof else None


def correct_best(objectives: Sequence[float], variance: float, num_draws: int = NUM_DRAWS) -> dict[str, float]:
    """Returns the best objective minus the optimism that choosing it is expected to have.

    m = median J;  v = mean of (J - m)^2 over J >= m;  B = max(0, 1 - sigma^2 / v);  mu_i = m + B (J_i - m);
    b = mean over draws of z_i* - mu_i*, z = mu + sigma N(0, 1), i* = argmax z.

    The upper half alone shrinks: trials that diverged in part would make all others seem equal. Shrinking never
    re-ranks.

    Args:
        objectives: J of the completed trials, at least one.
        variance: sigma^2 (``ranking_noise``).
        num_draws: Of the simulation.

    Returns:
        ``value``, which is J_max - b, ``optimism`` b, ``num_trials`` N, ``spread`` v, and ``factor`` B: how much of a
        trial's distance from m is believed.
    """
    values = np.asarray(objectives, np.float64)
    median = float(np.median(values))
    spread = float(np.mean((values[values >= median] - median) ** 2))
    factor = max(0.0, 1 - variance / spread) if spread > 0 else 0.0
    shrunk = median + factor * (values - median)
    noise = math.sqrt(variance) * np.random.default_rng(0).standard_normal((num_draws, len(values)))
    picks = (shrunk + noise).argmax(axis=1)
    optimism = max(0.0, float(noise[np.arange(num_draws), picks].mean()))  # below 0 by the draws alone
    best = {"value": float(values.max()) - optimism, "optimism": optimism, "num_trials": len(values)}
    return {**best, "spread": spread, "factor": factor}
