"""Inputs of strangers end in a result or one message: cases of ``fuzz.py``, and values that Hypothesis finds."""

import contextlib
import random
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import mutations
import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.parametrize(
    ("code", "said", "wrong"),
    [
        (0, "fine\n", ""),
        (4, "warning: x\nerror: data.train: must be\n    Do this.\n", ""),
        (1, "error: internal error: KeyError: 1\n", "internal error"),
        (1, "error: x\n", "exit code 1"),
        (4, "nothing\n", "without one message"),
        (4, "error: a\nerror: b\n", "without one message"),
        (6, "error: search: no trial succeeded; 1 of 1 failed in this way: KeyError: 'x'\n", "a training failed"),
        (0, 'Traceback (most recent call last):\n  File "x"\nKeyError\n', "Traceback"),
    ],
)
def test_what_must_not_be_is_told_from_results_and_messages(code, said, wrong):
    found = fuzz.judged(code, said, ("doctor",))
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_a_case_is_the_same_each_time():
    one, other = (random.Random("0 tar 7") for _ in range(2))
    assert mutations.damaged(one, b"a" * 400) == mutations.damaged(other, b"a" * 400)
    assert repr(mutations.anything(one)) == repr(mutations.anything(other))


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
    table, path = mutations.random_table(rng), folder / f"data.{ending}"
    with contextlib.suppress(pa.ArrowException):
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
    with contextlib.suppress(CarftError):
        source = open_set(base_dir=folder, source="table", path=path.name)
        for index in range(len(source)):
            source.content(index)
    assert not (folder.parent / mutations.CANARY).exists()
