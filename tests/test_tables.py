"""Tables of images: every format and form against other readers, names that stay, and what is said of broken ones."""

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_host
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from layouts_tables import CLASSES, mixed_modes, pictures, table_of, write_folder, write_table
from sources import open_set

from carft_ray.data.bad_images import without_bad_images
from carft_ray.data.content import image_digests, set_digest
from carft_ray.data.formats.shards import find_files
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.table_rows import ArrowRows, ParquetRows
from carft_ray.errors import DataError
from carft_ray.recipe.loading import absolute_paths
from carft_ray.recipe.schema.recipe import Recipe

IMAGES = pictures()
BINARY = ("parquet", "arrow", "feather")


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A folder with the images as files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(tmp_path / "images", IMAGES)
    return tmp_path


def opened(base, path="set.parquet", names=None, **keys):
    return open_set(names, base_dir=base, source="table", path=str(path), **keys)


def told(base, *args, **keys):
    """Returns the message for a set that cannot be opened."""
    with pytest.raises(DataError) as caught:
        opened(base, *args, **keys)
    assert caught.value.exit_code == 4
    return str(caught.value)


def contents(source):
    """Returns what is known of every image by its id."""
    ids = source.sample_ids.tolist()
    return {ids[i]: (source.class_names[source.labels[i]], source.content(i)) for i in range(len(source))}


# what is read


@pytest.mark.parametrize(
    ("ending", "form"),
    [(ending, form) for ending in BINARY for form in ("paths", "bytes", "struct")]
    + [("csv", "paths"), ("tsv", "paths")],
)
def test_a_table_is_the_folder_set_of_the_same_images(base, ending, form):
    write_table(base / f"set.{ending}", table_of(IMAGES, form))
    keys = {"root": "images"} if form == "paths" else {"id": "name"}
    table, folder = opened(base, f"set.{ending}", **keys), open_set(base_dir=base, source="folder", path="images")
    assert table.class_names == folder.class_names == CLASSES
    np.testing.assert_array_equal(table.labels, folder.labels)
    np.testing.assert_array_equal(table.sample_ids, folder.sample_ids)
    assert image_digests(table) == image_digests(folder)
    assert set_digest(table) == set_digest(folder)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_the_rows_are_those_of_pandas(base, ending):
    table = table_of(IMAGES, "paths" if ending == "csv" else "bytes")
    path = write_table(base / f"set.{ending}", table)
    frame = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    source = opened(base, path, root="images" if ending == "csv" else None)
    assert [source.class_names[label] for label in source.labels] == frame["label"].tolist()
    for index, value in enumerate(frame["image"]):
        assert source.content(index) == ((base / "images" / value).read_bytes() if ending == "csv" else value)


def test_images_of_all_modes_are_those_of_the_folder_set(base):
    images = mixed_modes()
    write_folder(base / "modes", images)
    write_table(base / "set.parquet", table_of(images))
    folder, table = open_set(base_dir=base, source="folder", path="modes"), opened(base, id="name")
    for index in range(len(images)):
        np.testing.assert_array_equal(table.pixels(index), folder.pixels(index))


def test_numbers_are_named_by_a_list_by_a_file_or_by_the_schema(base):
    write_table(base / "set.csv", table_of(IMAGES, "paths", CLASSES))
    (base / "names.txt").write_text("\ufeffbird\ncat\r\ndog\n\n", encoding="utf-8")
    for names in (["bird", "cat", "dog"], "names.txt"):
        source = opened(base, "set.csv", root="images", class_names=names)
        assert source.class_names == CLASSES
        assert [source.class_names[label] for label in source.labels] == [image.label for image in IMAGES]
    noted = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}'
    write_table(base / "set.parquet", table_of(IMAGES, classes=CLASSES).replace_schema_metadata({"huggingface": noted}))
    assert opened(base).class_names == ("x", "y", "z")
    assert opened(base, class_names=["z", "b", "a"]).class_names == ("z", "b", "a")


