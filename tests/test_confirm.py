"""Confirming a search: which configurations are trained again, on which seeds, what is refused, what a kill leaves."""

import io
import re
import shutil
from dataclasses import replace

import pytest
import short_sealed
import stand_in
from logs import write_line
from rich.console import Console
from stand_in import make_recipe

from carft_ray.errors import UsageError
from carft_ray.launch.events import Started
from carft_ray.recipe.loading import dump_recipe
from carft_ray.results.confirm import configurations
from carft_ray.results.reading.status_and_ls import num_test_reads
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.result import write_result
from carft_ray.study.ledger import read_ledger
from carft_ray.study.opening import open_study
from carft_ray.study.recovery import recover_confirm, recover_running
from carft_ray.study.rows import confirmations, trials
from carft_ray.study.warm_start import inherited_reads
from carft_ray.ui.progress import search_shown

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of stand-in trainings, and another one with which it can be compared."""
    folder = tmp_path_factory.mktemp("made")
    make_study(folder / "first")
    make_study(folder / "plain search", (0.3, 0.65, 0.35))
    return folder


@pytest.fixture
def view(made, tmp_path):
    return read_study(shutil.copytree(made / "first", tmp_path / "first"))


@pytest.fixture
def other(made, tmp_path):
    return read_study(shutil.copytree(made / "plain search", tmp_path / "plain search"))


def name_of(view, number):
    return next(row.name for row in view.trials if row.number == number)


def fixed(view, first, second=None, against=()):
    with open_study(view.study_dir, view.recipe) as study:
        configurations.fix(study, view.recipe, first, second, against)


# what is planned


def test_fresh_seeds_come_from_ranges_that_search_and_stages_do_not_share():
    recipe = make_recipe()
    stages = [set(configurations.fresh_seeds(recipe, stage, 1000)) for stage in (1, 2)]
    assert not stages[0] & stages[1]
    assert recipe.train.seed not in stages[0] | stages[1]
    assert configurations.fresh_seeds(recipe, 1, 5)[:3] == configurations.fresh_seeds(recipe, 1, 3)
    assert min(stages[0]) == recipe.train.seed + configurations.SEED_STEP + 1


def test_winner_next_best_and_every_baseline_are_confirmed_each_at_its_own_alpha_on_the_same_seeds(view):
    stage = configurations.first_stage(view, top=2, num_seeds=3)
    winner, second = name_of(view, 1), name_of(view, 2)
    assert [(row.name, row.role, row.training, row.alpha, row.objective) for row in stage.rows] == [
        (winner, "winner", winner, 0.5, 0.7),
        (second, "candidate", second, 0.5, 0.6),
        ("plain", "baseline", "plain", 0.5, 0.4),
        ("plain, alpha 1", "baseline", "plain", 1.0, 0.2),
        ("zero_shot", "baseline", None, 0.0, 0.25),
    ]
    trainings = stage.trainings()
    assert len(trainings) == 3 * 3  # winner, candidate, plain: rows that differ in alpha alone share trainings
    assert {values["seed"] for values in trainings.values()} == set(stage.seeds)
    first = f"plain-seed{stage.seeds[0]}"
    assert trainings[first] == {"kl_weight": 0, "alpha": 0.5, "seed": stage.seeds[0]}


def test_more_seeds_and_trials_are_added_to_what_is_there_and_a_better_trial_is_the_new_winner(view):
    first, notes = configurations.plan(view, 1, 3)
    fixed(view, first)
    more, of_more = configurations.plan(view, 2, 5)
    assert (notes, of_more) == ([], [])
    assert set(first.trainings()) < set(more.trainings())
    fixed(view, more)
    fewer, notes = configurations.plan(view, 1, 3)
    assert fewer.trainings() == more.trainings()
    assert notes == ["5 seeds are there already; all of them are used"]
    with open_study(view.study_dir, make_recipe(4)) as study:
        recover_running(study)
        finish(study, study.next(), 0.9)
    now, [_, note] = configurations.plan(read_study(view.study_dir), 1, 3)
    assert note == f"the search continued after {first.winner} was fixed as the winner; now it is {now.winner}"
    assert [row.name for row in now.rows if row.role == "winner"] == [now.winner]
    assert first.winner in [row.name for row in now.rows if row.role == "candidate"]


def test_a_second_stage_measures_the_chosen_one_and_the_baselines_on_seeds_that_did_not_choose(view):
    first = configurations.first_stage(view, 3, 3)
    chosen = name_of(view, 2)
    second = configurations.second_stage(first, chosen, view.recipe)
    assert [row.name for row in second.rows if row.role != "baseline"] == [chosen]
    assert len({*first.seeds, *second.seeds}) == 3 + 3
    assert not second.trainings().keys() & first.trainings().keys()
    fixed(view, first, second)
    assert configurations.read_plan(view.study_dir) == (first, second)
    assert configurations.last_stage(view.study_dir) == second


def test_the_winner_of_another_study_is_a_baseline_with_all_its_values(view, other):
    longer = other.recipe.train.model_copy(update={"epochs": view.recipe.train.epochs + 1})
    other = replace(other, recipe=other.recipe.model_copy(update={"train": longer}))
    row = configurations.first_stage(view, 1, 2, [other]).rows[-1]
    best = other.best
    assert (row.name, row.role, row.objective) == (f"plain search {best.name}", "baseline", 0.65)
    assert row.training == f"other-plain-search-{best.name}"
    assert row.values["learning_rate"] == best.values["learning_rate"]
    assert row.values["epochs"] == longer.epochs
    assert not {"seed", "alpha", "batch_size"} & row.values.keys()  # the last one is as here
    with pytest.raises(UsageError, match="must be another study, but got this one"):
        configurations.first_stage(view, 1, 2, [view])
    objective = {"kind": "weighted_mean", "id_weight": 0.9}
    other = make_study(view.study_dir.with_name("other"), objective=objective)
    with pytest.raises(UsageError, match=r"--against .*other: must be a study like first, .*another search\.objective"):
        configurations.first_stage(view, 1, 2, [other])


def test_reads_of_the_test_sets_of_a_study_that_it_is_compared_with_count_here_too(view, other, made):
    for reason in ("", "once more"):
        write_line(other.study_dir, other.recipe, sets=("id_test",), reason=reason)
    first, notes = configurations.plan(view, 1, 2, [other])
    assert notes == [f"the test sets of {other.study_dir} were read 2 times; this counts here too"]
    for _ in range(2):  # the same command again
        fixed(view, first, against=[other])
        assert len(read_ledger(view.study_dir)) == 1
    assert (inherited_reads(view.study_dir), num_test_reads(view.study_dir)) == (2, 2)
    fixed(view, first)  # without it, what was compared stays known
    assert num_test_reads(view.study_dir) == 2
    third = configurations.plan(read_study(made / "plain search"), 1, 2, [view])
    assert third[1] == [f"the test sets of {view.study_dir} were read 2 times; this counts here too"]


# the study


def test_a_confirm_that_ended_early_goes_on_trains_each_once_and_asks_the_sampler_for_nothing(view):
    study_dir, stage = view.study_dir, configurations.first_stage(view, 2, 2)
    trainings, before = stage.trainings(), trials(study_dir)
    short_sealed.confirm(study_dir, trainings, stand_in.train, num_attempts=2)
    cost = configurations.cost(read_study(study_dir), stage)
    assert cost.startswith("3 configurations x 2 fresh seeds: 4 trainings to run of about ")
    with open_study(study_dir, view.recipe) as study:
        recover_confirm(study, trainings)
        spec = study.next()  # and the process is killed here
    assert short_sealed.confirm(study_dir, trainings, stand_in.train) == list(trainings)[2:]
    assert short_sealed.confirm(study_dir, trainings, stand_in.train) == []
    assert configurations.cost(read_study(study_dir), stage) == "All 6 trainings with fresh seeds are there already."
    assert trials(study_dir) == before
    rows = {row.name: row for row in confirmations(study_dir)}
    assert {name: row.values for name, row in rows.items()} == trainings
    assert {name: row.attempt for name, row in rows.items()} == {**dict.fromkeys(trainings, 1), spec.name: 2}
    assert all((rows[name].place(study_dir) / "fine_tuned.safetensors").exists() for name in trainings)


def test_the_table_of_a_confirm_counts_the_trainings_of_its_own_stage(view):
    first = configurations.first_stage(view, 2, 2)
    short_sealed.confirm(view.study_dir, first.trainings(), stand_in.train)
    second = configurations.second_stage(first, name_of(view, 2), view.recipe)
    short_sealed.confirm(view.study_dir, second.trainings(), stand_in.train, num_attempts=1)  # and it is killed here
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120, height=30)
    with search_shown(True, view.study_dir, 2, terminal, "confirm", second.trainings()) as on_event:
        on_event(Started(4, 1, 2, "2 CPUs, 1 a trial", "confirm"))
    assert "1 of 4 trainings with fresh seeds finished" in terminal.file.getvalue()


def test_search_and_confirm_leave_each_others_unfinished_trainings_alone(view):
    recipe = make_recipe(5)
    trainings = configurations.first_stage(view, 1, 2).trainings()
    with open_study(view.study_dir, recipe) as study:
        recover_running(study)
        waiting = study.next()
    short_sealed.confirm(view.study_dir, trainings, stand_in.train, num_attempts=1)
    assert trials(view.study_dir)[waiting.number].outcome == "running"
    with open_study(view.study_dir, recipe) as study:
        recover_running(study)
        assert study.next().name == waiting.name
        new = study.next()
        assert (new.kind, new.number) == ("trial", 4)
        assert study.next() is None
    assert short_sealed.confirm(view.study_dir, trainings, stand_in.train) == list(trainings)[1:]


# the command, with real trainings


@pytest.fixture
def here(tmp_path_factory, tmp_path, monkeypatch):
    """The working directory, with a copy of a study."""
    shutil.copytree(short_sealed.shared(tmp_path_factory) / "study", tmp_path / "study")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [("sketch", "sketch", "cartoon"), ("id_val", "photo_val", "photo_test")],
    ids=["a test set as one more OOD set", "the ID test set for validation"],
)
def test_a_confirm_with_a_recipe_that_was_changed_to_see_a_test_set_is_refused(here, run, key, old, new):
    path = here / "study" / "manifest.json"
    text = path.read_text()
    changed = re.sub(rf'(?s)("recipe":.*?"{key}".*?"domains":\s*\[\s*"){old}\b', rf"\g<1>{new}", text, count=1)
    assert changed != text
    path.write_text(changed)
    code, _, err = run("confirm", "study", "--top", "1", "--seeds", "2")
    assert code == 8
    assert "must not share images with data." in err
    assert not (here / "study" / "confirm").exists()
