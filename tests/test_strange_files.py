"""Files from strangers that never end, are far too large, or say what cannot be: each is one message, at once.

Of their tables nothing is unpickled, no other memory is read, and a damaged page costs its own rows only.
"""

import contextlib
import functools
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import short_training
import torch
from layouts_tables import hf_dataset, image_column, pictures, table_of, write_folder, write_table, write_tar
from mutations import Evil, pickled
from scipy.io import savemat
from sources import open_set, told

from carft_ray import files
from carft_ray.data.benchmarks import layouts
from carft_ray.data.decode_images import MOST_BYTES
from carft_ray.data.file_index import open_table
from carft_ray.data.table_rows import READ_ERRORS, open_rows, read_columns
from carft_ray.errors import DataError, RecipeError, StorageError
from carft_ray.launch.cluster import ray_private
from carft_ray.recipe.benchmarks import BENCHMARKS
from carft_ray.recipe.loading import load_recipe
from carft_ray.untrusted import parse_json, read_regular, read_text

IMAGES = pictures()
TB = 10**12
REGULAR, TOO_LARGE = "must be a regular file, but got ", "since it is read whole, but got 1,000,000,000,000"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(short_training.RECIPE)  # what it names is not there
    return tmp_path


def sparse(path, size=TB, content=b""):
    """Writes a file with holes: it takes no place on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(size)


def test_a_pipe_or_a_device_in_place_of_a_set_or_an_image_is_told(here):
    write_folder(here / "images", IMAGES)
    os.mkfifo("images/cat/pipe.png")
    os.symlink("/dev/zero", "images/cat/zero.png")
    write_table(here / "set.csv", pa.table({"image": ["cat/pipe.png", "cat/zero.png"], "label": ["cat", "cat"]}))
    source = open_set(source="table", path="set.csv", root="images")
    for index in range(2):
        assert f"{REGULAR}a pipe, device or socket" in told(source.content, index)
    for ending in ("tar", "csv", "parquet", "arrow"):
        os.mkfifo(f"pipe.{ending}")
        for path in (f"pipe.{ending}", f"*pipe.{ending}"):
            source = "webdataset" if ending == "tar" else "table"
            assert f"but got {here / f'pipe.{ending}'}" in told(open_set, source=source, path=path)


@pytest.mark.parametrize(("name", "rule"), [("pipe", REGULAR), ("/dev/zero", REGULAR), ("terabyte", TOO_LARGE)])
def test_a_pipe_a_device_or_a_terabyte_in_place_of_a_list_is_told(here, name, rule):
    os.mkfifo("pipe")
    sparse(here / "terabyte")
    write_table(here / "set.parquet", table_of(IMAGES))
    assert rule in told(open_set, source="table", path="set.parquet", class_names=name)
    assert rule in told(open_set, source="table", path="set.parquet", exclude=name)
    with pytest.raises(RecipeError, match=rule):
        load_recipe(here / "recipe.yaml", [f"prompts.templates='file:{name}'"])
    with pytest.raises(RecipeError, match=rule):
        load_recipe(here / name)


def tar_header(name, kind=tarfile.REGTYPE, size=0):
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")


def test_an_image_of_a_terabyte_in_a_shard_or_a_table_is_told_and_not_read(here):
    label = write_tar(here / "x.tar", [("0.cls", b"0")]).read_bytes()[:1024]  # without the end of the archive
    sparse(here / "x.tar", TB + 3 * 1024, label + tar_header("0.png", size=TB))
    sparse(here / "images" / "cat" / "9.png", content=IMAGES[0].content)
    write_table(here / "set.csv", pa.table({"image": ["cat/9.png"], "label": ["cat"]}))
    for spec, place in (
        ({"source": "webdataset", "path": "x.tar", "class_names": ["cat"]}, "x.tar: 0.png"),
        ({"source": "folder", "path": "images"}, "cat/9.png"),
        ({"source": "table", "path": "set.csv", "root": "images"}, "cat/9.png"),
    ):
        with pytest.raises(DataError, match=f"{place}: .*at most {MOST_BYTES:,} bytes, .*but got 1,000,000,000,000"):
            open_set(**spec).content(0)
    batch = pa.record_batch({"image": pa.array([b"x" * 512], pa.large_binary()), "label": ["cat"], "name": ["a"]})
    with pa.ipc.new_stream("x.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert open_set(source="table", path="x.arrow", id="name").content(0) == b"x" * 512
    for content, rule in ((b"image,label\n", TOO_LARGE), (b"", "must be")):
        sparse(here / "table.csv", content=content)
        assert rule in told(open_set, source="table", path="table.csv")


def pax(kind, records):
    return tar_header("x", kind, len(records)) + records.ljust(-(-len(records) // 512) * 512, b"\0")


GLOBAL = b"".join(b"9 %03d=ab\n" % number for number in range(101))
NO_ARCHIVE = "x.tar: must be a whole tar archive"
# a shard that would be read for ever, or whose names are no text; how much follows; the message
ODD_SHARDS = {
    "a header of 20 gigabytes": (tar_header("x", tarfile.XHDTYPE, 20 * 2**30), 21 * 2**30, NO_ARCHIVE),
    "size below zero": (tar_header("0.png", size=-512), 10240, NO_ARCHIVE),  # which would lead back to itself
    "global headers": (tar_header("x", tarfile.XGLTYPE) * 5000, 0, NO_ARCHIVE),  # endless
    "many global records": (pax(tarfile.XGLTYPE, GLOBAL) + tar_header("0.png"), 10240, NO_ARCHIVE),
    "a megabyte of digits": (pax(tarfile.XHDTYPE, b"1" * 2**20), 10240, NO_ARCHIVE),  # hours, as the next two
    "records within each other": (pax(tarfile.XHDTYPE, b"3 a" * 2**18 + b"="), 10240, NO_ARCHIVE),
    "many character sets": (pax(tarfile.XHDTYPE, b"2 hdrcharset=" * 2**16), 10240, NO_ARCHIVE),
    "name that is no text": (tar_header("\udcff.png"), 10240, "the name of a file must be text in UTF-8"),
}


@pytest.mark.parametrize(("content", "more", "rule"), ODD_SHARDS.values(), ids=ODD_SHARDS)
def test_a_shard_with_odd_headers_is_told_and_read_to_an_end(here, content, more, rule):
    sparse(here / "x.tar", len(content) + more, content)
    assert rule in told(open_set, source="webdataset", path="x.tar")


def test_a_shard_with_ordinary_extended_headers_is_read(here):
    name = "x" * 1100  # its record has more than a block
    with tarfile.open("x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "f" * 600}) as archive:
        for ending, content in (("png", IMAGES[0].content), ("cls", b"0")):
            member = tarfile.TarInfo(f"{name}.{ending}")
            member.size, member.mtime = len(content), 1.25
            archive.addfile(member, io.BytesIO(content))
    source = open_set(source="webdataset", path="x.tar", class_names=["cat"])
    assert [source.content(index) for index in range(len(source))] == [IMAGES[0].content]


def test_the_state_of_a_saved_data_set_may_be_nothing_but_json(here):
    hf_dataset(IMAGES).save_to_disk(here / "saved")
    state = here / "saved" / "state.json"
    surrogate = '{"_data_files": [{"filename": "\\ud800"}]}'
    for content, rule in (("[" * 200_000, "nested too deeply"), (surrogate, "surrogates not allowed")):
        state.write_text(content)
        text = told(open_set, source="huggingface", path="saved")
        assert text.startswith(f"{state}: must be a readable JSON file, but got ")
        assert text.endswith(rule)
    sparse(state)
    assert "since it is read whole" in told(open_set, source="huggingface", path="saved")
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_an_arrow_set_with_damaged_names_is_told(here):
    """They are a SystemError or a UnicodeDecodeError of Arrow."""
    noted = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}})
    table = table_of(IMAGES).replace_schema_metadata({"huggingface": noted})
    whole = write_table(here / "set.arrow", table).read_bytes()
    names = [(b"label", b"\xff\xfelab"), (b"label", b"lab\0l"), (b'"info"', b'"in\xff"')]
    for name, damaged in (*names, (b"huggingface", b"hugg\xff\xffgface")):
        (here / "set.arrow").write_bytes(whole.replace(name, damaged))
        with contextlib.suppress(DataError):  # and nothing else is raised
            open_set(source="table", path="set.arrow", id="name", image="image", label="label").content(0)


VALUES = "must be a text, a whole number, true or false, or a list of them"
NO_NUL = "must be text without NUL characters and without unpaired"
# a setting of a recipe, and the rule that it breaks
CANNOT_BE = [
    ("search.space.kl_weight={low: 0, high: 1.7e308, step: 1}", "low to high must have at most 1,000,000,000 steps"),
    ("search.space.kl_weight={low: -1.7e308, high: 1.7e308}", "high - low must be a finite number"),
    ('data.train.path="a\\0b"', NO_NUL),
    ('prompts.templates="file:a\\0b"', NO_NUL),
    ('prompts.class_names=["a\\ud800", b, c, d, e]', NO_NUL),
    ("prompts.templates=file:~nosuchuser/x", "~nosuchuser/x: No such file or directory"),
    (f"data.train.path={'x' * 300}", "x: must have at most 4,095 bytes, and each name in it 255"),
    (f"prompts.templates=file:{'x/' * 3000}", "must have at most 4,095 bytes"),
    ("name=" + "x" * 300, "letters, digits, _ and -, at most 100"),
    ("data.id_val={source: table, path: x, where: {label: 0.5}}", VALUES),
    ("data.id_val={source: table, path: x, where: {label: []}}", VALUES),
    ("data.id_val={source: table, path: x, class_names: [1]}", "must be a list of texts, or the path of a text file"),
    ("data.id_val={source: webdataset, path: x, label: 'json:'}", "the ending of a file such as cls, or json:KEY"),
]


@pytest.mark.parametrize(("setting", "rule"), CANNOT_BE)
def test_a_recipe_that_says_what_cannot_be_is_told(here, setting, rule):
    with pytest.raises(RecipeError) as caught:
        load_recipe(here / "recipe.yaml", [setting])
    assert rule in str(caught.value)
    recipe = load_recipe(here / "recipe.yaml", ["data.train.path=~nosuchuser/x"])  # a folder that is not there
    assert recipe.data.train.path == str(here / "~nosuchuser" / "x")


def test_json_of_a_study_that_never_ends_or_is_too_deep_is_told(here):
    os.mkfifo("pipe")
    (here / "deep").write_text("[" * 200_000)
    for name, rule in (("pipe", f"{REGULAR}a pipe"), ("deep", "nested too deeply")):
        with pytest.raises(StorageError, match=rule):
            files.read_json(here, name)
        assert files.read_object(here, name) is None


# ---- files of benchmarks and of the cache


def test_a_batch_of_cifar_that_is_far_too_large_or_a_pipe_is_told(here):
    def batch():
        spec = SimpleNamespace(split="test")
        return told(layouts.cifar10, here, spec, BENCHMARKS["cifar10"], "data.train")

    sparse(here / "test_batch.bin", 3073 * 1_000_001)
    assert "test_batch.bin: must have at most 1,000,000 images, but got 1,000,001" in batch()
    os.remove("test_batch.bin")
    os.mkfifo("test_batch.bin")
    assert f"test_batch.bin: {REGULAR}a pipe" in batch()


def test_a_list_of_matlab_that_unpacks_to_far_more_is_told(here, monkeypatch):
    monkeypatch.setattr(layouts, "MOST_LIST_BYTES", 2**16)
    few = {"labels": np.arange(3), "other": np.zeros(9)}
    for content, is_packed in ((few, True), (few, False), ({**few, "zeros": np.zeros(2**14)}, True)):
        savemat(here / "labels.mat", content, do_compression=is_packed)
        if "zeros" not in content:
            assert layouts.read_matlab(here / "labels.mat", "labels") == [0, 1, 2]
    assert "comes with, but got ValueError: more than 65,536 bytes, unpacked" in told(
        layouts.read_matlab, here / "labels.mat", "labels"
    )


def test_a_pipe_among_the_notes_of_the_cache_counts_as_damaged(here):
    os.mkfifo("records.arrow")
    assert open_table(here / "records.arrow") is None


# ---- tables that hold what is pickled


PICTURES = pictures(classes=short_training.CLASSES)
NAMES = ("set.parquet", "set.arrow", "set.feather")  # a stream and a file of Arrow
PICKLED = "ray.data.arrow_pickled_object"


def struck(images, trap, form="beside"):
    """Returns a table in whose image column an object is pickled that makes the file ``trap`` when it is read.

    It stands ``beside`` the bytes in a struct, ``inside`` as its bytes, or is the ``whole`` column.
    """
    evil = pickled(Evil(trap), len(images))
    forms = {
        "beside": pa.StructArray.from_arrays([image_column(images, "bytes"), evil], ["bytes", "object"]),
        "inside": pa.StructArray.from_arrays([evil], ["bytes"]),
        "whole": evil,
    }
    return table_of(images).set_column(0, "image", forms[form])


@pytest.fixture(params=[True, False], ids=["registered", "unknown"])
def with_or_without_rays_types(request):
    """Ray's type for pickled objects is registered, as in a process that has imported ``ray.data``, or is not."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    ray_private.forget_pickled_columns()
    if request.param:
        pa.register_extension_type(ArrowPythonObjectType())
    yield
    ray_private.forget_pickled_columns()


