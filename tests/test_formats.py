"""Formats of sets: what tables, shards and data sets of Hugging Face hold, and what each of them refuses."""

import gzip
import json
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
from layouts_tables import (
    CLASSES,
    hf_dataset,
    mixed_modes,
    pictures,
    table_of,
    write_folder,
    write_hub,
    write_shards,
    write_table,
    write_tar,
)
from sources import contents, open_set, shards, table, told

from carft_ray.data.formats.webdataset import find_files
from carft_ray.data.table_rows import ArrowRows, ParquetRows

IMAGES = pictures()


# ---- labels, columns, rows, paths


def test_numbers_are_named_by_a_list_by_a_file_or_by_the_schema_and_texts_take_that_order(base):
    (base / "names.txt").write_text("\ufeffbird\ncat\r\ndog\n\n", encoding="utf-8")
    noted = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}'
    for columns, names, expected in (
        (NUMBERS, ["bird", "cat", "dog"], CLASSES),
        (NUMBERS, "names.txt", CLASSES),
        (NUMBERS.replace_schema_metadata({"huggingface": noted}), None, ("x", "y", "z")),
        (NUMBERS.replace_schema_metadata({"huggingface": noted}), ["z", "b", "a"], ("z", "b", "a")),
        (table_of(IMAGES), ["dog", "bird", "cat"], ("dog", "bird", "cat")),
    ):
        write_table(base / "set.parquet", columns)
        source = table(base, class_names=names)
        assert source.class_names == expected
        labels = [expected.index(image.label) if "dog" in expected else CLASSES.index(image.label) for image in IMAGES]
        assert source.labels.tolist() == labels


def test_columns_are_found_where_only_one_can_be_meant(base):
    columns = table_of(IMAGES, "struct").rename_columns(["picture", "label", "name"])
    for name in ("set.parquet", "set.arrow"):
        write_table(base / name, columns)
        expected = contents(table(base, name))
        assert expected == contents(table(base, name, image="picture", label="label"))
        assert expected == contents(table(base, name, image="picture.bytes"))


def test_where_takes_rows_by_texts_numbers_and_flags(base):
    numbers = range(len(IMAGES))
    kind = pa.array(["ab"[i % 2] for i in numbers]).dictionary_encode()
    columns = {"fold": [i % 4 for i in numbers], "kind": kind, "good": [i % 3 > 0 for i in numbers]}
    write_table(base / "set.parquet", table_of(IMAGES, **columns))
    for where, rows in (
        ({"fold": 1}, [i for i in numbers if i % 4 == 1]),
        ({"fold": [0, "3"]}, [i for i in numbers if i % 4 in (0, 3)]),
        ({"kind": "b", "good": True}, [i for i in numbers if i % 2 == 1 and i % 3 > 0]),
    ):
        source = table(base, where=where, id="name", classes="some", names=CLASSES)
        assert list(source.listing.names) == [IMAGES[row].name for row in rows]
        assert [source.content(index) for index in range(len(rows))] == [IMAGES[row].content for row in rows]


def test_paths_are_taken_inside_the_root_in_one_form(base):
    write_folder(base / "images", IMAGES)
    written = [f"./{IMAGES[0].name}", str(base / "images" / IMAGES[4].name), f"cat/../{IMAGES[8].name}"]
    write_table(base / "set.csv", pa.table({"image": written, "label": ["bird", "cat", "dog"]}))
    (base / "set.csv").write_text("\n" + (base / "set.csv").read_text())  # an empty line is none
    source = table(base, "set.csv", root="images")
    assert list(source.listing.names) == [IMAGES[row].name for row in (0, 4, 8)]
    assert source.place(1) == str(base / "images" / IMAGES[4].name)


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow"])
def test_a_table_of_so_many_rows_that_they_fill_the_memory_is_refused(base, ending, monkeypatch):
    monkeypatch.setattr("carft_ray.data.table_rows.MOST_ROWS", 5)
    write_table(base / f"set.{ending}", pa.table({"image": ["x.png"] * 6, "label": ["a"] * 6}))
    assert "must be a readable table, but got one of 6 rows, which is more than 5" in told(table, base, f"set.{ending}")


