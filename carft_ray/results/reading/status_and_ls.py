"""What `status` and `ls` report of a study, and the front of a Pareto search, as JSON documents and text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray.errors import CarftError
from carft_ray.launch.budget import BUDGET_STOP
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.search import AnyPruner
from carft_ray.recipe.space import num_trials
from carft_ray.results.evidence import in_points
from carft_ray.results.reading.study_view import STATES, Overview, read_study, require_study, studies_in
from carft_ray.store.log import Log
from carft_ray.study.best import constraint_lines
from carft_ray.study.expected import NEXT, Expected
from carft_ray.study.holding import stopping
from carft_ray.study.ledger import check_ledger
from carft_ray.study.pareto_front import front_of, front_rule, points_of
from carft_ray.study.place import named
from carft_ray.study.proposals.pruning import deciding_value
from carft_ray.study.recipe_identity import read_manifest
from carft_ray.study.rows import ZERO_SHOT, best_first, best_row
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.training import TrialRow
from carft_ray.study.typed import FAILED
from carft_ray.study.warm_start import num_test_reads
from carft_ray.words import counted

WEAK = 0.3  # rank correlation under which a warning is given,
ENOUGH = 10  # from this many complete trials on


def status(overview: Overview) -> dict[str, Any]:
    """Returns what `status` reports, as JSON."""
    best, rows, front = overview.best, overview.rows, front_data(overview.recipe, overview.trials)
    expected = expected_data(overview)
    fresh = [overview.state(row) for row in overview.confirmations]
    seconds = [row.elapsed_s for row in rows if row.elapsed_s is not None and row.name != ZERO_SHOT]
    pruner, log = overview.recipe.search.pruner, overview.log
    return {
        "study": named(overview.study_dir),
        "name": overview.recipe.name,
        "wanted": num_trials(overview.recipe),
        "finished": overview.num_finished,
        "selected_on": ["id_val", *overview.recipe.data.ood_val],
        "trials": overview.counts(),
        "outside": sum(row.outside for row in overview.trials),
        "pruner": pruner_quality(pruner, overview.trials),
        "best": None if best is None else overview.data(best),
        "baselines": [overview.data(row) for row in overview.baselines],
        "soups": [overview.data(row) for row in overview.soups],
        "front": front,
        "expected": expected,
        "lines": [
            *front_lines(front),
            *constraint_lines(best),
            *failure_lines(overview.trials),
            *expected_lines(expected),
        ],
        "confirm": {state: fresh.count(state) for state in STATES} if fresh else None,
        **{
            state: [overview.data(row) for row in rows if overview.state(row) == state]
            for state in ("running", "stopped", "set_aside")
        },
        "search": {
            "running": overview.holder is not None,
            "holder": overview.holder,
            "stopping": overview.stopping,
            "at_a_time": overview.at_a_time[0] if overview.at_a_time else None,
            "limited_by": overview.at_a_time[1] if overview.at_a_time else None,
        },
        "ledger": ledger(overview.study_dir, log),
        "budget": budget(overview),
        "times": {
            "created": read_manifest(overview.study_dir).get("created"),
            "last_change": datetime.fromtimestamp(log.time).astimezone().isoformat(timespec="seconds"),
            "training_s": round(sum(seconds), 1),
            "mean_training_s": round(sum(seconds) / len(seconds), 1) if seconds else None,
        },
    }


def failure_lines(rows: Sequence[TrialRow]) -> list[str]:
    """Returns how many trials have failed, and how most of them did, as one line; nothing when none has."""
    reasons = Counter(row.reason or row.outcome for row in rows if row.outcome in FAILED)
    failed = counted(reasons.total(), "trial")
    return [f"{failed} failed; {count} of them: {reason}" for reason, count in reasons.most_common(1)]


def ledger(study_dir: Path, log: Log) -> dict[str, Any]:
    """Returns how often the test sets were read, and what is wrong with the ledger; then the number is None."""
    try:
        problems = check_ledger(study_dir, log)
        reads = None if problems else num_test_reads(study_dir, log)
    except CarftError as error:
        reads, problems = None, list(error.problems)
    return {"test_reads": reads, "problems": [str(problem) for problem in problems]}


def budget(overview: Overview) -> dict[str, Any]:
    """Returns the limits of the last search and what is used of them; ``ended`` says which one has ended it."""
    limits = overview.recipe.budget
    why = stopping(overview.log) if overview.holder is None else ""
    ended = why.removeprefix(BUDGET_STOP) if why.startswith(BUDGET_STOP) else ""
    held_s = overview.held_s
    used_s = None if held_s is None else round(held_s, 1)  # of the search that runs: each has the whole
    return {
        "wall_time_s": limits.wall_time,
        "wall_time_used_s": used_s,
        "gpu_hours": limits.gpu_hours,
        "gpu_hours_used": round(sum(row.gpu_s for row in overview.rows) / 3600, 4),
        "ended": ended,
    }


def listing(overview: Overview, by_objective: bool = True, limit: int | None = None) -> dict[str, Any]:
    """Returns what `ls` reports of a study, as JSON: baselines, and the trials that come first."""
    rows = best_first(overview.trials) if by_objective else overview.trials  # those without an objective come last
    return {
        "study": named(overview.study_dir),
        "num_trials": len(rows),
        "lines": constraint_lines(overview.best),
        "baselines": [overview.data(row) for row in overview.all_baselines],
        "soups": [overview.data(row) for row in overview.soups],
        "trials": [overview.data(row) for row in rows[:limit]],
    }


def list_studies(folder: Path) -> list[dict[str, Any]]:
    """Returns a line per study in a folder; one that cannot be read has its ``problem`` there.

    Raises:
        UsageError: There is no study in it.
    """
    found = studies_in(folder)
    if not found:
        require_study(folder, "must be a study, or a folder with studies in it")
    lines: list[dict[str, Any]] = []
    for path in found:
        try:
            overview = read_study(path)
        except CarftError as error:
            lines.append({"name": path.name, "study": str(path.resolve()), "problem": str(error)})
            continue
        best = overview.best
        lines.append(
            {
                "name": path.name,
                "study": named(overview.study_dir),
                "problem": None,
                "wanted": num_trials(overview.recipe),
                "trials": overview.counts(),
                "best_objective": None if best is None else best.objective,
                "running": overview.holder is not None,
            }
        )
    return lines


def pruner_quality(pruner: AnyPruner, rows: Sequence[TrialRow]) -> dict[str, Any] | None:
    """Returns what `status` and `search` report of a pruner, as JSON; None without one.

    Args:
        pruner: The recipe's.
        rows: The trials.

    Returns:
        ``name``, ``num_cut``, ``trials`` (complete ones with such values), ``rank_correlation`` (Spearman's, of the
        last intermediate value at which a training could have been cut with its final objective; None where it is not
        defined), ``lines``, and ``warning`` (None, or a sentence).
    """
    if pruner.name == "none":
        return None
    pairs = [
        (value, row.objective)
        for row in rows
        if row.outcome == "complete"
        and row.objective is not None
        and (value := deciding_value(pruner, row.intermediate_values)) is not None
    ]
    from carft_ray.results.statistics.intervals import rank_correlation  # loads SciPy

    correlation = rank_correlation([value for value, _ in pairs], [objective for _, objective in pairs])
    num_cut = sum(row.outcome == "pruned" for row in rows)
    shown = "not known yet" if correlation is None else f"{correlation:.2f}"
    line = (
        f"Pruner {pruner.name}: {counted(num_cut, 'trial')} cut; rank correlation of the last intermediate value "
        f"with the final objective: {shown} ({counted(len(pairs), 'complete trial')})."
    )
    warning = None
    if correlation is not None and correlation < WEAK and len(pairs) >= ENOUGH:
        warning = (
            f"the intermediate values of the pruner {pruner.name} hardly predict the result (rank correlation "
            f"{correlation:.2f}): it may have cut good trials. Set a later search.pruner.first or a larger "
            "evaluate.subset."
        )
    return {
        "name": pruner.name,
        "num_cut": num_cut,
        "trials": len(pairs),
        "rank_correlation": correlation,
        "warning": warning,
        "lines": [line],
    }


def front_data(recipe: Recipe, rows: Sequence[TrialRow]) -> dict[str, Any] | None:
    """Returns the front of a Pareto search as plain data; None where the search has one objective.

    Args:
        recipe: The study's.
        rows: Its trials, with their standing.

    Returns:
        ``rule`` (``best``, ``tolerance``, ``words``), ``num_trainings`` and ``num_points`` over which the front is,
        ``points`` by rising ID accuracy: ``name``, ``alpha``, ``id_accuracy``, ``ood_accuracy``, ``best``.
    """
    rule, best = front_rule(recipe.search), best_row(rows)
    if rule is None:
        return None
    complete = [row for row in rows if row.outcome == "complete"]
    return {
        "rule": {"best": rule.best, "tolerance": rule.tolerance, "words": rule.words},
        "num_trainings": len(complete),
        "num_points": len(points_of(complete)),
        "points": [
            {
                "name": point.name,
                "alpha": point.alpha,
                "id_accuracy": point.pair[0],
                "ood_accuracy": point.pair[1],
                "best": best is not None and (point.name, point.alpha) == (best.name, best.alpha),
            }
            for point in front_of(complete)
        ],
    }


def front_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Returns the front as lines of text, by rising ID accuracy; none without a front."""
    if found is None or not found["points"]:
        return []
    points, trainings = counted(found["num_points"], "point"), counted(found["num_trainings"], "training")
    count = f"{len(found['points'])} of {points} (alphas) of {trainings}"
    lines = [f"Front of ID and OOD accuracy: {count}; the best by the rule {found['rule']['words']}."]
    for point in found["points"]:
        pair = f"ID {100 * point['id_accuracy']:.1f} %, OOD {100 * point['ood_accuracy']:.1f} %"
        lines.append(f"    {point['name']} at alpha {point['alpha']:.2f}: {pair}{'  <- best' if point['best'] else ''}")
    return lines


