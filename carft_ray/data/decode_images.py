"""From the bytes of an image to RGB, the same for every source.

The pixels are those of Pillow's ``convert("RGB")``, which open_clip's transform and the usual loaders call, but for

- pixels that are **fully transparent**: their colour is nobody's intention and is taken as white. What stands under
  them depends on the file format: saved by Pillow as PNG and as lossless WebP, one smooth picture differs there by 134
  grey levels on average and nowhere else; as lossy WebP by 60 there and by 4 elsewhere (synthetic, 64 x 64 pixels,
  Pillow 13). Partly transparent pixels keep their colour, as ``convert`` leaves it;
- grey of **16 bits**, which ``convert`` cuts off at 255: it is scaled. Grey in floating point, and grey of 32 bits
  with a value that 16 bits do not hold, has no known range and is refused;
- the **rotation** that a camera notes in the EXIF data, which is applied.

CMYK is read by Adobe's convention (inverted in JPEG) and mixed as ``(255 - C)(255 - K) / 255``, as Pillow does without
a colour profile. Of an animation the first picture counts.

Most JPEGs are decoded by simplejpeg, which is libjpeg-turbo without a detour. Pillow has the same underneath, so the
pixels are the same to the bit (benchmarks/README.md says how much faster). What needs a rule of the list above,
and what it finds anything wrong with, goes to Pillow.

All images of strangers are opened here. The ending of a file says nothing: of Pillow's 43 formats those of ``FORMATS``
are tried and no other, since some start programs (Ghostscript for EPS). The pixels that a header tells of are
compared with a limit before anything is decoded, and so is how narrow they are: resized by its shorter side, a line of
a million pixels fills any memory. Large images are decoded one at a time.
"""

import contextlib
import io
import struct
import threading
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from carft_ray.data.source import PixelArray
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.schema.data import MAX_PIXELS
from carft_ray.untrusted import read_regular

# torchvision's ImageFolder takes the same
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # names of Pillow; its JPEG takes MPO, too
MOST_BYTES = 2**30  # of an image file: three colours of 16 bits of as many pixels as Pillow takes
LARGE = 16_000_000  # pixels from which on images are decoded one at a time
NARROWEST = 1000  # times that a side may have the pixels of the other
WHITE = (255, 255, 255)
CIFAR_SIDE = 32  # pixels
FRAME = 2  # pixels of ObjectNet's frame
# part of the key of what keeps pixels; the number changes with the rules above
DECODERS = f"rules 2, Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"

_one_large = threading.Lock()
_TURNS = (b"Exif\0\0", b"tiff:Orientation")  # where a JPEG can note a rotation
_STEP = "Replace the file, or remove it from the set."


def read_bytes(path: Path | str) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        DataError: The file cannot be read, or is none.
    """
    try:
        return read_regular(path, MOST_BYTES)
    except OSError as error:
        raise DataError(unreadable(str(path), error)) from error


def decode_image(content: bytes, place: str, max_pixels: int = MAX_PIXELS) -> PixelArray:
    """Decodes an image file as RGB by the rules at the top of this file.

    Args:
        content: Bytes of the file.
        place: Its name, for the message.
        max_pixels: A larger image is refused.

    Returns:
        Pixels, uint8 [H, W, 3].

    Raises:
        DataError: The image is damaged, cut off, of no format that is read, or has too many pixels.
    """
    return decoded_image(content, place, max_pixels)[0]


def decoded_image(content: bytes, place: str, max_pixels: int = MAX_PIXELS) -> tuple[PixelArray, str]:
    """Returns the pixels of ``decode_image``, whose arguments and errors it has, and Pillow's mode of the file."""
    if (found := _plain_jpeg(content, max_pixels)) is not None:
        return found
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            if (number := max(file.width * file.height, _tile_pixels(file))) > max_pixels:
                raise DataError(_too_large(place, max_pixels, f"{number:,}"))
            if _is_too_narrow(*file.size):
                rule = f"must have at most {NARROWEST:,} times as many pixels along one side as along the other"
                raise DataError(Problem(place, rule, f"{file.width:,} x {file.height:,}", next_step=_STEP))
            mode = file.mode
            with _turn(number):
                file.load()
                return np.asarray(_to_rgb(_upright(file))), mode
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # of Pillow's own two limits
        raise DataError(_too_large(place, max_pixels, "more")) from error
    except UnidentifiedImageError as error:
        step = f"Save it as one of {', '.join(FORMATS)}, or remove it from the set."
        value = f"a file that begins with {content[:20]!r}" if content else "an empty file"
        raise DataError(Problem(place, "must be a readable image", value, next_step=step)) from error
    except Exception as error:  # decoders raise of every kind on damaged files
        cause = str(error) or type(error).__name__
        raise DataError(Problem(place, "must be a readable image", cause, next_step=_STEP)) from error


