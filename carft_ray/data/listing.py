"""Stored images: what a set's reader finds, and the source that is made of it.

A reader (``data/sets.py``) lists a set without opening an image: a table with a stable name, a class and a place
per image. Reading them is the same for every kind of set and stands here; ``selection.py`` says which
belong to a set.
"""

import hashlib
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from carft_ray.data.decode_images import FORMS, MOST_BYTES, read_bytes, unreadable
from carft_ray.data.file_index import checked_stamp, container_stamp, file_stamp, of_any_copy
from carft_ray.data.source import IdArray, IntArray, PixelArray
from carft_ray.data.table_rows import ArrowRows, ParquetRows, open_rows, read_row, reading_table
from carft_ray.errors import DataError, Problem
from carft_ray.recipe.schema.data import MAX_PIXELS
from carft_ray.untrusted import open_regular

_TABLE = pa.schema(
    {
        "name": pa.large_string(),
        "id": pa.uint64(),
        "class": pa.dictionary(pa.int32(), pa.string()),  # pyarrow 21 makes none of large_string
        "path": pa.large_string(),
        "at": pa.int64(),
        "size": pa.int64(),
    }
)


def image_table(
    names: Sequence[str],
    classes: Sequence[str],
    paths: Sequence[str],
    home: str,
    at: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
) -> pa.Table:
    """Returns the table of a listing; arguments are its columns, [N], and the place of the set for messages.

    Raises:
        DataError: A name is no text.
    """
    if problems := text_problems((*names, *paths), home):
        raise DataError(problems)
    whole = np.full(len(names), -1)
    ids = np.array([sample_id(name) for name in names], np.uint64)
    columns = [names, ids, classes, paths, whole if at is None else at, whole if sizes is None else sizes]
    return pa.table([pa.array(column, kind.type) for column, kind in zip(columns, _TABLE, strict=True)], _TABLE)


