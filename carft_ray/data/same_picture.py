"""Whether two images are one picture: a comparison of 128 x 128 grey pixels, which separates drawings that are alike.

1. **Alignment.** The second picture is laid on the first by a scale and an offset per axis, found by Gauss-Newton on
   grey levels with gain and offset (Lucas and Kanade 1981; Baker and Matthews 2004), first coarsely, from a few starts:
   as they are, one of them cropped by 5 % on each side, and without the borders of one colour.
2. **Comparison.** Within the picture that shows less, 8 x 8 blocks are compared by ``2 cov(a, b) / (var a + var b)``,
   contrast and structure of SSIM (Wang et al. 2004) in one. A block agrees from ``BLOCK`` on. Blocks weigh by their
   contrast: white paper says nothing, and a watermark spoils the few blocks that it covers.

The distance is the share of blocks, by weight, that disagree. Both pictures are blurred by a pixel of the smaller one,
or of a grey picture, so that resizing changes little.

``LIMIT`` lies between copies and other pictures of a sample of PACS (2,045 real images of four domains). 1,736 made
copies (JPEG, half and double size, cropped by 5 %, bordered, a text over a third of the width) have distances up to
.16, and the 1,989 nearest pairs that are no copies from .33 on: a cartoon on two backgrounds, then .38 two versions of
a cartoon, .39 drawings of guitars, .42 two photos of one man. docs/duplicates.md lists what is found.

Shape letters: S = 128 pixels of a grey picture, N of a grid, B = 64 blocks.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from carft_ray.data.source import PixelArray

SIDE = 128  # pixels of a grey picture
LIMIT = 0.3  # largest distance of one picture from itself
BLOCK = 0.92  # agreement from which on a block shows the same
BLOCKS = 8  # along a side
FLOOR = 20.0  # variance, in squared grey levels, of what compression leaves in a block of one colour
HALF_WEIGHT = 10.0  # contrast, in grey levels, of a block that weighs half of the most
BLUR = 1 / 128  # of the side of the picture: a pixel of a grey picture
EDGE = 0.06  # of the side: left out, since a border bleeds into it
COARSE, COARSE_BLUR, COARSE_STEPS, FINE_STEPS = 32, 0.02, 6, 3
FLAT = 16  # grey levels by which the colour of a border varies
SMALLEST, SLACK = 0.75, 0.03  # scale of a picture that is a part of another, and by how much it may stick out

_Floats = npt.NDArray[np.float32]
_Map = tuple[float, float, float, float]  # scale and offset along x, then along y; a picture is a unit square
Box = tuple[float, float, float, float]  # left, right, top, bottom, in shares of the side
WHOLE: Box = (0.0, 1.0, 0.0, 1.0)
AS_THEY_ARE: _Map = (1.0, 0.0, 1.0, 0.0)
STARTS = (AS_THEY_ARE, (0.9, 0.05, 0.9, 0.05), (1 / 0.9, -0.05 / 0.9, 1 / 0.9, -0.05 / 0.9))


@dataclass(frozen=True, eq=False)
class GreyPicture:
    """What a picture is compared by.

    Attributes:
        grey_SS: The picture squeezed into a square, uint8 [128, 128].
        short_side: Pixels of its shorter side.
    """

    grey_SS: PixelArray
    short_side: int


def grey_picture(pixels: PixelArray) -> GreyPicture:
    """Returns what a picture, uint8 [H, W, 3], is compared by."""
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return GreyPicture(np.asarray(grey), min(pixels.shape[:2]))


def inside_border(grey: PixelArray) -> Box:
    """Returns what lies inside the border of one colour, if any; the whole where less than half of a side is left.

    Args:
        grey: uint8 [H, W].
    """
    box: list[float] = []
    for lines in (grey.T, grey):
        widths = [_border_width(lines), _border_width(lines[::-1])]
        if sum(widths) > len(lines) / 2:
            return WHOLE
        box += [widths[0] / len(lines), 1 - widths[1] / len(lines)]
    return box[0], box[1], box[2], box[3]


def _border_width(lines: PixelArray) -> int:
    """Returns how many lines from the first on have one colour, up to 2 % of their pixels."""
    first = sorted(lines[0].tolist())
    middle = (first[(len(first) - 1) // 2] + first[len(first) // 2]) // 2
    if bisect_right(first, middle + FLAT) - bisect_left(first, middle - FLAT) < 0.98 * len(first):
        return 0  # as in most pictures: the others need not be compared
    near = np.abs(lines.astype(np.int16) - middle) <= FLAT
    return int(np.argmin(np.append(near.mean(1) >= 0.98, False)))


def picture_distance(first: GreyPicture, second: GreyPicture) -> float:
    """Returns how much of two pictures differs, 0 to 1, the same in either order; ``LIMIT`` is the limit of one."""
    if first.grey_SS.tobytes() > second.grey_SS.tobytes():
        first, second = second, first
    one_SS, other_SS = first.grey_SS.astype(np.float32), second.grey_SS.astype(np.float32)
    blur = max(BLUR, 1 / min(first.short_side, second.short_side))
    starts = [*STARTS, *_without_borders(inside_border(first.grey_SS), inside_border(second.grey_SS))]
    laid = [_oriented(one_SS, other_SS, at) for at in starts]
    coarse = [_aligned(*each, COARSE, COARSE_BLUR, COARSE_STEPS) for each in laid]
    best = max(range(len(laid)), key=lambda index: coarse[index][0])
    part_SS, whole_SS, at = _oriented(*laid[best][:2], coarse[best][1])
    laid.append((part_SS, whole_SS, _aligned(part_SS, whole_SS, at, SIDE, blur, FINE_STEPS)[1]))
    return min(_distance(*each, blur) for each in laid)


def _oriented(one_SS: _Floats, other_SS: _Floats, at: _Map) -> tuple[_Floats, _Floats, _Map]:
    """Returns the picture that shows less first, and the map that lays it on the other."""
    if at[0] * at[2] <= 1:
        return one_SS, other_SS, at
    return other_SS, one_SS, (1 / at[0], -at[1] / at[0], 1 / at[2], -at[3] / at[2])


def _without_borders(one: Box, other: Box) -> list[_Map]:
    pairs = {(mine, theirs) for mine in (one, WHOLE) for theirs in (other, WHOLE)} - {(WHOLE, WHOLE)}
    found = []
    for mine, theirs in sorted(pairs):
        scale_x, scale_y = ((theirs[k + 1] - theirs[k]) / (mine[k + 1] - mine[k]) for k in (0, 2))
        found.append((scale_x, theirs[0] - scale_x * mine[0], scale_y, theirs[2] - scale_y * mine[2]))
    return found


def _distance(part_SS: _Floats, whole_SS: _Floats, at: _Map, blur: float) -> float:
    """Returns the share of blocks of a picture that differ where a map lays it on another, 1 where it sticks out."""
    if any(scale < SMALLEST or offset < -SLACK or scale + offset > 1 + SLACK for scale, offset in (at[:2], at[2:])):
        return 1.0
    x_BP, y_BP = _blocks(_sampled(part_SS, AS_THEY_ARE, SIDE, blur)), _blocks(_sampled(whole_SS, at, SIDE, blur))
    var_x_B, var_y_B, cov_B = (x_BP**2).mean(1), (y_BP**2).mean(1), (x_BP * y_BP).mean(1)
    differs_B = 2 * cov_B + FLOOR < BLOCK * (var_x_B + var_y_B + FLOOR)
    contrast_B = np.sqrt(np.maximum(var_x_B, var_y_B)) + 1e-3
    return float(np.average(differs_B, weights=contrast_B / (contrast_B + HALF_WEIGHT)))


def _blocks(values_NN: _Floats) -> _Floats:
    """Returns the blocks of a picture without their means, [B, pixels]."""
    side = len(values_NN) // BLOCKS
    blocks_BP = values_NN.reshape(BLOCKS, side, BLOCKS, side).swapaxes(1, 2).reshape(BLOCKS**2, side**2)
    return np.asarray(blocks_BP - blocks_BP.mean(1, keepdims=True))


def _aligned(part_SS: _Floats, whole_SS: _Floats, at: _Map, n: int, blur: float, steps: int) -> tuple[float, _Map]:
    """Returns the largest correlation of two pictures on the way of Gauss-Newton from a map, and where it is."""
    part_NN, points_N = _sampled(part_SS, AS_THEY_ARE, n, blur), _points(n)
    best = (-2.0, at)
    for step in range(steps + 1):
        there_NN = _sampled(whole_SS, at, n, blur)
        best = max(best, (_correlation(part_NN, there_NN), at), key=lambda found: found[0])
        if step == steps:
            break
        down_NN, across_NN = (slope / (points_N[1] - points_N[0]) for slope in np.gradient(there_NN))
        across_NN, down_NN = across_NN / at[0], down_NN / at[2]
        ones_NN = np.ones_like(there_NN)
        columns = (across_NN * points_N, across_NN, down_NN * points_N[:, None], down_NN, there_NN, ones_NN)
        slopes = np.stack(columns, axis=-1).reshape(-1, 6)
        normal = slopes.T @ slopes
        normal[np.diag_indices(6)] = np.diagonal(normal) * 1.001 + 1e-6  # of a blank picture it is singular
        change = np.linalg.solve(normal, slopes.T @ (part_NN - there_NN).ravel())
        here = np.array(at) + change[:4] / max(0.5, 1 + change[4])
        at = (float(here[0]), float(here[1]), float(here[2]), float(here[3]))
        if not (SMALLEST / 2 < here[0] < 2 and SMALLEST / 2 < here[2] < 2):
            break
    return best


def _correlation(x: _Floats, y: _Floats) -> float:
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std() + 1e-6))


def _sampled(grey_SS: _Floats, at: _Map, n: int, blur: float) -> _Floats:
    """Returns a picture, blurred, where a map takes the points of a grid, float32 [N, N]."""
    across_NS, down_NS = (_weights(_points(n) * scale + offset, blur * scale) for scale, offset in (at[:2], at[2:]))
    return np.asarray(down_NS @ grey_SS @ across_NS.T)


def _weights(points_N: npt.NDArray[np.float64], sigma: float) -> _Floats:
    """Returns Gaussian weights of the pixels of a side at each point, float32 [N, S]."""
    pixels_S = (np.arange(SIDE) + 0.5) / SIDE
    weights_NS = np.exp(-0.5 * ((points_N.clip(0, 1)[:, None] - pixels_S) / sigma) ** 2)
    return np.asarray(weights_NS / weights_NS.sum(1, keepdims=True), np.float32)


def _points(n: int) -> npt.NDArray[np.float64]:
    return EDGE + (np.arange(n) + 0.5) / n * (1 - 2 * EDGE)
