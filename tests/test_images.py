"""Decoding: every mode of an image against pixels that are computed here, and files that are damaged."""

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


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm"])
def test_rgb_is_as_it_was_saved(ending):
    np.testing.assert_array_equal(decoded(picture(), ending), picture())


def test_grey_is_repeated():
    np.testing.assert_array_equal(decoded(picture()[..., 0]), three(picture()[..., 0]))


def test_one_bit_is_black_and_white():
    bits = picture()[..., 0] > 127
    np.testing.assert_array_equal(decoded(Image.fromarray(bits)), three(np.where(bits, 255, 0)))


@pytest.mark.parametrize("alpha", [1, 9, 254, 255])
def test_partly_transparent_pixels_keep_their_colour_as_with_the_usual_loaders(alpha):
    pixels = np.dstack([picture(), np.full((6, 8), alpha, dtype=np.uint8)])
    np.testing.assert_array_equal(decoded(pixels), picture())
    np.testing.assert_array_equal(decoded(pixels), np.asarray(Image.open(io.BytesIO(encoded(pixels))).convert("RGB")))


@pytest.mark.parametrize(("ending", "options"), [("png", {}), ("webp", {"lossless": True}), ("tiff", {})])
def test_what_stands_under_clear_pixels_is_white_in_every_format(ending, options):
    alpha = np.full((6, 8), 255, dtype=np.uint8)
    alpha[:, :4] = 0
    expected = picture()
    expected[:, :4] = WHITE
    np.testing.assert_array_equal(decoded(np.dstack([picture(), alpha]), ending, **options), expected)


def test_grey_with_alpha():
    grey, alpha = picture()[..., 0], picture(seed=1)[..., 0] // 128  # alpha 0 or 1
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    np.testing.assert_array_equal(decoded(image), three(np.where(alpha == 0, 255, grey)))


def test_a_palette_is_looked_up_and_its_clear_entries_are_white():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 3)
    image.putpalette([0, 0, 0, *RED, 7, 8, 9])
    table = np.array([(0, 0, 0), RED, (7, 8, 9)])
    entries = np.arange(48).reshape(6, 8) % 3
    np.testing.assert_array_equal(decoded(image), table[entries])
    table[0] = WHITE  # entry 0 is clear, entry 1 half so
    np.testing.assert_array_equal(decoded(image, transparency=bytes([0, 128, 255])), table[entries])
    np.testing.assert_array_equal(decoded(image, "gif", transparency=0), table[entries])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_clear_colour_is_white(mode):
    pixels = np.zeros((6, 8, 3), dtype=np.uint8)
    pixels[:3] = 50
    clear = {"L": 0, "RGB": (0, 0, 0)}[mode]
    image = Image.fromarray(pixels).convert(mode)
    expected = np.where(pixels == 0, 255, pixels)
    np.testing.assert_array_equal(decoded(image, transparency=clear), expected)


def test_grey_of_16_bits_is_scaled_to_8():
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1, 128, 254, 255]]
    np.testing.assert_array_equal(decoded(Image.fromarray(values)), three(expected))
    np.testing.assert_array_equal(decoded(Image.fromarray(values), "tiff"), three(expected))


def test_floating_point_has_no_known_range():
    with pytest.raises(DataError, match=r"x: must be a readable image, but got grey values in floating point"):
        decoded(Image.fromarray(np.zeros((6, 8), dtype=np.float32)), "tiff")


def cmyk_as_rgb(cyan, magenta, yellow, black):
    return [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]


@pytest.mark.parametrize("ending", ["tiff", "jpeg"])
def test_inks_are_mixed(ending):
    inks = (40, 200, 10, 60)
    content = encoded(Image.new("CMYK", (16, 16), inks), ending, **({"quality": 100} if ending == "jpeg" else {}))
    assert (b"Adobe" in content) == (ending == "jpeg")  # with this marker the values of the file are 255 - ink
    found = decode_image(content, "x")
    assert np.abs(found - np.array(cmyk_as_rgb(*inks))).max() <= 2


@pytest.mark.parametrize("ending", ["png", "jpeg"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_the_rotation_of_the_camera_is_applied(ending, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.zeros((16, 32, 3), dtype=np.uint8)
    image[:8, :8] = 255  # a corner
    image[8:, 24:] = 100
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


@pytest.mark.parametrize("ending", ["png", "jpeg", "webp", "gif", "bmp"])
def test_an_image_that_is_cut_off_is_named(tmp_path, ending):
    content = encoded(Image.fromarray(picture(64, 64)), ending)
    path = tmp_path / f"cut.{ending}"
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=rf"cut\.{ending}: must be a readable image, but got \S+") as caught:
            decode_image(path.read_bytes(), str(path))
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("ending", ["png", "jpeg", "bmp", "webp"])
def test_damaged_images_are_read_or_refused_and_nothing_else(ending):
    whole = encoded(picture(24, 20), ending)
    draw = random.Random(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(draw.randrange(1, 4)):
            if damaged:
                damaged[draw.randrange(min(len(damaged), 60 if trial % 3 else len(damaged)))] = draw.randrange(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own warnings about odd headers
                assert decode_image(bytes(damaged), "x").ndim == 3
        except DataError:
            refused += 1
    assert refused > 25


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


@pytest.mark.parametrize(
    "options",
    [{"subsampling": kind} for kind in (0, 1, 2)]
    + [{"progressive": True}, {"optimize": True}, {"keep_rgb": True}, {"restart_marker_blocks": 3}, {"mode": "L"}],
    ids=str,
)
def test_every_kind_of_jpeg_has_the_pixels_of_pillow_to_the_bit(options):
    options = dict(options)
    mode = options.pop("mode", "RGB")
    for width, height in ((1, 1), (7, 5), (16, 16), (33, 47), (150, 97)):
        for quality in (20, 75, 100):
            content = encoded(smooth(width, height).convert(mode), "jpeg", quality=quality, **options)
            found = _plain_jpeg(content)
            assert found is not None
            np.testing.assert_array_equal(found[0], by_pillow(content))


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


@pytest.mark.parametrize("mark", [b"Exif\0\0", b'<x tiff:Orientation="6"/>'])
def test_a_jpeg_that_may_be_turned_goes_to_pillow(mark):
    content = encoded(smooth(16, 16), "jpeg")
    segment = b"\xff\xe1" + (len(mark) + 2).to_bytes(2, "big") + mark
    assert _plain_jpeg(content[:2] + segment + content[2:]) is None
    assert _plain_jpeg(content) is not None


def test_a_note_of_a_rotation_is_found_behind_what_looks_like_the_picture():
    content, mark = encoded(smooth(16, 16), "jpeg"), b"Exif\0\0"
    thumbnail = b"\xff\xed" + (2 + 6).to_bytes(2, "big") + b"8BIM\xff\xda"
    segment = b"\xff\xe1" + (len(mark) + 2).to_bytes(2, "big") + mark
    assert _plain_jpeg(content[:2] + thumbnail + segment + content[2:]) is None
