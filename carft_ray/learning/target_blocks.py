"""Blocks of the target store: one immutable file for each, put there by rename. Loads no torch.

A visit shows the training set in the order of its permutation. Block b of the visit holds what the frozen model says of
positions ``BLOCK b`` to ``BLOCK (b + 1)`` of that order, so its rows and its size follow from (seed, visit) alone: not
from batch size, rank, number of workers, or from who asks first.

    STORE/visit-0003/000017     16 bytes, a hash of place and content; then float16 [rows, width], little-endian

Width and meaning of a row are those of the store's name (``targets.store_dir``): other methods may keep unit features
in the same form. Nothing is flushed to disk. What a power failure leaves is noticed by the hash and computed again.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from carft_ray import files

Rows = npt.NDArray[np.float16]

BLOCK = 64  # images; a forward pass of this size fills a GPU, and a part of a batch rarely is smaller
FORMAT_VERSION = 1
_HASH_BYTES = 16
_DTYPE = np.dtype("<f2")


def num_blocks(num_images: int) -> int:
    """Returns how many blocks a visit of a set has."""
    return math.ceil(num_images / BLOCK)


def visit_bytes(num_images: int, width: int) -> int:
    """Returns the size of all blocks of a visit, without what the file system adds."""
    return num_images * width * _DTYPE.itemsize + num_blocks(num_images) * _HASH_BYTES


def block_path(store: Path, visit: int, number: int) -> Path:
    """Returns the file of a block; ``visit-*`` is what ``files.remove_remains`` passes over."""
    return store / f"visit-{visit:04d}" / f"{number:06d}"


def read_block(store: Path, visit: int, number: int, num_rows: int, width: int) -> Rows | None:
    """Returns a block, float16 [num_rows, width]; None where it is missing or damaged.

    Raises:
        StorageError: The disk does not answer, or refuses.
    """
    path = block_path(store, visit, number)
    try:
        content = files.retried(path, path.read_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise files.storage_error(path, error, "must be readable") from error
    kept, data = content[:_HASH_BYTES], content[_HASH_BYTES:]
    if len(data) != num_rows * width * _DTYPE.itemsize or kept != _hash(visit, number, data):
        return None
    return np.frombuffer(data, _DTYPE).reshape(num_rows, width)


def write_block(store: Path, visit: int, number: int, rows: Rows) -> None:
    """Writes a block; another writer of the same block writes the same bytes.

    Raises:
        StorageError: It cannot be written.
    """
    data = np.ascontiguousarray(rows, _DTYPE).tobytes()
    files.write_again_if_lost(block_path(store, visit, number), _hash(visit, number, data) + data, store)


def _hash(visit: int, number: int, data: bytes) -> bytes:
    place = f"{FORMAT_VERSION} {visit} {number}".encode()
    return hashlib.blake2b(data, digest_size=_HASH_BYTES, key=place).digest()
