"""What a set of images is: the protocol that every kind of data answers, its decoded form, hashes of its contents.

Which images a set holds is told twice: ``Source.identity`` is quick and trusts places, sizes and dates of files
(``file_index.file_stamp``); ``set_digest`` holds wherever the files are, and its hashes of contents read every one
(``data.records`` keeps them).

Shape letters: N images of a set, H height, W width, C = 3 colours.
"""

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from carft_ray import environment
from carft_ray.errors import DataError, Problem

PixelArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.uint64]
DIGEST_BYTES = 16
AHEAD = 4  # images in memory for each thread while a set is read
T = TypeVar("T")
Item = TypeVar("Item")


class Source(Protocol):
    """Images of one set, decoded one at a time. Members are read-only; indices run from 0 to ``len(source) - 1``."""

    @property
    def name(self) -> str:
        """Role or name of the set, for messages."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class folders (or sandbox classes) in label order."""

    @property
    def labels(self) -> IntArray:
        """Label of every image, int64 [N], each below ``len(class_names)``."""

    @property
    def sample_ids(self) -> IdArray:
        """Stable ids, uint64 [N], unique in the set. They depend on neither order, machine nor place of the data."""

    @property
    def identity(self) -> str:
        """A text that changes when any image, label, id or place may have changed: in each key of what is kept of them.

        Archives give many files one date and one size, so the place counts, that where the set was listed: nodes that
        map a set that the driver has listed (``data.sets``) agree in it. Raises DataError: a file has vanished.
        """

    @property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """Classes between which the images are told apart, where these are not all classes; see ``ImageSet``."""

    def __len__(self) -> int:
        """Returns N."""

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages, such as the path of its file."""

    def content(self, index: int) -> bytes:
        """Returns what image ``index`` is, byte for byte: its file, or its pixels where it was never encoded.

        Raises:
            DataError: The image cannot be read.
        """

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image cannot be read.
        """


class DerivedSource:
    """What a ``Source`` has of another whose images it shows in its own way; a subclass has ``pixels``.

    Args:
        images: The other.
    """

    def __init__(self, images: Source) -> None:
        self.images = images
        self.name, self.class_names, self.labels = images.name, images.class_names, images.labels
        self.sample_ids, self.identity, self.groups = images.sample_ids, images.identity, images.groups

    def __len__(self) -> int:
        """Returns N."""
        return len(self.labels)

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return self.images.place(index)

    def content(self, index: int) -> bytes:
        """Returns what image ``index`` is in the other source, byte for byte."""
        return self.images.content(index)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A decoded set whose images all have one size, usually memory-mapped; the arrays are read-only.

    Attributes:
        name: Role or name of the set, for messages.
        images_NHWC: Pixels, uint8 [N, H, W, 3].
        labels: Label of every image, int64 [N].
        sample_ids: Stable ids, uint64 [N].
        groups: None: the images are told apart between all classes. Else between the G groups, each of which scores the
            largest logit of its classes (a mask of classes is G groups of one class); a group is named by its first
            class, in ``labels`` and in predictions.
    """

    name: str
    images_NHWC: PixelArray
    labels: IntArray
    sample_ids: IdArray
    groups: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        """Returns N."""
        return len(self.images_NHWC)


@dataclass(frozen=True)
class Unlabelled:
    """One image without a label, which is not open yet.

    Attributes:
        name: What it is called in answers.
        place: Its name for messages.
        read: Returns the bytes of its file; any thread may call it. Raises ``DataError``: it cannot be read.
    """

    name: str
    place: str
    read: Callable[[], bytes]


def refused(name: str, place: str, problem: Problem) -> Unlabelled:
    """Returns an image that cannot be read, for a reason that is known before."""

    def read() -> bytes:
        raise DataError(problem)

    return Unlabelled(name, place, read)


def reading_threads() -> int:
    """Returns the cores that this process may use, and at least 4: reading files waits for the disk."""
    return max(4, environment.usable_cores())


def in_order(
    make: Callable[[Item], T], items: Iterable[Item], num_threads: int | None = None, ahead: int | None = None
) -> Generator[T, None, None]:
    """Yields ``make(item)`` of every item, in order, made by several threads a little ahead of whoever takes them.

    What is made and not taken is close to one another: what is read quickly in order alone is read almost in order.
    Close it (``contextlib.closing``) where it may not be taken to its end.

    Args:
        make: Called by several threads at once.
        items: Taken by the caller's thread, no further ahead than values are made.
        num_threads: None: ``reading_threads``.
        ahead: Values that are being made, or are made, beyond the one that is taken; None: ``AHEAD`` for each thread.

    Raises:
        Exception: What ``make`` raised for the first item, once all values before it are taken.
    """
    threads = num_threads or reading_threads()
    beyond = AHEAD * threads - 1 if ahead is None else ahead
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > beyond:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def image_digests(source: Source) -> list[bytes]:
    """Returns a hash per image, in order: of the file's bytes, or of the pixels where there is no file.

    Raises:
        DataError: A file cannot be read.
    """
    return list(in_order(lambda index: image_digest(source.content(index)), range(len(source))))


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


def pixel_digest(pixels: PixelArray, thumbnail: bytes) -> bytes:
    """Returns the hash of a picture, uint8 [H, W, 3], whatever file it is from.

    It is made of a checksum and the picture's thumbnail, which take a fifth of the time of a hash of all pixels.
    """
    return image_digest(f"{pixels.shape} {zlib.crc32(np.ascontiguousarray(pixels).data)} ".encode() + thumbnail)
