"""Fronts: which points no other beats, which of them is the best, and the area that they dominate."""

from fractions import Fraction

import numpy as np
import pytest
from stand_in import make_recipe

from benchmarks.searches import hypervolume
from carft_ray.study.best import Retention
from carft_ray.study.front import (
    FrontRule,
    best_point,
    front_of,
    front_rule,
    knee,
    lexicographic,
    non_dominated,
    spread_points,
    stand,
)
from carft_ray.study.outcome import TrialRow
from carft_ray.study.rows import best_first, best_row


def beaten(points, index):
    others = np.delete(points, index, axis=0)
    return bool(((others >= points[index]).all(axis=1) & (others > points[index]).any(axis=1)).any())


def clouds(seed):
    rng = np.random.default_rng(seed)
    return [rng.random((n, 2)) for n in (0, 1, 2, 7, 40)] + [rng.integers(0, 5, (30, 2)) / 4 for _ in range(3)]


@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_no_other_point_beats_by_rising_id_and_equal_points_all_stand_on_it(seed):
    for points in clouds(seed):
        found = non_dominated(points)
        assert {*found} == {i for i in range(len(points)) if not beaten(points, i)}
        order = [(points[i, 0], -points[i, 1], i) for i in found]
        assert order == sorted(order)


def test_counts_alone_decide_however_the_means_are_summed():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(7, 4000, 4)
        counts = np.array([[rng.integers(size // 2, size // 2 + 3) for size in sizes] for _ in range(40)])
        exact = [sum(Fraction(int(k), int(n)) for k, n in zip(row[1:], sizes[1:], strict=True)) for row in counts]
        pairs = [(int(row[0]), ood) for row, ood in zip(counts, exact, strict=True)]
        expected = {
            i for i, (a, b) in enumerate(pairs) if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in pairs)
        }
        shares = counts / sizes
        shuffled = [np.add.reduce(rng.permutation(row)) / 3 for row in shares[:, 1:]]
        assert {*non_dominated(np.stack([shares[:, 0], shuffled], axis=1))} == expected


def test_the_knee_lies_farthest_beyond_the_line_between_the_ends():
    front = np.array([[0.5, 0.6], [0.6, 0.58], [0.7, 0.5], [0.75, 0.4]])
    assert knee(front) == 1  # scaled: (0, 1), (.4, .9), (.8, .5), (1, 0)
    for scale, shift in (((1, 1), (0, 0)), ((0.01, 3), (0.2, -1))):
        assert knee(front * scale + shift) == 1
    for points, expected in (
        ([[0.5, 0.6], [0.6, 0.5], [0.7, 0.4]], 0),  # all on the line: the highest OOD accuracy
        ([[0.5, 0.6], [0.51, 0.45], [0.7, 0.4]], 0),  # short of the line: an end
        ([[0.5, 0.6], [0.5, 0.6 + 1e-16], [0.5, 0.6]], 0),  # equal points: the first
        ([[0.5, 0.6], [0.6, 0.58], [0.6, 0.58], [0.7, 0.4]], 1),
    ):
        assert knee(np.array(points)) == expected
    front = np.array([[0.5, 0.6], [0.6, 0.58], [0.695, 0.5], [0.7, 0.4]])
    assert [lexicographic(front, tolerance) for tolerance in (0, 0.004, 0.005, 0.1, 1)] == [3, 3, 2, 1, 0]


@pytest.mark.parametrize("seed", range(2))
def test_hypervolume_is_the_area_of_the_union_of_the_rectangles(seed):
    side = (np.arange(100) + 0.5) / 100
    cells = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 1, 2)
    for points in clouds(seed):
        for reference in ((0.0, 0.0), (0.3, 0.2), (0.9, 0.95)):
            covered = (cells <= points).all(axis=2).any(axis=1) & (cells[:, 0] > reference).all(axis=1)
            assert hypervolume(points, reference) == pytest.approx(covered.mean(), abs=0.02)


def row(number, points, drawn=0, outcome="complete"):
    """A training with points (alpha, ID, OOD[, violation]); ``drawn`` is the index of its own."""
    curve = []
    for alpha, one, other, *missed in points:
        found = {"id_accuracy": one, "ood_accuracy": other, "objective": (one + other) / 2}
        curve.append({"alpha": alpha, **found, **({"violation/id_drop/zero_shot": missed[0]} if missed else {})})
    metrics = dict(curve[drawn])
    own = {"alpha": metrics.pop("alpha"), "objective": metrics["objective"], "metrics": metrics}
    return TrialRow("trial", number, f"t{number}", {}, 1, outcome, **own, points=tuple(curve))


KNEE = FrontRule("knee", 0.0)


def test_the_front_is_over_all_points_of_all_complete_trainings():
    rows = [
        row(0, [(0.2, 0.5, 0.6), (0.6, 0.6, 0.59), (1.0, 0.61, 0.4)]),
        row(1, [(0.3, 0.55, 0.5), (1.0, 0.7, 0.45)], drawn=1),
        row(2, [(0.5, 0.9, 0.9)], outcome="running"),
    ]
    assert (front_of([]), best_point([], KNEE)) == ([], None)
    assert [(point.name, point.alpha) for point in front_of(rows)] == [("t0", 0.2), ("t0", 0.6), ("t1", 1.0)]
    stood = stand(rows, KNEE)
    assert [(each.standing, each.alpha) for each in stood] == [(2, 0.6), (1, 1.0), (0, 0.5)]
    assert stood[0].metrics["ood_accuracy"] == 0.59
    assert stood[0].objective == pytest.approx(0.595)
    assert best_row(stood) == stood[0]
    assert best_row(stand(rows, FrontRule("lexicographic", 0.0))).alpha == 1.0
    assert best_row(stand(rows, FrontRule("lexicographic", 0.2))).alpha == 0.2


def test_the_best_by_the_rule_comes_first_then_the_front_then_the_rest_by_the_mean():
    rows = [row(n, [(1.0, *pair)]) for n, pair in enumerate(((0.70, 0.30), (0.50, 0.60), (0.65, 0.58), (0.64, 0.57)))]
    assert [each.name for each in best_first(stand(rows, KNEE))] == ["t2", "t1", "t0", "t3"]
    # of equal points the earliest is the best
    rows = [row(0, [(1.0, 0.7, 0.5)]), row(1, [(0.4, 0.7, 0.5), (1.0, 0.6, 0.5)]), row(2, [(1.0, 0.6, 0.4)])]
    assert [(point.name, point.alpha) for point in front_of(rows)] == [("t0", 1.0), ("t1", 0.4)]
    assert [each.standing for each in stand(rows, KNEE)] == [2, 1, 0]


def test_points_that_violate_a_constraint_are_on_the_front_only_when_all_do_and_come_last():
    rows = [row(0, [(0.2, 0.5, 0.6, -0.1), (1.0, 0.9, 0.9, 0.2)]), row(1, [(1.0, 0.8, 0.8, 0.01)])]
    assert [(point.name, point.alpha) for point in front_of(rows)] == [("t0", 0.2)]
    rows = [row(0, [(0.2, 0.5, 0.6, 0.3), (1.0, 0.9, 0.9, 0.2)]), row(1, [(1.0, 0.8, 0.8, 0.01)])]
    assert best_row(stand(rows, KNEE)).name == "t1"
    rows = [row(0, [(1.0, 0.9, 0.9, 0.02)]), row(1, [(1.0, 0.5, 0.5, -0.02)]), row(2, [(1.0, 0.8, 0.8, 0.01)])]
    assert [each.name for each in best_first(rows)] == ["t1", "t2", "t0"]


@pytest.mark.parametrize("best", ["knee", "lexicographic"])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_kept_of_the_trials_gives_the_best_of_all_of_them(tmp_path, seed, best):
    """At every end of a trial; some violate a constraint, and counts of few images make ties."""
    objective = {"kind": "pareto", "best": best, "tolerance": 0.1}
    recipe = make_recipe(60, keep_checkpoints=2, objective=objective, alpha={"mode": "sample"})
    rng, rows = np.random.default_rng(seed), []
    retention = Retention(tmp_path, recipe)
    for number in range(60):
        counts = rng.integers(0, 20, (3, 2)) / 20
        limits = rng.choice([-0.1, 0.05, 0.1], 3)
        rows.append(row(number, [(index / 2, *counts[index], limits[index]) for index in range(3)]))
        retention.ended(rows[-1])
        assert retention.best() == best_row(stand(rows, front_rule(recipe.search)))
    assert len(retention._kept) < 30


def test_the_sampler_is_told_of_at_most_four_further_points_none_of_them_beaten():
    points = [{"alpha": i / 10, "id_accuracy": i / 10, "ood_accuracy": 1 - i / 10} for i in range(11)]
    told = [point["alpha"] for point in spread_points(points, 0.5)]
    assert told == [0.0, 0.3, 0.7, 1.0]
    points[7] = {"alpha": 0.7, "id_accuracy": 0.1, "ood_accuracy": 0.1}
    assert 0.7 not in [point["alpha"] for point in spread_points(points, 0.5)]
    assert spread_points(points[:1], 0.0) == []
    assert [point["alpha"] for point in spread_points(points[:3], 0.2)] == [0.0, 0.1]
