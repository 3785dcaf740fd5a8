"""Out of memory on a device: recognised, reported with its numbers; and batches that halve until they fit.

The loss is a sum over samples and predictions are per image, so no split into smaller batches changes a result. Which
micro-batch a training is tried with again is decided in ``launch.workers.micro_batch``.
"""

import contextlib
import ctypes
import gc
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from carft_ray.errors import OutOfMemoryError, Problem
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.words import counted

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
Positions = npt.NDArray[np.int64]

# of torch's allocator for the CPU, and of the libraries beside its allocator on a GPU, which is an exception class. A
# full GPU is mostly CUBLAS_STATUS_NOT_INITIALIZED to cuBLAS: each thread makes a handle of its own at its first product
SHORTAGE = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA out of memory|CUDA (driver )?error: out of memory"
    r"|Triton Error \[CUDA\]: out of memory|Cuda failure.*out of memory|STATUS_\w*ALLOC(ATION)?_FAILED"
    r"|NOT_INITIALIZED when calling .cublasCreate"
)
NO_PRIMITIVE = "could not create a primitive"  # of oneDNN, all that it says; another cause has more words


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an exception of torch, NumPy or Python says that there was no memory. Needs no torch."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (text == NO_PRIMITIVE or SHORTAGE.search(text) is not None)


def micro_batch_of(train: TrainConfig, num_workers: int) -> int:
    """Returns the images of one forward pass of a worker: ``micro_batch``, at most its part of the global batch."""
    part = math.ceil(train.batch_size / num_workers)
    return min(train.micro_batch or part, part)


@contextlib.contextmanager
def explained_shortage(
    what: str, num_images: int, image_size: int, device: "torch.device", micro_batch: int = 0
) -> Iterator[None]:
    """Turns running out of memory into an ``OutOfMemoryError`` that says what did not fit.

    Args:
        what: Names the place.
        num_images: That are computed at a time; 0 where weights alone are copied.
        image_size: Side of an image in pixels.
        device: Where.
        micro_batch: Of the error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(shortage(what, num_images, image_size, device), micro_batch) from error


def in_batches(
    run: Callable[[Positions], Part], positions: Positions, batch_size: int, image_size: int, device: "torch.device"
) -> list[Part]:
    """Runs over positions in batches; one that does not fit into memory, and all after it, are halved.

    Args:
        run: Given the positions of a batch.
        positions: [N].
        batch_size: Largest batch.
        image_size: Side of an image in pixels, for the message.
        device: Where it runs.

    Returns:
        What ``run`` returned, in order.

    Raises:
        OutOfMemoryError: One image does not fit.
    """
    parts: list[Part] = []
    start = 0
    while start < len(positions):
        batch = positions[start : start + batch_size]
        problem = None
        try:
            parts.append(run(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            problem = shortage("evaluation", len(batch), image_size, device)
        if problem is None:
            start += len(batch)
        elif len(batch) == 1:
            raise OutOfMemoryError(problem)
        else:  # the exception is gone by now, and with it what it held
            import torch

            batch_size = len(batch) // 2
            torch.cuda.empty_cache()  # of what torch keeps in pieces that may be too small now; nothing without a GPU
    return parts


def free_device() -> None:
    """Gives back what torch keeps of a GPU after a training, in a process that lives on; nothing without a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # modules that are distributed or compiled refer to themselves
        torch.cuda.empty_cache()


def free_host() -> None:
    """Gives the memory that a training has freed back to the system; does nothing where the C library is not glibc.

    glibc keeps freed memory in the arena that it came from. The next training runs in another thread, which may get
    another arena, so a process could come to hold the memory of one training per arena.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def shortage(what: str, num_images: int, image_size: int, device: "torch.device") -> Problem:
    """Returns the message that a batch of images, or without one a copy of weights, does not fit into memory."""
    rule = f"{counted(num_images, 'image')} of {image_size} x {image_size} pixels at a time"
    rule = rule if num_images else "two more copies of the model's weights"
    step = "Free memory of the device, or take a larger one or a smaller model; then run the same command again."
    value = f"too little on the device {device}"
    if device.type == "cuda":
        import torch

        from carft_ray.model.device import device_name

        free, total = torch.cuda.mem_get_info(device)
        value = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free on {device_name(device)}"
        share = torch.cuda.get_per_process_memory_fraction(device)  # below 1 by ``device.limit_memory``
        value += f", of which this process may use {share * total / 1e9:.1f}" if share < 1 else ""
    return Problem(what, f"{rule} must fit into memory", value, next_step=step)
