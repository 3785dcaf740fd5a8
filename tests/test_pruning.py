"""Pruning: the rules against Optuna's own, values that count, cuts that survive kills, recipes that cannot cut."""

import json

import curve_stand_in
import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from pydantic import TypeAdapter
from stand_in import make_recipe
from study_steps import finish, optuna_study, searching

from carft_ray import files
from carft_ray.data.role_checks import check_sets
from carft_ray.errors import NoSuccessfulTrialError
from carft_ray.launch.cluster.ray_errors import no_successful_trial
from carft_ray.recipe.schedule import has_intermediate_value, percent, rungs
from carft_ray.recipe.schema.search import Pruner
from carft_ray.results.reading.status_and_ls import pruner_quality, status
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.proposals.pruning import PrunerTrial, cut_reason, deciding_value, intermediate_value
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import Failure, TrialRow
from carft_ray.training.run import live_alphas

HALVING = {"name": "successive_halving"}
EPOCHS = 6


def pruner_of(**keys):
    return TypeAdapter(Pruner).validate_python(keys)


def optuna_pruner(part):
    """The recipe's pruner as Optuna has it."""
    first = round(100 * part.first)
    pruners = optuna.pruners
    if part.name == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=part.factor)
    share = 50.0 if part.name == "median" else part.percentile
    return pruners.PercentilePruner(share, n_startup_trials=part.startup_trials)


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "successive_halving"},
        {"name": "successive_halving", "first": 0.1, "factor": 3},
        {"name": "median", "startup_trials": 3},
        {"name": "percentile", "percentile": 70.0, "startup_trials": 1},
    ],
    ids=str,
)
def test_a_training_is_cut_where_optuna_s_own_pruner_cuts_it(keys):
    """40 trials of 20 epochs, three at a time, values at random."""
    part, rng = pruner_of(**keys), np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", pruner=optuna_pruner(part), study_name="search")
    values_by, complete, live, verdicts = {}, set(), {}, []
    for _ in range(3000):
        if len(live) < 3 and len(values_by) < 40:
            trial = study.ask()
            values_by[trial.number], live[trial.number] = {}, (trial, 0, rng.normal())
        if not live:
            break
        number = int(rng.choice(list(live)))
        trial, epoch, quality = live[number]
        step, value = percent(epoch + 1, 20), quality + epoch / 10 + rng.normal()
        live[number] = (trial, epoch + 1, quality)
        if step < round(100 * part.first):
            continue
        values_by[number][step] = value
        known = {n: PrunerTrial(found, n in complete) for n, found in values_by.items()}
        mine = known.pop(number)
        reason = cut_reason(part, mine.intermediate_values, list(known.values()))
        trial.report(value, step)
        expected = step < 100 and trial.should_prune()
        assert (reason is not None) == expected, (number, step, reason)
        verdicts.append(reason)
        if reason or step == 100:
            study.tell(number, None if reason else value, TrialState.PRUNED if reason else TrialState.COMPLETE)
            complete |= set() if reason else {number}
            del live[number]
    assert len(values_by) == 40
    assert sum(reason is not None for reason in verdicts) > 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (33, 66)),
        ({"factor": 3}, (33,)),
        ({"first": 0.1, "factor": 3}, (10, 30, 90)),
        ({"first": 0.25}, (25, 50)),
        ({"first": 0.999}, ()),
    ],
)
def test_rungs_end_before_the_training_does_which_is_evaluated_there_even_if_nowhere_else(keys, expected):
    part = pruner_of(**HALVING, **keys)
    assert rungs(part) == expected
    shares = [part.first * part.factor**k for k in range(len(expected))]
    for epochs in (3, 10, 17, 40):
        for every in (0, 2):
            at = {epoch for epoch in range(1, epochs + 1) if has_intermediate_value(every, part, epoch, epochs)}
            often = set(range(2, epochs + 1, 2)) if every else set()
            assert at == {int(np.ceil(share * epochs - 1e-9)) for share in shares} | often


@pytest.mark.parametrize(("lowest", "fixed", "alphas"), [(0.2, None, 4), (0.6, None, 2), (1.0, None, 1), (0.2, 0.4, 1)])
def test_a_running_training_is_measured_only_at_alphas_that_it_may_choose(lowest, fixed, alphas):
    recipe = make_recipe(4, alpha={"lowest": lowest})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"alpha": fixed})})
    found = live_alphas(recipe)
    assert len(found) == alphas
    assert found[-1] == fixed if fixed else min(found) >= lowest


def test_an_intermediate_value_counts_from_first_on_and_after_the_warm_up():
    recipe = make_recipe(4, epochs=10, pruner=HALVING)

    def at(epoch, values=None, **row):
        line = {"epoch": epoch, "step": 10 * epoch, "num_steps": 100, "subset/objective": 0.5, **row}
        return intermediate_value(recipe, values or {}, line)

    assert at(3) is None
    assert at(4) == (40, 0.5)
    assert at(4, {"epochs": 20}) is None
    assert at(4, {"warmup_steps": 41}) is None
    assert at(4, {"warmup_steps": 40}) == (40, 0.5)
    assert intermediate_value(recipe, {}, {"epoch": 4, "step": 40, "num_steps": 100}) is None


def row(epoch, value, epochs=EPOCHS):
    return {"epoch": epoch, "step": epoch, "num_steps": epochs, "subset/objective": value}


RECIPE = make_recipe(6, epochs=EPOCHS, baselines={}, pruner=HALVING)


