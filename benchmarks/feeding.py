"""Whether views are made as fast as pictures are decoded, and reach a device in time: ``python -m benchmarks.feeding``

    view        one training view, with one thread, against decoding its picture alone (processor time): with Pillow,
                and with the decoder that views use
    device      a stand-in: a step of the main thread makes 300 small calls of torch, as a training starts kernels, and
                sleeps without Python's lock. Views come from the training loop's threads, or from the processes of a
                DataLoader that makes the same views.
      fed       a device that waits only for views: images/s against those of as many threads that make views and
                nothing else (threads / view time, with all of them at work)
      step      a device that needs twice as long for a batch as its views: a step with views against one without

Pictures are JPEG files in memory, synthetic with the spectrum of photos: of 46 kB, and of 108 kB, which is the mean of
ImageNet's training files (138 GB / 1.28 million) at the size that most of them have. Everything takes turns.
"""

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.decoders import pillow
from benchmarks.photos import jpeg
from benchmarks.rows import Row, median_row
from carft_ray.data.images import decode_image
from carft_ray.data.source import IdArray, IntArray, PixelArray
from carft_ray.data.views import view_batch
from carft_ray.environment import usable_cores
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.training import loop
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import Targets

SIDE, WIDTH, HEIGHT, CROP_SCALE = 224, 500, 375, 0.9
LIGHT, HEAVY = (0.75, 90), (0.95, 94)  # detail and quality of the pictures: 46 and 108 kB
NUM_CALLS = 300
VIEW_TARGET, FED_TARGET, STEP_TARGET = 1.25, 0.9, 1.05
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """JPEG files in memory, as the source of a training; image i is file ``i % len(contents)``."""

    contents: tuple[bytes, ...]
    labels: IntArray
    sample_ids: IdArray

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.labels)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index``, uint8 [H, W, 3]."""
        return decode_image(self.contents[index % len(self.contents)], "benchmark")


def pictures(num_images: int, num_distinct: int, kind: tuple[float, int]) -> Pictures:
    """Returns a set of pictures of one kind."""
    contents = tuple(jpeg(seed, WIDTH, HEIGHT, *kind) for seed in range(num_distinct))
    numbers = np.arange(num_images)
    return Pictures(contents, numbers, numbers.astype(np.uint64))


class _Batches(Dataset[Tensor]):
    """The views of a training batch by batch, for the processes of a DataLoader."""

    def __init__(self, source: Pictures, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    def __len__(self) -> int:
        return len(self.source) // self.batch_size

    def __getitem__(self, number: int) -> Tensor:
        indices = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        return torch.from_numpy(_views(self.source, indices))


def _views(source: Pictures, indices: IntArray) -> PixelArray:
    return view_batch(source, indices, source.sample_ids[indices], 0, 0, CROP_SCALE, SIDE)  # type: ignore[arg-type]


def view_rows(kind: tuple[float, int], num_pictures: int, repeats: int) -> list[Row]:
    """Measures views against decoding with Pillow, for which the target was set, and with the product's decoder."""
    source = pictures(num_pictures, num_pictures, kind)
    everything, seconds = np.arange(num_pictures), []
    for _ in range(repeats + 1):
        began = time.process_time()
        for content in source.contents:
            pillow(content)
        by_pillow = time.process_time()
        for index in range(num_pictures):
            source.pixels(index)
        decoded = time.process_time()
        _views(source, everything)
        seconds.append((by_pillow - began, decoded - by_pillow, time.process_time() - decoded))
    with_pillow, own = ([each[2] / each[which] for each in seconds[1:]] for which in (0, 1))
    view_ms = 1000 * statistics.median(each[2] for each in seconds[1:]) / num_pictures
    size = sum(map(len, source.contents)) / num_pictures / 1000
    name = f"view / decoding, {size:.0f} kB"
    return [
        median_row(f"{name}, with Pillow ({view_ms:.2f} ms a view)", with_pillow, VIEW_TARGET),
        median_row(f"{name}, as it is decoded here", own, None),
    ]


