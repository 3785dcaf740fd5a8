"""Repeats: tried values that a search trains again with the next seed. No Ray runs."""

import math
import random
from collections import Counter

import curve_stand_in
import pytest
from stand_in import make_recipe
from study_steps import failed, finish, run_all, run_search, searching, told

from carft_ray.recipe.space import num_trials
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study
from carft_ray.study.expected import expectation
from carft_ray.study.proposals.repeats import MOST, next_repeat
from carft_ray.study.rows import searched
from carft_ray.study.snapshot import snapshot
from carft_ray.study.training import TrialRow

GRID = {"kl_weight": {"choices": [0.1, 1, 10]}, "learning_rate": {"choices": [1e-4, 1e-3]}}
SAMPLERS = ["tpe", "gp", "nsga2", "qmc", "random"]


def luck(spec):
    """An objective that depends on values and seed alone."""
    values = {name: value for name, value in spec.values.items() if name != "seed"}
    mean = 0.5 - 0.05 * abs(math.log10(values.get("learning_rate", 1e-3)) + 3)
    return mean + 0.03 * random.Random(f"{sorted(values.items())} {spec.values.get('seed', 0)}").gauss(0, 1)


def recipe(trials=16, repeats=0.5, **search):
    return make_recipe(trials, repeats=repeats, **search)


def families(study_dir):
    """Trainings by the first of their values, baselines among them."""
    now = snapshot(study_dir)
    found = {}
    for row in [*now.baselines, *now.trials, *now.repeats]:
        found.setdefault(row.repeat_of or row.name, []).append(row)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_of_the_trials_are_repeats_with_the_next_seeds_whatever_proposes_values(tmp_path, sampler):
    run_search(tmp_path, recipe(sampler={"name": sampler}), luck)
    now = snapshot(tmp_path)
    rows = searched(now.trials, now.repeats)
    assert len(rows) == 16
    assert sum(bool(row.repeat_of) for row in rows) == 8
    assert not any(row.repeat_of for row in now.trials[:4])  # the sampler begins alone
    for first, *again in families(tmp_path).values():
        assert [row.values.get("seed", 0) for row in (first, *again)] == list(range(len(again) + 1))
        assert all({**row.values, "seed": 0} == {**first.values, "seed": 0} for row in again)
        assert 1 + len(again) <= MOST
    assert len({row.name for row in now.rows}) == len(now.rows)
    assert now.num_finished == 16


def test_the_share_rises_to_the_end_and_an_extension_follows_the_same_rule(tmp_path):
    run_search(tmp_path, recipe(16), luck)
    run_search(tmp_path, recipe(32), luck)
    now = snapshot(tmp_path)
    assert sum(bool(row.repeat_of) for row in (*now.trials, *now.repeats)) == 16
    first_new = [row for row in now.trials if not row.repeat_of]
    assert len(first_new) == 16


def test_values_that_may_be_the_best_are_repeated_most(tmp_path):
    run_search(tmp_path, recipe(40, repeats=0.6), lambda spec: luck(spec) - 0.2 * (spec.values["kl_weight"] > 1))
    counts = Counter()
    for first, *again in families(tmp_path).values():
        counts[first.values.get("kl_weight", 1) > 1] += len(again)
    assert counts[False] > 20 > counts[True]


def test_a_search_without_the_key_repeats_nothing(tmp_path):
    run_search(tmp_path, make_recipe(16), luck)
    assert not any(row.repeat_of for row in snapshot(tmp_path).rows)


def test_a_baseline_that_may_be_the_best_is_repeated_and_stays_one_baseline(tmp_path):
    run_search(tmp_path, recipe(24), lambda spec: luck(spec) + 0.3 * (spec.kind == "baseline"))
    now = snapshot(tmp_path)
    assert [row.name for row in now.baselines] == ["plain"]
    most = max(len(rows) for rows in families(tmp_path).values() if rows[0].kind == "trial")
    assert [row.name for row in now.repeats] == [f"plain-seed{k}" for k in range(1, len(now.repeats) + 1)]
    assert 1 < len(now.repeats) <= min(most, MOST - 1)
    assert len(now.trials) + len(now.repeats) == 24
    assert now.expected.by_name["plain"].names == ("plain", *(row.name for row in now.repeats))
    assert now.best.kind == "trial"
    run_search(tmp_path, recipe(24), luck)  # nothing is left
    assert len(snapshot(tmp_path).rows) == len(now.rows)


def test_the_grid_is_tried_first_and_repeats_come_on_top_of_it(tmp_path):
    grid = recipe(30, repeats=0.4, space=GRID, sampler={"name": "grid"})
    run_search(tmp_path, grid, luck)
    now = snapshot(tmp_path)
    assert num_trials(grid) == 10 == len(now.trials) + len(now.repeats)
    assert [bool(row.repeat_of) for row in now.trials[:6]] == [False] * 6
    assert all(row.repeat_of for row in now.trials[6:])


@pytest.mark.parametrize(
    ("values", "share", "number"), [([0.1, 1, 10], 0.8, 15), ([0.1, 0.2, 0.4, 0.8, 1, 2, 4, 8, 10], 0.55, 20)]
)
def test_the_grid_with_its_repeats_ends_where_it_is_said_to_end(tmp_path, values, share, number):
    grid = recipe(40, repeats=share, space={"kl_weight": {"choices": values}}, sampler={"name": "grid"}, baselines={})
    run_search(tmp_path, grid, luck)
    assert num_trials(grid) == len(snapshot(tmp_path).trials) == number