@dataclass(frozen=True, eq=False)
class Listing:
    """What a reader finds, without opening an image: a table that can be stored, and how its rows are read.

    Attributes:
        kind: Reader and its version; begins the identity.
        home: Where the images are, a resolved path.
        table: A row per image, in the order of the set. ``name``: stable; sample ids (``id``) are hashes of names, so
            a name must depend on neither machine nor place: a relative path with '/', or a key. ``class``. ``path``:
            the file, from ``root``. ``at``: where the image is in the file, negative where it is the whole file; a
            row, where there is a ``column``, else a number of bytes, of which it has ``size``.
        found: All classes of the set in its own label order, also those without images.
        root: The folder that paths count from, as the recipe writes it.
        column: Column with the images in files that are tables.
        form: How images are decoded, of ``images.FORMS``.
        within: Class of the set -> the classes of the class list that stand for it, where the set has a class list of
            its own: its images are told apart between its classes only, and a class scores the largest of its logits.
        is_sparse: Whether classes of the set may be without images, which are told apart between all of them.
        in_order: Whether images are read quickly in their order alone.
        excluded: Sample ids that belong to no set made of the listing (``exclude`` of the recipe), uint64 [K].
        passed_over: How many entries of its folders are no images of the set, by what they are.
        lost: Names of links to images that are not there.
        stamps: ``file_stamp`` of each file that was asked for; of a file of many images ``container_stamp``, as
            ``of_any_copy`` where another process has listed it.
    """

    kind: str
    home: str
    table: pa.Table = field(default_factory=_TABLE.empty_table)
    found: tuple[str, ...] = ()
    root: str = ""
    column: str = ""
    form: str = "file"
    within: Mapping[str, tuple[str, ...]] | None = None
    is_sparse: bool = False
    in_order: bool = False
    excluded: IdArray = field(default_factory=lambda: np.empty(0, np.uint64))
    passed_over: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    stamps: dict[str, str] = field(default_factory=dict)
    _unchanged: set[str] = field(default_factory=set, init=False)  # files of many images that were compared with it
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __len__(self) -> int:
        """Returns N."""
        return int(self.table.num_rows)

    @property
    def names(self) -> list[str]:
        """Stable name of every image, [N]."""
        return list(self.table["name"].to_pylist())

    @cached_property
    def classes(self) -> list[str]:
        """Class of every image, [N]."""
        column = self.table["class"].combine_chunks()
        words = column.dictionary.to_pylist()
        return [words[index] for index in column.indices.to_pylist()]

    @cached_property
    def ids(self) -> IdArray:
        """``sample_id`` of every image, uint64 [N]."""
        return np.asarray(self.table["id"].to_numpy())

    @cached_property
    def _at(self) -> IntArray:
        return np.asarray(self.table["at"].to_numpy())

    @property
    def are_files(self) -> bool:
        """Whether each image is a file of its own."""
        return not len(self) or bool(self._at[0] < 0)

    def stamp(self, path: str) -> str:
        """Returns a text that changes when a file of the table may have changed, cheaply: taken once.

        Raises:
            DataError: It has vanished.
        """
        if path not in self.stamps:
            how = file_stamp if self.are_files else container_stamp
            self.stamps[path] = checked_stamp(Path(self.root, path), how)
        return self.stamps[path]

    def place(self, row: int) -> str:
        """Returns the name of an image for messages."""
        path = os.path.join(self.root, self.table["path"][row].as_py())  # quicker than of a Path
        if self._at[row] < 0:
            return path
        return f"{path}, row {self._at[row] + 1}" if self.column else f"{path}: {self.table['name'][row].as_py()}"

    def read(self, row: int) -> bytes:
        """Returns the bytes of an image. Threads may read at once.

        Raises:
            DataError: It cannot be read, or its file of many images is not the one that was listed.
        """
        path, at, place = self.table["path"][row].as_py(), int(self._at[row]), self.place(row)
        if at < 0:
            return read_bytes(place)
        rows = self._opened(path)
        if rows is not None:
            return read_row(rows, at, place)
        size = self.table["size"][row].as_py()
        if size > MOST_BYTES:
            raise DataError(Problem(place, f"an image must have at most {MOST_BYTES:,} bytes", f"{size:,}"))
        try:
            with open_regular(os.path.join(self.root, path)) as file:
                file.seek(at)
                content = file.read(size)
        except OSError as error:
            raise DataError(unreadable(place, error)) from error
        if len(content) < size:
            raise DataError(Problem(place, "must contain the whole image", "a file that is cut off"))
        return content

    def _opened(self, path: str) -> ParquetRows | ArrowRows | None:
        """Opens a file of many images, where it is a table, after a look whether it is as it was."""
        with self._lock:  # no two threads open one file
            if path not in self._unchanged:
                now = checked_stamp(Path(self.root, path), container_stamp)
                if not self.stamps.setdefault(path, now).startswith(of_any_copy(now)):
                    rule = "must not change while a command uses it"
                    raise DataError(Problem(os.path.join(self.root, path), rule, next_step="Run the command again."))
                self._unchanged.add(path)
            return self._open_table(path) if self.column else None

    @cached_property
    def _open_table(self) -> Callable[[str], ParquetRows | ArrowRows]:
        """Opens tables; each Parquet file that is open keeps what it has read last."""
        return lru_cache(2 if self.in_order else 256)(partial(_open_table, self.root, self.column))


def _open_table(root: str, column: str, path: str) -> ParquetRows | ArrowRows:
    with reading_table(os.path.join(root, path)):
        return open_rows(Path(root, path), column)


