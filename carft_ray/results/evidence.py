"""Evidence: what a search, a confirm or a test has shown, as one document. One comparer, one writer of lines.

A document is about *values* ("train with these": trainings with several fresh seeds, or the one of the search) or about
a *model* ("this file": one training, at one alpha). "Improves on" is said of values by a test with at least three fresh
seeds, and of a model by a test. Everything else was "measured higher": on the images used for selection, or with too
few seeds.

The winner improves on every baseline if the lower end of the 95 % interval of its difference from each of them is
above 0 (an intersection-union test, Berger 1982: a one-sided p below .025 in every row). No baseline is chosen, and
nothing is adjusted. A baseline counts at the alpha that was chosen for it; ablations, other trials and baselines at
alpha 1 are description. The p-value of a difference is its own, two-sided, and decides nothing.

Shape letters: r seeds, n images of one set. Accuracies are fractions; text is in points (percent).
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.evaluation.predictions import BoolArray
from carft_ray.results.statistics import intervals
from carft_ray.results.statistics.intervals import Interval, ValuesBySet, values_by_seed
from carft_ray.results.statistics.selection_bias import seed_variances
from carft_ray.words import counted

Kind = Literal["search", "confirm", "test"]
Subject = Literal["values", "model"]
Document = Mapping[str, Any]
CorrectBySet = Mapping[str, BoolArray]  # bool [r, n] per set

AT_ONE = ", alpha 1"  # behind the name of a baseline that is there once more
ENOUGH_SEEDS = 3  # with two, intervals over seeds are very wide
MAY, MEASURED = ("improves on", "worse than"), ("measured higher than", "measured lower than")
NO_BASELINE = "no baseline to compare with"
LABELS: dict[Kind, str] = {
    "search": "validation images used for selection",
    "confirm": "validation images, fresh seeds",
    "test": "test sets",
}


def compare(
    kind: Kind,
    subject: Subject,
    spec: ObjectiveSpec,
    rows: Sequence[Mapping[str, Any]],
    correct: Mapping[str, CorrectBySet],
    id_margin: float,
    seeds: Sequence[int] = (),
    searched: float | None = None,
    label: str = "",
    baselines: Iterable[str] = (),
) -> dict[str, Any]:
    """Compares the winner with all other configurations.

    Args:
        kind: What has measured them.
        subject: What the rows are: values, or single models.
        spec: The objective, its sets and their images.
        rows: Facts about each configuration: ``name``, ``role`` (``winner``, ``candidate``, ``baseline``,
            ``ablation``), ``alpha``, and more that the document keeps.
        correct: By name and set the correctness of each row, and perhaps of others, bool [r, n], images and seeds in
            one order. One with r = 1 among others with more (the zero-shot model) counts as the same for every seed in
            differences.
        id_margin: How much ID accuracy may be lost at most, a fraction.
        seeds: Fresh seeds of the trainings.
        searched: The search's objective of the winner, for the optimism.
        label: What was measured; default: of ``LABELS``.
        baselines: Names of all baselines that there should be. Those that are none of ``rows`` have no result; with
            one of these no improvement is shown.

    Returns:
        Plain data, intervals as of ``Interval.data``: ``kind``, ``subject``, ``seeds``, ``label``, ``winner``,
        ``id_margin``, ``missing`` (baselines without a result); ``rows`` as given, each with ``objective``,
        ``id_accuracy``, ``ood_accuracy`` (None without an OOD set) and ``sets``; ``optimism`` (None without
        ``searched``): ``searched``, ``value`` = searched - mean, ``se`` = s sqrt(1 + 1 / r) with s the pooled sd of the
        seeds, at least that of their residual (None with one seed); and the rest as of ``judged``.

    Raises:
        ValueError: The numbers of seeds or images do not belong together.
    """
    winner, names, gaps = winner_of(rows)["name"], [row["name"] for row in rows], []
    for name in names:
        if name != winner:
            found = {key: each.data() for key, each in differences(spec, correct[winner], correct[name]).items()}
            kept = found[spec.id_set]["ends"][0] > -id_margin
            gaps.append({"other": name, **_numbers(spec, found), "keeps_id": kept})
    document = {
        "kind": kind,
        "subject": subject,
        "seeds": list(seeds),
        "label": label or LABELS[kind],
        "winner": winner,
        "id_margin": id_margin,
        "missing": lacking(baselines, names),
        "rows": [{**row, **_measured(spec, correct[row["name"]])} for row in rows],
        "optimism": None
        if searched is None
        else _optimism(spec, [correct[name] for name in names], correct[winner], searched),
    }
    return judged({**document, "baselines": [], "others": gaps})


def judged(document: Document) -> dict[str, Any]:
    """Returns a document with what its differences say: also one that an earlier carft-ray has written.

    Args:
        document: ``kind``, ``subject``, ``seeds``, ``winner``, ``rows``, and in ``baselines`` and ``others`` the
            winner minus each other one: ``other``, ``objective``, ``keeps_id``, ...

    Returns:
        It with ``baselines``, the differences from the baselines that count, and ``others``; ``nearest``, the baseline
        with the smallest difference, and ``headline`` (both None without a baseline); ``shown``, whether an improvement
        on every baseline is; ``measured_higher``, the candidates whose whole interval is above the winner.
    """
    roles = {row["name"]: row["role"] for row in document["rows"]}
    baselines, others = list[Mapping[str, Any]](), list[Mapping[str, Any]]()
    for gap in (*document["baselines"], *document["others"]):
        counts = roles[gap["other"]] == "baseline" and not gap["other"].endswith(AT_ONE)
        (baselines if counts else others).append(gap)
    found = {**document, "baselines": baselines, "others": others}
    above = bool(baselines) and all(gap["objective"]["ends"][0] > 0 for gap in baselines)
    candidates = [gap for gap in others if roles[gap["other"]] == "candidate"]
    return {
        **found,
        "nearest": nearest(baselines)["other"] if baselines else None,
        "headline": headline(found) if baselines else None,
        "shown": above and may_claim(document),
        "measured_higher": [gap["other"] for gap in candidates if gap["objective"]["ends"][1] < 0],
    }


def winner_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the winner's row."""
    return next(row for row in rows if row["role"] == "winner")


