"""ImageNet-C's fifteen corruptions: the same bytes for (pixels, name, severity, seed, sample id), always.

Hendrycks, Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (ICLR 2019). The
formulas are those of hendrycks/robustness, ``ImageNet-C/create_c/make_imagenet_c.py``, written anew on NumPy, SciPy and
Pillow; the constants stand in ``corruptions.toml``. Differences from the published code:

- every draw comes from a generator whose key is made of (seed, sample id, name) by the words of ``philox.py``. The five
  severities of one image share their draws, so a stronger one is the same noise made larger;
- the frost is computed, not photographed (``frost``);
- sums are in float64 and rounded once at the end, where the published code cuts fractions off: half a grey level
  brighter on average;
- images that are not square are treated along both sides;
- the published files were saved once more as JPEG of quality 85; nothing is saved here.

Shape letters: H height, W width, C = 3 colours. ``x`` is RGB between 0 and 1, float64 [H, W, 3]; the functions may
leave that range, ``corrupt`` clips.
"""

import io
import math
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from carft_ray.data.philox import STREAM_CORRUPTION, words
from carft_ray.data.source import PixelArray
from carft_ray.data.synthetic import fields
from carft_ray.data.synthetic.fields import Floats, Rng

CORRUPTION_VERSION = 1  # changes when the same arguments give other bytes; part of the key of whatever stores them
SIDES = (32, 64, 224)  # pixels; the tables that were published

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


_TOML = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_FROST_PANES = _TOML.pop("frost_panes")
# for each corruption and side the five settings: a number, or a list of the function's arguments
PARAMETERS: dict[str, dict[int, list[Any]]] = {
    name: {side: rows[str(side)] for side in SIDES} for name, rows in _TOML.items()
}
# ImageNet-C moves its 224 pixels by fractions of 244, which its authors call a slip and kept
PARAMETERS["elastic_transform"][224] = [
    [244 / 224 * number for number in setting] for setting in PARAMETERS["elastic_transform"][224]
]


def corrupt(pixels: PixelArray, name: str, severity: int, seed: int, sample_id: int) -> PixelArray:
    """Returns one image corrupted.

    The constants are those of the published table whose side (32, 64 or 224 pixels) is nearest to the image's shorter
    side as a ratio. Lengths in pixels are not scaled: for numbers that compare with ImageNet-C, corrupt what the model
    would see, 224 x 224 pixels after resize and crop.

    Args:
        pixels: RGB image, uint8 [H, W, 3].
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: 0 <= seed < 2**64.
        sample_id: Stable id of the image, below 2**64.

    Returns:
        The corrupted image, uint8 [H, W, 3].
    """
    setting = PARAMETERS[name][table_side(*pixels.shape[:2])][severity - 1]
    arguments = setting if isinstance(setting, list) else [setting]
    return _to_bytes(CORRUPTIONS[name](pixels / 255, generator(name, seed, sample_id), *arguments))


def table_side(height: int, width: int) -> int:
    """Returns the side of the published table that serves an image of this size: 32, 64 or 224."""
    side = min(height, width)
    return min(SIDES, key=lambda published: abs(math.log(side / published)))


def generator(name: str, seed: int, sample_id: int) -> Rng:
    """Returns the generator of one corruption of one image.

    Its key of 128 bits is one block of our words; equal in all processes, untouched by NumPy's global state.
    """
    items = np.array([sample_id], dtype=np.uint64)
    block = words(seed, STREAM_CORRUPTION, zlib.crc32(name.encode()), items)[0, 0].astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=block[::2] | block[1::2] << np.uint64(32)))


# Noise


def gaussian_noise(x: Floats, rng: Rng, deviation: float) -> Floats:
    """Adds normal noise to every value: x + deviation * n."""
    return x + deviation * rng.standard_normal(x.shape)


