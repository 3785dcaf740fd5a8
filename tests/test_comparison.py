"""What a choice is worth: noise and correction of the best, families of tests, configurations compared, the lines."""

import json
import math
import re

import numpy as np
import pytest

from carft_ray.evaluation.objective import ObjectiveSpec
from carft_ray.results.statistics import paired
from carft_ray.results.statistics.headline import in_points, objective_difference
from carft_ray.results.statistics.intervals import OVER_IMAGES, crossed, objective_interval, values_by_seed
from carft_ray.results.statistics.optimism import correct_best, ranking_noise
from carft_ray.results.statistics.paired import KEYS, compare, comparison_lines, holm, row_lines

SPEC = ObjectiveSpec("weighted_mean", "id_val", ("a", "b"), 0.5)
SIZES = {"id_val": 400, "a": 200, "b": 200}
J = [0.70, 0.71, 0.69, 0.64, 0.50, 0.715, 0.705, 0.68]
BASELINES = {"fine_tuning": 0.7, "paper": 0.6, "zero_shot": 0.5}  # validation objectives


def random_correct(rng, num_rows):
    return {name: rng.random((num_rows, n // 8)) < 0.6 for name, n in SIZES.items()}


# correction of the best


def test_correction_of_the_fixture_and_of_equal_trials():
    found = correct_best(J, 0.01**2, num_draws=200_000)
    assert (found.spread, found.factor) == pytest.approx((1.875e-4, 0.466667), abs=5e-7)
    assert found.num_trials == 8
    assert found.optimism == pytest.approx(0.01109, abs=1e-4)
    assert found.value == pytest.approx(0.715 - found.optimism)
    assert correct_best(J, 0.01**2).optimism == pytest.approx(0.01109, abs=8e-4)
    exact = correct_best(J, 0.0)
    assert (exact.value, exact.optimism, exact.factor) == (0.715, 0.0, 1.0)
    equal = correct_best([0.7] * 10, 0.01**2, num_draws=100_000)
    assert equal.factor == 0
    assert equal.optimism == pytest.approx(0.01538753, abs=1e-4)  # of ten standard normal values: 1.538753
    assert correct_best([0.7], 0.01**2).value == pytest.approx(0.7, abs=1e-3)


def test_noise_agrees_with_sums_written_out_over_the_upper_half_and_shared_luck_is_none():
    rng = np.random.default_rng(0)
    correct, objectives = random_correct(rng, 7), [0.5, 0.9, 0.6, 0.8, 0.55, 0.7, 0.4]
    expected = 0.0
    for name, w in (("id_val", 0.5), ("a", 0.25), ("b", 0.25)):
        x = correct[name][[1, 2, 3, 5]].astype(float)
        n = x.shape[1]
        residual = sum((x[i, k] - x[i].mean() - x[:, k].mean() + x.mean()) ** 2 for i in range(4) for k in range(n))
        expected += w**2 * residual / ((n - 1) * 3) / n
    noise = ranking_noise(SPEC, objectives, correct)
    assert noise.image == pytest.approx(expected, abs=1e-15)
    assert (noise.seed, noise.variance, noise.words) == (None, noise.image, "image noise only")
    shared = {name: np.repeat(rows, 6, axis=0) for name, rows in random_correct(rng, 1).items()}
    assert ranking_noise(SPEC, J[:6], shared).variance == pytest.approx(0, abs=1e-30)
    assert ranking_noise(SPEC, [0.7], random_correct(rng, 1)).variance == 0


def test_seed_noise_is_what_the_images_do_not_explain():
    rng = np.random.default_rng(2)
    correct, configurations = random_correct(rng, 4), [random_correct(rng, 5), random_correct(rng, 3)]
    total = dof = own = 0.0
    for by_set in configurations:
        y = values_by_seed(SPEC, by_set)
        total += sum((value - np.mean(y)) ** 2 for value in y)
        own += (len(y) - 1) * ranking_noise(SPEC, [1.0] * len(y), by_set).image
        dof += len(y) - 1
    noise = ranking_noise(SPEC, J[:4], correct, configurations)
    assert noise.seed == pytest.approx(max(0.0, (total - own) / dof))
    assert noise.words == "image and seed noise"
    assert ranking_noise(SPEC, J[:4], correct, [random_correct(rng, 1)]).seed is None
    moving = {name: np.stack([np.arange(n) < share * n for share in (0.2, 0.5, 0.8)]) for name, n in SIZES.items()}
    assert ranking_noise(SPEC, J[:4], correct, [moving]).seed == pytest.approx(0.09, rel=0.05)


# configurations compared


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


@pytest.fixture(scope="module")
def found(correct):
    return compare(SPEC, correct, "t0007", BASELINES, searched=0.78)


def test_rows_have_the_intervals_of_each_configuration_and_all_of_it_is_json(correct, found):
    assert [row["name"] for row in found["rows"]] == list(correct)
    row = found["rows"][0]
    assert row["objective"] == objective_interval(SPEC, correct["t0007"]).data()
    ood = {name: correct["t0007"][name] for name in SPEC.ood_sets}
    assert row["ood_accuracy"] == crossed(ood, {"a": 0.5, "b": 0.5}).data()
    assert list(row["sets"]) == ["id_val", "a", "b"]
    assert found["rows"][-1]["objective"]["over"] == OVER_IMAGES
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {*KEYS} <= found.keys()
    assert found["rows"][-1]["objective"]["dof"] is None  # infinite


def test_the_baseline_of_the_headline_has_its_own_p_value_and_interval_and_the_others_holms(correct, found):
    against = {each["other"]: each for each in found["baselines"]}
    assert list(against) == list(BASELINES)
    own = objective_difference(SPEC, correct["t0007"], correct["fine_tuning"])
    assert (against["fine_tuning"]["objective"], against["fine_tuning"]["p"]) == (own.data(), own.p_value)
    raised = holm([against[name]["objective"]["p_value"] for name in ("paper", "zero_shot")])
    assert [against[name]["p"] for name in ("paper", "zero_shot")] == [p for p, _ in raised]
    level = raised[1][1]
    assert level == pytest.approx(0.975)  # the first of two
    repeated = {name: np.repeat(rows, 3, axis=0) for name, rows in correct["zero_shot"].items()}  # for every seed
    assert against["zero_shot"]["objective"] == objective_difference(SPEC, correct["t0007"], repeated, level).data()
    assert [(each["other"], each["p"]) for each in found["others"]] == [("t0002", None)]


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
            low, high = (float(end) for end in line.partition("[")[2].partition("]")[0].split(", "))
            sign, number = re.search(r"p (<|=|>) ([0-9.e-]+)", line).groups()
            assert (sign == "<" or (sign == "=" and float(number) < 0.05)) == (low > 0 or high < 0), line
        headline = next(each for each in found["baselines"] if each["other"] == found["headline_baseline"])
        assert found["headline"] == f"c0: {headline['sentence']}"
    assert min(seen.values()) > 0


def test_a_p_value_next_to_the_limit_is_not_rounded_onto_it():
    noise = np.random.default_rng(3).normal(0, 1, (3, 400)) / 100
    noise -= noise.mean()
    half = crossed({"a": noise}, {"a": 1.0}).ends[1]
    for factor, words in ((1.001, "p < 0.05"), (0.999, "p > 0.05")):
        interval = crossed({"a": noise + factor * half}, {"a": 1.0})
        assert paired._p(interval.p_value) == words
        low = float(in_points(interval.mean, interval.ends, signed=True).partition("[")[2].partition(",")[0])
        assert (low > 0) == (words == "p < 0.05")
        assert low != 0


def test_equal_configurations_differ_by_zero(correct):
    both = {"one": correct["paper"], "two": correct["paper"]}
    same = compare(SPEC, both, "one", {"two": 0.6})
    difference = same["baselines"][0]["objective"]
    low, high = difference["ends"]
    assert (difference["mean"], difference["p_value"]) == (0, 1)
    assert low < 0 < high < 0.01
    # 400 images without any change show that less than 0.75 % change, not that less than 0.5 % do
    assert not same["baselines"][0]["keeps_id"]
    assert compare(SPEC, both, "one", {"two": 0.6}, 0.01)["baselines"][0]["keeps_id"]


def test_optimism_has_the_standard_error_of_a_new_mean(correct, found):
    values = {name: values_by_seed(SPEC, rows) for name, rows in correct.items()}
    trained = ("t0007", "t0002", "fine_tuning", "paper")
    pooled = max(
        np.mean([np.var(values[name], ddof=1) for name in trained]),
        3 * np.mean([objective_interval(SPEC, correct[name]).residual_variance for name in trained]),
    )
    assert found["optimism"]["value"] == pytest.approx(0.78 - np.mean(values["t0007"]))
    assert found["optimism"]["se"] == pytest.approx(math.sqrt(pooled * (1 + 1 / 3)))


def test_each_number_has_one_interval_and_the_text_says_what_p_means(found):
    lines = comparison_lines(found)
    assert [line.partition(":")[0].strip() for line in row_lines(found)[1:]] == [row["name"] for row in found["rows"]]
    told = {line.partition(":")[0].strip(): line for line in lines}
    for each in (*found["baselines"], *found["others"]):
        low, high = each["objective"]["ends"]
        assert f" [{100 * low:+.1f}, {100 * high:+.1f}]" in told[each["other"]]
        assert told[each["other"]].count("[") == 1
        assert ("; p " in told[each["other"]]) == (each["p"] is not None)
    text = " ".join(lines)
    assert "Keeps ID: at most 0.5 points of ID accuracy lost" in text
    assert "of the 2 other baselines, p and interval are raised for their number (Holm)" in text
    assert "fine_tuning was chosen before" in text


def test_holm_of_the_fixture_and_its_limits():
    assert [one for one, _ in holm([0.01, 0.04, 0.03])] == pytest.approx([0.03, 0.06, 0.06])
    assert [one for one, _ in holm([0.9, 0.8])] == [1.0, 1.0]
    assert holm([0.02]) == [(0.02, pytest.approx(0.95))]
    assert holm([]) == []


def test_the_headline_is_about_the_baseline_that_was_chosen_before(correct, found):
    assert found["headline"].startswith("t0007: improves on fine tuning by 7.")
    other = compare(SPEC, correct, "t0007", {**BASELINES, "paper": 0.8})
    assert other["headline"].startswith("t0007: no improvement over paper shown")
    worse = compare(SPEC, correct, "fine_tuning", {"paper": 0.6})
    assert worse["headline"].startswith("fine_tuning: worse than paper by")
    assert worse["better_than_winner"] == ["t0007", "t0002"]
    assert any(line.startswith("t0007 is better than the winner") for line in comparison_lines(worse))
    assert compare(SPEC, correct, "t0007", {})["headline"] is None


@pytest.mark.parametrize("kind", ["harmonic", "worst_domain"])
def test_other_objectives_work_without_an_ood_set_and_one_training_each_covers_images_only(correct, kind):
    single = {name: {each: rows[:1] for each, rows in by_set.items()} for name, by_set in correct.items()}
    found = compare(ObjectiveSpec(kind, "id_val", ()), single, "t0007", BASELINES, label="test", searched=0.78)
    assert found["rows"][0]["ood_accuracy"] is found["optimism"]["se"] is None
    assert list(found["baselines"][0]["sets"]) == ["id_val"]
    assert comparison_lines(found)[-1].endswith(f"points; test; 95 %, {OVER_IMAGES}.")
    pair = compare(ObjectiveSpec(kind, "id_val", ("a", "b")), correct, "t0007", BASELINES)["baselines"][0]
    assert 0 <= pair["p"] <= 1
