"""WILDS' FMoW, iWildCam and Camelyon17 from their folders: a table of metadata and a rule for the image's path.

Splits and rules are those of p-lambda/wilds, ``wilds/datasets/*_dataset.py``, with the official split scheme:
``train``, ``id_val`` and ``id_test`` are of the training domains, ``val`` and ``test`` of others.
"""

from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from carft_ray.data.benchmark_sets.facts import Facts
from carft_ray.data.benchmark_sets.layouts import STEP, Row, by_number, listed, unreadable_list
from carft_ray.data.listing import Listing
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.sets import BenchmarkSet

FMOW_TABLE, TABLE = "rgb_metadata.csv", "metadata.csv"
VAL_YEAR, TEST_YEAR = "2013", "2016"  # FMoW: first years of OOD validation and OOD test
VAL_HOSPITAL, TEST_HOSPITAL = "1", "2"  # Camelyon17


def fmow(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``images/rgb_img_<row>.png``: rows of the table, counted from 0 with the sequestered ones."""
    table = _columns(root / FMOW_TABLE, "split", "category", "timestamp")
    rows: list[Row] = []
    for index, (split, category, timestamp) in enumerate(zip(*table, strict=True)):
        year = timestamp[:4]  # 2016-01-01T00:00:00Z
        shifted = "test" if year >= TEST_YEAR else "val" if year >= VAL_YEAR else None
        own = {"train": "train", "val": "id_val", "test": "id_test"}.get(split) if shifted is None else None
        if (own or (shifted if split == shifted else None)) == spec.split:
            rows.append((f"images/rgb_img_{index}.png", category))
    return listed(root, rows, place)


def iwildcam(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``train/<filename>``, which holds the images of all splits."""
    path = root / TABLE
    table = zip(*_columns(path, "split", "filename", "y"), strict=True)
    rows = [(f"train/{file}", by_number(y, 0, facts, path, file)) for split, file, y in table if split == spec.split]
    return listed(root, rows, place)


def camelyon17(root: Path, spec: BenchmarkSet, facts: Facts, place: str) -> Listing:
    """Lists ``patches/patient_P_node_N/patch_patient_P_node_N_x_X_y_Y.png``."""
    path = root / TABLE
    rows: list[Row] = []
    names = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
    for patient, node, x, y, tumor, center, number in zip(*_columns(path, *names), strict=True):
        own = {"0": "train", "1": "id_val"}.get(number)
        if {VAL_HOSPITAL: "val", TEST_HOSPITAL: "test"}.get(center, own) == spec.split:
            folder = f"patient_{patient}_node_{node}"
            file = f"patches/{folder}/patch_{folder}_x_{x}_y_{y}.png"
            rows.append((file, by_number(tumor, 0, facts, path, file)))
    return listed(root, rows, place)


def _columns(path: Path, *names: str) -> list[list[str]]:
    """Returns columns of a CSV file as texts."""
    texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    try:
        table = csv.read_csv(path, convert_options=texts)
    except (OSError, pa.ArrowException) as error:
        raise unreadable_list(path, error) from error
    if absent := [name for name in names if name not in table.column_names]:
        there = tuple(table.column_names)
        rule = f"must have the columns {', '.join(names)}"
        raise DataError(Problem(str(path), rule, f"no {absent[0]}", there, nearest(absent[0], there), STEP))
    return [table[name].to_pylist() for name in names]