def shot_noise(x: Floats, rng: Rng, photons: float) -> Floats:
    """Counts light: Poisson(x * photons) / photons, so the variance is x / photons."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Floats, rng: Rng, share: float) -> Floats:
    """Replaces a share of all values, each colour for itself, by 0 or 1 with even odds."""
    hit, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, salt, x)


# Blur


def defocus_blur(x: Floats, rng: Rng, radius: float, edge_sigma: float) -> Floats:
    """Averages over a disc whose edge is softened by a Gaussian of 3 taps, 5 for a radius above 8.

    The disc is a stack of rows, each a difference of running sums: 2 additions per row instead of one per pixel.
    """
    reach = 2 if radius > 8 else 1
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / edge_sigma) ** 2)
    for axis in (0, 1):
        x = ndimage.convolve1d(x, taps / taps.sum(), axis, mode="mirror")
    height, width = x.shape[:2]
    rows = int(radius)
    sums = np.pad(x, ((rows, rows), (rows, rows), (0, 0)), "reflect").cumsum(axis=1)
    sums = np.pad(sums, ((0, 0), (1, 0), (0, 0)))
    total, count = np.zeros_like(x), 0
    for row in range(-rows, rows + 1):
        half = math.floor(math.sqrt(radius**2 - row**2))
        line = sums[rows + row : rows + row + height]
        first, last = rows - half, rows + half + 1
        total += line[:, last : last + width] - line[:, first : first + width]
        count += 2 * half + 1
    return total / count


def glass_blur(x: Floats, rng: Rng, sigma: float, reach: int, rounds: int) -> Floats:
    """Blurs, lets every pixel take the place of a near one, and blurs again.

    Pixels are visited from the lower right to the upper left, ``rounds`` times; each takes the present colour of the
    pixel at a uniform offset in [-reach, reach). The published code means to swap the two, but assigns through views
    of one array, which copies: so the published images are copies too.
    """
    blurred = np.rint(fields.gaussian(x, sigma) * 255) / 255
    height, width = x.shape[:2]
    visited = np.s_[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    targets = np.arange(height * width).reshape(height, width)[visited].ravel()[::-1]
    origin = list(range(height * width))
    for _ in range(rounds):
        offsets = rng.integers(-reach, reach, (len(targets), 2))
        others = targets + offsets[:, 0] * width + offsets[:, 1]
        for target, other in zip(targets.tolist(), others.tolist(), strict=True):
            origin[target] = origin[other]
    return fields.gaussian(blurred.reshape(-1, 3)[origin].reshape(x.shape), sigma)


def motion_blur(x: Floats, rng: Rng, radius: float, sigma: float) -> Floats:
    """Smears the picture along a line at a uniform angle within 45 degrees of the horizontal (``fields.smear``)."""
    return fields.smear(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Floats, rng: Rng, end: float, step: float) -> Floats:
    """Averages the picture and its enlargements by 1, 1 + step, ... below ``end``."""
    factors = np.arange(1, end, step).tolist()
    total = x.copy()
    for factor in factors:
        total += fields.zoom(x, factor)
    return total / (len(factors) + 1)


# Weather


def snow(x: Floats, rng: Rng, *setting: float) -> Floats:
    """Whitens the picture and lets flakes fall over it, once as drawn and once turned by 180 degrees.

    Flakes are normal noise, enlarged, cut below a threshold and smeared within 45 degrees of the vertical.
    """
    mean, deviation, zoom, threshold, radius, sigma, mix = setting
    flakes = fields.zoom(rng.normal(mean, deviation, x.shape[:2]), zoom)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = fields.smear(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    whitened: Floats = np.maximum(x, (x @ _LUMA)[..., None] * 1.5 + 0.5)
    return mix * x + (1 - mix) * whitened + flakes + flakes[::-1, ::-1]


def frost(x: Floats, rng: Rng, picture: float, ice: float) -> Floats:
    """Lays frost over the picture: picture * x + ice * frost. **The frost is procedural: not the published one.**

    ImageNet-C takes a random cut of one of five photographs, which we do not ship. Here one of five panes is drawn
    whose colours have the means and standard deviations of those photographs, with needles of ice for their pattern.
    So the shares and the brightness are as published, the shapes are not, and accuracies under ``frost`` do not compare
    with published numbers.
    """
    means, deviations = _FROST_PANES[int(rng.integers(len(_FROST_PANES)))]
    height, width, _ = x.shape
    pane = np.array(means) + np.array(deviations) * fields.needles(height, width, rng)[..., None]
    return picture * x + ice * np.clip(pane / 255, 0, 1)


def fog(x: Floats, rng: Rng, density: float, decay: float) -> Floats:
    """Adds a fractal cloud and keeps the picture's maximum: (x + density * cloud) * max / (max + density)."""
    height, width, _ = x.shape
    brightest = float(x.max())
    return (x + density * fields.plasma(height, width, rng, decay)[..., None]) * brightest / (brightest + density)


# Digital


def brightness(x: Floats, rng: Rng, shift: float) -> Floats:
    """Adds to the value of HSV, which scales the three colours alike; black becomes grey."""
    value: Floats = x.max(axis=2, keepdims=True)
    brighter = np.clip(value + shift, 0, 1)
    return np.where(value > 0, x / np.where(value > 0, value, 1) * brighter, brighter)


def contrast(x: Floats, rng: Rng, share: float) -> Floats:
    """Pulls every colour towards its mean: (x - mean) * share + mean."""
    mean: Floats = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * share + mean


def elastic_transform(x: Floats, rng: Rng, strength: float, sigma: float, jitter: float) -> Floats:
    """Moves three points at random and the picture with them, then bends it by smooth random waves.

    The points lie a third of the shorter side from the middle; the arguments are fractions of that side. Both steps
    interpolate linearly.
    """
    height, width = x.shape[:2]
    side = min(height, width)
    middle, arm = np.array([height // 2, width // 2]), side // 3
    before = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + rng.uniform(-jitter * side, jitter * side, (3, 2))
    # affine map from places of the result to places of the picture, by its three points
    affine = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    grid = np.indices((height, width), dtype=np.float64)
    x = fields.sample(x, np.tensordot(affine[:2], grid, (0, 0)) + affine[2][:, None, None], "mirror")
    waves = rng.uniform(-1, 1, (2, height, width))
    return fields.sample(x, grid + strength * side * fields.smooth(waves, sigma * side), "reflect")


def pixelate(x: Floats, rng: Rng, share: float) -> Floats:
    """Shrinks by box averages to a share of each side, and enlarges by boxes again."""
    height, width = x.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    image = Image.fromarray(_to_bytes(x)).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: Floats, rng: Rng, quality: int) -> Floats:
    """Saves as JPEG and reads back."""
    file = io.BytesIO()
    Image.fromarray(_to_bytes(x)).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image) / 255


CORRUPTIONS: dict[str, Callable[..., Floats]] = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, impulse_noise),
        *(defocus_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, fog),
        *(brightness, contrast, elastic_transform, pixelate, jpeg_compression),
    )
}


def _to_bytes(x: Floats) -> PixelArray:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