def expected_data(study: Snapshot) -> dict[str, Any] | None:
    """Returns what the best values are expected to measure, as JSON; the best baseline, too, if more is expected of it.

    Returns:
        ``values``, a row for each of them, trials first: ``trials``, ``alpha``, ``objective``, ``ends`` (95 %
        interval), ``id_accuracy``, ``ood_accuracy``, ``measured`` (of each training, at that alpha), ``better``
        (baseline -> probability); ``next``: how many ``trainings`` more, and their ``gain``; ``stopped``: the
        ``search.stop_gain`` that has ended the search; ``has_curves``: whether alpha is chosen from all trainings;
        ``trainings``: how many this is about; ``spread`` and ``noise``: standard deviations of the objective between
        values, and between trainings of the same values. None before a trial is complete, and of a Pareto search.
    """
    found = study.expected
    if found is None:
        return None
    rivals = [each for each in found.by_name.values() if each.kind == "baseline"]
    highest = max((found.best, *rivals), key=lambda each: each.objective)  # of equal ones the trial's
    shown = [found.best] if highest is found.best else [found.best, highest]
    spread, noise = found.deviations
    limit, is_early = study.recipe.search.stop_gain, study.num_finished < num_trials(study.recipe)
    return {
        "values": [expected_row(each) for each in shown],
        "next": {"trainings": NEXT, "gain": found.gain},
        "stopped": limit if is_early and found.is_worth_less(limit) else None,
        "has_curves": found.has_curves or "alpha" in study.recipe.search.space,
        "trainings": len(found.by_name),
        "spread": spread,
        "noise": noise,
    }


