"""What is kept of the best trials: weights, ``best.yaml`` and the figure, however a search ends. No Ray runs."""

import re

import curve_stand_in
import pytest
import stand_in
from logs import take
from study_steps import failed, finish, searching

from carft_ray import files
from carft_ray.errors import InterruptedRunError, StorageError
from carft_ray.launch.runs.search import run_search
from carft_ray.layout import BEST, FIGURE_PNG, FIGURE_SVG, THUMBNAILS, WEIGHTS
from carft_ray.recipe.loading import load_recipe
from carft_ray.results.study_figure import figure_at_the_end
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import baselines, best_row, trials


def in_file(study_dir):
    """Name and alpha of the trial that best.yaml holds."""
    text = (study_dir / BEST).read_text()
    return re.match(r"# The best trial of this study, (\S+)\. ", text)[1], load_recipe(study_dir / BEST).train.alpha


def in_study(study_dir):
    best = best_row(trials(study_dir))
    return best.name, best.alpha


def with_file(study_dir, name):
    """Names of the trainings that have a file."""
    return {row.name for row in trials(study_dir) + baselines(study_dir) if (row.place(study_dir) / name).exists()}


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
    assert in_file(study_dir) == in_study(study_dir)


def test_of_equal_points_the_first_trial_is_the_best_whichever_was_told_first(study_dir):
    with searching(study_dir, curve_stand_in.make_recipe(2, baselines={})) as study:
        first, second = study.next(), study.next()
        for spec in (second, first):
            metrics = {"objective": 0.7, "id_accuracy": 0.7, "ood_accuracy": 0.7}
            files.write_bytes(spec.place(study_dir) / WEIGHTS, b"weights")
            finish(study, spec, 0.7, alpha=spec.values["alpha"], metrics=metrics)
    assert in_file(study_dir) == in_study(study_dir) == (first.name, first.values["alpha"])
    assert first.name in with_file(study_dir, WEIGHTS)


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
            ranked = [row.name for row in sorted(study.rows(), key=lambda row: (-row.objective, row.number))]
        weights = with_file(study_dir, WEIGHTS)
        assert weights == with_file(study_dir, THUMBNAILS)
        assert {*both, ranked[0]} <= weights <= {*both, *ranked[:keep]}  # those that were gone do not come back
        assert len(weights) > len(both) + 1
        assert not [*study_dir.glob("*/*/*/step-*"), *study_dir.glob("*/*/*/own")]


def finished(study_dir):
    """A finished study of a curve that can be drawn, without best.yaml and figure."""
    recipe = curve_stand_in.make_recipe(3, baselines={})
    with searching(study_dir, recipe) as study:
        study.add_zero_shot(curve_stand_in.ZERO_SHOT)
        curve_stand_in.run_all(study)
    (study_dir / BEST).unlink()
    return recipe


def figures(study_dir):
    return {name for name in (FIGURE_PNG, FIGURE_SVG) if (study_dir / name).exists()}


@pytest.mark.slow
def test_the_figure_is_drawn_however_a_search_ends(study_dir):
    recipe = finished(study_dir)
    result = run_search(recipe, study_dir, around=figure_at_the_end)  # nothing is left to do
    assert in_file(study_dir) == (result.best.name, result.best.alpha)
    assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}
    for error in (ValueError("a bug"), KeyboardInterrupt()):
        (study_dir / FIGURE_PNG).unlink()
        with searching(study_dir, recipe) as study:
            with pytest.raises(type(error)) as raised, figure_at_the_end(study, 0):
                raise error
            assert raised.value is error
        assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}


@pytest.mark.slow
def test_there_is_no_figure_where_it_cannot_be_written_and_after_a_take_over_and_why_a_search_ended_is_told(study_dir):
    recipe = finished(study_dir)
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
