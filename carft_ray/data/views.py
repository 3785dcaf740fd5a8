"""Data order and views as pure functions: nothing is kept between calls, so resume needs only (epoch, step).

A view is what one visit shows of one image: a random crop, resized. It depends on (seed, sample id, visit, view
parameters), never on rank, world size, batch or the number of epochs.

Shape letters: B images of a batch, N images of a set, H height, W width, S side of the view.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from carft_ray.data.philox import STREAM_PERMUTATION, STREAM_VIEW, words
from carft_ray.data.source import IdArray, IntArray, PixelArray, Source

VIEW_VERSION = 1  # changes when the same arguments give another view; part of the key of whatever stores views
INTERPOLATION = "bicubic"

_NUM_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


def permutation(seed: int, epoch: int, n: int) -> IntArray:
    """Returns the order in which an epoch shows a set: a permutation of 0..n-1, int64 [n].

    Position i gets a 64-bit word of (seed, epoch, i); the order is the stable sort of the words. ``epoch`` counts
    from 0, below 2**32; 0 <= seed < 2**64.
    """
    block = words(seed, STREAM_PERMUTATION, epoch, np.arange(n, dtype=np.uint64))[:, 0]
    keys = block[:, 0].astype(np.uint64) | (block[:, 1].astype(np.uint64) << np.uint64(32))
    return np.argsort(keys, kind="stable").astype(np.int64)


def batches(seed: int, epoch: int, n: int, batch_size: int, rank: int, world_size: int) -> list[IntArray]:
    """Returns the indices that one worker takes from each global batch of an epoch.

    Global batch i is the i-th slice of ``permutation``; the last one may be smaller. The part of rank r is
    **contiguous**: positions ``b * r // world_size`` to ``b * (r + 1) // world_size`` of a batch of b. So the parts
    of all ranks, one behind the other, are the global batch in its order; they differ by at most one image, and a
    part is empty where the batch is smaller than the world.

    Args:
        seed: Seed of the data order.
        epoch: Counts from 0.
        n: Size of the training set.
        batch_size: Global batch.
        rank: This worker, 0 <= rank < world_size.
        world_size: Number of workers.

    Returns:
        One int64 array per global batch, ``ceil(n / batch_size)`` in all.
    """
    return [indices for _, indices in parts_of(permutation(seed, epoch, n), batch_size, rank, world_size)]


def parts_of(
    order: IntArray, batch_size: int, rank: int, world_size: int, first_batch: int = 0
) -> Iterator[tuple[int, IntArray]]:
    """Yields a worker's part of each global batch from ``first_batch`` on, as ``batches`` has them.

    Args:
        order: Of an epoch (``permutation``).
        batch_size: Global batch.
        rank: This worker.
        world_size: Number of workers.
        first_batch: Number of the first one.

    Yields:
        Where the part begins in ``order``, and its indices.
    """
    for start in range(first_batch * batch_size, len(order), batch_size):
        size = min(batch_size, len(order) - start)
        first, end = start + size * rank // world_size, start + size * (rank + 1) // world_size
        yield first, order[first:end]


def crop_boxes(
    seed: int,
    sample_ids: IdArray,
    visit: npt.ArrayLike,
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    crop_scale: float,
) -> IntArray:
    """Draws the crops of views by the rule of torchvision's ``RandomResizedCrop.get_params``, with our words.

    Up to ten tries: area uniform in [crop_scale, 1] of the image, ratio w/h log-uniform in [3/4, 4/3], sides rounded
    (halves to even); the first that fits is put at a uniform integer place. If none fits: the centre crop whose ratio
    is nearest to the image's, which is the whole image when its own ratio lies in the range. Try k uses block k:
    words 0..3 are area, ratio, top, left. A word w stands for the fraction w / 2**32, and for the integer
    ``w * m // 2**32`` below m (bias at most m / 2**32).

    Only +, *, /, sqrt and rint are used on floats, which IEEE 754 fixes to the bit: boxes are the same everywhere.

    Args:
        seed: View seed.
        sample_ids: Stable ids of the images, uint64 [B].
        visit: How often each image has been shown before; one number, or [B].
        widths: Widths in pixels; one number, or [B].
        heights: Heights in pixels; one number, or [B].
        crop_scale: Lower end of the area as a fraction of the image, 0 < crop_scale <= 1.

    Returns:
        Boxes (left, top, right, bottom) in pixels, int64 [B, 4], not empty and inside their images.

    Raises:
        ValueError: ``visit`` is out of range.
    """
    num_images = len(sample_ids)
    width = np.broadcast_to(np.asarray(widths, dtype=np.int64), (num_images,))
    height = np.broadcast_to(np.asarray(heights, dtype=np.int64), (num_images,))
    draws = words(seed, STREAM_VIEW, visit, sample_ids, _NUM_TRIES)
    fraction = draws[..., :2].astype(np.float64) / 2.0**32
    area = (width * height)[:, None] * (crop_scale + (1 - crop_scale) * fraction[..., 0])
    ratio = _exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * fraction[..., 1])
    try_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    try_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (try_w > 0) & (try_w <= width[:, None]) & (try_h > 0) & (try_h <= height[:, None])

    row, first = np.arange(num_images), np.argmax(fits, axis=1)
    found = fits[row, first]
    w, h = _fallback(width, height)
    w, h = np.where(found, try_w[row, first], w), np.where(found, try_h[row, first], h)
    place = draws[row, first, 2:].astype(np.uint64)
    top = np.where(found, _below(place[:, 0], height - h + 1), (height - h) // 2)
    left = np.where(found, _below(place[:, 1], width - w + 1), (width - w) // 2)
    return np.stack([left, top, left + w, top + h], axis=1)


def _exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """exp by its Taylor series in Horner's form; exact to rounding for abs(x) <= log(4/3)."""
    result = np.ones_like(x)
    for k in range(13, 0, -1):
        result = 1 + result * x / k
    return result


