"""The budget: when a search asks its trainings to stop, what it counts, and how it ends."""

import os
import time
from types import SimpleNamespace

import pytest
import ray
import stand_in
from crash_host import call
from logs import commits, holding, rewrite
from ray.tune.search import Searcher
from stand_in import make_recipe
from study_steps import searching
from tune_stand_in import Tune

from carft_ray.errors import BudgetError
from carft_ray.launch.budget import LARGEST_MARGIN, LEAST_MARGIN_S, expected_end, used_up
from carft_ray.launch.cluster.capacity import AtATime
from carft_ray.launch.command import Plan, run_search
from carft_ray.launch.driver import Driver
from carft_ray.launch.events import Stopping, TrialFinished
from carft_ray.launch.workers.runtime import Runner
from carft_ray.recipe.schema.recipe import BudgetConfig
from carft_ray.results.figure import figure_at_the_end
from carft_ray.results.reading import status_and_ls, study_view
from carft_ray.study.holding import stopping
from carft_ray.study.opening import open_study
from carft_ray.study.running import started
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_given

HOUR, GPU_HOUR = BudgetConfig(wall_time=3600), BudgetConfig(gpu_hours=1)


@pytest.mark.parametrize(
    ("budget", "passed_s", "gpu_s", "gpus", "longest_end_s", "is_used"),
    [
        (BudgetConfig(), 1e9, 1e9, 0, 0, False),
        (HOUR, 3600 - LEAST_MARGIN_S - 0.1, 0, 0, 0, False),  # ends a margin before
        (HOUR, 3600 - LEAST_MARGIN_S, 0, 0, 0, True),
        (HOUR, 3600 - LEAST_MARGIN_S - 60, 0, 0, 59.9, False),
        (HOUR, 3600 - LEAST_MARGIN_S - 60, 0, 0, 60, True),
        (GPU_HOUR, 0, 3599.9, 0, 0, False),
        (GPU_HOUR, 0, 3600, 0, 0, True),
        (GPU_HOUR, 0, 3600 - 8 * 10, 8, 9.9, False),  # what running trainings will hold until they end counts
        (GPU_HOUR, 0, 3600 - 8 * 10, 8, 10, True),
        (GPU_HOUR, 0, 3600 * (1 - LARGEST_MARGIN) - 1, 8, 1e6, False),  # of the limit a margin is at most a share
    ],
)
def test_when_a_budget_is_used_up(budget, passed_s, gpu_s, gpus, longest_end_s, is_used):
    words = used_up(budget, passed_s, gpu_s, gpus=gpus, longest_end_s=longest_end_s)
    limit = "wall_time, 3600 s" if budget == HOUR else "gpu_hours, 1"
    assert f"(budget.{limit})" in words if is_used else words == ""


@pytest.mark.parametrize(
    ("budget", "elapsed_s", "gpu_s", "before", "begun", "end"),
    [
        (BudgetConfig(), 100, 100, 0, 4, None),
        (HOUR, 900, 0, 0, 4, 16),
        (HOUR, 900, 0, 10, 14, 26),  # the wall time is that of this search
        (HOUR, 4000, 0, 0, 7, 7),
        (GPU_HOUR, 50, 900, 3, 4, 16),  # the GPU hours are those of the study
        (GPU_HOUR, 50, 0, 0, 2, None),
    ],
)
def test_where_a_budget_is_expected_to_end_a_search(budget, elapsed_s, gpu_s, before, begun, end):
    assert expected_end(budget, elapsed_s, gpu_s, before, begun) == end


@pytest.fixture
def tune(tmp_path):
    """Gives a search of 6 trials, 2 at a time, each on 2 GPUs, with a budget; its clock may be set back."""
    with searching(tmp_path / "study", make_recipe(6)) as study:
        yield lambda budget, tell=print: Tune(Driver(study, AtATime(2), tell, 2.0, budget))


def test_when_the_budget_ends_nothing_is_begun_and_what_runs_is_asked_to_stop(tune):
    events = []
    tune = tune(HOUR, events.append)
    first, second = tune.start(), tune.start()
    tune.finish(first)
    tune.driver.began -= 3600
    assert tune.start() is None
    reason = "budget: the wall time is used up (budget.wall_time, 3600 s)"
    assert stopping(tune.driver.study.log) == reason == tune.driver.study.stop.reason
    assert [event.num_running for event in events if isinstance(event, Stopping)] == [1]
    tune.end(second)  # it has written its checkpoint
    assert tune.start() == Searcher.FINISHED
    assert tune.driver.check_stop()
    assert tune.driver.out_of_budget
    assert tune.driver.failure is None


def test_a_stop_that_somebody_asked_for_first_is_no_end_of_the_budget(tune):
    tune = tune(HOUR)
    tune.start()
    (tune.driver.study.study_dir / "stop").write_text("asked by `carft-ray stop`\n")
    tune.driver.began -= 3600
    assert tune.driver.check_stop()
    assert tune.driver.out_of_budget == ""


def test_what_a_training_was_seen_to_need_at_its_end_makes_the_margin(tune):
    tune = tune(HOUR)
    first = tune.start()
    tune.report(first, {"epoch": 2, "step": 20})
    tune.look()
    path = tune.folder(first) / "metrics.jsonl"
    os.utime(path, (time.time() - 800, time.time() - 800))  # by the clock of a bucket, from which it was fetched
    tune.driver._attempts[first.trial_id].last_row -= 100
    tune.finish(first)
    tune.driver.began -= 3600 - LEAST_MARGIN_S - 400
    assert not tune.driver.check_stop()
    tune.driver.began -= 302
    assert tune.driver.check_stop()


