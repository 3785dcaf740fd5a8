"""The sets of a recipe: which reader reads which kind, opening one or all, and what the driver has listed of them.

A new kind of set is a class in ``recipe/schema/data.py``, a file with its reader's functions, and a row of the table.

``write_sets`` lists and stats each file once, in the driver, and keeps ids, labels, places and hashes of the files in
``sets/`` of the folder of the preparation: an Arrow file per set of training and validation. ``open_sets`` maps them
for trials, ranks and other nodes, which list no trees. A file that changes while a command runs is noticed by the next
command, which lists again; one of many images at once.

Shape letters: N images of a set.
"""

import contextlib
import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from carft_ray.data import sandbox
from carft_ray.data.benchmarks import reader as benchmarks
from carft_ray.data.cache import cache_dir, user_cache_dir
from carft_ray.data.corruptions import CorruptedSource
from carft_ray.data.decode_images import IMAGE_ENDINGS, cause_of, unreadable
from carft_ray.data.file_index import of_any_copy, open_table, write_table
from carft_ray.data.formats import folder, huggingface, tables, webdataset
from carft_ray.data.listing import Listing, StoredSource, and_more, text_problems
from carft_ray.data.records import records, without_bad_images
from carft_ray.data.same_as_study import contents, images_of, require_same
from carft_ray.data.selection import stored_source
from carft_ray.data.source import DIGEST_BYTES, IdArray, Source
from carft_ray.errors import DataError, Problem
from carft_ray.layout import SETS
from carft_ray.recipe.schema.data import (
    BenchmarkSet,
    CorruptedSet,
    FolderSet,
    HuggingFaceSet,
    SetSpec,
    StoredSet,
    TableSet,
    WebDatasetSet,
    plain,
)
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.written import KeyPath, dotted
from carft_ray.untrusted import read_text, visible

FORMAT_VERSION = 5
TRAIN, ID_VAL = "train", "id_val"
_LABEL, _DIGEST = pa.field("label", pa.int64()), pa.field("digest", pa.binary(DIGEST_BYTES))
_SET = ("name", "class_names", "groups", "skipped", "max_pixels")  # attributes that are kept of a source,
_LISTING = ("kind", "home", "root", "column", "form", "in_order")  # and of its listing


@dataclass(frozen=True)
class Reader:
    """How one kind of set is read. Every function gets the set.

    Attributes:
        listing: Lists the images; the second argument is where the set is named, for messages. Raises ``DataError`` for
            what is missing, and ``OSError``.
        problems: What is missing, found without listing: all that commands other than `test` check of a test set. The
            second argument as above.
        places: Resolved paths of the folders or files that hold the images: two sets with one place, or one inside the
            other's, share images unless they are ``disjoint``.
        disjoint: Whether two sets of one place share no image all the same, such as those of two splits.
        naming: What the names of the images depend on, in addition to ``path``: parts are of the hashes of names.
        num_expected: How many images the set must have, where that is known of it: a public benchmark.
    """

    listing: Callable[[Any, str], Listing]
    problems: Callable[[Any, str], list[Problem]]
    places: Callable[[Any], list[str]]
    disjoint: Callable[[Any, Any], bool] = lambda one, other: False
    naming: Callable[[Any], object] = lambda spec: None
    num_expected: Callable[[Any], int | None] = lambda spec: None


def _of_files(
    files: Callable[[Any, str], list[Path]],
    listing: Callable[[Any, list[Path], str], Listing],
    class_names: Callable[[Any, str], object],
    **more: Any,
) -> Reader:
    """Returns the reader of sets that lie in a few large files.

    Args:
        files: Returns the files of a set; raises what ``find_files`` does.
        listing: Lists what is in them.
        class_names: Reads the class names that stand apart from them.
        **more: Attributes of the reader.
    """

    def problems(spec: Any, place: str) -> list[Problem]:
        found: list[Problem] = []
        for check in (files, class_names):
            try:
                check(spec, place)
            except DataError as error:
                found += error.problems
            except PermissionError:
                pass
        return found

    def places(spec: Any) -> list[str]:
        found: list[Path] = []
        with contextlib.suppress(DataError, PermissionError):
            found = files(spec, "")
        return [os.path.realpath(file) for file in found or [spec.path]]

    return Reader(lambda spec, place: listing(spec, files(spec, place), place), problems, places, **more)


