"""How fast views reach a training, and decoded images an evaluation.

    view        one training view, with one thread, against decoding its picture alone (processor time): with Pillow,
                and with the decoder that views use
    device      a stand-in: a step of the main thread makes 300 small calls of torch, as a training starts kernels, and
                sleeps without Python's lock. Views come from the training loop's threads, or from the processes of a
                DataLoader that makes the same views.
      fed       a device that waits only for views: images/s against those of as many threads that make views and
                nothing else (threads / view time, with all of them at work)
      step      a device that needs twice as long for a batch as its views: a step with views against one without
    loader      images/s against ImageFolder and a DataLoader on the same JPEG files, with as many workers (processes of
                the DataLoader, threads of carft-ray). Evaluation: the decoded set, up to the pixels, which are what
                carft-ray gives to the device, and up to normalised floats. Training: the views of the loop, from files
                and packed. The bytes alone, of files and packed, in random order: from memory, and from the disk (where
                the system can be asked to forget a file).

Pictures are JPEG files, synthetic with the spectrum of photos. Everything takes turns; the first turn does not count.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from benchmarks.photos import CLASSES, HEAVY, HEIGHT, LIGHT, WIDTH, Pictures, pictures, pillow, write_tree
from benchmarks.rows import Row, median_row
from carft_ray.data.cache import list_entries
from carft_ray.data.cached_sets import Keeping, PackedSource, image_set
from carft_ray.data.listing import StoredSource
from carft_ray.data.selection import stored_source
from carft_ray.data.sets import list_set
from carft_ray.data.source import ImageSet, IntArray, PixelArray, Source
from carft_ray.data.views import view_batch
from carft_ray.environment import usable_cores
from carft_ray.model.classifier import normalised
from carft_ray.recipe.schema.data import FolderSet
from carft_ray.recipe.schema.train import TrainConfig
from carft_ray.training import loop
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import Targets

SIDE, CROP_SCALE = 224, 0.9
NUM_CALLS = 300
VIEW_TARGET, FED_TARGET, STEP_TARGET, EVALUATION_TARGET = 1.25, 0.9, 1.05, 5.0
CPU = torch.device("cpu")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_BICUBIC = transforms.InterpolationMode.BICUBIC
Pass = Callable[[], int]


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
    ids = source.sample_ids[indices]
    return view_batch(source, indices, ids, 0, 0, CROP_SCALE, SIDE)  # type: ignore[arg-type]  # what views need of one


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
        median_row(f"{name}, with Pillow", with_pillow, VIEW_TARGET, detail=f"{view_ms:.2f} ms a view"),
        median_row(f"{name}, as it is decoded here", own),
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


def _by_threads(source: Pictures | Source, batch_size: int, num_threads: int) -> Iterator[Tensor]:
    """Yields the views of one epoch as the training loop makes them."""
    train = TrainConfig(epochs=1, batch_size=batch_size, crop_scale=CROP_SCALE, kl_weight=0.0)
    clip: Any = SimpleNamespace(image_size=SIDE, logit_scale=100.0)  # no model runs
    targets = Targets(clip, torch.zeros(1, 1), source, train, CPU)  # type: ignore[arg-type]  # what views need of one
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


def view_and_device_rows(full: bool, scale: bool = False) -> list[Row]:
    """Measures views, and their way to a device. Not in full: half a minute."""
    num_pictures, repeats = (40, 15) if full else (16, 5)
    torch.set_num_threads(1)
    found = [row for kind in (LIGHT, HEAVY) for row in view_rows(kind, num_pictures, repeats)]
    num_batches, turns = (24, 7) if full else (12, 3)
    return found + device_rows(usable_cores(), 32, num_batches, turns, full)


def folder_pass(root: Path, batch_size: int, workers: int, training: bool, to_floats: bool = True) -> Pass:
    """Returns a pass over ImageFolder, whose workers stay."""
    if training:
        crop = [transforms.RandomResizedCrop(SIDE, scale=(CROP_SCALE, 1), interpolation=_BICUBIC)]
    else:
        crop = [transforms.Resize(SIDE, interpolation=_BICUBIC), transforms.CenterCrop(SIDE)]
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)] if to_floats else [transforms.PILToTensor()]
    data = datasets.ImageFolder(str(root), transforms.Compose([*crop, *end]))
    loader = DataLoader(data, batch_size, shuffle=training, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(images) for images, _ in loader)


def evaluation_pass(images: ImageSet, batch_size: int, to_floats: bool) -> Pass:
    """Returns a pass over a decoded set as ``training.evaluate`` reads it."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def one_pass() -> int:
        count = 0
        for start in range(0, len(images), batch_size):
            positions = np.arange(start, min(start + batch_size, len(images)))
            pixels_BHWC = torch.from_numpy(images.images_NHWC[positions])
            if to_floats:
                normalised(pixels_BHWC, mean, std)
            count += len(pixels_BHWC)
        return count

    return one_pass


