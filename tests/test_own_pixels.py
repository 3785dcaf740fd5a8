"""Each set gets its own pixels from every cache, where archives give all files one date and one size."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
import short_training
import torch
from layouts_tables import Picture, encoded, image_column, table_of, write_folder, write_set, write_table
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

GREYS = {"clean": 200, "foggy": 90}


def images(view):
    """Three large images of one size, which differ in their middle alone."""
    names = ("cat/0.bmp", "dog/1.bmp", "dog/2.bmp")
    greys = [np.full((160, 160, 3), GREYS[shown], np.uint8) for shown in ("clean", view, "clean")]
    return [Picture(name, name[:3], encoded(grey, "BMP")) for name, grey in zip(names, greys, strict=True)]


def list_with_ids(root, view):
    """One folder of images, and two lists that give one id to two of them."""
    shown = [image._replace(name=f"{view}/{image.name}") for image in images(view)]
    write_folder(root, shown)
    columns = table_of(shown, "paths").set_column(2, "name", [[image.name for image in images(view)]])
    write_table(root / f"{view}.csv", columns)
    return {"source": "table", "path": f"{view}.csv", "root": ".", "id": "name"}


def columns(root, view):
    """One file with two images in each row."""
    shown = {each: image_column(images(each), "bytes") for each in GREYS}
    write_table(root / "both.parquet", table_of(images("clean"), **shown))
    return {"source": "table", "path": "both.parquet", "id": "name", "image": view}


def rows(root, view):
    """One file with two rows of each id."""
    tables = [table_of(images(each), view=[each] * 3) for each in GREYS]
    write_table(root / "both.feather", pa.concat_tables(tables))
    return {"source": "table", "path": "both.feather", "where": {"view": view}, "id": "name"}


def cifar(root, view):
    content = b"".join(bytes([label]) + bytes([GREYS[view]]) * 3072 for label in range(10))
    (root / view / "cifar-10-batches-bin").mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (root / view / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(content)
    return {"source": "benchmark", "name": "cifar10", "path": view, "split": "test"}


def written(kind, root, view):
    """Writes a set whose files all have one date."""
    if kind in (list_with_ids, columns, rows, cifar):
        spec = kind(root, view)
    else:
        spec = write_set(kind, root, images(view), view, ("cat", "dog"))
    for path in root.rglob("*"):
        os.utime(path, ns=(0, 0))
    return spec


KINDS = ("folder", "parquet bytes", "arrow struct", "shards", "saved", list_with_ids, columns, rows, cifar)
CACHES = {
    "decoded": lambda source, folder: image_set(source, None, "as-is", folder).images_NHWC[1],
    "decoded for training": lambda source, folder: DecodedSource(source, folder).pixels(1),
    "packed": lambda source, folder: PackedSource(source, folder).pixels(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_set_has_its_own_pixels_in_every_cache(kind, tmp_path):
    sources = {view: open_set(base_dir=tmp_path, **written(kind, tmp_path, view)) for view in GREYS}
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
        spec = json.dumps(written("folder", tmp_path, view))
        sets = [f"data.{role}={spec}" for role in ("train", "id_val", "ood_val.sketch")]
        recipe = load_recipe(path, [*sets, "resources.targets=stored", f"data.cache_dir={tmp_path / 'cache'}"])
        prepare(recipe, tmp_path / "prepared")
        inputs = load_shared_inputs(recipe, prepared_dir=tmp_path / "prepared")
        heads = load_tensors(tmp_path / "prepared" / HEADS)
        stores.append(target_store(recipe, inputs, heads["context_head"], torch.device("cpu")))
        tables.append(read_predictions(tmp_path / "prepared" / ZERO_SHOT_TABLE))
        assert (inputs.validation[0].images_NHWC[1] == GREYS[view]).all()
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
