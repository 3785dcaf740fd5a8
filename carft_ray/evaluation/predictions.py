"""Results per image as Arrow tables; every accuracy in the product is derived from them.

A row is one image of one set, seen by one model (one ``alpha``). A table may hold several sets and several alphas.
What is kept of the logits is enough for the metrics (``metrics``) without the images or the model.

Shape letters: N images of a set, C classes, R tables that are compared.
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

FORMAT_VERSION = 3

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
        ("rank", pa.int32()),  # classes that come before the true one; 0 is a right answer
        ("confidence", pa.float64()),  # max_c p_c, with p the softmax of the logits z
        ("nll", pa.float64()),  # -log p_true, in nats
        ("brier", pa.float64()),  # sum_c (p_c - y_c)^2 = 1 - 2 p_true + sum_c p_c^2
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


def predictions_table(
    set_name: str,
    alpha: float,
    sample_ids: IdArray,
    labels: IntArray,
    logits_NC: npt.NDArray[np.float32],
    groups: Sequence[Sequence[int]] | None = None,
) -> pa.Table:
    """Returns the results of one model on N images of one set, in the order given.

    The prediction is the class with the largest logit; equal logits are ordered by class index, so the result does
    not depend on batch size or machine. Probabilities are taken in float64 with the largest logit subtracted.

    Args:
        set_name: Role or name of the set.
        alpha: Mixing coefficient of the model.
        sample_ids: Stable ids, uint64 [N].
        labels: True classes, [N], each in 0 .. C - 1.
        logits_NC: Class logits, [N, C], as float32. N may be 0 (an empty part of a sharded evaluation).
        groups: Classes between which the images are classified, where these are not all: a group scores the largest
            logit of its classes and is named by its first class (``ImageSet.groups``). All other logits are ignored,
            in the probabilities too.

    Raises:
        DivergedError: A logit is not finite.
        ValueError: With groups, a label is no first class.
    """
    logits_NC, labels = np.asarray(logits_NC, np.float32), np.asarray(labels, np.int64)
    num_samples, num_classes = logits_NC.shape
    if not np.isfinite(logits_NC).all():
        bad = int((~np.isfinite(logits_NC)).any(axis=1).sum())
        rule = f"class logits must be finite, but those of {bad} of {num_samples} images are not"
        step = "The training has diverged; try a lower learning_rate."
        raise DivergedError(Problem(f"{set_name} at alpha {alpha:g}", rule, next_step=step))

    named_G = np.arange(num_classes)  # class by which a column is named
    columns_N = labels
    if groups is not None:
        named_G = np.array([group[0] for group in groups], np.int64)
        column_of = np.full(num_classes, -1)
        column_of[named_G] = np.arange(len(groups))
        columns_N = column_of[labels]
        if (columns_N < 0).any():
            raise ValueError("labels must be the first class of a group")
        logits_NC = np.stack([logits_NC[:, list(group)].max(axis=1) for group in groups], axis=1)
    true_N1 = np.take_along_axis(logits_NC, columns_N[:, None], axis=1)
    is_before_NC = (logits_NC == true_N1) & (np.arange(len(named_G)) < columns_N[:, None])
    rank_N = ((logits_NC > true_N1) | is_before_NC).sum(axis=1)
    largest_N = logits_NC.max(axis=1).astype(np.float64)
    odds_NC = np.exp(logits_NC - largest_N[:, None])  # p_c over the largest p
    log_sum_exp_N = largest_N + np.log(odds_NC.sum(axis=1))
    log_sum_exp_2_N = 2 * largest_N + np.log((odds_NC * odds_NC).sum(axis=1))  # log sum_c exp(2 z_c)
    nll_N = log_sum_exp_N - true_N1[:, 0].astype(np.float64)
    brier_N = 1 - 2 * np.exp(-nll_N) + np.exp(log_sum_exp_2_N - 2 * log_sum_exp_N)
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_samples, np.int32)), pa.array([set_name])),
        pa.array(np.full(num_samples, alpha, np.float64)),
        pa.array(np.asarray(sample_ids, np.uint64)),
        pa.array(labels.astype(np.int32)),
        pa.array(named_G[logits_NC.argmax(axis=1)].astype(np.int32)),
        pa.array(rank_N.astype(np.int32)),
        pa.array(np.minimum(np.exp(largest_N - log_sum_exp_N), 1.0)),
        pa.array(np.maximum(nll_N, 0.0)),
        pa.array(np.maximum(brier_N, 0.0)),
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
    pq.write_table(table, buffer, compression="zstd")
    files.write_bytes(path, buffer.getvalue())


def read_predictions(path: Path) -> pa.Table:
    """Reads a table back, equal to the one written.

    Raises:
        StorageError: The file is missing, damaged, no predictions, or of another format version.
    """
    step = "Evaluate the model again to write it anew."
    try:
        path.stat()  # Arrow's own words for a file that is not there are long
        # Arrow's file, not Python's: its threads free it, and where Python ends meanwhile the whole process aborts
        with pa.OSFile(str(path)) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise StorageError(Problem(str(path), "must be a readable Parquet file", cause, next_step=step)) from error
    version = (table.schema.metadata or {}).get(b"format_version", b"none").decode(errors="replace")
    if version != str(FORMAT_VERSION):
        rule = f"format_version of predictions must be {FORMAT_VERSION}"
        raise StorageError(Problem(str(path), rule, version, next_step=step))
    if not table.schema.equals(SCHEMA):
        rule = f"must have the columns {', '.join(SCHEMA.names)}"
        raise StorageError(Problem(str(path), rule, ", ".join(table.schema.names), next_step=step))
    return table
