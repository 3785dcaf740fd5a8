"""Confirming a search: which configurations are trained again, on which seeds, and what a kill leaves."""

import io
from dataclasses import replace

import crash_host
import pytest
import stand_in
from logs import write_line
from rich.console import Console
from stand_in import make_recipe

from carft_ray.errors import InterruptedRunError, NoSuccessfulTrialError, UsageError
from carft_ray.launch.events import Started
from carft_ray.recipe.loading import dump_recipe
from carft_ray.recipe.trial_values import apply
from carft_ray.results.confirm.configurations import (
    SEED_STEP,
    cost,
    first_stage,
    fix,
    fresh_seeds,
    last_stage,
    plan,
    read_plan,
    second_stage,
)
from carft_ray.results.reading.status_and_ls import num_test_reads
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.result import write_result
from carft_ray.study.ledger import read_ledger
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_confirm, recover_running
from carft_ray.study.rows import confirmations, trials
from carft_ray.study.warm_start import inherited_reads
from carft_ray.training.run_context import RunContext
from carft_ray.ui.progress import search_shown


def finish(study, spec, objective, alpha=0.5):
    metrics = {"id_accuracy": objective, "ood_accuracy": objective}
    content = {"objective": objective, "alpha": alpha, "metrics": metrics, "elapsed_s": 7.0}
    write_result(spec.place(study.study_dir), {**content, "fine_tuned": {"objective": objective / 2}})
    study.settle(spec)


def make_study(study_dir, objectives=(0.4, 0.5, 0.7, 0.6), **search):
    """A finished study: the baseline ``plain`` has the first objective, the trials have the others."""
    recipe = make_recipe(len(objectives) - 1, **search)
    with open_study(study_dir, recipe) as study:
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        recover_running(study)
        study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
        for objective in objectives:
            finish(study, study.next(), objective)
    return read_study(study_dir)


@pytest.fixture
def view(tmp_path):
    return make_study(tmp_path / "first")


def name_of(view, number):
    return next(row.name for row in view.trials if row.number == number)


def test_fresh_seeds_come_from_ranges_that_search_and_stages_do_not_share():
    recipe = make_recipe()
    stages = [set(fresh_seeds(recipe, stage, 1000)) for stage in (1, 2)]
    assert not stages[0] & stages[1]
    assert recipe.train.seed not in stages[0] | stages[1]
    assert fresh_seeds(recipe, 1, 5)[:3] == fresh_seeds(recipe, 1, 3)
    assert min(stages[0]) == recipe.train.seed + SEED_STEP + 1


@pytest.mark.slow
def test_winner_next_best_and_every_baseline_are_confirmed_each_at_its_own_alpha(view):
    stage = first_stage(view, top=2, num_seeds=3)
    rows = [(row.name, row.role, row.training, row.alpha, row.objective) for row in stage.rows]
    winner, second = name_of(view, 1), name_of(view, 2)
    assert rows == [
        (winner, "winner", winner, 0.5, 0.7),
        (second, "candidate", second, 0.5, 0.6),
        ("plain", "baseline", "plain", 0.5, 0.4),
        ("plain, alpha 1", "baseline", "plain", 1.0, 0.2),
        ("zero_shot", "baseline", None, 0.0, 0.25),
    ]
    assert stage.winner == winner


def fixed(view, first, second):
    with open_study(view.study_dir, view.recipe) as study:
        fix(study, view.recipe, first, second)


@pytest.mark.slow
def test_rows_that_differ_in_alpha_alone_share_trainings_and_all_rows_share_seeds(view):
    stage = first_stage(view, top=2, num_seeds=3)
    trainings = stage.trainings()
    assert len(trainings) == 3 * 3  # winner, candidate, plain
    assert {values["seed"] for values in trainings.values()} == set(stage.seeds)
    first = f"plain-seed{stage.seeds[0]}"
    assert trainings[first] == {"kl_weight": 0, "alpha": 0.5, "seed": stage.seeds[0]}


@pytest.mark.slow
def test_more_seeds_and_trials_are_added_to_what_is_there(view):
    first, notes = plan(view, 1, 3)
    assert notes == []
    fixed(view, first, None)
    more, notes = plan(view, 2, 5)
    assert notes == []
    assert set(first.trainings()) < set(more.trainings())
    assert more.seeds[:3] == first.seeds
    fixed(view, more, None)
    fewer, notes = plan(view, 1, 3)
    assert fewer.seeds == more.seeds
    assert {row.name for row in fewer.rows} == {row.name for row in more.rows}
    assert notes == ["5 seeds are there already; all of them are used"]