@pytest.mark.parametrize("with_or_without_rays_types", [True], indirect=True)
def test_the_attack_works_where_a_value_is_asked_for(tmp_path, with_or_without_rays_types):
    write_table(tmp_path / "set.arrow", struck(PICTURES, tmp_path / "trap"))
    with pa.ipc.open_stream(tmp_path / "set.arrow") as reader:
        reader.read_all().column("image")[0].as_py()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("form", ["beside", "inside", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_object_is_refused_and_never_unpickled(tmp_path, with_or_without_rays_types, name, form):
    write_table(tmp_path / name, struck(PICTURES, tmp_path / "trap", form))
    text = told(open_set, source="table", path=name, image="image", id="name")
    assert f"column image must have no extension type, but got {PICKLED}" in text
    with pytest.raises(ValueError, match=f"a column image with the extension type {PICKLED}"):
        read_columns(tmp_path / name, ["image"])
    if form == "beside":  # and where it was not seen
        assert open_rows(tmp_path / name, "image").value(3) == PICTURES[3].content
    assert not (tmp_path / "trap").exists()


def test_a_column_that_nobody_uses_may_hold_anything(tmp_path, with_or_without_rays_types):
    table = struck(PICTURES, tmp_path / "trap").rename_columns(["other", "label", "name"])
    table = table.append_column("image", pa.array([image.content for image in PICTURES], pa.binary()))
    for name in NAMES:
        write_table(tmp_path / name, table)
        source = open_set(source="table", path=name, image="image", id="name")
        assert [source.content(index) for index in range(len(PICTURES))] == [image.content for image in PICTURES]
    assert not (tmp_path / "trap").exists()


@pytest.mark.slow
@pytest.mark.parametrize("with_or_without_rays_types", [True], indirect=True)
def test_no_command_unpickles_what_ray_would(tmp_path, with_or_without_rays_types, run):
    short_training.make(tmp_path)
    trap, table = tmp_path / "trap", struck(PICTURES, tmp_path / "trap")
    for name in NAMES:
        write_table(tmp_path / name, table)
    hf_dataset(PICTURES, short_training.CLASSES).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    with pa.ipc.open_stream(file) as reader:
        noted = reader.schema.metadata
    write_table(file, table.replace_schema_metadata(noted))
    sets = ("search", "table", "set.parquet"), ("search", "huggingface", "saved"), ("doctor", "table", "set.arrow")
    for verb, source, path in sets:
        words = [verb, "recipe.yaml", "--set", f"data.train={{source: {source}, path: {path}}}"]
        code, _, err = run(*words, *(["--executor", "debug", "--study", "study"] if verb == "search" else []))
        assert code == 4, err
        assert f"the column image must have no extension type, but got {PICKLED}" in " ".join(err.split())
    assert not trap.exists()


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_an_offset_out_of_the_file_is_told_and_no_other_memory_is_read(tmp_path, name, column):
    """One image, or one label, ends where no file is any more."""
    table = table_of(PICTURES[:5])  # one batch
    values = table.column(column).to_pylist()
    write_table(tmp_path / name, table if column == "label" else table.select(["image", "label"]))
    ends = np.cumsum([0, *map(len, values)], dtype="<i4").tobytes()
    raw = (tmp_path / name).read_bytes()
    assert raw.count(ends) == 1
    (tmp_path / name).write_bytes(raw.replace(ends, ends[:8] + np.array([2**24], "<i4").tobytes() + ends[12:]))
    with pytest.raises(DataError, match=f"{name}: must be a readable table, but got .*(?i:offset)"):
        open_set(source="table", path=name)


def test_a_damaged_page_costs_the_rows_of_its_row_group_from_there_on(tmp_path):
    rng = np.random.default_rng(0)
    images = [image._replace(name=f"{row}", content=rng.bytes(2000)) for row, image in enumerate(PICTURES * 10)]
    path = tmp_path / "set.parquet"
    plain = {"compression": "none", "use_dictionary": False, "data_page_size": 2**14}
    write_table(path, table_of(images), row_group_size=100, **plain)
    raw = path.read_bytes()
    where = raw.index(images[33].content)
    path.write_bytes(raw[: where - 4] + b"\xff\xff\xff\x7f" + raw[where:])  # its length
    rows = open_rows(path, "image")
    left = []
    for row, image in enumerate(images):
        with contextlib.suppress(*READ_ERRORS):
            assert rows.value(row) == image.content
            left.append(row)
    assert left == [*range(32), *range(100, 200)]
    assert rows.value(7) == images[7].content


def repeated(num_rows, text="x" * 2**12):
    """Returns a table in which each row has the same long text as its label, in a file once."""
    labels = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int8)), pa.array([text]))
    return pa.table({"image": [f"{row}.png" for row in range(num_rows)], "label": labels})


