"""``best.yaml`` and the figure: there, and of the trial that `status` names, however a search ends. No Ray runs."""

import re

import curve_stand_in
import pytest
import stand_in
from logs import take

from carft_ray import files
from carft_ray.errors import InterruptedRunError, StorageError
from carft_ray.launch.runs.search import run_search
from carft_ray.layout import BEST, FIGURE_PNG, FIGURE_SVG, THUMBNAILS, WEIGHTS
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.study_figure import figure_at_the_end
from carft_ray.store import result
from carft_ray.study.opening import open_study
from carft_ray.study.outcome import Failure
from carft_ray.study.recovery import recover_running
from carft_ray.study.rows import best_row, trials


@pytest.fixture
def study_dir(tmp_path):
    return (tmp_path / "study").resolve()


def write_result(study_dir, spec, objective, **more):
    metrics = {"objective": objective, "id_accuracy": objective, "ood_accuracy": objective}
    result.write_result(spec.place(study_dir), {"objective": objective, "alpha": 0.4, "metrics": metrics, **more})


def in_file(study_dir):
    """Name and alpha of the trial that best.yaml holds."""
    text = (study_dir / BEST).read_text()
    return re.match(r"# The best trial of this study, (\S+)\. ", text)[1], load_recipe(study_dir / BEST).train.alpha


