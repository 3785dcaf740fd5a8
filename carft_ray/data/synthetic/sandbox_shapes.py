"""The sixteen shapes of the sandbox, which ``sandbox_shapes.toml`` holds, and how a shape becomes a mask."""

import functools
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Points = npt.NDArray[np.float64]  # [P, 2], x and y

SHAPE_NAMES: tuple[str, ...] = (
    *("circle", "ring", "moon", "cloud"),  # round
    *("square", "cross", "house", "key"),  # boxy
    *("star", "triangle", "arrow", "bolt"),  # pointed
    *("fish", "tree", "flower", "heart"),  # living
)


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

    Raises:
        KeyError: ``name`` is not in ``SHAPE_NAMES``.
    """
    turn = math.radians(angle)
    cos, sin = math.cos(turn) * scale * size / 2, math.sin(turn) * scale * size / 2
    flip = -1.0 if mirrored else 1.0
    matrix = np.array([[flip * cos, flip * sin], [-sin, cos]])
    offset = np.array([centre[0] * size, centre[1] * size])
    mask = Image.new("L", (size, size), 0)
    canvas = ImageDraw.Draw(mask)
    for points, is_hole in _shapes()[name]:
        corners = points @ matrix + offset
        canvas.polygon(corners.ravel().tolist(), fill=0 if is_hole else 255)
    return mask


@functools.cache
def _shapes() -> dict[str, list[tuple[Points, bool]]]:
    """Returns the parts of each shape: corners, and whether they cut a hole."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return {
        name: [(_corners(part), part.get("hole", False)) for part in parts]
        for name, parts in tomllib.loads(text).items()
    }


def _corners(part: dict[str, Any]) -> Points:
    if "polygon" in part:
        return np.array(part["polygon"])
    x, y, width, height, count = part["ellipse"]
    turn = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1)
