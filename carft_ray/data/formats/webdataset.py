"""WebDataset: samples in tar archives ("shards"), a sample being files of one name with several endings, one behind the
other: ``0001.jpg``, ``0001.cls``. The name ends at the first dot behind the last slash; hidden files are passed over.

Nothing is unpacked. Where the files stand in a shard is found once and kept (``data.file_index``); then an image is
one read at its place. The stable name of an image is the name of its file in the shard, so other shards of the same
samples change no name, and a packed tree has the names of the tree. Only images, labels and JSON are ever read.

The ``path`` of a set in large files, also of tables, is a file, a folder of files, or a pattern: ``{000..012}`` counts,
``{a,b}`` lists, ``*``, ``?``, ``[ab]`` match.
"""

import glob
import itertools
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from carft_ray.data.decode_images import IMAGE_ENDINGS, unreadable
from carft_ray.data.file_index import kept_index
from carft_ray.data.formats.folder import check_names, named_classes, read_class_names, whole_numbers
from carft_ray.data.listing import Listing, and_more, image_table
from carft_ray.errors import DataError, Problem, nearest
from carft_ray.recipe.schema.data import WebDatasetSet
from carft_ray.untrusted import open_regular, parse_json, read_regular

KIND = "webdataset-1"
CLASS_NAMES = "classnames.txt"  # next to the shards or in the folder above, as clip_benchmark writes it
NUM_SHARDS = "nshards.txt"
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_DAMAGE = (EOFError, ValueError, LookupError, ArithmeticError, RecursionError)  # of ``tarfile``, for odd headers
_JSON = "json:"  # of a label: a key of the sample's .json
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_ENDINGS = (".tar", *_COMPRESSED)
_STEP = "Expected: shards, such as path: shards/{000..012}.tar, or the folder that contains them."
_COMPRESSED_STEP = "Unpack it (gunzip), or write it again without compression, which does not make images smaller."
_LARGEST_LABEL, _LARGEST_HEADER = 2**20, 2**20  # bytes
_MOST_GLOBAL = 100  # records of global headers, which ``tarfile`` gives to each file
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_KIND_AT = 156  # place of the type in a header
_RECORD = re.compile(rb"(\d{1,7}) [^=\n\0]{1,1024}=")  # of a PAX header: its length and its keyword
_ALONE = "a shard must not be compressed: its images could not be read one by one"
_INDEX = pa.schema({"name": pa.string(), "offset": pa.int64(), "size": pa.int64(), "label": pa.string()})
Spot = Callable[[int], str]
MOST_FILES = 100_000  # of a count in braces
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def list_shards(spec: WebDatasetSet, shards: Sequence[Path], place: str) -> Listing:
    """Lists the samples of all shards.

    Raises:
        DataError: A shard, its labels or names are not what they must be.
    """
    indexes: list[pa.Table] = []
    problems: list[Problem] = []
    for shard in shards:
        try:
            indexes.append(_index(shard, spec))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    shard_of = [shard for shard, index in zip(shards, indexes, strict=True) for _ in range(len(index))]
    whole = pa.concat_tables(indexes)
    names, offsets, sizes, texts = (whole[column].to_pylist() for column in ("name", "offset", "size", "label"))

    def spot(position: int) -> str:
        return f"{shard_of[position].name}: {names[position]}"

    if not names:
        raise DataError(Problem(f"{place}: {shards[0]}", "a shard must have a sample with an image", "none"))
    is_json = spec.label is not None and spec.label.startswith(_JSON)
    labels = [json.loads(text) for text in texts] if is_json else whole_numbers([text.strip() for text in texts])
    classes, found, problems = named_classes(labels, own_class_names(spec, place), spot, place)
    if problems:
        raise DataError(problems)
    check_names(names, "samples", spot, place, "Write the shards again with keys that differ in all of them.")
    root, home = folder_of(spec.path), os.path.realpath(spec.path)
    from_root = {shard: os.path.relpath(shard, root) for shard in shards}
    paths = [from_root[shard] for shard in shard_of]
    return Listing(KIND, home, image_table(names, classes, paths, home, offsets, sizes), found, str(root))


def shards(spec: WebDatasetSet, place: str) -> list[Path]:
    """Returns the shards of a set.

    Raises:
        DataError: One is missing or compressed.
        PermissionError: A folder may not be read.
    """
    found = find_files(spec.path, _ENDINGS, place, _STEP)
    if packed := [shard for shard in found if shard.name.lower().endswith(_COMPRESSED)]:
        raise DataError(Problem(place, _ALONE, str(packed[0]), next_step=_COMPRESSED_STEP))
    folder = folder_of(spec.path)
    if folder == Path(spec.path) and (folder / NUM_SHARDS).is_file():
        written = read_regular(folder / NUM_SHARDS, 64).decode(errors="replace").strip()
        if written != str(len(found)):
            rule = f"the folder must contain the {written} shards that its {NUM_SHARDS} states"
            raise DataError(Problem(f"{place}: {folder}", rule, str(len(found))))
    return found