def test_texts_take_the_order_of_the_class_names(base):
    write_table(base / "set.parquet", table_of(IMAGES))
    source = opened(base, class_names=["dog", "bird", "cat"])
    assert source.class_names == ("dog", "bird", "cat")
    assert [source.class_names[label] for label in source.labels] == [image.label for image in IMAGES]


def test_columns_are_found_where_only_one_can_be_meant(base):
    table = table_of(IMAGES, "struct").rename_columns(["picture", "label", "name"])
    write_table(base / "set.parquet", table)
    assert contents(opened(base)) == contents(opened(base, image="picture", label="label"))
    write_table(base / "set.arrow", table)
    for name in ("set.parquet", "set.arrow"):
        assert contents(opened(base, name)) == contents(opened(base, name, image="picture.bytes"))
    assert "train.label: must be said: which column of set.csv holds the labels is not clear (allowed: a, b)" in told(
        base, write_table(base / "set.csv", pa.table({"a": ["1"], "b": ["2"]}))
    )


# names and order


@pytest.mark.parametrize("keys", [{"root": "images"}, {"id": "name"}, {"id": "image.path"}, {}])
def test_names_depend_on_neither_place_nor_order_nor_the_cut_into_files(base, keys):
    form = "paths" if "root" in keys else "struct"
    shuffled = random.Random(0).sample(IMAGES, len(IMAGES))
    (base / "moved").mkdir()
    write_table(base / "set.parquet", table_of(IMAGES, form))
    write_table(base / "moved" / "b.parquet", table_of(shuffled[7:], form))
    write_table(base / "moved" / "a.parquet", table_of(shuffled[:7], form))
    whole, cut = opened(base, **keys), opened(base, "moved", **keys)
    assert contents(whole) == contents(cut)
    assert set_digest(whole) == set_digest(cut)


def test_equal_bytes_are_told_apart_by_class_and_count_in_any_order(base):
    same = [image._replace(content=IMAGES[0].content) for image in IMAGES[3:7]]  # one bird and three cats
    images = [*IMAGES, *same]
    write_table(base / "set.parquet", table_of(images))
    write_table(base / "other.parquet", table_of(images[::-1]))
    source = opened(base)
    assert len(set(source.sample_ids.tolist())) == len(images)
    assert contents(source) == contents(opened(base, "other.parquet"))
    assert {name.partition("-")[2] for name in source.listing.names} == {"", "2", "3", "4", "5"}


def test_hashes_are_made_once_until_the_file_changes(base):
    path = write_table(base / "set.parquet", table_of(IMAGES))
    first = opened(base)
    (entry,) = (base / "cache" / "carft-ray" / "index").rglob("*.arrow")
    made = entry.stat().st_mtime_ns
    assert opened(base).listing.names == first.listing.names
    assert entry.stat().st_mtime_ns == made
    entry.write_bytes(b"damaged")
    assert opened(base).listing.names == first.listing.names
    write_table(path, table_of(pictures(seed=1)))
    assert not set(opened(base).listing.names) & set(first.listing.names)


@pytest.mark.parametrize("form", ["paths", "bytes"])
def test_the_fingerprint_changes_with_the_images_and_not_with_their_place(base, form):
    path = write_table(base / "images" / "set.parquet", table_of(IMAGES, form))
    before = opened(base, path).fingerprint
    shutil.copytree(base / "images", base / "moved")
    assert opened(base, "moved/set.parquet").fingerprint == before
    changed = base / "images" / IMAGES[3].name if form == "paths" else path
    os.utime(changed, ns=(0, 0))
    assert opened(base, path).fingerprint != before
    source = opened(base, path)
    changed.unlink()
    with pytest.raises(DataError, match=f"{changed}: must be readable"):
        _ = source.fingerprint