def lacking(baselines: Iterable[str], names: Collection[str]) -> list[str]:
    """Returns the names of the baselines, each once, that are none of those that have a result."""
    return [name for name in dict.fromkeys(baselines) if name not in names and not name.endswith(AT_ONE)]


def may_claim(document: Document) -> bool:
    """Returns whether a document may say "improves on": a test with all baselines, of a model or with enough seeds."""
    if document["kind"] != "test" or document.get("missing"):
        return False
    return document["subject"] == "model" or len(document["seeds"]) >= ENOUGH_SEEDS


def nearest(gaps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the smallest of several differences."""
    return min(gaps, key=lambda gap: gap["objective"]["mean"])


def headline(document: Document) -> str:
    """Returns the one sentence about the winner and its baselines, in points with the 95 % interval.

    ``improves on ... by`` and ``worse than ... by`` are followed by how much, without a sign; where neither is shown
    the difference winner - baseline has its sign. Named are a baseline that is better, else the nearest one, and of
    those that are not shown to be beaten the one with the lowest end of its interval.

    Args:
        document: ``kind``, ``subject``, ``seeds``, ``winner``, ``rows`` and at least one of ``baselines``.
    """
    gaps, near, about = document["baselines"], nearest(document["baselines"]), told_of(document)
    better, worse = MAY if may_claim(document) else MEASURED
    winner = document["winner"]
    if document["subject"] == "model":
        winner = f"This model, {winner} at alpha {winner_of(document['rows'])['alpha']:.2f}"
    low, high = about["objective"]["ends"]
    if low > 0:
        whom = near["other"]
        if len(gaps) > 1:
            every = "every baseline that was compared" if document.get("missing") else "every baseline"
            whom = f"{every}, the nearest one, {whom},"
        return f"{winner}: {better} {whom} by {_points(near)} points"
    if high < 0:
        return f"{winner}: {worse} {about['other']} by {in_points(-about['objective']['mean'], (-high, -low))} points"
    said = f"{winner}: no improvement over {about['other']} shown ({_points(about, signed=True)} points)"
    weakest = _weakest(gaps)
    if weakest is not about:
        return f"{said}, nor over {weakest['other']} ({_points(weakest, signed=True)})"
    return said if about is near else f"{said}; the nearest baseline is {near['other']} ({_points(near, signed=True)})"


def told_of(document: Document) -> Mapping[str, Any]:
    """Returns the difference that the headline is about; see there."""
    gaps = document["baselines"]
    near = nearest([gap for gap in gaps if gap["objective"]["ends"][1] < 0] or gaps)
    return next((gap for gap in (near, _weakest(gaps)) if gap["objective"]["ends"][0] <= 0), near)


def _weakest(gaps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the difference with the lowest end of its interval."""
    return min(gaps, key=lambda gap: gap["objective"]["ends"][0])


def differences(spec: ObjectiveSpec, one: ValuesBySet, other: ValuesBySet) -> dict[str, Interval]:
    """Returns the paired intervals of one configuration minus another: of each set, ``ood_accuracy``, ``objective``.

    The last two are left out if a set of theirs is missing, and the mean of the OOD sets if there is none.

    Args:
        spec: The objective and its sets.
        one: Correctness by set, bool [r, n]; r = 1 stands for every seed of the other one.
        other: The same images in the same order, seeds paired by index.
    """
    names = [name for name in spec.sets if name in one and name in other]
    num_seeds = max((len(rows[name]) for rows in (one, other) for name in names), default=1)
    a, b = (
        {name: np.broadcast_to(rows[name], (num_seeds, rows[name].shape[1])) for name in names} for rows in (one, other)
    )
    gaps = intervals.paired_differences(a, b)
    found = {name: intervals.crossed({name: gap}, {name: 1.0}) for name, gap in gaps.items()}
    ood = {name: gaps[name] for name in spec.ood_sets if name in gaps}
    if ood and len(ood) == len(spec.ood_sets):
        found["ood_accuracy"] = intervals.crossed(ood, dict.fromkeys(ood, 1 / len(ood)), images=spec.images)
    if len(names) == len(spec.sets):
        found["objective"] = intervals.objective_difference(spec, a, b)
    return found


def _numbers(spec: ObjectiveSpec, found: Mapping[str, Any]) -> dict[str, Any]:
    sets = {name: found[name] for name in spec.sets}
    own = {"objective": found["objective"], "id_accuracy": sets[spec.id_set], "ood_accuracy": found.get("ood_accuracy")}
    return {**own, "sets": sets}


def _measured(spec: ObjectiveSpec, correct: CorrectBySet) -> dict[str, Any]:
    found = {name: intervals.accuracy_interval({name: correct[name]}).data() for name in spec.sets}
    found["objective"] = intervals.objective_interval(spec, correct).data()
    if ood := {name: correct[name] for name in spec.ood_sets}:
        found["ood_accuracy"] = intervals.accuracy_interval(ood, spec.images).data()
    return _numbers(spec, found)


def _optimism(
    spec: ObjectiveSpec, correct: Sequence[CorrectBySet], winner: CorrectBySet, searched: float
) -> dict[str, float | None]:
    own, pooled = values_by_seed(spec, winner), seed_variances(spec, correct)
    se = math.sqrt(max(pooled) * (1 + 1 / len(own))) if pooled else None
    return {"searched": searched, "value": searched - float(np.mean(own)), "se": se}


def row_lines(found: Document) -> list[str]:
    """Returns the configurations of a document as lines of text."""
    what = f"{found['label'][:1].upper()}{found['label'][1:]}"
    if found["subject"] == "model":
        what += ", models: each is the best on validation of its own trainings"
    lines = [f"{what}; accuracies in percent with 95 % intervals:"]
    for row in found["rows"]:
        shown = {"objective": row["objective"], "ID": row["id_accuracy"], "OOD mean": row["ood_accuracy"]}
        numbers = [f"{what} {in_points(each['mean'], each['ends'])}" for what, each in shown.items() if each]
        lines.append(f"    {row['name']}: {', '.join(numbers)}")
    return lines


def later_best(found: Document, best: str) -> list[str]:
    """Returns a line where the best trial is none of the compared: the search went on, or a confirm chose another."""
    compared = {row["name"] for row in found["rows"]}
    return [] if best in compared else [f"The best trial of the search, {best}, is not in this comparison."]


def comparison_lines(found: Document) -> list[str]:
    """Returns the differences of a document as lines of text, the headline last."""
    lines = []
    if found["baselines"] or found["others"]:
        lines.append(
            f"{found['winner']} minus each other configuration, {found['label']}: objective in points with its "
            "95 % interval. An interval that contains 0 shows neither better nor worse."
        )
    for gap in found["baselines"]:
        kept = "keeps ID" if gap["keeps_id"] else "keeping ID is not shown"
        lines.append(f"    {gap['other']}: {_points(gap, signed=True)}; {p_words(gap['objective']['p_value'])}; {kept}")
    lines += [f"    {gap['other']}: {_points(gap, signed=True)}" for gap in found["others"]]
    if found["baselines"]:
        lines.append(
            "    p: how often chance alone gives so large a difference, not adjusted for the number of baselines. It "
            "decides nothing: a test shows an improvement if the intervals of all baselines are above 0. Keeps ID: at "
            f"most {counted(100 * found['id_margin'], 'point')} of ID accuracy lost."
        )
    for name in found["measured_higher"]:
        lines.append(
            f"{name} measured higher: the interval of {found['winner']} minus it is below 0. The winner was fixed "
            "before and stays."
        )
    if optimism := found["optimism"]:
        se = "" if optimism["se"] is None else f", standard error {100 * optimism['se']:.1f}"
        then = f"{100 * optimism['searched']:.1f} in the search, minus the winner's mean over these seeds"
        lines.append(f"Optimism of the search: {100 * optimism['value']:+.1f} points{se} ({then}).")
    if missing := found.get("missing"):
        lines.append(f"Without a result, and not compared: {', '.join(missing)}. So no improvement is shown.")
    objectives = [row["objective"] for row in found["rows"]]
    num_seeds = max(each["num_seeds"] for each in objectives)
    # a row of one seed among others with more is the zero-shot model, which has none to cover
    notes = dict.fromkeys(note for each in objectives if each["num_seeds"] == num_seeds for note in each["notes"])
    lines += [f"Note: {note}." for note in notes]
    return [*lines, *headline_lines(found)]


def headline_lines(found: Document) -> list[str]:
    """Returns the headline of a document as a line of text; none without a baseline."""
    if not found["baselines"]:
        return []
    return [f"{found['headline']}; {found['label']}; 95 % interval {told_of(found)['objective']['over']}."]


def in_points(mean: float, ends: Sequence[float], signed: bool = False) -> str:
    """Returns a mean and the ends of its interval in points; an end that is not 0 is not shown as 0."""
    form = "+.1f" if signed else ".1f"
    forms = [form if end == 0 or abs(end) >= 0.0005 else form.replace("f", "g") for end in ends]
    return f"{100 * mean:{form}} [{100 * ends[0]:{forms[0]}}, {100 * ends[1]:{forms[1]}}]"


def _points(gap: Mapping[str, Any], signed: bool = False) -> str:
    return in_points(gap["objective"]["mean"], gap["objective"]["ends"], signed)


def p_words(value: float) -> str:
    """Returns a p-value in words; rounding never moves it across 0.05."""
    if value < 1e-4:
        return "p < 0.0001"
    text = f"{value:.2g}"
    return f"p = {text}" if text != "0.05" else f"p {'<' if value < 0.05 else '>'} 0.05"
