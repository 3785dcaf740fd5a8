"""Images per second from the cache, against ImageFolder and a DataLoader: ``python -m benchmarks.loader``

Both sides read the same JPEG files (synthetic, with the spectrum of photos), in batches, with the same number of
workers (processes of the DataLoader, threads of carft-ray), and take turns; the first turn fills the file caches and is
not counted.

    evaluation   ImageFolder: resize and centre crop as open_clip does. carft-ray: the decoded set. Once up to the
                 pixels, which is what carft-ray gives to the device, and once up to normalised floats.
    training     ImageFolder: RandomResizedCrop(scale=(0.9, 1), bicubic), to floats, normalised. carft-ray: the views of
                 the training loop, from files and packed.
    bytes        reading the files one by one, and the packed set, in random order; once from memory, once from the disk
                 (where the system can be asked to forget a file)

``--target`` is what evaluation must reach: the least ratio to ImageFolder, in pixels.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.photos import CLASSES, write_tree
from carft_ray.data.cache import list_entries
from carft_ray.data.decoded import image_set
from carft_ray.data.listing import StoredSource
from carft_ray.data.packed import PackedSource
from carft_ray.data.readers import list_set
from carft_ray.data.selection import stored_source
from carft_ray.data.source import ImageSet, Source
from carft_ray.model.classifier import normalised
from carft_ray.recipe.schema.fine_tuning import TrainConfig
from carft_ray.recipe.schema.sets import FolderSet
from carft_ray.training import loop
from carft_ray.training.run_context import RunContext
from carft_ray.training.targets import Targets

SIDE = 224
SIZES = ((224, 224), (500, 375))
WORKERS = (0, 2)
CROP_SCALE = 0.9
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
_BICUBIC = transforms.InterpolationMode.BICUBIC
Pass = Callable[[], int]


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
    """Returns a pass over the views of one epoch as the training loop makes them."""
    train = TrainConfig(epochs=1, batch_size=batch_size, crop_scale=CROP_SCALE, kl_weight=0.0)
    clip: Any = SimpleNamespace(image_size=SIDE, logit_scale=100.0)  # no model runs

    def one_pass() -> int:
        targets = Targets(clip, torch.zeros(1, 1), source, train, torch.device("cpu"))
        return sum(len(batch.indices) for batch in loop._views(targets, train, RunContext(), 0, 1 + workers))

    return one_pass


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
    PackedSource(source, cache_dir)
    (entry,) = (each for each in list_entries(cache_dir) if each.kind == "packed")
    files = [*(Path(source.place(index)) for index in range(len(source))), cache_dir / f"{entry.key}.arrow"]
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        _forget(files)  # nobody has the packed set open: the system does not forget what is mapped
        packed = PackedSource(source, cache_dir)
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


def run(folder: Path, num_images: int, batch_size: int, repeats: int, target: float) -> bool:
    """Measures and prints everything; returns whether the target was reached."""
    reached = True
    for width, height in SIZES:
        root = folder / f"{width}"
        size = write_tree(root / "photo", num_images, width, height)
        print(f"\n{num_images} pictures of {width} x {height} pixels, {size / num_images / 1000:.1f} kB on average")
        spec = FolderSet(source="folder", path=str(root), domains=("photo",))
        source = stored_source(list_set(spec, "train"), spec, CLASSES, "train")
        to_input = transforms.Compose([transforms.Resize(SIDE, interpolation=_BICUBIC), transforms.CenterCrop(SIDE)])
        began = time.perf_counter()
        images = image_set(source, to_input, "benchmark", folder / f"cache-{width}")
        print(f"  decoding the set once: {num_images / (time.perf_counter() - began):.0f} images/s")
        times = read_times(source, folder / f"cache-{width}", repeats)
        print("  bytes alone, us per image: " + "; ".join(f"{name} {value:.0f}" for name, value in times.items()))
        packed = PackedSource(source, folder / f"cache-{width}")
        for workers in WORKERS:
            for what, to_floats in (("pixels", False), ("normalised floats", True)):
                evaluation = {
                    "ImageFolder": folder_pass(root / "photo", batch_size, workers, False, to_floats),
                    "carft-ray": evaluation_pass(images, batch_size, to_floats),
                }
                ratios = _print(f"evaluation, {what}, {workers} workers", rates(evaluation, repeats))
                reached &= to_floats or ratios["carft-ray"] >= target
            training = {
                "ImageFolder": folder_pass(root / "photo", batch_size, workers, True),
                "carft-ray, files": training_pass(source, batch_size, workers),
                "carft-ray, packed": training_pass(packed, batch_size, workers),
            }
            _print(f"training, {workers} workers", rates(training, repeats))
    print(f"\n{'PASS' if reached else 'FAIL'}  evaluation, pixels: at least {target:g} times ImageFolder in every line")
    return reached


def _print(heading: str, found: dict[str, list[float]]) -> dict[str, float]:
    """Prints medians with their spread and, turn by turn, the ratio to the first; returns the median ratios."""
    first, *_ = found.values()
    ratios = {}
    print(f"  {heading}")
    for name, values in found.items():
        ratios[name] = statistics.median(mine / other for mine, other in zip(values, first, strict=True))
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"    {name:24s} {statistics.median(values):9,.0f} images/s ({spread}), {ratios[name]:.2f} x")
    return ratios


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 the target was reached, 1 it was not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="Images per second.")
    parser.add_argument("--images", type=int, default=1024, help="pictures of each size (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures of a batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--target", type=float, default=5.0, help="least ratio for evaluation (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.images, arguments.batch_size, arguments.repeats) < 1:
        parser.error("--images, --batch-size and --repeats must be at least 1")
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}; synthetic pictures")
    with tempfile.TemporaryDirectory(prefix="carft-loader-") as folder:
        reached = run(Path(folder), arguments.images, arguments.batch_size, arguments.repeats, arguments.target)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
