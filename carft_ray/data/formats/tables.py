"""Tables of images: a row per image in CSV, Parquet or Arrow files, with a path or the bytes of the image and a label.

Images stand in the order of the files and rows, so that a set is read from its beginning to its end. The stable name of
an image is the value of the column ``id``; without one its path below ``root``, or the hash of its bytes: never the
number of its row. Equal bytes in several rows get a count, by class, which names them alike in any order of the rows.
"""

import bisect
import hashlib
import itertools
import json
import os
import posixpath
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carft_ray.data.caching.index import container_stamps, kept_index
from carft_ray.data.formats.folder import file_listing
from carft_ray.data.formats.labels import named_classes, read_class_names, whole_numbers
from carft_ray.data.formats.shards import find_files, folder_of
from carft_ray.data.formats.table_rows import (
    ENDINGS,
    READ_ERRORS,
    Rows,
    is_text_format,
    open_rows,
    read_columns,
    read_schema,
)
from carft_ray.data.listing import Listing, first_repeat, normal
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.sets import ColumnSet, TableSet

KIND = "table-1"
_STEP = "A table is expected: a CSV, Parquet or Arrow file, or a folder of such files with equal columns."
_OPEN_FILES = {".parquet": 2, ".arrow": 256, ".feather": 256}  # a Parquet file keeps what it has read last

Spot = Callable[[int], str]  # index -> where the row stands, for messages
Found = TypeVar("Found")


def table_files(spec: TableSet, place: str) -> list[Path]:
    """Returns the files of a table; raises what ``find_files`` does."""
    return find_files(spec.path, ENDINGS, place, _STEP)


def list_table(spec: TableSet, files: Sequence[Path], place: str) -> Listing:
    """Lists the rows of a table."""
    return list_rows(KIND, files, spec, place)


def own_class_names(spec: ColumnSet, place: str) -> tuple[str, ...] | None:
    """Returns the class names that the recipe gives; None for none.

    Raises:
        DataError: They cannot be read.
    """
    return None if spec.class_names is None else read_class_names(spec.class_names, f"{place}.class_names")


def rows_disjoint(one: ColumnSet, other: ColumnSet) -> bool:
    """Tells whether ``where`` gives two sets of one table different rows: no value of one column in common."""
    both = one.where.keys() & other.where.keys()
    return any(not set(map(_text, one.where[name])) & set(map(_text, other.where[name])) for name in both)


def naming(spec: ColumnSet) -> tuple[str | None, ...]:
    """Returns what the names of a set's images depend on, besides its path."""
    return spec.image, spec.id, spec.root


@dataclass(frozen=True)
class _Columns:
    """Which column is what. ``has_paths``: images are given by paths, not by bytes."""

    image: str
    label: str
    has_paths: bool
    class_names: tuple[str, ...] | None  # as the file itself names them