@pytest.mark.slow
def test_a_better_trial_of_a_search_that_went_on_is_the_new_winner_and_the_old_one_a_candidate(view):
    first, _ = plan(view, 1, 3)
    fixed(view, first, None)
    recipe = make_recipe(4)
    with open_study(view.study_dir, recipe) as study:
        recover_running(study)
        finish(study, study.next(), 0.9)
    now, [note] = plan(read_study(view.study_dir), 1, 3)
    assert note == f"the search continued after {first.winner} was fixed as the winner; now it is {now.winner}"
    roles = {row.name: row.role for row in now.rows}
    assert (roles[now.winner], roles[first.winner]) == ("winner", "candidate")
    assert [*roles.values()].count("winner") == 1


@pytest.mark.slow
def test_a_second_stage_measures_the_chosen_one_and_the_baselines_on_seeds_that_did_not_choose(view):
    first = first_stage(view, 3, 3)
    chosen = name_of(view, 2)
    second = second_stage(first, chosen, view.recipe)
    assert [row.name for row in second.rows if row.role == "winner"] == [chosen]
    assert {row.role for row in second.rows} == {"winner", "baseline"}
    assert len(second.seeds) == 3
    assert not set(second.seeds) & set(first.seeds)
    assert not second.trainings().keys() & first.trainings().keys()
    fixed(view, first, second)
    assert read_plan(view.study_dir) == (first, second)
    assert last_stage(view.study_dir) == second


@pytest.mark.slow
def test_the_winner_of_another_study_is_a_baseline_with_all_its_values(view, tmp_path):
    other = make_study(tmp_path / "plain search", (0.3, 0.65, 0.35))
    longer = other.recipe.train.model_copy(update={"epochs": view.recipe.train.epochs + 1})
    other = replace(other, recipe=other.recipe.model_copy(update={"train": longer}))
    stage = first_stage(view, 1, 2, [other])
    row = stage.rows[-1]
    best = next(row for row in other.trials if row.objective == 0.65)
    assert (row.name, row.role, row.objective) == (f"plain search {best.name}", "baseline", 0.65)
    assert row.training == f"other-plain-search-{best.name}"
    assert row.values["learning_rate"] == best.values["learning_rate"]
    assert row.values["epochs"] == longer.epochs
    assert "batch_size" not in row.values  # as here
    assert not {"seed", "alpha"} & row.values.keys()


def test_reads_of_the_test_sets_of_a_study_that_it_is_compared_with_count_here_too(view, tmp_path):
    other = make_study(tmp_path / "plain search", (0.3, 0.65, 0.35))
    for reason in ("", "once more"):
        write_line(other.study_dir, other.recipe, sets=("id_test",), reason=reason)
    first, notes = plan(view, 1, 2, [other])
    assert notes == [f"the test sets of {other.study_dir} were read 2 times; this counts here too"]
    for _ in range(2):  # the same command again
        with open_study(view.study_dir, view.recipe) as study:
            fix(study, view.recipe, first, None, [other])
        assert len(read_ledger(view.study_dir)) == 1
    assert (inherited_reads(view.study_dir), num_test_reads(view.study_dir)) == (2, 2)
    with open_study(view.study_dir, view.recipe) as study:  # without it, what was compared stays known
        fix(study, view.recipe, first, None)
    assert num_test_reads(view.study_dir) == 2
    third = make_study(tmp_path / "third")
    assert plan(third, 1, 2, [view])[1] == [
        f"the test sets of {view.study_dir} were read 2 times; this counts here too"
    ]


@pytest.mark.slow
def test_a_study_of_another_objective_is_no_baseline(view, tmp_path):
    other = make_study(tmp_path / "other", objective={"kind": "weighted_mean", "id_weight": 0.9})
    with pytest.raises(UsageError, match=r"--against .*other: must be a study like first, .*another search\.objective"):
        first_stage(view, 1, 2, [other])
    with pytest.raises(UsageError, match="must be another study, but got this one"):
        first_stage(view, 1, 2, [view])


def test_a_study_without_a_finished_trial_cannot_be_confirmed(tmp_path):
    recipe = make_recipe(2)
    with open_study(tmp_path / "study", recipe) as study:
        (tmp_path / "study" / "resolved.yaml").write_text(dump_recipe(recipe))
        recover_running(study)
    with pytest.raises(NoSuccessfulTrialError, match="must have a finished trial"):
        first_stage(read_study(tmp_path / "study"), 1, 2)


