"""Tables of images: a row per image in CSV, Parquet or Arrow files, with a path or the bytes of the image and a label.

Images stand in the order of the files and rows, so that a set is read from its beginning to its end. The stable name of
an image is the value of the column ``id``; without one its path below ``root``, or the hash of its bytes: never the
number of its row. Equal bytes in several rows get a count, by class, which names them alike in any order of the rows.
"""

import functools
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carft_ray.data.decode_images import read_bytes
from carft_ray.data.file_index import kept_index
from carft_ray.data.formats.folder import (
    NAMES_STEP,
    check_names,
    file_listing,
    missing_files,
    named_classes,
    read_class_names,
    whole_numbers,
)
from carft_ray.data.formats.webdataset import find_files, folder_of
from carft_ray.data.listing import Listing, and_more, image_table
from carft_ray.data.source import Unlabelled, image_digest, refused
from carft_ray.data.table_rows import (
    ENDINGS,
    extension_in,
    is_text_format,
    open_rows,
    read_columns,
    read_row,
    read_schema,
    reading_table,
    split_name,
)
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import ColumnSet, TableSet
from carft_ray.untrusted import parse_json

KIND = "table-1"
_STEP = "Expected: a CSV, Parquet or Arrow file, or a folder of such files with equal columns."

Spot = Callable[[int], str]  # index -> where the row stands, for messages
Found = TypeVar("Found")


def table_files(spec: TableSet, place: str) -> list[Path]:
    """Returns the files of a table; raises what ``find_files`` does."""
    return find_files(spec.path, ENDINGS, place, _STEP)


def own_class_names(spec: ColumnSet, place: str) -> tuple[str, ...] | None:
    """Returns the class names that the recipe gives; None for none.

    Raises:
        DataError: They cannot be read.
    """
    return read_class_names(spec.class_names, f"{place}.class_names")


def rows_disjoint(one: ColumnSet, other: ColumnSet) -> bool:
    """Returns whether ``where`` gives two sets of one table different rows: no value of one column in common."""
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


def list_rows(spec: ColumnSet, files: Sequence[Path], place: str, kind: str = KIND) -> Listing:
    """Lists the rows of files with equal columns.

    Args:
        spec: The set: columns, rows, class names.
        files: The files, in order; at least one.
        place: Where the set is named, for the problems.
        kind: Reader and its version.

    Raises:
        DataError: Files, columns, labels or names are not what they must be.
    """
    root = folder_of(spec.path) if spec.root is None else Path(spec.root)
    columns = _columns(files, spec, place)
    names = own_class_names(spec, place) or columns.class_names
    wanted = [columns.label, *spec.where, *([columns.image] if columns.has_paths else []), *_id_column(spec)]
    parts = [_read(lambda path: read_columns(path, wanted), file) for file in files]
    values = {name: [value for part in parts for value in part.column(name).to_pylist()] for name in wanted}
    chosen = _where(values, spec, place, len(values[columns.label]))
    all_rows = [(file, row) for file, part in zip(files, parts, strict=True) for row in range(len(part))]
    rows = [all_rows[position] for position in chosen]

    def spot(index: int) -> str:
        file, row = rows[index]
        return f"{file.name}, row {row + 1}"

    def of(name: str) -> Sequence[Any]:
        return [values[name][position] for position in chosen]

    labels = whole_numbers(of(columns.label)) if is_text_format(files[0]) else of(columns.label)
    classes, found, problems = named_classes(labels, names, spot, place)
    paths, more = _paths(of(columns.image), root, spot, place) if columns.has_paths else ([], [])
    problems += more
    ids: Sequence[Any] = paths if spec.id is None else of(spec.id)
    if spec.id is not None and (empty := [index for index, value in enumerate(ids) if value is None or value == ""]):
        value = f"none in {spot(empty[0])}{and_more(empty)}"
        problems.append(Problem(f"{place}.id", "every image must have a name", value))
    if problems:
        raise DataError(problems)
    if spec.id is None and not columns.has_paths:
        hashes = _hash_names(files, columns.image, values[columns.label])
        ids = [hashes[position] for position in chosen]
    ids = list(map(str, ids))
    step = "Remove one of the rows, or set id to a column whose values differ."
    check_names(ids, "images", spot, place, step)
    if columns.has_paths:
        return file_listing(kind, root, ids, classes, found, files=paths)
    home, folder = os.path.realpath(spec.path), folder_of(spec.path)
    from_folder = {file: os.path.relpath(file, folder) for file in files}
    table = image_table(ids, classes, [from_folder[file] for file, _ in rows], home, [row for _, row in rows])
    is_parquet = files[0].suffix.lower() == ".parquet"
    return Listing(kind, home, table, found, str(folder), columns.image, in_order=is_parquet)


