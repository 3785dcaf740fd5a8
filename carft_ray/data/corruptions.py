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

A set under corruptions is an OOD set that costs no further images: each image is shown under one of them, drawn by a
hash of (seed, sample id), so its picture depends on neither the order of the images nor the machine.

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
import numpy.typing as npt
import scipy  # its modules load when they are first used
from PIL import Image

from carft_ray.data.listing import sample_id
from carft_ray.data.philox import STREAM_CORRUPTION, words
from carft_ray.data.source import DerivedSource, PixelArray, Source, image_digest
from carft_ray.recipe.schema.data import CorruptedSet

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator
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
MARGIN = 256 / 224  # short side before the crop, over the side of the square: ImageNet-C's Resize(256), CenterCrop(224)


def gaussian(x: Floats, sigma: float) -> Floats:
    """Gaussian blur of each colour, cut at 4 sigma, [H, W] or [H, W, C]."""
    return np.asarray(scipy.ndimage.gaussian_filter(x, sigma, mode="nearest", truncate=4, axes=(0, 1)))


def smear(x: Floats, radius: float, sigma: float, angle: float) -> Floats:
    """ImageMagick's motion blur of [H, W] or [H, W, C]: half a Gaussian along a line of 2 * radius + 1 pixels.

    Pixel i of the line lies at i * (cos, sin) of the angle, rounded (halves down); the edge is continued.
    """
    length = 2 * math.ceil(radius) + 1
    steps = np.arange(length)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    turn = math.radians(angle)
    downs = np.ceil(steps * math.sin(turn) - 0.5).astype(int) + length
    rights = np.ceil(steps * math.cos(turn) - 0.5).astype(int) + length
    height, width = x.shape[:2]
    padded = np.pad(x, ((length, length), (length, length)) + ((0, 0),) * (x.ndim - 2), "edge")
    total = np.zeros_like(x)
    for weight, down, right in zip(weights.tolist(), downs.tolist(), rights.tolist(), strict=True):
        total += weight * padded[down : down + height, right : right + width]
    return total


def zoom(x: Floats, factor: float) -> Floats:
    """Enlarges the middle of [H, W] or [H, W, C] to the whole, linearly, corners on corners, surplus cut evenly."""
    for axis in (0, 1):
        size = x.shape[axis]
        kept = math.ceil(size / factor)
        grown = round(kept * factor)
        spacing = (kept - 1) / max(grown - 1, 1)
        places = (size - kept) // 2 + (np.arange(size) + (grown - size) // 2) * spacing
        low = places.astype(np.int64)
        part = (places - low).reshape((-1,) + (1,) * (x.ndim - axis - 1))
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, size - 1), axis) * part
    return x


def sample(x: Floats, places: Floats, mode: str) -> Floats:
    """Reads [H, W, C] at places [2, H, W] (down, right), linearly; ``mode`` continues the picture as in SciPy."""
    return np.stack([scipy.ndimage.map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(3)], axis=-1)


def smooth(fields: Floats, sigma: float) -> Floats:
    """Gaussian blur of fields [n, H, W], cut at 3 sigma, mirrored at the edge, by the cosine transform.

    Equals SciPy's ``gaussian_filter(mode="reflect", truncate=3)`` at a cost that does not grow with sigma, which
    ``elastic_transform`` sets to three quarters of the side.
    """
    steps = np.arange(1, int(3 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2) if len(steps) else np.zeros(0)
    spectrum = scipy.fft.dctn(fields, axes=(1, 2))
    for axis in (1, 2):
        size = fields.shape[axis]
        response = (1 + 2 * np.cos(np.pi / size * np.outer(np.arange(size), steps)) @ weights) / (1 + 2 * weights.sum())
        spectrum *= response.reshape(-1, 1) if axis == 1 else response
    return np.asarray(scipy.fft.idctn(spectrum, axes=(1, 2)))


def plasma(height: int, width: int, rng: Rng, decay: float) -> Floats:
    """A cloud between 0 and 1, [H, W]: diamond-square on a torus of the next power of two.

    Every midpoint is the mean of its four neighbours plus uniform noise, whose spread falls by decay**2 per halving:
    the published code multiplies a uniform number of that spread with the spread.
    """
    step = 2
    while step < max(height, width):
        step *= 2
    cloud = np.zeros((step, step))
    spread = 1.0
    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]
        across, below = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 0)
        noise = rng.uniform(-spread, spread, (3, *corners.shape))
        centres = (across + np.roll(across, -1, 0)) / 4 + noise[0]
        cloud[half::step, half::step] = centres
        cloud[::step, half::step] = (across + centres + np.roll(centres, 1, 0)) / 4 + noise[1]
        cloud[half::step, ::step] = (below + centres + np.roll(centres, 1, 1)) / 4 + noise[2]
        step, spread = half, spread / decay**2
    cloud -= cloud.min()
    cloud /= cloud.max()
    return cloud[:height, :width]


