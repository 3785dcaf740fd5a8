"""What may be wrong with a study: checks of which the page shows those that fail, each with a next step."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from carft_ray.results.next_steps import BEHIND, behind_zero_shot
from carft_ray.results.reading.overview import Overview
from carft_ray.study.outcome import TrialRow
from carft_ray.words import counted

NEAR_END = 0.03  # of the width of a parameter: the best trial is on its bound
BELIEVED = 0.25  # share of the distances between trials that is not noise; below it they hardly differ
CONCENTRATED, MIN_FAILURES = 0.8, 4  # chance that a failed trial has a larger value than a complete one
MANY_FAILURES = 0.25

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A check that failed.

    Attributes:
        check: Its name.
        text: What was found.
        step: What to do: a command, or a change of the recipe.
    """

    check: str
    text: str
    step: str


def findings(view: Overview, document: Document) -> list[Finding]:
    """Returns the checks that fail.

    Args:
        view: The study.
        document: Its page's document, without ``health``.
    """
    found: list[Finding] = []
    for check in _CHECKS:
        found += check(view, document)
    return found


def _ends(view: Overview, document: Document) -> list[Finding]:
    best, folder = view.best, shlex.quote(str(view.study_dir))
    found = []
    for name, one in document["space"].items() if best is not None else ():
        value = best.values.get(name) if best is not None else None
        place = position(value, one)
        if place is None or NEAR_END < place < 1 - NEAR_END:
            continue
        end, which = (one["low"], "lower") if place <= NEAR_END else (one["high"], "upper")
        at = f"the best trial has {name} {value:.3g}, at the {which} end of the space, {end:g}"
        text = f"{at}: the optimum may lie beyond"
        step = f"Widen search.space.{name} in the recipe, then: carft-ray search RECIPE --study {folder} --change-space"
        found.append(Finding("best point on a bound", text, step))
    return found


def position(value: Any, parameter: Mapping[str, Any]) -> float | None:
    """Returns where a value lies between the ends of its parameter, 0 to 1; None for what has no ends."""
    low, high = parameter.get("low"), parameter.get("high")
    if low is None or high is None or low == high or not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if parameter.get("log"):
        if value <= 0:
            return None
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def _noise(view: Overview, document: Document) -> list[Finding]:
    report = document["report"] or {}
    corrected, noise = report.get("corrected"), report.get("noise")
    if not corrected or not noise or corrected["num_trials"] < 4 or corrected["factor"] >= BELIEVED:
        return []
    sigma = 100 * math.sqrt(noise["image"] + (noise["seed"] or 0.0))
    spread = 100 * math.sqrt(corrected["spread"])
    text = (
        f"the better half of the trials differs by {spread:.2f} points, and their {noise['words']} alone is "
        f"{sigma:.2f}: which of them is the best is mostly luck"
    )
    return [Finding("noise larger than differences", text, "More validation images help more than more trials.")]


def _zero_shot(view: Overview, document: Document) -> list[Finding]:
    row = next((one for one in view.baselines if one.metrics and not one.alpha), None)
    if row is None or not row.at_chance:
        return []
    right = f"{100 * row.metrics['id_accuracy']:.1f} %"
    text = f"{right} of zero-shot's answers to the ID images are right, as with the same answers in any other order"
    step = "Check class names, templates and preprocessing: carft-ray doctor RECIPE"
    return [Finding("zero-shot at chance", text, step)]


def _no_ood(view: Overview, document: Document) -> list[Finding]:
    if document["has_ood"]:
        return []
    text = "the recipe has no ood_val: trials were chosen on ID alone, and nothing here is about robustness"
    return [Finding("no OOD set", text, "Add data.ood_val, for instance corrupted ID images (docs/corruptions.md).")]


def _pruner(view: Overview, document: Document) -> list[Finding]:
    pruner = document["status"]["pruner"]
    if not pruner or not pruner["warning"]:
        return []
    text, _, step = pruner["warning"].partition(" Set ")
    return [Finding("pruner that foretells nothing", text.rstrip("."), f"Set {step}")]


def _failures(view: Overview, document: Document) -> list[Finding]:
    failed = [row for row in view.trials if row.outcome in ("error", "diverged")]
    if not failed:
        return []
    found, done = [], max(1, view.num_finished)
    if len(failed) / done >= MANY_FAILURES:
        reason, count = Counter(row.reason or row.outcome for row in failed).most_common(1)[0]
        text = f"{len(failed)} of {counted(done, 'trial')} failed; {count} of them: {reason}"
        step = f"Read the log: carft-ray logs {shlex.quote(str(view.study_dir))} {failed[0].name}"
        found.append(Finding("many failures", text, step))
    complete = [row for row in view.trials if row.outcome == "complete"]
    for name in document["space"]:
        share = _share_above(failed, complete, name)
        if share is None or 1 - CONCENTRATED < share < CONCENTRATED:
            continue
        values = [row.values[name] for row in failed if name in row.values]
        side, end = ("large", "high") if share >= CONCENTRATED else ("small", "low")
        text = f"{counted(len(values), 'failed trial')} have a {side} {name}, {min(values):.3g} to {max(values):.3g}"
        step = f"Bring search.space.{name}.{end} nearer, or leave it: the sampler avoids the region."
        found.append(Finding("failures in one region", text, step))
    return found


def _share_above(failed: list[TrialRow], complete: list[TrialRow], name: str) -> float | None:
    """Returns the chance that a failed trial has a larger value than a complete one (ties half); None: too few."""
    a, b = (
        [
            row.values[name]
            for row in rows
            if isinstance(row.values.get(name), int | float) and not isinstance(row.values[name], bool)
        ]
        for rows in (failed, complete)
    )
    if len(a) < MIN_FAILURES or len(b) < MIN_FAILURES:
        return None
    return float(sum((x > y) + 0.5 * (x == y) for x in a for y in b)) / len(a) / len(b)


def _behind(view: Overview, document: Document) -> list[Finding]:
    if view.best is None or not behind_zero_shot(view):
        return []
    text, _, step = BEHIND.partition(": ")
    return [Finding("below zero-shot", f"{text[:1].lower()}{text[1:]}", step[:1].upper() + step[1:])]


def _constraints(view: Overview, document: Document) -> list[Finding]:
    lines = [line for line in document["status"]["lines"] if line.startswith("No trial meets all constraints")]
    return [Finding("constraints", line, "Loosen search.constraints, or search milder trainings.") for line in lines]


_CHECKS: tuple[Callable[[Overview, Document], list[Finding]], ...] = (
    _behind,
    _ends,
    _noise,
    _zero_shot,
    _no_ood,
    _pruner,
    _failures,
    _constraints,
)
