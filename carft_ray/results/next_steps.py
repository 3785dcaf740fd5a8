"""What to run next on a study, by its state: no command that it would refuse, and none that is done."""

import contextlib
import shlex
from pathlib import Path

from carft_ray import files
from carft_ray.errors import CarftError, StorageError
from carft_ray.layout import CONFIRM, RESOLVED, SUMMARY, TEST_DIR
from carft_ray.recipe.loading import trust_word
from carft_ray.recipe.space import num_trials
from carft_ray.results.confirm.configurations import read_plan
from carft_ray.results.reading.status_and_ls import budget, ledger
from carft_ray.results.reading.study_view import Overview
from carft_ray.study.ledger import Entry, needs_reason, read_ledger, reads_of
from carft_ray.study.place import Place
from carft_ray.study.rows import ZERO_SHOT
from carft_ray.study.warm_start import inherited_reads

AGAIN = " --again REASON"
BEHIND = (
    "The best trial scores below the zero-shot model: there is nothing to export. Search milder trainings, with a "
    "lower learning_rate, fewer epochs or a higher kl_weight."
)


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
        steps = _at_rest(view, study, read_ledger(view.study_dir, view.log))
    return [f"carft-ray {step}" for step in steps if step.split()[0] != after]


def behind_zero_shot(view: Overview) -> bool:
    """Returns whether the best trial measures worse than the zero-shot model: on test, else with fresh seeds, else as
    the search has measured both. A winner that a confirm has chosen counts for it.
    """
    from carft_ray.results.stored import read_compared  # loads pyarrow

    with contextlib.suppress(CarftError, KeyError, TypeError):  # damaged files are reported by other commands
        for step in (TEST_DIR, CONFIRM):
            found = read_compared(view.study_dir, step) or {"rows": []}
            means = {row["name"]: row["objective"]["mean"] for row in found["rows"]}
            best = found["winner"] if found.get("chosen_by") == "confirm" else view.best and view.best.name
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
    rows = [*view.trials, *view.baselines]
    finished = len(view.trials) >= wanted and all(row.outcome != "running" for row in rows)
    steps, trust = [], trust_word(view.recipe)
    if not finished:
        again = AGAIN if needs_reason(entries, view.trials, view.baselines, wanted) else ""
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
    search = view.recipe.search.model_copy(update={"trials": wanted + num_more})
    has_more = num_trials(view.recipe.model_copy(update={"search": search})) > wanted
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
        top = sum(row.role != "baseline" for row in first.rows)
        twice = " --winner confirmed" if second is not None and first.winner == best else ""
        complete = {row.name for row in view.confirmations if row.outcome == "complete"}
        whole = {row.role for row in last.rows if complete >= {*last.names(row)}}
        if done and first.winner == best and "winner" not in whole:  # it has failed
            if "candidate" not in whole:
                return []
            twice = " --winner confirmed"
        return [f"confirm {folder} --top {top} --seeds {len(first.seeds)}{twice}{trust}"]
    if view.recipe.data.id_test is None:
        return []
    if not reads:
        again = AGAIN if inherited_reads(view.study_dir) else ""
        return [f"test {folder}{again}    # opens the test sets; each read is recorded"]
    if not (view.study_dir / TEST_DIR / f"read-{len(reads)}" / SUMMARY).exists():  # it was killed, and continues
        return [f"test {folder}"]
    return []