def list_rows(kind: str, files: Sequence[Path], spec: ColumnSet, place: str) -> Listing:
    """Lists the rows of files with equal columns.

    Args:
        kind: Reader and its version.
        files: The files, in order; at least one.
        spec: The set: columns, rows, class names.
        place: Where the set is named, for the problems.

    Raises:
        DataError: Files, columns, labels or names are not what they must be.
    """
    home, root = os.path.realpath(spec.path), folder_of(spec.path) if spec.root is None else Path(spec.root)
    columns = _columns(files, spec, place)
    names = own_class_names(spec, place) or columns.class_names
    wanted = [columns.label, *spec.where]
    wanted += [columns.image] if columns.has_paths else []
    wanted += [] if spec.id is None else [spec.id]
    parts = [_read(lambda path: read_columns(path, wanted), file) for file in files]
    starts = [0, *itertools.accumulate(len(part) for part in parts)]
    values = {name: [value for part in parts for value in part.column(name).to_pylist()] for name in wanted}
    chosen = _where(values, spec, place, starts[-1])

    def at(index: int) -> tuple[int, int]:
        number = bisect.bisect_right(starts, chosen[index]) - 1
        return number, chosen[index] - starts[number]

    def spot(index: int) -> str:
        number, row = at(index)
        return f"{files[number].name}, row {row + 1}"

    def of(name: str) -> Sequence[Any]:
        return [values[name][position] for position in chosen]

    labels = whole_numbers(of(columns.label)) if is_text_format(files[0]) else of(columns.label)
    classes, found, problems = named_classes(labels, names, spot, place)
    paths, more = _paths(of(columns.image), root, spot, place) if columns.has_paths else ([], [])
    problems += more
    if spec.id is not None:
        ids, more = _ids(of(spec.id), spot, place)
        problems += more
    if problems:
        raise DataError(problems)
    if spec.id is None and columns.has_paths:
        ids = paths
    elif spec.id is None:
        hashes = _hash_names(files, columns.image, values[columns.label])
        ids = [hashes[position] for position in chosen]
    if doubled := _doubled(ids, spot, place):
        raise DataError(doubled)
    if columns.has_paths:
        return file_listing(kind, root, ids, classes, found, files=paths)
    rows, stamps = _Images(files, columns.image), container_stamps(files)
    return Listing(
        kind=kind,
        home=home,
        names=ids,
        classes=classes,
        found=found,
        read=lambda index: rows.content(*at(index)),
        stamp=lambda index: stamps(at(index)[0]),
        place=lambda index: rows.place(*at(index)),
        in_order=files[0].suffix.lower() == ".parquet",
    )


class _Images:
    """The images of files with a column of bytes. Threads may share it."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        self._files, self._column = files, column
        self._open: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def place(self, number: int, row: int) -> str:
        return f"{self._files[number]}, row {row + 1}"

    def content(self, number: int, row: int) -> bytes:
        try:
            value = self._rows(number).value(row)
        except READ_ERRORS as error:
            raise DataError(_unreadable(self.place(number, row), error)) from error
        content = _bytes(value)
        if content is None:
            raise DataError(_no_bytes(self.place(number, row)))
        return content

    def _rows(self, number: int) -> Rows:
        with self._lock:
            if number not in self._open:
                self._open[number] = open_rows(self._files[number], self._column)
                while len(self._open) > _OPEN_FILES[self._files[number].suffix.lower()]:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


def _columns(files: Sequence[Path], spec: ColumnSet, place: str) -> _Columns:
    """Finds the columns of a set, and that all files have them alike.

    Raises:
        DataError: A column is missing, of another type in another file, or of a type that cannot be.
    """
    schemas = [_read(read_schema, file) for file in files]
    schema, features = schemas[0], _features(schemas[0])
    there = tuple(schema.names)
    if len(set(there)) < len(there):
        twice = next(name for name in there if there.count(name) > 1)
        raise DataError(Problem(f"{place}: {files[0]}", "no two columns may have one name", repr(twice)))
    given = {"image": spec.image, "label": spec.label}
    if spec.image is None:
        given["image"] = _only("image", there, [name for name in there if _is_image(schema.field(name), features)])
    if spec.label is None:
        given["label"] = _only("label", there, [name for name in there if _class_label(name, features) is not None])
    problems = []
    for key, name in [*given.items(), ("id", spec.id), *(("where", name) for name in spec.where)]:
        if name is None and key != "id":
            rule = f"must be said: which column of {files[0].name} holds the {key}s is not clear"
            problems.append(Problem(f"{place}.{key}", rule, allowed=there))
        elif name is not None and _type(schema, name) is None:
            rule = f"must be a column of {files[0].name}"
            problems.append(Problem(f"{place}.{key}", rule, repr(name), there, nearest(name, there)))
        elif name is not None and (rule := _type_rule(key, _type(schema, name))):
            problems.append(Problem(f"{place}.{key}: column {name}", rule, str(_type(schema, name))))
    image, label = given["image"], given["label"]
    if spec.root is not None and image is not None and _kind(_type(schema, image)) == "bytes":
        problems.append(Problem(f"{place}.root", f"must be left out: the column {image} holds bytes, not paths"))
    if problems or image is None or label is None:
        raise DataError(problems)
    used = [image, label, *spec.where, *([] if spec.id is None else [spec.id])]
    for file, other in zip(files, schemas, strict=True):
        for name in used:
            if _kind(_type(other, name)) != _kind(_type(schema, name)):
                rule = (
                    f"all files of a table must have equal columns: {name} is {_type(schema, name)} in {files[0].name}"
                )
                value = "no such column" if _type(other, name) is None else str(_type(other, name))
                raise DataError(Problem(f"{place}: {file}", rule, value))
    return _Columns(image, label, _kind(_type(schema, image)) == "text", _class_label(label, features))


def _only(name: str, there: Sequence[str], candidates: Sequence[str]) -> str | None:
    """Returns the column of this name, or the one column that can be meant."""
    return name if name in there else candidates[0] if len(candidates) == 1 else None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Returns what ``datasets`` has noted of the columns."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _class_label(name: str, features: dict[str, Any]) -> tuple[str, ...] | None:
    feature = features.get(name)
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _is_image(field: pa.Field, features: dict[str, Any]) -> bool:
    feature = features.get(field.name)
    noted = isinstance(feature, dict) and feature.get("_type") == "Image"
    return noted or _kind(field.type) == "bytes"


def _type(schema: pa.Schema, name: str) -> Any:
    """Returns the type of a column or of ``COLUMN.FIELD``, None where there is none."""
    if name in schema.names:
        return schema.field(schema.names.index(name)).type
    column, _, field = name.partition(".")
    inner = schema.field(schema.names.index(column)).type if column in schema.names else None
    if inner is None or not pa.types.is_struct(inner) or inner.get_field_index(field) < 0:
        return None
    return inner.field(inner.get_field_index(field)).type


def _kind(kind: Any) -> str:
    """Returns what a column holds: text, number, flag, bytes (in a struct too), or its type."""
    types = pa.types
    if kind is None:
        return ""
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _kind(kind.field(kind.get_field_index("bytes")).type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "bytes"
    return "number" if types.is_integer(kind) else "flag" if types.is_boolean(kind) else str(kind)


def _type_rule(key: str, kind: Any) -> str:
    """Returns the rule that a column's type breaks, '' for none."""
    kinds, rule = {
        "image": (("text", "bytes"), "must hold paths, or the bytes of image files"),
        "label": (("text", "number"), "must hold texts or whole numbers"),
        "id": (("text", "number"), "must hold texts or whole numbers"),
        "where": (("text", "number", "flag"), "must hold texts, whole numbers, or true and false"),
    }[key]
    return "" if _kind(kind) in kinds else rule


