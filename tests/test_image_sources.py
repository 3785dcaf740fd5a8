"""All sources of stored images: the same images are the same set in every layout, with pixels of its own."""

import json
import os
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import crash_host
import numpy as np
import pyarrow as pa
import pytest
import short_training
import torch
from layouts_tables import (
    BINARY,
    CLASSES,
    KINDS,
    Picture,
    encoded,
    mixed_modes,
    pictures,
    table_of,
    write_folder,
    write_set,
    write_shards,
    write_table,
)
from sources import contents, open_set, recipe_of, shards, table, told

from carft_ray.data.cached_sets import DecodedSource, Keeping, PackedSource, image_set
from carft_ray.data.records import records
from carft_ray.data.role_checks import check_roles, check_sets
from carft_ray.data.sets import open_sets, write_sets
from carft_ray.data.source import image_digest, image_digests, set_digest
from carft_ray.evaluation.predictions import read_predictions
from carft_ray.layout import HEADS, ZERO_SHOT_TABLE
from carft_ray.recipe.loading import load_recipe
from carft_ray.training.checkpoint import load_tensors
from carft_ray.training.run import prepare
from carft_ray.training.shared_inputs import load_shared_inputs, target_store

pytestmark = pytest.mark.usefixtures("base")
IMAGES = pictures()
MIXED = sorted([*pictures(2), *mixed_modes()])
CONTAINERS = ("parquet bytes", "arrow struct", "feather bytes", "shards", "saved", "hub")


# ---- the contract


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_the_same_set_in_every_layout(base, kind):
    folder = open_set(**write_set("folder", base, MIXED, "folder"))
    source = open_set(**write_set(kind, base, MIXED))
    assert source.class_names == folder.class_names == CLASSES
    assert [source.class_names[label] for label in source.labels] == [image.label for image in MIXED]
    np.testing.assert_array_equal(source.sample_ids, folder.sample_ids)
    assert image_digests(source) == image_digests(folder)
    assert set_digest(source) == set_digest(folder)
    for index in range(len(MIXED)):
        np.testing.assert_array_equal(source.pixels(index), folder.pixels(index))
    rows = random.Random(0).choices(range(len(MIXED)), k=100)
    with ThreadPoolExecutor(4) as pool:  # in any order
        assert list(pool.map(source.content, rows)) == [MIXED[row].content for row in rows]


@pytest.mark.parametrize("kind", ["folder", "csv paths", *CONTAINERS])
def test_the_identity_changes_with_the_files_and_their_place_and_the_digest_with_the_files(base, kind):
    spec = write_set(kind, base, IMAGES)
    source = open_set(**spec)
    before = source.identity
    shutil.copytree(base / "set", base / "moved")
    moved = {key: value.replace("set", "moved", 1) if key in ("path", "root") else value for key, value in spec.items()}
    assert open_set(**moved).identity != before == open_set(**spec).identity
    assert set_digest(open_set(**moved)) == set_digest(source)
    files = [path for path in (base / "set").rglob("*") if path.suffix in (".png", ".tar", *(f".{e}" for e in BINARY))]
    os.utime(files[0], ns=(0, 0))
    assert open_set(**spec).identity != before
    source = open_set(**spec)
    files[0].unlink()
    assert f"{files[0]}: must be readable" in told(lambda: source.identity)


@pytest.mark.parametrize("kind", ["paths", "bytes", "id", "image.path", "shards"])
def test_names_depend_on_neither_order_nor_the_cut_into_files(base, kind):
    shuffled = random.Random(0).sample(IMAGES, len(IMAGES))
    if kind == "shards":
        write_shards(base / "whole" / "x", IMAGES, 5)
        write_shards(base / "cut" / "x", shuffled, 7)
        whole, cut = shards(base, "whole/x"), shards(base, "cut/x")
    else:
        form = "paths" if kind == "paths" else "struct"
        keys = {"paths": {"root": "images"}, "bytes": {}, "id": {"id": "name"}}.get(kind, {"id": kind})
        write_folder(base / "images", IMAGES)
        tables = {"whole.parquet": IMAGES, "cut/b.parquet": shuffled[7:], "cut/a.parquet": shuffled[:7]}
        for name, images in tables.items():
            write_table(base / name, table_of(images, form))
        whole, cut = table(base, "whole.parquet", **keys), table(base, "cut", **keys)
    assert contents(whole) == contents(cut)
    assert set_digest(whole) == set_digest(cut)


