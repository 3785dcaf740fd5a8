"""Tar shards of samples: against the webdataset package, names that stay, and what is said of broken shards."""

import gzip
import io
import json
import shutil
import tarfile

import crash_host
import numpy as np
import pytest
from layouts_tables import CLASSES, mixed_modes, pictures, write_folder, write_shards
from sources import open_set
from webdataset.tariterators import group_by_keys, tar_file_iterator

from carft_ray.data.content import image_digests, set_digest
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.errors import DataError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe

IMAGES = pictures()
TRAIN = "set/train"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A folder with shards as clip_benchmark writes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path / TRAIN, IMAGES)
    return tmp_path


def opened(base, path=TRAIN, names=None, **keys):
    return open_set(names, base_dir=base, source="webdataset", path=str(path), **keys)


def told(base, *args, **keys):
    """Returns the message for a set that cannot be opened."""
    with pytest.raises(DataError) as caught:
        opened(base, *args, **keys)
    assert caught.value.exit_code == 4
    return str(caught.value)


def write_tar(path, files):
    """Writes an archive of (name, bytes) and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def package_samples(path):
    """Returns the samples of a shard as the webdataset package reads them, without its loader, which leaves it open."""
    with open(path, "rb") as file:
        return list(group_by_keys({**each, "__url__": ""} for each in tar_file_iterator(file)))


def samples(*labels, ending="cls"):
    """Returns a sample per label: ``0.png``, ``0.cls`` ..."""
    return [
        file
        for number, label in enumerate(labels)
        for file in ((f"{number}.png", IMAGES[number].content), (f"{number}.{ending}", label.encode()))
    ]


# what is read


def test_shards_are_the_folder_set_of_the_same_images(base):
    write_folder(base / "images", IMAGES)
    shards, folder = opened(base), open_set(base_dir=base, source="folder", path="images")
    assert shards.class_names == folder.class_names == CLASSES
    assert list(shards.listing.names) == list(folder.listing.names)
    np.testing.assert_array_equal(shards.labels, folder.labels)
    assert image_digests(shards) == image_digests(folder)
    assert set_digest(shards) == set_digest(folder)


def test_the_samples_are_those_of_the_webdataset_package(base):
    images = mixed_modes()
    write_shards(base / "modes" / "test", images)
    source = opened(base, "modes/test/{000..004}.tar")
    found = [sample for number in range(5) for sample in package_samples(base / "modes" / "test" / f"{number:03d}.tar")]
    assert len(source) == len(found) == len(images)
    for index, sample in enumerate(found):
        (ending,) = sample.keys() & {"png", "jpg", "webp"}
        assert source.content(index) == sample[ending]
        assert source.labels[index] == int(sample["cls"])
        assert source.listing.names[index] == f"{sample['__key__']}.{ending}"


def test_files_of_one_name_are_a_sample_and_other_files_are_passed_over(base):
    content = IMAGES[0].content
    files = [
        ("./a/x.PNG", content),
        ("./a/x.seg.png", b"mask"),
        ("./a/x.cls", b"cat\n"),
        ("__meta__/y.png", b"no sample"),
        ("a/.hidden", b"no sample"),
        ("a/readme", b"no sample"),
        ("a.b/x.v2.cls", b"no label"),
        ("a.b/x.png", content),
        ("a.b/x.cls", b"dog"),
    ]
    source = opened(base, write_tar(base / "odd.tar", files))
    assert list(source.listing.names) == ["a/x.PNG", "a.b/x.png"]
    assert [source.class_names[label] for label in source.labels] == ["cat", "dog"]


def test_labels_stand_in_another_file_or_in_json(base):
    write_shards(base / "json" / "train", IMAGES, label="json", names=False)
    source = opened(base, "json/train", label="json:name")
    assert [source.class_names[label] for label in source.labels] == [image.label for image in IMAGES]
    source = opened(base, write_tar(base / "b.tar", samples("cat", "dog", ending="txt")), label="txt")
    assert source.class_names == ("cat", "dog")
    path = write_tar(base / "c.tar", samples('{"y": 1}', '{"y": 0}', ending="json"))
    assert opened(base, path, label="json:y", class_names=["x", "z"]).labels.tolist() == [1, 0]


def test_of_a_json_the_value_of_its_key_is_kept_and_no_more(base):
    classes = ("cat", "dog")
    large = [json.dumps({"y": name, "caption": "x" * 100_000, "z": 1 - i}) for i, name in enumerate(classes)]
    path = write_tar(base / "large.tar", samples(*large, ending="json"))
    assert opened(base, path, label="json:y").class_names == ("cat", "dog")
    (entry,) = (base / "cache" / "carft-ray" / "index").rglob("*.arrow")
    assert entry.stat().st_size < 10_000
    assert opened(base, path, label="json:z", class_names=["a", "b"]).labels.tolist() == [1, 0]  # another index


def test_one_of_several_images_is_taken_by_its_ending(base):
    files = [("0.jpg", IMAGES[0].content), ("0.png", IMAGES[1].content), ("0.cls", b"cat")]
    path = write_tar(base / "two.tar", files)
    assert opened(base, path, image="png").content(0) == IMAGES[1].content
    assert opened(base, path, image="JPG").listing.names == ["0.jpg"]
    text = told(base, path)
    assert f"{path}: every sample must have one image and a .cls, but got 0 with .jpg, .png, .cls" in text
    assert "Say with image and label which endings are meant" in text


# names, index, fingerprint


def test_names_depend_on_neither_place_nor_the_cut_into_shards(base):
    write_shards(base / "other" / "train", IMAGES[::-1], per_shard=7)
    one, other = opened(base), opened(base, "other/train")
    assert set_digest(one) == set_digest(other)
    assert set(one.sample_ids.tolist()) == set(other.sample_ids.tolist())


def test_the_index_is_made_once_until_the_shard_changes(base):
    opened(base)
    entries = list((base / "cache" / "carft-ray" / "index").rglob("*.arrow"))
    assert len(entries) == 3
    made = [entry.stat().st_mtime_ns for entry in entries]
    opened(base)
    assert [entry.stat().st_mtime_ns for entry in entries] == made
    files = [("new.png", IMAGES[0].content), ("new.cls", b"0")]
    write_tar(base / TRAIN / "000.tar", files)
    assert opened(base).listing.names[0] == "new.png"


def test_the_fingerprint_changes_with_the_shards_and_not_with_their_place(base):
    source = opened(base)
    before = source.fingerprint
    shutil.copytree(base / "set", base / "moved")
    moved = opened(base, "moved/train")
    assert moved.fingerprint == before
    assert moved.home != source.home
    write_shards(base / TRAIN, IMAGES)  # with other dates
    assert opened(base).fingerprint != before
    (base / "moved" / "train" / "001.tar").unlink()
    with pytest.raises(DataError, match=r"001\.tar: bird/?.*: must be readable|001\.tar: .*must be readable"):
        moved.content(6)


# shards that are not as they should be

JPEG = IMAGES[0].content
FILES = [(f"{number}.{ending}", content) for number in range(3) for ending, content in (("png", JPEG), ("cls", b"0"))]
LABEL = {"label": "json:y"}
OBJECT = "the .json of every sample must be an object with the key y"
# what is wrong -> the files of a shard, the keys of the set, and the message
BROKEN = {
    "no label": (FILES[:-1], {}, "x.tar: every sample must have one image and a .cls, but got 2 with .png\n"),
    "no image": (FILES[:4] + FILES[5:], {}, "must have one image and a .cls, but got 2 with .cls\n"),
    "another image": (FILES[:4], {"image": "jpg"}, "a .jpg and a .cls, but got 0 with .png, .cls and 1 more\n"),
    "label out of range": (
        samples("0", "3", "-1"),
        {},
        "a label must be from 0 to 2, as there are 3 class names, but got 3 in x.tar: 1.png and 1 more",
    ),
    "unknown label": (
        samples("bird", "brid"),
        {},
        "must be one of class_names, but got 'brid' in x.tar: 1.png; did you mean 'bird'?",
    ),
    "empty label": (samples("0", ""), {}, "every image must have a label, but got '' in x.tar: 1.png"),
    "missing class": (samples("0", "1"), {}, "every class must have an image, but got none in 'dog'"),
    **{
        case: (samples(text, ending="json"), LABEL, f"x.tar: 0.json: {OBJECT}, but got {cause}")
        for case, text, cause in (
            ("no key", '{"yy": 0}', "KeyError: 'y'"),
            ("list", "[0]", "TypeError"),
            ("damaged JSON", "{", "JSONDecodeError: Expecting"),
            ("deep JSON", "[" * 200_000, "ValueError: nested too deep"),
            ("half of a pair", '{"y": "\\ud800"}', "UnicodeEncodeError: 'utf-8' codec can't"),
        )
    },
    "label list": (
        samples('{"y": [1]}', ending="json"),
        LABEL,
        "the key y must hold a text or a whole number, but got list",
    ),
    "label type": (samples('{"y": 0.5}', ending="json"), LABEL, "or every one a whole number, but got 0.5"),
    "name twice": (
        FILES[:4] + FILES[:2],
        {},
        "the names of two samples must differ, but got '0.png' in x.tar: 0.png and x.tar: 0.png",
    ),
    "file twice": ([FILES[0], *FILES[:2]], {}, "0.png: must stand in its sample once, but got two"),
    "no sample": ([("readme", b"x")], {}, "a shard must have a sample with an image, but got none"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_shard_gets_one_message(base, case):
    files, keys, message = BROKEN[case]
    write_tar(base / "set" / "other" / "x.tar", files)
    text = told(base, "set/other", **keys)
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"


def test_numbers_without_class_names_are_told(base):
    (base / "set" / "classnames.txt").unlink()
    assert "labels that are numbers need the names of the classes, but got 0 in 000.tar: bird/0.png" in told(base)


@pytest.mark.parametrize(
    "what", ["inside an image", "between two files", "inside a header", "without its end", "empty", "damaged header"]
)
def test_a_shard_that_is_cut_off_or_damaged_is_told(base, what):
    path = base / TRAIN / "001.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    whole = path.read_bytes()
    third, last = members[2], members[-1]
    end = last.offset_data + 512
    cut = {
        "inside an image": whole[: third.offset_data + 10],
        "between two files": whole[: third.offset],
        "inside a header": whole[: third.offset + 100],
        "without its end": whole[:end],
        "empty": b"",
        "damaged header": whole[: third.offset] + b"\x01" * 512 + whole[third.offset + 512 :],
    }
    path.write_bytes(cut[what])
    text = told(base)
    assert text.startswith(f"{path}: must be a whole tar archive, but got one that is cut off or damaged")
    assert not list((base / "cache" / "carft-ray" / "index").rglob("*.tmp"))


def test_all_broken_shards_are_told_at_once(base):
    for number in range(3):
        (base / TRAIN / f"{number:03d}.tar").write_bytes(b"no archive")
    assert told(base).count("must be a whole tar archive") == 3


def test_compressed_shards_are_refused_with_the_reason(base):
    path = base / TRAIN / "000.tar"
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed)
    text = told(base)
    assert f"{path}: a shard must not be compressed: of a compressed one no image can be read alone" in text
    assert "gunzip" in text
    path.rename(path.with_name("000.tar.gz"))
    assert "a shard must not be compressed" in told(base)
    assert "a shard must not be compressed" in told(base, f"{TRAIN}/000.tar.gz")


def test_missing_shards_are_told(base):
    (base / TRAIN / "001.tar").unlink()
    assert "must hold the 3 shards that its nshards.txt states, but got 2" in told(base)
    text = told(base, TRAIN + "/{000..002}.tar")
    assert f"no such file: {base / TRAIN / '001.tar'}" in text
    assert "must be a file, a folder, or a pattern of files" in told(base, "none")


def test_an_image_that_is_cut_off_is_told_with_its_name(base):
    path = write_tar(base / "x.tar", [("a.png", JPEG[:60]), ("a.cls", b"cat")])
    with pytest.raises(DataError, match=r"x\.tar: a\.png: must be a readable image"):
        opened(base, path).pixels(0)


def test_class_names_must_differ(base):
    (base / "set" / "classnames.txt").write_text("crane\ncat\ncrane\n")
    text = told(base)
    assert f"{base / 'set' / 'classnames.txt'}:3" in text
    assert "prompts.class_names" in text


# roles and the command line


def test_shards_may_be_cut_into_roles_by_parts_or_by_shards(base):
    spec = {"source": "webdataset", "path": TRAIN}

    def found(**id_val):
        sets = {"train": {**spec, "path": f"{TRAIN}/{{000..001}}.tar", "part": [0.5, 1]}, "id_val": {**spec, **id_val}}
        recipe = Recipe.model_validate({"data": sets, "train": {"batch_size": 2}})
        return check_roles(absolute_paths(recipe, base))

    assert found(path=f"{TRAIN}/002.tar") == found(path=f"{TRAIN}/{{000..001}}.tar", part=[0, 0.5]) == []
    for shared in ({}, {"path": f"{TRAIN}/{{001..002}}.tar"}, {"path": f"{TRAIN}/*1.tar"}):
        assert "must not share images with data.train" in str(found(**shared)[0])


def test_of_a_test_set_no_shard_is_opened(base):
    (base / "bad.tar").write_bytes(b"no archive")
    sets = {role: {"source": "webdataset", "path": TRAIN} for role in ("train", "id_val")}
    recipe = Recipe.model_validate(
        {"data": {**sets, "id_test": {"source": "webdataset", "path": "bad.tar"}}, "train": {"batch_size": 2}}
    )
    assert check_sets(recipe) == []


@pytest.mark.slow
def test_validate_ends_with_code_4_for_shards_and_3_for_the_recipe(base, capsys, monkeypatch):
    monkeypatch.chdir(base)
    write_shards(base / "set" / "test", pictures(seed=1))
    sets = {role: {"source": "webdataset", "path": f"set/{role}"} for role in ("train", "test")}
    (base / "r.yaml").write_text(
        json.dumps({"data": {"train": sets["train"], "id_val": sets["test"]}, "train": {"batch_size": 4}})
    )
    assert crash_host.call(["validate", "r.yaml", "--deep"]) == 0
    capsys.readouterr()
    assert crash_host.call(["validate", "r.yaml", "--set", "data.train.label='json:'"]) == 3
    assert "must be the ending of a file such as cls, or json:KEY, but got" in capsys.readouterr().err
    assert crash_host.call(["validate", "r.yaml", "--set", "data.train.label=txt"]) == 4
    assert "every sample must have one image and a .txt" in capsys.readouterr().err
