"""What corruptions are made of: blurs, streaks, enlargements, clouds and needles of ice, on NumPy and SciPy.

Shape letters: H height, W width, C = 3 colours.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator


def gaussian(x: Floats, sigma: float) -> Floats:
    """Gaussian blur of each colour, cut at 4 sigma, [H, W] or [H, W, C]."""
    return np.asarray(ndimage.gaussian_filter(x, sigma, mode="nearest", truncate=4, axes=(0, 1)))


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
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(3)], axis=-1)


def smooth(fields: Floats, sigma: float) -> Floats:
    """Gaussian blur of fields [n, H, W], cut at 3 sigma, mirrored at the edge, by the cosine transform.

    Equals SciPy's ``gaussian_filter(mode="reflect", truncate=3)`` at a cost that does not grow with sigma, which
    ``elastic_transform`` sets to three quarters of the side.
    """
    steps = np.arange(1, int(3 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2) if len(steps) else np.zeros(0)
    spectrum = fft.dctn(fields, axes=(1, 2))
    for axis in (1, 2):
        size = fields.shape[axis]
        response = (1 + 2 * np.cos(np.pi / size * np.outer(np.arange(size), steps)) @ weights) / (1 + 2 * weights.sum())
        spectrum *= response.reshape(-1, 1) if axis == 1 else response
    return np.asarray(fft.idctn(spectrum, axes=(1, 2)))


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
