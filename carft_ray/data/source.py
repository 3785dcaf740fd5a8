"""What a set of images is: the protocol that every kind of data answers, and the decoded form of a set.

Shape letters: N images of a set, H height, W width, C = 3 colours.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

PixelArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.uint64]


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
    def fingerprint(self) -> str:
        """A text that changes when any image, label or id may have changed, not a path. For keys: ``identity``."""

    @property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """Classes between which the images are told apart, where these are not all classes; see ``ImageSet``."""

    @property
    def home(self) -> str:
        """Where the images are, a resolved path: archives give many files one date and one size. '' for none."""

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


def identity(source: Source) -> str:
    """Returns what names the images of a set in every key of what is kept of them: the fingerprint and their place.

    Archives give many files one date and one size, so the fingerprints of two folders may be equal. The place is that
    where the set was listed: nodes that map a set that the driver has listed (``data.listed_sets``) agree in it.

    Raises:
        DataError: A file has vanished.
    """
    return f"{source.fingerprint} {source.home}"


class DerivedSource:
    """What a ``Source`` has of another whose images it shows in its own way; a subclass has ``pixels``.

    Args:
        images: The other.
    """

    def __init__(self, images: Source) -> None:
        self.images = images
        self.name, self.class_names, self.labels = images.name, images.class_names, images.labels
        self.sample_ids, self.fingerprint = images.sample_ids, images.fingerprint
        self.groups, self.home = images.groups, images.home

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
