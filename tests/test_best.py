"""Which trial is the best, of a search for one number and of one for a front, and what is kept of it. No Ray runs."""

import re
from fractions import Fraction

import curve_stand_in
import numpy as np
import pytest
import stand_in
from logs import take
from study_steps import failed, finish, searching

from benchmarks.searches import hypervolume
from carft_ray import files
from carft_ray.errors import InterruptedRunError, StorageError
from carft_ray.launch.command import Plan, run_search
from carft_ray.layout import BEST, FIGURE_PNG, FIGURE_SVG, THUMBNAILS, WEIGHTS
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.figure import figure_at_the_end
from carft_ray.store.folder import Folder
from carft_ray.study.best import Retention
from carft_ray.study.journal import constraint_values, missing_metrics, result_attributes
from carft_ray.study.pareto_front import (
    FrontRule,
    best_point,
    front_of,
    front_rule,
    knee,
    lexicographic,
    non_dominated,
    stand,
)
from carft_ray.study.rows import best_first, best_row
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_running
from carft_ray.study.training import TrialRow


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
    """At every end of a trial, in any order; some violate a constraint, and counts of few images make ties."""
    objective = {"kind": "pareto", "best": best, "tolerance": 0.1}
    recipe = stand_in.make_recipe(60, keep_checkpoints=2, objective=objective, alpha={"mode": "sample"})
    rng, rows = np.random.default_rng(seed), []
    retention = Retention(tmp_path, recipe, Folder(tmp_path))
    for number in rng.permutation(60).tolist():
        counts = rng.integers(0, 20, (3, 2)) / 20
        limits = rng.choice([-0.1, 0.05, 0.1], 3)
        rows.append(row(number, [(index / 2, *counts[index], limits[index]) for index in range(3)]))
        retention.ended(rows[-1])
        assert retention.best() == best_row(stand(rows, front_rule(recipe.search)))


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
    missing, rule = missing_metrics({"id_accuracy": 0.8}, NAMES, True)
    assert missing == ["violation/id_drop/zero_shot", "violation/id_drop/plain", "ood_accuracy"]
    assert rule.endswith("must have violation/id_drop/zero_shot, violation/id_drop/plain, id_accuracy, ood_accuracy")


def test_a_result_keeps_its_numbers_and_of_its_curve_the_points_of_the_front_each_once():
    numbers = {"outcome": "complete", "alpha": 0.3, "metrics": RESULT["metrics"], "elapsed_s": 2.0}
    kept = {**numbers, "at_chance": False}
    assert result_attributes(RESULT) == kept
    assert result_attributes({**RESULT, "at_chance": True}) == {**kept, "at_chance": True}
    assert result_attributes(RESULT, 0.2) == {**kept, "points": CURVE[1:]}
    assert result_attributes(RESULT, 0.3 + 1e-16)["points"] == CURVE[2:]  # within it but for rounding
    found = result_attributes({**RESULT, "alpha": 0.5}, 0.2)["points"]
    assert found == [*CURVE[1:], {"alpha": 0.5, **RESULT["metrics"]}]


def in_file(study_dir):
    """Name and alpha of the trial that best.yaml holds."""
    text = (study_dir / BEST).read_text()
    return re.match(r"# The best values of this study, (\S+)\. ", text)[1], load_recipe(study_dir / BEST).train.alpha


def with_file(study_dir, name):
    """Names of the trainings that have a file."""
    return {row.name for row in snapshot(study_dir).rows if (row.place(study_dir) / name).exists()}


@pytest.mark.parametrize("left", ["nothing", "the one before"])
def test_only_a_better_trial_changes_it_and_the_next_search_mends_what_a_kill_has_left(study_dir, left):
    recipe = stand_in.make_recipe(4)
    with searching(study_dir, recipe) as study:
        finish(study, study.next(), 0.9)
        assert not (study_dir / BEST).exists(), "a baseline is no trial"
        finish(study, study.next(), 0.3)
        old = (study_dir / BEST).read_bytes()
        first, second, third = study.next(), study.next(), study.next()
        finish(study, second, 0.6)
        before = (study_dir / BEST).stat().st_ino
        finish(study, first, 0.5)
        study.settle(third, failed(third, "diverged"))
    with searching(study_dir, recipe):
        pass
    assert (study_dir / BEST).stat().st_ino == before
    assert load_recipe(study_dir / BEST).train.learning_rate == second.values["learning_rate"]
    (study_dir / BEST).unlink()
    if left != "nothing":
        (study_dir / BEST).write_bytes(old)
    with searching(study_dir, recipe):
        pass
    assert in_file(study_dir) == (second.name, 0.4)


