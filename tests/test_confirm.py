"""Confirm: which configurations are trained on fresh seeds, what was begun goes on, what counts for whom."""

import io
import json
from dataclasses import replace

import pytest
import short_sealed
import stand_in
from logs import write_line
from rich.console import Console
from stand_in import make_recipe
from study_steps import finish, searching

from carft_ray.errors import UsageError
from carft_ray.launch.command import Plan, run_confirm
from carft_ray.launch.events import Started
from carft_ray.launch.workers.runtime import Runner
from carft_ray.recipe.loading import dump_recipe
from carft_ray.results import confirm_plan
from carft_ray.results.confirm_numbers import chosen_from_lines
from carft_ray.results.reading.status_and_ls import num_test_reads
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.log import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.running import started
from carft_ray.study.snapshot import snapshot
from carft_ray.study.take_over import recover_given
from carft_ray.study.warm_start import inherited_reads
from carft_ray.ui.live import SearchView
from carft_ray.ui.progress import search_shown

pytestmark = pytest.mark.slow


def make_study(study_dir, objectives=(0.4, 0.5, 0.7, 0.6), **search):
    """A finished study: the baseline ``plain`` has the first objective, the trials have the others."""
    recipe = make_recipe(len(objectives) - 1, **search)
    with searching(study_dir, recipe) as study:
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        study.add_zero_shot({"objective": 0.25, "id_accuracy": 0.3, "ood_accuracy": 0.2})
        for objective in objectives:
            curve = [{"alpha": alpha, "objective": objective / scale} for alpha, scale in ((0.5, 1), (1.0, 2))]
            finish(study, study.next(), objective, alpha=0.5, curve=curve)
    return read_study(study_dir)


@pytest.fixture
def view(tmp_path):
    return make_study(tmp_path / "first")


@pytest.fixture
def other(tmp_path):
    return make_study(tmp_path / "plain search", (0.3, 0.65, 0.35))


def name_of(view, number):
    return next(row.name for row in view.trials if row.number == number)


def fixed(view, first, second=None, against=()):
    with open_study(view.study_dir, view.recipe) as study:
        confirm_plan.fix(study, view.recipe, first, second, against)


def test_winner_next_best_and_every_baseline_are_confirmed_each_at_its_own_alpha_on_the_same_seeds(view):
    stage = confirm_plan.first_stage(view, top=2, num_seeds=3)
    winner, second = name_of(view, 1), name_of(view, 2)
    expected = {name: each.objective for name, each in view.expected.by_name.items()}
    assert [(row.name, row.role, row.training, row.alpha, row.objective) for row in stage.rows] == [
        (winner, "winner", winner, 0.5, expected[winner]),
        (second, "candidate", second, 0.5, expected[second]),
        (f"{winner}, no penalties", "ablation", f"{winner}-no-penalties", 0.5, 0.0),
        ("plain", "baseline", "plain", 0.5, expected["plain"]),
        ("plain, alpha 1", "baseline", "plain", 1.0, 0.2),
        ("zero_shot", "baseline", None, 0.0, 0.25),
    ]
    trainings = stage.trainings()
    assert (
        len(trainings) == 4 * 3
    )  # winner, candidate, ablation, plain: rows that differ in alpha alone share trainings
    assert {values["seed"] for values in trainings.values()} == set(stage.seeds)
    first = f"plain-seed{stage.seeds[0]}"
    assert trainings[first] == {"kl_weight": 0, "alpha": 0.5, "seed": stage.seeds[0]}
    assert [row.chosen_from for row in stage.rows] == [3, 3, 1, 1, 1, 0]


def test_the_winner_is_trained_without_penalties_too_where_it_has_some_and_the_loop_is_ours(view):
    winner, ablation = (confirm_plan.first_stage(view, 1, 2).rows[index] for index in (0, 1))
    assert ablation.values == winner.values | {"kl_weight": 0}
    assert (ablation.role, ablation.alpha) == ("ablation", winner.alpha)
    assert "ablation" not in {row.role for row in confirm_plan.first_stage(view, 1, 2, ablation=False).rows}
    assert confirm_plan.without_penalties(view.recipe, ablation) == []
    own = view.recipe.train.model_copy(update={"function": "module:name"})
    mine = replace(view, recipe=view.recipe.model_copy(update={"train": own}))
    stage, notes = confirm_plan.plan(mine, 1, 2)
    assert "ablation" not in {row.role for row in stage.rows}
    assert notes == ["no ablation: the fine-tuning is your own function, which carft-ray cannot run without penalties"]


