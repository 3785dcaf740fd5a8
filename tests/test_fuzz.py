"""Inputs of strangers end in a result or one message: cases of ``fuzz.py``, and values that Hypothesis finds."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import mutations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import open_set

from carft_ray.errors import CarftError
from carft_ray.recipe.loading import dump_recipe, load_recipe, recipe_of

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.whole
def test_three_of_each_kind():
    cases = str(3 * len(fuzz.KINDS))
    ended = subprocess.run([sys.executable, fuzz.__file__, "--cases", cases], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].split()[:2] == ["all", cases]


@FEW
@given(rng=st.randoms(use_true_random=False))
def test_a_recipe_with_any_values_is_valid_or_told_in_words_of_our_own(rng, tmp_path_factory):
    value = mutations.warped(rng, mutations.recipe_value(Path("/nowhere")))
    try:
        recipe = recipe_of(value)
    except CarftError as error:
        for problem in error.problems:
            assert not re.search(r"[Ii]nput|valid dictionary|tagged|instance|pydantic|form that is not", problem.rule)
        return
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


@FEW
@given(rng=st.randoms(use_true_random=False), ending=st.sampled_from(["parquet", "arrow"]))
def test_a_table_with_any_columns_is_listed_or_told(rng, ending, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    path = folder / f"data.{ending}"
    path.write_bytes(mutations.file_of(rng, mutations.random_table(rng), ending))
    with contextlib.suppress(CarftError):
        source = open_set(base_dir=folder, source="table", path=path.name)
        for index in range(len(source)):
            source.content(index)
    assert not (folder.parent / mutations.CANARY).exists()