_ROWS: dict[str, Any] = {"disjoint": tables.rows_disjoint, "naming": tables.naming}
READERS: dict[type[StoredSet], Reader] = {
    BenchmarkSet: Reader(
        benchmarks.list_benchmark,
        benchmarks.benchmark_problems,
        benchmarks.benchmark_places,
        disjoint=benchmarks.are_disjoint,
        naming=lambda spec: (spec.name, spec.domains is None),
        num_expected=benchmarks.num_expected,
    ),
    FolderSet: Reader(
        folder.list_folder_set,
        folder.folder_set_problems,
        folder.folder_set_places,
        naming=lambda spec: spec.domains is None,
    ),
    WebDatasetSet: _of_files(
        webdataset.shards, webdataset.list_shards, webdataset.own_class_names, naming=lambda spec: spec.image
    ),
    TableSet: _of_files(tables.table_files, tables.list_rows, tables.own_class_names, **_ROWS),
    HuggingFaceSet: _of_files(
        huggingface.data_files, partial(tables.list_rows, kind=huggingface.KIND), tables.own_class_names, **_ROWS
    ),
}


ID_COLUMN = "sample_id"
NUM_ENDINGS = 8  # that are named

_TAKES = {"part", "shots", "shots_seed", "on_bad_image", "exclude"}  # which images of a listing a set takes
# while ``listing_once`` is in force, in the thread that called it
_kept: ContextVar[dict[str, Listing] | None] = ContextVar("listings", default=None)
_warned: set[str] = set()  # of this process: what was passed over
_log = logging.getLogger(__name__)


def reader_of(spec: StoredSet) -> Reader:
    """Returns the reader of a set."""
    return READERS[type(spec)]


@contextlib.contextmanager
def listing_once() -> Iterator[None]:
    """Has ``list_set`` list each tree once until the block ends: a command asks for its sets several times.

    Sets that differ only in which images of the tree they take share a listing, with sizes and dates of its files.
    """
    before = _kept.get()
    token = _kept.set({} if before is None else before)
    try:
        yield
    finally:
        _kept.reset(token)


def forget_listings() -> None:
    """Frees what ``listing_once`` holds: a search that trains for days lists nothing more."""
    if (kept := _kept.get()) is not None:
        kept.clear()


def list_set(spec: StoredSet, place: str) -> Listing:
    """Lists the images of a set without opening one; those that ``exclude`` names are noted.

    The log says once in a process how many files of a folder are passed over.

    Args:
        spec: The set.
        place: Where the set is named, for the problems.

    Raises:
        DataError: Something is missing.
    """
    key = spec.model_dump_json(exclude=_TAKES)
    kept = _kept.get()
    listing = None if kept is None else kept.get(key)
    if listing is None:
        try:
            listing = reader_of(spec).listing(spec, place)
        except OSError as error:
            raise DataError(unreadable(f"{place}: {error.filename}", error)) from error
        if problems := text_problems((spec.path, *listing.found), place):
            raise DataError(problems)
        if kept is not None:
            kept[key] = listing
    _tell_passed_over(listing, place)
    if listing.lost and spec.on_bad_image == "fail":
        value = f"none behind {len(listing.lost)}, such as {listing.home}/{listing.lost[0]}"
        step = f"Restore the files, remove the links, or write {place}.on_bad_image: skip."
        raise DataError(Problem(place, "every link must lead to an image", value, next_step=step))
    if spec.exclude is None:
        return listing
    excluded = excluded_ids(spec.exclude, f"{place}.exclude")
    if not np.isin(excluded, listing.ids).any():
        step = "Sample ids are in predictions.parquet and in the file of `carft-ray doctor RECIPE --pairs FILE`."
        value = f"{len(excluded)}, such as {excluded[0]}" if len(excluded) else "none"
        rule = "must name images of the set by their sample ids"
        raise DataError(Problem(f"{place}.exclude", rule, value, next_step=step))
    return replace(listing, excluded=excluded)


def _tell_passed_over(listing: Listing, place: str) -> None:
    """Says in one line how many files of a set's folders are no images of it."""
    counts = sorted(listing.passed_over.items(), key=lambda item: (-item[1], item[0]))
    found = f"{listing.home}: {counts}"  # parts of the same folders are told once, other domains of the tree apart
    if not counts or found in _warned:
        return
    _warned.add(found)
    words = ", ".join(f"{count} {kind}" for kind, count in counts[:NUM_ENDINGS])
    text = "%s: ignored in %s: %s. Images are the files that end in %s"
    _log.warning(text, place, listing.home, visible(words), ", ".join(IMAGE_ENDINGS))


