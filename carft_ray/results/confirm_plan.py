"""The stages of a confirm: which configurations are trained again, with which seeds, fixed before the first of them.

    confirm/plan.json     the winner and all rows of both stages

The best of N noisy objectives is too high, so it is measured again with fresh seeds, from a range that the search has
not used. ``alpha`` belongs to a configuration and is never chosen again.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from carft_ray import files
from carft_ray.errors import Problem, UsageError
from carft_ray.evaluation.alpha_curve import point_at
from carft_ray.layout import CONFIRM, CONFIRM_PLAN
from carft_ray.recipe.loading import apply
from carft_ray.recipe.schema.data import CACHE_KEYS
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.train import PENALTIES
from carft_ray.results.evidence import AT_ONE
from carft_ray.results.reading.study_view import Overview
from carft_ray.results.toward_start import delivered_at
from carft_ray.study import typed
from carft_ray.study.ledger import AGAINST, WINNER_FIXED, read_ledger, record
from carft_ray.study.place import named
from carft_ray.study.rows import ZERO_SHOT, best_first, require_finished
from carft_ray.study.snapshot import Snapshot
from carft_ray.study.study import Study
from carft_ray.study.training import TrialRow, require_name
from carft_ray.study.warm_start import num_test_reads, source_id
from carft_ray.words import counted, times

SEED_STEP = 10**6  # between the seeds of the search, of the first and of the second stage
Role = Literal["winner", "candidate", "baseline", "ablation"]
TRIALS = ("winner", "candidate")  # roles of trials of the search


@dataclass(frozen=True)
class PlanRow:
    """One configuration; rows that differ in alpha alone share their trainings.

    Attributes:
        name: For people; unique.
        role: The winner, another of the top, a baseline, or the winner without penalties.
        training: Name of its trainings less the seed; None: the zero-shot model.
        alpha: Its mixing coefficient.
        values: Over the recipe's ``train``, less seed and alpha. In a Pareto search with the alpha that was drawn: the
            training is evaluated there and on the whole grid, at every point of the front that it may get. With alpha
            None it is evaluated on the grid.
        objective: What the search expected of a new training, in a Pareto search what one training measured; 0 of an
            ablation, which has none.
        chosen_from: Number of trainings that it is the best of.
    """

    name: typed.Words
    role: Role
    training: typed.Words | None
    alpha: typed.Share
    values: dict[str, Any]
    objective: typed.Number
    chosen_from: typed.Count = 1


@dataclass(frozen=True)
class Stage:
    """A comparison: the rows and the seeds that all of them are trained with."""

    winner: typed.Words
    seeds: typed.Seeds
    rows: tuple[PlanRow, ...]

    def names(self, row: PlanRow) -> list[str]:
        """Returns the names of a row's trainings, seed by seed; none of the zero-shot model."""
        return [] if row.training is None else [training_name(row.training, seed) for seed in self.seeds]

    def baselines(self, recipe: Recipe) -> list[str]:
        """Returns the names of the baselines that there should be: those of the study's recipe, and the stage's own."""
        return [*recipe.search.baselines, *(row.name for row in self.rows if row.role == "baseline")]

    def trainings(self) -> dict[str, dict[str, Any]]:
        """Returns the values of every training by its name, winner first, then seed by seed."""
        found: dict[str, dict[str, Any]] = {}
        for seed in self.seeds:
            for row in self.rows:
                if row.training is not None:
                    # a row at alpha 1 needs no training of its own: alpha 1 is always measured
                    name = training_name(row.training, seed)
                    found.setdefault(name, {"alpha": row.alpha, **row.values, "seed": seed})
        return found


@dataclass(frozen=True)
class _Written:
    """The content of ``confirm/plan.json``."""

    first: Stage
    second: Stage | None


def training_name(training: str, seed: int) -> str:
    """Returns the name of one training with a fresh seed, and of its folder."""
    return f"{training}-seed{seed}"


def fresh_seeds(recipe: Recipe, stage: int, num_seeds: int) -> tuple[int, ...]:
    """Returns seeds from a range that neither the search nor another stage uses.

    Args:
        recipe: Its ``train.seed`` is the seed of the search.
        stage: 1, or 2 for the seeds after a choice among confirmed configurations.
        num_seeds: How many; the first of more are those of fewer.
    """
    return tuple((recipe.train.seed + stage * SEED_STEP + index) % 2**63 for index in range(1, num_seeds + 1))


