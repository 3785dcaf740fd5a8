"""Sets of images in the cache: decoded to one size, or packed as files. One process builds a set, all share its file.

A **decoded** set has the pixels of every image, all of one size: what a model sees of a validation or test set, and
what is drawn for the sandbox.

A **packed** set has the files of a training set, as they are or made smaller. A random crop needs the original, so a
training set is not decoded ahead. On a network disk each small file costs a round trip, in every epoch of every
training; packed, it costs one in all. On a disk of the machine itself, files that are in memory gain next to nothing
and others a tenth of the time of a view (``benchmarks.speed``). With ``data.resize_short_side`` larger images are made
smaller once and kept as JPEG; the crops of every training are of these. Decoding takes most of the time of a view, and
its time goes by the number of pixels. Images under corruptions are made once and kept as PNG: a corruption takes much
longer than a view.

The file has the columns image (large binary), is_made (whether the image is not its own file, but was made from it),
label (int64) and sample_id (uint64), in record batches of about ``BATCH_BYTES``; of a decoded set in one, so that its
pixels are one contiguous buffer. The key is a hash of the identity of the source, and of what makes images.

Shape letters: N images, H height, W width.
"""

import contextlib
import io
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from carft_ray.data import cache
from carft_ray.data.corruptions import CorruptedSource
from carft_ray.data.decode_images import DECODERS, decode_image
from carft_ray.data.file_index import required
from carft_ray.data.listing import StoredSource
from carft_ray.data.source import DerivedSource, ImageSet, PixelArray, Source, in_order
from carft_ray.data.views import resize
from carft_ray.errors import DataError, Problem
from carft_ray.files import fsync_file
from carft_ray.recipe.schema.data import PILLOWS_LIMIT

FORMAT_VERSION = 5
DECODED, PACKED = "decoded", "packed"  # kinds of sets
BATCH_BYTES = 32 * 10**6  # of the images in a record batch of a packed set
QUALITY = 95  # of the JPEGs of images that were made smaller
PNG_LEVEL = 1  # the quickest: noise is hardly smaller at others

_COLUMNS = required(image=pa.large_binary(), is_made=pa.bool_(), label=pa.int64(), sample_id=pa.uint64())

T = TypeVar("T")
Transform = Callable[[Image.Image], Image.Image]
OnImage = Callable[[int, int], None]  # may raise to end a build, of which nothing stays then
Made = tuple[bytes | PixelArray, bool]  # a file that is packed, or pixels that are kept as they are; is_made


@dataclass(frozen=True)
class Keeping:
    """Where a set is kept.

    Attributes:
        folder: Of all entries of the cache; made when missing.
        limit_gb: Largest size of the cache in 10^9 bytes; None: no limit.
        on_image: Called with (images done, images in all) while the entry is built; with 0 done, again and again,
            while another process builds it.
    """

    folder: Path
    limit_gb: float | None = None
    on_image: OnImage | None = None


def image_set(source: Source, transform: Transform | None, transform_key: str, keeping: Keeping) -> ImageSet:
    """Returns a set with every image decoded and transformed, from the cache or built now; see ``cache.entry``.

    Args:
        source: The images.
        transform: Applied to every image (RGB in, RGB out; all results of one size), by several threads at once; None:
            as they are.
        transform_key: Names the transform completely; another transform must have another key.
        keeping: Where it is kept.

    Returns:
        The set; its arrays are read-only views of the file.

    Raises:
        DataError: An image cannot be read, or sizes differ.
        StorageError: The entry cannot be written.
    """

    def made(index: int) -> Made:
        pixels = source.pixels(index)
        return pixels if transform is None else transformed(pixels, transform), True

    def view(table: pa.Table) -> ImageSet:
        [batch] = table.to_batches()
        height, width = (int(batch.schema.metadata[name]) for name in (b"height", b"width"))
        pixels = np.frombuffer(batch["image"].buffers()[2], dtype=np.uint8)
        labels, sample_ids = batch["label"].to_numpy(), batch["sample_id"].to_numpy()
        images_NHWC = pixels.reshape(len(source), height, width, 3)
        return ImageSet(source.name, images_NHWC, labels, sample_ids, source.groups)

    return _kept(source, DECODED, [transform_key, DECODERS], made, view, keeping)


