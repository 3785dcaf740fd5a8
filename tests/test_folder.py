"""Trees of images: order, ids, files that cannot be read, and what is said about trees that are not in order."""

import hashlib
import itertools
import os
import socket
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image
from sources import folder_source

from carft_ray import files
from carft_ray.data import sets
from carft_ray.data.draft import survey
from carft_ray.data.formats.folder import folder_set_problems
from carft_ray.data.listing import sample_id
from carft_ray.errors import DataError
from carft_ray.recipe.schema.data import FolderSet


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two domains, two classes, two images each."""
    root = tmp_path / "tree"
    for seed, pieces in enumerate(itertools.product(("photo", "art"), ("fish", "bird"), ("2.png", "10.png"))):
        save(root.joinpath(*pieces), seed)
    return root


def problems_of(root, domains, classes=None):
    with pytest.raises(DataError) as caught:
        folder_source(root, domains, classes, "data.id_val")
    return str(caught.value)


# the set


def test_images_are_ordered_by_relative_name_and_labels_by_sorted_folder_or_class_list(tree):
    source = folder_source(tree, ["photo", "art"], None, "train")
    names = [f"{name}/{file}" for name in ("bird", "fish") for file in ("10.png", "2.png")]
    assert list(source.listing.names) == [f"{domain}/{name}" for domain in ("art", "photo") for name in names]
    assert source.class_names == ("bird", "fish")
    assert (source.labels.tolist(), source.labels.dtype) == ([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    np.testing.assert_array_equal(source.pixels(7), picture())
    other = folder_source(tree, ["art", "photo"], None, "train")  # the order of domains does not matter
    assert (other.listing.names, other.identity) == (source.listing.names, source.identity)
    np.testing.assert_array_equal(other.sample_ids, source.sample_ids)
    listed = folder_source(tree, ["photo"], ["fish", "bird"], "id_val")
    assert (listed.class_names, listed.labels.tolist()) == (("fish", "bird"), [1, 1, 0, 0])


def test_sample_ids_are_pinned_and_depend_on_the_relative_name_alone(tree, tmp_path):
    digest = hashlib.blake2b(b"photo/fish/2.png").digest()
    assert sample_id("photo/fish/2.png") == struct.unpack("<Q", digest[:8])[0] == 12105120025143292257
    before = folder_source(tree, ["photo"], None, "train")
    assert before.sample_ids.dtype == np.uint64
    assert before.sample_ids.tolist() == [sample_id(file) for file in before.listing.names]
    assert folder_source(tree, ["photo"], ["fish", "bird"], "train").identity != before.identity
    moved = tmp_path / "elsewhere"
    os.rename(tree, moved)
    after = folder_source(moved, ["photo"], None, "id_val")
    assert after.sample_ids.tolist() == before.sample_ids.tolist()
    before = after.identity
    assert folder_source(moved, ["photo"], None, "train").identity == before
    os.utime(moved / "photo" / "fish" / "2.png", ns=(1, 1))
    assert folder_source(moved, ["photo"], None, "train").identity != before


def test_names_with_accents_mean_the_same_however_they_are_spelled(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert sample_id(f"photo/{composed}/1.png") == sample_id(f"photo/{decomposed}/1.png")
    save(tmp_path / "photo" / decomposed / "1.png")
    save(tmp_path / "photo" / "птица" / "鳥 🐦.png")
    source = folder_source(tmp_path, ["photo"], ["птица", composed], "train")
    assert sorted(source.labels.tolist()) == [0, 1]


def test_every_ending_is_taken_in_any_case(tmp_path):
    for number, ending in enumerate(("png", "PNG", "jpg", "JPEG", "Jpeg", "bmp", "webp")):
        save(tmp_path / "photo" / "fish" / f"{number}.{ending}")
    source = folder_source(tmp_path, ["photo"], None, "train")
    assert {source.pixels(number).shape for number in range(7)} == {(6, 8, 3)}


# files that cannot be read


def test_a_file_that_is_no_image_or_gone_is_named(tmp_path):
    path = tmp_path / "photo" / "fish" / "1.png"
    files.write_bytes(path, b"\x89PNG\r\n\x1a\n")
    source = folder_source(tmp_path, ["photo"], None, "train")
    with pytest.raises(DataError, match=rf"{path}: must be a readable image"):
        source.pixels(0)
    path.unlink()
    for use in (lambda: source.pixels(0), lambda: source.identity):
        with pytest.raises(DataError, match=r"photo/fish/1\.png"):
            use()


# trees that are not as they should be


def test_a_missing_root_wrong_domains_and_a_tree_without_classes_are_told(tree, tmp_path):
    text = problems_of(tmp_path / "none", ["photo"])
    assert f"data.id_val: the root of the image tree must be a folder, but got {tmp_path / 'none'}" in text
    assert "PATH/domain/class" in text
    spec = FolderSet(source="folder", path=str(tree), domains=("photos", "arts"))
    text = "\n".join(str(problem) for problem in folder_set_problems(spec, "data.id_val"))
    assert "'photos'; did you mean 'photo'? (allowed: art, photo)" in text
    assert "'arts'; did you mean 'art'?" in text
    save(tree / "flat" / "1.png")
    assert "there must be at least one image" in problems_of(tree, ["flat"])


def test_unknown_missing_and_empty_class_folders_are_told_at_once(tree):
    save(tree / "photo" / "brid" / "1.png")
    (tree / "photo" / "tree").mkdir()
    text = problems_of(tree, ["photo"], ["fish", "birds", "tree"])
    assert "every class of a set must be in the class list, but got 'bird', 'brid'; did you mean 'birds'?" in text
    assert "every set must have every class, but got none for 'birds'; did you mean 'bird'?" in text
    assert "every class must have an image" in text
    assert "none in 'tree'" in text
    assert "and 995 more" in problems_of(tree, ["photo"], ["bird", "fish", *(f"class{i}" for i in range(1000))])
    save(tree / "sketch" / "fish" / "1.png")  # a class may be missing in one domain of a set
    assert len(folder_source(tree, ["art", "sketch"], ["bird", "fish"], "train")) == 5


# what is no image, and names that are no text


@pytest.fixture
def told(monkeypatch, caplog):
    """What one listing of a set writes to the log."""
    monkeypatch.setattr(sets, "_warned", set())
    return caplog


def test_what_is_passed_over_is_counted_by_ending_and_told_in_one_line_once(tree, told, monkeypatch):
    folder = tree / "photo" / "bird"
    save(folder / ".3.png")
    save(tree / "photo" / ".hidden" / "1.png")
    (tree / "photo" / "readme.md").write_text("no class")
    os.symlink(tree / "photo", tree / "link")  # which is followed
    assert len(folder_source(tree, ["link"], None, "data.train")) == 4
    assert told.messages == []
    for name in ("a.gif", "b.GIF", "c.heic", "d.jfif", "README"):
        (folder / name).write_bytes(b"")
    save(folder / "folder.png" / "1.png")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.png")
    for _ in range(2):
        assert len(folder_source(tree, ["photo"], None, "data.train")) == 4
    (tree / "art" / "fish" / "a.gif").write_bytes(b"")
    for _ in range(2):
        folder_source(tree, ["art"], None, "data.ood_val.art")
    line, other = told.messages
    assert other.startswith(f"data.ood_val.art: ignored in {tree}: 1 .gif")
    assert line.startswith(
        f"data.train: ignored in {tree}: 2 .gif, 2 pipe, socket or device, 1 .heic, 1 .jfif, 1 folder, "
        "1 without ending. Images are the files that end in .png, .jpg,"
    )


def test_a_link_to_nowhere_is_an_error_unless_bad_images_are_skipped(tree, told):
    link = tree / "photo" / "bird" / "0.png"
    link.symlink_to(tree / "gone.png")
    (tree / "photo" / "fish" / "no image").symlink_to(tree / "gone")
    assert problems_of(tree, ["photo"]) == (
        f"data.id_val: every link must lead to an image, but got none behind 1, such as {link}\n"
        "    Restore the files, remove the links, or write data.id_val.on_bad_image: skip."
    )
    assert len(folder_source(tree, ["photo"], None, "data.train", on_bad_image="skip")) == 4
    assert "2 link to nowhere" in told.messages[-1]


@pytest.mark.parametrize("where", ["file", "class", "empty class"])
def test_names_that_are_not_utf_8_are_refused_when_the_set_is_listed(tree, where):
    name = os.fsdecode(b"caf\xe9")
    if where == "file":
        os.rename(tree / "photo" / "bird" / "2.png", tree / "photo" / "bird" / f"{name}.png")
    elif where == "class":
        os.rename(tree / "photo" / "bird", tree / "photo" / name)
    else:
        (tree / "photo" / name).mkdir()
    text = problems_of(tree, ["photo"])
    for words in (": names of files and folders must be UTF-8, but got b'", r"caf\xe9", "convmv -f latin1 -t utf8"):
        assert words in text
    text.encode()  # it can be shown and written
    if where == "class":
        with pytest.raises(DataError, match="names of files and folders must be UTF-8"):
            survey(tree)


def test_a_class_that_is_spelled_in_two_ways_in_two_domains_is_told(tree):
    os.rename(tree / "art" / "bird", tree / "art" / "Bird")
    text = problems_of(tree, ["photo", "art"])
    assert text.startswith(f"data.id_val: {tree}: a class must be spelled the same way in all domains")
    assert "but got art/Bird and photo/bird" in text
    save(tree / "photo" / "Bird" / "0.png")  # both in one folder: letters, say
    save(tree / "art" / "bird" / "0.png")
    assert folder_source(tree, ["photo", "art"], None, "data.train").class_names == ("Bird", "bird", "fish")
