"""Philox4x32-10, the counter-based generator behind data order and views, and how its words are shared out.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011); the same words as Random123's
``philox4x32`` with 10 rounds. Output depends on (counter, key) alone, so nothing has to be kept to resume.

Layout, for all uses in this package (words are 32 bits, low word first)::

    key      0, 1   seed
    counter  0      stream * 2**16 + block      stream says what for, block numbers the draws of one item
             1      visit of the sample, epoch of the permutation, CRC-32 of the corruption's name, or step
             2, 3   sample id, position in the unshuffled set, or number of the text

Two uses share no words because they differ in ``stream``. A new use takes a new stream number and never changes an
old one: order and views of a recipe must stay what they were.
"""

import numpy as np
import numpy.typing as npt

WordArray = npt.NDArray[np.uint32]

STREAM_PERMUTATION = 1
STREAM_VIEW = 2
STREAM_CORRUPTION = 3
STREAM_TEXT = 4

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio; sqrt(3) - 1
_MASK = 0xFFFFFFFF
_LOW = np.uint64(_MASK)
_HALF = np.uint64(32)


def philox4x32(counter: WordArray, key: WordArray) -> WordArray:
    """Encrypts counters under a key with ten rounds of Philox.

    Args:
        counter: Counters, uint32 [..., 4].
        key: Key, uint32 [2].

    Returns:
        Random words, uint32 [..., 4].
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint32).astype(np.uint64), -1, 0)
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product1 >> _HALF) ^ c1 ^ np.uint64(k0), product1 & _LOW
        c2, c3 = (product0 >> _HALF) ^ c3 ^ np.uint64(k1), product0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words(seed: int, stream: int, visit: npt.ArrayLike, items: npt.ArrayLike, num_blocks: int = 1) -> WordArray:
    """Returns the words that belong to items of one stream, by the layout above.

    Args:
        seed: 0 <= seed < 2**64.
        stream: One of the ``STREAM_`` constants.
        visit: Visit or epoch, 0 <= visit < 2**32; one for all items or one per item.
        items: Sample ids or positions, uint64 [n].
        num_blocks: Blocks of four words per item, at most 2**16.

    Returns:
        Words, uint32 [n, num_blocks, 4].
    """
    items = np.asarray(items, dtype=np.uint64)
    counter = np.empty((len(items), num_blocks, 4), dtype=np.uint32)
    counter[..., 0] = (stream << 16) + np.arange(num_blocks, dtype=np.uint32)
    counter[..., 1] = np.broadcast_to(visit, items.shape).astype(np.uint32)[:, None]
    counter[..., 2] = (items & _LOW).astype(np.uint32)[:, None]
    counter[..., 3] = (items >> _HALF).astype(np.uint32)[:, None]
    return philox4x32(counter, np.array([seed & _MASK, seed >> 32], dtype=np.uint32))
