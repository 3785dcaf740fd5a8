"""What a study shows that may be wrong, what helps against it, and what to run next on it.

A suggested command is none that the study would refuse as it is, and none that is done.
"""

import contextlib
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.errors import CarftError, StorageError
from carft_ray.layout import CONFIRM, RESOLVED, SUMMARY, TEST_DIR
from carft_ray.recipe.loading import trust_word
from carft_ray.recipe.schema.recipe import with_keys
from carft_ray.recipe.schema.search import CategoricalParameter
from carft_ray.recipe.space import num_trials
from carft_ray.recipe.written import train_problems
from carft_ray.results.confirm_plan import options_to_go_on, read_plan
from carft_ray.results.reading.status_and_ls import budget, failure_lines, ledger
from carft_ray.results.reading.study_view import Overview
from carft_ray.study.best import constraint_lines
from carft_ray.study.ledger import Entry, needs_reason, read_folder, reads_of
from carft_ray.study.place import Place, named
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.typed import FAILED
from carft_ray.study.warm_start import inherited_reads

AGAIN = " --again REASON"
BEHIND = "The best trial scores below the zero-shot model"
MILDER = (
    "there is nothing to export. Search where trainings change the model less: a lower learning_rate, fewer epochs or "
    "a higher kl_weight."
)
NEAR_END = 0.03  # of the width of a parameter: the best trial is on its bound
BELIEVED = 0.25  # share of the distances between trials that is not noise; below it they hardly differ
MANY_FAILURES = 0.25


