"""Images of strangers: what is opened, up to which size, through which one gate, and as which pixels."""

import contextlib
import io
import re
import resource
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import short_training
import simplejpeg
from layouts_tables import Picture, encoded, write_folder
from PIL import EpsImagePlugin, Image
from sources import open_set, told

from benchmarks.photos import photo
from carft_ray.data import decode_images
from carft_ray.data.decode_images import FORMATS, _plain_jpeg, decode_image
from carft_ray.data.records import records, without_bad_images
from carft_ray.data.sets import open_sets, write_sets
from carft_ray.errors import DataError
from carft_ray.recipe.loading import load_recipe

PACKAGE = Path(__file__).parents[1] / "carft_ray"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(stolen) (w) file closefile\nshowpage\n%%EOF\n"


def plain(kind, size=(8, 6), **options):
    return encoded(Image.new("RGB", size, (9, 90, 200)), kind, **options)


def large_png(width, height):
    """A grey PNG of zeros, a bit each, some kilobytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    data = zlib.compress(bytes(1 + (width + 7) // 8) * height, 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def set_with(root, content):
    """Opens a set of four images, of which the last is this one."""
    images = [Picture(f"{name}/{number}.jpg", name, plain("JPEG")) for name in ("cat", "dog") for number in range(2)]
    write_folder(root / "images", [*images[:3], images[3]._replace(content=content)])
    return open_set(source="folder", path=str(root / "images"))


def test_a_file_that_would_start_a_program_is_refused_by_its_first_bytes_and_can_be_skipped(tmp_path, monkeypatch):
    program, called = tmp_path / "bin" / "gs", tmp_path / "called"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow must look for it again
    with pytest.raises(Exception, match="gs"), Image.open(io.BytesIO(EPS)) as file:  # what Pillow alone does
        file.load()
    called.unlink()
    source = set_with(tmp_path, EPS)
    text = told(source.pixels, 3)
    assert "dog/1.jpg: must be a readable image, but got a file that begins with b'%!PS" in text
    assert f"Save it as one of {', '.join(FORMATS)}, or remove it from the set." in text
    assert len(records(source, tmp_path / "cache").problems) == 1
    assert len(without_bad_images(source, tmp_path / "cache")) == 3
    assert not called.exists()


OTHERS = [EPS, b"%PDF-1.7", b"<html>", b"version https://git-lfs.github.com", b"", b"\0\0\0\x1cftypheic"]


@pytest.mark.parametrize("content", [*OTHERS, plain("ICO"), plain("TGA")])
def test_a_file_of_another_format_is_refused_with_its_first_bytes(content):
    value = f"a file that begins with {content[:20]!r}" if content else "an empty file"
    assert told(decode_image, content, "x").startswith(f"x: must be a readable image, but got {value}\n")
    for kind in (*FORMATS, "MPO"):
        assert decode_image(plain(kind), "x.png").shape == (6, 8, 3)  # whatever the ending


@contextlib.contextmanager
def little_memory():
    """Within the block this process takes at most 100 MB more than it ever has."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_very_many_pixels_takes_no_memory_and_can_be_skipped(tmp_path):
    content = large_png(13300, 13300)
    assert len(content) < 200_000
    source = set_with(tmp_path, content)
    with little_memory():
        text = told(source.pixels, 3)
        assert len(without_bad_images(source, tmp_path / "cache")) == 3
    assert "dog/1.jpg: must have at most 64,000,000 pixels (max_pixels), but got 176,890,000" in text
    assert "Save it smaller, remove it, or raise max_pixels of its set." in text