def first_stage(
    view: Overview,
    top: int,
    num_seeds: int,
    against: Sequence[Overview] = (),
    known: Sequence[PlanRow] = (),
    ablation: bool = True,
) -> Stage:
    """Returns what is confirmed: the winner by the search's own rule, the next best, and every baseline.

    A trial that misses constraints by more than the winner does is no candidate. A baseline is there with its own
    alpha and at alpha 1. The winner of another study counts as one more baseline.

    Args:
        view: The study.
        top: Trials to confirm, the winner among them.
        num_seeds: Fresh seeds of each.
        against: Studies of the same model, data and objective, for instance of plain fine-tuning.
        known: Rows of an earlier call, whose names are taken.
        ablation: Train the winner without penalties, too, where it has some (``without_penalties``).

    Raises:
        NoSuccessfulTrialError: A study has no finished trial.
        UsageError: A study of ``against`` cannot be compared.
    """
    best = require_finished(view.study_dir, view.best)
    ranked = [row for row in best_first(view.trials) if row.objective is not None and not row.repeat_of]
    if best.order is None:
        ranked = [row for row in ranked if row.violation <= best.violation]
    else:
        ranked = [row for row in ranked if row.order is not None and row.order[:2] <= best.order[:2]]
    tried = view.num_finished
    rows = [_plan_row(view, row, "candidate" if index else "winner", tried) for index, row in enumerate(ranked[:top])]
    rows += without_penalties(view.recipe, rows[0]) if ablation else []
    for row in view.baselines:
        if row.objective is None:
            continue
        rows.append(_plan_row(view, row, "baseline", int(row.name != ZERO_SHOT)))
        at_one = point_at(view.result(row).get("curve") or (), 1.0)
        if row.name != ZERO_SHOT and rows[-1].alpha != 1 and at_one is not None:
            rows.append(replace(rows[-1], name=f"{row.name}{AT_ONE}", alpha=1.0, objective=at_one["objective"]))
    for other in against:
        rival = _rival(view, other, (*known, *rows))
        rows += [] if rival in rows else [rival]  # a study that is given twice is one
    return Stage(best.name, fresh_seeds(view.recipe, 1, num_seeds), tuple(rows))


def second_stage(first: Stage, chosen: str, recipe: Recipe) -> Stage:
    """Returns the comparison of the configuration that the first stage chose, on as many seeds that did not choose it.

    Args:
        first: The first stage.
        chosen: Name of one of its trials.
        recipe: The study's recipe.
    """
    more = len(first.seeds) * sum(row.role in TRIALS for row in first.rows)  # trainings that chose it, too
    rows = [replace(row, role="winner", chosen_from=row.chosen_from + more) for row in first.rows if row.name == chosen]
    if any(row.role == "ablation" for row in first.rows):
        rows += without_penalties(recipe, rows[0])
    rows += [row for row in first.rows if row.role == "baseline"]
    return Stage(chosen, fresh_seeds(recipe, 2, len(first.seeds)), tuple(rows))


def plan(
    view: Overview, top: int, num_seeds: int, against: Sequence[Overview] = (), ablation: bool = True
) -> tuple[Stage, list[str]]:
    """Returns the first stage with what this call asks for, and notes for the user.

    What an earlier call has asked for stays: rows are added and seeds appended. When the search has continued and found
    a better trial, that one is the winner now, and the earlier one a candidate. In a Pareto search a trial may now be
    at another point of its curve; the trainings that are there were evaluated at that point, too.

    Args:
        view: The study.
        top: As ``first_stage``.
        num_seeds: As ``first_stage``.
        against: As ``first_stage``.
        ablation: As ``first_stage``.
    """
    notes = [
        f"the test sets of {other.study_dir} were read {times(number)}; this also counts for this study"
        for other in against
        if (number := num_test_reads(other.study_dir, other.log))
    ]
    for other, key in itertools.product(against, ("alpha", "constraints", "warm_start")):
        if getattr(other.recipe.search, key) != getattr(view.recipe.search, key):
            notes.append(f"{named(other.study_dir)} was searched with another search.{key}")
    if ablation and view.recipe.train.function is not None:
        notes.append("no ablation: the fine-tuning is your own function, which carft-ray cannot run without penalties")
    stages = read_plan(view.study_dir)
    if stages is None:
        return first_stage(view, top, num_seeds, against, ablation=ablation), notes
    before = stages[0]
    first = first_stage(view, top, max(num_seeds, len(before.seeds)), against, before.rows, ablation)
    if num_seeds < len(before.seeds):
        notes.append(f"{len(before.seeds)} seeds already exist; all of them are used")
    if first.winner != before.winner:
        notes.append(
            f"the search continued after {before.winner} was fixed as the winner; the winner is now {first.winner}"
        )
    earlier = {row.name: row for row in before.rows}
    for row in first.rows:
        old = earlier.pop(row.name, row)
        if row.alpha != old.alpha:
            notes.append(f"the search continued: {row.name} was at alpha {old.alpha:.2f}, now it is at {row.alpha:.2f}")
    kept = [replace(row, role="candidate") if row.role == "winner" else row for row in earlier.values()]
    if kept:
        notes.append(f"also measured, from an earlier call: {', '.join(row.name for row in kept)}")
    return replace(first, rows=(*first.rows, *kept)), notes