@pytest.mark.slow
def test_weights_and_pictures_of_the_best_trials_and_of_all_baselines_stay(study_dir):
    """Of how many may change, and holds for the whole study."""
    both = {"plain": {"kl_weight": 0}, "other": {"kl_weight": 1}}
    for num_trials, keep in ((5, 4), (5, 2), (9, 3)):
        with searching(study_dir, stand_in.make_recipe(num_trials, keep_checkpoints=keep, baselines=both)) as study:
            while (spec := study.next()) is not None:
                for name in (WEIGHTS, THUMBNAILS):
                    files.write_bytes(spec.place(study_dir) / name, b"content")
                files.write_bytes(spec.place(study_dir) / "step-00000010" / "state.json", b"a checkpoint")
                files.write_bytes(spec.place(study_dir) / "own" / "file", b"of a function of one's own")
                finish(study, spec, (7 * spec.number) % 5 if spec.kind == "trial" else -100)
            ranked = [row.name for row in study.retention.ranked() if row.kind == "trial"]
        weights = with_file(study_dir, WEIGHTS)
        assert weights == with_file(study_dir, THUMBNAILS)
        assert {*both} <= weights
        assert len(weights) == len(both) + keep  # those that were gone do not come back, and take nobody's place
        places = sorted(ranked.index(name) for name in weights - {*both})
        assert places[0] <= 1
        assert not [*study_dir.glob("*/*/*/step-*"), *study_dir.glob("*/*/*/own")]


def figures(study_dir):
    return {name for name in (FIGURE_PNG, FIGURE_SVG) if (study_dir / name).exists()}


@pytest.mark.slow
def test_the_figure_is_drawn_however_a_search_ends_unless_it_cannot_be_written_or_the_study_was_taken_over(study_dir):
    recipe = curve_stand_in.make_recipe(3, baselines={})
    with searching(study_dir, recipe) as study:
        study.add_zero_shot(curve_stand_in.ZERO_SHOT)
        curve_stand_in.run_all(study)
    (study_dir / BEST).unlink()
    result = run_search(Plan(recipe, study_dir, around=figure_at_the_end))  # nothing is left to do
    assert in_file(study_dir) == (result.study.best.name, result.study.best.alpha)
    assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}
    for error in (ValueError("a bug"), KeyboardInterrupt()):
        (study_dir / FIGURE_PNG).unlink()
        with searching(study_dir, recipe) as study:
            with pytest.raises(type(error)) as raised, figure_at_the_end(study, 0):
                raise error
            assert raised.value is error
        assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}
    (study_dir / FIGURE_PNG).unlink()
    (study_dir / FIGURE_PNG).mkdir()
    with searching(study_dir, recipe) as study:
        with pytest.raises(InterruptedRunError), figure_at_the_end(study, 0):
            raise InterruptedRunError("stopped")
        with pytest.raises(StorageError, match=FIGURE_PNG), figure_at_the_end(study, 0):
            pass
        (study_dir / FIGURE_PNG).rmdir()
        (study_dir / BEST).unlink()
        take(study_dir)
        with pytest.raises(StorageError, match="has taken the study over"):
            recover_running(study)
        with pytest.raises(InterruptedRunError), figure_at_the_end(study, 0):
            raise InterruptedRunError("stopped")
    assert not (study_dir / BEST).exists()
    assert FIGURE_PNG not in figures(study_dir)
    study_dir = study_dir.with_name("none is complete")
    with searching(study_dir, stand_in.make_recipe(2)) as study, figure_at_the_end(study, 0):
        pass
    assert figures(study_dir) == set()