def _where(values: dict[str, list[Any]], spec: ColumnSet, place: str, num_rows: int) -> Sequence[int]:
    """Returns the positions of the rows that belong to a set.

    Raises:
        DataError: There is none, or a value stands in no row.
    """
    if not num_rows:
        raise DataError(Problem(place, "a table must have a row", "none"))
    chosen: Sequence[int] = range(num_rows)
    problems = []
    for name, wanted in spec.where.items():
        texts = list(map(_text, values[name]))
        there = tuple(sorted(set(texts)))
        for value in wanted:
            if _text(value) not in there:
                rule = f"must be a value of the column {name}"
                near = nearest(_text(value), there)
                problems.append(Problem(f"{place}.where.{name}", rule, repr(_text(value)), there, near))
        taken = set(map(_text, wanted))
        chosen = [position for position in chosen if texts[position] in taken]
    if not problems and not chosen:
        problems = [Problem(f"{place}.where", f"there must be a row of {num_rows} for which it holds", "none")]
    if problems:
        raise DataError(problems)
    return chosen


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _paths(written: Sequence[Any], root: Path, spot: Spot, place: str) -> tuple[list[str], list[Problem]]:
    """Returns the paths of images below ``root``, in one form.

    An absolute path is taken where it lies inside the root; what leads out of it is refused: a name of an image must be
    the same on every machine.
    """
    found = [_below(path, root) for path in written]
    problems = []
    if outside := [index for index, path in enumerate(found) if path is None]:
        first = written[outside[0]]
        value = f"{'no path' if not first else repr(first)} in {spot(outside[0])}{_more(outside)}"
        step = "Give the folder that holds all images as root."
        rule = f"must be the path of a file inside {root}"
        problems.append(Problem(f"{place}.image", rule, value, next_step=step))
    paths = [path or "" for path in found]
    if not problems and (missing := _missing(paths, root)):
        rule = f"every image must be a file of {root}"
        step = "Restore the files, or give another folder as root."
        value = f"no {paths[missing[0]]!r}, which {spot(missing[0])} names{_more(missing)}"
        problems.append(Problem(f"{place}.image", rule, value, next_step=step))
    return paths, problems


