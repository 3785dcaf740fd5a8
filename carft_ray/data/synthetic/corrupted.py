"""A set under ImageNet-C's corruptions: an OOD set that costs no further images.

Each image is shown under one of the corruptions, drawn by a hash of (seed, sample id); the noise of it comes from the
same. So the picture depends on neither the order of the images nor the machine.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image

from carft_ray.data.content import image_digest
from carft_ray.data.listing import sample_id
from carft_ray.data.source import IdArray, IntArray, PixelArray, Source
from carft_ray.data.synthetic.corruptions import CORRUPTION_VERSION, EXTRA, corrupt
from carft_ray.recipe.sets import CorruptedSet, Corruption

FIFTEEN = tuple(name for name in get_args(Corruption) if name not in EXTRA)
MARGIN = 256 / 224  # short side before the crop, over the side of the square: ImageNet-C's Resize(256), CenterCrop(224)


@dataclass(frozen=True, eq=False)
class CorruptedSource:
    """The ``Source`` of a set under corruptions; ids and labels are those of its images.

    Attributes:
        images: The set without corruptions.
        corruptions: What an image may be shown under, sorted.
        severity: 1 to 5.
        seed: Of the draws.
        size: Side of the square to which larger images are brought first, pixels.
    """

    images: Source
    corruptions: tuple[str, ...]
    severity: int
    seed: int
    size: int

    @property
    def name(self) -> str:
        """Role or name of the set, for messages."""
        return self.images.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class list."""
        return self.images.class_names

    @property
    def labels(self) -> IntArray:
        """Label of every image, int64 [N]."""
        return self.images.labels

    @property
    def sample_ids(self) -> IdArray:
        """Stable ids, uint64 [N]: those of the images without corruptions."""
        return self.images.sample_ids

    @property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """See ``ImageSet``."""
        return self.images.groups

    @property
    def home(self) -> str:
        """Where the images are."""
        return self.images.home

    @property
    def fingerprint(self) -> str:
        """That of the images, and all that decides how they are shown."""
        return f"{self._key}/{self.images.fingerprint}"

    @property
    def _key(self) -> str:
        shown = f"{','.join(self.corruptions)}/{self.severity}/{self.seed}/{self.size}"
        return f"corrupted-{CORRUPTION_VERSION}/{shown}"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return f"{self.images.place(index)} under {self.corruption(index)}"

    def corruption(self, index: int) -> str:
        """Returns the corruption under which image ``index`` is shown."""
        drawn = sample_id(f"corruption {self.seed} {int(self.sample_ids[index])}")
        return self.corruptions[drawn % len(self.corruptions)]

    def content(self, index: int) -> bytes:
        """Returns the hash of image ``index`` without corruption, after all that decides how it is shown."""
        return self.shown_content(image_digest(self.images.content(index)))

    def shown_content(self, digest: bytes) -> bytes:
        """Returns the ``content`` of an image whose file has this hash."""
        return f"{self._key}/".encode() + digest

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` corrupted, uint8 [H, W, 3]; a square of ``size`` where it is larger.

        Raises:
            DataError: The image cannot be read.
        """
        pixels = squared(self.images.pixels(index), self.size)
        return corrupt(pixels, self.corruption(index), self.severity, self.seed, int(self.sample_ids[index]))


def corrupted_source(images: Source, spec: CorruptedSet) -> CorruptedSource:
    """Returns a set under the corruptions that the recipe names; ImageNet-C's fifteen where it names none."""
    names = tuple(sorted(spec.corruptions or FIFTEEN))
    return CorruptedSource(images, names, spec.severity, spec.seed, spec.size)


def squared(pixels: PixelArray, size: int) -> PixelArray:
    """Returns the middle square of an image that is larger, as ImageNet-C's were made; a smaller one as it is.

    Args:
        pixels: uint8 [H, W, 3].
        size: Side of the square.
    """
    sides = pixels.shape[1], pixels.shape[0]
    short = min(sides)
    if short <= size:
        return pixels
    width, height = (int(round(size * MARGIN) * side / short) for side in sides)  # rounded as torchvision does
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