def own_class_names(spec: WebDatasetSet, place: str) -> tuple[str, ...] | None:
    """Returns the class names that a set gives or that lie next to its shards, None for none.

    Raises:
        DataError: They cannot be read.
    """
    folder = folder_of(spec.path)
    there = (str(path) for path in (folder / CLASS_NAMES, folder.parent / CLASS_NAMES) if path.is_file())
    return read_class_names(spec.class_names or next(there, None), f"{place}.class_names")


def _index(shard: Path, spec: WebDatasetSet) -> pa.Table:
    """Returns the index of a shard, from the cache or made now: columns ``name``, ``offset``, ``size``, ``label``.

    Raises:
        DataError: The shard is damaged, or a sample has not one image and a label.
    """
    image, label = (spec.image or "").lower().lstrip("."), (spec.label or "cls").lower().lstrip(".")
    key = None
    if label.startswith(_JSON):
        label, key = "json", str(spec.label).removeprefix(_JSON)  # as it is written
    try:
        return kept_index(shard, f"samples {(image, label, key)}", lambda: _make_index(shard, image, label, key))
    except OSError as error:
        raise DataError(unreadable(str(shard), error)) from error


def _make_index(shard: Path, image: str, label: str, json_key: str | None) -> pa.Table:
    images: list[tarfile.TarInfo] = []
    labels: list[str] = []
    wrong: list[str] = []
    for key, files in _samples(shard):
        endings = [ending for ending in files if (ending == image if image else f".{ending}" in IMAGE_ENDINGS)]
        if len(endings) != 1 or label not in files:
            wrong.append(f"{key} with {', '.join(f'.{ending}' for ending in files)}")
            continue
        images.append(files[endings[0]])
        member = files[label]
        if member.size > _LARGEST_LABEL:
            rule = f"a label must have at most {_LARGEST_LABEL} bytes"
            raise DataError(Problem(f"{shard}: {member.name}", rule, str(member.size)))
        text = _content(shard, member.offset_data, member.size).decode("utf-8", "replace")
        labels.append(text if json_key is None else _value(text, json_key, f"{shard}: {member.name}"))
    if wrong:
        rule = f"every sample must have {f'a .{image}' if image else 'one image'} and a .{label}"
        step = "Set image and label to the endings; label can also be json:KEY."
        raise DataError(Problem(str(shard), rule, f"{wrong[0]}{and_more(wrong)}", next_step=step))
    names = [_plain(member.name) for member in images]
    offsets, sizes = [member.offset_data for member in images], [member.size for member in images]
    return pa.table([names, offsets, sizes, labels], schema=_INDEX)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields name and files by ending (in small letters) of every sample of a shard.

    Raises:
        DataError: It is no tar archive, cut off, or has a file twice.
    """
    current, files = "", dict[str, tarfile.TarInfo]()
    try:
        with open_regular(shard) as file, _archive(file) as archive:
            for member in archive:
                if len(archive.pax_headers) > _MOST_GLOBAL:
                    raise tarfile.ReadError("too many global headers")
                # with ``pax_headers`` the members take far more memory than the file
                archive.members.clear()  # type: ignore[attr-defined]  # typeshed does not have it
                member.pax_headers = {}
                if member.size < 0:  # would lead back, without end
                    raise tarfile.ReadError("a negative size")
                if not _is_text(member.name):
                    raise DataError(Problem(f"{shard}: {member.name}", "the name of a file must be text in UTF-8"))
                found = re.fullmatch(r"((?:.*/|)[^./]+)[.]([^/]+)", _plain(member.name))
                if not member.isreg() or member.issparse() or found is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                key, ending = found.group(1), found.group(2).lower()
                if key != current:
                    if files:
                        yield current, files
                    current, files = key, {}
                if ending in files:
                    raise DataError(Problem(f"{shard}: {member.name}", "must occur once in its sample", "two"))
                files[ending] = member
            # ``tarfile`` takes damage for the end; an archive that was closed ends with zeros
            if _content(shard, archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(_cut_off(str(shard)))
    except (tarfile.TarError, *_DAMAGE) as error:
        if _content(shard, 0, 6).startswith(_MAGIC):
            raise DataError(Problem(str(shard), _ALONE, next_step=_COMPRESSED_STEP)) from error
        raise DataError(_cut_off(str(shard))) from error
    if files:
        yield current, files


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)  # what stands for bytes that are none


def _archive(file: BinaryIO) -> tarfile.TarFile:
    headers: Any = _Headers(file)
    return tarfile.open(fileobj=headers, mode="r:", errorlevel=1)


class _Headers:
    """A shard as ``tarfile`` may read it: its headers, each of a bounded size, some of which it reads whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self._kind = b""  # of the last header

    def read(self, size: int = -1) -> bytes:
        """Raises ``tarfile.ReadError`` for a header of no size or of more than a megabyte, and for damaged records."""
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError("too large a header")
        data = self._file.read(size)
        if size == tarfile.BLOCKSIZE:
            self._kind = data[_KIND_AT : _KIND_AT + 1]
        elif self._kind in _PAX:
            _require_records(data)
        return data


