"""Tables from strangers: nothing is unpickled, no other memory is read, and a damaged page costs its own rows only."""

import contextlib
import pickle
from pathlib import Path

import crash_host
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import short_training
from layouts_tables import hf_dataset, pictures, table_of, write_table
from sources import open_set

from carft_ray.data.table_rows import READ_ERRORS, open_rows, read_columns
from carft_ray.errors import DataError
from carft_ray.launch.ray_cluster import ray_private

IMAGES = pictures(classes=short_training.CLASSES)
NAMES = ("set.parquet", "set.arrow", "set.feather")  # a stream and a file of Arrow
PICKLED = "ray.data.arrow_pickled_object"
FORMS = ("beside", "inside", "whole")


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def struck(images, trap, form="beside"):
    """Returns a table in whose image column an object is pickled that makes the file ``trap`` when it is read.

    It stands ``beside`` the bytes in a struct, ``inside`` as its bytes, or is the ``whole`` column.
    """
    name = {"ARROW:extension:name": PICKLED, "ARROW:extension:metadata": ""}
    payload = pa.array([pickle.dumps(_Payload(trap))] * len(images), pa.large_binary())
    pickled = pa.field("bytes" if form == "inside" else "object", pa.large_binary(), metadata=name)
    contents = pa.array([image.content for image in images], pa.binary())
    if form == "whole":
        column, kind = payload, pa.field("image", pa.large_binary(), metadata=name)
    else:
        fields = {"beside": [pa.field("bytes", pa.binary()), pickled], "inside": [pickled]}[form]
        column = pa.StructArray.from_arrays([contents, payload][-len(fields) :], fields=fields)
        kind = pa.field("image", column.type)
    table = table_of(images)
    return table.set_column(0, kind, column)


# ---- the command line in a process with Ray's types registered, for ``crash_host``


def import_everything():
    import ray.data
    import ray.data._internal.object_extensions.arrow  # noqa: F401  (it registers the types)

    crash_host.import_everything()


def call(argv):
    import ray

    with pytest.raises(pa.ArrowKeyError):  # it is registered
        pa.register_extension_type(ray.data._internal.object_extensions.arrow.ArrowPythonObjectType())
    return crash_host.call(argv)


# ---- what is pickled


@pytest.fixture
def registered():
    """Ray's type for pickled objects is registered, as in a process that has imported ``ray.data``."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    ray_private.forget_pickled_columns()
    pa.register_extension_type(ArrowPythonObjectType())
    yield
    ray_private.forget_pickled_columns()


def test_the_attack_works_where_a_value_is_asked_for(tmp_path, registered):
    write_table(tmp_path / "set.arrow", struck(IMAGES, tmp_path / "trap"))
    with pa.ipc.open_stream(tmp_path / "set.arrow") as reader:
        reader.read_all().column("image")[0].as_py()
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_object_is_refused_and_never_unpickled(tmp_path, registered, name, form):
    write_table(tmp_path / name, struck(IMAGES, tmp_path / "trap", form))
    with pytest.raises(DataError, match=f"column image must have no extension type, but got {PICKLED}"):
        open_set(base_dir=tmp_path, source="table", path=name, image="image", id="name")
    with pytest.raises(ValueError, match=f"a column image with the extension type {PICKLED}"):
        read_columns(tmp_path / name, ["image"])
    if form == "beside":  # and where it was not seen
        assert open_rows(tmp_path / name, "image").value(3) == IMAGES[3].content
    assert not (tmp_path / "trap").exists()


def test_it_is_refused_whether_or_not_the_type_is_registered(tmp_path):
    ray_private.forget_pickled_columns()
    write_table(tmp_path / "set.parquet", struck(IMAGES, tmp_path / "trap"))
    with pytest.raises(DataError, match="of a struct bytes and path are enough"):
        open_set(base_dir=tmp_path, source="table", path="set.parquet")


def test_a_column_that_nobody_uses_may_hold_anything(tmp_path, registered):
    table = struck(IMAGES, tmp_path / "trap").rename_columns(["other", "label", "name"])
    table = table.append_column("image", pa.array([image.content for image in IMAGES], pa.binary()))
    for name in NAMES:
        write_table(tmp_path / name, table)
        source = open_set(base_dir=tmp_path, source="table", path=name, image="image", id="name")
        assert [source.content(index) for index in range(len(IMAGES))] == [image.content for image in IMAGES]
    assert not (tmp_path / "trap").exists()


@pytest.mark.slow
def test_no_command_unpickles_what_ray_would(tmp_path):
    """Doctor, and searches, in a process with Ray's types registered."""
    short_training.make(tmp_path)
    trap, table = tmp_path / "trap", struck(IMAGES, tmp_path / "trap")
    for name in NAMES:
        write_table(tmp_path / name, table)
    hf_dataset(IMAGES, short_training.CLASSES).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    with pa.ipc.open_stream(file) as reader:
        noted = reader.schema.metadata
    write_table(file, table.replace_schema_metadata(noted))
    search = ["search", "--executor", "debug", "--study", "study"]
    saved = "{source: huggingface, path: saved}"
    tables = [f"{{source: table, path: {name}}}" for name in NAMES]
    argvs = [(*search, tables[0]), (*search, saved), ("doctor", tables[1])]
    commands = [{"argv": [*words, "../recipe.yaml", "--set", f"data.train={one}"]} for *words, one in argvs]
    with crash_host.started(tmp_path, "test_table_attacks") as run:
        ((_, answers),) = run([{"name": "job", "commands": commands}]).values()
    for answer in answers:
        assert answer["code"] == 4, answer["log"]
        assert f"the column image must have no extension type, but got {PICKLED}" in answer["log"]
    assert not trap.exists()


@pytest.mark.parametrize("column", ["image", "label"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_an_offset_out_of_the_file_is_told_and_no_other_memory_is_read(tmp_path, name, column):
    """One image, or one label, ends where no file is any more."""
    table = table_of(IMAGES[:5])  # one batch
    values = table.column(column).to_pylist()
    write_table(tmp_path / name, table if column == "label" else table.select(["image", "label"]))
    ends = np.cumsum([0, *map(len, values)], dtype="<i4").tobytes()
    raw = (tmp_path / name).read_bytes()
    assert raw.count(ends) == 1
    (tmp_path / name).write_bytes(raw.replace(ends, ends[:8] + np.array([2**24], "<i4").tobytes() + ends[12:]))
    with pytest.raises(DataError, match=f"{name}: must be a readable table, but got .*(?i:offset)"):
        open_set(base_dir=tmp_path, source="table", path=name)


def test_a_damaged_page_costs_the_rows_of_its_row_group_from_there_on(tmp_path):
    rng = np.random.default_rng(0)
    images = [image._replace(name=f"{row}", content=rng.bytes(2000)) for row, image in enumerate(IMAGES * 10)]
    path = tmp_path / "set.parquet"
    pq.write_table(
        table_of(images), path, row_group_size=100, compression="none", use_dictionary=False, data_page_size=2**14
    )
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
