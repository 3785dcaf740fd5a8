"""Methods by name: each sets its own keys, and nothing else of a recipe."""

import re
from pathlib import Path

import pytest

from carft_ray.api.checks import load_recipe
from carft_ray.errors import UsageError
from carft_ray.recipe.loading import apply, recipe_of
from carft_ray.recipe.methods import OWN, methods
from carft_ray.recipe.schema.train import PENALTIES

RECIPE = "search_spaces/quickstart.yaml"


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_sets_its_own_keys_and_nothing_else(name):
    plain, recipe, method = load_recipe(RECIPE), load_recipe(RECIPE, {"method": name}), methods()[name]
    for key, value in recipe.train:
        if key not in OWN:
            assert value == getattr(plain.train, key), key
    assert {key for key in PENALTIES if getattr(recipe.train, key)} == set(method.start)
    space = {key: one for key, one in plain.search.space.items() if key not in OWN}
    assert {key: one for key, one in recipe.search.space.items() if key not in OWN} == space
    assert {*recipe.search.space} == {*space, *method.searched}
    without = {"space", "baselines"}
    assert recipe.search.model_dump(exclude=without) == plain.search.model_dump(exclude=without)
    assert recipe.model_copy(update={"train": plain.train, "search": plain.search}) == plain
    for baseline, values in plain.search.baselines.items():  # trains what it trains without the method
        assert apply(recipe, recipe.search.baselines[baseline]).train == apply(plain, values).train


def test_the_recipes_own_range_and_value_of_a_weight_are_kept():
    recipe = load_recipe(RECIPE)
    assert load_recipe(RECIPE, {"method": "car_ft"}) == recipe
    assert load_recipe(RECIPE, ["method=all_terms"]).search.space["kl_weight"] == recipe.search.space["kl_weight"]
    average = load_recipe(RECIPE, {"method": "car_ft_average", "train.epochs": 3}).train
    assert (average.kl_weight, average.teacher, average.epochs) == (recipe.train.kl_weight, "average", 3)


def test_a_baseline_that_is_written_as_nothing_keeps_the_values_of_the_recipe(tmp_path):
    written = re.sub(r"(?m)^    car_ft: .*$", "    car_ft:", Path(RECIPE).read_text())
    (tmp_path / "recipe.yaml").write_text(written)
    recipe = load_recipe(tmp_path / "recipe.yaml", ["method=feature_kd"])
    assert apply(recipe, recipe.search.baselines["car_ft"]).train == load_recipe(RECIPE).train


def test_a_baseline_that_is_set_beside_a_method_keeps_the_values_of_the_recipe():
    recipe = load_recipe(RECIPE, ["method=feature_kd", "search.baselines={mine: {learning_rate: 1e-4}}"])
    plain = load_recipe(RECIPE).train
    assert apply(recipe, recipe.search.baselines["mine"]).train == plain.model_copy(update={"learning_rate": 1e-4})


@pytest.mark.parametrize("key", ["train.kl_weight=3", "search.space.l2_sp_weight={low: 1, high: 2}"])
def test_a_method_with_an_override_of_its_keys_is_one_message(key):
    with pytest.raises(UsageError, match=f"--set {key.partition('=')[0]}: cannot be used with --method l2_sp"):
        load_recipe(RECIPE, ["method=l2_sp", key])


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UsageError) as found:
        recipe_of({"train": {}}, ["method=lipsum"])
    (problem,) = found.value.problems
    assert (problem.place, problem.nearest) == ("--method", "lipsum_ft")
    assert problem.allowed == tuple(methods())