def needles(height: int, width: int, rng: Rng) -> Floats:
    """Needles of ice [H, W] of mean 0 and deviation 1: streaks in six directions, the strongest of which shows.

    They are an eighth of the shorter side long, at most 28 pixels, and as soft as the photographs: neighbouring pixels
    differ by 0.4 to 0.5 standard deviations. The noise is wider than the picture, since a streak that meets the edge
    would grow thick.
    """
    length = min(max(min(height, width) // 8, 1), 28)
    margin = 2 * length
    ice = np.full((height + 2 * margin, width + 2 * margin), -np.inf)
    for angle in rng.uniform(0, 360, 6).tolist():
        streaks = smear(gaussian(rng.standard_normal(ice.shape), length / 28), length, length / 1.5, angle)
        np.maximum(ice, streaks / float(streaks.std()), out=ice)
    ice = ice[margin : margin + height, margin : margin + width]
    return (ice - float(ice.mean())) / max(float(ice.std()), 1e-9)


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
        x = scipy.ndimage.convolve1d(x, taps / taps.sum(), axis, mode="mirror")
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
    blurred = np.rint(gaussian(x, sigma) * 255) / 255
    height, width = x.shape[:2]
    visited = np.s_[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    targets = np.arange(height * width).reshape(height, width)[visited].ravel()[::-1]
    origin = list(range(height * width))
    for _ in range(rounds):
        offsets = rng.integers(-reach, reach, (len(targets), 2))
        others = targets + offsets[:, 0] * width + offsets[:, 1]
        for target, other in zip(targets.tolist(), others.tolist(), strict=True):
            origin[target] = origin[other]
    return gaussian(blurred.reshape(-1, 3)[origin].reshape(x.shape), sigma)


def motion_blur(x: Floats, rng: Rng, radius: float, sigma: float) -> Floats:
    """Smears the picture along a line at a uniform angle within 45 degrees of the horizontal (``smear``)."""
    return smear(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: Floats, rng: Rng, end: float, step: float) -> Floats:
    """Averages the picture and its enlargements by 1, 1 + step, ... below ``end``."""
    factors = np.arange(1, end, step).tolist()
    total = x.copy()
    for factor in factors:
        total += zoom(x, factor)
    return total / (len(factors) + 1)


# Weather


def snow(x: Floats, rng: Rng, *setting: float) -> Floats:
    """Whitens the picture and lets flakes fall over it, once as drawn and once turned by 180 degrees.

    Flakes are normal noise, enlarged, cut below a threshold and smeared within 45 degrees of the vertical.
    """
    mean, deviation, scale, threshold, radius, sigma, mix = setting
    flakes = zoom(rng.normal(mean, deviation, x.shape[:2]), scale)
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))
    flakes = smear(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
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
    pane = np.array(means) + np.array(deviations) * needles(height, width, rng)[..., None]
    return picture * x + ice * np.clip(pane / 255, 0, 1)


def fog(x: Floats, rng: Rng, density: float, decay: float) -> Floats:
    """Adds a fractal cloud and keeps the picture's maximum: (x + density * cloud) * max / (max + density)."""
    height, width, _ = x.shape
    brightest = float(x.max())
    return (x + density * plasma(height, width, rng, decay)[..., None]) * brightest / (brightest + density)


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
    x = sample(x, np.tensordot(affine[:2], grid, (0, 0)) + affine[2][:, None, None], "mirror")
    waves = rng.uniform(-1, 1, (2, height, width))
    return sample(x, grid + strength * side * smooth(waves, sigma * side), "reflect")


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


class CorruptedSource(DerivedSource):
    """The ``Source`` of a set under corruptions; ids and labels are those of its images.

    Args:
        images: The set without corruptions.
        spec: The corruptions that the recipe names, ImageNet-C's fifteen where it names none, and how strong they are.
    """

    def __init__(self, images: Source, spec: CorruptedSet) -> None:
        super().__init__(images)
        self._spec = spec
        self.corruptions: tuple[str, ...] = tuple(sorted(spec.corruptions or CORRUPTIONS))
        shown = f"{','.join(self.corruptions)}/{spec.severity}/{spec.seed}/{spec.size}"
        self._key = f"corrupted-{CORRUPTION_VERSION}/{shown}"
        self.identity = f"{self._key}/{images.identity}"

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return f"{self.images.place(index)} under {self.corruption(index)}"

    def corruption(self, index: int) -> str:
        """Returns the corruption under which image ``index`` is shown."""
        drawn = sample_id(f"corruption {self._spec.seed} {int(self.sample_ids[index])}")
        return self.corruptions[drawn % len(self.corruptions)]

    def content(self, index: int) -> bytes:
        """Returns the hash of image ``index`` without corruption, after all that decides how it is shown."""
        return self.shown_content(image_digest(self.images.content(index)))

    def shown_content(self, digest: bytes) -> bytes:
        """Returns the ``content`` of an image whose file has this hash."""
        return f"{self._key}/".encode() + digest

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` corrupted, uint8 [H, W, 3]; a square of ``size`` where it is larger.

        Raises:
            DataError: The image cannot be read.
        """
        pixels = squared(self.images.pixels(index), self._spec.size)
        name, id_ = self.corruption(index), int(self.sample_ids[index])
        return corrupt(pixels, name, self._spec.severity, self._spec.seed, id_)


def squared(pixels: PixelArray, size: int) -> PixelArray:
    """Returns the middle square of an image that is larger, as ImageNet-C's were made; a smaller one as it is.

    Args:
        pixels: uint8 [H, W, 3].
        size: Side of the square.
    """
    sides = pixels.shape[1], pixels.shape[0]
    short = min(sides)
    if short <= size:
        return pixels
    width, height = (int(round(size * MARGIN) * side / short) for side in sides)  # rounded as torchvision does
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))
