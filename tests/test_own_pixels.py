"""Each set gets its own pixels from every cache, where archives give all files one date and one size."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import short_training
import torch
from PIL import Image
from sources import open_set

from carft_ray.data.content import image_digest
from carft_ray.data.decoded import DecodedSource, image_set
from carft_ray.data.listed_sets import open_sets, write_sets
from carft_ray.data.packed import PackedSource
from carft_ray.data.records import records
from carft_ray.data.source import identity
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.layout import HEADS, ZERO_SHOT_TABLE
from carft_ray.recipe.loading import load_recipe
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.run import prepare
from carft_ray.training.shared_inputs import load_shared_inputs, target_store

SIDE, LARGE = 32, 160
CLASSES = ("cat", "dog")
GREYS = {"clean": 200, "foggy": 90}


def grey(view, kind="BMP", side=SIDE):
    content = io.BytesIO()
    Image.new("RGB", (side, side), (GREYS[view],) * 3).save(content, kind)
    return content.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    return path


def tree(root, view, kind):
    for name in CLASSES:
        write(root / view / name / f"0.{kind.lower()}", grey(view, kind))
    return {"source": "folder", "path": str(root / view)}


def cifar(root, view):
    rows = b"".join(bytes([label]) + bytes([GREYS[view]]) * (3 * SIDE * SIDE) for label in range(10))
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        write(root / view / "cifar-10-batches-bin" / f"{name}.bin", rows)
    return {"source": "benchmark", "name": "cifar10", "path": str(root / view), "split": "test"}


COLUMNS = {"id": "id", "image": "image", "label": "label"}


def list_with_ids(root, view):
    """One folder of images, and two lists that give one id to two of them."""
    tree(root, view, "BMP")
    lines = "".join(f"{name},{view}/{name}/0.bmp,{name}\n" for name in CLASSES)
    path = write(root / f"{view}.csv", f"id,image,label\n{lines}".encode())
    return {"source": "table", "path": str(path), "root": str(root), **COLUMNS}


def columns(root, view):
    """One file with two images in each row."""
    views = {each: [grey(each)] * 2 for each in GREYS}
    pq.write_table(pa.table({"id": CLASSES, "label": CLASSES, **views}), root / "both.parquet")
    os.utime(root / "both.parquet", ns=(0, 0))
    return {"source": "table", "path": str(root / "both.parquet"), **COLUMNS, "image": view}


def rows(root, view):
    """One file with two rows of each id."""
    found = [{"view": each, "id": name, "label": name, "image": grey(each)} for each in GREYS for name in CLASSES]
    pyarrow.feather.write_feather(pa.Table.from_pylist(found), root / "both.arrow", compression="uncompressed")
    os.utime(root / "both.arrow", ns=(0, 0))
    return {"source": "table", "path": str(root / "both.arrow"), "where": {"view": view}, **COLUMNS}


def shard(root, view):
    """Archives that differ in their middle alone."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, shown in enumerate(("clean", view, "clean")):
            for name, each in ((f"{number}.cls", b"%d" % (number % 2)), (f"{number}.bmp", grey(shown, side=LARGE))):
                member = tarfile.TarInfo(name)
                member.size = len(each)
                archive.addfile(member, io.BytesIO(each))
    path = write(root / view / "0.tar", content.getvalue())
    return {"source": "webdataset", "path": str(path), "class_names": CLASSES}


KINDS = {
    **{kind: lambda root, view, kind=kind: tree(root, view, kind) for kind in ("BMP", "PPM", "TIFF")},
    "cifar": cifar,
    "list with ids": list_with_ids,
    "columns of a table": columns,
    "rows of a table": rows,
    "shards": shard,
}
CACHES = {
    "decoded": lambda source, folder: image_set(source, None, "as-is", folder).images_NHWC[1],
    "decoded for training": lambda source, folder: DecodedSource(source, folder).pixels(1),
    "packed": lambda source, folder: PackedSource(source, folder).pixels(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_set_has_its_own_pixels_in_every_cache(kind, tmp_path):
    sources = {view: open_set(**KINDS[kind](tmp_path, view)) for view in GREYS}
    for view, source in sources.items():
        np.testing.assert_array_equal(source.pixels(1)[0, 0], GREYS[view])
    ids, labels = ([getattr(source, name).tolist() for source in sources.values()] for name in ("sample_ids", "labels"))
    assert ids[0] == ids[1]
    assert labels[0] == labels[1]
    for name, opened in CACHES.items():
        for view, source in sources.items():
            assert (opened(source, tmp_path / "cache") == GREYS[view]).all(), name
    for source in sources.values():
        assert records(source, tmp_path / "cache").hashes()[1] == image_digest(source.content(1))


def test_a_preparation_and_the_targets_of_a_training_belong_to_the_place_of_the_images(tmp_path):
    path = short_training.make(tmp_path)
    stores, tables = [], []
    for view in (*GREYS, "clean"):
        spec = json.dumps(tree(tmp_path, view, "BMP"))
        sets = [f"data.{role}={spec}" for role in ("train", "id_val", "ood_val.sketch")]
        recipe = load_recipe(path, [*sets, "resources.targets=stored", f"data.cache_dir={tmp_path / 'cache'}"])
        prepare(recipe, tmp_path / "prepared")
        inputs = load_shared_inputs(recipe, prepared_dir=tmp_path / "prepared")
        heads = load_tensors(tmp_path / "prepared" / HEADS)
        stores.append(target_store(recipe, inputs, heads["context_head"], torch.device("cpu")))
        tables.append(read_predictions(tmp_path / "prepared" / ZERO_SHOT_TABLE))
        assert (inputs.validation[0].images_NHWC == GREYS[view]).all()
    assert stores[0] == stores[2] != stores[1]
    assert tables[0] == tables[2] != tables[1]


def test_nodes_that_see_the_images_at_another_place_share_what_the_driver_has_listed(tmp_path, monkeypatch):
    recipe = load_recipe(short_training.make(tmp_path))
    write_sets(recipe, tmp_path / "prepared")
    here = {name: identity(source) for name, source in open_sets(recipe, tmp_path / "prepared").items()}
    assert here == {name: identity(source) for name, source in open_sets(recipe).items()}
    (tmp_path / "images").rename(tmp_path / "of this node")
    (tmp_path / "images").symlink_to(tmp_path / "of this node")
    assert {name: identity(source) for name, source in open_sets(recipe, tmp_path / "prepared").items()} == here
    assert {name: identity(source) for name, source in open_sets(recipe).items()} != here
