"""A Pareto search: what the sampler is told, what is counted, what is the best, and what readers and confirm say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import crash_host
import curve_stand_in
import numpy as np
import pytest
import short_study
import short_training
from curve_stand_in import ZERO_SHOT, make_recipe, metrics_at, run_all
from logs import set_recipe
from optuna.trial import TrialState
from study_steps import finish, optuna_study, searching

from carft_ray.launch.command import Ran
from carft_ray.recipe.loading import apply, load_recipe
from carft_ray.recipe.schema.recipe import alone
from carft_ray.results.confirm_numbers import summarise
from carft_ray.results.confirm_plan import cost, first_stage, fix, last_stage, plan, second_stage, write_plan
from carft_ray.results.figure import rendered, study_figure
from carft_ray.results.reading.finished import open_finished
from carft_ray.results.reading.status_and_ls import status
from carft_ray.results.reading.study_view import read_study
from carft_ray.results.reading.trained import open_trained
from carft_ray.results.report import study_report
from carft_ray.results.reproduce import reproduce
from carft_ray.results.rescore import asked_objective, rescore
from carft_ray.results.search_summary import search_summary
from carft_ray.study.attributes import TRAINING_OF
from carft_ray.study.journal import trial_name
from carft_ray.study.opening import open_study
from carft_ray.study.pareto_front import front_of, non_dominated, points_of
from carft_ray.study.rows import is_training
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_given
from carft_ray.training.run import prepare, run_training
from carft_ray.training.run_context import RunContext


@pytest.mark.slow
def test_a_training_is_told_its_own_point_and_at_most_four_others_that_it_does_not_beat_and_counts_once(study_dir):
    recipe = make_recipe(6)
    with searching(study_dir, recipe) as study:
        study.add_zero_shot(ZERO_SHOT)
        specs = [spec for spec in run_all(study) if spec.kind == "trial"]
    search, rows = optuna_study(study_dir), snapshot(study_dir).trials
    assert [direction.name for direction in search.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert [row.name for row in rows] == [trial_name(spec.number, spec.values) for spec in specs]
    assert len(search.trials) > len(rows) == 6
    assert [trial.number for trial in search.trials if is_training(trial)] == [row.number for row in rows]
    for row in rows:
        own = search.trials[row.number]
        drawn = own.params["alpha"]
        train = curve_stand_in.apply(recipe, row.values).train
        expected = metrics_at(train, drawn)
        assert own.values == [expected["id_accuracy"], expected["ood_accuracy"]]
        others = [trial for trial in search.trials if trial.user_attrs.get(TRAINING_OF) == row.number]
        alphas = sorted({*curve_stand_in.GRID[1:], drawn})
        pairs = np.array([[metrics_at(train, a)["id_accuracy"], metrics_at(train, a)["ood_accuracy"]] for a in alphas])
        allowed = {alphas[i] for i in non_dominated(pairs)} - {drawn}
        assert {trial.params["alpha"] for trial in others} <= allowed
        assert len(others) == min(4, len(allowed))
        for trial in others:
            assert (trial.state, trial.constraints) == (TrialState.COMPLETE, own.constraints)
            assert {**trial.params, "alpha": drawn} == own.params
        assert {point["alpha"] for point in row.points} == set(alphas)
    with searching(study_dir, make_recipe(8)) as study:
        assert len(run_all(study)) == 2


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A Pareto study, and one with constraints, of real trainings of a fraction of a second."""
    folder = tmp_path_factory.mktemp("real")
    path = short_training.make(folder)
    both = [f"data.cache_dir={folder / 'cache'}", "search.trials=3", "train.epochs=2"]
    both.append("search.baselines={plain: {kl_weight: 0}}")
    more = {
        "pareto": ["alpha={mode: sample}", "space.alpha={low: 0.1, high: 1}", "objective={kind: pareto}"],
        "constrained": ["constraints={id_drop: {plain: 0.05, zero_shot: 0.2}}"],
    }
    recipes = {name: load_recipe(path, [*both, *(f"search.{each}" for each in more[name])]) for name in more}
    return {name: short_study.search((folder / name).resolve(), recipe) for name, recipe in recipes.items()}