def test_a_path_may_be_written_by_a_link_above_the_root(base):
    write_folder(base / "images", IMAGES)
    (base / "home").symlink_to(base)
    write_table(base / "set.csv", pa.table({"image": [f"{base}/home/images/cat/0.png"], "label": ["cat"]}))
    assert list(table(base, "set.csv", root="images").listing.names) == ["cat/0.png"]
    (base / "images" / "cat" / "out.png").symlink_to("/etc/passwd")
    write_table(base / "set.csv", pa.table({"image": ["/etc/passwd"], "label": ["cat"]}))
    assert "must be the path of a file inside" in told(table, base, "set.csv", root="images")


@pytest.mark.parametrize("path", ["../images/cat/0.png", "/etc/x.png", "", ".", "a/../../images/cat/0.png"])
def test_paths_out_of_the_root_are_refused(base, path):
    write_folder(base / "images", IMAGES)
    write_table(base / "set.csv", pa.table({"image": ["cat/0.png", path], "label": ["a", "b"]}))
    text = told(table, base, "set.csv", root="images")
    assert f"train.image: must be the path of a file inside {base / 'images'}" in text
    assert "in set.csv, row 2" in text
    assert "or give the folder that holds all images as root." in text


PATTERNS = [
    ("x-{000..002}.csv", "x-000.csv x-001.csv x-002.csv"),
    ("x-{000,002}.csv", "x-000.csv x-002.csv"),
    ("x-*[12].csv", "x-001.csv x-002.csv"),
    (".", "x-000.csv x-001.csv x-002.csv"),
    ("{x-{0..9}.tsv,*.csv}", "but got no such file"),
    ("x-00{2..1}.csv", "but got none in"),
    ("x-00{2..3}.csv", "but got no such file"),
    ("none*", "but got no such file"),
    ("empty", "but got none in"),
    ("set.txt", "but got set.txt"),
    ("x-{0..999999999}.csv", "a pattern must count at most 100000 files, but got x-"),
]


@pytest.mark.parametrize(("written", "found"), PATTERNS)
def test_patterns_of_files(base, written, found):
    for name in ("x-000.csv", "x-001.csv", "x-002.csv", "set.txt"):
        (base / name).touch()
    (base / "empty").mkdir()
    if "but got" in found:
        assert found in told(find_files, written, (".csv", ".tsv"), "data.train", "")
    else:
        assert [file.name for file in find_files(written, (".csv", ".tsv"), "data.train", "")] == found.split()


def test_rows_are_read_without_the_table_in_memory(base):
    rows = [np.random.default_rng(row).bytes(20_000) for row in range(1500)]
    columns, total = pa.table({"image": pa.array(rows, pa.binary())}), 20_000 * 1500
    for ending, share in (("arrow", 0.01), ("feather", 0.01), ("parquet", 0.4)):
        settings = {"row_group_size": 100} if ending == "parquet" else {}
        path, before = write_table(base / f"set.{ending}", columns, **settings), pa.total_allocated_bytes()
        found = ParquetRows(path, "image") if ending == "parquet" else ArrowRows(path, "image")
        assert [found.value(row) for row in (0, 700, 1499, 3)] == [rows[row] for row in (0, 700, 1499, 3)]
        assert pa.total_allocated_bytes() - before < share * total, path


# ---- samples of shards


def samples(*labels, ending="cls"):
    """Returns the files of a sample per label: ``0.png``, ``0.cls`` ..."""
    files = []
    for number, label in enumerate(labels):
        files += [(f"{number}.png", IMAGES[number].content), (f"{number}.{ending}", label.encode())]
    return files


def test_files_of_one_name_are_a_sample_and_other_files_are_passed_over(base):
    others = ["__meta__/y.png", "a/.hidden", "a/readme", "a.b/x.v2.cls"]
    files = [("./a/x.PNG", PNG), ("./a/x.seg.png", b"mask"), ("./a/x.cls", b"cat\n")]
    files += [*((name, b"of no sample") for name in others), ("a.b/x.png", PNG), ("a.b/x.cls", b"dog")]
    source = shards(base, write_tar(base / "odd.tar", files))
    assert list(source.listing.names) == ["a/x.PNG", "a.b/x.png"]
    assert [source.class_names[label] for label in source.labels] == ["cat", "dog"]