def training_pass(source: Source, batch_size: int, workers: int) -> Pass:
    """Returns a pass over the views of one epoch."""
    return lambda: sum(map(len, _by_threads(source, batch_size, workers)))


def rates(passes: dict[str, Pass], repeats: int) -> dict[str, list[float]]:
    """Returns images per second by name, one for each turn after the first."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, one_pass in passes.items():
            began = time.perf_counter()
            count = one_pass()
            if turn:
                found[name].append(count / (time.perf_counter() - began))
    return found


def read_times(source: StoredSource, cache_dir: Path, repeats: int) -> dict[str, float]:
    """Returns median microseconds per image of reading its bytes alone, from the disk and from memory."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    PackedSource(source, Keeping(cache_dir))
    (entry,) = (each for each in list_entries(cache_dir) if each.kind == "packed")
    files = [*(Path(source.place(index)) for index in range(len(source))), cache_dir / f"{entry.key}.arrow"]
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        _forget(files)  # nobody has the packed set open: the system does not forget what is mapped
        packed = PackedSource(source, Keeping(cache_dir))
        for name, read in (("files", source.content), ("packed", packed.packed_bytes)):
            for state in ("disk", "memory"):
                began = time.perf_counter()
                for index in order:
                    read(index)
                found.setdefault(f"{name}, {state}", []).append((time.perf_counter() - began) / len(order))
        del packed, read
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def _forget(files: Iterable[Path]) -> None:
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def loader_rows(full: bool, scale: bool = False, num_images: int = 256, batch_size: int = 64) -> list[Row]:
    """Measures loading: in full of two sizes, with and without workers, in more turns, and four times the images."""
    torch.set_num_threads(1)
    turns, num_images = (5, 4 * num_images) if full else (2, num_images)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="carft-loader-") as folder:
        for width, height in ((SIDE, SIDE), (WIDTH, HEIGHT)) if full else ((WIDTH, HEIGHT),):
            root, cache = Path(folder) / f"{width}", Path(folder) / f"cache-{width}"
            write_tree(root / "photo", num_images, width, height)
            spec = FolderSet(source="folder", path=str(root), domains=("photo",))
            source = stored_source(list_set(spec, "train"), spec, CLASSES, "train")
            to_input = transforms.Compose(
                [transforms.Resize(SIDE, interpolation=_BICUBIC), transforms.CenterCrop(SIDE)]
            )
            images = image_set(source, to_input, "benchmark", Keeping(cache))
            times, size = read_times(source, cache, turns), f"{width} x {height}"
            for state in ("disk", "memory"):
                ratio, shown = (
                    times[f"packed, {state}"] / times[f"files, {state}"],
                    f"{times[f'packed, {state}']:.0f} us",
                )
                found.append(Row(f"time of bytes, packed / files, from {state}, {size}", ratio, detail=shown))
            packed = PackedSource(source, Keeping(cache))
            for workers in (0, 2) if full else (2,):
                where = f"{size}, {workers} workers"
                for what, to_floats in (("pixels", False), ("floats", True)):
                    passes = {
                        "ImageFolder": folder_pass(root / "photo", batch_size, workers, False, to_floats),
                        f"evaluation up to {what}": evaluation_pass(images, batch_size, to_floats),
                    }
                    found += _against_folder(passes, where, turns, None if to_floats else EVALUATION_TARGET)
                passes = {
                    "ImageFolder": folder_pass(root / "photo", batch_size, workers, True),
                    "training from files": training_pass(source, batch_size, workers),
                    "training packed": training_pass(packed, batch_size, workers),
                }
                found += _against_folder(passes, where, turns, None)
    return found


def _against_folder(passes: dict[str, Pass], where: str, turns: int, target: float | None) -> list[Row]:
    """Returns the rows of images/s of all but the first against those of the first, turn by turn."""
    found = rates(passes, turns)
    (_, first), *others = found.items()
    return [
        median_row(
            f"images/s, {name} / ImageFolder, {where}",
            [mine / other for mine, other in zip(values, first, strict=True)],
            target,
            False,
            f"{statistics.median(values):,.0f} images/s",
        )
        for name, values in others
    ]