def test_a_cut_training_is_told_pruned_with_its_values_and_loses_its_weights(study_dir):
    with searching(study_dir, RECIPE) as study:
        first, second = study.next(), study.next()
        assert study.report(first, row(2, 0.6)) is None
        reason = study.report(second, row(2, 0.5))
        assert reason == "cut at 33 %: 50.0 % was not among the best half of 2 trials"
        assert study.report(second, row(4, 0.9)) is None  # it has not got the order yet
        (second.place(study_dir) / "step-00000010").mkdir(parents=True)
        told = study.settle(second)
        assert (second.folder(study_dir) / "log.txt").read_text().endswith(f" attempt 1: {reason}\n")
        assert (told.outcome, told.reason, told.objective) == ("pruned", reason, None)
        assert not second.place(study_dir).exists()
        assert finish(study, first).outcome == "complete"
        assert not study.done()
    trial = optuna_study(study_dir).trials[1]
    assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"trained": -1.0})
    assert trial.intermediate_values == {33: 0.5}
    view = read_study(study_dir)
    assert {name: count for name, count in view.counts().items() if count} == {"complete": 1, "pruned": 1}
    assert view.num_finished == 2


def test_a_result_wins_over_a_cut_and_a_cut_over_what_its_process_left(study_dir):
    with searching(study_dir, RECIPE) as study:
        first, second, third = study.next(), study.next(), study.next()
        study.report(first, row(2, 0.6))
        assert study.report(second, row(2, 0.5))
        told = finish(study, second)
        assert (told.outcome, told.reason) == ("complete", "")
        assert study.report(third, row(2, 0.4))
        assert study.settle(third, Failure("error", "worker gone", third.attempt)).outcome == "pruned"


def test_the_last_step_is_never_a_reason_to_cut_and_values_of_a_finished_training_are_noted(study_dir):
    with searching(study_dir, RECIPE) as study:
        for value in (0.6, 0.1):
            spec = study.next()
            text = "".join(json.dumps(row(epoch, value)) + "\n" for epoch in range(1, EPOCHS + 1))
            files.write_bytes(spec.place(study_dir) / "rows.jsonl", text.encode())  # faster than the driver reads
            assert finish(study, spec).outcome == "complete"
    found = status(read_study(study_dir))["pruner"]
    assert (found["name"], found["num_cut"]) == ("successive_halving", 0)
    for found, value in zip(snapshot(study_dir).trials, (0.6, 0.1), strict=True):
        assert found.intermediate_values == dict.fromkeys((33, 50, 67, 83, 100), value)


@pytest.mark.slow
def test_values_of_a_trial_with_two_objectives_are_kept_and_cut_it(study_dir):
    recipe = curve_stand_in.make_recipe(6, pruner=HALVING, baselines={})
    assert recipe.train.epochs == 2
    half = {"epoch": 1, "step": 1, "num_steps": 2}
    for value, is_cut in ((0.6, False), (0.5, True), (0.55, True)):
        with searching(study_dir, recipe) as study:
            specs = [study.next(), study.next()]
            new = specs[0] if not is_cut else specs[1]
            assert bool(study.report(new, {**half, "subset/objective": value})) == is_cut
            assert not is_cut or study.settle(new).outcome == "pruned"
    assert [found.intermediate_values for found in snapshot(study_dir).trials][:3] == [{50: 0.6}, {50: 0.5}, {50: 0.55}]


def test_a_search_in_which_all_were_cut_says_so():
    rows = [TrialRow("trial", n, f"t{n}", {}, 1, "pruned", reason="cut at 50 %") for n in range(3)]
    error = no_successful_trial(None, rows)
    assert isinstance(error, NoSuccessfulTrialError)
    assert "the pruner has cut all 3" in str(error)


def complete(number, value, objective):
    """The row of a trial with a value at each rung and at its end."""
    values = {33: 0.0, 67: value, 83: 0.4, 100: 0.5}
    return TrialRow("trial", number, f"t{number}", {}, 1, "complete", objective=objective, intermediate_values=values)


def test_the_rank_correlation_of_the_last_rung_with_the_end_is_told_and_a_weak_one_warned_of():
    part = pruner_of(**HALVING)
    good = [complete(n, 0.1 * n, 0.2 + 0.01 * n) for n in range(10)]
    found = pruner_quality(part, good)
    assert (found["trials"], found["warning"]) == (10, None)
    assert found["rank_correlation"] == pytest.approx(1.0)
    pruned = TrialRow("trial", 10, "t10", {}, 1, "pruned", intermediate_values={33: 0.0})
    assert pruner_quality(part, [*good, pruned])["trials"] == 10
    bad = [complete(n, 0.1 * n, 0.2 - 0.01 * n) for n in range(10)]
    assert "hardly predict" in pruner_quality(part, bad)["warning"]
    assert pruner_quality(part, bad[:9])["warning"] is None
    assert pruner_quality(part, [])["rank_correlation"] is None
    assert "1 trial cut" in pruner_quality(part, [*good, pruned])["lines"][0]
    assert deciding_value(pruner_of(name="median"), good[1].intermediate_values) == 0.4  # the last before the end
    assert deciding_value(part, {33: 0.1}) is None


def test_a_warm_up_that_covers_all_values_is_refused():
    for warmup, places in ((None, []), (5, []), (9, ["train.warmup_steps"])):  # 64 images, values after 3 and 6 epochs
        train = {"batch_size": 64, "warmup_steps": warmup}
        recipe = make_recipe(4, epochs=9, pruner=HALVING, evaluate={"every_epochs": 0}, train=train)
        assert [problem.place for problem in check_sets(recipe)] == places
