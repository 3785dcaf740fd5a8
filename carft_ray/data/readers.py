"""Which reader reads which kind of set: the one table from a set of the recipe to its files.

A new kind of set is a class in ``recipe/sets.py``, a file with its reader's functions, and a row here.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from carft_ray.data import benchmarks, folder, huggingface, tables, webdataset
from carft_ray.data.excluded import excluded_ids
from carft_ray.data.listing import Listing
from carft_ray.errors import Problem
from carft_ray.recipe.schema import BenchmarkSet, FolderSet, HuggingFaceSet, StoredSet, TableSet, WebDatasetSet


@dataclass(frozen=True)
class Reader:
    """How one kind of set is read. Every function gets the set.

    Attributes:
        listing: Lists the images; the second argument is where the set is named, for messages.
        problems: What is missing at the first look, without listing: all that is asked of a test set by anybody but
            the command that opens the seal. The second argument as above.
        places: Resolved paths of the folders or files that hold the images: two sets with one place, or one inside the
            other's, share images unless they are ``disjoint``.
        disjoint: Whether two sets of one place share no image all the same, such as those of two splits.
        naming: What the names of the images depend on, besides ``path``: parts are of the hashes of names.
        num_expected: How many images the set must have, where that is known of it: a public benchmark.
    """

    listing: Callable[[Any, str], Listing]
    problems: Callable[[Any, str], list[Problem]]
    places: Callable[[Any], list[str]]
    disjoint: Callable[[Any, Any], bool] = lambda one, other: False
    naming: Callable[[Any], object] = lambda spec: None
    num_expected: Callable[[Any], int | None] = lambda spec: None


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
    TableSet: Reader(
        tables.list_table_set,
        tables.table_set_problems,
        tables.table_set_places,
        disjoint=tables.rows_disjoint,
        naming=tables.naming,
    ),
    WebDatasetSet: Reader(
        webdataset.list_webdataset,
        webdataset.webdataset_problems,
        webdataset.webdataset_places,
        naming=lambda spec: spec.image,
    ),
    HuggingFaceSet: Reader(
        huggingface.list_huggingface_set,
        huggingface.huggingface_set_problems,
        huggingface.huggingface_set_places,
        disjoint=tables.rows_disjoint,
        naming=tables.naming,
    ),
}


_TAKES = {"part", "shots", "shots_seed", "on_bad_image", "exclude"}  # which images of a listing a set takes
_kept: dict[str, Listing] | None = None  # while ``listing_once`` is in force


def reader_of(spec: StoredSet) -> Reader:
    """Returns the reader of a set."""
    return READERS[type(spec)]


@contextlib.contextmanager
def listing_once() -> Iterator[None]:
    """Has ``list_set`` list each tree once until the block ends: a command asks for its sets several times.

    Sets that differ only in which images of the tree they take share a listing, with sizes and dates of its files.
    """
    global _kept
    before = _kept
    _kept = {} if before is None else before
    try:
        yield
    finally:
        _kept = before


def forget_listings() -> None:
    """Frees what ``listing_once`` holds: a search that trains for days lists nothing more."""
    if _kept is not None:
        _kept.clear()


def list_set(spec: StoredSet, place: str) -> Listing:
    """Lists the images of a set without opening one; those that ``exclude`` names are noted.

    Args:
        spec: The set.
        place: Where the set is named, for the problems.
    """
    listing = _listing(spec, place)
    if spec.exclude is None or listing.problems:
        return listing
    excluded, problems = excluded_ids(spec.exclude, f"{place}.exclude")
    if not problems and not np.isin(excluded, listing.ids).any():
        step = "Sample ids stand in predictions.parquet and in what `carft-ray doctor RECIPE --pairs FILE` writes."
        value = f"{len(excluded)}, such as {excluded[0]}" if len(excluded) else "none"
        problems = [
            Problem(f"{place}.exclude", "must name images of the set by their sample ids", value, next_step=step)
        ]
    return replace(listing, excluded=excluded, problems=tuple(problems))


def _listing(spec: StoredSet, place: str) -> Listing:
    key = spec.model_dump_json(exclude=_TAKES)
    if _kept is not None and key in _kept:
        return _kept[key]
    listing = reader_of(spec).listing(spec, place)
    if _kept is not None and not listing.problems:  # problems name the set
        _kept[key] = listing
    return listing


def first_problems(spec: StoredSet, place: str) -> list[Problem]:
    """Returns what is missing at the first look; nothing is listed."""
    return reader_of(spec).problems(spec, place)
