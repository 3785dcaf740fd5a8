"""Packed sets: the files of a training set, as they are or made smaller, in one memory-mapped file of the cache.

A random crop needs the original, so a training set is not decoded ahead. On a network disk each small file costs a
round trip, in every epoch of every training; packed, it costs one in all, and all trainings of a machine share one copy
in memory. On a disk of the machine itself, files that are in memory gain next to nothing and others a tenth
of the time of a view (``benchmarks.speed``).

With ``data.resize_short_side`` larger images are made smaller once and kept as JPEG; the crops of every training are of
these. Decoding takes most of the time of a view, and its time goes by the number of pixels.

The file has the columns image (large binary), label (int64) and sample_id (uint64), in record batches of about
``BATCH_BYTES``. The key is a hash of the identity of the source, and of what makes images smaller.
"""

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg

from carft_ray.data import cache
from carft_ray.data.content import in_order
from carft_ray.data.decoded import OnImage, about, check_same, waiting
from carft_ray.data.file_index import required
from carft_ray.data.images import DECODERS
from carft_ray.data.listing import StoredSource
from carft_ray.data.source import DerivedSource, PixelArray, identity
from carft_ray.data.views import resize

FORMAT_VERSION = 3
BATCH_BYTES = 32 * 10**6  # held in memory while the file is written
QUALITY = 95  # of the JPEGs of images that were made smaller

_COLUMNS = required(image=pa.large_binary(), label=pa.int64(), sample_id=pa.uint64())


class PackedSource(DerivedSource):
    """A source whose images are decoded from one file of the cache.

    Args:
        source: The images.
        cache_dir: Folder of the cache.
        on_image: As for ``decoded.image_set``.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.
        short_side: Pixels of the shorter side of larger images; None: all images are packed as they are.

    Raises:
        DataError: A file cannot be read.
        StorageError: The entry cannot be written.
    """

    def __init__(
        self,
        source: StoredSource,
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

        smaller = [] if short_side is None else [short_side, QUALITY, DECODERS]
        key = cache.key_of(["packed", FORMAT_VERSION, identity(source), *smaller])
        super().__init__(source)  # ``content`` is for hashes: of the files themselves, as they are now
        self._decode = source.decode
        self._images = cache.entry(cache_dir, key, read, build, limit_gb, waiting(source, on_image))["image"]

    @property
    def num_bytes(self) -> int:
        """Size of all images as they were packed."""
        return int(self._images.nbytes)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image is damaged.
        """
        return self._decode(self.packed_bytes(index), index)

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


def _smaller(source: StoredSource, index: int, short_side: int) -> bytes:
    """Returns an image as JPEG whose shorter side has ``short_side`` pixels, or its file where it has no more."""
    content = source.content(index)
    pixels = source.decode(content, index)
    height, width = pixels.shape[:2]
    if (now := min(height, width)) <= short_side:
        return content
    small = np.empty((*(max(1, round(side * short_side / now)) for side in (height, width)), 3), np.uint8)
    resize(pixels, small)
    return bytes(simplejpeg.encode_jpeg(small, QUALITY, colorsubsampling="420"))


def _build(source: StoredSource, path: Path, on_image: OnImage | None, short_side: int | None) -> None:
    read = source.content if short_side is None else partial(_smaller, source, short_side=short_side)
    schema = pa.schema(_COLUMNS, about(source, "packed"))
    with open(path, "wb") as file:
        with (
            pa.ipc.new_file(file, schema) as writer,
            contextlib.closing(in_order(read, len(source))) as images,
        ):
            contents: list[bytes] = []
            num_bytes = 0
            for index, content in enumerate(images):
                contents.append(content)
                num_bytes += len(content)
                if index + 1 == len(source) or num_bytes >= BATCH_BYTES:
                    rows = slice(index + 1 - len(contents), index + 1)
                    columns = [contents, source.labels[rows], source.sample_ids[rows]]
                    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                    contents, num_bytes = [], 0
                if on_image is not None:
                    on_image(index + 1, len(source))
        file.flush()
        os.fsync(file.fileno())
