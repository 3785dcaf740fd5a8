"""What `status` and `ls` report of a study, as JSON documents."""

import contextlib
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.errors import CarftError
from carft_ray.layout import JOURNAL, MANIFEST, STOP
from carft_ray.recipe.spaces.grid import num_trials
from carft_ray.results.pareto import front_data, front_lines
from carft_ray.results.reading.overview import (
    STATES,
    Overview,
    read_study,
    require_study,
    search_began,
    studies_in,
)
from carft_ray.study.best import constraint_lines
from carft_ray.study.ledger import check_ledger, read_ledger, reads_of
from carft_ray.study.lock import BUDGET_STOP
from carft_ray.study.outcome import TrialRow
from carft_ray.study.proposals.warm_start import inherited_reads
from carft_ray.study.rows import ZERO_SHOT, best_first
from carft_ray.words import counted


def status(overview: Overview) -> dict[str, Any]:
    """Returns what `status` reports, as JSON."""
    best, rows, front = overview.best, overview.rows, front_data(overview.recipe, overview.trials)
    fresh = [overview.state(row) for row in overview.confirmations]
    seconds = [row.elapsed_s for row in rows if row.elapsed_s is not None and row.name != ZERO_SHOT]
    changed, pruner = (overview.study_dir / JOURNAL).stat().st_mtime, overview.recipe.search.pruner
    manifest = overview.study_dir / MANIFEST
    quality = None
    if pruner.name != "none":
        from carft_ray.results.statistics.pruner_quality import pruner_quality  # loads SciPy

        quality = pruner_quality(pruner, overview.trials)
    return {
        "study": str(overview.study_dir),
        "name": overview.recipe.name,
        "wanted": num_trials(overview.recipe),
        "finished": overview.num_finished,
        "selected_on": ["id_val", *overview.recipe.data.ood_val],
        "trials": overview.counts(),
        "outside": sum(row.outside for row in overview.trials),
        "pruner": quality,
        "best": None if best is None else overview.data(best),
        "baselines": [overview.data(row) for row in overview.baselines],
        "front": front,
        "lines": [*front_lines(front), *constraint_lines(best), *_failure_lines(overview.trials)],
        "confirm": {state: fresh.count(state) for state in STATES} if fresh else None,
        **{
            state: [overview.data(row) for row in rows if overview.state(row) == state]
            for state in ("running", "stopped", "set_aside")
        },
        "search": {"running": overview.holder is not None, "holder": overview.holder, "stopping": overview.stopping},
        "ledger": ledger(overview.study_dir),
        "budget": budget(overview),
        "times": {
            "created": files.read_json(manifest).get("created") if manifest.exists() else None,
            "last_change": datetime.fromtimestamp(changed).astimezone().isoformat(timespec="seconds"),
            "training_s": round(sum(seconds), 1),
            "mean_training_s": round(sum(seconds) / len(seconds), 1) if seconds else None,
        },
    }


def _failure_lines(rows: list[TrialRow]) -> list[str]:
    """Returns how most of the trials that ended with an error did so, as one line; nothing when none did."""
    reasons = Counter(row.reason for row in rows if row.outcome == "error")
    return [f"{count} of {counted(reasons.total(), 'error')}: {reason}" for reason, count in reasons.most_common(1)]


def ledger(study_dir: Path) -> dict[str, Any]:
    """Returns how often the test sets were read, and what is wrong with the ledger; then the number is None."""
    try:
        problems = check_ledger(study_dir)
        reads = None if problems else len(reads_of(read_ledger(study_dir))) + inherited_reads(study_dir)
    except CarftError as error:
        reads, problems = None, list(error.problems)
    return {"test_reads": reads, "problems": [str(problem) for problem in problems]}


def budget(overview: Overview) -> dict[str, Any]:
    """Returns the limits of the last search and what is used of them; ``ended`` says which one has ended it."""
    limits, folder = overview.recipe.budget, overview.study_dir
    ended = ""
    if overview.holder is None:
        with contextlib.suppress(OSError):
            text = (folder / STOP).read_text().strip()
            ended = text.removeprefix(BUDGET_STOP) if text.startswith(BUDGET_STOP) else ""
    began = search_began(folder) if overview.holder is not None else None
    used_s = None if began is None else round(time.time() - began, 1)  # of the search that runs: each has the whole
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
        "study": str(overview.study_dir),
        "num_trials": len(rows),
        "lines": constraint_lines(overview.best),
        "baselines": [overview.data(row) for row in overview.baselines],
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
                "study": str(overview.study_dir),
                "problem": None,
                "wanted": num_trials(overview.recipe),
                "trials": overview.counts(),
                "best_objective": None if best is None else best.objective,
                "running": overview.holder is not None,
            }
        )
    return lines
