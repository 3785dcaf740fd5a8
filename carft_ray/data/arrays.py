"""Decoded sets in memory-mapped Arrow files: one copy per machine, shared by all processes through the page cache.

An entry of the cache is a folder ``<key>/`` with one file ``set.arrow`` (Arrow IPC): a single record batch with the
columns image (fixed-size binary, H*W*3 bytes), label (int64) and sample_id (uint64), so that each column is one
contiguous buffer. The key is a hash of what the pixels depend on; an entry is never changed, only built or replaced
when it is damaged. Entries may be deleted at any time.

Shape letters: N images, H height, W width.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

from carft_ray.data.source import ImageSet, PixelArray, Source
from carft_ray.errors import DataError, Problem, StorageError
from carft_ray.files import fsync_file, new_folder, writing

FORMAT_VERSION = 1

Transform = Callable[[Image.Image], Image.Image]
OnImage = Callable[[int, int], None]

_log = logging.getLogger(__name__)


def image_set(
    source: Source,
    transform: Transform | None,
    transform_key: str,
    cache_dir: Path,
    on_image: OnImage | None = None,
) -> ImageSet:
    """Returns a set with every image decoded and transformed, from the cache or built now.

    Several processes may ask at once: one builds, the others wait for it. A build that dies leaves nothing under the
    entry's name. An entry that cannot be opened is built again, with a warning in the log.

    Args:
        source: The images.
        transform: Applied to every image (RGB in, RGB out; all results of one size); None: as they are.
        transform_key: Names the transform completely; another transform must have another key.
        cache_dir: Folder of all entries; made when missing.
        on_image: Called with (images done, images in all) while the entry is built.

    Returns:
        The set; its arrays are read-only views of the file.

    Raises:
        DataError: An image cannot be read, sizes differ, or there is no image.
        StorageError: The entry cannot be written.
    """
    entry = cache_dir / _key(source, transform_key)
    if (found := _open(entry, source)) is not None:
        return found
    with lock(cache_dir / f"{entry.name}.lock"):
        if (found := _open(entry, source)) is not None:
            return found
        _remove_remains(entry)
        with new_folder(entry) as folder:
            _build(source, transform, folder, on_image)
    if (found := _open(entry, source)) is not None:
        return found
    raise StorageError(Problem(str(entry), "a decoded set must be readable once it is written"))


def _key(source: Source, transform_key: str) -> str:
    parts = [FORMAT_VERSION, source.fingerprint, transform_key, PIL.__version__]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _open(entry: Path, source: Source) -> ImageSet | None:
    """Opens an entry; None when it is missing or, after a warning, when it is damaged."""
    path = entry / "set.arrow"
    with writing(path):
        if not path.exists():
            return None
    try:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
        height, width = (int(batch.schema.metadata[name]) for name in (b"height", b"width"))
        images_NHWC = _column(batch, "image").reshape(len(source), height, width, 3)
        labels = _column(batch, "label").view(np.int64)
        sample_ids = _column(batch, "sample_id").view(np.uint64)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("The decoded set %s is damaged and will be built again: %s", path, error)
        return None
    if not (np.array_equal(labels, source.labels) and np.array_equal(sample_ids, source.sample_ids)):
        _log.warning("The decoded set %s holds other images than its name says and will be built again", path)
        return None
    return ImageSet(source.name, images_NHWC, labels, sample_ids, source.groups)


def _column(batch: pa.RecordBatch, name: str) -> PixelArray:
    """The bytes of a column, uint8, without a copy."""
    return np.frombuffer(batch.column(name).buffers()[1], dtype=np.uint8)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive flock; it ends with the process, however that ends. The empty lock file stays."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_remains(entry: Path) -> None:
    """Removes a damaged entry and what builds that died have left. Only the holder of the lock may."""
    for folder in (entry, *entry.parent.glob(f".{entry.name}.*.tmp")):
        if folder.exists():
            with writing(folder):
                shutil.rmtree(folder)


def _build(source: Source, transform: Transform | None, folder: Path, on_image: OnImage | None) -> None:
    """Writes ``set.arrow``. Pixels go to a plain file first, so that memory never holds more than one image."""
    if not len(source):
        raise DataError(Problem(source.name, "there must be at least one image"))
    pixels_path, path = folder / "pixels", folder / "set.arrow"
    shape: tuple[int, ...] | None = None
    with open(pixels_path, "wb") as file:
        for index in range(len(source)):
            pixels = source.pixels(index)
            if transform is not None:
                image = transform(Image.fromarray(pixels))
                pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise DataError(_other_size(source, index, pixels.shape, shape))
            file.write(pixels.tobytes())
            if on_image is not None:
                on_image(index + 1, len(source))
    height, width = shape[:2] if shape else (0, 0)
    schema = pa.schema(
        [
            pa.field("image", pa.binary(height * width * 3), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("sample_id", pa.uint64(), nullable=False),
        ],
        metadata={"format_version": str(FORMAT_VERSION), "height": str(height), "width": str(width)},
    )
    with pa.memory_map(str(pixels_path)) as pixel_file:
        image_buffer = pixel_file.read_buffer()
        images = pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, len(source), [None, image_buffer])
        batch = pa.record_batch([images, pa.array(source.labels), pa.array(source.sample_ids)], schema=schema)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)
    fsync_file(path)
    pixels_path.unlink()


def _other_size(source: Source, index: int, shape: tuple[int, ...], first: tuple[int, ...]) -> Problem:
    value = f"{shape[1]} x {shape[0]} for image {index} and {first[1]} x {first[0]} for image 0"
    return Problem(source.name, "all images of a decoded set must have one size", value)
