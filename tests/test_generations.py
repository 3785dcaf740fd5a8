"""Search spaces that shrink and grow, without Ray: what becomes of the trials, and kills on the way."""

import shutil

import crash_host
import optuna
import pytest
from logs import commits, goes_on, kept, rewrite, write_line
from optuna.trial import TrialState
from stand_in import make_recipe, objective
from study_steps import failed, optuna_study, run_all, searching, write_result

import carft_ray
from carft_ray.errors import HoldOutError, RecipeError
from carft_ray.launch.command import Plan, run_search
from carft_ray.recipe.loading import apply, dump_recipe, load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.space import place
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.log import log_of
from carft_ray.study.opening import open_study
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.snapshot import snapshot

pytestmark = pytest.mark.slow

NARROW = {"low": 1e-4, "high": 1e-3, "log": True}


def recipe_of(num_trials=6, train=None, search=None, **space):
    recipe = make_recipe(num_trials, baselines={}, **(search or {})).model_dump()
    recipe["search"]["space"] |= space
    recipe["train"] |= train or {}
    return Recipe.model_validate(recipe)


def begin(study_dir, recipe, num_trials=6, values=False):
    """Runs trials whose objective is that of the stand-in; every third diverges."""
    with searching(study_dir, recipe) as study:
        (study_dir / "resolved.yaml").write_text(dump_recipe(recipe))
        for _ in range(num_trials):
            spec = study.next()
            failure = failed(spec, "diverged") if spec.number % 3 == 2 else None
            if failure is None:
                write_result(study_dir, spec, objective(apply(recipe, spec.values).train))
            if values:
                study.journal.report(spec, 1, 0.1 * spec.number)
            study.settle(spec, failure)
    return snapshot(study_dir).trials


def shown(rows):
    return [(row.number, row.name, row.values, row.outcome, row.objective, row.alpha, row.metrics) for row in rows]


def test_values_are_placed_with_the_fields_that_are_not_drawn():
    decay = {"choices": ["all", "matrices"]}
    recipe = recipe_of(decay=decay, weight_decay={"low": 0, "high": 1, "when": {"decay": ["all"]}})
    values = {"learning_rate": 1e-3, "kl_weight": 1.0, "decay": "all", "weight_decay": 0.5}
    assert place(values, recipe) == values
    assert place({**values, "decay": "matrices"}, recipe) == "weight_decay"  # it has its own value there
    own = {**values, "decay": "matrices", "weight_decay": recipe.train.weight_decay}
    assert place(own, recipe) == {key: value for key, value in own.items() if key != "weight_decay"}
    chain = recipe_of(
        decay=decay,
        head_bias={"choices": [True, False], "when": {"decay": ["matrices"]}},
        weight_decay={"low": 0, "high": 1, "when": {"head_bias": [False]}},  # which is its own value, too
    )
    assert place(values, chain) == "weight_decay"
    assert place({**values, "decay": "matrices"}, chain) == {**values, "decay": "matrices", "head_bias": False}
    assert place({**values, "epochs": 9}, recipe) == "epochs"
    assert place({**values, "learning_rate": 1.0}, recipe) == "learning_rate"


