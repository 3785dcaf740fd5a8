"""Tables that a stranger made: a column whose values Ray unpickles where its types are registered, and bad offsets."""

import pickle
from pathlib import Path

import crash_host
import pyarrow as pa
import pyarrow.feather
import pytest
from layouts_tables import hf_dataset, table_of, write_table

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

    Args:
        images: Pictures.
        trap: The file.
        form: Where: ``beside`` the bytes in a struct, ``inside`` as its bytes, or ``whole``, the column itself.
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


def write(path, table):
    """Writes a table as the file's ending says; ``stream.arrow`` as a stream, other ``.arrow`` as an Arrow file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "stream.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        write_table(path, table, **({"chunksize": len(table)} if path.suffix == ".feather" else {}))


def save_to_disk(folder, images, classes, table):
    """Writes a folder as ``datasets`` saves it, with the rows of another table."""
    hf_dataset(images, classes).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    with pa.ipc.open_stream(file) as reader:
        noted = reader.schema.metadata
    write(folder / "stream.arrow", table.replace_schema_metadata(noted))
    (folder / "stream.arrow").rename(file)


# the command line in a process with Ray's types registered, for ``crash_host``


def import_everything():
    import ray.data
    import ray.data._internal.object_extensions.arrow  # noqa: F401

    crash_host.import_everything()


def call(argv):
    import ray

    with pytest.raises(pa.ArrowKeyError):  # it is registered
        pa.register_extension_type(ray.data._internal.object_extensions.arrow.ArrowPythonObjectType())
    return crash_host.call(argv)
