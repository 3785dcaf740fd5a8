"""Images that stand in two roles, under whatever name: found by what the files hold and by what the pictures show.

Two images are the same when

- their files have the same bytes (copies, renamed files, links, other class folders), or
- they show one picture: the same pixels, or almost the same thumbnail (saved in another format or at another size).

Thumbnails have 16 x 16 pixels, brightness and two colours (``data.records``). Two images are candidates if their
difference hashes (``hashes``, 256 bits) differ in at most ``MOST_BITS``. Candidates show one picture if their
thumbnails are at most ``LIMIT`` apart in brightness, without gain and offset, and their mean colours at most ``COLOUR``
(``distances``). docs/duplicates.md says how many copies are found, measured on real images, drawings and the sandbox.
Crops, borders and marks are mostly not found.

``LIMIT`` lies between copies and other pictures of PACS (9,991 real images of four domains): made copies (PNG, JPEG 90
and 75, half and double size) have distances up to .011, and other drawings from .023 on. Hashes of copies within
``LIMIT`` differ in up to 21 bits, and their mean colours by up to 5.3 levels (drawings of 64 pixels as JPEG 75).

Before `test`, test images are read by ``data.records`` alone, for hashes and thumbnails, and these are compared here.
This module sees neither labels nor a model, and nothing leaves it but names and pictures of images that stand in two
roles.

Shape letters: N images of a set, M of another, K pairs, S = 16 pixels of a thumbnail, W = 4 words of a hash.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from carft_ray.data.cache import key_of, made_once
from carft_ray.data.class_names import class_folders
from carft_ray.data.decode_images import DECODERS
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import NUM_NAMED, OnProgress, Records, pixel_limit, records, without_bad_images
from carft_ray.data.role_checks import may_share
from carft_ray.data.selection import unlabelled_source
from carft_ray.data.sets import list_set, open_source, plain_place
from carft_ray.data.source import IntArray, PixelArray, Source, in_order
from carft_ray.errors import DataError, StorageError
from carft_ray.files import read_json, write_json
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema.data import TEST_ROLES, SetSpec, StoredSet, plain
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.words import time_left

FORMAT_VERSION = 7  # rises when other pairs are found in the same records
MOST_BITS = 24  # of 256, by which the hashes of candidates differ
STEP_UP = 3.0  # grey levels from which on a step up sets a bit: below are noise and compression
NEAREST = 64  # candidates of an image that are compared: of frames of a video each is one of all others
LIMIT = 0.02  # largest distance of two thumbnails of one picture
COLOUR = 6.0  # levels of blue and red (Cb and Cr of JPEG) together, by which the mean colours of one picture differ
FLOOR = 30.0  # contrast, in grey levels, of which a distance is half of what it is among strong ones
GAIN = 1.5  # largest contrast of a picture, as a multiple of that of its copy
LEAST_CONTRAST = 2.0  # a picture below it has only its bytes and pixels to be known by

_log = logging.getLogger(__name__)
LEAVES: Literal["leaves"] = "leaves"
STAYS: Literal["stays"] = "stays"
Sources = Mapping[str, Source]  # by key path
_Floats = npt.NDArray[np.float32]
_ROWS, _BLOCK = 16, 8192  # images of the second and of the first set that are compared at a time


@dataclass(frozen=True)
class SharedRow:
    """Two images in two roles that are the same, and what is done with each.

    Attributes:
        set: Key path of the set of the first, which the recipe names before the other.
        image: Its name: the path of its file.
        sample_id: Its sample id.
        done: Whether it ``leaves`` its set or ``stays``.
        other_set: Key path of the set of the second.
        other_image: Its name.
        other_sample_id: Its sample id.
        other_done: As ``done``.
        found_by: ``same bytes`` or ``same picture``.
        distance: Of the two pictures (``distances``); 0 for the same bytes or pixels.
    """

    set: str
    image: str
    sample_id: int
    done: Literal["leaves", "stays"]
    other_set: str
    other_image: str
    other_sample_id: int
    other_done: Literal["leaves", "stays"]
    found_by: str
    distance: float

    @property
    def images(self) -> tuple[tuple[str, int, str, str, str], tuple[str, int, str, str, str]]:
        """Both images: key path of the set, sample id, what is done, key path of the other set, name."""
        first = (self.set, self.sample_id, self.done, self.other_set, self.image)
        return first, (self.other_set, self.other_sample_id, self.other_done, self.set, self.other_image)


def digests_of_tests(recipe: Recipe, cache_dir: Path, with_classes: bool = False) -> dict[str, str]:
    """Returns per test set a digest of the contents of its images, whatever their names and order.

    Args:
        recipe: The recipe.
        cache_dir: Folder of the cache; made when missing.
        with_classes: The class of each image counts, too. Without, another study of the same images is found.

    Raises:
        DataError: A set cannot be opened.
        StorageError: The cache cannot be written.
    """
    classes, found = class_folders(recipe), {}
    for name, spec in {"id_test": recipe.data.id_test, **recipe.data.ood_test}.items():
        if spec is not None:
            source = open_source(plain(spec), name, classes, cache_dir)
            content = [source.identity]  # the sandbox draws its images: the name says which
            if isinstance(source, StoredSource):
                content = [row.tobytes().hex() for row in records(source, cache_dir, is_test=True).digests]
                if with_classes:
                    content = [
                        f"{each} {source.class_names[label]}"
                        for each, label in zip(content, source.labels, strict=True)
                    ]
            found[name] = key_of(sorted(content))
    return found


@dataclass(frozen=True)
class _Set:
    place: str  # key path, for messages
    role: str
    spec: SetSpec
    source: Source
    records: Records


def shared_pairs(
    recipe: Recipe, cache_dir: Path, say: Callable[[str], None] = lambda text: None
) -> tuple[list[SharedRow], Sources]:
    """Returns the images that two roles share. Two sets of one role may, and sandbox sets are compared by name.

    Of a corrupted set the images without corruptions are compared; ``role_checks.may_share`` says which may.

    Every stored file is read once (``data.records``); what was found stays in the cache, so the next call only checks
    dates. A test set that cannot be read is passed over, with a warning in the log: it may
    be kept under lock. Images of training and validation that ``on_bad_image: skip`` leaves out are not compared; the
    log names them.

    Args:
        recipe: The recipe; its sets have passed ``check_sets``.
        cache_dir: Folder of the decoded sets; made when missing.
        say: Called with what is being done where that takes time.

    Returns:
        Rows in which every image stays, and the sets by key path. Every image that is shared stands in a row. Of many
        with the same pixels, and of more than ``NEAREST`` alike, not each stands with each.

    Raises:
        DataError: An image of training or validation cannot be read.
        StorageError: The cache cannot be written.
    """
    specs = named_sets(recipe)
    if not any(isinstance(plain(spec), StoredSet) for spec in specs.values()):
        return [], {}
    opened = (_open(spec, plain_place(path, spec), str(path[1]), cache_dir, say) for path, spec in specs.items())
    sets = [each for each in opened if each is not None]
    of_sets = [[each.role, each.spec.source, each.source.identity, pixel_limit(each.source)] for each in sets]
    key = key_of([FORMAT_VERSION, DECODERS, of_sets])
    path = cache_dir / f"overlap-{key}.json"
    rows = made_once(path, path.with_suffix(".lock"), _kept, lambda: _found(sets, path, say))

    def image(number: int, index: int) -> tuple[str, str, int, Literal["stays"]]:
        place, source = sets[number].place, sets[number].source
        return place, source.place(index), int(source.sample_ids[index]), STAYS

    found = [SharedRow(*image(a, i), *image(b, j), how, round(distance, 4)) for a, b, i, j, how, distance in rows]
    return found, {each.place: each.source for each in sets}


def same_pixels(first: Records, second: Records) -> IntArray:
    """Returns pairs of indices of images with the same pixels, int64 [K, 2], each of them at least once.

    The same bytes are the same pixels, also in files that cannot be decoded.
    """
    mine, theirs = ({row.tobytes(): index for index, row in enumerate(each.pixels)} for each in (first, second))
    pairs = {(mine[key], j) for j, row in enumerate(second.pixels) if (key := row.tobytes()) in mine}
    pairs |= {(i, theirs[key]) for i, row in enumerate(first.pixels) if (key := row.tobytes()) in theirs}
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def hashes(thumbnails: PixelArray) -> npt.NDArray[np.uint64]:
    """Returns the difference hash of thumbnails, uint64 [W, N]: where the picture gets brighter.

    A bit says whether a tile is ``STEP_UP`` brighter than the one to its left (of 8 x 16 tiles) or above it (16 x 8);
    before the first comes the last.

    Args:
        thumbnails: uint8 [N, S, S, 3].
    """
    found = [np.empty((0, 4), np.uint64)]
    for start in range(0, len(thumbnails), _BLOCK):
        grey = thumbnails[start : start + _BLOCK, ..., 0].astype(np.float32)
        wide, high = grey.reshape(-1, 8, 2, 16).mean(2), grey.reshape(-1, 16, 8, 2).mean(3)
        steps = [wide - np.roll(wide, 1, axis=2), high - np.roll(high, 1, axis=1)]
        bits = np.concatenate([step.reshape(len(grey), -1) > STEP_UP for step in steps], axis=1)
        found.append(np.packbits(bits, axis=1).view(np.uint64))
    return np.ascontiguousarray(np.concatenate(found).T)


def same_pictures(
    first: Records, second: Records, on_progress: OnProgress = lambda done, total: None
) -> tuple[IntArray, _Floats]:
    """Returns images that show one picture; hashes are compared block by block, by several threads.

    Each image of the second set is compared with its ``NEAREST`` candidates. So is each image of the first that is none
    of these: of it the nearest pair is enough, since a picture has any number of copies.

    Args:
        first: What is known of a set.
        second: Of another.
        on_progress: Called with the number of images of the second that are compared, and of all.

    Returns:
        Pairs of indices, int64 [K, 2]; the distance of each, float32 [K], 0 for the same pixels.
    """
    equal_K2 = same_pixels(first, second)
    pairs_K2, apart_K, cut_N = _nearest(first, second, on_progress)
    left = np.setdiff1d(np.flatnonzero(cut_N), np.concatenate([pairs_K2[:, 0], equal_K2[:, 0]]))
    fewer = replace(first, **{name: getattr(first, name)[left] for name in ("digests", "pixels", "thumbnails")})
    turned_K2, more_K, _ = _nearest(second, fewer, lambda done, total: None)
    order_K = np.lexsort((more_K, turned_K2[:, 1]))
    best_K = order_K[np.unique(turned_K2[order_K, 1], return_index=True)[1]]
    more_K2 = np.stack([left[turned_K2[best_K, 1]], turned_K2[best_K, 0]], axis=1)
    no_distance_K = np.zeros(len(equal_K2), np.float32)
    return np.concatenate([equal_K2, pairs_K2, more_K2]), np.concatenate([no_distance_K, apart_K, more_K[best_K]])


def _nearest(
    first: Records, second: Records, on_progress: OnProgress
) -> tuple[IntArray, _Floats, npt.NDArray[np.bool_]]:
    """Compares each image of the second set with its ``NEAREST`` candidates of the first.

    Returns:
        Pairs that show one picture, without those of the same pixels; their distances; and which images of the first
        set were some image's candidate but none of its nearest, [N].
    """
    mine_WN, theirs_WM = hashes(first.thumbnails), hashes(second.thumbnails)

    def compared(number: int) -> tuple[IntArray, _Floats, IntArray]:
        pairs_K2, bits_K, cut = np.empty((0, 2), np.int64), np.empty(0, np.uint8), [np.empty(0, np.int64)]
        begin = number * _ROWS
        for start in range(0, mine_WN.shape[1], _BLOCK):
            differ_WMN = theirs_WM[:, begin : begin + _ROWS, None] ^ mine_WN[:, None, start : start + _BLOCK]
            bits_MN = np.bitwise_count(differ_WMN).sum(0, dtype=np.uint8)  # 256 would be 0, and ends at the distance
            j, i = np.nonzero(bits_MN <= MOST_BITS)
            other = (first.pixels[start + i] != second.pixels[begin + j]).any(1)
            pairs_K2 = np.concatenate([pairs_K2, np.stack([start + i, begin + j], axis=1)[other]])
            bits_K = np.concatenate([bits_K, bits_MN[j, i][other]])
            order_K = np.lexsort((bits_K, pairs_K2[:, 1]))
            of_one_K = pairs_K2[order_K, 1]
            is_near_K = np.arange(len(of_one_K)) - np.searchsorted(of_one_K, of_one_K) < NEAREST
            cut.append(np.unique(pairs_K2[order_K[~is_near_K], 0]))
            pairs_K2, bits_K = pairs_K2[order_K[is_near_K]], bits_K[order_K[is_near_K]]
        apart_K = distances(first.thumbnails[pairs_K2[:, 0]], second.thumbnails[pairs_K2[:, 1]])
        return pairs_K2[apart_K <= LIMIT], apart_K[apart_K <= LIMIT], np.concatenate(cut)

    found, apart, cut_N = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)], np.zeros(mine_WN.shape[1], bool)
    total = theirs_WM.shape[1]
    for number, (pairs_K2, apart_K, cut) in enumerate(in_order(compared, range(math.ceil(total / _ROWS))), start=1):
        found.append(pairs_K2)
        apart.append(apart_K)
        cut_N[cut] = True
        on_progress(min(number * _ROWS, total), total)
    return np.concatenate(found), np.concatenate(apart), cut_N


def distances(first: PixelArray, second: PixelArray) -> _Floats:
    """Returns how far thumbnails are apart, pair by pair, the same in either order; ``LIMIT`` is the limit.

    It is the mean absolute difference of the grey levels after their mean is subtracted and their standard deviation is
    divided out, less where that is small: noise and compression are so many grey levels whatever the picture. It is
    infinite without contrast, if one picture has ``GAIN`` times the contrast of the other, and if the mean colours
    differ by more than ``COLOUR``.

    Args:
        first: uint8 [K, S, S, 3].
        second: uint8 [K, S, S, 3].

    Returns:
        float32 [K].
    """
    (x_KSS, x_K2), (y_KSS, y_K2) = _centred(first), _centred(second)
    of_x_K, of_y_K = (np.maximum(each.std((1, 2)), 1e-3) for each in (x_KSS, y_KSS))
    low_K, high_K = np.minimum(of_x_K, of_y_K), np.maximum(of_x_K, of_y_K)
    contrast_K = np.sqrt(low_K * high_K)
    apart_K = np.abs(x_KSS / of_x_K[:, None, None] - y_KSS / of_y_K[:, None, None]).mean((1, 2))
    are_other_K = (np.abs(x_K2 - y_K2).sum(1) > COLOUR) | (low_K < LEAST_CONTRAST) | (high_K > GAIN * low_K)
    return np.where(are_other_K, np.inf, apart_K * contrast_K / (contrast_K + FLOOR)).astype(np.float32)


def _centred(thumbnails: PixelArray) -> tuple[_Floats, _Floats]:
    """Returns brightness less its mean, float32 [K, S, S], and the mean of both colours, float32 [K, 2]."""
    means_K3 = thumbnails.mean((1, 2), dtype=np.float32)
    return thumbnails[..., 0] - means_K3[:, :1, None], means_K3[:, 1:]


def _found(sets: Sequence[_Set], path: Path, say: Callable[[str], None]) -> list[Any]:
    """Compares the sets of different roles, and keeps the pairs."""
    rows: list[Any] = []
    for (a, first), (b, second) in itertools.combinations(enumerate(sets), 2):
        with_files = isinstance(first.source, StoredSource) or isinstance(second.source, StoredSource)
        if not with_files or may_share((first.role, first.spec), (second.role, second.spec)):
            continue
        on_progress = time_left(say, f"comparing {first.place} and {second.place}")
        pairs_K2, apart_K = same_pictures(first.records, second.records, on_progress)
        same_K = (first.records.digests[pairs_K2[:, 0]] == second.records.digests[pairs_K2[:, 1]]).all(1)
        for (i, j), is_copy, distance in zip(pairs_K2.tolist(), same_K.tolist(), apart_K.tolist(), strict=True):
            rows.append((a, b, i, j, "same bytes" if is_copy else "same picture", distance))
    write_json(path, {"format_version": FORMAT_VERSION, "pairs": rows})
    return rows


def _kept(path: Path) -> list[Any] | None:
    """Returns the pairs that were found before; None where that is not known."""
    try:
        return list(read_json(path.parent, path.name)["pairs"])
    except StorageError:
        return None


def _open(spec: SetSpec, place: str, role: str, cache_dir: Path, say: Callable[[str], None]) -> _Set | None:
    """Opens and reads a set without looking at its classes; None for a test set that cannot be read."""
    images, is_test = plain(spec), role in TEST_ROLES
    on_progress = time_left(say, f"reading the images of {place}")
    try:
        if isinstance(images, StoredSet):
            whole = unlabelled_source(list_set(images, place), images, place)
            skips = images.on_bad_image == "skip" and not is_test
            source: Source = without_bad_images(whole, cache_dir, on_progress) if skips else whole
        else:
            source = open_source(images, place, None)
        known = records(source, cache_dir, is_test, on_progress)
        if known.problems:
            raise DataError(list(known.problems.values())[:NUM_NAMED])
    except DataError as error:
        if not is_test:
            raise
        _log.warning("It is unknown whether %s shares images with another role: %s", place, error.problems[0])
        return None
    return _Set(place, role, spec, source, known)
