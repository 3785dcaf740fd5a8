"""Files of rows and columns: CSV, Parquet, Arrow. Small columns are read whole, one of images a row at a time.

Files come from strangers. Of a struct the field that is wanted is read and no other, a used column has no extension
type, of which Ray's run code as soon as a value is asked for, and what Arrow maps is checked before it is trusted.

What reading a row takes: of an Arrow file (which Feather is too) that row alone, since the file is mapped into memory,
for which it must not be compressed; of a Parquet file its row group up to the row, page by page, and nothing twice when
rows come in their order.
"""

import bisect
import contextlib
import csv
import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from carft_ray.data.decode_images import MOST_BYTES, cause_of
from carft_ray.errors import DataError, Problem
from carft_ray.untrusted import open_regular, read_regular

ENDINGS = (".csv", ".tsv", ".parquet", ".arrow", ".feather")
READ_ERRORS = (pa.ArrowException, OSError, ValueError, SystemError, csv.Error)  # damaged names are a SystemError
MOST_CSV_BYTES, _HEAD = 2**30, 2**20  # of a CSV file, and of its first line
MOST_ROWS = 50_000_000  # of a file: a small one can state billions, and what is known of each is held in memory
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_TEXT_ROWS = 2**16  # rows of a Parquet file that are read at a time
_ROWS = 8  # the same, where they are images or fields of a struct, which pyarrow unpacks row by row
_RECENT, _RECENT_BYTES = 32, 2**26  # parts with images that stay in memory, and their bytes


def is_text_format(path: Path) -> bool:
    """Returns whether all values of a file are texts."""
    return path.suffix.lower() in (".csv", ".tsv")


def read_schema(path: Path) -> pa.Schema:
    """Returns the columns of a file; those of a CSV file are texts.

    Raises:
        READ_ERRORS: It is damaged.
        DataError: It is no regular file.
    """
    if is_text_format(path):
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(io.StringIO(file.read(_HEAD), newline=""), delimiter=_delimiter(path))
            names = next(filter(None, lines), None)  # Arrow passes over empty lines, too
        if not names:
            raise ValueError("an empty file")
        return pa.schema([pa.field(name, pa.string()) for name in names])
    with _mapped(path) as file:
        schema = pq.read_schema(file) if path.suffix.lower() == ".parquet" else _reader(file, None).schema
    _read_names(schema)
    return schema


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Raises ``UnicodeDecodeError`` for a name that is no text, which pyarrow does not before a name is asked for."""
    for field in fields:
        if field.name is not None:
            _read_names(field.type.field(index) for index in range(field.type.num_fields))


def extension_in(field: pa.Field) -> str:
    """Returns the name of an extension type that a column, or a field in it, has; empty for none.

    The name stands in the file, whether or not a library of this process has registered a type for it.
    """
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    if name := (field.metadata or {}).get(b"ARROW:extension:name"):
        return str(name.decode(errors="replace"))
    return next(filter(None, (extension_in(kind.field(index)) for index in range(kind.num_fields))), "")


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Reads columns of a file whole; ``NAME.FIELD`` is the field of a struct.

    Raises:
        READ_ERRORS: It is damaged, a column has an extension type, or the texts have more than ``MOST_CSV_BYTES``.
        DataError: It is no regular file, or a CSV file too large to be read whole.
    """
    schema = read_schema(path)
    wanted = {name: split_name(schema, name) for name in names}
    roots = list(dict.fromkeys(root for root, _ in wanted.values()))
    for root in roots:
        if extension := extension_in(schema.field(root)):
            raise ValueError(f"a column {root} with the extension type {extension}: write it again with plain values")
    if is_text_format(path):
        parts = pa.csv.read_csv(
            pa.BufferReader(read_regular(path, MOST_CSV_BYTES)),
            parse_options=pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=roots, column_types=dict.fromkeys(roots, pa.string()), strings_can_be_null=False
            ),
        ).to_batches()
        return _read_parts(parts, wanted)
    with _mapped(path) as file:
        is_parquet = path.suffix.lower() == ".parquet"
        return _read_parts(_parquet_batches(file, wanted) if is_parquet else _batches(file, roots), wanted)


