"""The order of images in each epoch, as pure functions of seed and epoch, and how it is shared out over workers."""

from collections.abc import Iterator

import numpy as np

from carft_ray.data.philox import STREAM_PERMUTATION, words
from carft_ray.data.source import IntArray


def permutation(seed: int, epoch: int, n: int) -> IntArray:
    """Returns the order in which an epoch shows a set: a permutation of 0..n-1, int64 [n].

    Position i gets a 64-bit word of (seed, epoch, i); the order is the stable sort of the words. ``epoch`` counts
    from 0, below 2**32; 0 <= seed < 2**64.
    """
    block = words(seed, STREAM_PERMUTATION, epoch, np.arange(n, dtype=np.uint64))[:, 0]
    keys = block[:, 0].astype(np.uint64) | (block[:, 1].astype(np.uint64) << np.uint64(32))
    return np.argsort(keys, kind="stable").astype(np.int64)


def parts_of(
    order: IntArray, batch_size: int, rank: int, world_size: int, first_batch: int = 0
) -> Iterator[tuple[int, IntArray]]:
    """Yields a worker's part of each global batch of an epoch from ``first_batch`` on.

    Global batch i is the i-th slice of ``order``; the last one may be smaller. The part of rank r is **contiguous**:
    positions ``b * r // world_size`` to ``b * (r + 1) // world_size`` of a batch of b. So the parts of all ranks, one
    behind the other, are the global batch in its order; they differ by at most one image, and a part is empty where
    the batch is smaller than the world.

    Args:
        order: Of an epoch (``permutation``), int64 [n].
        batch_size: Global batch.
        rank: This worker.
        world_size: Number of workers.
        first_batch: Number of the first one.

    Yields:
        Where the part begins in ``order``, and its indices.
    """
    for start in range(first_batch * batch_size, len(order), batch_size):
        size = min(batch_size, len(order) - start)
        first, end = start + size * rank // world_size, start + size * (rank + 1) // world_size
        yield first, order[first:end]