def planes(content: bytes, place: str, max_pixels: int) -> tuple[PixelArray, str]:
    """As ``decoded_image``, for an image of CIFAR, which is not encoded: its red, green and blue plane."""
    planes = np.frombuffer(content, np.uint8).reshape(3, CIFAR_SIDE, CIFAR_SIDE)
    return np.ascontiguousarray(planes.transpose(1, 2, 0)), "RGB"


def without_frame(content: bytes, place: str, max_pixels: int) -> tuple[PixelArray, str]:
    """As ``decoded_image``, for an image of ObjectNet: its red frame is cut off."""
    pixels, mode = decoded_image(content, place, max_pixels)
    height, width = pixels.shape[:2]
    if min(height, width) <= 2 * FRAME:
        rule = f"must be larger than its frame of {FRAME} pixels"
        raise DataError(Problem(place, rule, f"{width} x {height} pixels"))
    return pixels[FRAME:-FRAME, FRAME:-FRAME], mode


FORMS = {"file": decoded_image, "planes": planes, "framed": without_frame}  # of the images of a listing


def small_jpeg(pixels: PixelArray, side: int, quality: int) -> bytes:
    """Returns a picture as JPEG, made smaller where its longer side has more than ``side`` pixels.

    Args:
        pixels: uint8 [H, W, 3].
        side: Pixels.
        quality: Of JPEG, 1 to 95.
    """
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return content.getvalue()


def cause_of(error: BaseException) -> str:
    """Returns why a file cannot be read, in the words of the system where it has some."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def unreadable(place: str, error: OSError | ValueError) -> Problem:
    """Returns the problem of a file that the system cannot read."""
    return Problem(place, "must be readable", cause_of(error), next_step="Restore the file, or remove it from the set.")


def _tile_pixels(file: Image.Image) -> int:
    """Returns the pixels of a tile of a TIFF, which is decoded whole however small the image; 0 where there is none."""
    tags = getattr(file, "tag_v2", {})
    return int(tags.get(TiffImagePlugin.TILEWIDTH, 0)) * int(tags.get(TiffImagePlugin.TILELENGTH, 0))


def _too_large(place: str, max_pixels: int, value: str) -> Problem:
    step = "Save it smaller, remove it, or raise max_pixels of its set."
    return Problem(place, f"must have at most {max_pixels:,} pixels (max_pixels)", value, next_step=step)


def _is_too_narrow(width: int, height: int) -> bool:
    return max(width, height) > NARROWEST * min(width, height)


def _turn(number: int) -> contextlib.AbstractContextManager[object]:
    """Returns what is held while an image of so many pixels is decoded: large ones wait for each other."""
    return contextlib.nullcontext() if number <= LARGE else _one_large


def _plain_jpeg(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[PixelArray, str] | None:
    """Decodes a sound JPEG, grey or in colour, without a note of a rotation; None: a case for Pillow.

    Args:
        content: Bytes of the file.
        max_pixels: Larger ones are a case for Pillow, too.

    Returns:
        As ``decoded_image``.
    """
    if not content.startswith(b"\xff\xd8\xff") or any(mark in content for mark in _TURNS):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        is_plain = colours in ("YCbCr", "RGB", "Gray") and not _is_too_narrow(width, height)
        if not is_plain or height * width > max_pixels:
            return None
        with _turn(height * width):
            pixels = simplejpeg.decode_jpeg(content)
    except ValueError:
        return None
    return pixels, "L" if colours == "Gray" else "RGB"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, struct.error, OSError):
        return image  # damaged EXIF data says nothing about the rotation


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"grey values from {low:,} to {high:,}, of unknown range: only those from 0 to 65,535 are read"
            )
        grey = values.astype(np.uint32)
        grey += 128
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey values in floating point, of unknown range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    clear = Image.fromarray(np.asarray(with_alpha.getchannel("A")) == 0)
    colours = with_alpha.convert("RGB")
    colours.paste(WHITE, mask=clear)
    return colours
