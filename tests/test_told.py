"""What a study keeps of a finished training, from its result alone."""

import pytest

from carft_ray.study.journal import constraint_values, missing_metrics, result_attributes

NAMES = ("id_drop/zero_shot", "id_drop/plain")
MEASURED = {"id_accuracy": 0.8, "violation/id_drop/zero_shot": -0.02, "violation/id_drop/plain": 0.1}
CURVE = [
    {"alpha": alpha, "id_accuracy": 0.5 + alpha / 4, "ood_accuracy": 0.6 - alpha / 4} for alpha in (0, 0.2, 0.4, 1)
]
RESULT = {
    "objective": 0.7,
    "alpha": 0.4,
    "metrics": {"id_accuracy": 0.6, "ood_accuracy": 0.5},
    "elapsed_s": 2.0,
    "curve": CURVE,
    "train": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("complete", {"trained": -1.0, "id_drop/zero_shot": -0.02, "id_drop/plain": 0.1}),
        ("pruned", {"trained": -1.0, "id_drop/zero_shot": 0.0, "id_drop/plain": 0.0}),
        ("diverged", {"trained": 1.0, "id_drop/zero_shot": 0.0, "id_drop/plain": 0.0}),
        ("error", {"trained": 1.0, "id_drop/zero_shot": 0.0, "id_drop/plain": 0.0}),
    ],
)
def test_every_finished_trial_has_all_constraints_and_only_a_complete_one_its_measured_values(outcome, expected):
    assert constraint_values(outcome, MEASURED, NAMES) == expected


def test_without_constraints_of_the_recipe_there_is_trained_alone():
    assert constraint_values("complete", MEASURED, ()) == {"trained": -1.0}


def test_a_trial_must_have_what_its_constraints_and_its_two_objectives_are_made_of():
    assert missing_metrics({**MEASURED, "ood_accuracy": 0.5}, NAMES, True)[0] == []
    missing, rule = missing_metrics({"id_accuracy": 0.8}, NAMES, True)
    assert missing == ["violation/id_drop/zero_shot", "violation/id_drop/plain", "ood_accuracy"]
    assert rule.endswith("must have violation/id_drop/zero_shot, violation/id_drop/plain, id_accuracy, ood_accuracy")
    assert missing_metrics({}, (), False)[0] == []


def test_a_result_keeps_its_numbers_and_no_curve_unless_there_is_a_front():
    metrics = RESULT["metrics"]
    kept = {"outcome": "complete", "alpha": 0.4, "at_chance": False, "metrics": metrics, "elapsed_s": 2.0}
    assert result_attributes(RESULT) == kept
    assert result_attributes(RESULT, 0.2) == {**kept, "objective": 0.7, "points": CURVE[1:]}


def test_a_result_says_whether_its_fine_tuned_weights_are_at_chance():
    found = result_attributes({**RESULT, "at_chance": True})
    assert (found["at_chance"], found["outcome"]) == (True, "complete")


def test_the_lowest_alpha_of_a_front_is_within_it_but_for_rounding():
    curve = [{"alpha": 0.1 + 0.2, "id_accuracy": 0.6, "ood_accuracy": 0.5}, *CURVE[2:]]
    assert result_attributes({**RESULT, "curve": curve}, 0.1 + 0.2 + 1e-16)["points"] == curve
    assert [point["alpha"] for point in result_attributes(RESULT, 0.3)["points"]] == [0.4, 1]


def test_the_own_point_of_a_training_is_on_its_curve_once():
    found = result_attributes({**RESULT, "alpha": 0.5}, 0.2)["points"]
    assert found == [*CURVE[1:], {"alpha": 0.5, **RESULT["metrics"]}]
    assert result_attributes({**RESULT, "curve": []}, 0.2)["points"] == [{"alpha": 0.4, **RESULT["metrics"]}]