def test_two_tables_of_one_size_date_and_names_have_other_fingerprints(base):
    contents = [bytes([number]) * 100 for number in range(len(IMAGES))]
    for name, shift in (("a", 0), ("b", 1)):
        images = [image._replace(content=contents[row - shift]) for row, image in enumerate(IMAGES)]
        path = write_table(base / f"{name}.arrow", table_of(images))
        os.utime(path, ns=(0, 0))
    assert (base / "a.arrow").stat().st_size == (base / "b.arrow").stat().st_size
    assert opened(base, "a.arrow", id="name").fingerprint != opened(base, "b.arrow", id="name").fingerprint


# rows and paths


def test_where_takes_rows_by_texts_numbers_and_flags(base):
    count = len(IMAGES)
    table = table_of(
        IMAGES,
        fold=[i % 4 for i in range(count)],
        kind=pa.array(["ab"[i % 2] for i in range(count)]).dictionary_encode(),
        good=[i % 3 > 0 for i in range(count)],
    )
    write_table(base / "set.parquet", table)
    for where, rows in (
        ({"fold": 1}, [i for i in range(count) if i % 4 == 1]),
        ({"fold": [0, "3"]}, [i for i in range(count) if i % 4 in (0, 3)]),
        ({"kind": "b", "good": True}, [i for i in range(count) if i % 2 == 1 and i % 3 > 0]),
    ):
        source = opened(base, where=where, id="name", classes="some", names=CLASSES)
        assert list(source.listing.names) == [IMAGES[row].name for row in rows]
        assert [source.content(index) for index in range(len(rows))] == [IMAGES[row].content for row in rows]


def test_paths_are_taken_inside_the_root_in_one_form(base):
    written = [f"./{IMAGES[0].name}", str(base / "images" / IMAGES[4].name), f"cat/../{IMAGES[8].name}"]
    table = pa.table({"image": written, "label": ["bird", "cat", "dog"]})
    source = opened(base, write_table(base / "set.csv", table), root="images")
    assert list(source.listing.names) == [IMAGES[row].name for row in (0, 4, 8)]
    assert source.place(1) == str(base / "images" / IMAGES[4].name)


@pytest.mark.parametrize("path", ["../images/cat/0.png", "/etc/x.png", "", ".", "a/../../images/cat/0.png"])
def test_paths_out_of_the_root_are_refused(base, path):
    write_table(base / "set.csv", pa.table({"image": ["cat/0.png", path], "label": ["a", "b"]}))
    text = told(base, "set.csv", root="images")
    assert f"train.image: must be the path of a file inside {base / 'images'}" in text
    assert "in set.csv, row 2" in text
    assert "or give the folder that holds all images as root." in text


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("x-{000..002}.csv", ["x-000.csv", "x-001.csv", "x-002.csv"]),
        ("x-{000,002}.csv", ["x-000.csv", "x-002.csv"]),
        ("{x-{0..9}.tsv,*.csv}", None),
        ("x-*[12].csv", ["x-001.csv", "x-002.csv"]),
        ("x-00{2..1}.csv", None),
        ("x-00{2..3}.csv", None),
        ("none*", None),
        ("x-{0..999999999}.csv", None),
    ],
)
def test_patterns_of_files(tmp_path, written, names):
    for number in range(3):
        (tmp_path / f"x-00{number}.csv").touch()
    if names is None:
        with pytest.raises(DataError) as caught:
            find_files(written, (".csv", ".tsv"), "data.train", "")
        assert len(caught.value.problems) == 1
    else:
        assert [file.name for file in find_files(written, (".csv", ".tsv"), "data.train", "")] == names


# reading a row


@pytest.mark.parametrize("ending", BINARY)
def test_threads_read_rows_in_any_order(base, ending):
    images = pictures(40)
    path = write_table(
        base / f"set.{ending}", table_of(images), **({"row_group_size": 50} if ending == "parquet" else {})
    )
    source = opened(base, path, id="name")
    rows = random.Random(0).choices(range(len(images)), k=300)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.content, rows)) == [images[row].content for row in rows]