def findings(view: Overview, report: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Returns the checks that fail: the name of the ``check``, the ``text`` of what was found, and the next ``step``.

    Args:
        view: The study.
        report: Of ``results.report.study_report``; None before a trial has finished.
    """
    found = [("below zero-shot", BEHIND, MILDER)] if behind_zero_shot(view) else []
    found += [*_ends(view), *_noise(report or {})]
    row = next((one for one in view.baselines if one.metrics and not one.alpha), None)
    if row is not None and row.at_chance:
        right = f"{100 * row.metrics['id_accuracy']:.1f} %"
        text = f"{right} of zero-shot's predictions on the ID images are right, which is not shown to be above chance"
        step = "check class names, templates and preprocessing: carft-ray doctor RECIPE"
        found.append(("zero-shot not above chance", text, step))
    failed = [row for row in view.trials if row.outcome in FAILED]
    if len(failed) >= MANY_FAILURES * max(1, view.num_finished):
        step = f"read the log: carft-ray logs {shlex.quote(named(view.study_dir))} {failed[0].name}"
        found.append(("many failures", failure_lines(view.trials)[0], step))
    for line in constraint_lines(view.best):
        found.append(("constraints", line.rstrip("."), "loosen search.constraints, or search milder trainings."))
    return [{"check": check, "text": text, "step": f"{step[:1].upper()}{step[1:]}"} for check, text, step in found]


def _ends(view: Overview) -> Iterator[tuple[str, str, str]]:
    """Yields a finding for each parameter whose value of the best trial lies on an end of the space.

    None where nothing lies beyond: at the end of what the field may have.
    """
    folder, search, best = shlex.quote(named(view.study_dir)), view.recipe.search, view.best
    if best is None:
        return
    for name, one in search.space.items():
        if name == "alpha" and search.objective.kind == "pareto":  # its grid is measured, too
            continue
        value = best.values.get(name)
        if isinstance(one, CategoricalParameter) or not isinstance(value, int | float) or one.low == one.high:
            continue
        if one.log and value <= 0:
            continue
        scale = math.log if one.log else float
        place = (scale(value) - scale(one.low)) / (scale(one.high) - scale(one.low))
        if NEAR_END < place < 1 - NEAR_END:
            continue
        end, which, sign = (one.low, "lower", -1) if place <= NEAR_END else (one.high, "upper", 1)
        beyond = end + sign * (1 if one.type == "int" else 0.01 * (end or 1))
        if train_problems({name: beyond}, ()) or (name == "alpha" and beyond < search.alpha.lowest):
            continue
        at = f"the best trial has {name} {value:.3g}, at the {which} end of the space, {end:g}"
        step = f"widen search.space.{name} in the recipe, then: carft-ray search RECIPE --study {folder} --change-space"
        yield "best point on a bound", f"{at}: the optimum may lie beyond", step


def _noise(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields a finding where the trials differ by hardly more than their noise."""
    found = report.get("expected")
    if not found or found["trainings"] < 4:
        return
    spread, noise = 100 * found["spread"], 100 * found["noise"]
    if spread**2 < BELIEVED * (spread**2 + noise**2):
        text = f"the values differ by a standard deviation of {spread:.2f} points, trainings of the same values by "
        text += f"{noise:.2f}: which training measured most is mostly luck"
        step = "repeats (search.repeats) and more validation images help more than more values."
        yield "noise larger than differences", text, step


def next_steps(view: Overview, study: Place, after: str) -> list[str]:
    """Returns the commands that make sense now, the most useful one first.

    Args:
        view: The study, read when the command before has ended.
        study: Its folder or address as the user has written it.
        after: Name of the command that has ended, which is not suggested again.

    Raises:
        StorageError: The study cannot be read.
    """
    folder = shlex.quote(str(study))
    if view.holder is not None:
        running = [row.name for row in view.rows if view.state(row) == "running"][:1]
        steps = [*(f"logs {folder} {name} --follow" for name in running), f"status {folder}", f"stop {folder}"]
    elif ledger(view.study_dir, view.log)["problems"]:
        steps = [f"status {folder}", f"ls {folder}"]  # others are refused
    else:
        steps = _at_rest(view, study, view.ledger)
    return [f"carft-ray {step}" for step in steps if step.split()[0] != after]


def winner_of_confirm(view: Overview) -> str | None:
    """Returns the name of the trial that a confirm has chosen with fresh seeds; None if the search's winner counts."""
    from carft_ray.results.stored import read_compared  # loads pyarrow

    with contextlib.suppress(CarftError, KeyError, TypeError):
        found, plan = read_compared(view.study_dir, CONFIRM) or {}, read_plan(view.study_dir)
        is_of_now = plan is not None and view.best is not None and plan[0].winner == view.best.name
        return str(found["winner"]) if is_of_now and found.get("chosen_by") == "confirm" else None
    return None


def behind_zero_shot(view: Overview) -> bool:
    """Returns whether the best trial measures worse than the zero-shot model: on test, else with fresh seeds, else as
    the search has measured both. A winner that a confirm has chosen counts for it.
    """
    from carft_ray.results.stored import read_compared  # loads pyarrow

    confirmed = winner_of_confirm(view)
    with contextlib.suppress(CarftError, KeyError, TypeError):  # damaged files are reported by other commands
        for step in (TEST_DIR, CONFIRM):
            found = read_compared(view.study_dir, step) or {"rows": []}
            means = {row["name"]: row["objective"]["mean"] for row in found["rows"]}
            best = confirmed or (view.best and view.best.name)
            if best in means and ZERO_SHOT in means:  # else the search has continued, and has another best trial
                return bool(means[best] < means[ZERO_SHOT])
    zero_shot = next((row for row in view.baselines if row.name == ZERO_SHOT), None)
    if view.best is None or zero_shot is None or zero_shot.objective is None:
        return False
    return (view.best.objective or 0.0) < zero_shot.objective


def export_folder(name: str) -> str:
    """Returns a folder for an export of that name that is not there yet, as a word of a command line."""
    number, path = 1, Path("exports") / name
    while path.exists():
        number, path = number + 1, Path("exports") / f"{name}-{number + 1}"
    return shlex.quote(str(path))


def _at_rest(view: Overview, study: Place, entries: list[Entry]) -> list[str]:
    """Returns the steps of a study on which no search runs, without the name of the program."""
    folder = shlex.quote(str(study))
    reads, wanted = reads_of(entries), num_trials(view.recipe)
    rows = [*view.trials, *view.all_baselines]
    expected, begun = view.expected, len(view.searched)
    is_enough = begun >= wanted or (expected is not None and expected.is_worth_less(view.recipe.search.stop_gain))
    finished = is_enough and all(row.outcome != "running" for row in rows)
    steps, trust = [], trust_word(view.recipe)
    if not finished:
        given = view.recipe.search.baselines
        again = AGAIN if needs_reason(entries, view.searched, view.baselines, wanted, given) else ""
        used, more = budget(view), ""
        if "gpu_hours" in used["ended"]:
            more = f" --set budget.gpu_hours={2 * used['gpu_hours']:g}"
        go_on = f"resume {folder}{more}{again}"
        if not view.recipe.search.space:
            here = view.study_dir if files.is_address(str(study)) else study  # a recipe is a file
            go_on = f"train {shlex.quote(str(here))}/{RESOLVED} --out {folder} --resume"
        steps.append(f"{go_on}{trust}")
    if view.best is None:
        return [*steps, f"ls {folder}"]
    steps.append(f"report {folder}")
    if finished:
        steps += _trust(view, folder, reads)
    if not behind_zero_shot(view):
        steps.append(f"export {folder} --to {export_folder(view.recipe.name)}")
    num_more = max(4, wanted // 2)
    has_more = num_trials(with_keys(view.recipe, search={"trials": wanted + num_more})) > wanted
    if finished and not reads and has_more and view.recipe.search.space:
        steps.append(f"resume {folder} --trials +{num_more}{trust}")
    return [*steps, f"ls {folder}"]


def _trust(view: Overview, folder: str, reads: list[Entry]) -> list[str]:
    """Returns the step that comes next in confirming the winner and reading the test sets; none when both are done."""
    plan, trust = None, trust_word(view.recipe)
    with contextlib.suppress(StorageError):  # which the command itself reports
        plan = read_plan(view.study_dir)
    if plan is None:
        return [] if reads else [f"confirm {folder}{trust}"]
    first, second = plan
    last, ended = second or first, {row.name for row in view.confirmations if row.outcome != "running"}
    done = ended >= last.trainings().keys()
    best = view.best.name if view.best is not None else ""
    if not done or first.winner != best or not (view.study_dir / CONFIRM / SUMMARY).exists():
        options = options_to_go_on(first, second, view.recipe, view.confirmations, best)
        return [f"confirm {folder} {options}{trust}"] if options else []
    if view.recipe.data.id_test is None:
        return []
    if not reads:
        again = AGAIN if inherited_reads(view.study_dir, view.log) else ""
        return [f"test {folder}{again}"]
    if not (view.study_dir / read_folder(len(reads)) / SUMMARY).exists():  # it was killed, and continues
        return [f"test {folder}"]
    return []
