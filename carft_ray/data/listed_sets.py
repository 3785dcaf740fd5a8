"""The sets of a study as the driver has listed them: what trials, ranks and other nodes map instead of listing trees.

``write_sets`` lists and stats each file once, in the driver, and keeps ids, labels, places and hashes of the files in
``sets/`` of the folder of the preparation: an Arrow file per set of training and validation. ``open_sets`` maps them.
A file that changes while a command runs is noticed by the next command, which lists again.

Shape letters: N images of a set.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from carft_ray.data.caching.index import open_table, required, write_table
from carft_ray.data.content import DIGEST_BYTES
from carft_ray.data.images import decode_image, read_bytes
from carft_ray.data.listing import StoredSource
from carft_ray.data.readers import listing_once
from carft_ray.data.records import records
from carft_ray.data.sets import cache_dir, open_source
from carft_ray.data.source import IdArray, IntArray, PixelArray, Source
from carft_ray.data.synthetic.corrupted import CorruptedSource
from carft_ray.errors import DataError, Problem
from carft_ray.layout import SETS
from carft_ray.recipe.schema import Recipe
from carft_ray.recipe.sets import CorruptedSet, SetSpec, plain

FORMAT_VERSION = 2
TRAIN, ID_VAL = "train", "id_val"

_SCHEMA = pa.schema(
    required(sample_id=pa.uint64(), label=pa.int64(), place=pa.large_binary(), digest=pa.binary(DIGEST_BYTES))
)


@dataclass(frozen=True, eq=False)
class ListedSource:
    """The ``Source`` of a set that was listed before, by another process perhaps.

    Attributes:
        name: Role or name of the set, for messages.
        class_names: The class list.
        fingerprint: As it was when the set was listed.
        groups: See ``ImageSet``.
        home: Where the images are.
        in_order: See ``Listing``.
        are_files: Whether each image is a file of its own; its place is the path then.
        max_pixels: Of an image; see the recipe.
        num_skipped: Images that were left out because they cannot be decoded.
        labels: Label of every image, int64 [N].
        sample_ids: Stable ids, uint64 [N].
        table: Columns ``sample_id``, ``label``, ``place``, ``digest`` (of the file's bytes).
        open_again: Lists the set again: for images that are no files of their own.
    """

    name: str
    class_names: tuple[str, ...]
    fingerprint: str
    groups: tuple[tuple[int, ...], ...] | None
    home: str
    in_order: bool
    are_files: bool
    max_pixels: int
    num_skipped: int
    labels: IntArray
    sample_ids: IdArray
    table: pa.Table
    open_again: Callable[[], Source]

    @cached_property
    def _images(self) -> StoredSource:
        source = self.open_again()
        if source.fingerprint != self.fingerprint or not isinstance(source, StoredSource):
            rule = "must not change while a command uses it"
            raise DataError(Problem(self.home, rule, next_step="Run the command again."))
        return source

    def __len__(self) -> int:
        """Returns N."""
        return len(self.table)

    def hashes(self) -> list[bytes]:
        """Returns the hash of every file, in order."""
        return list(self.table["digest"].to_pylist())

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return os.fsdecode(self.table["place"][index].as_py())

    def content(self, index: int) -> bytes:
        """Returns the bytes of image ``index``.

        Raises:
            DataError: The image cannot be read, or the set has changed.
        """
        return read_bytes(self.place(index)) if self.are_files else self._images.content(index)

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image cannot be read, or the set has changed.
        """
        return self.decode(self.content(index), index)

    def decode(self, content: bytes, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3], from its bytes.

        Raises:
            DataError: They are no image.
        """
        if not self.are_files:
            return self._images.decode(content, index)
        return decode_image(content, self.place(index), self.max_pixels)


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
    names = ("name", "class_names", "fingerprint", "groups", "home", "in_order", "max_pixels", "num_skipped")
    about = {"key": key, "are_files": source.listing.are_files, **{name: getattr(source, name) for name in names}}
    places = [os.fsencode(source.place(index)) for index in range(len(source))]
    columns = [source.sample_ids, source.labels, places, digests]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pa.table(arrays, schema=_SCHEMA.with_metadata({"about": json.dumps(about)}))


def _read(recipe: Recipe, folder: Path, name: str, spec: SetSpec) -> Source | None:
    """Returns a set that was kept; None where there is none, or it is of another recipe."""
    table = open_table(folder / SETS / f"{name}.arrow")
    if table is None:
        return None
    about: dict[str, Any] = json.loads(table.schema.metadata[b"about"])
    if about.pop("key") != _key(recipe, name):
        return None
    classes, groups = tuple(about["class_names"]), about["groups"]
    about |= {"class_names": classes, "groups": None if groups is None else tuple(map(tuple, groups))}
    open_again = partial(open_source, plain(spec), name, classes, cache_dir(recipe))
    labels, ids = table["label"].to_numpy(), table["sample_id"].to_numpy()
    listed = ListedSource(**about, labels=labels, sample_ids=ids, table=table, open_again=open_again)
    return CorruptedSource(listed, spec) if isinstance(spec, CorruptedSet) else listed
