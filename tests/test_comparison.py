"""Confirmed configurations compared: families, broadcasting of the zero-shot model, headline, optimism, lines."""

import json
import math
import re

import numpy as np
import pytest

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics import paired
from carft_ray.results.statistics.headline import in_points, objective_difference
from carft_ray.results.statistics.intervals import OVER_IMAGES, crossed, objective_interval, values_by_seed
from carft_ray.results.statistics.paired import KEYS, compare, comparison_lines, holm, row_lines

SPEC = ObjectiveSpec("weighted_mean", "id_val", ("a", "b"), 0.5)
SIZES = {"id_val": 400, "a": 200, "b": 200}


def answers(rng, hard, share, num_seeds):
    """Correctness over seeds on images whose hardness all configurations share."""
    return {name: rng.normal(0, 0.05, (num_seeds, n)) + hard[name] < share for name, n in SIZES.items()}


@pytest.fixture(scope="module")
def correct():
    rng = np.random.default_rng(0)
    hard = {name: rng.random(n) for name, n in SIZES.items()}
    shares = {
        "t0007": (0.75, 3),
        "t0002": (0.74, 3),
        "fine_tuning": (0.68, 3),
        "paper": (0.75, 3),
        "zero_shot": (0.5, 1),
    }
    return {name: answers(rng, hard, *values) for name, values in shares.items()}


BASELINES = {"fine_tuning": 0.7, "paper": 0.6, "zero_shot": 0.5}  # validation objectives


@pytest.fixture(scope="module")
def found(correct):
    return compare(SPEC, correct, "t0007", BASELINES, searched=0.78)


def by_name(differences):
    return {each["other"]: each for each in differences}


def test_rows_have_the_intervals_of_each_configuration(correct, found):
    assert [row["name"] for row in found["rows"]] == list(correct)
    row = found["rows"][0]
    assert row["objective"] == objective_interval(SPEC, correct["t0007"]).data()
    ood = {name: correct["t0007"][name] for name in SPEC.ood_sets}
    assert row["ood_accuracy"] == crossed(ood, {"a": 0.5, "b": 0.5}).data()
    assert list(row["sets"]) == ["id_val", "a", "b"]
    assert found["rows"][-1]["objective"]["over"] == OVER_IMAGES


def test_the_baseline_of_the_headline_has_its_own_p_value_and_interval_and_the_others_holms(correct, found):
    against = by_name(found["baselines"])
    assert list(against) == list(BASELINES)
    own = objective_difference(SPEC, correct["t0007"], correct["fine_tuning"])
    assert (against["fine_tuning"]["objective"], against["fine_tuning"]["p"]) == (own.data(), own.p_value)
    raised = holm([against[name]["objective"]["p_value"] for name in ("paper", "zero_shot")])
    assert [against[name]["p"] for name in ("paper", "zero_shot")] == [p for p, _ in raised]
    level = raised[1][1]
    assert level == pytest.approx(0.975)  # the first of two
    repeated = {name: np.repeat(rows, 3, axis=0) for name, rows in correct["zero_shot"].items()}
    assert against["zero_shot"]["objective"] == objective_difference(SPEC, correct["t0007"], repeated, level).data()
    assert [(each["other"], each["p"]) for each in found["others"]] == [("t0002", None)]