def test_given_points_come_first(tmp_path):
    points = [{"learning_rate": 1e-4 * (1 + n), "kl_weight": 1} for n in range(12)]
    run_search(tmp_path, recipe(16, enqueue=points), luck)
    rows = snapshot(tmp_path).trials
    assert [row.values["learning_rate"] for row in rows[:12]] == [point["learning_rate"] for point in points]
    assert all(row.repeat_of for row in rows[12:])


def test_eight_at_a_time_repeat_nothing_that_runs_and_no_values_too_often(tmp_path):
    order = random.Random(0)
    with searching(tmp_path, recipe(64, repeats=0.7)) as study:
        running = []
        while True:
            while len(running) < 8 and (spec := study.next()) is not None:
                running.append(spec)
            names = [study.journal.attribute(spec, "repeat_of") or spec.name for spec in running]
            assert len({*names}) == len(names)
            if not running:
                break
            spec = running.pop(order.randrange(len(running)))
            finish(study, spec, luck(spec))
    counts = {name: len(rows) for name, rows in families(tmp_path).items()}
    assert max(counts.values()) <= MOST
    assert sum(counts.values()) == 64 + 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_stops_anywhere_has_the_same_trials_in_the_end(tmp_path, sampler):
    wanted = recipe(14, sampler={"name": sampler})
    run_search(tmp_path / "whole", wanted, luck)
    stops = random.Random(1)
    for _ in range(40):
        with searching(tmp_path / "stopped", wanted) as study:
            for _ in range(stops.randrange(3)):
                if (spec := study.next()) is None:
                    break
                if stops.random() < 0.4:
                    break
                finish(study, spec, luck(spec))
    run_search(tmp_path / "stopped", wanted, luck)
    assert told(tmp_path / "stopped") == told(tmp_path / "whole")


def test_a_repeat_is_never_cut_and_failed_ones_count(tmp_path):
    pruned = recipe(24, pruner={"name": "median", "startup_trials": 1}, baselines={})
    with searching(tmp_path, pruned) as study:
        while (spec := study.next()) is not None:
            is_repeat = bool(study.journal.attribute(spec, "repeat_of"))
            line = {"step": 5, "epoch": 1, "num_steps": 10, "subset/objective": 0.1}
            assert not (is_repeat and study.report(spec, line))
            if is_repeat and spec.values["seed"] == 2:
                study.settle(spec, failed(spec, "diverged"))
            else:
                finish(study, spec, luck(spec))
    rows = snapshot(tmp_path).trials
    assert {row.outcome for row in rows if row.repeat_of} == {"complete", "diverged"}


def test_a_pareto_search_repeats_the_values_on_its_front(tmp_path):
    def more(spec):
        pair = {"id_accuracy": luck(spec), "ood_accuracy": 1 - luck(spec) * random.Random(spec.name).random()}
        point = {**pair, "objective": sum(pair.values()) / 2}
        return {"metrics": point, "curve": [{"alpha": at, **point} for at in (0.5, 1.0)], "alpha": 0.5}

    wanted = curve_stand_in.make_recipe(16, repeats=0.5)
    with searching(tmp_path, wanted) as study:
        while (spec := study.next()) is not None:
            if of := study.journal.attribute(spec, "repeat_of"):
                assert any(row.standing for row in study.rows() if of in (row.name, row.repeat_of))
            finish(study, spec, luck(spec), **more(spec))
    assert sum(bool(row.repeat_of) for row in snapshot(tmp_path).trials) >= 6


def test_a_changed_space_leaves_repeats_with_their_values(tmp_path):
    run_search(tmp_path, recipe(16), luck)
    before = families(tmp_path)
    space = {
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "kl_weight": {"low": 0.01, "high": 10, "log": True},
    }
    with searching(tmp_path, recipe(20, space=space), True) as study:
        run_all(study, luck)
    after = families(tmp_path)
    for name, rows in before.items():
        assert [row.values for row in after[name]][: len(rows)] == [row.values for row in rows]
    assert len(snapshot(tmp_path).trials) + len(snapshot(tmp_path).repeats) == 20


def test_what_failed_first_and_what_lies_outside_is_not_repeated():
    def row(number, outcome="complete", **more):
        values = {"learning_rate": 1e-3 * (1 + number), "kl_weight": 1.0}
        found = {"objective": 0.5 + 0.01 * number, "alpha": 1.0} if outcome == "complete" else {}
        return TrialRow("trial", number, f"t{number}", values, 1, outcome, **found, **more)

    rows = [row(0, "diverged"), row(1, "pruned"), row(2, "running"), row(3, outside=True), row(4), row(5, "error")]
    wanted = recipe(6, repeats=0.8)
    assert next_repeat(wanted, rows, [], expectation(wanted, rows, [])).first.name == "t4"
    assert next_repeat(wanted, rows[:4], [], expectation(wanted, rows[:4], [])) is None


def test_a_search_ends_when_more_trainings_are_worth_too_little_and_goes_on_with_another_limit(tmp_path):
    run_search(tmp_path, recipe(40, stop_gain=0.3), lambda spec: 0.5 + 0.3 * luck(spec))
    now = snapshot(tmp_path)
    assert 10 <= now.num_finished < 40
    assert now.expected.is_worth_less(0.3)
    [line] = [line for line in status(read_study(tmp_path))["lines"] if "stop_gain" in line]
    assert line == "The search ended early: this is less than search.stop_gain, 0.3 points."
    assert run_search(tmp_path, recipe(40, stop_gain=0.3), luck) == []
    run_search(tmp_path, recipe(40), luck)
    assert snapshot(tmp_path).num_finished == 40
