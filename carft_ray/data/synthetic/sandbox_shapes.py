"""The sixteen shapes of the sandbox as polygons, and how a shape becomes a mask.

Coordinates are relative: a shape fills the square from -1 to 1, x to the right, y down.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Points = npt.NDArray[np.float64]  # [P, 2], x and y
Part = tuple[Points, bool]  # a polygon, and whether it adds to the shape (True) or cuts a hole (False)

SHAPE_NAMES: tuple[str, ...] = (
    *("circle", "ring", "moon", "cloud"),  # round
    *("square", "cross", "house", "key"),  # boxy
    *("star", "triangle", "arrow", "bolt"),  # pointed
    *("fish", "tree", "flower", "heart"),  # living
)


@functools.cache
def shape_parts(name: str) -> tuple[Part, ...]:
    """Returns the polygons of a shape, in the order in which they are drawn.

    Raises:
        KeyError: ``name`` is not in ``SHAPE_NAMES``.
    """
    return _shapes()[name]


def draw_mask(name: str, size: int, scale: float, angle: float, mirrored: bool, centre: Sequence[float]) -> Image.Image:
    """Draws a shape in white on black.

    Args:
        name: One of ``SHAPE_NAMES``.
        size: Width and height of the mask in pixels.
        scale: Extent of the shape as a fraction of the frame.
        angle: Rotation in degrees.
        mirrored: Whether left and right are swapped before the rotation.
        centre: Where the middle of the shape lies, x and y, as fractions of the frame.

    Returns:
        Grey image of ``size`` x ``size`` pixels, 255 inside the shape and 0 outside.
    """
    turn = math.radians(angle)
    cos, sin = math.cos(turn) * scale * size / 2, math.sin(turn) * scale * size / 2
    flip = -1.0 if mirrored else 1.0
    matrix = np.array([[flip * cos, flip * sin], [-sin, cos]])
    offset = np.array([centre[0] * size, centre[1] * size])
    mask = Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(mask)
    for points, adds in shape_parts(name):
        corners = points @ matrix + offset
        canvas.polygon(corners.ravel().tolist(), fill=255 if adds else 0)
    return mask


def _ellipse(x: float, y: float, width: float, height: float, count: int = 28) -> Points:
    turn = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _moon() -> Points:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 24)
    start = 0.95 * np.array([math.cos(outer[0]), math.sin(outer[0])])
    reach = math.atan2(start[1], start[0] - 0.5)
    inner = np.linspace(2 * math.pi - reach, reach, 20)
    radius = math.hypot(start[0] - 0.5, start[1])
    arc = 0.95 * np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = np.stack([0.5 + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    moon: npt.NDArray[np.float64] = np.concatenate([arc, bite]) + np.array([0.15, 0.0])
    return moon


def _star() -> Points:
    turn = np.arange(10) * math.pi / 5 - math.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def _heart() -> Points:
    turn = np.linspace(0, 2 * math.pi, 32, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
    return np.stack([x / 17, (y - 2.5) / 16], axis=1)


def _petals() -> list[Part]:
    turns = np.arange(5) * 2 * math.pi / 5 - math.pi / 2
    return [(_ellipse(0.58 * math.cos(t), 0.58 * math.sin(t), 0.4, 0.4, 18), True) for t in turns]


@functools.cache
def _shapes() -> dict[str, tuple[Part, ...]]:
    def solid(*corners: tuple[float, float]) -> tuple[Part, ...]:
        return ((np.array(corners), True),)

    w, a = 0.3, 0.95  # half width and reach of the cross
    return {
        "circle": ((_ellipse(0, 0, 0.95, 0.95), True),),
        "ring": ((_ellipse(0, 0, 0.95, 0.95), True), (_ellipse(0, 0, 0.52, 0.52), False)),
        "moon": ((_moon(), True),),
        "cloud": (
            (_ellipse(-0.52, 0.2, 0.46, 0.4), True),
            (_ellipse(0.0, -0.15, 0.52, 0.5), True),
            (_ellipse(0.55, 0.22, 0.42, 0.38), True),
            (_box(-0.52, 0.15, 0.55, 0.6), True),
        ),
        "square": ((_box(-0.8, -0.8, 0.8, 0.8), True),),
        "cross": solid(
            *((-w, -a), (w, -a), (w, -w), (a, -w), (a, w), (w, w)),
            *((w, a), (-w, a), (-w, w), (-a, w), (-a, -w), (-w, -w)),
        ),
        "house": (
            (
                np.array([(-0.7, 0.9), (0.7, 0.9), (0.7, 0.0), (0.98, 0.0), (0, -0.95), (-0.98, 0.0), (-0.7, 0.0)]),
                True,
            ),
            (_box(-0.2, 0.35, 0.2, 0.92), False),
        ),
        "key": (
            (_ellipse(-0.52, 0, 0.46, 0.46), True),
            (_ellipse(-0.52, 0, 0.2, 0.2, 16), False),
            (_box(-0.1, -0.13, 1.0, 0.13), True),
            (_box(0.42, 0.1, 0.6, 0.46), True),
            (_box(0.8, 0.1, 0.98, 0.46), True),
        ),
        "star": ((_star(), True),),
        "triangle": solid((0, -0.9), (0.95, 0.8), (-0.95, 0.8)),
        "arrow": solid((-0.95, -0.27), (0.1, -0.27), (0.1, -0.75), (0.98, 0), (0.1, 0.75), (0.1, 0.27), (-0.95, 0.27)),
        "bolt": solid((0.15, -1.0), (-0.6, 0.15), (-0.08, 0.15), (-0.3, 1.0), (0.6, -0.25), (0.06, -0.25), (0.5, -1.0)),
        "fish": (
            (_ellipse(-0.2, 0, 0.75, 0.5), True),
            (np.array([(0.35, 0.0), (0.98, -0.55), (0.82, 0.0), (0.98, 0.55)]), True),
            (_ellipse(-0.58, -0.12, 0.1, 0.1, 10), False),
        ),
        "tree": (
            (_box(-0.16, 0.5, 0.16, 1.0), True),
            (np.array([(0, -0.2), (0.8, 0.6), (-0.8, 0.6)]), True),
            (np.array([(0, -0.65), (0.64, 0.15), (-0.64, 0.15)]), True),
            (np.array([(0, -1.0), (0.46, -0.35), (-0.46, -0.35)]), True),
        ),
        "flower": (*_petals(), (_ellipse(0, 0, 0.24, 0.24, 18), False)),
        "heart": ((_heart(), True),),
    }