def shown_in(line):
    """The first interval of a printed line, and its p-value as a match."""
    ends = [float(end) for end in line.partition("[")[2].partition("]")[0].split(", ")]
    return ends, re.search(r"p (<|=|>) ([0-9.e-]+)", line)


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_no_line_has_an_interval_and_a_p_value_that_disagree(num_seeds):
    """Not in the numbers, and not as they are printed: rounding puts neither on the other side."""
    rng, seen = np.random.default_rng(5), {True: 0, False: 0}
    for _ in range(12):
        hard = {name: rng.random(n) for name, n in SIZES.items()}
        several = {f"c{number}": answers(rng, hard, 0.7 + rng.normal(0, 0.02), num_seeds) for number in range(5)}
        found = compare(SPEC, several, "c0", {f"c{number}": rng.random() for number in range(1, 5)})
        for each in found["baselines"]:
            low, high = each["objective"]["ends"]
            assert (each["p"] < 0.05) == (low > 0 or high < 0)
            assert ("no improvement" not in each["sentence"]) == (each["p"] < 0.05)
            seen[each["p"] < 0.05] += 1
        for line in [one for one in comparison_lines(found) if re.search(r"; p [<=>]", one)]:
            (low, high), (_, sign, number) = shown_in(line)[0], shown_in(line)[1].group(0, 1, 2)
            counts = sign == "<" or (sign == "=" and float(number) < 0.05)
            assert counts == (low > 0 or high < 0), line
        headline = next(each for each in found["baselines"] if each["other"] == found["headline_baseline"])
        assert found["headline"] == f"c0: {headline['sentence']}"
    assert min(seen.values()) > 0


def test_a_p_value_next_to_the_limit_is_not_rounded_onto_it():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 1, (3, 400)) / 100
    noise -= noise.mean()
    half = crossed({"a": noise}, {"a": 1.0}).ends[1]
    for factor, words in ((1.001, "p < 0.05"), (0.999, "p > 0.05")):
        interval = crossed({"a": noise + factor * half}, {"a": 1.0})
        assert paired._p(interval.p_value) == words
        low = float(in_points(interval.mean, interval.ends, signed=True).partition("[")[2].partition(",")[0])
        assert (low > 0) == (words == "p < 0.05")
        assert low != 0


def test_one_training_counts_for_every_seed_in_differences(correct):
    repeated = {name: np.repeat(rows, 3, axis=0) for name, rows in correct["zero_shot"].items()}
    expected = objective_difference(SPEC, correct["t0007"], repeated)
    alone = compare(SPEC, correct, "t0007", {"zero_shot": 0.5})
    assert alone["baselines"][0]["objective"] == expected.data()
    assert expected.num_seeds == 3


def test_headline_names_the_baseline_that_was_chosen_before(correct, found):
    assert found["headline"].startswith("t0007: improves on fine tuning by 7.")
    assert compare(SPEC, correct, "t0007", {**BASELINES, "paper": 0.8})["headline"].startswith(
        "t0007: no improvement over paper shown"
    )
    assert compare(SPEC, correct, "fine_tuning", {"paper": 0.6})["headline"].startswith(
        "fine_tuning: worse than paper by"
    )
    assert compare(SPEC, correct, "t0007", {})["headline"] is None


def test_equal_configurations_differ_by_zero(correct):
    same = compare(SPEC, {"one": correct["paper"], "two": correct["paper"]}, "one", {"two": 0.6})
    difference = same["baselines"][0]["objective"]
    low, high = difference["ends"]
    assert (difference["mean"], difference["p_value"]) == (0, 1)
    assert low < 0 < high < 0.01
    # 400 images without any change show that less than 0.75 % change, not that less than 0.5 % do
    assert not same["baselines"][0]["keeps_id"]
    wider = compare(SPEC, {"one": correct["paper"], "two": correct["paper"]}, "one", {"two": 0.6}, 0.01)
    assert wider["baselines"][0]["keeps_id"]
    assert "no improvement over two shown" in same["headline"]


def test_keeping_id_depends_on_the_margin(correct):
    low = compare(SPEC, correct, "t0007", {"paper": 0.6})["baselines"][0]["sets"]["id_val"]["ends"][0]
    assert low < 0
    for margin, kept in ((-low + 1e-6, True), (-low - 1e-6, False)):
        assert compare(SPEC, correct, "t0007", {"paper": 0.6}, id_margin=margin)["baselines"][0]["keeps_id"] is kept