@pytest.mark.slow
def test_rows_are_read_without_the_table_in_memory(base):
    contents = [np.random.default_rng(row).bytes(20_000) for row in range(1500)]
    table, total = pa.table({"image": pa.array(contents, pa.binary())}), 20_000 * 1500
    paths = [write_table(base / f"set.{ending}", table) for ending in ("arrow", "feather")]
    paths.append(write_table(base / "set.parquet", table, row_group_size=100))
    for path, share in zip(paths, (0.01, 0.01, 0.4), strict=True):
        before = pa.total_allocated_bytes()
        rows = ParquetRows(path, "image") if path.suffix == ".parquet" else ArrowRows(path, "image")
        assert [rows.value(row) for row in (0, 700, 1499, 3)] == [contents[row] for row in (0, 700, 1499, 3)]
        assert pa.total_allocated_bytes() - before < share * total, path


# tables that are not as they should be


def broken(column, value, row=2):
    """Returns the table with another value in one row."""
    table = table_of(IMAGES, classes=CLASSES if column == "number" else None)
    column = "label" if column == "number" else column
    values = table.column(column).to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


NAMES = {"class_names": list(CLASSES)}
PLAIN, NUMBERS = table_of(IMAGES), table_of(IMAGES, classes=CLASSES)
HALVES = PLAIN.set_column(1, "label", pa.array([0.5] * len(IMAGES)))
# what is wrong -> the table, the keys of the set, and the message
BROKEN = {
    "missing column": (
        PLAIN,
        {"label": "lable"},
        "label: must be a column of set.parquet, but got 'lable'; did you mean 'label'? (allowed: image, label, name)",
    ),
    "missing where": (PLAIN, {"where": {"nam": "x"}}, "train.where: must be a column of set.parquet, but got 'nam'"),
    "no such value": (
        PLAIN,
        {"where": {"label": ["cat", "brd"]}},
        "train.where.label: must be a value of the column label, but got 'brd'; did you mean 'bird'?",
    ),
    "numbers without names": (NUMBERS, {}, "labels that are numbers need the names of the classes, but got 0"),
    "label out of range": (
        broken("number", 3),
        NAMES,
        "label: a label must be from 0 to 2, as there are 3 class names, but got 3 in set.parquet, row 3",
    ),
    "negative label": (broken("number", -1), NAMES, "but got -1 in set.parquet, row 3"),
    "no label": (broken("label", None), {}, "every image must have a label, but got None in set.parquet, row 3"),
    "unknown label": (
        broken("label", "brd"),
        NAMES,
        "label: a label must be one of class_names, but got 'brd' in set.parquet, row 3; did you mean 'bird'?",
    ),
    "missing class": (PLAIN.slice(4), {"names": CLASSES}, "must be there in every set, but got none for 'bird'"),
    "class without images": (PLAIN.slice(4), NAMES, "train: every class must have an image, but got none in 'bird'"),
    "wrong label type": (HALVES, {}, "column label: must hold texts or whole numbers, but got double"),
    "wrong image type": (
        HALVES,
        {"image": "label"},
        "train.image: column label: must hold paths, or the bytes of image files, but got double",
    ),
    "no bytes": (broken("image", None), {}, "row 3: every row must hold the bytes of an image, but got none"),
    "no name": (broken("name", None), {"id": "name"}, "id: every image must have a name, but got none in set.parquet"),
    "name twice": (
        broken("name", "bird/0.png"),
        {"id": "name"},
        "names of two images must differ, but got 'bird/0.png' in set.parquet, row 1 and set.parquet, row 3",
    ),
    "no row": (PLAIN.slice(0, 0), {}, "train: a table must have a row, but got none"),
    "two columns of one name": (
        PLAIN.append_column("name", PLAIN.column("name")),
        {},
        "no two columns may have one name, but got 'name'",
    ),
    "no names file": (PLAIN, {"class_names": "none.txt"}, "none.txt: No such file or directory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_table_gets_one_message(base, case):
    table, keys, message = BROKEN[case]
    write_table(base / "set.parquet", table)
    text = told(base, **keys)
    assert message in text
    assert text.count("\n") <= 1, "one problem, one next step"


def test_a_missing_image_is_told_with_its_row_and_the_number_of_others(base):
    (base / "images" / "cat" / "1.png").unlink()
    shutil.rmtree(base / "images" / "dog")
    write_table(base / "set.csv", table_of(IMAGES, "paths"))
    text = told(base, "set.csv", root="images")
    rule = f"train.image: must be the path of a file inside {base / 'images'}"
    assert f"{rule}, but got 'cat/1.png' in set.csv, row 6 and 4 more" in text


def test_labels_and_paths_are_told_at_once(base):
    write_table(base / "set.csv", pa.table({"image": ["cat/0.png", "cat/9.png"], "label": ["cat", ""]}))
    text = told(base, "set.csv", root="images")
    assert "every image must have a label" in text
    assert "but got 'cat/9.png' in set.csv, row 2" in text


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("left", [0, 100, -200])
def test_a_file_that_is_cut_off_is_told(base, ending, left):
    path = write_table(base / f"set.{ending}", table_of(IMAGES))
    path.write_bytes(path.read_bytes()[:left])
    assert f"{path}: must be a readable table, but got " in told(base, path)


def test_an_arrow_stream_without_its_end_is_told(base):
    path = write_table(base / "set.arrow", table_of(IMAGES))
    path.write_bytes(path.read_bytes()[:-8])
    assert "it is cut off, or no Arrow file" in told(base, path)


@pytest.mark.parametrize("settings", [{"compression": "lz4"}, {"compression": "zstd"}])
def test_a_compressed_arrow_file_is_refused_for_images_only(base, settings):
    path = write_table(base / "set.feather", table_of(IMAGES), **settings)
    assert "a compressed Arrow file, of which no image can be read alone: write it with no compression" in told(
        base, path
    )
    write_table(base / "set.feather", table_of(IMAGES, "paths"), **settings)
    assert len(opened(base, path, root="images")) == len(IMAGES)


def test_an_image_that_is_cut_off_is_told_with_its_row_or_left_out(base):
    images = [IMAGES[0]._replace(content=IMAGES[0].content[:60]), *IMAGES[1:]]
    write_table(base / "set.parquet", table_of(images))
    with pytest.raises(DataError, match=r"set\.parquet, row 1: must be a readable image"):
        opened(base).pixels(0)
    left = without_bad_images(opened(base, on_bad_image="skip"), base / "cache")
    assert len(left) == len(IMAGES) - 1
    assert left.skipped == (f"{base / 'set.parquet'}, row 1",)


def test_files_of_one_set_must_have_equal_columns(base):
    write_table(base / "tables" / "a.parquet", table_of(IMAGES[:5]))
    write_table(base / "tables" / "b.parquet", table_of(IMAGES[5:], classes=CLASSES))
    text = told(base, "tables")
    assert (
        "b.parquet: all files of a table must have equal columns: label is string in a.parquet, but got int64" in text
    )
    write_table(base / "tables" / "b.parquet", table_of(IMAGES[5:]).drop_columns("label"))
    assert "train.label: must be a column of b.parquet, but got 'label'" in told(base, "tables")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("none.csv", "no such file: {base}/none.csv"),
        ("images", "none in {base}/images"),
        ("images/cat/0.png", "{base}/images/cat/0.png"),
        ("part-{{0..3}}.csv", "no such file: {base}/part-0.csv and 3 more"),
    ],
)
def test_paths_without_a_table_are_told(base, path, value):
    rule = "train: must be a file, a folder, or a pattern of files that end in one of the allowed ways"
    assert told(base, path.format()).startswith(f"{rule}, but got {value.format(base=base)}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set.csv: must be a readable table, but got an empty file"),
        ("image,label\n", "a table must have a row, but got none"),
        ("image,label\ncat/0.png\n", "set.csv: must be a readable table, but got CSV parse error"),
        ("image,label\n\xff\xfe,cat\n", "set.csv: must be a readable table, but got "),
    ],
)
def test_odd_csv_files_are_told(base, text, message):
    (base / "set.csv").write_bytes(text.encode("latin-1"))
    assert message in told(base, "set.csv", root="images")