def test_gpu_hours_of_all_attempts_are_kept_in_the_log_and_counted_by_the_next_search(tune):
    first_search = tune(GPU_HOUR)
    trial, other = first_search.start(), first_search.start()
    for trial_id in (trial.trial_id, other.trial_id):
        first_search.driver._attempts[trial_id].began -= 600
    first_search.finish(trial)
    first_search.die(other)  # it gets another attempt, but its time is gone
    study = first_search.driver.study
    assert 2 * 2 * 600 <= study.gpu_seconds() < 2 * 2 * 650  # and what passed meanwhile
    read = study_view.read_study(study.study_dir)
    assert sum(row.gpu_s for row in read.rows) == study.gpu_seconds()
    assert status_and_ls.status(read)["budget"]["gpu_hours_used"] == pytest.approx(study.gpu_seconds() / 3600, abs=0.01)

    second = tune(GPU_HOUR)
    again = second.start()
    second.driver._attempts[again.trial_id].began -= 601  # 20 minutes on 2 GPUs are left
    assert second.start() is None
    assert second.driver.out_of_budget.startswith("1 GPU hours are used")


def test_the_time_of_an_attempt_whose_driver_was_killed_is_counted_to_its_drivers_last_commit(tmp_path):
    study_dir, recipe = tmp_path / "study", make_recipe(2)
    with searching(study_dir, recipe) as study:
        spec = study.next()
        study.log.write(started(spec, 900.0, 4.0, 1, "n"))
    num = len(commits(study_dir))
    with holding(study_dir):  # by another process, long after the kill
        pass
    found = commits(study_dir)
    for number, commit in enumerate(found, 1):
        commit["time"] += 10 if number == num else 5000 if number > num else 0
    rewrite(study_dir, found)
    for _ in range(2):  # once only
        with searching(study_dir, recipe) as study:
            assert study.gpu_seconds() == pytest.approx(4 * 910, abs=4)


def test_a_search_counts_what_a_killed_confirm_has_used(tmp_path):
    study_dir, recipe = tmp_path / "study", make_recipe(2)
    with searching(study_dir, recipe):
        pass
    with open_study(study_dir, recipe) as study:
        recover_given(study, {"c1": {"kl_weight": 1.0}})
        study.log.write(started(study.next(), 900.0, 4.0, 1, "n"))
    with searching(study_dir, recipe) as study:
        assert study.gpu_seconds() == pytest.approx(4 * 900, abs=8)
        assert "confirm" not in study.journal.studies  # it does not continue it


@pytest.mark.slow
def test_a_search_whose_wall_time_is_used_up_ends_with_its_best_and_is_finished_by_another(
    tmp_path, monkeypatch, capsys
):
    ahead = [0]  # seconds that the clock of the search is set ahead once a trial is complete
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0])
    monkeypatch.setattr("carft_ray.launch.driver.time", clock)
    stand_in.tell(tmp_path, seconds=0.1)
    study_dir, runner = tmp_path / "study", Runner(stand_in.prepare, stand_in.train)
    recipe = make_recipe(400, epochs=3, resources={"executor": "debug"})

    def used(event):
        ahead[0] = 3600 if isinstance(event, TrialFinished) else ahead[0]

    budgeted = recipe.model_copy(update={"budget": HOUR})
    result = run_search(Plan(budgeted, study_dir, None, used, runner, around=figure_at_the_end))
    assert result.out_of_budget == "the wall time is used up (budget.wall_time, 3600 s)"
    assert (study_dir / "figure.png").exists()
    finished = [row for row in result.study.trials if row.outcome == "complete"]
    assert 1 <= len(finished) <= 2
    assert all(row.spent_s > 0 for row in finished)
    assert call(["status", study_dir]) == 0
    assert f"The last search ended early: {result.out_of_budget}." in capsys.readouterr().out
    fewer = budgeted.model_copy(
        update={"search": recipe.search.model_copy(update={"trials": len(result.study.trials) + 1})}
    )
    ahead[0] = 0
    again = run_search(Plan(fewer, study_dir, None, used, runner))
    assert again.out_of_budget == ""  # it was used up when the last trial had ended
    assert {row.outcome for row in snapshot(study_dir).trials} == {"complete"}
    assert not (study_dir / "stop").exists()


def test_gpu_hours_that_are_used_end_a_search_before_ray_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray, "init", lambda *words, **more: pytest.fail("Ray starts"))
    study_dir, recipe = tmp_path / "study", make_recipe(2).model_copy(update={"budget": GPU_HOUR})
    with searching(study_dir, recipe) as study:
        spec = study.next()
        study.settle(spec, spent=study.spent(spec, 3600, 1.0))
    with pytest.raises(BudgetError, match=r"1 GPU hours are used(?s:.*)no trial is complete") as nothing:
        run_search(Plan(recipe, study_dir, None))
    assert nothing.value.exit_code == 7
    assert f"carft-ray resume {study_dir} --set budget.gpu_hours=2" in str(nothing.value)
    assert call(["status", study_dir]) == 0
    assert "Budget: 1 of 1 GPU hours used." in capsys.readouterr().out