@dataclass(frozen=True, eq=False)
class StoredSource:
    """The ``Source`` of some images of a listing.

    Attributes:
        name: Role or name of the set, for messages.
        listing: What the reader found.
        rows: Positions in the listing, int64 [N].
        class_names: The class list.
        labels: Label of every image, int64 [N].
        groups: See ``ImageSet``.
        skipped: Names of images that were left out because they cannot be decoded.
        selection: Positions of part and shots in the listing, of which ``rows`` are those that were not left out.
        max_pixels: Of an image; see the recipe.
        listed_as: The identity of a set that was listed before, by another process perhaps.
    """

    name: str
    listing: Listing
    rows: IntArray
    class_names: tuple[str, ...]
    labels: IntArray
    groups: tuple[tuple[int, ...], ...] | None = None
    skipped: tuple[str, ...] = ()
    selection: IntArray | None = None
    max_pixels: int = MAX_PIXELS
    listed_as: str = ""

    @cached_property
    def sample_ids(self) -> IdArray:
        """Stable ids, uint64 [N]."""
        return self.listing.ids[self.rows]

    @cached_property
    def identity(self) -> str:
        """Hash of the place of the set, of names, places in their files, stamps, labels and groups.

        Raises:
            DataError: A file has vanished.
        """
        if self.listed_as:
            return self.listed_as
        digest = hashlib.blake2b(f"{self.listing.home}\0{self.listing.column}\0".encode(), digest_size=16)
        table = self.listing.table.take(pa.array(self.rows))
        columns = (table[name].to_pylist() for name in ("name", "path", "at"))
        for name, path, at, label in zip(*columns, self.labels.tolist(), strict=True):
            digest.update(f"{normal(name)}\0{path}\0{at}\0{self.listing.stamp(path)}\0{label}\n".encode())
        if self.groups is not None:
            digest.update(repr(self.groups).encode())
        return f"{self.listing.kind}/{digest.hexdigest()}"

    def hashes(self) -> list[bytes] | None:
        """Returns the hash of every file, in order, where the set was listed before; else None."""
        return list(self.listing.table["digest"].to_pylist()) if self.listed_as else None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.rows)

    def place(self, index: int) -> str:
        """Returns the name of image ``index`` for messages."""
        return self.listing.place(int(self.rows[index]))

    def content(self, index: int) -> bytes:
        """Returns the bytes of image ``index``.

        Raises:
            DataError: The image cannot be read.
        """
        return self.listing.read(int(self.rows[index]))

    def pixels(self, index: int) -> PixelArray:
        """Returns image ``index`` as RGB, uint8 [H, W, 3].

        Raises:
            DataError: The image cannot be read.
        """
        return self.decoded(self.content(index), index)[0]

    def decoded(self, content: bytes, index: int) -> tuple[PixelArray, str]:
        """Returns image ``index`` as RGB, uint8 [H, W, 3], from its bytes, and Pillow's mode of the file.

        Raises:
            DataError: They are no image.
        """
        return FORMS[self.listing.form](content, self.place(index), self.max_pixels)

    def without(self, unwanted: Sequence[int]) -> "StoredSource":
        """Returns the source without the images at these indices, which it names as skipped."""
        kept = np.setdiff1d(np.arange(len(self)), np.asarray(unwanted, np.int64))
        names = tuple(self.place(index) for index in unwanted)
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], skipped=(*self.skipped, *names))


def selection(source: StoredSource) -> StoredSource:
    """Returns all images of the part and shots of a set, also those that were left out of it, and without classes.

    Its identity is that of the files alone.
    """
    rows = source.rows if source.selection is None else source.selection
    if rows is source.rows and not source.class_names:
        return source  # it may know its identity
    return StoredSource(
        source.name, source.listing, rows, (), np.zeros(len(rows), np.int64), max_pixels=source.max_pixels
    )


def sample_id(name: str) -> int:
    """Returns the stable id of an image: the first 8 bytes (little-endian) of BLAKE2b of its name.

    The name is normalised (NFC) first, since file systems differ in how they spell accents.
    """
    return int.from_bytes(hashlib.blake2b(normal(name).encode()).digest()[:8], "little")


def normal(name: str) -> str:
    """Returns a name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def text_problems(names: Iterable[str], place: str) -> list[Problem]:
    """Returns a problem for names that are no text: what a system gives for one that is not UTF-8.

    They could be listed and read, but stand in no table, page or recipe.
    """
    wrong = [
        name for name in names if not name.isascii() and any("\ud800" <= character < "\ue000" for character in name)
    ]
    if not wrong:
        return []
    rule = "names of files and folders must be UTF-8"
    step = "Rename them, such as with: convmv -f latin1 -t utf8 -r --notest FOLDER."
    return [Problem(place, rule, f"{os.fsencode(wrong[0])!r}{and_more(wrong)}", next_step=step)]


def and_more(wrong: Sized) -> str:
    """Returns how many others there are of what is wrong, behind the one that a message names."""
    return f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