def test_points_of_a_front_keep_their_alphas_whichever_the_grids_are(view, other):
    winner = replace(confirm_plan.first_stage(view, 1, 2).rows[0], alpha=view.recipe.search.alpha.measured[-2])
    [free] = confirm_plan.without_penalties(view.recipe, winner)
    [own] = confirm_plan.without_penalties(view.recipe, replace(winner, values={**winner.values, "alpha": 0.437}))
    assert (free.values["alpha"], own.values["alpha"]) == (None, 0.437)
    point = replace(other.best, standing=2, alpha=0.35, values={**other.best.values, "alpha": 0.437})
    rival = confirm_plan.first_stage(view, 1, 2, [replace(other, trials=[point])]).rows[-1]
    assert rival.alpha == rival.values["alpha"] == 0.35  # else no training would measure it


def test_what_goes_on_with_a_comparison_has_its_options(view):
    def options(first, second=None, best=None):
        rows = read_study(view.study_dir).confirmations
        return confirm_plan.options_to_go_on(first, second, view.recipe, rows, best or first.winner)

    first = confirm_plan.first_stage(view, 2, 2, ablation=False)
    assert options(first) == "--top 2 --seeds 2 --no-ablation"
    second = confirm_plan.second_stage(first, name_of(view, 2), view.recipe)
    assert options(first, second) == "--top 2 --seeds 2 --winner confirmed --no-ablation"
    assert options(first, second, "t0009") == "--top 2 --seeds 2 --no-ablation"  # a better trial begins anew
    short_sealed.confirm(view.study_dir, {**first.trainings(), **second.trainings()}, stand_in.train)

    def without(*names):
        rows = [row for row in read_study(view.study_dir).confirmations if not row.name.startswith(names)]
        failed = [replace(row, outcome="diverged") for row in read_study(view.study_dir).confirmations]
        return [*rows, *(row for row in failed if row.name.startswith(names))]

    chosen, other = second.rows[0].training, first.rows[0].training
    seeds = tuple(f"{chosen}-seed{seed}" for seed in second.seeds)
    found = [without(*seeds), without(*seeds, other), without(chosen, other)]
    assert [confirm_plan.options_to_go_on(first, second, view.recipe, rows, first.winner) for rows in found] == [
        "--top 2 --seeds 2 --no-ablation",
        None,
        None,
    ]
    assert confirm_plan.options_to_go_on(first, None, view.recipe, without(other), first.winner) == (
        "--top 2 --seeds 2 --winner confirmed --no-ablation"
    )


def test_a_comparison_of_the_best_of_different_numbers_of_trainings_says_so():
    numbers = {
        "t0001": ("winner", 16),
        "plain": ("baseline", 1),
        "plain, alpha 1": ("baseline", 1),
        "zero_shot": ("baseline", 0),
    }
    rows = [{"name": name, "role": role, "chosen_from": number} for name, (role, number) in numbers.items()]
    line = "These configurations are the best of different numbers of trainings: t0001 (16), plain (1)."
    assert chosen_from_lines({"rows": rows}) == [line]
    assert chosen_from_lines({"rows": [row | {"chosen_from": 16} for row in rows[:2]]}) == []


def test_more_seeds_and_trials_are_added_to_what_is_there_and_a_better_trial_is_the_new_winner(view):
    first, notes = confirm_plan.plan(view, 1, 3)
    fixed(view, first)
    more, of_more = confirm_plan.plan(view, 2, 5)
    assert (notes, of_more) == ([], [])
    assert set(first.trainings()) < set(more.trainings())
    fixed(view, more)
    fewer, notes = confirm_plan.plan(view, 1, 3)
    assert fewer.trainings() == more.trainings()
    also = f"also measured, from an earlier call: {name_of(view, 2)}"
    assert notes == ["5 seeds already exist; all of them are used", also]
    with searching(view.study_dir, make_recipe(4)) as study:
        finish(study, study.next(), 0.9)
    now, [_, note, _] = confirm_plan.plan(read_study(view.study_dir), 1, 3)
    assert note == f"the search continued after {first.winner} was fixed as the winner; the winner is now {now.winner}"
    assert [row.name for row in now.rows if row.role == "winner"] == [now.winner]
    assert first.winner in [row.name for row in now.rows if row.role == "candidate"]


