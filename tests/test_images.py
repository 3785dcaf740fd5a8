"""Decoding: every mode of an image against pixels that are computed here, and files that are damaged."""

import contextlib
import io
import random
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from carft_ray.data.images import _plain_jpeg, decode_image
from carft_ray.errors import DataError

RED = (200, 30, 40)
WHITE = (255, 255, 255)


def picture(width=8, height=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, ending="png", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, ending, **options)
    return stream.getvalue()


def decoded(image, ending="png", **options):
    pixels = decode_image(encoded(image, ending, **options), "x")
    assert pixels.dtype == np.uint8
    return pixels


def three(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=-1)


def with_alpha(alpha):
    return np.dstack([picture(), np.broadcast_to(np.uint8(alpha), (6, 8))])


def half_white():
    pixels = picture()
    pixels[:, :4] = WHITE
    return pixels


HALF = np.where(np.arange(8) < 4, 0, 255)  # the left half is clear
GREY, VALUES = picture()[..., 0], np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
FEW = picture(seed=1)[..., 0] // 128  # alpha 0 or 1
DARK = np.repeat(np.uint8([50, 50, 50, 0, 0, 0]), 24).reshape(6, 8, 3)
ENTRIES = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
COLOURS = np.uint8([(0, 0, 0), RED, (7, 8, 9)])
CLEARED = np.uint8([WHITE, RED, (7, 8, 9)])
PALETTE = Image.fromarray(ENTRIES)
PALETTE.putpalette(COLOURS.ravel().tolist())
LOSSLESS = {"lossless": True}
# what is saved, in which format, with which options, and the pixels that are decoded
DECODED = {
    **{f"RGB as {ending}": (picture(), ending, {}, picture()) for ending in ("png", "bmp", "tiff", "ppm")},
    "grey is repeated": (GREY, "png", {}, three(GREY)),
    "one bit is black and white": (Image.fromarray(GREY > 127), "png", {}, three(np.where(GREY > 127, 255, 0))),
    **{f"alpha {a} keeps the colour": (with_alpha(a), "png", {}, picture()) for a in (1, 9, 254, 255)},
    "clear pixels are white": (with_alpha(HALF), "png", {}, half_white()),
    "clear pixels of WebP": (with_alpha(HALF), "webp", LOSSLESS, half_white()),
    "clear pixels of TIFF": (with_alpha(HALF), "tiff", {}, half_white()),
    "grey with alpha": (np.dstack([GREY, FEW]), "png", {}, three(np.where(FEW == 0, 255, GREY))),
    "palette": (PALETTE, "png", {}, COLOURS[ENTRIES]),
    "palette, one entry clear": (PALETTE, "png", {"transparency": bytes([0, 128, 255])}, CLEARED[ENTRIES]),
    "palette of GIF": (PALETTE, "gif", {"transparency": 0}, CLEARED[ENTRIES]),
    "one clear grey": (DARK[..., 0], "png", {"transparency": 0}, np.where(DARK == 0, 255, DARK)),
    "one clear colour": (DARK, "png", {"transparency": (0, 0, 0)}, np.where(DARK == 0, 255, DARK)),
    "16 bits": (VALUES, "png", {}, three([[0, 0, 1, 1, 128, 254, 255]])),
    "16 bits of TIFF": (VALUES, "tiff", {}, three([[0, 0, 1, 1, 128, 254, 255]])),
}


@pytest.mark.parametrize(("image", "ending", "options", "expected"), DECODED.values(), ids=DECODED)
def test_every_mode_of_an_image_has_its_pixels(image, ending, options, expected):
    np.testing.assert_array_equal(decoded(image, ending, **options), expected)


def test_floating_point_has_no_known_range():
    with pytest.raises(DataError, match=r"x: must be a readable image, but got grey values in floating point"):
        decoded(Image.fromarray(np.zeros((6, 8), dtype=np.float32)), "tiff")


@pytest.mark.parametrize("ending", ["tiff", "jpeg"])
def test_inks_are_mixed(ending):
    inks = (40, 200, 10, 60)
    content = encoded(Image.new("CMYK", (16, 16), inks), ending, **({"quality": 100} if ending == "jpeg" else {}))
    assert (b"Adobe" in content) == (ending == "jpeg")  # with this marker the values of the file are 255 - ink
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    assert np.abs(decode_image(content, "x") - np.array(expected)).max() <= 2


UPRIGHT = [
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.swapaxes(0, 1),
    lambda a: np.rot90(a, -1),
    lambda a: a[::-1, ::-1].swapaxes(0, 1),
    lambda a: np.rot90(a),
]