def test_narrowing_keeps_every_row_and_shows_the_sampler_those_inside(study_dir):
    before = begin(study_dir, recipe_of(), values=True)
    old = optuna_study(study_dir)
    narrow = recipe_of(10, learning_rate=NARROW)
    with pytest.raises(RecipeError, match="give --change-space"), open_study(study_dir, narrow):
        pass
    with searching(study_dir, narrow, True) as study:
        after = study.rows()
        inside = [row for row in before if 1e-4 <= row.values["learning_rate"] <= 1e-3]
        assert 0 < len(inside) < len(before)
        assert study.notes == [f"the search space has changed: {len(inside)} of 6 earlier trials inside the new one"]
        assert shown(after) == shown(before)
        assert [row.outside for row in after] == [row not in inside for row in before]
        specs = run_all(study, lambda spec: -1.0)
    assert [spec.number for spec in specs] == [6, 7, 8, 9]
    assert all(1e-4 <= spec.values["learning_rate"] <= 1e-3 for spec in specs)
    assert snapshot(study_dir).best.name in {row.name for row in before}  # wherever it lies
    new = optuna_study(study_dir)
    for one, other, row in zip(old.trials, new.trials, before, strict=False):
        assert other.intermediate_values == one.intermediate_values
        if row in inside:
            assert (other.state, other.values, other.constraints) == (one.state, one.values, one.constraints)
            assert (other.distributions["learning_rate"].low, other.params) == (1e-4, one.params)
        else:
            assert (other.state, other.params) == (TrialState.FAIL, {})
    space = optuna.search_space.intersection_search_space(new.get_trials(deepcopy=False))
    assert set(space) == {"learning_rate", "kl_weight"}  # of one range each, or tpe would drop them
    with open_study(study_dir, recipe_of(10), True):  # wide again: the trials are what they were
        pass
    for one, other in zip(old.trials, optuna_study(study_dir).trials, strict=False):
        assert (other.state, other.values, other.params) == (one.state, one.values, one.params)
        assert (other.constraints, other.user_attrs) == (one.constraints, one.user_attrs)
    recipes = kept(study_dir, "recipe")
    assert [one["search"]["space"]["learning_rate"]["low"] for one in recipes] == [1e-5, 1e-4, 1e-5]
    assert not any(row.outside for row in snapshot(study_dir).trials)


@pytest.mark.parametrize("is_inside", [True, False])
def test_a_new_parameter_has_the_value_of_train_in_old_trials_inside_the_space_or_not(study_dir, is_inside):
    before = begin(study_dir, recipe_of())
    wider = recipe_of(8, weight_decay={"low": 0.01 if is_inside else 0.3, "high": 1.0})
    with searching(study_dir, wider, True) as study:
        added = {"weight_decay": 0.1} if is_inside else {}
        assert [row.values for row in study.rows()] == [{**row.values, **added} for row in before]
        assert {spec.values["weight_decay"] for spec in run_all(study)}.isdisjoint({0.1})
    view = read_study(study_dir)
    rows = view.trials
    shown_values = [view.data(row)["values"]["weight_decay"] for row in rows]
    assert shown_values == [0.1] * 6 + [row.values["weight_decay"] for row in rows[6:]]
    with searching(study_dir, recipe_of(9), True) as study:  # removed: those with other values go
        assert [row.outside for row in study.rows()] == [False] * 6 + [True] * 2
        assert [spec.number for spec in run_all(study)] == [8]


def test_running_trials_are_recovered_inside_and_ended_outside_and_finished_ones_are_told(study_dir):
    with searching(study_dir, recipe_of(12)) as study:
        specs = [study.next() for _ in range(8)]
        outside = [spec for spec in specs if not 1e-4 <= spec.values["learning_rate"] <= 1e-3]
        inside = [spec for spec in specs if spec not in outside]
        assert len(outside) > 1
        assert inside
        write_result(study_dir, outside[0], 0.9)  # its driver died before it could tell
        outside[1].place(study_dir).mkdir(parents=True)
    with searching(study_dir, recipe_of(12, learning_rate=NARROW), True) as study:
        rows = study.rows()
        assert (rows[outside[0].number].outcome, rows[outside[0].number].objective) == ("complete", 0.9)
        for spec in outside[1:]:
            assert (rows[spec.number].outcome, rows[spec.number].name) == ("error", spec.name)
            assert rows[spec.number].reason == "outside the search space, which was changed while it ran"
        assert not outside[1].place(study_dir).exists()
        again = [study.next() for _ in inside]
        expected = [(s.number, s.name, s.values, 2) for s in inside]
        assert [(s.number, s.name, s.values, s.attempt) for s in again] == expected
        assert study.next().number == 8