def test_equal_bytes_are_told_apart_by_class_and_count_in_any_order(base):
    same = [image._replace(content=IMAGES[0].content) for image in IMAGES[3:7]]  # one bird and three cats
    images = [*IMAGES, *same]
    write_table(base / "set.parquet", table_of(images))
    write_table(base / "other.parquet", table_of(images[::-1]))
    source = table(base)
    assert len(set(source.sample_ids.tolist())) == len(images)
    assert contents(source) == contents(table(base, "other.parquet"))
    assert {name.partition("-")[2] for name in source.listing.names} == {"", "2", "3", "4", "5"}


@pytest.mark.parametrize("kind", ["parquet bytes", "shards"])
def test_an_index_is_made_once_until_its_file_changes(base, kind):
    spec = {**write_set(kind, base, IMAGES), **({"id": None} if kind != "shards" else {})}
    names = open_set(**spec).listing.names
    entries = {path: path.stat().st_mtime_ns for path in (base / "cache").rglob("index/**/*.arrow")}
    assert len(entries) == (3 if kind == "shards" else 1)
    assert open_set(**spec).listing.names == names
    assert {path: path.stat().st_mtime_ns for path in entries} == entries
    next(iter(entries)).write_bytes(b"damaged")
    assert open_set(**spec).listing.names == names
    write_set(kind, base, [image._replace(name=f"{image.name[:-4]}x.png") for image in pictures(seed=1)])
    assert not set(open_set(**spec).listing.names) & set(names)


@pytest.mark.parametrize("kind", ["folder", "csv paths", *CONTAINERS])
def test_a_set_that_was_listed_before_is_the_same_set(base, kind):
    spec = write_set(kind, base, pictures(8))
    recipe = recipe_of({"train": {**spec, "part": [0.5, 1]}, "id_val": {**spec, "part": [0, 0.5]}})
    write_sets(recipe, base / "prepared")
    listed = open_sets(recipe, base / "prepared")
    for name, source in open_sets(recipe).items():
        mapped = listed[name]
        assert mapped.hashes() is not None
        assert contents(mapped) == contents(source)
        for what in ("name", "class_names", "identity", "groups", "skipped"):
            assert getattr(mapped, what) == getattr(source, what), what
        assert mapped.listing.home == source.listing.home
        assert [mapped.place(i) for i in range(len(mapped))] == [source.place(i) for i in range(len(source))]
        assert (mapped.pixels(3) == source.pixels(3)).all()
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"pack": "always"})})
    assert open_sets(other, base / "prepared")["train"].hashes() is None  # of another recipe


@pytest.mark.parametrize("kind", ["folder", "csv paths", *CONTAINERS])
def test_an_image_that_is_cut_off_is_told_at_its_place(base, kind):
    images = [IMAGES[0]._replace(content=IMAGES[0].content[:60]), *IMAGES[1:]]
    spec = write_set(kind, base, images)
    source = open_set(**spec)
    assert told(source.pixels, 0).startswith(f"{source.place(0)}: must be a readable image")
    at = {"shards": "000.tar: bird/0.png", "folder": "bird/0.png", "csv paths": "bird/0.png"}
    assert source.place(0).endswith(at.get(kind, ", row 1"))


@pytest.mark.parametrize("kind", [kind for kind in CONTAINERS if kind != "shards"])
def test_a_table_that_is_cut_off_is_told(base, kind):
    spec = write_set(kind, base, IMAGES)
    path = sorted(path for path in (base / "set").rglob("*") if path.suffix[1:] in BINARY)[0]
    whole = path.read_bytes()
    for left in (0, 100, 1000, -200, *((-8,) if kind == "arrow struct" else ())):
        path.write_bytes(whole[:left])
        assert f"{path}: must be a readable table, but got " in told(open_set, **spec)


