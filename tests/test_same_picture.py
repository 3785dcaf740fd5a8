"""Pairs of images: copies are found, drawings that are alike are told apart, and pairs are written to read."""

import itertools
import re

import numpy as np
import pytest
from conftest import ArraySource
from picture_copies import COPIES, signed
from PIL import Image, ImageDraw

from benchmarks.photos import photo
from carft_ray.data.copies.find import (
    NEAREST,
    TOLERANCE,
    SharedImage,
    SharedPair,
    candidates,
    distances,
    same_bytes,
)
from carft_ray.data.copies.pairs_file import check_pairs_path, write_pairs
from carft_ray.data.records import Records, thumbnails_of
from carft_ray.data.same_picture import LIMIT, WHOLE, grey_picture, inside_border, picture_distance
from carft_ray.errors import UsageError


def drawing(code, side=224):
    """Diagonal strokes on white, one in each of ten squares, rising or falling as the bits of the code have it."""
    image = Image.new("RGB", (side, side), "white")
    draw, step = ImageDraw.Draw(image), side // 8
    for bit, (x, y) in enumerate(((2, 1), (3, 1), (4, 1), (2, 2), (4, 3), (3, 4), (2, 5), (4, 5), (5, 5), (3, 6))):
        left, right = step * x + 4, step * (x + 1) - 5
        top, bottom = (step * y + 4, step * (y + 1) - 5)[:: 1 if code >> bit & 1 else -1]
        draw.line((left, top, right, bottom), "black", 2)
    return np.asarray(image)


PICTURES = {"photo": photo(3, 200, 160), "small photo": photo(4, 48, 64), "drawing": drawing(0)}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("name", PICTURES)
def test_a_copy_is_a_candidate_and_then_the_same_picture(name, kind):
    original = PICTURES[name]
    copy = np.asarray(COPIES[kind](Image.fromarray(original)))
    assert candidates(signed([original], 1), signed([copy], 2)).tolist() == [[0, 0]]
    assert picture_distance(grey_picture(original), grey_picture(copy)) <= LIMIT


def test_drawings_whose_thumbnails_agree_are_not_one_picture():
    drawings = [drawing(code) for code in (0, 0b0000011111, 0b1111100000, 0b1111111111)]  # half differ, or all
    for one, other in itertools.combinations(drawings, 2):
        assert distances(thumbnails_of(one)[None, 0], thumbnails_of(other)[None, 0])[0] <= TOLERANCE
        assert picture_distance(grey_picture(one), grey_picture(other)) > LIMIT


def test_other_pictures_are_far_apart_and_the_order_makes_no_difference():
    blank = np.full((40, 40, 3), 90, np.uint8)
    shapes = []
    for box in ((10, 10, 60, 60), (30, 40, 90, 100)):  # the same shape elsewhere on a plain ground
        image = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(image).ellipse(box, fill="black")
        shapes.append(np.asarray(image))
    looks = list(map(grey_picture, (*PICTURES.values(), photo(5, 200, 160), *shapes)))
    assert [picture_distance(look, look) for look in looks] == [0] * len(looks)
    for one, other in itertools.combinations(looks, 2):
        assert LIMIT < picture_distance(one, other) == picture_distance(other, one)
    assert 0 <= picture_distance(grey_picture(blank), looks[0]) <= 1


def test_what_lies_inside_a_border_is_found():
    grey = np.asarray(Image.fromarray(PICTURES["photo"]).convert("L"))
    assert inside_border(grey) == WHOLE
    framed = np.pad(grey, ((16, 16), (20, 20)), constant_values=255)
    assert inside_border(framed) == pytest.approx((20 / 240, 220 / 240, 16 / 192, 176 / 192))
    assert inside_border(np.pad(grey, 200)) == WHOLE  # more border than picture


def test_of_many_files_with_the_same_bytes_each_stands_in_a_pair():
    digests = [np.repeat(np.array(rows, np.uint8)[:, None], 16, axis=1) for rows in ((7, 1, 7, 7), (2, 7, 7))]
    mine, theirs = (Records(each, np.zeros((len(each), 4, 8, 8, 3), np.uint8)) for each in digests)
    pairs = same_bytes(mine, theirs)
    assert {*pairs[:, 0].tolist()} == {0, 2, 3}
    assert {*pairs[:, 1].tolist()} == {1, 2}
    assert len(pairs) == 4


def test_candidates_are_those_of_the_views_and_few_for_an_image_of_which_there_are_many():
    rng = np.random.default_rng(0)
    frames = [np.clip(PICTURES["photo"] + rng.integers(-3, 4, PICTURES["photo"].shape), 0, 255) for _ in range(30)]
    frames = [frame.astype(np.uint8) for frame in frames]
    found = candidates(signed(frames, 1), signed(frames[:2], 2))
    assert np.bincount(found[:, 1]).tolist() == [NEAREST, NEAREST]
    assert all([index, index] in found.tolist() for index in range(2))  # the nearest is the same


def shared():
    sources = [ArraySource(num_images=3, seed=seed, name=f"set {seed}") for seed in range(2)]
    for source in sources:
        source.place = f"{source.name}/<b>, {{}}.png".format
        source.pixels = source.images.__getitem__
    rows = [(1, 2, "same picture", 0.1234), (0, 0, "same bytes", 0.0), (2, 0, "same picture", 0.05)]
    first, second = (
        [SharedImage(place, source, index) for index in range(3)]
        for place, source in zip(("data.train", "data.id_test"), sources, strict=True)
    )
    return [SharedPair(first[i], second[j], how, distance) for i, j, how, distance in rows]


def test_pairs_are_written_as_a_table(tmp_path):
    pairs = shared()
    write_pairs(tmp_path / "pairs.csv", pairs)
    ids = [str(image.source.sample_ids[image.index]) for image in (pairs[0].first, pairs[0].second)]
    lines = (tmp_path / "pairs.csv").read_text().splitlines()
    assert lines[0] == "set,image,sample_id,other_set,other_image,other_sample_id,found_by,distance"
    assert lines[3] == (
        f'data.train,"set 0/<b>, 1.png",{ids[0]},data.id_test,"set 1/<b>, 2.png",{ids[1]},same picture,0.1234'
    )
    assert [line.rsplit(",", 2)[1:] for line in lines[1:3]] == [["same bytes", "0.0"], ["same picture", "0.05"]]
    write_pairs(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text() == f"{lines[0]}\n"
    with pytest.raises(UsageError, match=r"--pairs: the name must end in \.csv or \.html, but got "):
        check_pairs_path(tmp_path / "pairs.txt")


def test_pairs_are_written_as_a_page_of_its_own(tmp_path):
    pairs = shared()
    write_pairs(tmp_path / "pairs.html", pairs)
    page = (tmp_path / "pairs.html").read_text()
    assert page.count("<article>") == 3
    assert page.count('src="data:image/jpeg;base64,') == 6
    assert "<b>, 1" not in page
    assert "&lt;b&gt;, 1.png" in page
    assert not re.search(r"https?://", page)
