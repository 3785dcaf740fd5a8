"""The sets of a study as the driver has listed them: what trials, ranks and other nodes map instead of listing trees.

``write_sets`` lists and stats each file once, in the driver, and keeps ids, labels, places and hashes of the files in
``sets/`` of the folder of the preparation: an Arrow file per set of training and validation. ``open_sets`` maps them.
A file that changes while a command runs is noticed by the next command, which lists again; one of many images at once.

Shape letters: N images of a set.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray.data.cache import cache_dir
from carft_ray.data.corruptions import CorruptedSource
from carft_ray.data.file_index import open_table, write_table
from carft_ray.data.listing import Listing, StoredSource
from carft_ray.data.open_source import open_source
from carft_ray.data.readers import listing_once
from carft_ray.data.records import records
from carft_ray.data.source import DIGEST_BYTES, Source
from carft_ray.layout import SETS
from carft_ray.recipe.schema.data import CorruptedSet, SetSpec, StoredSet, plain
from carft_ray.recipe.schema.recipe import Recipe

FORMAT_VERSION = 3
TRAIN, ID_VAL = "train", "id_val"
_LABEL, _DIGEST = pa.field("label", pa.int64()), pa.field("digest", pa.binary(DIGEST_BYTES))
_SET = ("name", "class_names", "groups", "skipped", "max_pixels")  # attributes that are kept of a source,
_LISTING = ("kind", "home", "root", "column", "planes", "frame", "in_order")  # and of its listing


def write_sets(recipe: Recipe, folder: Path) -> None:
    """Lists the sets of training and validation, and keeps what was found in a folder.

    Files that no command has read yet are read now, for their hashes (``data.records``). Sets that the sandbox draws
    are not kept: they are not listed.

    Args:
        recipe: The recipe, without the images that are left out (``without_shared``).
        folder: Of the preparation.

    Raises:
        DataError: A set cannot be opened, or a file not be read.
        StorageError: The folder or the cache cannot be written.
    """
    for name, source in open_sets(recipe).items():
        images = source.images if isinstance(source, CorruptedSource) else source
        if isinstance(images, StoredSource):
            digests = records(images, cache_dir(recipe)).hashes()
            write_table(folder / SETS / f"{name}.arrow", _table(images, digests, _key(recipe, name)))


def open_sets(recipe: Recipe, folder: Path | None = None) -> dict[str, Source]:
    """Returns the sets of training and validation: ``train``, ``id_val``, then the OOD sets by name.

    Args:
        recipe: The recipe.
        folder: Of a preparation whose sets are taken without listing them; None: they are listed now.

    Raises:
        DataError: A set cannot be opened.
    """
    specs = {TRAIN: recipe.data.train, ID_VAL: recipe.data.id_val, **recipe.data.ood_val}
    with listing_once():
        classes = recipe.data.classes
        sources: dict[str, Source] = {}
        for name, spec in specs.items():
            kept = None if folder is None else _read(recipe, folder, name, spec)
            sources[name] = kept or open_source(spec, name, classes, cache_dir(recipe))
            classes = sources[TRAIN].class_names  # of training first
    return sources


def _key(recipe: Recipe, name: str) -> str:
    """Returns what the listing of a set depends on besides its files."""
    return json.dumps([FORMAT_VERSION, name, recipe.data.model_dump(mode="json")])


def _table(source: StoredSource, digests: list[bytes], key: str) -> pa.Table:
    """Returns the rows of a set with labels and hashes; the metadata has all else that is known of it."""
    listing = source.listing
    of_set = {name: getattr(source, name) for name in _SET} | {"listed_as": source.identity}
    of_listing = {name: getattr(listing, name) for name in _LISTING}
    of_listing["stamps"] = {} if listing.are_files else listing.stamps
    table = listing.table.take(pa.array(source.rows)).drop_columns("class")
    table = table.append_column(_LABEL, pa.array(source.labels)).append_column(_DIGEST, pa.array(digests, _DIGEST.type))
    return table.replace_schema_metadata({"about": json.dumps({"key": key, "set": of_set, "listing": of_listing})})


def _read(recipe: Recipe, folder: Path, name: str, spec: SetSpec) -> Source | None:
    """Returns a set that was kept; None where there is none, or it is of another recipe.

    ``write_sets`` keeps none that the sandbox draws: a file of that name in a study of others is not believed.
    """
    table = open_table(folder / SETS / f"{name}.arrow") if isinstance(plain(spec), StoredSet) else None
    if table is None:
        return None
    about: dict[str, Any] = json.loads(table.schema.metadata[b"about"])
    if about["key"] != _key(recipe, name):
        return None
    listing, of_set = Listing(table=table, **about["listing"]), about["set"]
    groups = None if of_set["groups"] is None else tuple(map(tuple, of_set["groups"]))
    of_set |= {"groups": groups, "class_names": tuple(of_set["class_names"]), "skipped": tuple(of_set["skipped"])}
    listed = StoredSource(
        listing=listing, rows=np.arange(len(table), dtype=np.int64), labels=table["label"].to_numpy(), **of_set
    )
    return CorruptedSource(listed, spec) if isinstance(spec, CorruptedSet) else listed
