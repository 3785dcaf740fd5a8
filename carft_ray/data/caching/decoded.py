"""A training set that is decoded once: its images are drawn or decoded into the cache and then only read."""

from pathlib import Path

from carft_ray.data.caching.arrays import OnImage, image_set
from carft_ray.data.source import IdArray, IntArray, PixelArray, Source


class DecodedSource:
    """A source whose images, all of one size, come from the cache of decoded sets.

    Args:
        source: The images.
        cache_dir: Folder of the cache.
        on_image: As for ``arrays.image_set``.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.

    Raises:
        DataError: An image cannot be read, or sizes differ.
        StorageError: The set cannot be written.
    """

    def __init__(
        self, source: Source, cache_dir: Path, on_image: OnImage | None = None, limit_gb: float | None = None
    ) -> None:
        self._images = image_set(source, None, "as-is", cache_dir, on_image, limit_gb)
        self.name = source.name
        self.class_names = source.class_names
        self.labels: IntArray = self._images.labels
        self.sample_ids: IdArray = self._images.sample_ids
        self.fingerprint = source.fingerprint
        self.groups = source.groups
        self.home = source.home
        self.place = source.place

    def __len__(self) -> int:
        """Returns N."""
        return len(self._images)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3]."""
        image: PixelArray = self._images.images_NHWC[index]
        return image

    def content(self, index: int) -> bytes:
        """Returns the pixels of image ``index``."""
        return self.pixels(index).tobytes()