def excluded_ids(written: tuple[int, ...] | str, place: str) -> IdArray:
    """Returns the sample ids that ``exclude`` names, uint64 [K].

    Args:
        written: The ids, or the path of a text file with one per line or of a CSV file with a column ``sample_id``.
        place: Where it is written, for the problems.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    if not isinstance(written, str):
        return np.array(written, np.uint64)
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(written), newline="")) if row]
    except (OSError, csv.Error) as error:
        rule = f"must be a text file with a sample id per line, or a CSV file with a column {ID_COLUMN}"
        raise DataError(Problem(place, rule, f"{written}: {cause_of(error)}")) from error
    has_names = bool(rows) and ID_COLUMN in rows[0]
    column = rows[0].index(ID_COLUMN) if has_names else 0
    texts = [row[column].strip() if column < len(row) else "" for row in rows[has_names:]]
    if wrong := [text for text in texts if not re.fullmatch(r"\d{1,20}", text) or int(text) >= 2**64]:
        rule = "every line must contain a sample id, a whole number from 0 to 2**64 - 1"
        raise DataError(Problem(written, rule, f"{wrong[0]!r}{and_more(wrong)}"))
    return np.array(list(map(int, texts)), np.uint64)


def plain_place(path: KeyPath, spec: SetSpec) -> str:
    """Returns where the images of a set are named: its own key path, or that of the set that it shows corrupted."""
    return dotted((*path, "of")) if isinstance(spec, CorruptedSet) else dotted(path)


def open_source(spec: SetSpec, name: str, classes: tuple[str, ...] | None, cache_dir: Path | None = None) -> Source:
    """Opens one set.

    Args:
        spec: The set as the recipe describes it.
        name: Role or name of the set, for messages.
        classes: Class folders in label order; None: those of the set.
        cache_dir: Folder of the decoded sets, which keeps what images cannot be decoded; None: the user's.

    Raises:
        DataError: Something is missing, or the classes do not match.
    """
    if isinstance(spec, CorruptedSet):
        return CorruptedSource(open_source(spec.of, name, classes, cache_dir), spec)
    if isinstance(spec, StoredSet):
        source = stored_source(list_set(spec, name), spec, classes, name)
        if spec.on_bad_image == "fail":
            return source
        return without_bad_images(source, cache_dir or user_cache_dir())
    problems = sandbox.domain_problems(spec.domain, name)
    problems += [] if classes is None else sandbox.class_problems(classes, name)
    if problems:
        raise DataError(problems)
    return sandbox.SandboxSource(spec.domain, spec.split, spec.num_per_class, name)


def write_sets(recipe: Recipe, folder: Path, made_of: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Lists the sets of training and validation, compares them, and keeps what was found in a folder.

    Files that no command has read yet are read now, for their hashes (``data.records``). Sets that the sandbox draws
    are not kept: they are not listed.

    Args:
        recipe: The recipe, without the images that are left out (``without_shared``).
        folder: Of the preparation.
        made_of: What the study was made of (``data.same_as_study``); empty for a new one.

    Raises:
        DataError: A set cannot be opened, or a file not be read. Or one is not that of the study: nothing is written.
        StorageError: The folder or the cache cannot be written.
    """
    sources = open_sets(recipe)
    images = {name: one for name, source in sources.items() if isinstance(one := images_of(source), StoredSource)}
    digests = {name: records(each, cache_dir(recipe)).hashes() for name, each in images.items()}
    found = {name: contents(sources[name], known) for name, known in digests.items()}

    def changed(name: str) -> list[str]:
        return changed_images(folder, name, images[name], digests[name])

    require_same(made_of, {"data": found, "classes": list(sources[TRAIN].class_names)}, changed)
    for name, known in digests.items():
        table = _table(images[name], known, _key(recipe, name))
        write_table(folder / SETS / f"{name}.arrow", table)


def changed_images(folder: Path, name: str, images: StoredSource, digests: Sequence[bytes]) -> list[str]:
    """Returns which images of a set are not as ``write_sets`` has kept them; none if it has kept none.

    Args:
        folder: Of the preparation.
        name: Of the set.
        images: The set as it is now.
        digests: Hashes of its files.
    """
    kept = open_table(folder / SETS / f"{name}.arrow")
    if kept is None or not {"name", "label", "digest"} <= {*kept.column_names}:
        return []
    names = images.listing.table["name"].take(pa.array(images.rows)).to_pylist()
    now = dict(zip(names, zip(images.labels.tolist(), digests, strict=True), strict=True))
    columns = (kept[column].to_pylist() for column in ("name", "label", "digest"))
    was = {each: (label, digest) for each, label, digest in zip(*columns, strict=True)}
    words = [f"{each} is missing" for each in was if each not in now] + [
        f"{each} is new" for each in now if each not in was
    ]
    both = [each for each in now if each in was]
    words += [f"{each} has changed" for each in both if now[each][1] != was[each][1]]
    return words + [f"{each} has another class" for each in both if now[each][0] != was[each][0]]


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
    stamps = {} if listing.are_files else listing.stamps
    of_listing["stamps"] = {path: of_any_copy(stamp) for path, stamp in stamps.items()}  # a node may have its own copy
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