def test_images_and_labels_are_found_by_ending_and_of_json_the_value_alone_is_kept(base):
    files = [("0.jpg", IMAGES[0].content), ("0.png", IMAGES[1].content), ("0.txt", b"cat")]
    path = write_tar(base / "two.tar", files)
    assert shards(base, path, image="png", label="txt").content(0) == IMAGES[1].content
    assert shards(base, path, image="JPG", label="txt").listing.names == ["0.jpg"]
    text = told(shards, base, path)
    assert f"{path}: every sample must have one image and a .cls, but got 0 with .jpg, .png, .txt" in text
    assert "Set image and label to the endings" in text
    large = [json.dumps({"y": name, "caption": "x" * 100_000, "z": 1 - i}) for i, name in enumerate(("cat", "dog"))]
    path = write_tar(base / "large.tar", samples(*large, ending="json"))
    before = {*(base / "cache").rglob("*.arrow")}
    assert shards(base, path, label="json:y").class_names == ("cat", "dog")
    (entry,) = {*(base / "cache").rglob("*.arrow")} - before
    assert entry.stat().st_size < 10_000
    assert shards(base, path, label="json:z", class_names=["a", "b"]).labels.tolist() == [1, 0]  # another index


# ---- sets that are not as they should be


def broken(column, value, row=2, classes=None):
    """Returns the table with another value in one row."""
    columns = table_of(IMAGES, classes=classes)
    values = columns.column(column).to_pylist()
    values[row] = value
    place = columns.column_names.index(column)
    return columns.set_column(place, column, pa.array(values, columns.schema.field(column).type))


def json_samples(text):
    return samples(text, ending="json")