def _require_records(data: bytes) -> None:
    """Raises ``tarfile.ReadError`` for a PAX header that ``tarfile`` may read for hours (CVE-2024-6232)."""
    is_damaged = re.search(rb"\d{200}", data) is not None or data.count(b" hdrcharset=") > 1
    place = 0
    while not is_damaged and place < len(data) and data[place]:
        found = _RECORD.match(data, place)
        length = int(found[1]) if found else 0
        is_damaged = found is None or length <= found.end() - place
        place += length
    if is_damaged:
        raise tarfile.ReadError("damaged records")


def _content(shard: Path, offset: int, size: int) -> bytes:
    with open_regular(shard) as file:
        file.seek(offset)
        return file.read(size)


def _value(text: str, key: str, place: str) -> str:
    """Returns one value of a JSON object, as JSON: of a large object no more is kept.

    Raises:
        DataError: It is none, has no such key, or a label cannot be of this kind.
    """
    try:
        value = parse_json(text)[key]
    except (ValueError, LookupError, TypeError) as error:
        rule = f"the .json of every sample must be an object with the key {key}"
        raise DataError(Problem(place, rule, f"{type(error).__name__}: {error}")) from error
    if isinstance(value, dict | list):
        rule = f"the key {key} must contain a text or a whole number"
        raise DataError(Problem(place, rule, type(value).__name__))
    return json.dumps(value)


def _plain(name: str) -> str:
    """Returns the name of a file in an archive without the ./ of the folder that was packed."""
    return re.sub(r"^(?:\./+)+", "", name)


def _cut_off(place: str) -> Problem:
    rule = "must be a whole tar archive"
    return Problem(place, rule, "one that is cut off or damaged", next_step="Fetch or write it again.")


def find_files(written: str, endings: tuple[str, ...], place: str, step: str) -> list[Path]:
    """Returns the files that a path means, sorted where a folder or a pattern is searched.

    Args:
        written: The path, as the recipe has it.
        endings: Endings of the files that are meant, in small letters.
        place: Where the path is named, for the problems.
        step: What to do when nothing is there.

    Raises:
        DataError: There are none, or others: a pipe or device, of which reading may never end.
        PermissionError: A folder may not be read.
    """
    path = Path(written)
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_file())
        files = [path / name for name in names if name.lower().endswith(endings)]
    elif mode is not None:
        files = [path]
    else:
        texts = list(itertools.islice(_expanded(str(path)), MOST_FILES + 1))
        if len(texts) > MOST_FILES:
            raise DataError(Problem(place, f"a pattern must count at most {MOST_FILES} files", written))
        files = [Path(match) for text in texts for match in sorted(glob.glob(text)) or [text]]
    wrong = [file for file in files if not (file.name.lower().endswith(endings) and os.path.isfile(file))]
    if files and not wrong:
        return files
    there = os.listdir(path.parent) if mode is None and path.parent.is_dir() else []
    rule = "must be a file, a folder, or a pattern of files that end in one of the allowed ways"
    what = "" if not wrong or os.path.lexists(wrong[0]) else "no such file: "
    value = f"{what}{wrong[0]}{and_more(wrong)}" if wrong else f"none in {path}"
    raise DataError(Problem(place, rule, value, endings, nearest(path.name, there), step))


def folder_of(written: str) -> Path:
    """Returns the folder that holds the files of a path: itself where it is a folder."""
    path = Path(written)
    if os.path.isdir(path):
        return path
    return next(parent for parent in path.parents if not re.search(r"[{*?\[]", str(parent)) or parent.is_dir())


def _mode(path: Path) -> int | None:
    """Returns the mode of what stands at a path; None where nothing does."""
    try:
        return path.stat().st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):
        return None


def _expanded(text: str) -> Iterator[str]:
    """Yields the texts that braces stand for, the first brace changing slowest."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    low, high, listed = found.groups()
    if listed is None:
        width = len(low) if low.startswith("0") else 0
        words: Iterator[str] = (f"{number:0{width}d}" for number in range(int(low), int(high) + 1))
    else:
        words = iter(listed.split(","))
    for word in words:
        yield from _expanded(text[: found.start()] + word + text[found.end() :])