def test_the_limit_is_that_of_the_set_for_every_kind_of_file():
    contents, rule = {kind: plain(kind, (300, 200)) for kind in FORMATS}, "must have at most 59,999 pixels"
    contents["progressive"] = plain("JPEG", (300, 200), progressive=True)
    for kind, content in contents.items():
        assert decode_image(content, kind, 60_000).ndim == 3
        assert f"{rule} (max_pixels), but got 60,000" in told(decode_image, content, kind, 59_999)
    for kind in FORMATS:  # resized by its shorter side, a line of a million pixels would fill the memory
        assert decode_image(plain(kind, (1000, 1)), kind).shape == (1, 1000, 3)
        assert "along the other, but got 1 x 1,001" in told(decode_image, plain(kind, (1, 1001)), kind)
    for side in (20_000, 10_000):  # Pillow itself refuses the one, and warns of the other, which is an error here
        assert rule in told(decode_image, large_png(side, 10_000), "x", 59_999)


def tiled_tiff(side, tile):
    """A grey TIFF of one tile of zeros."""
    data = zlib.compress(bytes(tile * tile if tile < 1000 else 1000))
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_small_picture_in_one_large_tile_takes_no_memory():
    assert decode_image(tiled_tiff(64, 64), "x").shape == (64, 64, 3)
    with little_memory():
        assert "(max_pixels), but got 1,600,000,000" in told(decode_image, tiled_tiff(64, 40_000), "x")


def test_the_limit_of_a_recipe_holds_for_listed_sets_and_records_and_another_limit_reads_them_anew(tmp_path):
    path = short_training.make(tmp_path)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "photo" / "star" / "0.png")
    for limit, num_refused in ((1199, 1), (1200, 0)):
        recipe = load_recipe(path, [f"data.train.max_pixels={limit}", "data.cache_dir=cache"])
        write_sets(recipe, tmp_path / "prepared")
        for source in (open_sets(recipe)["train"], open_sets(recipe, tmp_path / "prepared")["train"]):
            assert len(records(source, tmp_path / "cache").problems) == num_refused
            star = [source.place(index).endswith("star/0.png") for index in range(len(source))].index(True)
            with pytest.raises(DataError, match="max_pixels") if num_refused else contextlib.nullcontext():
                source.pixels(star)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_images_are_decoded_one_at_a_time(kind, monkeypatch):
    large, small = plain(kind, (200, 100)), plain(kind, (100, 100))
    inside, most, both = [], [], threading.Barrier(2)

    def watched(decode):
        def call(*args, **options):
            inside.append(1)
            most.append(len(inside))
            if len(inside) > 1 or small_ones:
                both.wait(10)
            found = decode(*args, **options)
            inside.pop()
            return found

        return call

    monkeypatch.setattr(decode_images, "LARGE", 10_000)
    monkeypatch.setattr(decode_images, "_to_rgb", watched(decode_images._to_rgb))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched(simplejpeg.decode_jpeg))
    with ThreadPoolExecutor(8) as pool:
        small_ones = True  # they meet inside of the decoder
        assert [found.shape for found in pool.map(decode_image, [small] * 2, "xy")] == [(100, 100, 3)] * 2
        assert max(most) == 2
        most.clear()
        small_ones = False
        assert {found.shape for found in pool.map(decode_image, [large] * 40, "x" * 40)} == {(100, 200, 3)}
    assert set(most) == {1}


# calls that decode an image; of "the gate itself", and of a JPEG that was just written
OPENS = re.compile(r"Image\.open\(|ImageFile\.Parser|read_image\(|(?<![\w.])io\.decode_image\(|simplejpeg\.decode\w*\(")
HIDES = re.compile(r"from (PIL\.Image|PIL\.ImageFile|simplejpeg|torchvision\.io) import|from torchvision import io")


def test_no_image_is_opened_around_the_gate():
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    gates = {"data/decode_images.py", "data/corruptions.py"}
    assert {name for name, text in texts.items() if OPENS.search(text)} == gates
    assert not [name for name, text in texts.items() if HIDES.search(text)]  # so that a call is seen


# ---- modes, and files that are damaged


RED, WHITE = (200, 30, 40), (255, 255, 255)