def _below(path: str | None, root: Path) -> str | None:
    if not path:
        return None
    if path.startswith("/"):
        base = posixpath.normpath(str(root)).rstrip("/") + "/"
        path = posixpath.normpath(path)
        if not path.startswith(base):
            return None
        path = path[len(base) :]
    path = posixpath.normpath(path)
    return None if path in (".", "..") or path.startswith("../") or "\0" in path else path


def _missing(paths: Sequence[str], root: Path) -> list[int]:
    """Returns the indices of paths that are no files. A folder is read once: quicker than asking for each file."""
    there: dict[str, frozenset[str]] = {}
    missing = []
    for index, path in enumerate(paths):
        folder, name = posixpath.split(path)
        if folder not in there:
            try:
                there[folder] = frozenset(os.listdir(root / folder))
            except OSError:
                there[folder] = frozenset()
        if name not in there[folder] and not os.path.isfile(root / path):
            missing.append(index)
    return missing


def _ids(values: Sequence[Any], spot: Spot, place: str) -> tuple[list[str], list[Problem]]:
    if empty := [index for index, value in enumerate(values) if value is None or value == ""]:
        value = f"none in {spot(empty[0])}{_more(empty)}"
        return [], [Problem(f"{place}.id", "every image must have a name", value)]
    return list(map(str, values)), []


def _doubled(names: Sequence[str], spot: Spot, place: str) -> list[Problem]:
    if (pair := first_repeat(names)) is None:
        return []
    value = f"{normal(names[pair[0]])!r} in {spot(pair[0])} and {spot(pair[1])}"
    step = "Leave one of the rows out, or name with id a column whose values differ."
    return [Problem(place, "the names of two images must differ", value, next_step=step)]


def _hash_names(files: Sequence[Path], column: str, labels: Sequence[Any]) -> list[str]:
    """Returns a name for every row: the hash of its bytes, with a count where rows hold the same.

    Raises:
        DataError: A file cannot be read, or a row has no bytes.
    """
    digests: list[str] = []
    for file in files:
        digests += _read(lambda path: _kept_digests(path, column), file)
    same: defaultdict[str, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        same[digest].append(position)
    for digest, positions in same.items():
        positions.sort(key=lambda position: str(labels[position]))
        for count, position in enumerate(positions[1:], start=2):
            digests[position] = f"{digest}-{count}"
    return digests


def _kept_digests(file: Path, column: str) -> list[str]:
    found = kept_index(file, f"digests {column}", lambda: _digests(file, column))
    digests: list[str] = found.column("digest").to_pylist()
    return digests


def _digests(file: Path, column: str) -> pa.Table:
    rows = open_rows(file, column)
    digests = []
    for row in range(len(rows)):
        content = _bytes(rows.value(row))
        if content is None:
            raise DataError(_no_bytes(f"{file}, row {row + 1}"))
        digests.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return pa.table({"digest": pa.array(digests, pa.string())})


def _bytes(value: Any) -> bytes | None:
    content: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return content


def _no_bytes(place: str) -> Problem:
    step = "Write the table with the bytes of every image, or name a column with paths."
    return Problem(place, "every row must hold the bytes of an image", "none", next_step=step)


def _read(read: Callable[[Path], Found], file: Path) -> Found:
    """Calls a function that reads a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return read(file)
    except READ_ERRORS as error:
        raise DataError(_unreadable(str(file), error)) from error


def _unreadable(place: str, error: BaseException) -> Problem:
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().split("\n")[0]
    return Problem(place, "must be a readable table", cause or type(error).__name__)


def _more(wrong: Sequence[int]) -> str:
    return f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