def expected_row(each: Expected) -> dict[str, Any]:
    """Returns what values are expected to measure as JSON; see ``expected_data``."""
    return {
        "trials": list(each.names),
        "alpha": each.alpha,
        **{name: each.metrics.get(name) for name in ("objective", "id_accuracy", "ood_accuracy")},
        "ends": list(each.ends),
        "measured": list(each.measured),
        "better": dict(each.better),
    }


def expected_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Returns what is expected of the best values as lines of text; see ``expected_data``."""
    if not found:
        return []
    lines = []
    for index, each in enumerate(found["values"]):
        *others, last = (f"{100 * value:.1f}" for value in each["measured"])
        measured = f"{', '.join(others)} and {last}" if others else last
        line = f"{'Baseline' if index else 'Best'}: {each['trials'][0]}, expected "
        line += f"{in_points(each['objective'], each['ends'])} % with a new seed at alpha {each['alpha']:.2f} "
        line += f"(measured {measured})"
        if each["better"]:
            nearest = min(each["better"], key=lambda name: each["better"][name])
            line += f"; {100 * each['better'][nearest]:.0f} % likely better than {nearest}"
        lines.append(f"{line}.")
    if len(found["values"]) > 1:
        lines.insert(0, f"The baseline {found['values'][1]['trials'][0]} is expected to be better than every trial.")
    number, gain = found["next"]["trainings"], 100 * found["next"]["gain"]
    lines.append(f"{number} more trainings are worth about {gain:.1f} points of the expected objective.")
    if not found["has_curves"]:
        lines.append("Each training counts at its own alpha: the log has no alpha curve that all trials share.")
    if found["stopped"]:
        lines.append(f"The search ended early: this is less than search.stop_gain, {found['stopped']:g} points.")
    return lines


def placed(result: dict[str, Any], row: TrialRow | None) -> dict[str, Any]:
    """Returns the content of a training's ``result.json`` at the point of its curve at which its row stands."""
    if row is None or row.alpha == result.get("alpha"):
        return result
    return {**result, "alpha": row.alpha, "objective": row.objective, "metrics": dict(row.metrics)}