@pytest.mark.parametrize("form", ["dictionary", "plain", "struct", "view"])
@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_in_very_many_rows_is_told(here, monkeypatch, name, form):
    """A file of a megabyte held a hundred gigabytes of it."""
    monkeypatch.setattr("carft_ray.data.table_rows.MOST_CSV_BYTES", 2**20)
    table, label = repeated(2**8 + 1), "label"
    if form == "plain":
        table = table.set_column(1, "label", table["label"].cast(pa.string()))
    elif form == "view":
        table = table.set_column(1, "label", table["label"].cast(pa.string()).cast(pa.string_view()))
    elif form == "struct":
        texts = table["label"].combine_chunks().cast(pa.string())
        table, label = table.set_column(1, "of", pa.StructArray.from_arrays([texts], ["label"])), "of.label"
    write_table(here / name, table)
    rule = "must be a readable table, but got one with texts of more than 1,048,576 bytes"
    assert rule in told(open_set, source="table", path=name, label=label)
    sound = read_columns(write_table(here / name, table.slice(1, 3)), ["image", label])
    assert [sound[label].to_pylist(), sound["image"].to_pylist()] == [["x" * 2**12] * 3, ["1.png", "2.png", "3.png"]]


def test_large_images_of_a_parquet_file_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("carft_ray.data.table_rows._RECENT_BYTES", 2**14)
    contents = [bytes([row]) * 1000 for row in range(200)]
    rows = open_rows(write_table(tmp_path / "set.parquet", pa.table({"image": contents})), "image")
    for row in (*range(200), 3, 199, 0):
        assert rows.value(row) == contents[row]
        assert rows._num_bytes() <= 2**14