def test_readers_and_the_command_line_follow_the_space(study_dir, capsys):
    before = begin(study_dir, recipe_of())
    with searching(study_dir, recipe_of(7, learning_rate=NARROW), True) as study:
        assert study_recipe(study_dir, log_of(study_dir)).search.space["learning_rate"].low == 1e-4
        run_all(study, lambda spec: 0.01)
    assert carft_ray.open_study(study_dir).best == snapshot(study_dir).best
    assert snapshot(study_dir).best.name in {row.name for row in before}
    num_outside = sum(row.outside for row in snapshot(study_dir).trials)
    for words, told in (
        (["ls", study_dir], "outside the space"),
        (["status", study_dir], "Outside the current search space: "),
        (["status", study_dir, "--json"], f'"outside": {num_outside}'),
    ):
        assert crash_host.call(words) == 0
        assert told in capsys.readouterr().out


def test_a_search_with_nothing_to_train_changes_the_space_and_the_resolved_recipe(study_dir, tmp_path):
    begin(study_dir, recipe_of())
    begin(tmp_path / "source", recipe_of(2), 2)
    narrow = recipe_of(search={"warm_start": [str(tmp_path / "source")]}, learning_rate=NARROW)
    notes = []
    result = run_search(Plan(narrow, study_dir, on_event=notes.append, change_space=True))
    assert (result.num_new, len(result.study.trials)) == (0, 6)
    assert [note.text.partition(":")[0] for note in notes] == ["the search space has changed", "warm start"]
    assert load_recipe(study_dir / "resolved.yaml") == narrow


def test_the_ledger_of_the_test_sets_stays_whole_and_an_option_without_a_change_is_told(study_dir):
    begin(study_dir, recipe_of())
    with open_study(study_dir, recipe_of(), True) as study:
        assert study.notes == ["--change-space has no effect: the search space is the same as in the study"]
    assert len(kept(study_dir, "recipe")) == 1
    write_line(study_dir, recipe_of(), sets=("id_test",))
    narrow = recipe_of(9, learning_rate=NARROW)
    with pytest.raises(HoldOutError, match="add --again REASON"):
        goes_on(study_dir, narrow, None, True)
    assert goes_on(study_dir, narrow, "a smaller space", True)
    with open_study(study_dir, narrow, True):
        pass
    assert [entry.purpose for entry in snapshot(study_dir).ledger] == ["test", "search went on"]


def test_nsga2_begins_its_generations_again_in_another_space(study_dir):
    def generations():
        return [each for trial in optuna_study(study_dir).trials for each in trial.system_attrs if "generation" in each]

    nsga2 = {"sampler": {"name": "nsga2", "population_size": 2}}
    begin(study_dir, recipe_of(search=nsga2))
    assert len(generations()) == 6
    with open_study(study_dir, recipe_of(search=nsga2, learning_rate=NARROW), True):
        pass
    assert generations() == []


def test_a_kill_at_any_moment_leaves_the_old_space_or_the_new_one(study_dir, tmp_path):
    """One commit holds the new recipe and the moved trials."""
    begin(study_dir, recipe_of())
    with searching(study_dir, recipe_of(8)) as study:
        study.next()
    num_before, new = len(commits(study_dir)), recipe_of(8, learning_rate=NARROW)
    with searching(study_dir, new, True):
        pass
    expected, found = shown(snapshot(study_dir).trials), commits(study_dir)
    for number in range(num_before, len(found)):
        part = shutil.copytree(study_dir, tmp_path / str(number))
        rewrite(part, found[:number])
        is_moved = len(kept(part, "recipe")) == len(kept(study_dir, "recipe"))
        other = recipe_of(8) if is_moved else new
        with pytest.raises(RecipeError, match="give --change-space"), open_study(part, other):
            pass
        with searching(part, new, True):
            assert shown(snapshot(part).trials) == expected, number