def unlabelled_rows(
    spec: ColumnSet, files: Sequence[Path], place: str
) -> tuple[int, Callable[[], Iterator[Unlabelled]]]:
    """Returns the number of rows of files with equal columns, and what yields their images; a label is not needed.

    An image is named by the column ``id``; without one by its path as the file has it, or by its file and row.

    Args:
        spec: The columns.
        files: The files, in order; at least one.
        place: Where the table is named, for the problems.

    Raises:
        DataError: Files or columns are not what they must be.
    """
    root = folder_of(spec.path) if spec.root is None else Path(spec.root)
    columns = _columns(files, spec, place, is_labelled=False)
    wanted = [*([columns.image] if columns.has_paths else []), *_id_column(spec)]
    parts = [_read(lambda path: read_columns(path, wanted), file) if wanted else None for file in files]
    numbers = [
        len(_read(lambda path: open_rows(path, columns.image), file)) if part is None else len(part)
        for file, part in zip(files, parts, strict=True)
    ]

    def images() -> Iterator[Unlabelled]:
        for file, part, number in zip(files, parts, numbers, strict=True):
            rows = None if columns.has_paths else _read(lambda path: open_rows(path, columns.image), file)
            for row in range(number):
                spot = f"{file}, row {row + 1}"
                written = None if part is None else part.column(wanted[-1])[row].as_py()
                name = spot if written is None else str(written)
                if rows is not None:
                    yield Unlabelled(name, spot, functools.partial(read_row, rows, row, spot))
                elif part is not None:
                    yield _at_path(name, part.column(columns.image)[row].as_py(), root, spot)

    return sum(numbers), images


def _at_path(name: str, written: str | None, root: Path, spot: str) -> Unlabelled:
    path = _below(written, root)
    if path is not None:
        place = os.path.join(root, path)
        return Unlabelled(name, place, functools.partial(read_bytes, place))
    step = "Give the folder that holds all images as root."
    problem = Problem(spot, f"must have the path of a file inside {root}", repr(written), next_step=step)
    return refused(name, spot, problem)


def _id_column(spec: ColumnSet) -> list[str]:
    return [] if spec.id is None else [spec.id]


def _columns(files: Sequence[Path], spec: ColumnSet, place: str, is_labelled: bool = True) -> _Columns:
    """Finds the columns of a set, and checks that all files have them alike; without labels none is looked for.

    Raises:
        DataError: A column is missing, of another type in another file, or of a type that cannot be.
    """
    schemas = [_read(read_schema, file) for file in files]
    schema, features, first = schemas[0], _features(schemas[0]), files[0].name
    there, types = tuple(schema.names), _types(schemas[0])
    images = [name for name in there if features.get(name, {}).get("_type") == "Image" or _kind(types[name]) == "bytes"]
    labels = [name for name in there if _class_label(features.get(name, {})) is not None]
    image, label = spec.image or _only("image", there, images), spec.label or _only("label", there, labels)  # or ""
    names = _class_label(features.get(label, {})) if is_labelled else None
    given = [("image", image), *([("label", label)] if is_labelled else [])]
    given += [*(("id", name) for name in _id_column(spec)), *(("where", name) for name in spec.where)]
    for file, own in zip(files, schemas, strict=True):
        _check_schema(own, [name for _, name in given], f"{place}: {file}")
        problems, found = [], _types(own)
        for key, name in given:
            kinds, rule = _ALLOWED[key]
            if not name:
                rule = f"must be given: it is unclear which column of {first} has the {key}s"
                problems.append(Problem(f"{place}.{key}", rule, allowed=there))
            elif name not in found:
                rule = f"must be a column of {file.name}"
                problems.append(Problem(f"{place}.{key}", rule, repr(name), there, nearest(name, there)))
            elif _kind(found[name]) not in kinds:
                problems.append(Problem(f"{place}.{key}: column {name}", rule, str(found[name])))
            elif _kind(found[name]) != _kind(types[name]):
                rule = f"all files of a table must have equal columns: {name} is {types[name]} in {first}"
                problems.append(Problem(f"{place}: {file}", rule, str(found[name])))
        is_named = is_labelled and spec.class_names is None
        if not problems and is_named and _class_label(_features(own).get(label, {})) != names:
            rule = f"all files of a table must name the classes of {label} alike, but {file.name} and {first} do not"
            problems.append(Problem(place, rule, next_step=NAMES_STEP))
        if problems:
            raise DataError(problems)
    if names and spec.class_names is None:
        check_names(names, "classes", lambda index: f"place {index} of {label}", place, NAMES_STEP)
    return _Columns(image, label, _kind(types[image]) == "text", names)