@pytest.mark.slow
def test_a_real_pareto_study_is_reported_drawn_rescored_and_opened_at_its_best_point(searched, capsys):
    study_dir = searched["pareto"]
    view = read_study(study_dir)
    for row in view.trials:
        assert {point["alpha"] for point in row.points} == {*view.recipe.search.alpha.measured, row.values["alpha"]} - {
            0.0
        }
    best, answer = view.best, status(view)
    assert (best.name, best.alpha) in [(point.name, point.alpha) for point in front_of(view.trials)]
    assert (answer["front"]["num_trainings"], answer["front"]["num_points"]) == (3, len(points_of(view.trials)))
    assert [point["best"] for point in answer["front"]["points"]].count(True) == 1
    assert "3 trainings; the best by the rule knee" in answer["lines"][0]
    assert answer["best"]["on_front"]
    found = open_finished(study_dir)
    assert (found.name, found.result["alpha"], found.result["metrics"]) == (best.name, best.alpha, best.metrics)
    [winner, *_] = first_stage(view, 3, 2).rows
    assert (winner.name, winner.alpha) == (best.name, best.alpha)
    report = study_report(view)
    assert report["expected"] is None
    assert report["front"] == answer["front"]
    assert any("a confirm measures them again" in line for line in report["lines"])
    trained = open_trained(study_dir)
    assert (trained.result["alpha"], trained.result["metrics"]) == (best.alpha, best.metrics)
    assert load_recipe(study_dir / "best.yaml").train.alpha == best.alpha
    assert len(rendered(study_figure(view.recipe, study_dir, view.trials, view.baselines), "png")) > 10_000
    summary = search_summary(Ran(view, 3, 1.0, "", {}, None, ""))
    assert any(line.startswith(f"Best: {best.name}, ID ") for line in summary["lines"])
    assert json.loads(json.dumps(summary))["front"]["points"]
    answer = rescore(view, asked_objective(view.recipe, "harmonic"))
    assert answer["own_objective"]["kind"] == "pareto"
    assert [row["new_rank"] for row in answer["trials"]] == [1, 2, 3]
    for verb in ("status", "ls", "report", "rescore"):
        assert [crash_host.call([verb, folder]) for folder in searched.values()] == [0, 0]
    assert capsys.readouterr().out.count("Front of ID and OOD accuracy: ") == 2  # of status and of report


@pytest.mark.slow
def test_a_best_point_that_moves_along_its_curve_is_confirmed_there_and_nothing_is_trained_again(study_dir):
    objective = {"kind": "pareto", "best": "lexicographic", "tolerance": 0.15}

    def search(num_trials, *points):
        """A trial more, with points (ID, OOD): the last one at the alpha that was drawn, those before at 0.4."""
        recipe, curve = make_recipe(num_trials, objective=objective, baselines={}), []
        with searching(study_dir, recipe) as study:
            study.add_zero_shot(ZERO_SHOT)
            spec = study.next()
            for alpha, (one, other) in zip([0.4, spec.values["alpha"]][-len(points) :], points, strict=True):
                metrics = {"id_accuracy": one, "ood_accuracy": other, "objective": (one + other) / 2}
                curve.append({"alpha": alpha, **metrics})
            finish(study, spec, metrics["objective"], alpha=alpha, metrics=metrics, curve=curve)
        set_recipe(study_dir, recipe)
        return read_study(study_dir)

    def confirm(view):
        """What `confirm --top 1 --seeds 2` does; returns the stage, what was trained, and all that is said."""
        first, notes = plan(view, 1, 2, ablation=False)
        said = [*notes, cost(view, first)]
        trained = []
        with open_study(study_dir, view.recipe) as study:
            recover_given(study, fix(study, view.recipe, first, None))
            while (spec := study.next()) is not None:
                curve_stand_in.write_result(study, spec)
                assert study.settle(spec).outcome == "complete"
                trained.append(spec.name)
        return first, trained, said

    view = search(1, (0.70, 0.70), (0.80, 0.60))
    winner, drawn = view.best.name, view.best.values["alpha"]
    assert view.best.alpha == 0.4
    first, trained, _ = confirm(view)
    assert trained == [f"{winner}-seed{seed}" for seed in first.seeds]
    write_plan(study_dir, first, second_stage(first, winner, view.recipe))  # as with --winner confirmed

    view = search(2, (0.90, 0.50))
    assert (view.best.name, view.best.alpha) == (winner, drawn)
    now, trained, said = confirm(view)
    assert trained == []
    assert said == [
        f"the search continued: {winner} was at alpha 0.40, now it is at {drawn:.2f}",
        "All 2 trainings with fresh seeds already exist.",
    ]
    assert [(row.name, row.alpha) for row in now.rows if row.role == "winner"] == [(winner, drawn)]
    assert last_stage(study_dir) == now


@pytest.mark.slow
def test_a_real_confirm_has_numbers_at_every_point_at_which_its_winner_may_stand(searched, tmp_path):
    study_dir = Path(shutil.copytree(searched["pareto"], tmp_path / "study")).resolve()
    view = read_study(study_dir)
    first = plan(view, 1, 2)[0]
    with open_study(study_dir, view.recipe) as study:
        recover_given(study, fix(study, view.recipe, first, None))
        while (spec := study.next()) is not None:
            recipe, place = apply(alone(view.recipe), spec.values), spec.folder(study_dir)  # as a worker does
            prepare(recipe, study_dir / "prepared")
            run_training(recipe, place, study_dir / "prepared", RunContext(), spec.attempt)
            study.settle(spec)
    best = view.best
    for point in best.points:
        stands = replace(best, alpha=point["alpha"], objective=point["objective"], metrics=point)
        moved = replace(view, trials=[stands if row.name == best.name else row for row in view.trials])
        stage, _ = plan(moved, 1, 2)
        assert stage.trainings().keys() == first.trainings().keys()
        [winner] = [row for row in summarise(snapshot(study_dir), stage, None)["rows"] if row["role"] == "winner"]
        assert (winner["name"], winner["alpha"]) == (best.name, point["alpha"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pareto", "constrained"])
def test_trials_with_a_front_or_constraints_are_reproduced(searched, tmp_path, name):
    found = reproduce(open_finished(searched[name]), tmp_path / "again", *2 * [lambda told: None])
    assert found["differences"] == []
