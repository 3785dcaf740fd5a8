"""A set under ImageNet-C's corruptions: an OOD set that costs no further images.

Each image is shown under one of the corruptions, drawn by a hash of (seed, sample id); the noise of it comes from the
same. So the picture depends on neither the order of the images nor the machine.
"""

import numpy as np
from PIL import Image

from carft_ray.data.content import image_digest
from carft_ray.data.listing import sample_id
from carft_ray.data.source import DerivedSource, PixelArray, Source
from carft_ray.data.synthetic.corruptions import CORRUPTION_VERSION, CORRUPTIONS, corrupt
from carft_ray.recipe.schema.data import CorruptedSet

MARGIN = 256 / 224  # short side before the crop, over the side of the square: ImageNet-C's Resize(256), CenterCrop(224)


class CorruptedSource(DerivedSource):
    """The ``Source`` of a set under corruptions; ids and labels are those of its images.

    Args:
        images: The set without corruptions.
        spec: The corruptions that the recipe names, ImageNet-C's fifteen where it names none, and how strong they are.
    """

    def __init__(self, images: Source, spec: CorruptedSet) -> None:
        super().__init__(images)
        self._spec = spec
        self.corruptions: tuple[str, ...] = tuple(sorted(spec.corruptions or CORRUPTIONS))
        shown = f"{','.join(self.corruptions)}/{spec.severity}/{spec.seed}/{spec.size}"
        self._key = f"corrupted-{CORRUPTION_VERSION}/{shown}"
        self.fingerprint = f"{self._key}/{images.fingerprint}"

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return f"{self.images.place(index)} under {self.corruption(index)}"

    def corruption(self, index: int) -> str:
        """Returns the corruption under which image ``index`` is shown."""
        drawn = sample_id(f"corruption {self._spec.seed} {int(self.sample_ids[index])}")
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
        pixels = squared(self.images.pixels(index), self._spec.size)
        name, id_ = self.corruption(index), int(self.sample_ids[index])
        return corrupt(pixels, name, self._spec.severity, self._spec.seed, id_)


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