def _read_parts(parts: Iterable[pa.RecordBatch], wanted: Mapping[str, tuple[str, str]]) -> pa.Table:
    """Returns the columns of all parts, texts without dictionaries.

    A repeated text stands once in a small file and in memory, but each row of Python's list has its own.

    Raises:
        READ_ERRORS: A part is damaged, or there are too many rows or texts.
    """
    found, num_rows, num_bytes = [], 0, 0
    for part in parts:
        part.validate(full=True)
        columns = [_field(part.column(root), field) for root, field in wanted.values()]
        num_rows += part.num_rows
        _check_rows(num_rows)
        num_bytes += sum(int(_lengths(values).sum()) for values in columns)
        if num_bytes > MOST_CSV_BYTES:
            raise ValueError(f"one with texts of more than {MOST_CSV_BYTES:,} bytes")
        found.append(pa.record_batch([_without_dictionary(values) for values in columns], list(wanted)))
    return pa.Table.from_batches(found) if found else pa.table({name: pa.array([]) for name in wanted})


def _parquet_batches(file: pa.MemoryMappedFile, wanted: Mapping[str, tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    said = pq.read_metadata(file)
    _check_rows(said.num_rows)  # before they are unpacked
    file.seek(0)
    leaves = {said.schema.column(index).path for index in range(said.num_columns)}
    plain = [name for name, (_, field) in wanted.items() if name in leaves and not field]
    parquet = pq.ParquetFile(file, metadata=said, read_dictionary=plain)  # a repeated text is held once
    has_fields = any(field for _, field in wanted.values())  # for which pyarrow cannot do that
    yield from parquet.iter_batches(_ROWS if has_fields else _TEXT_ROWS, columns=list(wanted))


def _lengths(values: pa.Array) -> npt.NDArray[np.int64]:
    """Returns how many bytes the text of each row has; none for a column of something else."""
    if pa.types.is_dictionary(values.type):
        lengths = _lengths(values.dictionary)
        return lengths[values.indices.drop_null().to_numpy()] if len(lengths) else lengths
    if not len(values) or not _is_text(values.type):
        return np.zeros(0, np.int64)
    if str(values.type).endswith("_view"):  # a length and a place, 16 bytes
        views = np.frombuffer(values.buffers()[1], np.int32)[::4]
        return views[values.offset : values.offset + len(values)].astype(np.int64)
    found: npt.NDArray[np.int64] = pa.compute.binary_length(values).fill_null(0).to_numpy().astype(np.int64)
    return found


def _is_text(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def _without_dictionary(values: pa.Array) -> pa.Array:
    is_text = pa.types.is_dictionary(values.type) and str(values.type.value_type) in ("string", "large_string")
    return values.dictionary_decode() if is_text else values


def _check_rows(number: int) -> None:
    if number > MOST_ROWS:
        raise ValueError(f"one of {number:,} rows, which is more than {MOST_ROWS:,}")


def split_name(schema: pa.Schema, name: str) -> tuple[str, str]:
    """Returns the column and the field that a name means; no field where it is a column's."""
    if name in schema.names:
        return name, ""
    root = next((root for root in schema.names if name.startswith(f"{root}.")), name)
    return root, name[len(root) + 1 :]


def _field(values: pa.Array | pa.ChunkedArray, field: str) -> Any:
    return pa.compute.struct_field(values, field) if field else values


def open_rows(path: Path, column: str) -> "ParquetRows | ArrowRows":
    """Opens one column of a Parquet or Arrow file.

    Raises:
        READ_ERRORS: It is missing or damaged.
    """
    return ParquetRows(path, column) if path.suffix.lower() == ".parquet" else ArrowRows(path, column)


def read_row(rows: "ParquetRows | ArrowRows", row: int, place: str) -> bytes:
    """Returns the bytes of an image in a row; ``place`` is its name for messages.

    Raises:
        DataError: The row has none, or they cannot be read.
    """
    with reading_table(place):
        content = rows.value(row)
    if content is None:
        step = "Write the table with the bytes of every image, or name a column with paths."
        raise DataError(Problem(place, "every row must contain the bytes of an image", "none", next_step=step))
    return content


@contextlib.contextmanager
def reading_table(place: str) -> Iterator[None]:
    """Turns what Arrow raises in the block into a ``DataError``; ``place`` is the table for the message."""
    try:
        yield
    except READ_ERRORS as error:
        cause = cause_of(error).strip().split("\n")[0]
        raise DataError(Problem(place, "must be a readable table", cause or type(error).__name__)) from error


class ParquetRows:
    """A column of a Parquet file, a row at a time. Threads may share it.

    Args:
        path: The file.
        column: Name of a column with bytes: its own, or those of the field ``bytes`` of a struct.
    """

    def __init__(self, path: Path, column: str) -> None:
        self._file = pq.ParquetFile(_mapped(path), pre_buffer=False)
        root, self._field = _content_field(self._file.schema_arrow, column)
        self._column = f"{root}.{self._field}" if self._field else root
        groups = [self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups)]
        self._starts: list[int] = [0, *itertools.accumulate(groups)]
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, pa.Array] = OrderedDict()  # first row -> values
        self._group, self._next, self._parts = -1, 0, iter(())  # where reading continues
        self._broken: dict[int, tuple[int, str]] = {}  # row group -> from which row it cannot be read, and why

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self._starts[-1]

    def value(self, row: int) -> bytes | None:
        """Returns the bytes of a row, None for none.

        Raises:
            READ_ERRORS: They cannot be read.
        """
        with self._lock:
            for first, values in self._recent.items():
                if first <= row < first + len(values):
                    return _content(values[row - first])
            group = bisect.bisect_right(self._starts, row) - 1
            broken_from, cause = self._broken.get(group, (row + 1, ""))
            if row >= broken_from:
                raise ValueError(cause)
            if group != self._group or row < self._next:
                parts = self._file.iter_batches(_ROWS, row_groups=[group], columns=[self._column], use_threads=False)
                self._group, self._next, self._parts = group, self._starts[group], parts
            while row >= self._next:
                first, values = self._next, self._read_part()
                self._next += len(values)
                self._recent[first] = values
                while len(self._recent) > 1 and (len(self._recent) > _RECENT or self._num_bytes() > _RECENT_BYTES):
                    self._recent.popitem(last=False)
            return _content(values[row - first])

    def _num_bytes(self) -> int:
        return sum(values.nbytes for values in self._recent.values())

    def _read_part(self) -> pa.Array:
        """Reads the next rows. After a damaged page pyarrow reads no more of its row group, which is noted.

        Raises:
            READ_ERRORS: They cannot be read.
        """
        try:
            batch = next(self._parts, None)
            if batch is None:
                raise ValueError("a row group with fewer rows than it states")
            batch.validate(full=True)
        except READ_ERRORS as error:
            self._broken[self._group] = self._next, str(error)
            self._group = -1
            raise
        return _field(batch.column(0), self._field)


class ArrowRows:
    """A column of an Arrow file, a row at a time.

    Args:
        path: The file.
        column: As of ``ParquetRows``.

    Raises:
        READ_ERRORS: It is missing, damaged or compressed.
    """

    def __init__(self, path: Path, column: str) -> None:
        parts: list[pa.Array] = []
        with _mapped(path) as file:  # the arrays keep the mapping
            whole = file.read_buffer()
            schema = _reader(file, None).schema
            root, field = _content_field(schema, column)
            # batch by batch: a compressed file ends at its first one; all columns: of some, pyarrow makes copies
            for batch in _batches(file, None):
                values = batch.column(root)
                values.validate(full=True)
                _check_mapped(values, whole)
                parts.append(_field(values, field))
            kind = schema.field(root).type
        self._values = pa.chunked_array(parts, kind.field(field).type if field else kind)

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._values)

    def value(self, row: int) -> bytes | None:
        """Returns the bytes of a row, None for none.

        Raises:
            READ_ERRORS: They are too many.
        """
        return _content(self._values[row])


def _content_field(schema: pa.Schema, column: str) -> tuple[str, str]:
    """Returns the column and the field with the bytes; no field where the column itself holds them."""
    root, field = split_name(schema, column)
    return root, "bytes" if not field and pa.types.is_struct(schema.field(root).type) else field


def _content(value: pa.Scalar) -> bytes | None:
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    buffer: pa.Buffer | None = value.as_buffer()
    if buffer is not None and buffer.size > MOST_BYTES:
        raise ValueError(f"an image of {buffer.size:,} bytes, which is more than {MOST_BYTES:,}")
    return None if buffer is None else buffer.to_pybytes()


def _check_mapped(values: pa.Array, whole: pa.Buffer) -> None:
    """Raises where values are not views of their file: those of a compressed one are unpacked into memory.

    Raises:
        ValueError: They are not.
    """
    for buffer in values.buffers():
        if buffer is not None and buffer.size and not 0 <= buffer.address - whole.address < whole.size:
            rule = "a compressed Arrow file, whose images cannot be read one by one: write it without compression"
            raise ValueError(rule)


def _mapped(path: Path) -> pa.MemoryMappedFile:
    with open_regular(path) as file:
        if not file.read(1):
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