# roles and the command line


def recipe_of(**sets):
    return absolute_paths(Recipe.model_validate({"data": sets, "train": {"batch_size": 2}}), Path.cwd())


def test_rows_of_one_table_may_have_two_roles(base):
    table = table_of(IMAGES, fold=["train", "val", "test", "val"] * 3)
    write_table(base / "set.parquet", table)
    spec = {"source": "table", "path": "set.parquet"}
    apart = {
        "train": {**spec, "where": {"fold": "train"}},
        "id_val": {**spec, "where": {"fold": "val"}},
        "id_test": {**spec, "where": {"fold": ["test"]}},
    }
    assert check_roles(recipe_of(**apart)) == check_sets(recipe_of(**apart)) == []
    for other in ({"where": {"fold": ["train", "val"]}}, {}, {"where": {"label": "cat"}}, {"path": "./set.parquet"}):
        (problem,) = check_roles(recipe_of(train=apart["train"], id_val={**spec, **other}))
        assert "must not share images with data.train" in str(problem)
    parts = {"train": {**spec, "part": [0.5, 1]}, "id_val": {**spec, "part": [0, 0.5]}}
    assert check_roles(recipe_of(**parts)) == []
    (problem,) = check_roles(recipe_of(**parts | {"id_val": {**spec, "part": [0, 0.5], "id": "name"}}))
    assert "must not share images" in str(problem)


