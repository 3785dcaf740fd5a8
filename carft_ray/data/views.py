"""Views of training images and the order of an epoch, as pure functions: resume needs only (epoch, step).

A view is what one visit shows of one image: a random crop, resized. It depends on (seed, sample id, visit, view
parameters), never on rank, world size, batch or the number of epochs. The order of images depends on seed and epoch.

Shape letters: B images of a batch, N images of a set, H height, W width, S side of the view.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from carft_ray.data.philox import STREAM_PERMUTATION, STREAM_VIEW, words
from carft_ray.data.source import IdArray, IntArray, PixelArray, Source

VIEW_VERSION = 2  # changes when the same arguments give another view; part of the key of whatever stores views
INTERPOLATION = "bicubic"
_NUM_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
Try = tuple[float, float, int, int]  # area as a share of the image, ratio w/h, words of top and left
Run = Callable[[Callable[[slice], None], Iterable[slice]], Iterable[None]]


def crop_tries(seed: int, sample_ids: IdArray, visit: npt.ArrayLike, crop_scale: float) -> Iterator[Iterator[Try]]:
    """Yields for every image the tries of ``crop_box``, which do not depend on its size.

    Try k uses block k of the image's words: area, ratio, top, left. A word w stands for the fraction w / 2**32, and
    for the integer ``w * m // 2**32`` below m (bias at most m / 2**32).
    """
    draws = words(seed, STREAM_VIEW, visit, sample_ids, _NUM_TRIES)
    fraction = draws[..., :2].astype(np.float64) / 2.0**32
    share = crop_scale + (1 - crop_scale) * fraction[..., 0]
    ratio = _exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * fraction[..., 1])
    columns = (share.tolist(), ratio.tolist(), draws[..., 2].tolist(), draws[..., 3].tolist())
    return (zip(*rows, strict=True) for rows in zip(*columns, strict=True))


def crop_box(tries: Iterator[Try], width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the crop of one image by the rule of torchvision's ``RandomResizedCrop.get_params``, with our words.

    Up to ten tries: area uniform in [crop_scale, 1] of the image, ratio w/h log-uniform in [3/4, 4/3], sides rounded
    (halves to even); the first that fits is put at a uniform integer place. If none fits: the centre crop whose ratio
    is nearest to the image's, which is the whole image when its own ratio lies in the range.

    Only +, *, /, sqrt and round are used on floats, which IEEE 754 fixes to the bit: boxes are the same everywhere.

    Args:
        tries: Of the image (``crop_tries``).
        width: Pixels.
        height: Pixels.

    Returns:
        Left, top, right, bottom in pixels, not empty and inside the image.
    """
    for share, ratio, top_word, left_word in tries:
        area = width * height * share
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = top_word * (height - h + 1) >> 32, left_word * (width - w + 1) >> 32
            return left, top, left + w, top + h
    w, h = _fallback(width, height)
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def _exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """exp by its Taylor series in Horner's form; exact to rounding for abs(x) <= log(4/3)."""
    result = np.ones_like(x)
    for k in range(13, 0, -1):
        result = 1 + result * x / k
    return result


def _fallback(width: int, height: int) -> tuple[int, int]:
    """Sides of the centre crop for images that no try fits; at least 1 pixel (torchvision gives 0 for slivers)."""
    image_ratio = width / height
    w = round(height * _RATIO[1]) if image_ratio > _RATIO[1] else width
    h = round(width / _RATIO[0]) if image_ratio < _RATIO[0] else height
    return max(w, 1), max(h, 1)