# ---- the gate for files


def test_a_regular_file_is_read_whole_through_links_and_text_must_be_utf_8(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link") == b"\xef\xbb\xbfgr\xc3\xbcn"
    assert read_text(tmp_path / "link") == "grün"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b")
    (tmp_path / "a").write_bytes(b"abc\xff")
    assert "must be text in UTF-8, but byte 3 is not" in told(read_text, tmp_path / "a")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError):  # noqa: PT011  # the system's own, ENXIO
            read_regular(tmp_path / "socket")
    special = "a pipe, device or socket"
    for name, kind in (("pipe", special), ("/dev/zero", special), (".", "a folder")):
        with pytest.raises(RecipeError, match=f"must be a regular file, but got {kind}$"):
            read_regular(tmp_path / name, error=RecipeError)
    assert r"a\x00b: must be the name of a file" in told(read_regular, tmp_path / "a\0b")


def test_a_file_over_the_limit_is_not_read(tmp_path):
    sparse(tmp_path / "sparse")
    assert f"at most 67,108,864 bytes, {TOO_LARGE}" in told(read_regular, tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"123")
    assert read_regular(tmp_path / "small", most_bytes=3) == b"123"
    for path in (tmp_path / "small", "/proc/self/status"):  # whose size is said to be 0
        assert "at most 2 bytes" in told(read_regular, path, most_bytes=2)