def test_a_second_stage_measures_the_chosen_one_and_the_baselines_on_seeds_that_did_not_choose(view):
    first = confirm_plan.first_stage(view, 3, 3)
    chosen = name_of(view, 2)
    second = confirm_plan.second_stage(first, chosen, view.recipe)
    assert [row.name for row in second.rows if row.role != "baseline"] == [chosen, f"{chosen}, no penalties"]
    assert second.rows[0].chosen_from == 3 + 3 * 3  # the trainings of the first stage chose it, too
    assert len({view.recipe.train.seed, *first.seeds, *second.seeds}) == 1 + 3 + 3
    assert not second.trainings().keys() & first.trainings().keys()
    fixed(view, first, second)
    assert confirm_plan.read_plan(view.study_dir) == (first, second)
    assert confirm_plan.last_stage(view.study_dir) == second


def test_the_winner_of_another_study_is_a_baseline_with_all_its_values(view, other):
    longer = other.recipe.train.model_copy(update={"epochs": view.recipe.train.epochs + 1})
    further = replace(other, recipe=other.recipe.model_copy(update={"train": longer}))
    row, namesake = confirm_plan.first_stage(view, 1, 2, [further, other, other]).rows[-2:]
    best = other.best
    assert (row.name, row.role, row.objective) == (f"plain search {best.name}", "baseline", best.expected)
    assert [row.training, namesake.training[:-13]] == [f"other-plain-search-{best.name}"] * 2
    assert row.values["learning_rate"] == best.values["learning_rate"]
    assert row.values["epochs"] == longer.epochs
    assert not {"seed", "alpha", "batch_size"} & row.values.keys()  # the last one is as here
    with pytest.raises(UsageError, match="must be another study, but got this one"):
        confirm_plan.first_stage(view, 1, 2, [view])
    objective = {"kind": "weighted_mean", "id_weight": 0.9}
    other = make_study(view.study_dir.with_name("other"), objective=objective)
    with pytest.raises(UsageError, match=r"--against .*other: must be a study like first, .*another search\.objective"):
        confirm_plan.first_stage(view, 1, 2, [other])


def test_reads_of_the_test_sets_of_a_study_that_it_is_compared_with_count_here_too(view, other, tmp_path):
    for reason in ("", "once more"):
        write_line(other.study_dir, other.recipe, sets=("id_test",), reason=reason)
    first, notes = confirm_plan.plan(view, 1, 2, [other])
    assert notes == [f"the test sets of {other.study_dir} were read 2 times; this also counts for this study"]
    for _ in range(2):  # the same command again
        fixed(view, first, against=[other])
        assert len(snapshot(view.study_dir).ledger) == 1
    assert (
        inherited_reads(view.study_dir, log_of(view.study_dir)),
        num_test_reads(view.study_dir, log_of(view.study_dir)),
    ) == (2, 2)
    fixed(view, first)  # without it, what was compared stays known
    assert num_test_reads(view.study_dir, log_of(view.study_dir)) == 2
    third = confirm_plan.plan(make_study(tmp_path / "third"), 1, 2, [view])
    assert third[1] == [f"the test sets of {view.study_dir} were read 2 times; this also counts for this study"]