def cost(study: Snapshot, stage: Stage) -> str:
    """Returns what training the rest of a stage takes, in a sentence."""
    done = {row.name for row in study.confirmations if row.outcome != "running"}
    missing = [name for name in stage.trainings() if name not in done]
    if not missing:
        return f"All {len(stage.trainings())} trainings with fresh seeds already exist."
    configurations = counted(len({row.training for row in stage.rows if row.training is not None}), "configuration")
    text = f"{configurations} x {len(stage.seeds)} fresh seeds: {counted(len(missing), 'training')} to run"
    rows = (*study.trials, *study.all_baselines)
    seconds = [row.elapsed_s for row in rows if row.elapsed_s and row.name != ZERO_SHOT]
    if seconds:
        text += f" of about {sum(seconds) / len(seconds):.0f} s each"
    return text + "."


def fix(
    study: Study, recipe: Recipe, first: Stage, second: Stage | None, against: Sequence[Overview] = ()
) -> dict[str, dict[str, Any]]:
    """Writes ledger and plan, before anything of it is trained.

    Args:
        study: The open study.
        recipe: Its recipe.
        first: The first stage.
        second: The second one, once the first one has chosen; it is trained then.
        against: As ``first_stage``; how often their test sets were read is written down, and counts here.

    Returns:
        Values of the stage's trainings by name.

    Raises:
        HoldOutError: The ledger is not as carft-ray has written it.
        StorageError: Something cannot be written.
    """
    stage, study_dir = second or first, study.study_dir
    details = {**json.loads(json.dumps(asdict(stage))), "chosen_by": "confirm" if second else "search"}
    if against:
        details[AGAINST] = {source_id(other.study_dir): num_test_reads(other.study_dir, other.log) for other in against}
    written = [entry.details for entry in read_ledger(study_dir, study.log) if entry.purpose == WINNER_FIXED]
    if details not in written[-2:]:  # the same command again, after a kill
        record(study_dir, study.log, recipe, WINNER_FIXED, ("id_val", *recipe.data.ood_val), details)
    write_plan(study_dir, first, second)
    return stage.trainings()


def write_plan(study_dir: Path, first: Stage, second: Stage | None) -> None:
    """Writes both stages; the second is None before there is one.

    Raises:
        StorageError: It cannot be written.
    """
    files.write_json(study_dir / CONFIRM / CONFIRM_PLAN, asdict(_Written(first, second)))


def read_plan(study_dir: Path) -> tuple[Stage, Stage | None] | None:
    """Returns the first and the second stage of a study's confirm, or None before there is one.

    Raises:
        StorageError: The plan is damaged, or names what no folder of a training may be called.
    """
    path = study_dir / CONFIRM / CONFIRM_PLAN
    if not files.exists(path):
        return None
    written = typed.made(_Written, files.read_json(study_dir, f"{CONFIRM}/{CONFIRM_PLAN}"), str(path))
    for stage in filter(None, (written.first, written.second)):
        for name in stage.trainings():
            require_name(name, str(path))
        if len({*stage.seeds}) < len(stage.seeds):
            raise typed.wrong(str(path), "seeds must differ", list(stage.seeds))
        if not any(row.role == "winner" for row in stage.rows):
            raise typed.wrong(str(path), "one of the rows must be the winner", None)
    return written.first, written.second


def last_stage(study_dir: Path) -> Stage | None:
    """Returns the comparison that counts, or None before there is one."""
    plan = read_plan(study_dir)
    return plan and (plan[1] or plan[0])


def options_to_go_on(
    first: Stage, second: Stage | None, recipe: Recipe, rows: Sequence[TrialRow], best: str
) -> str | None:
    """Returns the options of ``confirm`` that go on with a comparison; None where each trial has failed with some seed.

    Args:
        first: The first stage.
        second: The second one, if the first one has chosen.
        recipe: The study's recipe.
        rows: All trainings with fresh seeds.
        best: Name of the trial that is the best one now: with another one than the comparison's, it begins anew.
    """
    last = second or first
    whole = {row.role for row, _ in whole_rows(last, rows)}
    is_same = first.winner == best
    has_ended = {row.name for row in rows if row.outcome != "running"} >= last.trainings().keys()
    has_failed = is_same and has_ended and "winner" not in whole
    if has_failed and "candidate" not in whole:
        if second is None or all(row.role != "winner" for row, _ in whole_rows(first, rows)):
            return None
        second, has_failed = None, False  # the search's own winner has all its seeds
    words = f"--top {sum(row.role in TRIALS for row in first.rows)} --seeds {len(first.seeds)}"
    words += " --winner confirmed" if has_failed or (is_same and second is not None) else ""
    has_ablation = any(row.role == "ablation" for row in first.rows)
    return words + ("" if has_ablation or not without_penalties(recipe, first.rows[0]) else " --no-ablation")