@pytest.mark.slow
def test_the_cost_counts_what_is_missing(view):
    stage = first_stage(view, 1, 2)
    assert cost(view, stage) == "2 configurations x 2 fresh seeds: 4 trainings to run of about 7 s each."
    with open_study(view.study_dir, view.recipe) as study:
        recover_confirm(study, stage.trainings())
        for _ in range(3):
            finish(study, study.next(), 0.5)
    now = read_study(view.study_dir)
    assert cost(now, stage).startswith("2 configurations x 2 fresh seeds: 1 training to run")


# the study


def run_confirm(study_dir, recipe, trainings, num_attempts=None):
    """A confirm without Ray; returns the names of what was trained."""
    trained = []
    with open_study(study_dir, recipe) as study:
        recover_confirm(study, trainings)
        while num_attempts != len(trained) and (spec := study.next()) is not None:
            folder = spec.folder(study_dir)
            folder.mkdir(parents=True, exist_ok=True)
            stand_in.train(apply(recipe, spec.values), folder, study_dir / "prepared", RunContext(), spec.attempt)
            assert study.settle(spec).outcome == "complete"
            trained.append(spec.name)
        assert study.done() == (num_attempts is None)
    return trained


@pytest.mark.slow
def test_a_confirm_trains_each_once_and_asks_the_sampler_for_nothing(view):
    trainings = first_stage(view, 2, 2).trainings()
    before = trials(view.study_dir)
    assert run_confirm(view.study_dir, view.recipe, trainings) == list(trainings)
    assert run_confirm(view.study_dir, view.recipe, trainings) == []
    assert trials(view.study_dir) == before
    rows = confirmations(view.study_dir)
    assert [row.name for row in rows] == list(trainings)
    assert [row.values for row in rows] == list(trainings.values())
    assert all(
        (view.study_dir / "confirm" / name / "attempt-1" / "fine_tuned.safetensors").exists() for name in trainings
    )


@pytest.mark.slow
def test_a_confirm_that_ended_early_goes_on_and_what_its_kill_left_running_is_recovered(view):
    trainings = first_stage(view, 1, 3).trainings()
    run_confirm(view.study_dir, view.recipe, trainings, num_attempts=2)
    with open_study(view.study_dir, view.recipe) as study:
        recover_confirm(study, trainings)
        spec = study.next()  # and the process is killed here
    rest = run_confirm(view.study_dir, view.recipe, trainings)
    assert rest == list(trainings)[2:]
    assert {row.name: row.attempt for row in confirmations(view.study_dir)}[spec.name] == 2


@pytest.mark.slow
def test_the_table_of_a_confirm_counts_the_trainings_of_its_own_stage(view, monkeypatch):
    first = first_stage(view, 2, 2)
    run_confirm(view.study_dir, view.recipe, first.trainings())
    second = second_stage(first, name_of(view, 2), view.recipe)
    run_confirm(view.study_dir, view.recipe, second.trainings(), num_attempts=1)  # and it is killed here
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    with search_shown(True, view.study_dir, 2, terminal, "confirm", second.trainings()) as on_event:
        on_event(Started(4, 1, 2, "2 CPUs, 1 a trial", "confirm"))
    assert "1 of 4 trainings with fresh seeds finished" in terminal.file.getvalue()

    def stopped(recipe, study_dir, fix, command, address, on_event, runner):
        on_event(Started(6, 6, 2, "2 CPUs, 1 a trial", "confirm"))
        raise InterruptedRunError("stopped")

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    monkeypatch.setattr("carft_ray.ui.console.err", terminal)
    monkeypatch.setattr("carft_ray.launch.runs.confirm.run_confirm", stopped)
    written = view.study_dir / "manifest.json"
    written.write_text(written.read_text().replace('"batch_size": 512', '"batch_size": 64'))  # of 64 images
    assert crash_host.call(["confirm", view.study_dir, "--top", 2, "--seeds", 2]) == 130
    assert "6 of 6 trainings with fresh seeds finished" in terminal.file.getvalue()


@pytest.mark.slow
def test_search_and_confirm_leave_each_others_unfinished_trainings_alone(view):
    recipe = make_recipe(5)
    trainings = first_stage(view, 1, 2).trainings()
    with open_study(view.study_dir, recipe) as study:
        recover_running(study)
        waiting = study.next()
    run_confirm(view.study_dir, recipe, trainings, num_attempts=1)
    assert trials(view.study_dir)[waiting.number].outcome == "running"
    with open_study(view.study_dir, recipe) as study:
        recover_running(study)
        assert study.next().name == waiting.name
        new = study.next()
        assert (new.kind, new.number) == ("trial", 4)
        assert study.next() is None
    assert run_confirm(view.study_dir, recipe, trainings) == list(trainings)[1:]
