"""Copies of a picture as people make them, and the records of pictures that are in memory."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from carft_ray.data.content import DIGEST_BYTES
from carft_ray.data.records import Records, thumbnails_of

BORDER = 0.06  # of the shorter side
MARGIN = 0.05  # of each side
MARK = "(c) example"
MARK_WIDTH = 1 / 3  # of the width


def _saved(ending, **settings):
    def change(image):
        content = io.BytesIO()
        image.save(content, ending, **settings)
        return Image.open(content).convert("RGB")

    return change


def _resized(factor):
    return lambda image: image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BICUBIC)


def _cropped(image):
    x, y = round(MARGIN * image.width), round(MARGIN * image.height)
    return image.crop((x, y, image.width - x, image.height - y))


def _bordered(image):
    """Lays a border around: white where the picture begins dark, else black."""
    colour = "white" if np.asarray(image.convert("L"))[0].mean() < 128 else "black"
    return ImageOps.expand(image, max(1, round(BORDER * min(image.size))), fill=colour)


def _marked(image):
    """Writes a text over a third of the width into the lower right corner, white with a black outline."""
    marked = image.copy()
    draw, size = ImageDraw.Draw(marked), 1.0
    while draw.textlength(MARK, font=ImageFont.load_default(size + 1)) <= MARK_WIDTH * image.width:
        size += 1
    place, font = (0.97 * image.width, 0.97 * image.height), ImageFont.load_default(size)
    draw.text(place, MARK, "white", font, "rb", stroke_width=max(1, round(size / 10)), stroke_fill="black")
    return marked


COPIES = {
    "PNG": _saved("PNG"),
    "JPEG 90": _saved("JPEG", quality=90),
    "JPEG 75": _saved("JPEG", quality=75),
    "half size": _resized(0.5),
    "double size": _resized(2),
    "5 % margin off": _cropped,
    "border": _bordered,
    "small watermark": _marked,
}


def signed(pictures, seed):
    """Returns the records of pictures; each has bytes of its own, so that copies are found by what they show."""
    digests = np.random.default_rng(seed).integers(0, 256, (len(pictures), DIGEST_BYTES), dtype=np.uint8)
    return Records(digests, np.stack([thumbnails_of(pixels) for pixels in pictures]))
