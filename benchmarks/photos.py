"""Pictures for the benchmarks of images: synthetic, with the spectrum of photos, as JPEG files.

A photo's detail falls off with frequency about as 1/f, which is what decides how much work its JPEG is. These are sums
of random patterns, each twice as fine and ``FALL`` times as strong as the one before.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from carft_ray.data.decode_images import decode_image
from carft_ray.data.source import IdArray, IntArray, PixelArray

FALL = 0.75
QUALITY = 90
WIDTH, HEIGHT = 500, 375  # of most files of ImageNet
LIGHT, HEAVY = (0.75, 90), (0.95, 94)  # detail and quality of the pictures: 46 and 108 kB
CLASSES = ("bird", "boat", "bridge", "car", "castle", "cat", "dog", "field")


def photo(seed: int, width: int, height: int, fall: float = FALL) -> PixelArray:
    """Returns a picture, uint8 [height, width, 3]; the nearer ``fall`` is to 1, the more detail it has."""
    draw = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(int(np.log2(max(width, height))) + 1):
        pattern = draw.normal(size=(2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
        pattern[..., 1:] = pattern[..., :1] + pattern[..., 1:] / 2  # colours go together
        for colour in range(3):
            layer = Image.fromarray(pattern[..., colour]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., colour] += fall**octave * np.asarray(layer)
    low, high = np.quantile(total, (0.01, 0.99))
    pixels: PixelArray = np.clip((total - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    return pixels


def jpeg(seed: int, width: int, height: int, fall: float = FALL, quality: int = QUALITY) -> bytes:
    """Returns a picture as JPEG, with half of the colour's resolution, as cameras write it."""
    stream = io.BytesIO()
    Image.fromarray(photo(seed, width, height, fall)).save(stream, "JPEG", quality=quality, subsampling=2)
    return stream.getvalue()


def write_tree(root: Path, num_images: int, width: int, height: int, num_distinct: int | None = None) -> int:
    """Writes ``root/class/number.jpg``; returns the bytes of all files.

    Args:
        root: The folder.
        num_images: Files.
        width: Pixels.
        height: Pixels.
        num_distinct: Of so many pictures, the others are hard links to them: to make one takes 20 ms. None: all.
    """
    size, made = 0, list[Path]()
    for index in range(num_images):
        path = root / CLASSES[index % len(CLASSES)] / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if num_distinct is not None and index >= num_distinct:
            path.hardlink_to(made[index % num_distinct])
        else:
            path.write_bytes(jpeg(index, width, height))
            made.append(path)
        size += path.stat().st_size
    return size


def pillow(content: bytes) -> PixelArray:
    """Decodes as most loaders do."""
    with Image.open(io.BytesIO(content)) as file:
        return np.asarray(file.convert("RGB"))


@dataclass(frozen=True)
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
