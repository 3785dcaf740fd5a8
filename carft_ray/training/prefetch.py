"""Batches that are made ahead, by threads, while the device computes; and their copy to the device.

Decoding, cropping and resizing run without Python's lock, so threads suffice (``benchmarks.speed`` compares them with
processes). A batch is shared out over all threads. On CUDA it goes through pinned memory and a stream of its own, so
that neither the copy nor its start waits for the step that runs.

Shape letters: B images of a batch, N images of a set, H height, W width.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import starmap
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from carft_ray.data.source import IdArray, IntArray, PixelArray, Source, in_order
from carft_ray.data.views import view_batch

AHEAD = 2  # batches: while one is computed on, the threads finish the next and have begun another
SMALLEST_PART, LARGEST_PART = 4, 16  # images of a batch that one thread makes in one go

T = TypeVar("T")
# ``data.views.view_batch``, or the same by several threads
MakeViews = Callable[[Source, IntArray, IdArray, int, npt.ArrayLike, float, int], PixelArray]


class Upload(NamedTuple):
    """Tensors on their way to a device."""

    tensors: tuple[Tensor, ...]
    copied: "torch.cuda.Event | None"  # None: they are there


def part_size(num_images: int, num_threads: int) -> int:
    """Returns how many images of a batch a thread makes in one go."""
    return min(max(math.ceil(num_images / max(num_threads, 1)), SMALLEST_PART), LARGEST_PART)


def num_ahead(num_images: int, num_threads: int) -> int:
    """Returns how many batches are made ahead, so that all threads have work: more where batches are small."""
    if not num_threads:
        return 0
    parts = math.ceil(max(num_images, 1) / part_size(num_images, num_threads))
    return max(AHEAD, math.ceil(num_threads / parts) + 1)


@contextlib.contextmanager
def view_threads(num_threads: int) -> Iterator[MakeViews]:
    """Gives a ``view_batch`` that several threads share; any thread may call it. 0: the plain one."""
    if not num_threads:
        yield view_batch
        return
    pool = ThreadPoolExecutor(num_threads, "views")

    def make(images: Source, indices: IntArray, *how: Any) -> PixelArray:
        return view_batch(images, indices, *how, run=pool.map, part_size=part_size(len(indices), num_threads))

    try:
        yield make
    finally:
        pool.shutdown(cancel_futures=True)


def made_ahead(make: Callable[..., T], parts: Iterable[tuple[Any, ...]], number: int) -> Generator[T, None, None]:
    """Yields ``make(*part)`` of every part, in order; the next ``number`` are being made meanwhile.

    Args:
        make: Called by several threads at once; with ``number`` 0 by the caller's, when a value is asked for.
        parts: Its arguments; taken by the caller's thread, no more than ``number`` ahead.
        number: How many are made ahead.

    Raises:
        Exception: What ``make`` raised, when all values before it are taken.
    """
    if not number:
        yield from starmap(make, parts)
    else:
        yield from in_order(lambda part: make(*part), parts, number, number)


def copy_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """Returns the stream of a device for ``upload``; None on a CPU."""
    if device.type != "cuda":
        return None
    return _copy_stream(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _copy_stream(index: int) -> "torch.cuda.Stream":
    """Returns the same stream each time: torch keeps freed memory for the stream that has asked for it."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]  # torch's own is untyped


def upload(arrays: Iterable[npt.NDArray[Any]], stream: "torch.cuda.Stream | None") -> Upload:
    """Begins to copy arrays to the device of a stream, through pinned memory; any thread may call it.

    Without a stream nothing is copied: the tensors share the arrays' memory.
    """
    tensors = tuple(torch.from_numpy(array) for array in arrays)
    if stream is None:
        return Upload(tensors, None)
    # a new thread is on the first GPU: without the first of these, to leave the stream would make a context there.
    # Memory on the device is of this stream, too: nothing else writes into it
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        there = tuple(_pinned(tensor).to(stream.device, non_blocking=True) for tensor in tensors)
        return Upload(there, stream.record_event())


def _pinned(tensor: Tensor) -> Tensor:
    """Returns a copy in pinned memory. NumPy makes it, in this thread: torch would share it out over as many threads
    as it computes with, of its own for each thread that loads.
    """
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    np.copyto(pinned.numpy(), tensor.numpy())
    return pinned


def arrived(uploaded: Upload) -> tuple[Tensor, ...]:
    """Returns the tensors of ``upload``, for the stream that computes in the caller's thread; it waits, not the caller.

    torch keeps pinned memory until its copy is done, and memory on the device until this stream has used it.
    """
    if uploaded.copied is not None:
        computing = torch.cuda.current_stream(uploaded.tensors[0].device)
        computing.wait_event(uploaded.copied)
        for tensor in uploaded.tensors:
            tensor.record_stream(computing)
    return uploaded.tensors


@contextlib.contextmanager
def images_ahead(
    images_NHWC: PixelArray, positions: IntArray, device: torch.device, ahead: bool
) -> Iterator[Callable[[IntArray], Tensor]]:
    """Gives a function that returns the images of a batch on the device, and meanwhile reads the next batch.

    Args:
        images_NHWC: Decoded images, usually memory-mapped.
        positions: All that are wanted [M], rising; a batch is a part of them without gaps, and the next one is taken
            to be as large.
        device: Where they are wanted.
        ahead: False: nothing is read ahead, as where the same cores compute.
    """
    stream = copy_stream(device)

    def read(batch: IntArray) -> Upload:
        return upload([images_NHWC[batch]], stream)

    if not ahead:
        yield lambda batch: arrived(read(batch))[0]
        return
    with ThreadPoolExecutor(1, "images") as pool:
        pending: list[tuple[IntArray, Future[Upload]]] = []

        def images_of(batch: IntArray) -> Tensor:
            known, future = pending.pop() if pending else (batch[:0], None)
            found = future.result() if future is not None and np.array_equal(known, batch) else read(batch)
            start = int(np.searchsorted(positions, batch[-1])) + 1
            following = positions[start : start + len(batch)]
            if len(following):
                pending.append((following, pool.submit(read, following)))
            return arrived(found)[0]

        yield images_of
