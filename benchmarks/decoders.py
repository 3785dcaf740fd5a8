"""How fast JPEGs are decoded, and whether to the same pixels: ``python -m benchmarks.decoders``

Decodes the same pictures (synthetic, with the spectrum of photos) with every decoder that is installed, in turn, with
one thread, and prints the median time of a picture (of the processor, so that other work on the machine counts little),
its ratio to Pillow's, and the largest difference of a pixel from Pillow's. Decoders that carft-ray does not need are
measured where they are there: ``pip install opencv-python-headless imagecodecs``
"""

import argparse
import importlib
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, features
from torchvision import io as torchvision_io

from benchmarks.photos import jpeg
from carft_ray.data.images import decode_image

Pixels = npt.NDArray[np.uint8]
Decoder = Callable[[bytes], Any]

SIZES = ((224, 224), (500, 375))
NUM_PICTURES = 40


def pillow(content: bytes) -> Pixels:
    """Decodes as most loaders do."""
    with Image.open(io.BytesIO(content)) as file:
        return np.asarray(file.convert("RGB"))


def pillow_draft(content: bytes) -> Pixels:
    """Decodes at half the size, or a quarter: other pixels, and only where the picture is larger than wanted."""
    with Image.open(io.BytesIO(content)) as file:
        file.draft("RGB", (file.width // 2, file.height // 2))
        return np.asarray(file.convert("RGB"))


def by_torchvision(content: bytes) -> Pixels:
    """Decodes with torchvision, whose tensors come [3, H, W]."""
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: Pixels = torchvision_io.decode_jpeg(encoded, torchvision_io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return pixels


def decoders() -> dict[str, Decoder]:
    """Returns the decoders that are installed by name."""
    found: dict[str, Decoder] = {
        "Pillow": pillow,
        "Pillow, draft (half size)": pillow_draft,
        "torchvision": by_torchvision,
        "simplejpeg": simplejpeg.decode_jpeg,
        "simplejpeg, fast DCT and upsampling": lambda content: simplejpeg.decode_jpeg(
            content, fastdct=True, fastupsample=True
        ),
        "carft-ray": lambda content: decode_image(content, "benchmark"),
    }
    if (cv2 := _optional("cv2")) is not None:
        cv2.setNumThreads(1)
        found["OpenCV"] = lambda content: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    if (imagecodecs := _optional("imagecodecs")) is not None:
        found["imagecodecs"] = imagecodecs.jpeg8_decode
    return found


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def measure(decoder_of: dict[str, Decoder], contents: Sequence[bytes], repeats: int) -> dict[str, float]:
    """Returns the median seconds of processor time per picture by name; the decoders take turns."""
    times: dict[str, list[float]] = {name: [] for name in decoder_of}
    for _ in range(repeats + 1):
        for name, decode in decoder_of.items():
            began = time.process_time()
            for content in contents:
                decode(content)
            times[name].append((time.process_time() - began) / len(contents))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def largest_difference(decode: Decoder, contents: Sequence[bytes]) -> int | None:
    """Returns the largest difference from Pillow's pixels in grey levels; None for another size."""
    largest = 0
    for content in contents:
        found, expected = np.asarray(decode(content)), pillow(content)
        if found.shape != expected.shape:
            return None
        largest = max(largest, int(np.abs(found.astype(int) - expected).max()))
    return largest


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description="JPEG decoders.")
    parser.add_argument("--repeats", type=int, default=15, help="times that each decodes all pictures (%(default)s)")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="pictures of each size (%(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, arguments.pictures) < 1:
        parser.error("--repeats and --pictures must be at least 1")
    torch.set_num_threads(1)
    found = decoders()
    print(
        f"{platform.machine()}, Python {platform.python_version()}, Pillow {features.version('pil')} (libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}), simplejpeg {simplejpeg.__version__}; synthetic pictures"
    )
    for width, height in SIZES:
        contents = [jpeg(seed, width, height) for seed in range(arguments.pictures)]
        mean_kb = sum(map(len, contents)) / len(contents) / 1000
        print(f"\n{width} x {height} pixels, {mean_kb:.1f} kB on average")
        times = measure(found, contents, arguments.repeats)
        for name, seconds in times.items():
            difference = largest_difference(found[name], contents)
            pixels = (
                "another size" if difference is None else f"pixels differ by {difference}" if difference else "same"
            )
            print(f"  {name:36s} {1000 * seconds:6.3f} ms  {times['Pillow'] / seconds:5.2f} x Pillow  {pixels}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