@pytest.mark.parametrize("kind", ["parquet bytes", "shards"])
def test_a_container_that_changes_in_use_is_told(base, kind):
    spec = write_set(kind, base, pictures(8))
    recipe = recipe_of({"train": {**spec, "part": [0.5, 1]}, "id_val": {**spec, "part": [0, 0.5]}})
    write_sets(recipe, base / "prepared")
    mapped, directly = open_sets(recipe, base / "prepared")["train"], open_sets(recipe)["train"]
    assert mapped.identity == directly.identity
    for path in [path for path in (base / "set").rglob("*") if path.suffix in (".parquet", ".tar")]:
        shutil.copy(path, base / "copy")
        os.replace(base / "copy", path)
    for source in (mapped, directly):
        assert "must not change while a command uses it" in told(source.content, 0)


@pytest.mark.parametrize("kind", ["parquet bytes", "shards"])
def test_a_node_reads_its_own_copy_of_a_container_if_the_dates_are_those_of_the_driver(base, kind):
    spec = write_set(kind, base, pictures(8))
    recipe = recipe_of({"train": {**spec, "part": [0.5, 1]}, "id_val": {**spec, "part": [0, 0.5]}})
    write_sets(recipe, base / "prepared")
    listed, before = open_sets(recipe, base / "prepared")["train"], open_sets(recipe)["train"].identity
    for path in [path for path in (base / "set").rglob("*") if path.suffix in (".parquet", ".tar")]:
        shutil.copy2(path, base / "copy")  # another inode, and so another ctime
        os.replace(base / "copy", path)
    assert len(listed.content(0)) > 0
    assert listed.identity == before != open_sets(recipe)["train"].identity  # the next command reads it anew


# ---- roles and commands


def test_rows_of_one_table_may_have_two_roles(base):
    write_table(base / "set.parquet", table_of(IMAGES, fold=["train", "val", "test", "val"] * 3))
    spec = {"source": "table", "path": "set.parquet"}
    train, id_val, id_test = ({**spec, "where": {"fold": fold}} for fold in ("train", "val", ["test"]))
    apart = recipe_of({"train": train, "id_val": id_val, "id_test": id_test})
    assert check_roles(apart) == check_sets(apart) == []
    for other in ({"where": {"fold": ["train", "val"]}}, {}, {"where": {"label": "cat"}}, {"path": "./set.parquet"}):
        (problem,) = check_roles(recipe_of({"train": train, "id_val": {**spec, **other}}))
        assert "must not share images with data.train" in str(problem)
    high, low = ({**spec, "part": part} for part in ([0.5, 1], [0, 0.5]))
    assert check_roles(recipe_of({"train": high, "id_val": low})) == []
    (problem,) = check_roles(recipe_of({"train": high, "id_val": {**low, "id": "name"}}))
    assert "must not share images" in str(problem)


@pytest.mark.parametrize("kind", ["parquet bytes", "shards"])
def test_of_a_test_set_no_file_is_opened(base, kind):
    train, id_val = write_set(kind, base, IMAGES), write_set(kind, base, pictures(seed=1), "other")
    tests = {key: value for key, value in train.items() if key != "id"}
    name = "test.parquet" if kind != "shards" else "test.tar"
    (base / name).write_bytes(b"neither a table nor an archive")
    sets = {"train": train, "id_val": id_val}
    assert check_sets(recipe_of({**sets, "id_test": {**tests, "path": name}})) == []
    (problem,) = check_sets(recipe_of({**sets, "ood_test": {"x": {**tests, "path": "none"}}}))
    assert str(problem).startswith("data.ood_test.x: must be a file, a folder, or a pattern of files")


