"""Decoded sets: images of one size in the cache, shared by all processes through the page cache.

The file is a single record batch with the columns image (fixed-size binary, H*W*3 bytes), label (int64) and sample_id
(uint64), so that each column is one contiguous buffer. The key is a hash of what the pixels depend on, and of
their place.

Shape letters: N images, H height, W width.
"""

import contextlib
import mmap
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from carft_ray.data import cache
from carft_ray.data.content import in_order
from carft_ray.data.file_index import required, write_file
from carft_ray.data.images import DECODERS
from carft_ray.data.source import DerivedSource, ImageSet, PixelArray, Source, identity
from carft_ray.errors import DataError, Problem

FORMAT_VERSION = 4

Transform = Callable[[Image.Image], Image.Image]
OnImage = Callable[[int, int], None]  # may raise to end a build, of which nothing stays then


def image_set(
    source: Source,
    transform: Transform | None,
    transform_key: str,
    cache_dir: Path,
    on_image: OnImage | None = None,
    limit_gb: float | None = None,
) -> ImageSet:
    """Returns a set with every image decoded and transformed, from the cache or built now; see ``cache.entry``.

    Args:
        source: The images.
        transform: Applied to every image (RGB in, RGB out; all results of one size), by several threads at once; None:
            as they are.
        transform_key: Names the transform completely; another transform must have another key.
        cache_dir: Folder of all entries; made when missing.
        on_image: Called with (images done, images in all) while the entry is built; with 0 done, again and again,
            while another process builds it.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.

    Returns:
        The set; its arrays are read-only views of the file.

    Raises:
        DataError: An image cannot be read, or sizes differ.
        StorageError: The entry cannot be written.
    """

    def read(reader: Any) -> ImageSet:
        batch = reader.get_batch(0)
        height, width = (int(batch.schema.metadata[name]) for name in (b"height", b"width"))
        images_NHWC = _column(batch, "image").reshape(len(source), height, width, 3)
        labels = _column(batch, "label").view(np.int64)
        sample_ids = _column(batch, "sample_id").view(np.uint64)
        check_same(source, labels, sample_ids)
        return ImageSet(source.name, images_NHWC, labels, sample_ids, source.groups)

    def build(path: Path) -> None:
        _build(source, transform, path, on_image)

    parts = [FORMAT_VERSION, identity(source), transform_key, DECODERS]
    return cache.entry(cache_dir, cache.key_of(parts), read, build, limit_gb, waiting(source, on_image))


class DecodedSource(DerivedSource):
    """A training set whose images, all of one size, are drawn or decoded into the cache once and then only read.

    Args:
        source: The images.
        cache_dir: Folder of the cache.
        on_image: As for ``image_set``.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.

    Raises:
        DataError: An image cannot be read, or sizes differ.
        StorageError: The set cannot be written.
    """

    def __init__(
        self, source: Source, cache_dir: Path, on_image: OnImage | None = None, limit_gb: float | None = None
    ) -> None:
        super().__init__(source)
        self._images_NHWC = image_set(source, None, "as-is", cache_dir, on_image, limit_gb).images_NHWC

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3]."""
        return np.asarray(self._images_NHWC[index])

    def content(self, index: int) -> bytes:
        """Returns the pixels of image ``index``."""
        return self.pixels(index).tobytes()


def waiting(source: Source, on_image: OnImage | None) -> Callable[[], None] | None:
    """Returns what ``cache.entry`` calls while another process builds the entry: ``on_image`` with no image done."""
    return None if on_image is None else partial(on_image, 0, len(source))


def about(source: Source, kind: str, **more: str) -> dict[str, str]:
    """Returns the metadata of every kind of set in the cache."""
    origin = source.fingerprint.partition("/")[0].rpartition("-")[0]  # 'folder' of 'folder-2/...'
    return cache.about(kind=kind, name=source.name, source=origin, num_images=len(source), **more)


def check_same(source: Source, labels: Any, sample_ids: Any) -> None:
    """Raises ``ValueError`` when an entry has not the labels and ids of the source, int64 and uint64 [N]."""
    if not (np.array_equal(labels, source.labels) and np.array_equal(sample_ids, source.sample_ids)):
        raise ValueError("its images do not match its name")


def _column(batch: pa.RecordBatch, name: str) -> PixelArray:
    """The bytes of a column, uint8, without a copy."""
    return np.frombuffer(batch.column(name).buffers()[1], dtype=np.uint8)


def _build(source: Source, transform: Transform | None, path: Path, on_image: OnImage | None) -> None:
    """Writes the file.

    Images are made by several threads, and written in order. Pixels go to a plain file first, which has no name, so
    that memory never holds more than a few images (``content.in_order``).
    """

    def made(index: int) -> PixelArray:
        pixels = source.pixels(index)
        if transform is None:
            return pixels
        image = transform(Image.fromarray(pixels))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

    shape: tuple[int, ...] = ()
    with (
        tempfile.TemporaryFile(dir=path.parent) as plain,
        contextlib.closing(in_order(made, len(source))) as images,
    ):
        for index, pixels in enumerate(images):
            shape = shape or pixels.shape
            if pixels.shape != shape:
                (height, width), (first_height, first_width) = pixels.shape[:2], shape[:2]
                value = f"{width} x {height} for image {index} and {first_width} x {first_height} for image 0"
                raise DataError(Problem(source.name, "all images of a decoded set must have one size", value))
            plain.write(pixels.tobytes())
            if on_image is not None:
                on_image(index + 1, len(source))
        plain.flush()
        height, width = shape[:2]
        of_set = about(source, "decoded", image_size=f"{width} x {height}")
        columns = required(image=pa.binary(height * width * 3), label=pa.int64(), sample_id=pa.uint64())
        schema = pa.schema(columns, {"height": str(height), "width": str(width), **of_set})
        image_buffer = pa.py_buffer(mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ))
        column = pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, len(source), [None, image_buffer])
        batch = pa.record_batch([column, pa.array(source.labels), pa.array(source.sample_ids)], schema=schema)
        write_file(path, pa.Table.from_batches([batch]))