@pytest.mark.parametrize("ending", ["png", "jpeg"])
def test_the_rotation_of_the_camera_is_applied(ending):
    image = np.zeros((16, 32, 3), dtype=np.uint8)
    image[:8, :8] = 255  # a corner
    image[8:, 24:] = 100
    for orientation, upright in enumerate(UPRIGHT, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decoded(image, ending, exif=exif).astype(int)
        assert np.abs(found - upright(image.astype(int))).max() <= (0 if ending == "png" else 20)


def test_damaged_exif_data_are_no_reason_to_refuse_an_image():
    content = encoded(picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warnings about the data
        assert decode_image(content, "x").shape == (6, 8, 3)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_of_an_animation_the_first_picture_counts(ending):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in (RED, (0, 0, 0)))
    options = {"lossless": True} if ending == "webp" else {}
    found = decoded(first, ending, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(found, np.broadcast_to(RED, (6, 8, 3)))


@pytest.mark.parametrize("ending", ["png", "jpeg", "bmp", "webp", "gif"])
def test_images_that_are_cut_off_are_refused_and_damaged_ones_read_or_refused(ending):
    whole = encoded(picture(64, 64), ending)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(DataError, match=r"x: must be a readable image, but got \S+") as caught:
            decode_image(whole[: int(len(whole) * share)], "x")
        assert caught.value.exit_code == 4
    whole, draw = encoded(picture(24, 20), ending), random.Random(0)
    for trial in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(min(len(damaged), 60 if trial % 3 else len(damaged)))] = draw.randrange(256)
        with contextlib.suppress(DataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warnings about odd headers
            assert decode_image(bytes(damaged), "x").ndim == 3


# ---- JPEGs that do not go to Pillow


def by_pillow(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as file:
            return np.asarray(file.convert("RGB"))


def smooth(width, height):
    """A picture with what photos have: areas that are smooth and some that are not."""
    small = Image.fromarray(picture(max(2, width // 5), max(2, height // 5)))
    return Image.fromarray(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) // 8 * 8)


KINDS = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}, {"optimize": True}]
KINDS += [{"keep_rgb": True}, {"restart_marker_blocks": 3}]


@pytest.mark.parametrize("options", [*KINDS, {"mode": "L"}], ids=str)
def test_every_kind_of_jpeg_has_the_pixels_of_pillow_to_the_bit(options):
    saved = {key: value for key, value in options.items() if key != "mode"}
    for width, height in ((1, 1), (7, 5), (16, 16), (33, 47), (150, 97)):
        for quality in (20, 75, 100):
            image = smooth(width, height).convert(options.get("mode", "RGB"))
            content = encoded(image, "jpeg", quality=quality, **saved)
            np.testing.assert_array_equal(_plain_jpeg(content)[0], by_pillow(content))


@pytest.mark.parametrize("subsampling", ["440", "411", "Gray"])
def test_kinds_of_jpeg_that_pillow_does_not_write_have_its_pixels_too(subsampling):
    content = simplejpeg.encode_jpeg(np.array(smooth(45, 31)), 80, colorsubsampling=subsampling)
    np.testing.assert_array_equal(_plain_jpeg(content)[0], by_pillow(content))


@pytest.mark.parametrize("progressive", [False, True])
def test_what_is_taken_of_damaged_jpegs_pillow_takes_too_with_the_same_pixels(progressive):
    whole = encoded(smooth(24, 20), "jpeg", progressive=progressive)
    draw = random.Random(1)
    taken = 0
    for trial in range(400):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if trial % 8 == 0 else whole)
        if len(damaged) > 3:
            damaged[draw.randrange(3, len(damaged))] = draw.randrange(256)
        found = _plain_jpeg(bytes(damaged))
        if found is not None:
            taken += 1
            np.testing.assert_array_equal(found[0], by_pillow(bytes(damaged)))
    assert 50 < taken < 350


EXIF = b"Exif\0\0"
BEHIND_A_THUMBNAIL = b"8BIM\xff\xda"  # which looks like the beginning of the picture


MARKS = [{0xE1: EXIF}, {0xE1: b'<x tiff:Orientation="6"/>'}, {0xED: BEHIND_A_THUMBNAIL, 0xE1: EXIF}]


@pytest.mark.parametrize("marks", MARKS)
def test_a_jpeg_that_may_be_turned_goes_to_pillow(marks):
    content = encoded(smooth(16, 16), "jpeg")
    segments = b"".join(b"\xff%c" % kind + (len(mark) + 2).to_bytes(2, "big") + mark for kind, mark in marks.items())
    assert _plain_jpeg(content[:2] + segments + content[2:]) is None
    assert _plain_jpeg(content) is not None