def view_batch(
    images: Source | PixelArray,
    indices: IntArray,
    sample_ids: IdArray,
    seed: int,
    visit: npt.ArrayLike,
    crop_scale: float,
    image_size: int,
    *,
    run: Run = map,
    part_size: int | None = None,
) -> PixelArray:
    """Returns the views of several images, uint8 [B, S, S, 3]: random crop, then bicubic resize to a square.

    Args:
        images: A source, or decoded images, uint8 [N, H, W, 3].
        indices: Positions of the wanted images, int64 [B]; B may be 0.
        sample_ids: Stable ids **of the wanted images**, uint64 [B].
        seed: View seed.
        visit: How often the images have been shown before; one number, or [B].
        crop_scale: Lower end of the area of the crop, 0 < crop_scale <= 1.
        image_size: Side S of the views in pixels.
        run: Makes the parts of the batch: ``map``, or that of a pool of threads.
        part_size: Images of a part; None: all.

    Raises:
        ValueError: ``sample_ids`` does not go with ``indices``.
        DataError: An image of the source cannot be read.
    """
    if sample_ids.shape != indices.shape:
        raise ValueError(f"one sample id per index must be given, but got {sample_ids.shape} and {indices.shape}")
    views_BHWC = np.empty((len(indices), image_size, image_size, 3), dtype=np.uint8)
    visits = np.broadcast_to(np.asarray(visit), indices.shape)
    size = part_size or max(1, len(indices))

    def fill(rows: slice) -> None:
        draws = crop_tries(seed, sample_ids[rows], visits[rows], crop_scale)
        for view, index, tries in zip(views_BHWC[rows], indices[rows].tolist(), draws, strict=True):
            _show(images[index] if isinstance(images, np.ndarray) else images.pixels(index), tries, view)

    for _ in run(fill, [slice(start, start + size) for start in range(0, len(indices), size)]):
        pass
    return views_BHWC


def _show(pixels_HWC: PixelArray, tries: Iterator[Try], view_HWC: PixelArray) -> None:
    """Makes one view; the image is let go before the next is decoded, which takes its place in memory and caches."""
    left, top, right, bottom = crop_box(tries, pixels_HWC.shape[1], pixels_HWC.shape[0])
    resize(pixels_HWC[top:bottom, left:right], view_HWC)


def resize(crop_HWC: PixelArray, view_HWC: PixelArray) -> None:
    """Antialiased bicubic resize of a crop: the filter sees nothing outside of it.

    torch's kernel for uint8, which works without Python's lock in one thread, with integer weights. Its pixels are the
    same with and without AVX; from Pillow's, whose weights are finer, a few differ by 1. The crop must be seen as
    channels last, or it takes twice as long.
    """
    import torch  # not at the top: what is read of this module by quick commands needs no torch

    if crop_HWC.shape == view_HWC.shape:  # the same pixels, without the call
        view_HWC[:] = crop_HWC
        return
    if not crop_HWC.flags.writeable:
        crop_HWC = crop_HWC.copy()  # torch warns of arrays that are read-only
    crop_BCHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None]
    size = view_HWC.shape[:2]
    resized_BCHW = torch.nn.functional.interpolate(crop_BCHW, size, mode="bicubic", antialias=True)
    view_HWC[:] = resized_BCHW[0].permute(1, 2, 0).numpy()


def permutation(seed: int, epoch: int, n: int) -> IntArray:
    """Returns the order in which an epoch shows a set: a permutation of 0..n-1, int64 [n].

    Position i gets a 64-bit word of (seed, epoch, i); the order is the stable sort of the words. ``epoch`` counts
    from 0, below 2**32; 0 <= seed < 2**64.
    """
    block = words(seed, STREAM_PERMUTATION, epoch, np.arange(n, dtype=np.uint64))[:, 0]
    keys = block[:, 0].astype(np.uint64) | (block[:, 1].astype(np.uint64) << np.uint64(32))
    return np.argsort(keys, kind="stable").astype(np.int64)


def parts_of(
    order: IntArray, batch_size: int, rank: int, world_size: int, first_batch: int = 0
) -> Iterator[tuple[int, IntArray]]:
    """Yields a worker's part of each global batch of an epoch from ``first_batch`` on.

    Global batch i is the i-th slice of ``order``; the last one may be smaller. The part of rank r is **contiguous**:
    positions ``b * r // world_size`` to ``b * (r + 1) // world_size`` of a batch of b. So the parts of all ranks, one
    behind the other, are the global batch in its order; they differ by at most one image, and a part is empty where
    the batch is smaller than the world.

    Args:
        order: Of an epoch (``permutation``), int64 [n].
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
