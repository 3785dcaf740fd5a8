"""Inputs of strangers end in a result or one message: cases of ``fuzz.py``, and values that Hypothesis finds."""

import contextlib
import subprocess
import sys

import fuzz
import mutations
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import open_set

from carft_ray.errors import CarftError

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_one_of_each_kind():
    cases = str(len(fuzz.KINDS))
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