NAMES, JSON, OF_FILES = {"class_names": list(CLASSES)}, {"label": "json:y"}, {"root": "images"}
PLAIN, NUMBERS = table_of(IMAGES), table_of(IMAGES, classes=CLASSES)
HALVES = PLAIN.set_column(1, "label", pa.array([0.5] * len(IMAGES)))
PNG, UNCLEAR = IMAGES[0].content, pa.table({"image": [b"1"], "a": ["1"], "b": ["2"]})
FILES = [(f"{number}.{ending}", content) for number in range(3) for ending, content in (("png", PNG), ("cls", b"0"))]
OBJECT = "x.tar: 0.json: the .json of every sample must be an object with the key y, but got"
# what is wrong; the set: a table, the text of a CSV file, or the files of a shard; its keys; the message
BROKEN = [
    # of tables
    ("missing column", PLAIN, {"label": "lable"}, "label: must be a column of set.parquet, but got 'lable'; did you"),
    ("missing where", PLAIN, {"where": {"nam": "x"}}, "train.where: must be a column of set.parquet, but got 'nam'"),
    ("no such value", PLAIN, {"where": {"label": ["cat", "brd"]}},
     "train.where.label: must be a value of the column label, but got 'brd'; did you mean 'bird'?"),
    ("no column is clear", UNCLEAR, {},
     "train.label: must be given: it is unclear which column of set.parquet has the labels"),
    ("wrong label type", HALVES, {}, "column label: must contain texts or whole numbers, but got double"),
    ("wrong image type", HALVES, {"image": "label"}, "must contain paths, or the bytes of image files, but got double"),
    ("no bytes", broken("image", None), {}, "row 3: every row must contain the bytes of an image, but got none"),
    ("no name", broken("name", None), {"id": "name"}, "id: every image must have a name, but got none in set.parquet"),
    ("no row", PLAIN.slice(0, 0), {}, "train: a table must have a row, but got none"),
    ("twice a column", PLAIN.append_column("name", PLAIN["name"]), {}, "may have the same name, but got 'name'"),
    ("no names file", PLAIN, {"class_names": "none.txt"}, "none.txt: No such file or directory"),
    ("empty CSV", "", OF_FILES, "set.csv: must be a readable table, but got an empty file"),
    ("CSV with a short row", "image,label\ncat/0.png\n", OF_FILES, "must be a readable table, but got CSV parse error"),
    ("CSV of another code", "image,label\n\xff\xfe,cat\n", OF_FILES, "set.csv: must be a readable table, but got "),
    ("no file", "image,label\nbird/0.png,a\nx.png,a\ny.png,b\n", OF_FILES, "'x.png' in set.csv, row 2 and 1 more"),
    # of shards
    ("no label in a sample", FILES[:-1], {}, "must have one image and a .cls, but got 2 with .png\n"),
    ("no image in a sample", FILES[:4] + FILES[5:], {}, "must have one image and a .cls, but got 2 with .cls\n"),
    ("another image", FILES[:4], {"image": "jpg"}, "a .jpg and a .cls, but got 0 with .png, .cls and 1 more\n"),
    ("no key", json_samples('{"yy": 0}'), JSON, f"{OBJECT} KeyError: 'y'"),
    ("damaged JSON", json_samples("{"), JSON, f"{OBJECT} JSONDecodeError: Expecting"),
    ("deep JSON", json_samples("[" * 200_000), JSON, f"{OBJECT} ValueError: nested too deep"),
    ("half of a pair", json_samples('{"y": "\\ud800"}'), JSON, f"{OBJECT} UnicodeEncodeError: 'utf-8' codec can't"),
    ("label list", json_samples('{"y": [1]}'), JSON, "the key y must contain a text or a whole number, but got list"),
    ("label type", json_samples('{"y": 0.5}'), JSON, "or every one a whole number, but got 0.5"),
    ("file twice", [FILES[0], *FILES[:2]], {}, "0.png: must occur once in its sample, but got two"),
    ("no sample", [("readme", b"x")], {}, "a shard must have a sample with an image, but got none"),
    # of both
    ("numbers without names", NUMBERS, {}, "labels that are numbers need the names of the classes, but got 0 in"),
    ("label out of range", broken("label", 3, classes=CLASSES), NAMES, "be from 0 to 2, as there are 3 class names"),
    ("empty label", broken("label", None), {}, "every image must have a label, but got None in set.parquet, row 3"),
    ("unknown label", broken("label", "brd"), NAMES, "class_names, but got 'brd' in set.parquet, row 3; did you"),
    ("missing class", PLAIN.slice(4), {"names": CLASSES}, "every set must have every class, but got none for 'bird'"),
    ("class without images", PLAIN.slice(4), NAMES, "train: every class must have an image, but got none in 'bird'"),
    ("class name twice", FILES, {"class_names": "twice.txt"}, "twice.txt:1 and "),
    ("name twice", broken("name", "bird/0.png"), {"id": "name"}, "in set.parquet, row 1 and set.parquet, row 3"),
    ("name twice", FILES[:4] + FILES[:2], NAMES, "must differ, but got '0.png' in x.tar: 0.png and x.tar: 0.png"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "keys", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_set_gets_one_message(base, content, keys, message):
    (base / "twice.txt").write_text("crane\ncat\ncrane\n")
    if isinstance(content, list):
        write_tar(base / "x.tar", content)
        text = told(shards, base, "x.tar", **keys)
    elif isinstance(content, str):
        write_folder(base / "images", IMAGES)
        (base / "set.csv").write_bytes(content.encode("latin-1"))
        text = told(table, base, "set.csv", **keys)
    else:
        write_table(base / "set.parquet", content)
        text = told(table, base, **keys)
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_arrow_file_is_refused_for_images_only(base, compression):
    path = write_table(base / "set.feather", table_of(IMAGES), compression=compression)
    rule = "a compressed Arrow file, whose images cannot be read one by one: write it without compression"
    assert rule in told(table, base, path)
    write_folder(base / "images", IMAGES)
    write_table(base / "set.feather", table_of(IMAGES, "paths"), compression=compression)
    assert len(table(base, path, root="images")) == len(IMAGES)


def test_files_of_one_set_must_have_equal_columns(base):
    write_table(base / "tables" / "a.parquet", table_of(IMAGES[:5]))
    write_table(base / "tables" / "b.parquet", table_of(IMAGES[5:], classes=CLASSES))
    rule = "b.parquet: all files of a table must have equal columns: label is string in a.parquet, but got int64"
    assert rule in told(table, base, "tables")
    write_table(base / "tables" / "b.parquet", table_of(IMAGES[5:]).drop_columns("label"))
    assert "train.label: must be a column of b.parquet, but got 'label'" in told(table, base, "tables")


def test_numbers_must_mean_the_same_classes_in_all_files_of_a_table(base):
    def noted(*names):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        return {"huggingface": json.dumps({"info": {"features": features}})}

    columns = table_of(IMAGES, classes=CLASSES)
    write_table(base / "tables" / "a.parquet", columns.slice(0, 5).replace_schema_metadata(noted(*CLASSES)))
    write_table(base / "tables" / "b.parquet", columns.slice(5).replace_schema_metadata(noted(*reversed(CLASSES))))
    assert "name the classes of label alike, but b.parquet and a.parquet do not" in told(table, base, "tables")
    assert len(table(base, "tables", class_names=list(CLASSES))) == len(IMAGES)
    write_table(base / "set.parquet", columns.replace_schema_metadata(noted("bird", "cat", "bird")))
    assert "the names of two classes must differ, but got 'bird' in place 0 of label" in told(table, base)


def test_a_shard_that_is_cut_off_or_damaged_anywhere_is_told_and_all_at_once(base):
    write_shards(base / "set" / "shards", IMAGES)
    paths = sorted((base / "set" / "shards").glob("*.tar"))
    with tarfile.open(paths[1]) as archive:
        third, *_, last = archive.getmembers()[2:]
    whole = paths[1].read_bytes()
    damaged_header = whole[: third.offset] + b"\x01" * 512 + whole[third.offset + 512 :]
    # inside an image, between two files, inside a header, without its end
    cut = [whole[:end] for end in (third.offset_data + 10, third.offset, third.offset + 100, last.offset_data + 512)]
    for damaged in (*cut, damaged_header):
        paths[1].write_bytes(damaged)
        rule = "must be a whole tar archive, but got one that is cut off or damaged"
        assert told(shards, base).startswith(f"{paths[1]}: {rule}")
        assert not list((base / "cache").rglob("*.tmp"))
    for path in paths:
        path.write_bytes(b"no archive")
    assert told(shards, base).count("must be a whole tar archive") == 3


def test_compressed_and_missing_shards_are_told_with_the_reason(base):
    write_shards(base / "set" / "shards", IMAGES)
    path = base / "set" / "shards" / "000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    text = told(shards, base)
    assert f"{path}: a shard must not be compressed: its images could not be read one by one" in text
    assert "gunzip" in text
    path.rename(path.with_name("000.tar.gz"))
    for place in ("set/shards", "set/shards/000.tar.gz"):
        assert "a shard must not be compressed" in told(shards, base, place)
    path.with_name("000.tar.gz").unlink()
    assert "must contain the 3 shards that its nshards.txt states, but got 2" in told(shards, base)


# ---- data sets of Hugging Face, with the library ``datasets`` as the oracle


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A data set with two splits, one without, and the hub's layout of the first."""
    folder = tmp_path_factory.mktemp("hf")
    datasets.disable_progress_bars()
    splits = {"train": hf_dataset(IMAGES), "validation": hf_dataset(pictures(2, seed=1))}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved", num_shards={"train": 3, "validation": 1})
    hf_dataset(mixed_modes()).save_to_disk(folder / "modes")
    write_hub(folder / "hub", splits)
    return folder


@pytest.fixture
def hf(written, base):
    return shutil.copytree(written, base / "hf")


def library(hf, path, **keys):
    return open_set(base_dir=hf, source="huggingface", path=path, **keys)


@pytest.mark.parametrize("path", ["saved", "saved/train", "hub", "hub/data", "modes"])
def test_the_rows_are_those_of_the_library(hf, path):
    split = {"saved": "train", "hub": "train", "hub/data": "train"}.get(path)
    source = library(hf, path, split=split)
    if path.startswith("hub"):
        files = sorted(map(str, (hf / "hub" / "data").glob("train-*.parquet")))
        oracle = datasets.Dataset.from_parquet(files, cache_dir=str(hf / "cache"))
    else:
        oracle = datasets.load_from_disk(hf / path)
        oracle = oracle if split is None else oracle[split]
    assert source.class_names == tuple(oracle.features["label"].names) == CLASSES
    assert source.labels.tolist() == oracle["label"][:]
    for index, row in enumerate(oracle.cast_column("image", datasets.Image(decode=False))):
        assert source.content(index) == row["image"]["bytes"]
    if path != "modes":  # those of the library are not yet RGB
        for index, row in enumerate(oracle):
            np.testing.assert_array_equal(source.pixels(index), np.asarray(row["image"]))


def test_the_only_split_need_not_be_named(hf):
    shutil.rmtree(hf / "saved" / "validation")
    (hf / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for path in (hf / "hub" / "data").glob("validation-*"):
        path.unlink()
    assert len(library(hf, "saved")) == len(library(hf, "hub")) == len(IMAGES)


def spoilt(name, content=None):
    """Overwrites a file of the sets, or removes it."""
    return lambda hf: (hf / name).unlink() if content is None else (hf / name).write_text(content)


STATE, SPLITS, HUB_FILE = "saved/train/state.json", "saved/dataset_dict.json", "train-00001-of-00002.parquet"
NO_FILES = "must contain the files that its state.json names, at least one, but got no"
TRAIN = {"split": "train"}
# what makes a set wrong, with which path and keys it is asked for, and the message
BROKEN_HF = [
    (spoilt(f"hub/data/{HUB_FILE}"), "hub", TRAIN, f"the split train must have 2 files, but got 1, without {HUB_FILE}"),
    (
        spoilt("hub/data/train-00000-of-00001.parquet", "?"),
        "hub",
        TRAIN,
        "the split train must have 2 files, but got 3: ",
    ),
    (spoilt("saved/train/data-00002-of-00003.arrow"), "saved", TRAIN, f"{NO_FILES} "),
    (spoilt(STATE), "saved", TRAIN, "must be a readable JSON file, but got No such"),
    (spoilt(STATE, "{"), "saved", TRAIN, "state.json: must be a readable JSON file, but got Expecting"),
    (spoilt(STATE, '{"_data_files": []}'), "saved", TRAIN, f"{NO_FILES}ne"),
    (spoilt(STATE, '{"_data_files": [["a.arrow"], 1]}'), "saved", TRAIN, f"{NO_FILES} "),
    (spoilt(STATE, '{"_indices_data_files": [{"filename": "a"}]}'), "saved", TRAIN, "without a file of indices"),
    (spoilt(SPLITS, '{"splits": [1, ["train"]]}'), "saved", TRAIN, "must be a split of the data set, but got 'train'"),
    (spoilt(SPLITS, '{"splits": [".."]}'), "saved", {}, "must be a split of the data set, but got none"),
    (spoilt("saved/train/data-00001-of-00003.arrow", "?"), "saved", TRAIN, "but got it is cut off, or no Arrow file"),
    (None, "none", {}, "train: must be the folder of a data set, but got no such folder"),
    (None, ".", {}, "which is none (allowed: "),
    (None, "saved", {}, "of the data set, but got none (allowed: train, validation)"),
    (None, "hub", {"split": "validatoin"}, "did you mean 'validation'?"),
    (None, "saved/train", {"split": "test"}, "split: must be left out: the folder holds one data set"),
]


@pytest.mark.parametrize(("spoil", "path", "keys", "message"), BROKEN_HF)
def test_a_broken_set_of_hugging_face_gets_one_message(hf, spoil, path, keys, message):
    if spoil is not None:
        spoil(hf)
    text = told(library, hf, path, **keys)
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"
