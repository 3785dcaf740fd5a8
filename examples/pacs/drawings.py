"""Drawings of things: icons with names, rendered and seen in styles."""

import importlib
import io
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from wordnet import Nouns, synset_of_drawing

SIZE = 112  # pixels; the recipe's size
# words of the other templates, per view of a drawing
STYLES = {
    "plain": "cartoon|origami|plastic|toy|plushie|rendering|video game|embroidered|sculpture|rendition|art of",
    "lines": "sketch|drawing|doodle|tattoo",
    "paint": "painting|graffiti|art of|rendition",
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#222"'


def drawings_of(icons: dict[str, Any], nouns: Nouns, most: int = 4) -> list[tuple[str, str, str]]:
    """Chooses icons that show a thing: name, synset and SVG, in the order of their names.

    Args:
        icons: Content of an `icons.json`.
        nouns: WordNet.
        most: Icons per synset.
    """
    counts: dict[str, int] = {}
    chosen = []
    for name, icon in sorted(icons["icons"].items()):
        synset = None if "skin-tone" in name else synset_of_drawing(name, nouns)
        if synset is None or counts.get(synset, 0) == most:
            continue
        counts[synset] = counts.get(synset, 0) + 1
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
        chosen.append((name, synset, f"{SVG} {box}>{icon['body']}</svg>"))
    return chosen


def rendered(svg: str) -> Image.Image:
    """Returns a drawing of at most 112 by 112 pixels, RGBA."""
    resvg: Any = importlib.import_module("resvg_py")
    png = resvg.svg_to_bytes(svg_string=svg, width=SIZE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    return image


def view(drawing: Image.Image, style: str, draw: np.random.Generator) -> Image.Image:
    """Returns a drawing at a random place and size in a square of 112 pixels, in one of the styles.

    Args:
        drawing: RGBA.
        style: `plain` (on white or on one light colour), `lines` (Sobel's edges, dark on white), `paint` (on blurred
            colours, in coarse strokes).
        draw: Random numbers.
    """
    factor = draw.uniform(0.65, 1.0)
    small = drawing.resize([max(8, round(side * factor)) for side in drawing.size], Image.Resampling.BICUBIC)
    left, top = (int(draw.integers(0, SIZE - side + 1)) for side in small.size)
    if style == "paint":
        patches = draw.uniform(40, 220, 3) + draw.normal(0, 25, (4, 4, 3)) + draw.normal(0, 25, (4, 4, 1))
        ground = Image.fromarray(patches.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    else:
        is_white = style == "lines" or draw.random() < 0.5
        ground = Image.new("RGB", (SIZE, SIZE), "white" if is_white else tuple(draw.integers(120, 256, 3).tolist()))
    ground.paste(small, (left, top), small)
    if style == "paint":
        coarse = ground.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.GaussianBlur(0.6))
        pixels = np.asarray(coarse, np.float64) + draw.normal(0, 8, (SIZE, SIZE, 1))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if style == "lines":
        grey = np.asarray(ground.convert("L").filter(ImageFilter.GaussianBlur(0.7)), np.float64)
        across, down = np.gradient(grey)
        edges = np.hypot(across, down)
        dark = (edges / max(1.0, float(np.quantile(edges, 0.97)))).clip(0, 1) * draw.uniform(150, 255)
        return Image.fromarray((255 - dark).astype(np.uint8)).convert("RGB")
    return ground
