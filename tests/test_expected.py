"""What tried values are expected to measure: one alpha for each, luck of a training, failures, any search space."""

import math

import numpy as np
import pytest
import stand_in

from carft_ray.study.expected import CLIP, expectation
from carft_ray.study.training import TrialRow

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUMBER = {"low": 0.0, "high": 1.0}


def row(number, values, curve, outcome="complete", kind="trial", name=None, **more):
    """A training that measured an objective at each alpha, or at its own alone; accuracies are equal to it."""
    if isinstance(curve, float):
        points, own = (), {"alpha": 0.5, "objective": curve}
    else:
        points = tuple({"alpha": at, "objective": y, "id_accuracy": y} for at, y in zip(ALPHAS, curve, strict=True))
        own = {"alpha": (best := max(points, key=lambda point: point["objective"]))["alpha"]}
        own["objective"] = best["objective"]
    found = {} if outcome != "complete" else {**own, "metrics": {"id_accuracy": own["objective"]}, "points": points}
    return TrialRow(kind, number, name or f"t{number}", values, 1, outcome, **found, **more)


def frozen(objective=0.5):
    return TrialRow("baseline", 0, "zero_shot", {}, 1, "complete", objective=objective, alpha=0.0)


def recipe(space=None, **search):
    return stand_in.make_recipe(**({"space": space or {"kl_weight": NUMBER}} | search))


def curve(height, top=0.5):
    return [0.5 + height * (1 - (at - top) ** 2) for at in ALPHAS]


def test_trainings_of_equal_values_have_one_alpha_where_their_mean_is_highest():
    values = [{"kl_weight": 0.3}, {"kl_weight": 0.3, "seed": 7}, {"kl_weight": 0.9}]
    rows = [row(0, values[0], curve(0.1, 0.25)), row(1, values[1], curve(0.1, 0.75)), row(2, values[2], curve(0.0))]
    found = expectation(recipe(), rows, [frozen()])
    both = found.by_name["t0"]
    assert both is found.by_name["t1"] is found.best
    assert both.names == ("t0", "t1")
    assert both.alpha == 0.5
    assert both.measured == pytest.approx([0.5 + 0.1 * (1 - 0.25**2)] * 2)
    assert both.ends[0] < both.objective < both.ends[1]


def test_one_lucky_training_is_not_the_best_where_others_say_that_it_was_luck():
    rows = [row(0, {"kl_weight": 0.2}, curve(0.08)), row(1, {"kl_weight": 0.2, "seed": 1}, curve(-0.04))]
    rows += [row(2, {"kl_weight": 0.2, "seed": 2}, curve(-0.04))]
    rows += [row(3 + n, {"kl_weight": 0.8, "seed": n}, curve(0.05 + 0.001 * n)) for n in range(3)]
    found = expectation(recipe(), rows, [frozen()])
    assert max(rows, key=lambda each: each.objective).name == "t0"
    assert found.best.names == ("t3", "t4", "t5")
    assert found.by_name["t0"].objective < rows[0].objective


def test_failed_trainings_count_as_the_frozen_model_and_values_that_mostly_fail_are_not_the_best():
    good, other = {"kl_weight": 0.2}, {"kl_weight": 0.7}
    rows = [row(0, good, curve(0.2)), row(1, other, curve(0.02))]
    alone = expectation(recipe(), rows, [frozen()])
    assert alone.best.names == ("t0",)
    rows.append(row(2, {**good, "seed": 1}, curve(0), "diverged"))
    failed = expectation(recipe(), rows, [frozen()])
    assert failed.by_name["t0"].objective < alone.by_name["t0"].objective
    assert failed.by_name["t0"].names == ("t0",)
    assert failed.best.names == ("t1",)  # of the other values half have failed
    pruned = [*rows[:2], row(2, {**good, "seed": 1}, curve(0), "pruned")]
    assert expectation(recipe(), pruned, [frozen()]).best == alone.best


def test_a_fall_far_below_the_frozen_model_says_no_more_than_a_small_one():
    rows = [[row(0, {"kl_weight": 0.2}, curve(0.1)), row(1, {"kl_weight": 0.8}, curve(low))] for low in (-0.1, -0.4)]
    one, other = (expectation(recipe(), each, [frozen()]) for each in rows)
    assert (one.best.objective, one.best.ends) == (other.best.objective, other.best.ends)
    assert one.by_name["t1"].objective == pytest.approx(other.by_name["t1"].objective)
    assert one.by_name["t1"].objective > 0.5 - CLIP - 1e-9


@pytest.mark.parametrize("drawn", [False, True])
def test_where_trainings_have_no_common_curve_each_counts_at_its_own_alpha(drawn):
    space = {"kl_weight": NUMBER, **({"alpha": NUMBER} if drawn else {})}
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.01 + 0.01 * n) if drawn else 0.5 + 0.01 * n) for n in range(4)]
    if drawn:
        rows = [TrialRow(**{**vars(each), "values": {**each.values, "alpha": 0.5}}) for each in rows]
    else:
        rows[0] = row(0, {"kl_weight": 0.1}, curve(0.01))  # of a release that kept curves
    found = expectation(recipe(space), rows, [frozen()])
    assert {each.alpha for each in found.by_name.values()} == {0.5}
    assert not found.has_curves
    assert found.best.measured == (rows[3].objective,)


def test_an_alpha_below_the_lowest_that_may_be_chosen_is_not_expected_to_be_best():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.1, 0.0)) for n in range(3)]
    assert expectation(recipe(), rows, [frozen()]).best.alpha == 0.25
    assert expectation(recipe(), rows, [frozen()]).has_curves
    lowest = recipe(alpha={"lowest": 0.4})
    assert expectation(lowest, rows, [frozen()]).best.alpha == 0.5