def transformed(pixels: PixelArray, transform: Transform) -> PixelArray:
    """Returns what a transform, as of ``image_set``, makes of an image, uint8 [H, W, 3]."""
    image = transform(Image.fromarray(pixels))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class DecodedSource(DerivedSource):
    """A training set whose images, all of one size, are drawn or decoded into the cache once and then only read.

    Args:
        source: The images.
        keeping: Where it is kept.

    Raises:
        DataError: An image cannot be read, or sizes differ.
        StorageError: The set cannot be written.
    """

    def __init__(self, source: Source, keeping: Keeping) -> None:
        super().__init__(source)
        self._images_NHWC = image_set(source, None, "as-is", keeping).images_NHWC

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3]."""
        return np.asarray(self._images_NHWC[index])

    def content(self, index: int) -> bytes:
        """Returns the pixels of image ``index``."""
        return self.pixels(index).tobytes()


class PackedSource(DerivedSource):
    """A training set whose images are decoded from one file of the cache.

    Args:
        source: The images.
        keeping: Where it is kept.
        short_side: Pixels of the shorter side of larger images; None: all images are packed as they are.

    Raises:
        DataError: An image cannot be read.
        StorageError: The entry cannot be written.
    """

    def __init__(self, source: StoredSource | CorruptedSource, keeping: Keeping, short_side: int | None = None) -> None:
        stored = None if isinstance(source, CorruptedSource) else source

        def made(index: int) -> Made:
            if stored is None:
                pixels = source.pixels(index)
                return _smaller(pixels, short_side) or _png(pixels), True
            content = stored.content(index)
            smaller = None if short_side is None else _smaller(stored.decoded(content, index)[0], short_side)
            return (content, False) if smaller is None else (smaller, True)

        makes = [short_side, QUALITY, DECODERS] if short_side or stored is None else []
        table = _kept(source, PACKED, makes, made, lambda table: table, keeping)
        super().__init__(source)  # ``content`` is for hashes: of the files themselves, as they are now
        self._stored, self._images, self._is_made = stored, table["image"], table["is_made"].to_numpy()

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
        return self._stored.decoded(content, index)[0]

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


def _kept(
    source: Source,
    kind: str,
    makes: list[Any],
    made: Callable[[int], Made],
    view: Callable[[pa.Table], T],
    keeping: Keeping,
) -> T:
    """Returns what ``view`` sees in the entry of a set, which is built where it is missing or damaged.

    Args:
        source: The images.
        kind: ``DECODED`` or ``PACKED``.
        makes: What decides about the bytes of an image, besides the source.
        made: Makes an image, in several threads at once.
        view: Raises ``ValueError`` for a table that is not what it should be.
        keeping: As for ``image_set``.
    """

    def read(reader: Any) -> T:
        table = reader.read_all()
        labels, sample_ids = (table[name].to_numpy() for name in ("label", "sample_id"))
        if not (np.array_equal(labels, source.labels) and np.array_equal(sample_ids, source.sample_ids)):
            raise ValueError("its images do not match its name")
        return view(table)

    def build(path: Path) -> None:
        _build(source, kind, made, keeping.on_image, path)

    key = cache.key_of([kind, FORMAT_VERSION, source.identity, *makes])
    on_wait = None if keeping.on_image is None else partial(keeping.on_image, 0, len(source))
    return cache.entry(keeping.folder, key, read, build, keeping.limit_gb, on_wait)


def _build(source: Source, kind: str, made: Callable[[int], Made], on_image: OnImage | None, path: Path) -> None:
    """Writes the file.

    Images are made by several threads, and written in order. Those of a record batch go to a plain file first, which
    has no name, so that memory never holds more than a few images (``source.in_order``).
    """
    number = len(source)
    with (
        tempfile.TemporaryFile(dir=path.parent) as plain,
        contextlib.closing(in_order(made, range(number))) as images,
    ):
        first = next(images)
        shape = np.shape(first[0])  # () of a file
        schema = pa.schema(_COLUMNS, _metadata(source, kind, shape))
        with pa.ipc.new_file(str(path), schema) as writer:
            ends, is_made = [0], []  # of the images in the next record batch
            for index, (image, is_other) in enumerate(itertools.chain([first], images)):
                if np.shape(image) != shape:
                    (height, width), (first_height, first_width) = np.shape(image)[:2], shape[:2]
                    value = f"{width} x {height} for image {index} and {first_width} x {first_height} for image 0"
                    raise DataError(Problem(source.name, "all images of a decoded set must have one size", value))
                plain.write(image if isinstance(image, bytes) else image.tobytes())
                ends.append(plain.tell())
                is_made.append(is_other)
                if index + 1 == number or (kind == PACKED and ends[-1] >= BATCH_BYTES):
                    plain.flush()
                    content = pa.py_buffer(mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ))
                    buffers = [None, pa.py_buffer(np.array(ends, np.int64)), content]
                    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(is_made), buffers)
                    rows = slice(index + 1 - len(is_made), index + 1)
                    columns = [column, is_made, source.labels[rows], source.sample_ids[rows]]
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    plain.seek(0)
                    plain.truncate()
                    ends, is_made = [0], []
                if on_image is not None:
                    on_image(index + 1, number)
    fsync_file(path)


def _metadata(source: Source, kind: str, shape: tuple[int, ...]) -> dict[str, str]:
    """Returns what the schema of an entry says of it; the height and width of images that all have one size, too."""
    origin = source.identity.partition("/")[0].rpartition("-")[0]  # 'folder' of 'folder-2/...'
    known = {"kind": kind, "name": source.name, "source": origin, "num_images": len(source)}
    if not shape:
        return cache.about(**known)
    height, width = shape[:2]
    return {"height": str(height), "width": str(width), **cache.about(**known, image_size=f"{width} x {height}")}