def _check_schema(schema: pa.Schema, used: Sequence[str], place: str) -> None:
    """Checks the columns of one file.

    Raises:
        DataError: Two have one name, or one that is used has an extension type.
    """
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise DataError(Problem(place, "no two columns may have the same name", repr(twice[0])))
    for name in used:
        root, _ = split_name(schema, name)
        if root in schema.names and (extension := extension_in(schema.field(root))):
            step = "Write the column again with plain bytes, texts or numbers; a struct needs only bytes and path."
            raise DataError(Problem(place, f"the column {name} must have no extension type", extension, next_step=step))


def _only(name: str, there: Sequence[str], candidates: Sequence[str]) -> str:
    """Returns the column of this name, or the one column that can be meant; '' for none."""
    return name if name in there else candidates[0] if len(candidates) == 1 else ""


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Returns what ``datasets`` has noted of the columns."""
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _class_label(feature: dict[str, Any]) -> tuple[str, ...] | None:
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _types(schema: pa.Schema) -> dict[str, Any]:
    """Returns the type of each column and of each ``COLUMN.FIELD``."""
    structs = [column for column in schema if pa.types.is_struct(column.type)]
    types = {f"{column.name}.{field.name}": field.type for column in structs for field in column.type}
    return types | {column.name: column.type for column in schema}


_KINDS = {
    "bool": "flag",
    **dict.fromkeys(("string", "large_string", "string_view"), "text"),
    **dict.fromkeys(("binary", "large_binary", "binary_view"), "bytes"),
}
_ALLOWED = {
    "image": (("text", "bytes"), "must contain paths, or the bytes of image files"),
    "label": (("text", "number"), "must contain texts or whole numbers"),
    "id": (("text", "number"), "must contain texts or whole numbers"),
    "where": (("text", "number", "flag"), "must contain texts, whole numbers, or true and false"),
}


def _kind(kind: Any) -> str:
    """Returns what a column holds: text, number, flag, bytes (in a struct too), or its type; '' for no column."""
    if kind is None:
        return ""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _kind(kind.field("bytes").type) == "bytes":
        return "bytes"
    return "number" if pa.types.is_integer(kind) else _KINDS.get(str(kind), str(kind))


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
        problems = [Problem(f"{place}.where", f"must match at least one of the {num_rows} rows", "none")]
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
    paths = [path or "" for path in found]
    wrong = [index for index, path in enumerate(found) if path is None] or missing_files(root, paths)
    if not wrong:
        return paths, []
    rule = f"must be the path of a file inside {root}"
    step = "Restore the files, or give the folder that holds all images as root."
    value = f"{written[wrong[0]]!r} in {spot(wrong[0])}{and_more(wrong)}"
    return paths, [Problem(f"{place}.image", rule, value, next_step=step)]


@functools.lru_cache(1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _below(path: str | None, root: Path) -> str | None:
    if not path:
        return None
    if path.startswith("/"):
        base = posixpath.normpath(str(root)).rstrip("/") + "/"
        path = posixpath.normpath(path)
        if not path.startswith(base):  # written by another name of the folder: a link above it
            path = posixpath.join(_real(posixpath.dirname(path)), posixpath.basename(path))
        if not path.startswith(base):
            return None
        path = path[len(base) :]
    path = posixpath.normpath(path)
    return None if path in (".", "..") or path.startswith("../") or "\0" in path else path


def _hash_names(files: Sequence[Path], column: str, labels: Sequence[Any]) -> list[str]:
    """Returns a name for every row: the hash of its bytes, with a count where rows hold the same.

    Raises:
        DataError: A file cannot be read, or a row has no bytes.
    """
    digests: list[str] = []
    for file in files:
        index = _read(lambda path: kept_index(path, f"digests {column}", lambda: _digests(path, column)), file)
        digests += index.column("digest").to_pylist()
    same: defaultdict[str, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        same[digest].append(position)
    for digest, positions in same.items():
        positions.sort(key=lambda position: str(labels[position]))
        for count, position in enumerate(positions[1:], start=2):
            digests[position] = f"{digest}-{count}"
    return digests


def _digests(file: Path, column: str) -> pa.Table:
    rows = open_rows(file, column)
    contents = (read_row(rows, row, f"{file}, row {row + 1}") for row in range(len(rows)))
    return pa.table({"digest": pa.array([image_digest(content).hex() for content in contents], pa.string())})


def _read(read: Callable[[Path], Found], file: Path) -> Found:
    """Calls a function that reads a file.

    Raises:
        DataError: It cannot be read.
    """
    with reading_table(str(file)):
        return read(file)
