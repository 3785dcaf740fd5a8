"""Packed sets: the files of a training set, as they are or made smaller, in one memory-mapped file of the cache.

A random crop needs the original, so a training set is not decoded ahead. On a network disk each small file costs a
round trip, in every epoch of every training; packed, it costs one in all, and all trainings of a machine share one copy
in memory. On a disk of the machine itself, files that are in memory gain next to nothing and others a tenth
of the time of a view (``benchmarks.speed``).

With ``data.resize_short_side`` larger images are made smaller once and kept as JPEG; the crops of every training are of
these. Decoding takes most of the time of a view, and its time goes by the number of pixels. Images under corruptions
are made once and kept as PNG: a corruption takes much longer than a view.

The file has the columns image (large binary), is_made (whether the image is not its own file, but was made from it),
label (int64) and sample_id (uint64), in record batches of about ``BATCH_BYTES``. The key is a hash of the identity of
the source, and of what makes images.
"""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from carft_ray.data import cache
from carft_ray.data.content import in_order
from carft_ray.data.decoded import OnImage, about, check_same, waiting
from carft_ray.data.file_index import required
from carft_ray.data.images import DECODERS, decode_image
from carft_ray.data.listing import StoredSource
from carft_ray.data.source import DerivedSource, PixelArray, identity
from carft_ray.data.synthetic.corrupted import CorruptedSource
from carft_ray.data.views import resize
from carft_ray.recipe.schema.data import PILLOWS_LIMIT

FORMAT_VERSION = 4
BATCH_BYTES = 32 * 10**6  # held in memory while the file is written
QUALITY = 95  # of the JPEGs of images that were made smaller
PNG_LEVEL = 1  # the quickest: noise is hardly smaller at others

_COLUMNS = required(image=pa.large_binary(), is_made=pa.bool_(), label=pa.int64(), sample_id=pa.uint64())


class PackedSource(DerivedSource):
    """A source whose images are decoded from one file of the cache.

    Args:
        source: The images.
        cache_dir: Folder of the cache.
        on_image: As for ``decoded.image_set``.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.
        short_side: Pixels of the shorter side of larger images; None: all images are packed as they are.

    Raises:
        DataError: An image cannot be read.
        StorageError: The entry cannot be written.
    """

    def __init__(
        self,
        source: StoredSource | CorruptedSource,
        cache_dir: Path,
        on_image: OnImage | None = None,
        limit_gb: float | None = None,
        short_side: int | None = None,
    ) -> None:
        def read(reader: Any) -> pa.Table:
            table = reader.read_all()
            check_same(source, *(table[name].to_numpy() for name in ("label", "sample_id")))
            return table

        def build(path: Path) -> None:
            _build(source, path, on_image, short_side)

        makes = [short_side, QUALITY, DECODERS] if short_side or isinstance(source, CorruptedSource) else []
        key = cache.key_of(["packed", FORMAT_VERSION, identity(source), *makes])
        super().__init__(source)  # ``content`` is for hashes: of the files themselves, as they are now
        self._stored = None if isinstance(source, CorruptedSource) else source
        table = cache.entry(cache_dir, key, read, build, limit_gb, waiting(source, on_image))
        self._images, self._is_made = table["image"], table["is_made"].to_numpy()

    @property
    def num_bytes(self) -> int:
        """Size of all images as they were packed."""
        return int(self._images.nbytes)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image is damaged.
        """
        content = self.packed_bytes(index)
        if self._stored is None or self._is_made[index]:
            return decode_image(content, self.place(index), PILLOWS_LIMIT)
        return self._stored.decode(content, index)

    def packed_bytes(self, index: int) -> bytes:
        """Returns the bytes of image ``index`` as they were packed."""
        return bytes(self._images[index].as_py())


def pays(home: str, in_order: bool, cache_dir: Path) -> bool:
    """Returns whether images are worth packing.

    They are where they can be read quickly in their order alone, or lie on a file system that is no disk of this
    machine, as NFS is (its device number has no major part), and the cache on another one.

    Args:
        home: Where the images are.
        in_order: Whether they are read quickly in their order alone.
        cache_dir: Folder of the cache; it need not exist.
    """
    device = _device(Path(home))
    return in_order or (os.major(device) == 0 and device != _device(cache_dir.absolute()))


def _device(path: Path) -> int:
    """Returns the number of the file system of a path, or of the folder around it where it is a pattern or missing."""
    return next(folder.stat().st_dev for folder in (path, *path.parents) if folder.exists())


def _packed(source: StoredSource | CorruptedSource, index: int, short_side: int | None) -> tuple[bytes, bool]:
    """Returns the file of an image that is packed, and whether it was made: smaller, or under a corruption."""
    if isinstance(source, CorruptedSource):
        pixels = source.pixels(index)
        return _smaller(pixels, short_side) or _png(pixels), True
    content = source.content(index)
    smaller = None if short_side is None else _smaller(source.decode(content, index), short_side)
    return (content, False) if smaller is None else (smaller, True)


def _smaller(pixels: PixelArray, short_side: int | None) -> bytes | None:
    """Returns an image as JPEG whose shorter side has ``short_side`` pixels; None if it has no more."""
    height, width = pixels.shape[:2]
    if short_side is None or (now := min(height, width)) <= short_side:
        return None
    small = np.empty((*(max(1, round(side * short_side / now)) for side in (height, width)), 3), np.uint8)
    resize(pixels, small)
    return bytes(simplejpeg.encode_jpeg(small, QUALITY, colorsubsampling="420"))


def _png(pixels: PixelArray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def _build(
    source: StoredSource | CorruptedSource, path: Path, on_image: OnImage | None, short_side: int | None
) -> None:
    def read(index: int) -> tuple[bytes, bool]:
        return _packed(source, index, short_side)

    schema = pa.schema(_COLUMNS, about(source, "packed"))
    with open(path, "wb") as file:
        with (
            pa.ipc.new_file(file, schema) as writer,
            contextlib.closing(in_order(read, len(source))) as images,
        ):
            packed: list[tuple[bytes, bool]] = []
            num_bytes = 0
            for index, image in enumerate(images):
                packed.append(image)
                num_bytes += len(image[0])
                if index + 1 == len(source) or num_bytes >= BATCH_BYTES:
                    rows = slice(index + 1 - len(packed), index + 1)
                    columns = [*zip(*packed, strict=True), source.labels[rows], source.sample_ids[rows]]
                    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    packed, num_bytes = [], 0
                if on_image is not None:
                    on_image(index + 1, len(source))
        file.flush()
        os.fsync(file.fileno())
