"""What a study's numbers are worth (`report`): the best as measured and corrected, other rules, the headline.

Everything is read from stored validation predictions; no test set is opened.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray.data.shared.shared_images import read_shared, shared_counts, shared_lines
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.evaluation.alpha import partial_alphas
from carft_ray.evaluation.constraints import Limit
from carft_ray.evaluation.metrics import alpha_area
from carft_ray.evaluation.objective import ID_SET, ObjectiveSpec, objective_spec
from carft_ray.evaluation.robustness import CAVEAT, MIN_MODELS, Robustness, above_line, read_reference
from carft_ray.layout import ANALYSIS_SUMMARY, CONFIRM, SUMMARY, TEST_DIR
from carft_ray.recipe.constraints import violations
from carft_ray.recipe.loading import own_functions
from carft_ray.recipe.schema import Recipe
from carft_ray.results.pareto import front_data, front_lines, placed, study_limits
from carft_ray.results.reading.documents import num_test_reads
from carft_ray.results.reading.overview import Overview
from carft_ray.results.reading.stored import Stored, against_baseline, confirmed, read_stored, read_summary
from carft_ray.results.statistics import bootstrap
from carft_ray.results.statistics.selection import Pick, correct_best, one_se_pick, ranking_noise, regret_table
from carft_ray.study.best import constraint_lines
from carft_ray.study.front import FrontRule
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import ZERO_SHOT, require_finished
from carft_ray.words import counted, times

_SHOWN_WINS = 5
OWN_CHOICES = (
    "A trainer of your own has the labelled validation sets: what it has chosen on them itself (a checkpoint, the end) "
    "is not counted, and no number here is corrected for it."
)


@dataclass(frozen=True)
class _Evidence:
    """What the worth of the best trial is computed from.

    Attributes:
        view: The study.
        best: Its best trial.
        trials: The complete ones, in the order of the search.
        spec: The objective.
        bounds: The constraints.
        stored: Predictions.
        resamples: The selection made again.
    """

    view: Overview
    best: TrialRow
    trials: list[TrialRow]
    spec: ObjectiveSpec
    bounds: Sequence[Limit]
    stored: Stored
    resamples: bootstrap.Resamples


# what the best trial is worth: parts of the report, the short text, and the lines that the long text has in addition
_Worth = tuple[dict[str, Any], list[str], list[str]]


def study_report(
    view: Overview, reference: Path | None = None, num_resamples: int = bootstrap.NUM_RESAMPLES
) -> dict[str, Any]:
    """Returns the report as plain data; ``brief`` is its text, ``lines`` the text with all numbers.

    Args:
        view: The study.
        reference: Accuracies of reference models, for effective robustness.
        num_resamples: Of the bootstrap.

    Raises:
        NoSuccessfulTrialError: No trial has finished.
        HoldOutError: The ledger was changed, so how often the test sets were read is not known.
        StorageError, DataError: Stored predictions are missing, damaged or of different images.
    """
    best, recipe, study_dir = require_finished(view.study_dir, view.best), view.recipe, view.study_dir
    spec, lowest, bounds = objective_spec(recipe), recipe.search.alpha.lowest, study_limits(recipe, view.baselines)
    trials, baselines = (
        [row for row in rows if row.outcome == "complete" and row.objective is not None]
        for rows in (view.trials, view.baselines)
    )
    stored = read_stored(study_dir, recipe, [*trials, *baselines], spec, bounds)
    resamples = bootstrap.resample(stored.candidates, spec, lowest, num_resamples, bounds=bounds)
    evidence, front = _Evidence(view, best, trials, spec, bounds, stored, resamples), front_data(recipe, view.trials)
    data, few, more = _by_one_number(evidence) if front is None else _by_front(evidence, front)
    share = bootstrap.share_meeting(stored.chosen[best.name], spec, bounds, num_resamples) if bounds else None
    ended = [row for row in (*view.trials, *view.baselines) if row.outcome != "running" and row.name != ZERO_SHOT]
    devices = Counter(
        device for row in ended if (device := view.result(row).get("environment", {}).get("device")) is not None
    )
    counts = {
        "trials": view.counts(),
        "devices": dict(devices.most_common()),
        "trainings": len(ended),
        "alphas": stored.num_alphas,
        "test_reads": num_test_reads(study_dir),
    }
    against, above = against_baseline(recipe, best, baselines, stored), robustness(view, best, reference)
    shared = read_shared(study_dir)
    texts = {"lines": [*few, *more, *curve_line(view, best)], "brief": few}
    parts = ("row_lines", "lines", "brief")
    later = {step: read_summary(study_dir / step / SUMMARY, *parts) for step in (CONFIRM, TEST_DIR)}
    for form, lines in texts.items():
        lines[:0] = [*_count_lines(recipe, counts), *shared_lines(shared), ""]
        lines += constraint_lines(best)
        if share is not None:
            lines.append(f"{best.name} meets all constraints in {100 * share:.0f} % of the resamples.")
        lines += ["", *against["lines"][: 1 if form == "brief" else 2]] if against else []
        lines += ["", *robustness_lines(above)] if above else []
        for summary in later.values():
            lines += ["", *_lines_of(summary, form)] if summary else []
    return {
        "study": str(study_dir),
        "name": recipe.name,
        "counts": counts,
        "shared_images": shared_counts(shared),
        "best": {
            "name": best.name,
            "alpha": best.alpha,
            "objective": best.objective,
            "violations": violations(best.metrics),
            "share_meeting_constraints": share,
        },
        "front": front,
        **data,
        "rules": [asdict(line) for line in regret_table(stored.candidates, resamples, spec, lowest)],
        "headline": against,
        "robustness": {name: [asdict(one) for one in several] for name, several in above.items()},
        **{step: _lines_of(summary, "lines") for step, summary in later.items()},
        "analysis": read_summary(study_dir / TEST_DIR / ANALYSIS_SUMMARY, "rules", "lines"),
        **texts,
    }


def _by_one_number(evidence: _Evidence) -> _Worth:
    """Returns what the best value is worth where one objective has chosen it.

    Trials that miss constraints compete only where no trial meets them; ``corrected`` is over those that compete.
    """
    best, spec, stored, resamples = evidence.best, evidence.spec, evidence.stored, evidence.resamples
    competing = [row for row in evidence.trials if row.violation <= best.violation]
    objectives = [row.objective or 0.0 for row in competing]
    again = confirmed(evidence.view.study_dir, spec)
    at_choice = [stored.chosen[row.name].correct for row in competing]
    correct = {name: np.concatenate([by_set[name] for by_set in at_choice]) for name in spec.sets}
    noise = ranking_noise(spec, objectives, correct, again)
    corrected = correct_best(objectives, noise.variance)
    bbc_value, wins = bootstrap.bbc(resamples)
    pick = None
    if best.name in stored.moved and not best.violation:
        candidates = bootstrap.meeting(stored.candidates, evidence.bounds)
        lowest = evidence.view.recipe.search.alpha.lowest
        pick = one_se_pick(spec, stored.chosen[best.name], candidates, stored.moved, lowest, noise.seed)
    curve, num_resamples = bootstrap.overtuning(bootstrap.incumbent_values(resamples)), len(resamples.in_bag)
    of = "images alone: that of the seeds is still in it, which a confirm measures"
    covered = "image noise only: the luck of the seed is still in it"
    if noise.seed is not None:
        of = "images and seeds. Neither this nor a confirm is of images that did not choose: a test is"
        covered = f"image and seed noise, the latter from {counted(len(again), 'confirmed configuration')}"
    included = "alpha and constraints included" if evidence.bounds else "alpha included"
    values = counted(len(objectives), "value")
    share = sum(win.share for win in wins if win.name == best.name)
    measured = f" by its fitted alpha curve, {100 * best.metrics['objective']:.1f} % measured" if best.fitted else ""
    pick_lines = [] if pick is None else [_pick_line(best, pick)]
    lost = curve.relative[-1]
    is_best = pick is not None and (pick.name, pick.alpha) == (best.name, best.alpha)
    return (
        {
            "noise": {**asdict(noise), "words": noise.words},
            "corrected": asdict(corrected),
            "bbc": {"value": bbc_value, "num_resamples": num_resamples, "wins": [asdict(win) for win in wins]},
            "one_standard_error": None if pick is None else asdict(pick),
            "overtuning": asdict(curve),
        },
        [
            f"Best of the search: {best.name} at alpha {best.alpha or 0:.2f}, objective "
            f"{100 * (best.objective or 0):.1f} %{measured}. It was chosen by this number, so it is too high.",
            f"Corrected: {100 * corrected.value:.1f} %. The luck expected of the best of {values} is subtracted, that "
            f"of {of}.",
            f"Bootstrap (bbc): {100 * bbc_value:.1f} %. The choice was made again on resampled images and scored on "
            "the images left out. Far below the corrected value: the choice depends on few images.",
            f"How sure the choice is: {best.name} wins again in {100 * share:.0f} % of the resamples.",
            f"Overtuning: {100 * curve.absolute[-1]:.1f} points. So much worse than an earlier best is the last one, "
            "on images that did not choose; near 0 is good.",
            *([] if is_best else pick_lines),
        ],
        [
            f"corrected: {100 * corrected.optimism:.1f} points less than measured ({covered}).",
            f"bbc: {num_resamples:,} resamples, {included}. It corrects the luck of images, not that of seeds: nearly "
            "unbiased where seeds matter little, half the bias stays where they matter much.",
            *(pick_lines if is_best else []),
            _wins_line(wins),
            *([] if lost is None else [f"Overtuning: {100 * lost:.0f} % of what the search had gained is lost again."]),
        ],
    )


def _by_front(evidence: _Evidence, front: dict[str, Any]) -> _Worth:
    """Returns what the best point of a front is worth.

    ``corrected``, the one-SE pick and overtuning belong to a choice by one number and are None.
    """
    best, resamples, alpha = evidence.best, evidence.resamples, evidence.best.alpha or 0.0
    rule = FrontRule(front["rule"]["best"], front["rule"]["tolerance"])
    choice = bootstrap.front_choice(evidence.stored.candidates, resamples, evidence.spec, rule, (best.name, alpha))
    num_resamples, pair = len(resamples.in_bag), (best.metrics["id_accuracy"], best.metrics["ood_accuracy"])
    return (
        {
            "noise": None,
            "corrected": None,
            "bbc": {**asdict(choice), "num_resamples": num_resamples},
            "one_standard_error": None,
            "overtuning": None,
        },
        [
            *front_lines(front),
            f"Best as measured: {best.name} at alpha {alpha:.2f}, ID {100 * pair[0]:.1f} %, OOD {100 * pair[1]:.1f} %. "
            "It was chosen by these numbers, so they are too high.",
            f"Bootstrap (bbc): ID {100 * choice.id_accuracy:.1f} %, OOD {100 * choice.ood_accuracy:.1f} %: front and "
            f"best point chosen again on {num_resamples:,} resamples of the images and scored on the images left out. "
            "It corrects the luck of images, not that of seeds.",
            f"How sure the choice is: {best.name} at alpha {alpha:.2f} is the best again in "
            f"{100 * choice.share_best:.0f} % of the resamples, and on the front in "
            f"{100 * choice.share_on_front:.0f} %.",
        ],
        [],
    )


def _count_lines(recipe: Recipe, counts: dict[str, Any]) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in counts["trials"].items() if count)
    kinds = ", ".join(f"{count} on {device}" for device, count in counts["devices"].items())
    mixed = [f"They ran on different devices, which round differently: {kinds}."] if len(counts["devices"]) > 1 else []
    return [
        f"{recipe.name}: trials: {states}.",
        *mixed,
        f"{counted(counts['trainings'], 'training')} and {counted(counts['alphas'], 'evaluated alpha')} chose on these "
        f"validation images; test sets were read {times(counts['test_reads'])}.",
        *([OWN_CHOICES] if own_functions(recipe) else []),
    ]


def _lines_of(summary: dict[str, Any] | None, form: str) -> list[str]:
    """Returns the text of the summary of a confirm or of a test; none before there is one."""
    if summary is None:
        return []
    if form == "brief":
        return [*summary["brief"]["rows"], *summary["brief"]["lines"]]
    return [*summary["row_lines"], *summary["lines"]]


def _pick_line(best: TrialRow, pick: Pick) -> str:
    others = counted(pick.num_candidates - 1, "other candidate")
    line = f"One standard error: {others} (trial, alpha) within one standard error of the best; "
    if (pick.name, pick.alpha) == (best.name, best.alpha):
        return f"{line}the best itself moved least from zero-shot, {100 * pick.moved:.2f} % of its norm."
    where = f"{100 * abs(pick.behind):.1f} points {'behind' if pick.behind >= 0 else 'ahead'} as measured"
    return (
        f"{line}{pick.name} at alpha {pick.alpha:.2f} moved least from zero-shot ({100 * pick.moved:.2f} % of its "
        f"norm), {where}, standard error {100 * pick.se:.1f}. Take it where you want a cautious model."
    )


def _wins_line(wins: list[bootstrap.Win]) -> str:
    often = [win for win in wins if win.share >= 0.005][:_SHOWN_WINS]
    shown = ", ".join(f"{win.name} {100 * win.share:.0f} % (alpha {win.alpha:.2f})" for win in often)
    rest = len(wins) - len(often)
    return f"Wins in the resamples: {shown}" + (f", and {rest} more" if rest > 0 else "") + "."


def curve_line(view: Overview, best: TrialRow) -> list[str]:
    """Returns a line on the alpha curve of the best trial, as measured; none where alpha was not profiled."""
    points = view.result(best).get("curve", [])
    if len(points) < 3:
        return []
    area = alpha_area([point["alpha"] for point in points], [point["objective"] for point in points])
    text = f"Alpha curve: area under the objective {100 * area:.1f} %; best ID at alpha {_best(points, 'id_accuracy')}"
    if "ood_accuracy" in points[0]:
        text += f", best OOD mean at alpha {_best(points, 'ood_accuracy')}"
    partial = ", ".join(f"{alpha:g}" for alpha in partial_alphas(view.result(best)))
    return [f"{text}; chosen {best.alpha or 0:.2f}" + (f"; partial points: {partial}." if partial else ".")]


def robustness(view: Overview, best: TrialRow, reference: Path | None) -> dict[str, list[Robustness]]:
    """Returns per OOD validation set how far the best trial is above lines through other models.

    The line through the study's own plain fine-tuning (trials and baselines with a KL weight of 0, at alpha 1) is
    left out where the study has too few of them; that through reference models needs their file.

    Args:
        view: The study.
        best: Its best trial.
        reference: CSV as ``evaluation.robustness.read_reference`` wants it; None: none.

    Raises:
        DataError: The file cannot be used.
    """
    result = placed(view.result(best), best)
    metrics, num_images = result.get("metrics", {}), result.get("num_images", {})
    known = {} if reference is None else read_reference(reference)
    sets = [name for name in view.recipe.data.ood_val if f"accuracy/{name}" in metrics and name in num_images]
    if reference is not None and not set(known) & set(sets):
        named = tuple(f"acc_ood/{name}" for name in sets)
        given = ", ".join(f"acc_ood/{name}" for name in known)
        rule = "must have a column for at least one OOD validation set of the study"
        raise DataError(Problem(str(reference), rule, given, named, nearest(given, named)))
    plain = plain_trainings(view)
    found: dict[str, list[Robustness]] = {}
    for name in sets:
        model = (metrics["id_accuracy"], metrics[f"accuracy/{name}"])
        images = (num_images[ID_SET], num_images[name])
        lines = [above_line("effective_robustness", known[name], model, images)] if name in known else []
        if len(plain) >= MIN_MODELS:
            models = {one: (at["id_accuracy"], at[f"accuracy/{name}"]) for one, at in plain.items()}
            lines.append(above_line("gain_over_ft_line", models, model, images))
        if lines:
            found[name] = lines
    return found


def robustness_lines(found: Mapping[str, list[Robustness]]) -> list[str]:
    """Returns them as lines of text, with their caveat."""
    lines = [f"{name}: {one.words}." for name, several in found.items() for one in several]
    has_reference = any(one.measure == "effective_robustness" for several in found.values() for one in several)
    return [*lines, CAVEAT] if has_reference else lines


def plain_trainings(view: Overview) -> dict[str, dict[str, Any]]:
    """Returns the metrics at alpha 1 of every finished training without KL term."""
    base = view.recipe.train.kl_weight
    rows = [row for row in (*view.trials, *view.baselines) if row.values.get("kl_weight", base) == 0]
    results = {row.name: view.result(row).get("fine_tuned") for row in rows}
    return {name: metrics for name, metrics in results.items() if metrics}


def _best(points: list[dict[str, float]], metric: str) -> str:
    return f"{max(points, key=lambda point: point[metric])['alpha']:.2f}"