def device_rows(num_threads: int, batch_size: int, num_batches: int, repeats: int, processes: bool) -> list[Row]:
    """Measures feeding by threads and, with ``processes``, by as many processes."""
    source = pictures(batch_size * num_batches, min(64, batch_size * num_batches), HEAVY)
    feeds: dict[str, Callable[[], Iterator[Tensor]]] = {"threads": lambda: _by_threads(source, batch_size, num_threads)}
    if processes:
        loader = DataLoader(
            _Batches(source, batch_size), None, num_workers=num_threads, persistent_workers=True, prefetch_factor=2
        )
        feeds["processes"] = lambda: iter(loader)
    fed: dict[str, list[float]] = {name: [] for name in feeds}
    steps: dict[str, list[float]] = {name: [] for name in feeds}
    for turn in range(repeats + 1):
        reference = _views_alone(source, batch_size, num_threads)
        alone = _run(_resident(source, batch_size, num_batches), 2 * reference)
        for name, feed in feeds.items():
            quick, slow = _run(feed(), 0.0), _run(feed(), 2 * reference)
            if turn:
                fed[name].append(reference / quick)
                steps[name].append(slow / alone)
    rows = []
    for name in feeds:
        target = f"{num_threads} {name}, batches of {batch_size}"
        rows.append(median_row(f"fed, {target}: images/s / (threads / view time)", fed[name], FED_TARGET, False))
        rows.append(median_row(f"step, {target}: with views / without", steps[name], STEP_TARGET, True))
    return rows


def _by_threads(source: Pictures, batch_size: int, num_threads: int) -> Iterator[Tensor]:
    train = TrainConfig(epochs=1, batch_size=batch_size, crop_scale=CROP_SCALE, kl_weight=0.0)
    clip: Any = SimpleNamespace(image_size=SIDE, logit_scale=100.0)  # no model runs
    targets = Targets(clip, torch.zeros(1, 1), source, train, CPU)  # type: ignore[arg-type]
    for batch in loop._views(targets, train, RunContext(), 0, 1 + num_threads):
        yield batch.pixels_BHWC


def _resident(source: Pictures, batch_size: int, num_batches: int) -> Iterator[Tensor]:
    batch = torch.from_numpy(_views(source, np.arange(batch_size)))
    for _ in range(num_batches):
        yield batch


def _views_alone(source: Pictures, batch_size: int, num_threads: int) -> float:
    """Returns seconds a batch of threads that make views and nothing else."""
    parts = [np.arange(start, len(source), num_threads) for start in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        began = time.perf_counter()
        for done in [pool.submit(_views, source, part) for part in parts]:
            done.result()
        return (time.perf_counter() - began) / len(source) * batch_size


def _run(batches: Iterator[Tensor], sleep_s: float) -> float:
    """Returns seconds a step: small calls, and a sleep without Python's lock. Of the first no time is taken."""
    one, steps, began = torch.ones(1), 0, 0.0
    total = torch.zeros(1)
    for _ in batches:
        if not began:
            began = time.perf_counter()
            continue
        for _ in range(NUM_CALLS):
            total.add_(one)
        time.sleep(sleep_s)
        steps += 1
    return (time.perf_counter() - began) / steps


def rows(quick: bool, processes: bool = False) -> list[Row]:
    """Measures everything. ``quick``: half a minute."""
    num_pictures, repeats = (16, 5) if quick else (40, 15)
    torch.set_num_threads(1)
    found = [row for kind in (LIGHT, HEAVY) for row in view_rows(kind, num_pictures, repeats)]
    num_batches, turns = (12, 3) if quick else (24, 7)
    return found + device_rows(usable_cores(), 32, num_batches, turns, processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 all targets were reached, 1 not all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feeding", description="Views, and their way to a device."
    )
    parser.add_argument("--quick", action="store_true", help="fewer pictures and turns")
    parser.add_argument("--processes", action="store_true", help="also by the processes of a DataLoader")
    arguments = parser.parse_args(argv)
    print(f"{platform.machine()}, {usable_cores()} CPUs, torch {torch.__version__}; synthetic pictures")
    found = rows(arguments.quick, arguments.processes)
    for row in found:
        print(row)
    return 0 if all(row.is_met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
