"""Results per image as Arrow tables; every accuracy in the product is derived from them.

A row is one image of one set, seen by one model (one ``alpha``). A table may hold several sets and several alphas.
What is kept of the logits is enough for the metrics (``metrics``) without the images or the model. It is made where the
model computes (``training.evaluate``).

Shape letters: N images of a set, R tables that are compared.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carft_ray import files
from carft_ray.data.source import IdArray, IntArray
from carft_ray.errors import DataError, DivergedError, Problem, StorageError
from carft_ray.untrusted import open_regular

FORMAT_VERSION = 4
LAST_RANK = 5
MOST_ROWS, MOST_TABLE_BYTES = 2**26, 2**32  # of a file that is read; 2**26 answers take 3 GB of memory
_ROWS_AT_A_TIME = 2**20  # a row group of ``write_predictions``
OF_LOGITS = ("prediction", "rank", "confidence", "nll", "sum_p2")

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

_OF_CORRECT = ["set", "alpha", "sample_id", "label", "prediction"]
SCHEMA = pa.schema(
    [
        ("set", pa.dictionary(pa.int32(), pa.string())),
        ("alpha", pa.float64()),  # not float32, so that 0.6 is found again as 0.6
        ("sample_id", pa.uint64()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("rank", pa.int8()),  # place of the true class by logit, from 1; 0 where it is none of the first LAST_RANK
        ("confidence", pa.float32()),  # max_c p_c, with p the softmax of the logits
        ("nll", pa.float32()),  # -log p_true, in nats
        ("sum_p2", pa.float32()),  # sum_c p_c^2
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)

_LARGEST = 2.0**31 - 1
_BOUNDS = {  # least and largest of a column; a float32 of 1 may be rounded up
    "alpha": (0.0, 1.0),
    "label": (0.0, _LARGEST),
    "prediction": (0.0, _LARGEST),
    "rank": (0.0, float(LAST_RANK)),
    "confidence": (0.0, 1.001),
    "nll": (-0.001, 1e30),
    "sum_p2": (0.0, 1.001),
}


def predictions_table(
    set_name: str, alpha: float, sample_ids: IdArray, labels: IntArray, answers_N5: FloatArray
) -> pa.Table:
    """Returns the results of one model on N images of one set, in the order given.

    Args:
        set_name: Role or name of the set.
        alpha: Mixing coefficient of the model.
        sample_ids: Stable ids, uint64 [N].
        labels: True classes, [N]. N may be 0 (an empty part of a sharded evaluation).
        answers_N5: The columns ``OF_LOGITS`` (``training.evaluate``); ``nll`` is NaN where logits are not finite.

    Raises:
        DivergedError: A logit is not finite.
        DataError: One of the zero-shot model is not: alpha is 0.
    """
    num_images, bad = len(answers_N5), int(np.isnan(answers_N5[:, OF_LOGITS.index("nll")]).sum())
    if bad:
        rule = f"must be finite, but those of {bad} of {num_images} images are not"
        if alpha == 0:
            rule, step = (
                f"class logits of the zero-shot model for {set_name} {rule}",
                "Use other weights: these are damaged.",
            )
            raise DataError(Problem("model.pretrained", rule, next_step=step))
        step = "The training has diverged; try a lower learning_rate."
        raise DivergedError(Problem(f"{set_name} at alpha {alpha:g}", f"class logits {rule}", next_step=step))
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_images, np.int32)), pa.array([set_name])),
        pa.array(np.full(num_images, alpha, np.float64)),
        pa.array(np.asarray(sample_ids, np.uint64)),
        pa.array(np.asarray(labels, np.int32)),
        *(
            pa.array(answers_N5[:, place].astype(SCHEMA.field(name).type.to_pandas_dtype()))
            for place, name in enumerate(OF_LOGITS)
        ),
    ]
    return pa.table(columns, schema=SCHEMA)


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """Returns the rows of all tables, of which there is one, in order."""
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def accuracy(table: pa.Table) -> float:
    """Returns the share of rows, of which there is one, whose prediction is the label."""
    return float(pc.mean(pc.equal(table["prediction"], table["label"])).as_py())


def sets(table: pa.Table) -> list[str]:
    """Returns the names of the sets in order of appearance."""
    return list(pc.unique(table["set"].cast(pa.string())).to_pylist())


def alphas(table: pa.Table, set_name: str) -> list[float]:
    """Returns the alphas at which a set was evaluated, rising."""
    return sorted(pc.unique(table.filter(pc.equal(table["set"], set_name))["alpha"]).to_pylist())


def evaluated(table: pa.Table) -> list[tuple[str, float]]:
    """Returns each set with each of its alphas."""
    return [(name, alpha) for name in sets(table) for alpha in alphas(table, name)]


def select(table: pa.Table, set_name: str, alpha: float) -> pa.Table:
    """Returns the rows of one set at one alpha, in the order stored.

    Raises:
        DataError: There are none.
    """
    rows = table.filter(pc.and_(pc.equal(table["set"], set_name), pc.equal(table["alpha"], float(alpha))))
    if not len(rows):
        known = tuple(f"{name} at {value:g}" for name, value in evaluated(table))
        rule = "the set must have been evaluated at the alpha"
        raise DataError(Problem("predictions", rule, f"{set_name} at {alpha:g}", known))
    return rows


def correct(table: pa.Table, set_name: str, alpha: float) -> BoolArray:
    """Returns which images are classified right, bool [N], ordered by sample id.

    The order depends on nothing but the images, so arrays of two models can be compared image by image.

    Raises:
        DataError: The set was not evaluated at this alpha.
    """
    return correct_matrix([(table, alpha)], set_name)[0]  # type: ignore[no-any-return]


def correct_matrix(evaluations: Sequence[tuple[pa.Table, float]], set_name: str) -> BoolArray:
    """Returns which images which model classifies right, bool [R, N], images ordered by sample id.

    Args:
        evaluations: Per model (seed, trial, alpha) its predictions and the alpha to take from them.
        set_name: The set, the same images in all tables.

    Raises:
        DataError: A table lacks the set at its alpha, or the images differ between tables.
    """
    rows = []
    reference: IdArray | None = None
    for table, alpha in evaluations:
        part = select(table.select(_OF_CORRECT), set_name, alpha)
        ids: IdArray = part["sample_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        reference = ids[order] if reference is None else reference
        require_same_images(reference, ids[order], set_name)
        rows.append((part["prediction"].to_numpy() == part["label"].to_numpy())[order])
    return np.stack(rows)


def require_same_images(one: IdArray, other: IdArray, set_name: str) -> None:
    """Checks that two evaluations of a set, by their ``sample_ids``, can be compared image by image.

    Raises:
        DataError: They are of different images.
    """
    if not np.array_equal(one, other):
        rule = "results that are compared image by image must be of the same images"
        step = "Evaluate both models again on the same set."
        raise DataError(Problem(f"predictions of {set_name}", rule, next_step=step))


def sample_ids(table: pa.Table, set_name: str, alpha: float) -> IdArray:
    """Returns the sample ids that belong to ``correct``, uint64 [N], rising.

    Raises:
        DataError: The set was not evaluated at this alpha.
    """
    return np.sort(select(table.select(_OF_CORRECT), set_name, alpha)["sample_id"].to_numpy())


def write_predictions(path: Path, table: pa.Table) -> None:
    """Writes a table as Parquet (zstd); the file appears under its name only whole.

    Raises:
        StorageError: The file cannot be written.
    """
    buffer = io.BytesIO()
    plain = [field.name for field in SCHEMA if not pa.types.is_float32(field.type)]
    split = [name for name in OF_LOGITS if name not in plain]  # hardly a float is there twice, but its first bytes are
    pq.write_table(table, buffer, compression="zstd", use_dictionary=plain, use_byte_stream_split=split)
    files.write_bytes(path, buffer.getvalue())


def read_bounded(path: Path, schema: pa.Schema, most_rows: int, most_bytes: int, rows_at_a_time: int) -> pa.Table:
    """Reads a Parquet file of a study, unless it is too large.

    Args:
        path: The file.
        schema: Of another one nothing is read; the table is empty.
        most_rows: The limit.
        most_bytes: The limit, without compression.
        rows_at_a_time: How many rows are unpacked before their bytes are counted.

    Raises:
        StorageError: It is a folder, pipe, device or socket.
        ValueError: It has more rows or bytes.
        OSError, pa.ArrowException: It is missing, damaged, or cannot be read.
    """
    open_regular(path, StorageError).close()
    # Arrow's file, not Python's: its threads free it, and where Python ends meanwhile the whole process aborts
    with pa.OSFile(str(path)) as file, pq.ParquetFile(file) as parquet:
        said = parquet.metadata
        groups = [said.row_group(index) for index in range(said.num_row_groups)]
        _require_at_most("rows", most_rows, said.num_rows)
        _require_at_most("bytes", most_bytes, sum(group.total_byte_size for group in groups))
        found = parquet.schema_arrow
        parts: list[pa.RecordBatch] = []
        num_rows = num_bytes = 0  # a file may hold more than it states
        for part in parquet.iter_batches(rows_at_a_time) if found.equals(schema) else ():
            num_rows, num_bytes = num_rows + len(part), num_bytes + part.nbytes
            _require_at_most("rows", most_rows, num_rows)
            _require_at_most("bytes", most_bytes, num_bytes)
            parts.append(part)
        return pa.Table.from_batches(parts, found)


def _require_at_most(what: str, limit: int, value: int) -> None:
    if not 0 <= value <= limit:
        raise ValueError(f"one of {value:,} {what}; carft-ray reads at most {limit:,}")


def read_predictions(path: Path) -> pa.Table:
    """Reads a table back, equal to the one written.

    Raises:
        StorageError: The file is missing, damaged, no predictions, or of another format version.
    """
    step = "Evaluate the model again to write it again."
    try:
        table = read_bounded(path, SCHEMA, MOST_ROWS, MOST_TABLE_BYTES, _ROWS_AT_A_TIME)
    except (OSError, ValueError, pa.ArrowException) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise StorageError(Problem(str(path), "must be a readable Parquet file", cause, next_step=step)) from error
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode(errors="replace")
    if version != str(FORMAT_VERSION):
        rule = f"format_version of predictions must be {FORMAT_VERSION}"
        raise StorageError(Problem(str(path), rule, version, next_step=step))
    if not table.schema.equals(SCHEMA):
        rule = f"must have the columns {', '.join(SCHEMA.names)}"
        raise StorageError(Problem(str(path), rule, ", ".join(table.schema.names), next_step=step))
    for name, (low, high) in _BOUNDS.items():
        found = pc.min_max(table[name]).as_py()
        if len(table) and (table[name].null_count or not low <= found["min"] <= found["max"] <= high):
            rule = f"the column {name} must have numbers from {low:g} to {high:g}"
            raise StorageError(Problem(str(path), rule, f"{found['min']} to {found['max']}", next_step=step))
        if pa.types.is_floating(table[name].type) and pc.any(pc.is_nan(table[name])).as_py():
            raise StorageError(Problem(str(path), f"the column {name} must have finite numbers", next_step=step))
    longest = max((pc.max(pc.binary_length(part.dictionary)).as_py() or 0 for part in table["set"].chunks), default=0)
    if longest * len(table) > MOST_TABLE_BYTES:  # later code has the name once per row
        rule = f"the names of sets must have at most {MOST_TABLE_BYTES:,} bytes in all rows"
        raise StorageError(Problem(str(path), rule, f"{longest * len(table):,}", next_step=step))
    if table["set"].null_count or table["sample_id"].null_count:
        raise StorageError(Problem(str(path), "each row must have a set and a sample id", next_step=step))
    return table
