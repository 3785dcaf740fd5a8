"""Files of rows and columns: CSV, Parquet, Arrow. Small columns are read whole, one of images a row at a time.

What reading a row takes: of an Arrow file (which Feather is too) that row alone, since the file is mapped into memory,
for which it must not be compressed; of a Parquet file its row group up to the row, page by page, and nothing twice when
rows come in their order.
"""

import bisect
import csv
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

ENDINGS = (".csv", ".tsv", ".parquet", ".arrow", ".feather")
READ_ERRORS = (pa.ArrowException, OSError, ValueError, csv.Error)
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_ROWS, _RECENT = 32, 8  # rows of a Parquet file that are read at a time, and how many such parts stay in memory


def is_text_format(path: Path) -> bool:
    """Returns whether all values of a file are texts."""
    return path.suffix.lower() in (".csv", ".tsv")


def read_schema(path: Path) -> pa.Schema:
    """Returns the columns of a file; those of a CSV file are texts.

    Raises:
        READ_ERRORS: It is missing or damaged.
    """
    if is_text_format(path):
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=_delimiter(path)), None)
        if not names:
            raise ValueError("an empty file")
        return pa.schema([pa.field(name, pa.string()) for name in names])
    if path.suffix.lower() == ".parquet":
        return pq.read_schema(path, memory_map=True)
    with _mapped(path) as file:
        return _reader(file, None).schema


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Reads columns of a file whole; ``NAME.FIELD`` is the field of a struct.

    Raises:
        READ_ERRORS: It is missing or damaged.
    """
    roots = list(dict.fromkeys(name if name in read_schema(path).names else name.split(".")[0] for name in names))
    if is_text_format(path):
        table = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=roots, column_types=dict.fromkeys(roots, pa.string()), strings_can_be_null=False
            ),
        )
    elif path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path, memory_map=True) as file:
            table = file.read(columns=list(dict.fromkeys(names)))
    else:
        with _mapped(path) as file:
            table = pa.Table.from_batches(list(_batches(file, roots)), _reader(file, roots).schema)
    return pa.table({name: _column(table, name) for name in names})


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name in table.column_names:
        return table.column(name)
    column, field = name.split(".")
    return pa.compute.struct_field(table.column(column), field)


def open_rows(path: Path, column: str) -> "ParquetRows | ArrowRows":
    """Opens one column of a Parquet or Arrow file.

    Raises:
        READ_ERRORS: It is missing or damaged.
    """
    return ParquetRows(path, column) if path.suffix.lower() == ".parquet" else ArrowRows(path, column)


class ParquetRows:
    """A column of a Parquet file, a row at a time. Threads may share it.

    Args:
        path: The file.
        column: Name of the column.
    """

    def __init__(self, path: Path, column: str) -> None:
        self._file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        self._column = column
        groups = [self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups)]
        self._starts: list[int] = [0, *itertools.accumulate(groups)]
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, pa.Array] = OrderedDict()  # first row -> values
        self._group, self._next, self._parts = -1, 0, iter(())  # where reading continues

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._starts[-1]

    def value(self, row: int) -> Any:
        """Returns the value of a row, None for none.

        Raises:
            READ_ERRORS: It cannot be read.
        """
        with self._lock:
            for first, values in self._recent.items():
                if first <= row < first + len(values):
                    return values[row - first].as_py()
            group = bisect.bisect_right(self._starts, row) - 1
            if group != self._group or row < self._next:
                parts = self._file.iter_batches(_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
                self._group, self._next, self._parts = group, self._starts[group], parts
            while row >= self._next:
                first, values = self._next, next(self._parts).column(0)
                self._next += len(values)
                self._recent[first] = values
                while len(self._recent) > _RECENT:
                    self._recent.popitem(last=False)
            return values[row - first].as_py()


class ArrowRows:
    """A column of an Arrow file, a row at a time.

    Args:
        path: The file.
        column: Name of the column.

    Raises:
        READ_ERRORS: It is missing, damaged or compressed.
    """

    def __init__(self, path: Path, column: str) -> None:
        parts: list[pa.Array] = []
        with _mapped(path) as file:  # the arrays keep the mapping
            whole = file.read_buffer()
            kind = _reader(file, None).schema.field(column).type
            for batch in _batches(file, None):  # all columns: of a choice of them, pyarrow makes copies
                parts.append(batch.column(column))
                _check_mapped(parts[-1], whole)
        self._values = pa.chunked_array(parts, kind)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._values)

    def value(self, row: int) -> Any:
        """Returns the value of a row, None for none."""
        return self._values[row].as_py()


def _check_mapped(values: pa.Array, whole: pa.Buffer) -> None:
    """Raises where values are not views of their file: those of a compressed one are unpacked into memory.

    Raises:
        ValueError: They are not.
    """
    for buffer in values.buffers():
        if buffer is not None and buffer.size and not 0 <= buffer.address - whole.address < whole.size:
            rule = "a compressed Arrow file, of which no image can be read alone: write it with no compression"
            raise ValueError(rule)


def _mapped(path: Path) -> pa.MemoryMappedFile:
    if not path.stat().st_size:
        raise ValueError("an empty file")  # which cannot be mapped
    return pa.memory_map(str(path))


def _reader(file: pa.MemoryMappedFile, columns: Sequence[str] | None) -> Any:
    """Opens an Arrow file, or the stream that ``datasets`` writes; with some columns or all of them.

    Raises:
        READ_ERRORS: It is damaged, or a stream that is cut off between two batches.
    """
    file.seek(0)
    is_file = file.read(6) == b"ARROW1"
    if not is_file:
        file.seek(max(0, file.size() - len(_END_OF_STREAM)))
        if file.read() != _END_OF_STREAM:
            raise ValueError("it is cut off, or no Arrow file")
    opened = pa.ipc.open_file if is_file else pa.ipc.open_stream
    file.seek(0)
    if columns is None:
        return opened(file)
    names = opened(file).schema.names
    file.seek(0)
    return opened(file, options=pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns]))


def _batches(file: pa.MemoryMappedFile, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    reader = _reader(file, columns)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from reader


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","
