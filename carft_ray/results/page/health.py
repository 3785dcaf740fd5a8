"""What may be wrong with a study: checks of which the page shows those that fail, each with a next step."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from carft_ray.recipe.messages import train_problems
from carft_ray.results.next_steps import BEHIND, behind_zero_shot
from carft_ray.results.reading.study_view import Overview
from carft_ray.study.place import named
from carft_ray.words import counted

NEAR_END = 0.03  # of the width of a parameter: the best trial is on its bound
BELIEVED = 0.25  # share of the distances between trials that is not noise; below it they hardly differ
MANY_FAILURES = 0.25

Document = Mapping[str, Any]


def findings(view: Overview, document: Document) -> list[dict[str, str]]:
    """Returns the checks that fail: the name of the ``check``, the ``text`` of what was found, and the next ``step``.

    Args:
        view: The study.
        document: Its page's document, without ``health``.
    """
    found = []
    if behind_zero_shot(view):
        text, _, step = BEHIND.partition(": ")
        found.append(("below zero-shot", text, step))
    found += _ends(view, document) + _noise(document)
    row = next((one for one in view.baselines if one.metrics and not one.alpha), None)
    if row is not None and row.at_chance:
        right = f"{100 * row.metrics['id_accuracy']:.1f} %"
        text = f"{right} of zero-shot's predictions on the ID images are right, which is not shown to be above chance"
        step = "check class names, templates and preprocessing: carft-ray doctor RECIPE"
        found.append(("zero-shot not above chance", text, step))
    failed = [row for row in view.trials if row.outcome in ("error", "diverged")]
    if len(failed) >= MANY_FAILURES * max(1, view.num_finished):
        reason, count = Counter(row.reason or row.outcome for row in failed).most_common(1)[0]
        text = f"{len(failed)} of {counted(view.num_finished, 'trial')} failed; {count} of them: {reason}"
        step = f"read the log: carft-ray logs {shlex.quote(named(view.study_dir))} {failed[0].name}"
        found.append(("many failures", text, step))
    for line in document["status"]["lines"]:
        if line.startswith("No trial meets all constraints"):
            found.append(("constraints", line.rstrip("."), "loosen search.constraints, or search milder trainings."))
    return [{"check": check, "text": text, "step": f"{step[:1].upper()}{step[1:]}"} for check, text, step in found]


def _ends(view: Overview, document: Document) -> list[tuple[str, str, str]]:
    """Returns a finding for each parameter whose value of the best trial lies on an end of the space.

    None where nothing lies beyond: at the end of what the field may have.
    """
    if view.best is None:
        return []
    folder, found, search = shlex.quote(named(view.study_dir)), [], view.recipe.search
    for name, one in document["space"].items():
        if name == "alpha" and search.objective.kind == "pareto":  # its grid is measured, too
            continue
        value = view.best.values.get(name)
        place = position(value, one)
        if place is None or NEAR_END < place < 1 - NEAR_END:
            continue
        end, which, sign = (one["low"], "lower", -1) if place <= NEAR_END else (one["high"], "upper", 1)
        beyond = end + sign * (1 if one["type"] == "int" else 0.01 * (end or 1))
        if train_problems({name: beyond}, ()) or (name == "alpha" and beyond < search.alpha.lowest):
            continue
        at = f"the best trial has {name} {value:.3g}, at the {which} end of the space, {end:g}"
        text = f"{at}: the optimum may lie beyond"
        step = f"widen search.space.{name} in the recipe, then: carft-ray search RECIPE --study {folder} --change-space"
        found.append(("best point on a bound", text, step))
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


def _noise(document: Document) -> list[tuple[str, str, str]]:
    """Returns a finding where the trials differ by hardly more than their noise."""
    report = document["report"] or {}
    corrected, noise = report.get("corrected"), report.get("noise")
    if not corrected or not noise or corrected["num_trials"] < 4 or corrected["factor"] >= BELIEVED:
        return []
    sigma = 100 * math.sqrt(noise["image"] + (noise["seed"] or 0.0))
    spread = 100 * math.sqrt(corrected["spread"])
    text = (
        f"the better half of the trials differs by {spread:.2f} points, and their {noise['words']} alone is "
        f"{sigma:.2f}: the choice of the best among them is mostly luck"
    )
    return [("noise larger than differences", text, "more validation images help more than more trials.")]
