"""What a study's numbers are worth (`report`): the best as measured and corrected, other rules, the headline.

Everything is read from stored validation predictions; no test set is opened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from carft_ray.data.shared.shared_images import read_shared, shared_counts, shared_lines
from carft_ray.evaluation.constraints import Limit
from carft_ray.evaluation.objective import ObjectiveSpec, objective_spec
from carft_ray.layout import CONFIRM
from carft_ray.recipe.constraints import violations
from carft_ray.results.pareto import front_data, front_lines, mean_words, study_limits
from carft_ray.results.reading.overview import Overview
from carft_ray.results.reading.stored import Stored, confirmed, found_analysis, found_beside, read_stored
from carft_ray.results.statistics.bootstrap import (
    NUM_RESAMPLES,
    BoolArray,
    Resamples,
    Win,
    bbc,
    incumbent_values,
    meeting,
    overtuning,
    resample,
    share_meeting,
)
from carft_ray.results.statistics.front_bootstrap import front_choice
from carft_ray.results.statistics.intervals import headline, in_points, objective_difference
from carft_ray.results.statistics.robustness import curve_line, robustness, robustness_lines
from carft_ray.results.statistics.selection import (
    Correction,
    Noise,
    Pick,
    correct_best,
    one_se_pick,
    ranking_noise,
    regret_table,
)
from carft_ray.study.best import constraint_lines
from carft_ray.study.front import FrontRule
from carft_ray.study.ledger import read_ledger, reads_of
from carft_ray.study.outcome import TrialRow
from carft_ray.study.proposals.warm_start import inherited_reads
from carft_ray.study.rows import ZERO_SHOT, require_finished
from carft_ray.words import counted, times

TEST = "test"
_SHOWN_WINS = 5


def study_report(view: Overview, reference: Path | None = None, num_resamples: int = NUM_RESAMPLES) -> dict[str, Any]:
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
    best = require_finished(view.study_dir, view.best)
    spec, lowest = objective_spec(view.recipe), view.recipe.search.alpha.lowest
    trials = [row for row in view.trials if row.outcome == "complete" and row.objective is not None]
    baselines = [row for row in view.baselines if row.outcome == "complete" and row.objective is not None]
    bounds = study_limits(view.recipe, view.baselines)
    stored = read_stored(view.study_dir, view.recipe, trials, baselines, spec, bounds)
    resamples = resample(stored.candidates, spec, lowest, num_resamples, bounds=bounds)
    found_front = front_data(view.recipe, view.trials)
    if found_front is None:
        worth = _by_one_number(view, best, trials, spec, bounds, stored, resamples)
    else:
        worth = _by_front(view, best, found_front, spec, stored, resamples)
    share = share_meeting(stored.chosen[best.name], spec, bounds, num_resamples) if bounds else None
    counts = {
        "trials": view.counts(),
        "trainings": sum(row.outcome not in ("running",) for row in (*view.trials, *view.baselines))
        - _zero_shots(view),
        "alphas": stored.num_alphas,
        "test_reads": len(reads_of(read_ledger(view.study_dir))) + inherited_reads(view.study_dir),
    }
    of = "" if found_front is None else f" by {mean_words(view.recipe)}"
    against, above = _headline(spec, best, baselines, stored, of), robustness(view, best, reference)
    shared = read_shared(view.study_dir)
    met = [] if share is None else [f"{best.name} meets all constraints in {100 * share:.0f} % of the resamples."]
    curve = [line] if (line := curve_line(view, best)) else []
    forms = {}
    for form, details in (("lines", True), ("brief", False)):
        forms[form] = [
            *_count_lines(view.recipe.name, counts),
            *shared_lines(shared),
            "",
            *worth.pop(form),
            *constraint_lines(best),
            *met,
            *(curve if details else []),
            *([] if against is None else ["", *against["lines"][: None if details else 1]]),
            *(["", *robustness_lines(above)] if above else []),
        ]
        for step in (CONFIRM, TEST):
            found = found_beside(view.study_dir, step, details)
            forms[form] += ["", *found] if found else []
    return {
        "study": str(view.study_dir),
        "name": view.recipe.name,
        "counts": counts,
        "shared_images": shared_counts(shared),
        "best": {
            "name": best.name,
            "alpha": best.alpha,
            "objective": best.objective,
            "violations": violations(best.metrics),
            "share_meeting_constraints": share,
        },
        "front": found_front,
        **worth,
        "rules": [asdict(line) for line in regret_table(stored.candidates, resamples, spec, lowest)],
        "headline": against,
        "robustness": {name: [asdict(one) for one in several] for name, several in above.items()},
        **{step: found_beside(view.study_dir, step) for step in (CONFIRM, TEST)},
        "analysis": found_analysis(view.study_dir),
        **forms,
    }


def _stack(stored: Stored, trials: list[TrialRow], name: str) -> BoolArray:
    matrix: BoolArray = np.concatenate([stored.chosen[row.name].correct[name] for row in trials])
    return matrix


def _zero_shots(view: Overview) -> int:
    return sum(row.name == ZERO_SHOT and row.outcome != "running" for row in view.baselines)


def _by_one_number(
    view: Overview,
    best: TrialRow,
    trials: list[TrialRow],
    spec: ObjectiveSpec,
    bounds: Sequence[Limit],
    stored: Stored,
    resamples: Resamples,
) -> dict[str, Any]:
    """Returns what the best value is worth where one objective has chosen it; ``lines`` among it.

    Trials that miss constraints compete only where no trial meets them; ``corrected`` is over those that compete.
    """
    competing = [row for row in trials if row.violation <= best.violation]
    objectives = [row.objective or 0.0 for row in competing]
    again = confirmed(view.study_dir, spec)
    at_choice = {name: _stack(stored, competing, name) for name in (spec.id_set, *spec.ood_sets)}
    noise = ranking_noise(spec, objectives, at_choice, again)
    corrected = correct_best(objectives, noise.variance)
    bbc_value, wins = bbc(resamples)
    pick = None
    if best.name in stored.moved and not best.violation:
        own, lowest = stored.chosen[best.name], view.recipe.search.alpha.lowest
        pick = one_se_pick(spec, own, meeting(stored.candidates, bounds), stored.moved, lowest, noise.seed)
    curve, num_resamples = overtuning(incumbent_values(resamples)), len(resamples.in_bag)
    return {
        "noise": {**asdict(noise), "words": noise.words},
        "corrected": asdict(corrected),
        "bbc": {"value": bbc_value, "num_resamples": num_resamples, "wins": [asdict(win) for win in wins]},
        "one_standard_error": None if pick is None else asdict(pick),
        "overtuning": asdict(curve),
        "lines": [
            *_best_lines(best, corrected, noise, bbc_value, num_resamples, len(again), bool(bounds)),
            *([] if pick is None else [_pick_line(best, pick)]),
            _wins_line(wins),
            _overtuning_line(curve.absolute[-1], curve.relative[-1]),
        ],
        "brief": _brief(best, corrected, noise, bbc_value, wins, pick, curve.absolute[-1]),
    }


def _by_front(
    view: Overview,
    best: TrialRow,
    found: dict[str, Any],
    spec: ObjectiveSpec,
    stored: Stored,
    resamples: Resamples,
) -> dict[str, Any]:
    """Returns what the best point of a front is worth; ``lines`` among it.

    ``corrected``, the one-SE pick and overtuning belong to a choice by one number and are None.
    """
    rule = FrontRule(found["rule"]["best"], found["rule"]["tolerance"])
    choice = front_choice(stored.candidates, resamples, spec, rule, (best.name, best.alpha or 0.0))
    num_resamples = len(resamples.in_bag)
    again = f"in {100 * choice.share_best:.0f} %, and on the front in {100 * choice.share_on_front:.0f} %"
    pair = f"ID {100 * best.metrics['id_accuracy']:.1f} %, OOD {100 * best.metrics['ood_accuracy']:.1f} %"
    return {
        "noise": None,
        "corrected": None,
        "bbc": {**asdict(choice), "num_resamples": num_resamples},
        "one_standard_error": None,
        "overtuning": None,
        "lines": [
            *front_lines(found),
            f"Best as measured: {best.name} at alpha {best.alpha or 0:.2f}, {pair}. It was chosen by these numbers, "
            "which flatter it.",
            f"bbc: ID {100 * choice.id_accuracy:.1f} %, OOD {100 * choice.ood_accuracy:.1f} %: front and best point "
            f"chosen again on {num_resamples:,} resamples of the images and scored on the images left out. It corrects "
            "the luck of images, not that of seeds.",
            f"In the resamples {best.name} at alpha {best.alpha or 0:.2f} is the best again {again}.",
        ],
        "brief": [
            *front_lines(found),
            f"Best as measured: {best.name} at alpha {best.alpha or 0:.2f}, {pair}. It was chosen by these numbers, "
            "so they are too high.",
            f"Bootstrap (bbc): ID {100 * choice.id_accuracy:.1f} %, OOD {100 * choice.ood_accuracy:.1f} %. The choice "
            "was made again on resampled images and scored on the images left out: the luck of the images is off.",
            f"How sure the choice is: {best.name} is the best again {again} of the resamples.",
        ],
    }


def _headline(
    spec: ObjectiveSpec, best: TrialRow, baselines: list[TrialRow], stored: Stored, of: str
) -> dict[str, Any] | None:
    """Returns the best trial against the baseline with the highest objective, or None without a baseline."""
    if not baselines:
        return None
    rival = max(baselines, key=lambda row: row.objective or 0.0)
    difference = objective_difference(spec, stored.chosen[best.name].correct, stored.chosen[rival.name].correct)
    sentence = headline(difference, rival.name.replace("_", " "))
    return {
        "baseline": rival.name,
        "mean": difference.mean,
        "images_random": difference.images_random,
        "words": difference.words,
        "sentence": sentence,
        "lines": [
            f"Measured at their alphas{of}, on the images that chose: {best.name}: {sentence}; 95 %, "
            f"{difference.words}.",
            f"    {best.name} - {rival.name}: {in_points(difference, signed=True)}",
        ],
    }


def _count_lines(name: str, counts: Mapping[str, Any]) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in counts["trials"].items() if count)
    return [
        f"{name}: trials: {states}.",
        f"{counted(counts['trainings'], 'training')} and {counted(counts['alphas'], 'evaluated alpha')} chose on these "
        f"validation images; test sets were read {times(counts['test_reads'])}.",
    ]


def _best_lines(
    best: TrialRow,
    corrected: Correction,
    noise: Noise,
    bbc_value: float,
    num_resamples: int,
    num_confirmed: int,
    constrained: bool,
) -> list[str]:
    covered = (
        f"image and seed noise, the latter from {counted(num_confirmed, 'confirmed configuration')}"
        if noise.seed is not None
        else "image noise only: the luck of the seed is still in it"
    )
    included = "alpha and constraints included" if constrained else "alpha included"
    return [
        f"Best of the search: {best.name} at alpha {best.alpha or 0:.2f}, objective {100 * (best.objective or 0):.1f} %"
        f"{_measured(best)}. It was chosen by this number, which flatters it.",
        f"corrected: {100 * corrected.value:.1f} %, {100 * corrected.optimism:.1f} points less: the optimism expected "
        f"of the best of {counted(len(corrected.shrunk), 'noisy value')} ({covered}).",
        f"bbc: {100 * bbc_value:.1f} %: the choice made again, {included}, on {num_resamples:,} resamples of the "
        "images and scored on the images left out. It corrects the luck of images, not that of seeds: nearly unbiased "
        "where seeds matter little, half the bias stays where they matter much.",
    ]


def _brief(
    best: TrialRow,
    corrected: Correction,
    noise: Noise,
    bbc_value: float,
    wins: list[Win],
    pick: Pick | None,
    lost: float,
) -> list[str]:
    """Returns what the best value is worth in few numbers, each with what it is and what to read from it."""
    share = sum(win.share for win in wins if win.name == best.name)
    of = "images alone. Quote this one until there is a confirm"
    if noise.seed is not None:
        of = "images and seeds. Quote the confirm where it has this trial"
    lines = [
        f"Best of the search: {best.name} at alpha {best.alpha or 0:.2f}, objective {100 * (best.objective or 0):.1f} %"
        f"{_measured(best)}. It was chosen by this number, so it is too high.",
        f"Corrected: {100 * corrected.value:.1f} %. The luck expected of the best of "
        f"{counted(len(corrected.shrunk), 'value')} is taken off, that of {of}.",
        f"Bootstrap (bbc): {100 * bbc_value:.1f} %. The choice was made again on resampled images and scored on the "
        "images left out. Far below the corrected value: the choice hangs on few images.",
        f"How sure the choice is: {best.name} wins again in {100 * share:.0f} % of the resamples.",
        f"Overtuning: {100 * lost:.1f} points. So much worse than an earlier best is the last one, on images that did "
        "not choose; near 0 is good.",
    ]
    if pick is not None and (pick.name, pick.alpha) != (best.name, best.alpha):
        lines.append(
            f"One standard error: {pick.name} at alpha {pick.alpha:.2f} is as good within the noise and nearest to "
            "zero-shot; take it where you want a cautious model."
        )
    return lines


def _measured(best: TrialRow) -> str:
    """Returns the objective that was measured at the chosen alpha, where the one that ranks is of the fitted curve."""
    return f" by its fitted alpha curve, {100 * best.metrics['objective']:.1f} % measured" if best.fitted else ""


def _pick_line(best: TrialRow, pick: Pick) -> str:
    others = pick.num_candidates - 1
    share = f"{counted(others, 'other candidate')} (trial, alpha) within one standard error of the best"
    if (pick.name, pick.alpha) == (best.name, best.alpha):
        moved = f"moved least from zero-shot, {100 * pick.moved:.2f} % of its norm"
        return f"One standard error: {share}; the best itself {moved}."
    where = f"{100 * abs(pick.behind):.1f} points {'behind' if pick.behind >= 0 else 'ahead'} as measured"
    return (
        f"One standard error: {share}; {pick.name} at alpha {pick.alpha:.2f} moved least from zero-shot "
        f"({100 * pick.moved:.2f} % of its norm), {where}, "
        f"standard error {100 * pick.se:.1f}."
    )


def _wins_line(wins: list[Win]) -> str:
    often = [win for win in wins if win.share >= 0.005][:_SHOWN_WINS]
    shown = ", ".join(f"{win.name} {100 * win.share:.0f} % (alpha {win.alpha:.2f})" for win in often)
    rest = len(wins) - len(often)
    return f"Wins in the resamples: {shown}" + (f", and {rest} more" if rest > 0 else "") + "."


def _overtuning_line(absolute: float, relative: float | None) -> str:
    share = "" if relative is None else f", {100 * relative:.0f} % of what the search had gained"
    lost = f"{100 * absolute:.1f} points below the best incumbent before it"
    return f"Overtuning: on images that did not choose, the last incumbent is {lost}{share}."