def whole_rows(stage: Stage, trainings: Sequence[TrialRow]) -> list[tuple[PlanRow, list[TrialRow]]]:
    """Returns the rows of which all trainings are complete, with these by seed; the zero-shot model needs none.

    Args:
        stage: The comparison.
        trainings: With fresh seeds, of the study.
    """
    complete = {row.name: row for row in trainings if row.outcome == "complete"}
    rows = [(row, stage.names(row)) for row in stage.rows]
    return [(row, [complete[name] for name in names]) for row, names in rows if all(name in complete for name in names)]


def without_penalties(recipe: Recipe, winner: PlanRow) -> list[PlanRow]:
    """Returns a row that differs from the winner in its penalties alone, all 0: what they contribute.

    None where the winner has no penalties, or its trainings are the user's own.
    """
    train = apply(recipe, {name: value for name, value in winner.values.items() if name != "alpha"}).train
    weights = {name: 0 for name in PENALTIES if getattr(train, name)}
    if not weights or train.function is not None:
        return []
    # where the winner's alpha is on the grid, the whole curve is measured: its own alpha may be any on it. A Pareto
    # search's training measures the grid besides its own alpha in any case, and its point of the front may change
    is_free = winner.alpha in recipe.search.alpha.measured and "alpha" not in winner.values
    free = {"alpha": None} if is_free else {}
    row = replace(winner, name=f"{winner.name}, no penalties", role="ablation", values=winner.values | weights | free)
    return [replace(row, training=f"{winner.training}-no-penalties", objective=0.0, chosen_from=1)]


def _plan_row(study: Snapshot, row: TrialRow, role: Role, chosen_from: int) -> PlanRow:
    """Returns the values of a training of a study, at the alpha at which they are delivered."""
    alpha = delivered_at(study, study.trainings_of(row))
    training = None if row.name == ZERO_SHOT else row.name
    left_out = ("seed",) if row.standing else ("alpha", "seed")
    values = {name: value for name, value in row.values.items() if name not in left_out}
    objective = row.objective if row.expected is None else row.expected
    if alpha != (row.alpha or 0.0) and (point := point_at(row.points, alpha)):
        objective = point["objective"]
    return PlanRow(row.name, role, training, alpha, values, objective or 0.0, chosen_from)


def _rival(view: Overview, other: Overview, rows: Sequence[PlanRow]) -> PlanRow:
    """Returns the winner of another study as a baseline of this one, with a name that none of the rows has."""
    place = f"--against {named(other.study_dir)}"
    if other.study_dir == view.study_dir:
        raise UsageError(Problem(place, "must be another study", "this one"))
    mine, theirs = _shared(view.recipe), _shared(other.recipe)
    if differing := [key for key in mine if mine[key] != theirs[key]]:
        step = "Search both with recipes that differ only in train and search.space."
        rule = f"must be a study like {view.study_dir.name}, except for train and search.space"
        raise UsageError(Problem(place, rule, f"another {', '.join(differing)}", next_step=step))
    best = require_finished(other.study_dir, other.best)
    here, there = (each.recipe.train.model_dump(mode="json", exclude={"alpha"}) for each in (view, other))
    left_out = ("seed",) if best.standing else ("alpha", "seed")
    values = {**{key: value for key, value in there.items() if value != here[key]}, **best.values}
    values = {key: value for key, value in values.items() if key not in left_out}
    if best.standing:
        values["alpha"] = best.alpha  # of its point of the front: it may be on a grid that this study has not
    name = f"{other.study_dir.name} {best.name}"
    training = "other-" + re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-144:]
    row = replace(_plan_row(other, best, "baseline", other.num_finished), values=values, name=name, training=training)
    if any(each.name == name and each.values != row.values for each in rows):  # of a folder with the same name
        number = source_id(other.study_dir)
        row = replace(row, name=f"{name} {number}", training=f"{training}-{number}")
    return row


def _shared(recipe: Recipe) -> dict[str, Any]:
    """Returns what two studies must have in common, or their numbers are not of one comparison."""
    return {
        "model": recipe.model,
        "data": recipe.data.model_dump(exclude={*CACHE_KEYS}),
        "prompts": recipe.prompts,
        "search.objective": recipe.search.objective,
    }