def test_a_confirm_that_ended_early_goes_on_trains_each_once_and_asks_the_sampler_for_nothing(view):
    study_dir, stage = view.study_dir, confirm_plan.first_stage(view, 2, 2)
    trainings, before = stage.trainings(), snapshot(study_dir).trials
    short_sealed.confirm(study_dir, trainings, stand_in.train, num_attempts=2)
    cost = confirm_plan.cost(read_study(study_dir), stage)
    assert cost.startswith("4 configurations x 2 fresh seeds: 6 trainings to run of about ")
    with open_study(study_dir, view.recipe) as study:
        recover_given(study, trainings)
        spec = study.next()  # and the process is killed here
    assert short_sealed.confirm(study_dir, trainings, stand_in.train) == list(trainings)[2:]
    assert short_sealed.confirm(study_dir, trainings, stand_in.train) == []
    assert confirm_plan.cost(read_study(study_dir), stage) == "All 8 trainings with fresh seeds already exist."
    assert snapshot(study_dir).trials == before
    rows = {row.name: row for row in snapshot(study_dir).confirmations}
    assert {name: row.values for name, row in rows.items()} == trainings
    assert {name: row.attempt for name, row in rows.items()} == {**dict.fromkeys(trainings, 1), spec.name: 2}
    assert all((rows[name].place(study_dir) / "fine_tuned.safetensors").exists() for name in trainings)


def test_a_confirm_that_runs_in_another_way_leaves_the_study_the_recipe_of_its_search(view):
    debug = view.recipe.resources.model_copy(update={"executor": "debug"})
    recipe, before = view.recipe.model_copy(update={"resources": debug}), (view.study_dir / "resolved.yaml").read_text()
    trainings = {"plain-seed7": {"kl_weight": 0, "alpha": 0.5, "seed": 7}}
    runner = Runner(stand_in.prepare, stand_in.train)
    run_confirm(Plan(recipe, view.study_dir, runner=runner, given=lambda study: trainings), lambda study: None)
    assert [(row.name, row.outcome) for row in snapshot(view.study_dir).confirmations] == [("plain-seed7", "complete")]
    assert study_recipe(view.study_dir, log_of(view.study_dir)) == view.recipe != recipe
    assert (view.study_dir / "resolved.yaml").read_text() == before


def test_the_table_of_a_confirm_counts_the_trainings_of_its_own_stage(view):
    first = confirm_plan.first_stage(view, 2, 2)
    short_sealed.confirm(view.study_dir, first.trainings(), stand_in.train)
    second = confirm_plan.second_stage(first, name_of(view, 2), view.recipe)
    short_sealed.confirm(view.study_dir, second.trainings(), stand_in.train, num_attempts=1)  # and it is killed here
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    with search_shown(True, view.study_dir, 2, terminal, "confirm", second.trainings()) as on_event:
        on_event(Started(4, 1, 2, "2 CPUs, 1 per trial", "confirm"))
    assert "1 of 4 trainings with fresh seeds finished" in terminal.file.getvalue()


def test_another_process_counts_the_trainings_of_a_confirm_that_runs(view):
    stage = confirm_plan.first_stage(view, 1, 2)
    with open_study(view.study_dir, view.recipe) as study:
        confirm_plan.fix(study, view.recipe, stage, None)
        recover_given(study, stage.trainings())
        study.log.write(started(study.next(), 1.0, 0.0, 1, ""))
        line = SearchView.of(read_study(view.study_dir)).line()
    assert line.startswith(f"0 of {len(stage.trainings())} trainings with fresh seeds finished · 1 running")


def test_search_and_confirm_leave_each_others_unfinished_trainings_alone(view):
    recipe = make_recipe(5)
    trainings = confirm_plan.first_stage(view, 1, 2).trainings()
    with searching(view.study_dir, recipe) as study:
        waiting = study.next()
    short_sealed.confirm(view.study_dir, trainings, stand_in.train, num_attempts=1)
    assert snapshot(view.study_dir).trials[waiting.number].outcome == "running"
    with searching(view.study_dir, recipe) as study:
        assert study.next().name == waiting.name
        new = study.next()
        assert (new.kind, new.number) == ("trial", 4)
        assert study.next() is None
    assert short_sealed.confirm(view.study_dir, trainings, stand_in.train) == list(trainings)[1:]


def test_a_plan_has_any_seed_that_a_recipe_may_have(tmp_path):
    seeds = [2**60, 2**63 - 1]
    row = {"name": "x", "role": "winner", "training": "t0", "alpha": 1.0, "values": {}, "objective": 1}
    (tmp_path / "confirm").mkdir()
    content = {"first": {"winner": "x", "seeds": seeds, "rows": [row]}, "second": None}
    (tmp_path / "confirm" / "plan.json").write_text(json.dumps(content))
    assert [*confirm_plan.read_plan(tmp_path)[0].seeds] == seeds