def picture(width=8, height=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(image, ending, **options):
    pixels = decode_image(encoded(image, ending, **options), "x")
    assert pixels.dtype == np.uint8
    return pixels


def three(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=-1)


def with_alpha(alpha):
    return np.dstack([picture(), np.broadcast_to(np.uint8(alpha), (6, 8))])


HALF = np.where(np.arange(8) < 4, 0, 255)  # the left half is clear
HALF_WHITE = np.where(np.arange(8)[:, None] < 4, WHITE, picture())
GREY, VALUES = picture()[..., 0], np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
FEW = picture(seed=1)[..., 0] // 128  # alpha 0 or 1
DARK = np.repeat(np.uint8([50, 50, 50, 0, 0, 0]), 24).reshape(6, 8, 3)
ENTRIES = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
COLOURS = np.uint8([(0, 0, 0), RED, (7, 8, 9)])
CLEARED = np.uint8([WHITE, RED, (7, 8, 9)])
PALETTE = Image.fromarray(ENTRIES)
PALETTE.putpalette(COLOURS.ravel().tolist())
LOSSLESS, EXIF = {"lossless": True}, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
FIRST, ANIMATION = Image.new("RGB", (8, 6), RED), {"save_all": True, "append_images": [Image.new("RGB", (8, 6))]}
# what is saved, in which format, with which options, and the pixels that are decoded
DECODED = {
    **{f"RGB as {ending}": (picture(), ending, {}, picture()) for ending in ("png", "bmp", "tiff", "ppm")},
    "grey is repeated": (GREY, "png", {}, three(GREY)),
    "one bit is black and white": (Image.fromarray(GREY > 127), "png", {}, three(np.where(GREY > 127, 255, 0))),
    **{f"alpha {a} keeps the colour": (with_alpha(a), "png", {}, picture()) for a in (1, 9, 254, 255)},
    "clear pixels are white": (with_alpha(HALF), "png", {}, HALF_WHITE),
    "clear pixels of WebP": (with_alpha(HALF), "webp", LOSSLESS, HALF_WHITE),
    "clear pixels of TIFF": (with_alpha(HALF), "tiff", {}, HALF_WHITE),
    "grey with alpha": (np.dstack([GREY, FEW]), "png", {}, three(np.where(FEW == 0, 255, GREY))),
    "palette": (PALETTE, "png", {}, COLOURS[ENTRIES]),
    "palette, one entry clear": (PALETTE, "png", {"transparency": bytes([0, 128, 255])}, CLEARED[ENTRIES]),
    "palette of GIF": (PALETTE, "gif", {"transparency": 0}, CLEARED[ENTRIES]),
    "one clear grey": (DARK[..., 0], "png", {"transparency": 0}, np.where(DARK == 0, 255, DARK)),
    "one clear colour": (DARK, "png", {"transparency": (0, 0, 0)}, np.where(DARK == 0, 255, DARK)),
    "of an animation the first picture": (FIRST, "gif", ANIMATION, np.broadcast_to(RED, (6, 8, 3))),
    "the first of WebP": (FIRST, "webp", {**ANIMATION, **LOSSLESS}, np.broadcast_to(RED, (6, 8, 3))),
    "the first of PNG": (FIRST, "png", ANIMATION, np.broadcast_to(RED, (6, 8, 3))),
    "damaged EXIF data": (picture(), "png", {"exif": EXIF + bytes(range(40))}, picture()),
    "16 bits": (VALUES, "png", {}, three([[0, 0, 1, 1, 128, 254, 255]])),
    "16 bits of TIFF": (VALUES, "tiff", {}, three([[0, 0, 1, 1, 128, 254, 255]])),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(("image", "ending", "options", "expected"), DECODED.values(), ids=DECODED)
def test_every_mode_of_an_image_has_its_pixels(image, ending, options, expected):
    np.testing.assert_array_equal(decoded(image, ending, **options), expected)


def test_floating_point_has_no_known_range():
    text = told(decoded, Image.fromarray(np.zeros((6, 8), dtype=np.float32)), "tiff")
    assert text.startswith("x: must be a readable image, but got grey values in floating point")


@pytest.mark.parametrize("grey", [[0, 65535], [0, 65536], [0, 2**31 - 1], [-1, 7]])
def test_grey_of_32_bits_has_its_pixels_up_to_16_bits_and_is_refused_beyond(grey):
    content = encoded(np.array([grey], np.int32), "tiff")
    if grey == [0, 65535]:
        np.testing.assert_array_equal(decode_image(content, "x"), three([[0, 255]]))
        return
    low, high = grey
    value = f"grey values from {low:,} to {high:,}, of unknown range: only those from 0 to 65,535 are read"
    assert told(decode_image, content, "x").startswith(f"x: must be a readable image, but got {value}\n")


@pytest.mark.parametrize("ending", ["tiff", "jpeg"])
def test_inks_are_mixed(ending):
    inks = (40, 200, 10, 60)
    content = encoded(Image.new("CMYK", (16, 16), inks), ending, **({"quality": 100} if ending == "jpeg" else {}))
    assert (b"Adobe" in content) == (ending == "jpeg")  # with this marker the values of the file are 255 - ink
    expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
    assert np.abs(decode_image(content, "x") - np.array(expected)).max() <= 2


@pytest.mark.parametrize("ending", ["png", "jpeg"])
def test_the_rotation_of_the_camera_is_applied(ending):
    image = np.zeros((16, 32, 3), dtype=np.uint8)
    image[:8, :8], image[8:, 24:] = 255, 100  # two corners
    for orientation, turned in {1: image, 2: image[:, ::-1], 3: image[::-1, ::-1], 6: np.rot90(image, -1)}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decoded(image, ending, exif=exif).astype(int)
        assert np.abs(found - turned.astype(int)).max() <= (0 if ending == "png" else 20)


@pytest.mark.parametrize("ending", ["png", "jpeg", "bmp", "webp", "gif"])
def test_images_that_are_cut_off_are_refused(ending):
    whole = encoded(picture(64, 64), ending)
    for share in (0.1, 0.5, 0.9):
        text = told(decode_image, whole[: int(len(whole) * share)], "x")
        assert re.match(r"x: must be a readable image, but got \S+", text)


# ---- JPEGs that do not go to Pillow


def by_pillow(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


PROGRESSIVE, RESTARTS = {"progressive": True}, {"restart_marker_blocks": 3}
KINDS = [*({"subsampling": kind} for kind in range(3)), PROGRESSIVE, RESTARTS, {"optimize": True}, {"keep_rgb": True}]


@pytest.mark.parametrize("options", [*KINDS, {"mode": "L"}], ids=str)
def test_every_kind_of_jpeg_has_the_pixels_of_pillow_to_the_bit(options):
    for width, height in ((1, 1), (7, 5), (16, 16), (33, 47), (150, 97)):
        for quality in (20, 75, 100):
            content = encoded(photo(0, width, height), "jpeg", quality=quality, **options)
            np.testing.assert_array_equal(_plain_jpeg(content)[0], by_pillow(content))


@pytest.mark.parametrize("subsampling", ["440", "411", "Gray"])
def test_kinds_of_jpeg_that_pillow_does_not_write_have_its_pixels_too(subsampling):
    content = simplejpeg.encode_jpeg(photo(0, 45, 31), 80, colorsubsampling=subsampling)
    np.testing.assert_array_equal(_plain_jpeg(content)[0], by_pillow(content))


BEHIND_A_THUMBNAIL = b"8BIM\xff\xda"  # which looks like the beginning of the picture
MARKS = [{0xE1: b"Exif\0\0"}, {0xE1: b'<x tiff:Orientation="6"/>'}, {0xED: BEHIND_A_THUMBNAIL, 0xE1: b"Exif\0\0"}]


@pytest.mark.parametrize("marks", MARKS)
def test_a_jpeg_that_may_be_turned_goes_to_pillow(marks):
    content = encoded(photo(0, 16, 16), "jpeg")
    segments = b"".join(b"\xff%c" % kind + (len(mark) + 2).to_bytes(2, "big") + mark for kind, mark in marks.items())
    assert _plain_jpeg(content[:2] + segments + content[2:]) is None
    assert _plain_jpeg(content) is not None