def test_of_a_test_set_no_table_is_opened(base):
    write_table(base / "set.parquet", table_of(IMAGES))
    (base / "test.parquet").write_bytes(b"no table")
    sets = {"train": "set.parquet", "id_val": "other", "id_test": "test.parquet", "ood_test": "none.csv"}
    shutil.copytree(base / "images", base / "other")
    recipe = recipe_of(
        train={"source": "table", "path": sets["train"]},
        id_val={"source": "folder", "path": sets["id_val"]},
        id_test={"source": "table", "path": sets["id_test"]},
        ood_test={"x": {"source": "table", "path": sets["ood_test"]}},
    )
    (problem,) = check_sets(recipe)
    assert str(problem).startswith("data.ood_test.x: must be a file, a folder, or a pattern of files")


@pytest.mark.slow
def test_validate_ends_with_code_4_for_a_table_and_3_for_the_recipe(base, capsys, monkeypatch):
    monkeypatch.chdir(base)
    write_table(base / "a.csv", table_of(IMAGES, "paths"))
    write_table(base / "b.csv", table_of(IMAGES[1:], "paths"))
    (base / "r.yaml").write_text(
        "data:\n  train: {source: table, path: a.csv, root: images}\n"
        "  id_val: {source: table, path: b.csv, root: images}\ntrain: {batch_size: 4}\n"
    )
    assert crash_host.call(["validate", "r.yaml"]) == 0
    assert crash_host.call(["validate", "r.yaml", "--deep"]) == 8  # the same files under two tables
    capsys.readouterr()
    assert crash_host.call(["validate", "r.yaml", "--set", "data.id_val.label=lable"]) == 4
    assert "did you mean 'label'?" in capsys.readouterr().err
    for wrong, message in (
        ("where={label: 0.5}", "must be a text, a whole number, true or false, or a list of them"),
        ("where={label: []}", "must be a text, a whole number, true or false, or a list of them"),
        ("class_names=[cat, cat]", "must not hold a name twice, but got cat"),
        ("class_names=[1]", "must be a list of texts, or the path of a text file with one name per line"),
        ("columns=3", "unknown key"),
    ):
        assert crash_host.call(["validate", "r.yaml", "--set", f"data.id_val.{wrong}"]) == 3
        assert message in capsys.readouterr().err