def test_another_configuration_above_the_winner_is_named(correct):
    found = compare(SPEC, correct, "fine_tuning", {"zero_shot": 0.5})
    assert found["better_than_winner"] == ["t0007", "t0002", "paper"]
    assert any(line.startswith("t0007 is better than the winner") for line in comparison_lines(found))


def test_optimism_has_the_standard_error_of_a_new_mean(correct, found):
    values = {name: values_by_seed(SPEC, rows) for name, rows in correct.items()}
    trained = ("t0007", "t0002", "fine_tuning", "paper")
    pooled = max(
        np.mean([np.var(values[name], ddof=1) for name in trained]),
        3 * np.mean([objective_interval(SPEC, correct[name]).residual_variance for name in trained]),
    )
    assert found["optimism"]["value"] == pytest.approx(0.78 - np.mean(values["t0007"]))
    assert found["optimism"]["se"] == pytest.approx(math.sqrt(pooled * (1 + 1 / 3)))
    assert compare(SPEC, correct, "t0007", {})["optimism"] is None


def test_one_training_each_works_and_covers_images_only(correct):
    single = {name: {each: rows[:1] for each, rows in by_set.items()} for name, by_set in correct.items()}
    found = compare(SPEC, single, "t0007", BASELINES, label="test", searched=0.78)
    assert {each["objective"]["over"] for each in found["baselines"]} == {OVER_IMAGES}
    assert found["optimism"]["se"] is None
    lines = comparison_lines(found)
    assert lines[0].startswith("t0007 minus each other, test: objective in points")
    assert lines[-1].endswith(f"points; test; 95 %, {OVER_IMAGES}.")
    json.dumps(found, allow_nan=False)


def test_each_number_has_one_interval_and_the_text_says_what_p_means(found):
    lines = comparison_lines(found)
    assert not any("±" in line or "+-" in line for line in lines)
    assert any("Keeps ID: at most 0.5 points of ID accuracy lost" in line for line in lines)
    assert [line.partition(":")[0].strip() for line in row_lines(found)[1:]] == [row["name"] for row in found["rows"]]
    told = {line.partition(":")[0].strip(): line for line in lines}
    for each in (*found["baselines"], *found["others"]):
        low, high = each["objective"]["ends"]
        assert f" [{100 * low:+.1f}, {100 * high:+.1f}]" in told[each["other"]]
        assert told[each["other"]].count("[") == 1
        assert ("; p " in told[each["other"]]) == (each["p"] is not None)
    assert "of the 2 other baselines, p and interval are raised for their number (Holm)" in " ".join(lines)
    assert "fine_tuning was chosen before" in " ".join(lines)


def test_data_are_json_that_the_text_is_made_of(found):
    data = json.loads(json.dumps(found, allow_nan=False))
    assert data == found
    assert {*KEYS} <= data.keys()
    assert data["baselines"][0]["other"] == "fine_tuning"
    assert data["rows"][-1]["objective"]["dof"] is None  # infinite
    assert data["better_than_winner"] == []


@pytest.mark.parametrize("kind", ["harmonic", "worst_domain"])
def test_other_objectives_and_no_ood_set_work(correct, kind):
    found = compare(ObjectiveSpec(kind, "id_val", ("a", "b")), correct, "t0007", BASELINES)
    assert math.isfinite(found["baselines"][0]["objective"]["p_value"])
    alone = compare(ObjectiveSpec(kind, "id_val", ()), correct, "t0007", BASELINES)
    assert alone["rows"][0]["ood_accuracy"] is None
    assert list(alone["baselines"][0]["sets"]) == ["id_val"]
    assert comparison_lines(alone)


def test_other_numbers_of_seeds_are_refused(correct):
    short = {name: rows[:2] for name, rows in correct["paper"].items()}
    with pytest.raises(ValueError, match="broadcast"):
        compare(SPEC, {**correct, "paper": short}, "t0007", {"paper": 0.6})
