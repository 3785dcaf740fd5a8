"""Images of strangers: what is opened, up to which size, and through which one gate."""

import contextlib
import io
import re
import resource
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import short_training
import simplejpeg
from PIL import EpsImagePlugin, Image
from sources import open_set

from carft_ray.data import images
from carft_ray.data.bad_images import without_bad_images
from carft_ray.data.images import FORMATS, decode_image, small_image
from carft_ray.data.listed_sets import open_sets, write_sets
from carft_ray.data.records import records
from carft_ray.errors import DataError
from carft_ray.recipe.loading import load_recipe

PACKAGE = Path(__file__).parents[1] / "carft_ray"
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(stolen) (w) file closefile
showpage
%%EOF
"""


def encoded(kind, size=(8, 6), **options):
    content = io.BytesIO()
    Image.new("RGB", size, (9, 90, 200)).save(content, kind, **options)
    return content.getvalue()


def large_png(width, height, depth=1):
    """A grey PNG of zeros, some kilobytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    deflate = zlib.compressobj(1)
    row = bytes(1 + (width * depth + 7) // 8)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program of this name that notes that it was called; Pillow must look for it again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "called"


def set_with(root, content, **values):
    for name in ("cat", "dog"):
        for number in range(2):
            path = root / "images" / name / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded("JPEG"))
    path.write_bytes(content)
    return open_set(source="folder", path=str(root / "images"), **values)


def test_a_file_that_would_start_a_program_is_refused_by_its_first_bytes_and_can_be_skipped(tmp_path, ghostscript):
    with pytest.raises(Exception, match="gs"), Image.open(io.BytesIO(EPS)) as file:  # what Pillow alone does
        file.load()
    assert ghostscript.exists()
    ghostscript.unlink()
    source = set_with(tmp_path, EPS)
    with pytest.raises(DataError) as caught:
        source.pixels(3)
    assert "dog/1.jpg: must be a readable image, but got a file that begins with b'%!PS" in str(caught.value)
    assert f"Save it as one of {', '.join(FORMATS)}, or take it out of the set." in str(caught.value)
    assert len(records(source, tmp_path / "cache").problems) == 1
    assert len(without_bad_images(source, tmp_path / "cache")) == 3
    assert not ghostscript.exists()


OTHERS = [EPS, b"%PDF-1.7\n", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b""]


@pytest.mark.parametrize("content", [*OTHERS, b"\0\0\0\x1cftypheic\0\0\0\0", encoded("ICO"), encoded("TGA")])
def test_a_file_of_another_format_is_refused_with_its_first_bytes(content):
    for decode in (decode_image, lambda *what: small_image(*what, 4)):
        with pytest.raises(DataError) as caught:
            decode(content, "x")
        rule = "x: must be a readable image, but got a file that begins with"
        assert str(caught.value).startswith(f"{rule} {content[:20]!r}\n")
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format_that_is_named_is_read_whatever_the_ending(kind):
    assert decode_image(encoded(kind), "x.png").shape == (6, 8, 3)


# ---- sizes


def grown(work):
    """Returns by how many MB the memory of this process has ever grown over what it was."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_very_many_pixels_takes_no_memory_and_can_be_skipped(tmp_path):
    content = large_png(13300, 13300)
    assert len(content) < 200_000
    source = set_with(tmp_path, content)

    def refuse():
        with pytest.raises(DataError) as caught:
            source.pixels(3)
        assert "dog/1.jpg: must have at most 64,000,000 pixels (max_pixels), but got 176,890,000" in str(caught.value)
        assert "Save it smaller, take it out, or raise max_pixels of its set." in str(caught.value)
        assert len(without_bad_images(source, tmp_path / "cache")) == 3

    assert grown(refuse) < 100


def test_the_limit_is_that_of_the_set_for_every_kind_of_file():
    contents = {kind: encoded(kind, (300, 200)) for kind in FORMATS}
    contents["progressive"] = encoded("JPEG", (300, 200), progressive=True)
    for kind, content in contents.items():
        for decode in (decode_image, lambda content, place, limit: small_image(content, place, 20, limit)[0]):
            assert decode(content, kind, 60_000).ndim == 3
            with pytest.raises(DataError, match=r"must have at most 59,999 pixels .max_pixels., but got 60,000"):
                decode(content, kind, 59_999)
    for side in (20_000, 10_000):  # Pillow itself refuses the one, and warns of the other, which is an error here
        with pytest.raises(DataError, match=r"must have at most 59,999 pixels"):
            decode_image(large_png(side, 10_000), "x", 59_999)


def tiled_tiff(side, tile):
    """A grey TIFF of one tile of zeros."""
    data = zlib.compress(bytes(tile * tile if tile < 1000 else 1000))
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_small_picture_in_one_large_tile_takes_no_memory():
    assert decode_image(tiled_tiff(64, 64), "x").shape == (64, 64, 3)

    def refuse():
        with pytest.raises(DataError, match=r"must have at most 64,000,000 pixels .*, but got 1,600,000,000"):
            decode_image(tiled_tiff(64, 40_000), "x")

    assert grown(refuse) < 100


def test_the_limit_of_a_recipe_holds_for_listed_sets_and_records_and_another_limit_reads_them_anew(tmp_path):
    for domain in ("photo", "photo_val", "sketch"):
        for label, name in enumerate(short_training.CLASSES):
            short_training.write_image(tmp_path / "images" / domain / name / "0.png", label, 0)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "photo" / "star" / "0.png")
    (tmp_path / "recipe.yaml").write_text(short_training.RECIPE)
    for limit, num_refused in ((1199, 1), (1200, 0)):
        recipe = load_recipe(tmp_path / "recipe.yaml", [f"data.train.max_pixels={limit}", "data.cache_dir=cache"])
        write_sets(recipe, tmp_path / "prepared")
        for source in (open_sets(recipe)["train"], open_sets(recipe, tmp_path / "prepared")["train"]):
            assert len(records(source, tmp_path / "cache").problems) == num_refused
            star = [source.place(index).endswith("star/0.png") for index in range(len(source))].index(True)
            with pytest.raises(DataError, match="max_pixels") if num_refused else contextlib.nullcontext():
                source.pixels(star)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_images_are_decoded_one_at_a_time(kind, monkeypatch):
    large, small = encoded(kind, (200, 100)), encoded(kind, (100, 100))
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

    monkeypatch.setattr(images, "LARGE", 10_000)
    monkeypatch.setattr(images, "_to_rgb", watched(images._to_rgb))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched(simplejpeg.decode_jpeg))
    with ThreadPoolExecutor(8) as pool:
        small_ones = True  # they meet inside of the decoder
        assert [found.shape for found in pool.map(decode_image, [small] * 2, "xy")] == [(100, 100, 3)] * 2
        assert max(most) == 2
        most.clear()
        small_ones = False
        assert {found.shape for found in pool.map(decode_image, [large] * 40, "x" * 40)} == {(100, 200, 3)}
    assert set(most) == {1}


# ---- one gate


# calls that decode an image; of "the gate itself", and of a JPEG that was just written
OPENS = re.compile(r"Image\.open\(|ImageFile\.Parser|read_image\(|(?<![\w.])io\.decode_image\(|simplejpeg\.decode\w*\(")
HIDES = re.compile(r"from (PIL\.Image|PIL\.ImageFile|simplejpeg|torchvision\.io) import|from torchvision import io")


def test_no_image_is_opened_around_the_gate():
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, text in texts.items() if OPENS.search(text)} == {
        "data/images.py",
        "data/synthetic/corruptions.py",
    }
    assert not [name for name, text in texts.items() if HIDES.search(text)]  # so that a call is seen