def _below(word: npt.NDArray[np.uint64], limit: IntArray) -> IntArray:
    """Integers below ``limit`` (at least 1, below 2**32) from 32-bit words."""
    return ((word * limit.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def _fallback(width: IntArray, height: IntArray) -> tuple[IntArray, IntArray]:
    """Sides of the centre crop for images that no try fits; at least 1 pixel (torchvision gives 0 for slivers)."""
    image_ratio = width / height
    w = np.where(image_ratio > _RATIO[1], np.rint(height * _RATIO[1]).astype(np.int64), width)
    h = np.where(image_ratio < _RATIO[0], np.rint(width / _RATIO[0]).astype(np.int64), height)
    return np.maximum(w, 1), np.maximum(h, 1)


def view_batch(
    images: Source | PixelArray,
    indices: IntArray,
    sample_ids: IdArray,
    seed: int,
    visit: npt.ArrayLike,
    crop_scale: float,
    image_size: int,
) -> PixelArray:
    """Returns the views of several images; row b is the view of image ``indices[b]``: random crop, then bicubic
    resize to a square.

    Args:
        images: A source, or decoded images, uint8 [N, H, W, 3].
        indices: Positions of the wanted images, int64 [B]; B may be 0.
        sample_ids: Stable ids **of the wanted images**, uint64 [B].
        seed: View seed.
        visit: How often the images have been shown before; one number, or [B].
        crop_scale: Lower end of the area of the crop, 0 < crop_scale <= 1.
        image_size: Side S of the views in pixels.

    Returns:
        Views, uint8 [B, S, S, 3].

    Raises:
        ValueError: ``sample_ids`` does not go with ``indices``.
        DataError: An image of the source cannot be read.
    """
    if sample_ids.shape != indices.shape:
        raise ValueError(f"one sample id per index must be given, but got {sample_ids.shape} and {indices.shape}")
    if isinstance(images, np.ndarray):
        height, width = images.shape[1:3]
        if crop_scale == 1 and height == width == image_size:
            return images[indices]  # every box is the whole image and the resize a copy
        column = Image.fromarray(images[indices].reshape(-1, width, 3))  # one conversion instead of B
        chosen = [column.crop((0, top, width, top + height)) for top in range(0, len(indices) * height, height)]
    else:
        chosen = [Image.fromarray(images.pixels(index)) for index in indices.tolist()]
    sizes = np.array([image.size for image in chosen], dtype=np.int64).reshape(-1, 2)
    boxes = crop_boxes(seed, sample_ids, visit, sizes[:, 0], sizes[:, 1], crop_scale).tolist()
    views = Image.new("RGB", (image_size, image_size * len(chosen)))
    for row, (image, box) in enumerate(zip(chosen, boxes, strict=True)):
        views.paste(_resize(image, tuple(box), image_size), (0, row * image_size))
    return np.array(views).reshape(len(chosen), image_size, image_size, 3)


def _resize(image: Image.Image, box: tuple[int, int, int, int], image_size: int) -> Image.Image:
    """Crop, then bicubic resize, as torchvision does it: the filter sees nothing outside the box."""
    return image.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