def test_the_best_values_meet_the_constraints_first():
    rows = []
    for number, (height, missed) in enumerate([(0.1, 0.05), (0.02, -0.01)]):
        each = row(number, {"kl_weight": 0.2 + number / 2}, curve(height))
        name = "violation/id_drop/zero_shot"
        points = tuple({**point, name: missed} for point in each.points)
        rows.append(TrialRow(**{**vars(each), "points": points, "metrics": {**each.metrics, name: missed}}))
    found = expectation(recipe(), rows, [frozen()])
    assert found.best.names == ("t1",)
    assert found.by_name["t0"].objective > found.by_name["t1"].objective


def test_a_baseline_has_its_own_values_and_the_probability_of_being_worse():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.1)) for n in range(4)]
    low, high = (row(1, {"kl_weight": 0}, curve(h), kind="baseline", name=n) for n, h in (("low", 0), ("high", 0.3)))
    found = expectation(recipe(), rows, [frozen(), low, high])
    better = found.best.better
    assert set(better) == {"low", "high"}
    assert better["low"] > 0.95
    assert better["high"] < 0.05
    assert set(found.by_name["low"].better) == {"high"}
    assert found.best.kind == "trial"


CHOICE = {"choices": ["adamw", "sgd"]}
SPACES = [
    {"kl_weight": NUMBER},
    {"optimizer": CHOICE, "momentum": {"low": 0.1, "high": 0.9, "when": {"optimizer": "sgd"}}},
    {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "epochs": {"low": 1, "high": 4}},
    {
        "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        **{f"{name}_weight": NUMBER for name in ("kl", "class_kl", "feature", "text", "l2_sp")},
        "weight_decay": NUMBER,
        "batch_size": {"choices": [16, 32, 64]},
    },
]


def drawn(space, rng):
    values = {}
    for name, part in space.items():
        if any(values[parent] != wanted for parent, wanted in part.get("when", {}).items()):
            continue
        if "choices" in part:
            values[name] = part["choices"][rng.integers(len(part["choices"]))]
        else:
            values[name] = float(part["low"] + (part["high"] - part["low"]) * rng.random())
    return values


@pytest.mark.parametrize("number", [1, 2, 5, 64])
@pytest.mark.parametrize("space", SPACES, ids=["one", "conditional", "log and int", "eight"])
@pytest.mark.parametrize("spread", [0.0, 0.03], ids=["all equal", "different"])
def test_any_number_of_trainings_in_any_space_has_finite_expectations_that_repeat(number, space, spread):
    rng = np.random.default_rng(number)
    rows = [row(n, drawn(space, rng), curve(spread * rng.standard_normal())) for n in range(number)]
    baselines = [frozen(), row(1, {}, curve(0.01), kind="baseline", name="plain")]
    found, again = (expectation(recipe(space), rows, baselines) for _ in range(2))
    assert set(found.by_name) == {*(each.name for each in rows), "plain"}
    for each in found.by_name.values():
        assert np.isfinite([each.objective, *each.ends, each.alpha, *each.better.values()]).all()
    assert dict(found.by_name) == dict(again.by_name)
    assert found.gain == again.gain >= 0
    assert math.isfinite(found.gain)
    shuffled = [rows[n] for n in rng.permutation(number)]
    other = expectation(recipe(space), shuffled, baselines)
    assert other.best.objective == pytest.approx(found.best.objective, abs=2e-3)


@pytest.mark.parametrize("outcomes", [(), ("diverged",), ("error", "pruned"), ("running",)])
def test_before_a_trial_is_complete_nothing_is_expected(outcomes):
    rows = [row(n, {"kl_weight": 0.3}, curve(0), outcome) for n, outcome in enumerate(outcomes)]
    assert expectation(recipe(), rows, [frozen()]) is None
    assert expectation(recipe(), [*rows, row(9, {"kl_weight": 0.4}, curve(0))], []).best.names == ("t9",)


def test_a_trial_outside_the_space_counts_with_values_of_its_own():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.02 * n)) for n in range(4)]
    rows.append(row(4, {"learning_rate": 3.0}, curve(0.2), outside=True))
    assert expectation(recipe(), rows, [frozen()]).best.names == ("t4",)


def test_where_no_training_reaches_the_frozen_model_the_best_of_them_is_still_the_best():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(-0.3 + 0.1 * n)) for n in range(3)]
    assert expectation(recipe(), rows, [frozen(0.9)]).best.names == ("t2",)


def test_equal_values_with_an_equal_seed_are_one_training():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.02 * n)) for n in range(3)]
    twice = [*rows, row(3, rows[2].values, curve(0.04))]
    alone, found = (expectation(recipe(), each, [frozen()]) for each in (rows, twice))
    assert found.by_name["t3"] is found.by_name["t2"]
    assert found.best == alone.best


def test_a_baseline_with_a_given_alpha_stays_there():
    half = row(1, {"alpha": 0.5}, curve(0.1, 1.0), kind="baseline", name="half")
    half = TrialRow(**{**vars(half), "alpha": 0.5, "objective": 0.52})
    found = expectation(recipe(), [row(0, {"kl_weight": 0.2}, curve(0.1, 1.0))], [frozen(), half])
    assert (found.by_name["half"].alpha, found.by_name["half"].measured) == (0.5, (0.52,))


def test_values_outside_a_space_that_has_changed_still_say_what_their_neighbours_measure():
    rows = [row(n, {"kl_weight": 0.1 + n / 5}, curve(0.01)) for n in range(5)]
    lucky = row(5, {"kl_weight": 1.2}, curve(0.08), outside=True)
    found = expectation(recipe(), [*rows, lucky], [frozen()])
    assert found.by_name["t5"].objective < lucky.objective - 0.01
