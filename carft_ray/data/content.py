"""What the images of a set are, byte for byte: hashes of contents, which neither names nor dates can hide.

``Source.fingerprint`` is quick and trusts sizes and dates of files; these hashes read every file.
"""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from carft_ray import environment
from carft_ray.data.source import PixelArray, Source

DIGEST_BYTES = 16
AHEAD = 4  # images in memory for each thread while a set is read

T = TypeVar("T")


def reading_threads() -> int:
    """Returns the cores that this process may use, and at least 4: reading files waits for the disk."""
    return max(4, environment.usable_cores())


def in_order(make: Callable[[int], T], number: int, num_threads: int | None = None) -> Generator[T, None, None]:
    """Yields ``make(0)``, ``make(1)``, ..., made by several threads a little ahead of whoever takes them.

    At most ``AHEAD`` values for each thread are made and not taken, all of them close to one another: what is read
    quickly in order alone is read almost in order. Close it (``contextlib.closing``) where it may not be taken to its
    end.

    Args:
        make: Called by several threads at once.
        number: How many values.
        num_threads: None: ``reading_threads``.

    Raises:
        Exception: What ``make`` raised for the lowest index, once all values before it are taken.
    """
    threads = num_threads or reading_threads()
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[T]] = deque()
    try:
        for index in range(number):
            if len(pending) == AHEAD * threads:
                yield pending.popleft().result()
            pending.append(pool.submit(make, index))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def image_digests(source: Source) -> list[bytes]:
    """Returns a hash per image, in order: of the file's bytes, or of the pixels where there is no file.

    Raises:
        DataError: A file cannot be read.
    """
    return list(in_order(lambda index: image_digest(source.content(index)), len(source)))


def set_digest(source: Source, digests: list[bytes] | None = None) -> str:
    """Returns one hash of a set: its sample ids, labels and contents, in any order of the images.

    Args:
        source: The set.
        digests: ``image_digests`` of it, where they are known.
    """
    digests = image_digests(source) if digests is None else digests
    rows = sorted(zip(source.sample_ids.tolist(), source.labels.tolist(), digests, strict=True))
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for sample_id, label, digest in rows:
        whole.update(f"{sample_id} {label} ".encode() + digest)
    return whole.hexdigest()


def image_digest(content: bytes) -> bytes:
    """Returns the hash of the content of an image."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def pixel_digest(pixels: PixelArray) -> bytes:
    """Returns the hash of a picture, uint8 [H, W, 3], whatever file it is from.

    It is made of two checksums, which take half the time of one strong hash.
    """
    data = np.ascontiguousarray(pixels).data
    return image_digest(f"{pixels.shape} {zlib.crc32(data)} {zlib.adler32(data)}".encode())