def written(path):
    """Which file it is and when it was written; when it was read last does not count."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def in_study(study_dir):
    best = best_row(trials(study_dir))
    return best.name, best.alpha


@pytest.mark.slow
def test_the_best_trial_is_a_recipe_as_soon_as_it_is_told(study_dir, tmp_path):
    with open_study(study_dir, stand_in.make_recipe(6)) as study:
        recover_running(study)
        for objective in (0.9, 0.2, 0.3, 0.1, 0.5, 0.5, 0.4):  # that of the baseline first, which is no trial
            assert (study_dir / BEST).exists() == bool(study.rows() and study.rows()[0].outcome == "complete")
            spec = study.next()
            write_result(study_dir, spec, objective)
            study.settle(spec)
            if spec.kind == "trial":
                assert in_file(study_dir) == in_study(study_dir)
    best = best_row(trials(study_dir))
    recipe = load_recipe(study_dir / BEST)
    assert (best.number, recipe.train.learning_rate) == (3, best.values["learning_rate"])
    assert recipe.train.alpha == 0.4


def test_a_finished_training_keeps_no_checkpoint_nor_what_a_function_has_kept(study_dir):
    recipe = stand_in.make_recipe(1, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        spec = study.next()
        place, left = spec.place(study_dir), ("step-00000010", "own")
        write_result(study_dir, spec, 0.5)
        for again in (lambda: study.settle(spec), lambda: recover_running(study)):  # a kill may come between
            for name in left:
                (place / name).mkdir()
            again()
            assert {path.name for path in place.iterdir()} & {*left} == set()
            assert (place / "result.json").exists()


def test_only_a_better_trial_changes_it(study_dir, tmp_path):
    with open_study(study_dir, stand_in.make_recipe(3, baselines={})) as study:
        recover_running(study)
        first, second, third = study.next(), study.next(), study.next()
        write_result(study_dir, second, 0.5)
        study.settle(second)
        before = written(study_dir / BEST)
        write_result(study_dir, first, 0.4)
        study.settle(first)
        third.folder(study_dir).mkdir(parents=True, exist_ok=True)
        study.settle(third, Failure("diverged", "because", 1, 6))
    with open_study(study_dir, stand_in.make_recipe(3, baselines={})) as study:
        recover_running(study)
    assert written(study_dir / BEST) == before


@pytest.mark.parametrize("left", ["nothing", "the one before"])
def test_the_next_search_mends_what_a_kill_after_telling_has_left(study_dir, tmp_path, left):
    recipe = stand_in.make_recipe(2, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        for objective in (0.3, 0.6):
            before = (study_dir / BEST).read_bytes() if (study_dir / BEST).exists() else b""
            spec = study.next()
            write_result(study_dir, spec, objective)
            study.settle(spec)
    if left == "nothing":
        (study_dir / BEST).unlink()
    else:
        (study_dir / BEST).write_bytes(before)
        assert in_file(study_dir) != in_study(study_dir)
    with open_study(study_dir, recipe) as study:
        recover_running(study)
    assert in_file(study_dir) == in_study(study_dir)


@pytest.mark.slow
def test_the_best_point_of_a_pareto_search_is_followed_along_the_front(study_dir, tmp_path):
    recipe, seen = curve_stand_in.make_recipe(8, baselines={}), []
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot(curve_stand_in.ZERO_SHOT)
        while curve_stand_in.run_all(study, 1):
            seen.append(in_file(study_dir))
            assert seen[-1] == in_study(study_dir)
    assert len(set(seen)) > 1
    (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
    shown = status(read_study(study_dir))["best"]
    assert (shown["name"], shown["alpha"]) == in_file(study_dir)


def test_of_equal_points_the_first_trial_is_the_best_whichever_was_told_first(study_dir, tmp_path):
    with open_study(study_dir, curve_stand_in.make_recipe(2, baselines={})) as study:
        recover_running(study)
        first, second = study.next(), study.next()
        for spec in (second, first):
            write_result(study_dir, spec, 0.7, alpha=spec.values["alpha"])
            (spec.place(study_dir) / "fine_tuned.safetensors").write_bytes(b"weights")
            study.settle(spec)
    assert in_file(study_dir) == in_study(study_dir) == (first.name, first.values["alpha"])
    assert (first.place(study_dir) / "fine_tuned.safetensors").exists()


def finished(study_dir, num=3):
    """A finished study of a curve that can be drawn, without best.yaml and figure."""
    recipe = curve_stand_in.make_recipe(num, baselines={})
    with open_study(study_dir, recipe) as study:
        recover_running(study)
        study.add_zero_shot(curve_stand_in.ZERO_SHOT)
        curve_stand_in.run_all(study)
    (study_dir / BEST).unlink()
    return recipe


def figures(study_dir):
    return {name for name in (FIGURE_PNG, FIGURE_SVG) if (study_dir / name).exists()}


@pytest.mark.slow
def test_who_calls_run_search_gets_the_recipe_and_the_figure(study_dir, tmp_path):
    recipe = finished(study_dir)
    assert figures(study_dir) == set()
    result = run_search(recipe, study_dir, around=figure_at_the_end)  # nothing is left to do
    assert in_file(study_dir) == (result.best.name, result.best.alpha)
    assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_the_figure_is_drawn_however_a_search_ends(study_dir, tmp_path, error):
    recipe = finished(study_dir)
    with open_study(study_dir, recipe) as study:
        with pytest.raises(type(error)) as raised, figure_at_the_end(study, 0):
            raise error
        assert raised.value is error
    assert figures(study_dir) == {FIGURE_PNG, FIGURE_SVG}


@pytest.mark.slow
def test_a_figure_that_cannot_be_written_does_not_hide_why_the_search_has_ended(study_dir, tmp_path):
    recipe = finished(study_dir)
    (study_dir / FIGURE_PNG).mkdir()
    with open_study(study_dir, recipe) as study:
        with pytest.raises(InterruptedRunError), figure_at_the_end(study, 0):
            raise InterruptedRunError("stopped")
        with pytest.raises(StorageError, match=FIGURE_PNG), figure_at_the_end(study, 0):
            pass


def test_without_a_complete_trial_there_is_no_figure(study_dir, tmp_path):
    with open_study(study_dir, stand_in.make_recipe(2)) as study:
        recover_running(study)
        with figure_at_the_end(study, 0):
            pass
    assert figures(study_dir) == set()


@pytest.mark.slow
def test_a_search_that_was_taken_over_writes_neither(study_dir, tmp_path):
    recipe = finished(study_dir)
    with open_study(study_dir, recipe) as study:
        take(study_dir)
        with pytest.raises(StorageError, match="has taken the study over"):
            recover_running(study)
        with pytest.raises(InterruptedRunError), figure_at_the_end(study, 0):
            raise InterruptedRunError("stopped")
    assert not (study_dir / BEST).exists()
    assert figures(study_dir) == set()


def test_a_worse_trial_loses_its_weights_and_its_pictures(study_dir, tmp_path):
    with open_study(study_dir, stand_in.make_recipe(4, baselines={}, keep_checkpoints=2)) as study:
        recover_running(study)
        for objective in (0.4, 0.2, 0.5, 0.3):
            spec = study.next()
            write_result(study_dir, spec, objective)
            for name in (WEIGHTS, THUMBNAILS):
                files.write_bytes(spec.place(study_dir) / name, b"content")
            study.settle(spec)
        kept = [
            {name: (row.place(study_dir) / name).exists() for name in (WEIGHTS, THUMBNAILS)} for row in study.rows()
        ]
    assert [all(each.values()) for each in kept] == [any(each.values()) for each in kept] == [True, False, True, False]
