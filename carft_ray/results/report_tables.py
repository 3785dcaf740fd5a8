"""The tables of a report as CSV files, from what a study has stored. No set is opened."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from carft_ray import files
from carft_ray.results.reading.study_view import Overview
from carft_ray.untrusted import csv_cell

_OF_SETS = pa.schema(
    [
        ("evidence", pa.string()),  # test sets, validation sets with fresh seeds, or the search
        ("name", pa.string()),  # of the configuration; of a difference, "winner - baseline"
        ("role", pa.string()),  # best, winner, baseline, ..., difference
        ("alpha", pa.float64()),
        ("set", pa.string()),  # or ood_mean, objective
        ("mean", pa.float64()),
        ("low", pa.float64()),  # 95 % interval, where there is one
        ("high", pa.float64()),
    ]
)


def curves_table(view: Overview) -> pa.Table:
    """Returns the alpha curves of all finished trials and baselines, a row per measured point.

    Columns: ``kind``, ``name``, ``alpha``, ``chosen``, then every metric of the points.
    """
    rows = [
        {"kind": row.kind, "name": row.name, "chosen": point["alpha"] == row.alpha, **point}
        for row in (*view.trials, *view.baselines)
        for point in view.result(row).get("curve") or ()
    ]
    own = {"kind": pa.string(), "name": pa.string(), "alpha": pa.float64(), "chosen": pa.bool_()}
    names = dict.fromkeys([*own, *(name for row in rows for name in row)])
    return pa.table({name: pa.array([row.get(name) for row in rows], own.get(name, pa.float64())) for name in names})


def sets_table(tables: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns accuracies per set with their intervals, and the differences to the baselines, a row per number.

    Args:
        tables: Of ``page.data.set_tables``, the best evidence first.
    """
    rows = [
        {"evidence": table["label"], "role": "difference", "alpha": None, **row, "set": name, **cell}
        for table in tables
        for row in (*table["rows"], *table["differences"])
        for name, cell in zip(table["sets"], row["cells"], strict=True)
        if cell
    ]
    return pa.table({each.name: pa.array([row.get(each.name) for row in rows], each.type) for each in _OF_SETS})


def write_tables(tables: Mapping[str, pa.Table], folder: Path) -> list[Path]:
    """Writes each table as ``NAME.csv``; returns the paths.

    Raises:
        StorageError: A file cannot be written.
    """
    paths = {folder / f"{name}.csv": table for name, table in tables.items()}
    for path, table in paths.items():
        files.write_bytes(path, _csv(table))
    return [*paths]


def _csv(table: pa.Table) -> bytes:
    for index, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_string(column.type):
            cells = pa.array([None if text is None else csv_cell(text) for text in column.to_pylist()], pa.string())
            table = table.set_column(index, name, cells)
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table.rename_columns([*map(csv_cell, table.column_names)]), buffer)
    return buffer.getvalue()
