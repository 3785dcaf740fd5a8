"""Warm starts: what the sampler is told of other studies, what is left out and refused, and kills on the way."""

import json
import re
import shutil

import crash_host
import pytest
from logs import commits, write_line
from optuna.trial import TrialState
from sources import absolute_paths
from stand_in import SANDBOX_SET
from study_steps import optuna_study, run_all, searching
from test_generations import NARROW, begin, recipe_of

from carft_ray.errors import RecipeError, StorageError
from carft_ray.launch.command import Plan, run_search
from carft_ray.recipe.loading import dump_recipe, load_recipe
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.results.reading.study_view import read_study
from carft_ray.store.log import log_of
from carft_ray.study.recipe_identity import study_recipe
from carft_ray.study.rows import best_row
from carft_ray.study.snapshot import snapshot
from carft_ray.study.warm_start import inherited_reads


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A study of 12 trials, every third diverged, and one that is begun."""
    folder = tmp_path_factory.mktemp("sources") / "first"
    begin(folder, recipe_of(13), 12, values=True)
    with searching(folder, recipe_of(13)) as study:
        study.next()
    return folder


@pytest.fixture
def first(original, tmp_path):
    return shutil.copytree(original, tmp_path / "first")


def warm(recipe, *sources):
    named = tuple(str(source) for source in sources)
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"warm_start": named})})


def taken_in(study_dir):
    return [trial for trial in optuna_study(study_dir).trials if "warm_from" in trial.user_attrs]


@pytest.mark.slow
def test_trials_of_another_study_are_for_the_sampler_alone(study_dir, first):
    with searching(study_dir, warm(recipe_of(3), first)) as study:
        assert study.notes == [f"warm start: 12 of 13 trials of {first} are used; left out: 1 not finished"]
        assert study.rows() == []
        specs = run_all(study, lambda spec: -1.0)
        (study_dir / "resolved.yaml").write_text(dump_recipe(study.recipe))
    assert [spec.number for spec in specs] == [12, 13, 14]  # three trials of its own were wanted
    assert [row.name for row in snapshot(study_dir).trials] == [spec.name for spec in specs]
    assert read_study(study_dir).num_finished == 3
    assert best_row(snapshot(study_dir).trials).objective == -1.0
    for theirs, ours in zip(optuna_study(first).trials, taken_in(study_dir), strict=False):
        assert (ours.state, ours.values, ours.params) == (theirs.state, theirs.values, theirs.params)
        assert (ours.constraints, ours.intermediate_values) == (theirs.constraints, theirs.intermediate_values)
        source = ours.user_attrs["warm_from"]
        assert (source["path"], source["trial"]) == (str(first), theirs.user_attrs["name"])
    assert {trial.state for trial in taken_in(study_dir)} == {TrialState.COMPLETE, TrialState.PRUNED}
    [taken] = [commit["records"] for commit in commits(study_dir) if "warm_from" in json.dumps(commit["operations"])]
    assert [record["kind"] for record in taken] == ["taken in"]  # so a kill leaves all of it or nothing


@pytest.mark.slow
def test_a_source_is_taken_in_once_and_may_be_gone_afterwards(study_dir, first, tmp_path):
    recipe = warm(recipe_of(1), f"{first}/")
    with searching(study_dir, recipe):
        pass
    with searching(first, recipe_of(14)) as study:  # has more by now
        run_all(study)
    shutil.copytree(first, tmp_path / "copy")
    shutil.rmtree(first)
    with searching(study_dir, recipe) as study:
        assert study.notes == []
    with searching(study_dir, warm(recipe_of(1), first, tmp_path / "copy")) as study:
        assert study.notes == [f"warm start: {tmp_path / 'copy'} is a copy of {first}, which is already in use"]
    assert len(taken_in(study_dir)) == 12


@pytest.mark.slow
def test_reads_of_the_test_sets_of_a_source_count_for_the_study_that_has_learned_from_it(study_dir, first, tmp_path):
    write_line(first, recipe_of(13), sets=("id_test",))
    with searching(study_dir, warm(recipe_of(3), first)) as study:
        assert study.notes[-1].endswith(f"of {first} were read once; this also counts for this study")
    assert inherited_reads(study_dir, log_of(study_dir)) == 1
    third = tmp_path / "third"
    with searching(third, warm(recipe_of(4), study_dir)):
        pass
    assert inherited_reads(third, log_of(third)) == 1


def test_what_lies_outside_is_left_out_by_reason(study_dir, first):
    space = {"learning_rate": NARROW, "weight_decay": {"low": 0.0, "high": 1.0}}
    with searching(study_dir, warm(recipe_of(1, train={"batch_size": 64}, **space), first)) as study:
        [note] = study.notes
        counts = re.fullmatch(
            r"warm start: 0 of 13 .*; left out: (\d+) with learning_rate outside the space, "
            r"(\d+) with batch_size outside the space, 1 not finished",
            note,
        )
        assert sum(map(int, counts.groups())) == 12
    assert taken_in(study_dir) == []
    other = study_dir.with_name("other")
    with searching(other, warm(recipe_of(1, **space), first)):
        pass
    rates = [trial.params["learning_rate"] for trial in taken_in(other)]
    assert 0 < len(rates) < 12
    assert all(1e-4 <= rate <= 1e-3 for rate in rates)
    assert {trial.params["weight_decay"] for trial in taken_in(other)} == {0.1}  # the source's own value
    another = recipe_of(1).model_dump()
    another["model"]["name"], another["data"]["train"]["num_per_class"] = "ViT-B-32", 5
    with searching(study_dir.with_name("third"), warm(Recipe.model_validate(another), first)) as study:
        assert study.notes == [f"warm start: 12 of 13 trials of {first} are used; left out: 1 not finished"]


def refused(recipe, study_dir):
    with pytest.raises(RecipeError) as caught, searching(study_dir, recipe):
        pass
    assert not study_dir.exists()  # the mended recipe may use the name
    return str(caught.value)


def test_a_source_with_another_objective_is_refused_with_all_that_differs(study_dir, first):
    def told(search, **data):
        recipe = recipe_of(1).model_dump()
        changed = {"search": {**recipe["search"], **search}, "data": {**recipe["data"], **data}}
        return refused(warm(Recipe.model_validate({**recipe, **changed}), first), study_dir)

    sketch = {"sketch": {**SANDBOX_SET, "domain": "sketch", "split": "val"}}
    found = told({"objective": {"kind": "harmonic"}}, ood_val=sketch)
    key = f"search.warm_start: {first}: must be a study with "
    assert f'{key}search.objective.kind of this one, "harmonic"' in found
    assert (
        f'{key}the sets of data.ood_val of this one, ["sketch"]: other objectives are not comparable, but got []'
        in found
    )
    assert "the classes" in told({}, classes=["star", "arrow"])
    assert "search.constraints" in told({"constraints": {"id_drop": {"zero_shot": 0.01}}})


def test_what_is_no_other_study_is_refused_with_the_nearest_one_all_at_once(study_dir, first, tmp_path):
    (tmp_path / "empty").mkdir()
    told = refused(warm(recipe_of(1), tmp_path / "frist", tmp_path / "empty"), study_dir)
    assert f"must be the folder of a study, but got no such folder; did you mean '{first}'?" in told
    assert f"{tmp_path / 'empty'}: must be the folder of a study, but got one without log/" in told
    begin(study_dir, recipe_of(2), 2)
    (study_dir / "resolved.yaml").write_text(before := dump_recipe(recipe_of(2)))
    with pytest.raises(RecipeError, match="nowhere: must be the folder of a study"):
        run_search(Plan(warm(recipe_of(2), tmp_path / "nowhere"), study_dir))
    assert (study_dir / "resolved.yaml").read_text() == before, "a refused source is not kept in the recipe"
    assert study_recipe(study_dir, log_of(study_dir)).search.warm_start == ()
    shutil.copytree(study_dir, tmp_path / "copy")
    for source, told in ((study_dir, "this one"), (tmp_path / "copy", "a copy of this one")):
        is_refused = pytest.raises(RecipeError, match=f"must be another study, but got {told}")
        with is_refused, searching(study_dir, warm(recipe_of(2), source)):
            pass


@pytest.mark.slow
def test_the_option_counts_from_the_working_directory_and_stays_in_the_resolved_recipe(study_dir, first, monkeypatch):
    begin(study_dir, recipe_of(2, train={"batch_size": 8}), 2)
    shutil.copytree(first, first.parent / "second")
    monkeypatch.chdir(first.parent)
    words = ["resume", "study", "--warm-start", "first", "--warm-start", "second", "--warm-start", "first"]
    assert crash_host.call(words) == StorageError.exit_code  # nothing to train, and no predictions to report
    sources = [str(first.resolve()), str(first.parent.resolve() / "second")]
    assert list(load_recipe(study_dir / "resolved.yaml").search.warm_start) == sources
    recipe = absolute_paths(recipe_of(2, search={"warm_start": ["../first"]}), study_dir.parent)
    assert recipe.search.warm_start == (str((study_dir.parent.parent / "first").resolve()),)
