"""What is known of the images of a set: found in one reading, kept, and read again only when the set is another one."""

import io
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import open_set, told

from carft_ray.data import records as module
from carft_ray.data.decode_images import decode_image
from carft_ray.data.duplicates.find_duplicates import same_pictures
from carft_ray.data.records import records, thumbnail_of, without_bad_images
from carft_ray.data.source import AHEAD, image_digest, in_order, pixel_digest
from carft_ray.errors import DataError, Problem

NAMES = [f"{name}/{index}.{ending}" for name in ("bird", "cat") for index, ending in enumerate(("jpg", "png") * 6)]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Twenty-four images of two classes, of several sizes and modes; records are kept every 7."""
    monkeypatch.setattr(module, "PART", 7)
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 90 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if number % 3 else "RGB").save(path)
    return tmp_path


def opened(root, read=None, **selection):
    """The set, and the names of its files, as they are read."""
    source, seen = open_set(None, source="folder", path=str(root / "images"), **selection), []
    files, names = source.listing.read, source.listing.names

    def reading(row):
        seen.append(names[row])
        return (read or files)(row)

    object.__setattr__(source.listing, "read", reading)  # which is frozen
    return source, seen


@pytest.mark.slow
def test_one_reading_finds_what_plain_decoding_finds_and_a_second_call_reads_nothing(root):
    (root / "images" / "cat" / "3.png").write_bytes(b"no image")
    source, seen = opened(root)
    for _ in range(2):
        found = records(source, root / "cache")
        for index in range(len(source)):
            content = Path(source.place(index)).read_bytes()
            assert found.digests[index].tobytes() == image_digest(content)
            assert found.num_bytes[index] == len(content)
            if content == b"no image":
                assert str(found.problems[index]).startswith(f"{source.place(index)}: must be a readable image")
                assert not found.thumbnails[index].any()
                assert found.pixels[index].tobytes() == found.digests[index].tobytes()
                continue
            pixels = decode_image(content, "x")
            assert (found.heights[index], found.widths[index]) == pixels.shape[:2]
            assert found.modes[index].decode() == Image.open(io.BytesIO(content)).mode
            assert found.pixels[index].tobytes() == pixel_digest(pixels, thumbnail_of(pixels).tobytes())
            assert found.thumbnails[index].tobytes() == thumbnail_of(pixels).tobytes()
    assert len(found.problems) == 1
    assert Counter(seen) == Counter(source.listing.names)
    (kept,) = (root / "cache").glob("records-*.arrow")
    kept.write_bytes(b"damaged")
    assert records(source, root / "cache").digests.tobytes() == found.digests.tobytes()
    assert len(seen) == 2 * len(source)
    assert {path.suffix for path in (root / "cache").iterdir()} == {".arrow", ".lock"}


def test_of_a_test_set_nothing_is_kept_but_hashes_sizes_of_files_and_thumbnails(root):
    for name in ("cat/3.png", "cat/5.png"):
        (root / "images" / name).write_bytes(b"no image")
    source, _ = opened(root)
    found = records(source, root / "cache", is_test=True)
    (kept,) = (root / "cache").glob("records-*.arrow")
    table = module.open_table(kept)
    assert {*table["height"].to_pylist(), *table["width"].to_pylist(), *table["mode"].to_pylist()} == {0, bytes(8)}
    assert table["problem"].null_count == len(source)
    bad = {index for index in range(len(source)) if not found.thumbnails[index].any()}
    assert len(bad) == 2
    pairs, apart = same_pictures(found, found)
    assert bad <= {*pairs[apart == 0, 0].tolist()}
    assert not bad & {*pairs[apart > 0].ravel().tolist()}
    assert records(source, root / "cache").problems.keys() == bad  # in another role it is another set


KILLED = """
import os, sys
from carft_ray.data import records
from sources import open_set
records.PART = 7
source = open_set(None, source="folder", path=sys.argv[1])
records.records(source, records.Path(sys.argv[2]), on_progress=lambda done, total: done > 14 and os._exit(9))
"""


@pytest.mark.slow
def test_a_pass_that_was_killed_goes_on_from_its_last_whole_part(root):
    words = [sys.executable, "-c", KILLED, str(root / "images"), str(root / "cache")]
    assert subprocess.run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 9
    (root / "cache" / ".records-x.7.part.1-host.tmp").write_bytes(b"of another set")
    source, seen = opened(root)
    told = []
    found = records(source, root / "cache", on_progress=lambda *counts: told.append(counts))
    assert {*seen} == {*source.listing.names[14:]}
    assert len(seen) == len(source) - 14
    assert (told[0][0] > 14, told[-1]) == (True, (24, 24))
    assert found.digests.tobytes() == records(source, root / "elsewhere").digests.tobytes()
    assert not list((root / "cache").glob("*.part"))


def test_of_two_that_ask_at_once_one_reads_and_the_other_waits(root):
    source, seen = opened(root)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: records(source, root / "cache").digests.tobytes(), range(3)))
    assert Counter(seen) == Counter(source.listing.names)
    assert len(set(answers)) == 1


def test_a_file_that_cannot_be_read_is_told_and_its_part_is_tried_again(root):
    def broken(row):
        if row == 9:
            raise DataError(Problem("there", "must be readable", "Input/output error"))
        return files(row)

    files = opened(root)[0].listing.read
    found = records(opened(root, broken)[0], root / "cache")
    assert list(found.problems) == [9]
    assert "must be readable, but got Input/output error" in told(found.hashes)
    source, seen = opened(root)
    assert records(source, root / "cache").problems == {}
    assert {*seen} == {*source.listing.names[7:14]}


def test_a_set_without_some_of_its_images_is_known_with_the_others(root):
    (root / "images" / "bird" / "3.png").write_bytes(b"no image")
    source, seen = opened(root, on_bad_image="skip", part=[0, 0.8])
    left = without_bad_images(source, root / "cache")
    assert len(left) == len(source) - 1
    (root / "leave.csv").write_text("sample_id\n" + "".join(f"{sample_id}\n" for sample_id in source.sample_ids[:3]))
    excluding, more = opened(root, part=[0, 0.8], exclude=str(root / "leave.csv"))
    for images in (left, left.without([0, 4]), excluding):
        found = records(images, root / "cache")
        places = list(map(images.place, range(len(images))))
        assert found.hashes() == [image_digest(Path(place).read_bytes()) for place in places]
        bad = [place for place in places if place.endswith("bird/3.png")]
        assert [str(problem.place) for problem in found.problems.values()] == bad
    assert Counter(seen) == Counter(source.listing.names[row] for row in source.rows)
    assert more == []


# ---- values that several threads make ahead of whoever takes them


@pytest.mark.parametrize("num_threads", [1, 4, 70])
def test_values_come_in_order_each_made_once_and_few_ahead(num_threads):
    for number in (0, 1, 7, 500):
        made = []
        values = in_order(lambda index, made=made: made.append(index) or index, range(number), num_threads)
        for taken, value in enumerate(values):
            assert value == taken
            assert max(made) - taken <= AHEAD * num_threads
        assert sorted(made) == list(range(number))


def test_the_first_error_is_raised_behind_all_values_before_it():
    later_failed, taken = threading.Event(), []

    def make(index):
        if index == 9:
            later_failed.set()
            raise DataError("image 9")
        if index == 2:
            later_failed.wait(60)
            raise DataError("image 2")
        return index

    with pytest.raises(DataError, match="image 2"):
        taken.extend(in_order(make, range(20), 4))
    assert taken == [0, 1]


def test_nothing_is_made_any_more_once_it_is_closed():
    made = []
    values = in_order(lambda index: made.append(index), range(10_000), 2)
    next(values)
    values.close()
    assert len(made) < 100
    assert [each.name for each in threading.enumerate() if each.name.startswith("ThreadPool")] == []
