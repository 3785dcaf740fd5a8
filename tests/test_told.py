"""What a study keeps of a finished training, from its result alone."""

import pytest

from carft_ray.study.journal import constraint_values, missing_metrics, result_attributes

NAMES = ("id_drop/zero_shot", "id_drop/plain")
MEASURED = {"id_accuracy": 0.8, "violation/id_drop/zero_shot": -0.02, "violation/id_drop/plain": 0.1}
CURVE = [{"alpha": alpha, "id_accuracy": 0.5 + alpha / 4} for alpha in (0, 0.2, 0.3, 1)]
RESULT = {"objective": 0.7, "alpha": 0.3, "metrics": {"id_accuracy": 0.6}, "elapsed_s": 2.0, "curve": CURVE}


@pytest.mark.parametrize(
    ("outcome", "trained", "values"),
    [("complete", -1.0, (-0.02, 0.1)), ("pruned", -1.0, (0, 0)), ("diverged", 1.0, (0, 0)), ("error", 1.0, (0, 0))],
)
def test_every_finished_trial_has_all_constraints_and_only_a_complete_one_its_measured_values(outcome, trained, values):
    expected = {"trained": trained, **dict(zip(NAMES, values, strict=True))}
    assert constraint_values(outcome, MEASURED, NAMES) == expected
    assert constraint_values(outcome, MEASURED, ()) == {"trained": trained}


def test_a_trial_must_have_what_its_constraints_and_its_two_objectives_are_made_of():
    assert missing_metrics({**MEASURED, "ood_accuracy": 0.5}, NAMES, True)[0] == []
    missing, rule = missing_metrics({"id_accuracy": 0.8}, NAMES, True)
    assert missing == ["violation/id_drop/zero_shot", "violation/id_drop/plain", "ood_accuracy"]
    assert rule.endswith("must have violation/id_drop/zero_shot, violation/id_drop/plain, id_accuracy, ood_accuracy")


def test_a_result_keeps_its_numbers_and_of_its_curve_the_points_of_the_front_each_once():
    numbers = {"outcome": "complete", "alpha": 0.3, "metrics": RESULT["metrics"], "elapsed_s": 2.0}
    kept = {**numbers, "at_chance": False}
    assert result_attributes(RESULT) == kept
    assert result_attributes({**RESULT, "at_chance": True}) == {**kept, "at_chance": True}
    assert result_attributes(RESULT, 0.2) == {**kept, "objective": 0.7, "points": CURVE[1:]}
    assert result_attributes(RESULT, 0.3 + 1e-16)["points"] == CURVE[2:]  # within it but for rounding
    found = result_attributes({**RESULT, "alpha": 0.5}, 0.2)["points"]
    assert found == [*CURVE[1:], {"alpha": 0.5, **RESULT["metrics"]}]