@pytest.mark.slow
def test_a_search_lists_each_folder_once_and_its_trials_none(base, monkeypatch):
    recipe, listed, scandir = short_training.make(base), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(str(path)) or scandir(path))
    words = ["search", recipe, "--study", "study", "--executor", "debug", "--set", "train.epochs=1"]
    assert crash_host.call([*words, "--set", "search.baselines={}"]) == 0
    found = Counter(path for path in listed if path.startswith(str(base / "images")))
    assert set(found.values()) == {1}
    assert len(list((base / "study" / "trials").glob("*/*/result.json"))) == 2


# ---- pixels of its own for each set, where archives give all files one date and one size


GREYS = {"clean": 200, "foggy": 90}


def images_of(view):
    """Three large images of one size, which differ in their middle alone."""
    names = ("cat/0.bmp", "dog/1.bmp", "dog/2.bmp")
    greys = [np.full((160, 160, 3), GREYS[shown], np.uint8) for shown in ("clean", view, "clean")]
    return [Picture(name, name[:3], encoded(grey, "BMP")) for name, grey in zip(names, greys, strict=True)]


def list_with_ids(root, view):
    """One folder of images, and two lists that give one id to two of them."""
    shown = [image._replace(name=f"{view}/{image.name}") for image in images_of(view)]
    write_folder(root, shown)
    columns = table_of(shown, "paths").set_column(2, "name", [[image.name for image in images_of(view)]])
    write_table(root / f"{view}.csv", columns)
    return {"source": "table", "path": f"{view}.csv", "root": ".", "id": "name"}


def columns(root, view):
    """One file with two images in each row."""
    shown = {each: table_of(images_of(each)).column("image") for each in GREYS}
    write_table(root / "both.parquet", table_of(images_of("clean"), **shown))
    return {"source": "table", "path": "both.parquet", "id": "name", "image": view}


def rows(root, view):
    """One file with two rows of each id."""
    tables = [table_of(images_of(each), view=[each] * 3) for each in GREYS]
    write_table(root / "both.feather", pa.concat_tables(tables))
    return {"source": "table", "path": "both.feather", "where": {"view": view}, "id": "name"}


def cifar(root, view):
    content = b"".join(bytes([label]) + bytes([GREYS[view]]) * 3072 for label in range(10))
    (root / view / "cifar-10-batches-bin").mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (root / view / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(content)
    return {"source": "benchmark", "name": "cifar10", "path": view, "split": "test"}


def with_one_date(kind, root, view):
    """Writes a set whose files all have one date."""
    if kind in (list_with_ids, columns, rows, cifar):
        spec = kind(root, view)
    else:
        spec = write_set(kind, root, images_of(view), view, ("cat", "dog"))
    for path in root.rglob("*"):
        os.utime(path, ns=(0, 0))
    return spec


OWN_KINDS = ("folder", "parquet bytes", "arrow struct", "shards", "saved", list_with_ids, columns, rows, cifar)
CACHES = {
    "decoded": lambda source, folder: image_set(source, None, "as-is", Keeping(folder)).images_NHWC[1],
    "decoded for training": lambda source, folder: DecodedSource(source, Keeping(folder)).pixels(1),
    "packed": lambda source, folder: PackedSource(source, Keeping(folder)).pixels(1),
}


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_each_set_has_its_own_pixels_in_every_cache(kind, tmp_path):
    sources = {view: open_set(**with_one_date(kind, tmp_path, view)) for view in GREYS}
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
    specs = {view: json.dumps(with_one_date("folder", tmp_path, view)) for view in GREYS}
    for view in (*GREYS, "clean"):
        spec = specs[view]
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
    here = {name: source.identity for name, source in open_sets(recipe, tmp_path / "prepared").items()}
    assert here == {name: source.identity for name, source in open_sets(recipe).items()}
    (tmp_path / "images").rename(tmp_path / "of this node")
    (tmp_path / "images").symlink_to(tmp_path / "of this node")
    assert {name: source.identity for name, source in open_sets(recipe, tmp_path / "prepared").items()} == here
    assert {name: source.identity for name, source in open_sets(recipe).items()} != here
