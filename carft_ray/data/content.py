"""What the images of a set are, byte for byte: hashes of contents, which neither names nor dates can hide.

``Source.fingerprint`` is quick and trusts sizes and dates of files; these hashes read every file.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from carft_ray import environment
from carft_ray.data.source import Source

DIGEST_BYTES = 16
MOST_AT_ONCE = 128  # images in memory while a set is read, with up to half as many threads
AHEAD, LARGEST_PART = 2, 4  # parts of the range for each thread, and images of one

T = TypeVar("T")


def reading_threads() -> int:
    """Returns the cores that this process may use, and at least 4: reading files waits for the disk."""
    return max(4, environment.usable_cores())


def in_order(make: Callable[[int], T], number: int, num_threads: int | None = None) -> Generator[T, None, None]:
    """Yields ``make(0)``, ``make(1)``, ..., made by several threads a little ahead of whoever takes them.

    At most ``MOST_AT_ONCE`` values are made and not taken (``AHEAD`` for each thread, where that is more), all of them
    close to one another: what is read quickly in order alone is read almost in order. Close it (``contextlib.closing``)
    where it may not be taken to its end.

    Args:
        make: Called by several threads at once.
        number: How many values.
        num_threads: None: ``reading_threads``.

    Raises:
        Exception: What ``make`` raised for the lowest index, once all values before it are taken.
    """
    threads = num_threads or reading_threads()
    size = max(1, min(LARGEST_PART, MOST_AT_ONCE // (AHEAD * threads)))

    def made(start: int) -> tuple[list[T], Exception | None]:
        values: list[T] = []
        try:
            for index in range(start, min(start + size, number)):
                values.append(make(index))
        except Exception as error:  # raised below, after what comes before it
            return values, error
        return values, None

    def taken(part: Future[tuple[list[T], Exception | None]]) -> Iterator[T]:
        values, error = part.result()
        yield from values
        if error is not None:
            raise error

    pool = ThreadPoolExecutor(threads)
    try:
        pending: deque[Future[tuple[list[T], Exception | None]]] = deque()
        for start in range(0, number, size):
            pending.append(pool.submit(made, start))
            if len(pending) == AHEAD * threads:
                yield from taken(pending.popleft())
        while pending:
            yield from taken(pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def image_digests(source: Source) -> list[bytes]:
    """Returns a hash per image, in order: of the file's bytes, or of the pixels where there is no file.

    Raises:
        DataError: A file cannot be read.
    """
    with ThreadPoolExecutor(reading_threads()) as pool:
        return list(pool.map(lambda index: image_digest(source.content(index)), range(len(source))))


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