SHARED = functools.reduce(lambda part, _: (part, part), range(60), ())  # to hash or print it never ends
BODY = pickle.dumps(SHARED, 2)[2:-1]  # what makes it, without begin and end
ENDLESS = {
    "key": b"}" + BODY + b"K\1s",
    "keys": b"}(" + BODY + b"K\1u",
    "key of a state": b"}X\5\0\0\0state}" + BODY + b"K\1ss",
    "set": b"cbuiltins\nset\n]" + BODY + b"a\x85R",
    "pairs": b"ccollections\nOrderedDict\n]" + BODY + b"K\1\x86a\x85R",
    "counter": b"ccollections\nCounter\n]" + BODY + b"a\x85R",
    "function": BODY + b")R",
    "class": BODY + b")\x81",
    "layout": b"ctorch.serialization\n_get_layout\n" + BODY + b"\x85R",
    "storage": b"(X\7\0\0\0storagectorch\nFloatStorage\n" + BODY + b"X\3\0\0\0cpuK\1tQ",
    "list of itself": b"]q\0h\0a",
}
READ = """
import sys
from pathlib import Path
from carft_ray.errors import DataError
from carft_ray.model.weights_files import read_weights
for path in map(Path, sys.argv[1:]):
    try:
        read_weights(path, "model.pretrained")
    except DataError as error:
        print(error.exit_code, error)
"""


@pytest.mark.slow
def test_a_small_weights_file_that_would_hang_is_refused_before_torch_reads_it(tmp_path):
    paths = []
    for number, operations in enumerate(ENDLESS.values()):
        pickled = b"\x80\2" + operations + b"."
        zipped, plain = tmp_path / f"{number}.pt", tmp_path / f"{number}.bin"
        torch.save({"a": torch.zeros(1)}, tmp_path / "sound.pt")
        with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(zipped, "w") as archive:
            for name in sound.namelist():
                archive.writestr(name, pickled if name.endswith("data.pkl") else sound.read(name))
        torch.save({"a": torch.zeros(1)}, plain, _use_new_zipfile_serialization=False)
        content = plain.read_bytes()
        begin = content.index(b"}q", content.index(b"little_endian")) - 2
        plain.write_bytes(content[:begin] + pickled)
        paths += [zipped, plain]
    assert all(path.stat().st_size < 3000 for path in paths)
    # a limit for a slow machine: without the refusal none of them ends
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=300, check=True)
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert re.fullmatch(
            f"4 model.pretrained: must be a weights file that can be read, but got {path}: (objects that share parts "
            "again and again|an object that contains itself), which torch.save does not write",
            line,
        )
