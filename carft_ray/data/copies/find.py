"""Images that stand in two roles, under whatever name: found by what the files hold and by what the pictures show.

Two images are the same when

- their files have the same bytes (copies, renamed files, links, other class folders), or
- they show one picture (saved in another format or at another size, slightly cropped, bordered, with a small mark).

The second is found in two steps. Thumbnails name candidates, among all images quickly; each candidate is then compared
again with more pixels (``data.same_picture``), which separates drawings whose thumbnails agree.

A thumbnail is a view of the picture averaged over 8 x 8 tiles, compared as brightness (8 x 8) and colour (4 x 4,
weighted twice), since that is what JPEG keeps. Their distance, divided by the contrast of the two views, must be below
``TOLERANCE``. There are four views: the whole; without 5 % on each side, as a crop shows it; the middle, which marks at
the edges spare; and what lies inside a border. ``MATCHED`` says which are compared with which. docs/duplicates.md says
what of all this is found, measured on real images and on the sandbox.

Not found are mirrored or rotated copies, larger or one-sided crops, strong changes of colours, large marks, other
photos of the same scene, neighbouring frames of a video, and re-encoded copies of pictures that are all but one colour.

Before `test`, test images are read by ``data.records`` alone, for hashes and thumbnails, and by this module, for the
candidates. It sees neither labels nor a model, and nothing leaves it but names and pictures of images that stand in two
roles.

Shape letters: N images of a set, M of another, V = 4 views, F = 96 features, K pairs.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from carft_ray.data.bad_images import without_bad_images
from carft_ray.data.cache import key_of, made_once
from carft_ray.data.class_names import class_folders
from carft_ray.data.content import reading_threads
from carft_ray.data.listing import StoredSource
from carft_ray.data.open_source import open_source
from carft_ray.data.readers import list_set, plain_place
from carft_ray.data.records import NUM_NAMED, SIDE, VIEWS, Records, records
from carft_ray.data.role_checks import may_share
from carft_ray.data.same_picture import LIMIT, GreyPicture, grey_picture, picture_distance
from carft_ray.data.selection import unlabelled_source
from carft_ray.data.source import IntArray, PixelArray, Source, identity
from carft_ray.errors import DataError, Problem, StorageError
from carft_ray.files import read_json, write_json
from carft_ray.recipe.checks.rules import named_sets
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.recipe.schema.sets import TEST_ROLES, SetSpec, StoredSet, plain
from carft_ray.words import time_left

FORMAT_VERSION = 3  # rises when other pairs are found in the same records
INSIDE = len(VIEWS)
MATCHED = ((0, 0), (0, 1), (1, 0), (2, 2), (0, INSIDE), (INSIDE, 0), (INSIDE, INSIDE))  # views of two images
TOLERANCE = 0.25  # largest distance of two thumbnails of candidates, relative to their contrast
NEAREST = 8  # candidates of an image that are compared: of frames of a video each is one of all others
FLOOR = 10.0  # variance, in squared grey levels, below which contrast is rounding and compression
LEAST_CONTRAST = 4.0  # variance; a picture below it has only its bytes to be known by
NUM_EXAMPLES = 2
STEP = (
    "Write data.shared_images: drop, which keeps them only in the role nearest to the test, or remove them from one of "
    "the two sets. List all of them: carft-ray doctor RECIPE --pairs pairs.html"
)
GREY_KEPT = 4096  # of 16 kB

_log = logging.getLogger(__name__)

_Floats = npt.NDArray[np.float32]
_BLOCK = 2048  # rows compared at a time
_Found = tuple[int, int, Literal["same bytes", "same picture"], float]  # index of both images, how, distance


@dataclass(frozen=True)
class SharedImage:
    """One of the two images of a pair.

    Attributes:
        place: Key path of its set.
        source: The set.
        index: Its index there.
    """

    place: str
    source: Source
    index: int

    @property
    def name(self) -> str:
        """Name for messages, such as the path of its file."""
        return self.source.place(self.index)

    @property
    def sample_id(self) -> int:
        """Its stable id."""
        return int(self.source.sample_ids[self.index])


@dataclass(frozen=True)
class SharedPair:
    """Two images in two roles that are the same.

    Attributes:
        first: The one of the set that the recipe names first.
        second: The other.
        how: By what they were found.
        distance: That of ``same_picture.picture_distance``; 0 for the same bytes.
    """

    first: SharedImage
    second: SharedImage
    how: Literal["same bytes", "same picture"]
    distance: float


def digests_of_tests(recipe: Recipe, cache_dir: Path) -> dict[str, str]:
    """Returns per test set a digest of the contents of its images, whatever their names, classes and order.

    Raises:
        DataError: A set cannot be opened.
        StorageError: The cache cannot be written.
    """
    classes, found = class_folders(recipe), {}
    for name, spec in {"id_test": recipe.data.id_test, **recipe.data.ood_test}.items():
        if spec is not None:
            source = open_source(plain(spec), name, classes, cache_dir)
            content = [source.fingerprint]  # the sandbox draws its images: the name says which
            if isinstance(source, StoredSource):
                content = sorted(row.tobytes().hex() for row in records(source, cache_dir, is_test=True).digests)
            found[name] = key_of(content)
    return found


@dataclass(frozen=True)
class _Set:
    place: str  # key path, for messages
    role: str
    spec: SetSpec
    source: Source


def shared_pairs(recipe: Recipe, cache_dir: Path, say: Callable[[str], None] = lambda text: None) -> list[SharedPair]:
    """Returns the images that two roles share. Two sets of one role may, and sandbox sets are compared by name.

    Of a corrupted set the images without corruptions are compared; ``role_checks.may_share`` says which may.

    Every stored file is read once (``data.records``), and candidates once more; what was found stays in the cache, so
    the next call only checks dates. A test set that cannot be read is passed over, with a warning in the log: it may
    be kept under lock. Images of training and validation that ``on_bad_image: skip`` leaves out are not compared; the
    log names them.

    Args:
        recipe: The recipe; its sets have passed ``check_sets``.
        cache_dir: Folder of the decoded sets; made when missing.
        say: Called with what is being done where that takes time.

    Returns:
        Every image that is shared stands in a pair. Of many with the same bytes, and of more than ``NEAREST`` alike,
        not each stands with each.

    Raises:
        DataError: An image of training or validation cannot be read.
        StorageError: The cache cannot be written.
    """
    specs = named_sets(recipe)
    if not any(isinstance(plain(spec), StoredSet) for spec in specs.values()):
        return []
    places = {path: plain_place(path, spec) for path, spec in specs.items()}
    opened = (_open(spec, places[path], str(path[1]), cache_dir, say) for path, spec in specs.items())
    sets = [each for each in opened if each is not None]
    key = key_of([FORMAT_VERSION, *(f"{each.role} {each.spec.source} {identity(each.source)}" for each in sets)])
    path = cache_dir / f"overlap-{key}.json"
    rows = made_once(path, path.with_suffix(".lock"), _kept, lambda: _found(sets, path, say))

    def image(number: int, index: int) -> SharedImage:
        return SharedImage(sets[number].place, sets[number].source, index)

    return [SharedPair(image(a, i), image(b, j), how, distance) for a, b, i, j, how, distance in rows]


def shared_problems(pairs: Sequence[SharedPair]) -> list[Problem]:
    """Returns a problem for each two sets that share images."""
    problems = []
    by_sets: dict[tuple[str, str], list[SharedPair]] = {}
    for pair in pairs:
        by_sets.setdefault((pair.first.place, pair.second.place), []).append(pair)
    for (first, second), shared in by_sets.items():
        how = " and ".join(sorted({pair.how for pair in shared}))
        examples = "; ".join(f"{pair.first.name} and {pair.second.name}" for pair in shared[:NUM_EXAMPLES])
        rule = f"a set has one role and must not share images with {first}"
        num_shared, num_images = len({pair.second.index for pair in shared}), len(shared[0].second.source)
        value = f"{num_shared} of {num_images} images in both ({how}): {examples}"
        problems.append(Problem(second, rule, value, next_step=STEP))
    return problems


def same_bytes(first: Records, second: Records) -> IntArray:
    """Returns pairs of indices of images with the same bytes, int64 [K, 2], each of them at least once."""
    mine = {row.tobytes(): index for index, row in reversed(list(enumerate(first.digests)))}
    theirs = {row.tobytes(): index for index, row in reversed(list(enumerate(second.digests)))}
    pairs = [(mine[key], j) for j, row in enumerate(second.digests) if (key := row.tobytes()) in mine]
    pairs += [
        (i, theirs[key]) for i, row in enumerate(first.digests) if (key := row.tobytes()) in theirs and i != mine[key]
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def candidates(first: Records, second: Records) -> IntArray:
    """Returns pairs of indices of images that may show one picture, and differ in their bytes.

    Returns:
        int64 [K, 2], sorted by the second; for each of the second set the ``NEAREST``.
    """
    pairs, apart = [np.empty((0, 2), np.int64)], [np.empty(0, np.float32)]
    for mine, theirs in MATCHED:
        rows_N, rows_M = _with_view(first.thumbnails, mine), _with_view(second.thumbnails, theirs)
        for i, j, distance in alike(first.thumbnails[rows_N, mine], second.thumbnails[rows_M, theirs]):
            found = np.stack([rows_N[i], rows_M[j]], axis=1)
            other = (first.digests[found[:, 0]] != second.digests[found[:, 1]]).any(1)
            near = _nearest(found[other], distance[other])
            pairs.append(found[other][near])
            apart.append(distance[other][near])
    whole, distance = np.concatenate(pairs), np.concatenate(apart)
    order = np.argsort(distance, kind="stable")
    whole, once = np.unique(whole[order], axis=0, return_index=True)
    return whole[_nearest(whole, distance[order][once])]


def _with_view(thumbnails: PixelArray, view: int) -> IntArray:
    """Returns the images that have a view of its own: the inside of a border is that of those with a border."""
    if view != INSIDE:
        return np.arange(len(thumbnails))
    return np.flatnonzero((thumbnails[:, INSIDE] != thumbnails[:, 0]).any((1, 2, 3)))


def _nearest(pairs: IntArray, distance: _Floats) -> IntArray:
    """Returns which pairs, int64 [K, 2], are among the ``NEAREST`` of their second index, sorted by that."""
    order = np.lexsort((distance, pairs[:, 1]))
    ordered = pairs[order, 1]
    return np.asarray(order[np.arange(len(ordered)) - np.searchsorted(ordered, ordered) < NEAREST])


def distances(first: PixelArray, second: PixelArray) -> _Floats:
    """Returns the distance of thumbnails, pair by pair: root mean square over brightness and colour, over contrast.

    Args:
        first: uint8 [N, 8, 8, 3].
        second: uint8 [N, 8, 8, 3].

    Returns:
        float32 [N]; ``TOLERANCE`` is the limit. Infinite where a picture has no contrast.
    """
    (x_NF, contrast_N), (y_NF, other_N) = _features(first), _features(second)
    squared_N = np.square(x_NF - y_NF).sum(1) / np.sqrt((contrast_N + FLOOR) * (other_N + FLOOR))
    return np.where(np.minimum(contrast_N, other_N) < LEAST_CONTRAST, np.inf, np.sqrt(squared_N)).astype(np.float32)


def alike(first: PixelArray, second: PixelArray) -> Iterator[tuple[IntArray, IntArray, _Floats]]:
    """Yields pairs of indices of thumbnails within the tolerance, int64 [K] each, and distances, a block at a time.

    With its mean taken off, the floor as one more feature, and length 1, a picture is a point; the points of pictures
    x, y are at most ``|x - y| / sqrt(|x| |y|)`` apart (Dunkl and Williams 1964), which is at most the distance
    that decides. So what agrees has points nearer than the tolerance, and so have their projections on any axis:
    sorted along the axis on which the first set is widest, only a stretch of it is compared.
    """
    points_NF, kept_N = _points(first)
    others_MF, kept_M = _points(second)
    if not len(kept_N) or not len(kept_M):
        return
    axis_F = np.linalg.eigh(np.cov(points_NF.T) if len(points_NF) > 1 else np.eye(points_NF.shape[1]))[1][:, -1]
    axis_F = axis_F.astype(np.float32)
    order_N, order_M = np.argsort(points_NF @ axis_F), np.argsort(others_MF @ axis_F)
    points_NF, kept_N, others_MF, kept_M = points_NF[order_N], kept_N[order_N], others_MF[order_M], kept_M[order_M]
    along_N, along_M = points_NF @ axis_F, others_MF @ axis_F
    margin, least_cosine = TOLERANCE + 1e-3, 1 - (TOLERANCE + 1e-3) ** 2 / 2  # float32 rounds
    for start in range(0, len(others_MF), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(others_MF)))
        low = np.searchsorted(along_N, along_M[block.start] - margin)
        high = np.searchsorted(along_N, along_M[block.stop - 1] + margin, side="right")
        for begin in range(low, high, _BLOCK):
            end = min(begin + _BLOCK, high)
            here, there = np.nonzero(points_NF[begin:end] @ others_MF[block].T >= least_cosine)
            i, j = kept_N[begin + here], kept_M[block.start + there]
            apart = distances(first[i], second[j])
            same = apart <= TOLERANCE
            yield i[same], j[same], apart[same]


def _points(thumbnails: PixelArray) -> tuple[_Floats, IntArray]:
    """Returns the points of thumbnails with contrast, float32 [K, F + 1] of length 1, and their indices, int64 [K]."""
    parts, indices = [np.empty((0, _NUM_FEATURES + 1), np.float32)], [np.empty(0, np.int64)]
    for start in range(0, len(thumbnails), 1 << 16):
        features_NF, contrast_N = _features(thumbnails[start : start + (1 << 16)])
        kept = np.flatnonzero(contrast_N >= LEAST_CONTRAST)
        centred = np.concatenate([_centred(part) for part in np.split(features_NF[kept], _PARTS, axis=1)], axis=1)
        whole = np.concatenate([centred, np.full((len(kept), 1), FLOOR**0.5, np.float32)], axis=1)
        parts.append(whole / np.linalg.norm(whole, axis=1, keepdims=True))
        indices.append(kept + start)
    return np.concatenate(parts), np.concatenate(indices)


_PARTS = (SIDE**2, SIDE**2 + SIDE**2 // 4)  # where brightness ends, and blue
_NUM_FEATURES = SIDE**2 + SIDE**2 // 2


def _features(thumbnails: PixelArray) -> tuple[_Floats, _Floats]:
    """Returns brightness, blue and red (Y, Cb, Cr of JPEG, without offset) scaled so that the squared distance of two
    rows is the mean squared difference, colours weighted by 2; float32 [N, F], and the same variance, float32 [N]."""
    red, green, blue = np.moveaxis(thumbnails.astype(np.float32), -1, 0)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    parts = [bright.reshape(-1, SIDE**2) / SIDE]
    for colour in (0.564 * (blue - bright), 0.713 * (red - bright)):
        half = colour.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4))
        parts.append(half.reshape(-1, SIDE**2 // 4) * np.float32(2**0.5 / (SIDE // 2)))
    contrast_N = sum(np.square(_centred(part)).sum(1) for part in parts)
    return np.concatenate(parts, axis=1), np.asarray(contrast_N, np.float32)


def _centred(part: _Floats) -> _Floats:
    return np.asarray(part - part.mean(1, keepdims=True))


def _found(sets: Sequence[_Set], path: Path, say: Callable[[str], None]) -> list[Any]:
    """Compares the sets of different roles, and keeps the pairs where all sets can be read."""
    known = [(number, made) for number, each in enumerate(sets) if (made := _known(each, path.parent, say))]
    rows: list[Any] = []
    for (a, mine), (b, theirs) in itertools.combinations(known, 2):
        first, second = sets[a], sets[b]
        with_files = isinstance(first.source, StoredSource) or isinstance(second.source, StoredSource)
        if with_files and not may_share((first.role, first.spec), (second.role, second.spec)):
            rows += [(a, b, *found) for found in _compare(first, mine, second, theirs, say)]
    if len(known) == len(sets):
        write_json(path, {"format_version": FORMAT_VERSION, "pairs": rows})
    return rows


def _compare(first: _Set, mine: Records, second: _Set, theirs: Records, say: Callable[[str], None]) -> list[_Found]:
    @functools.lru_cache(GREY_KEPT)
    def grey_at(is_second: bool, index: int) -> GreyPicture:
        return grey_picture((second if is_second else first).source.pixels(index))

    def distance_of(pair: tuple[int, int]) -> float:
        return picture_distance(grey_at(False, pair[0]), grey_at(True, pair[1]))

    found: list[_Found] = [(i, j, "same bytes", 0.0) for i, j in same_bytes(mine, theirs).tolist()]
    maybe = [(i, j) for i, j in candidates(mine, theirs).tolist()]
    on_progress = time_left(say, f"comparing {first.place} and {second.place}, pictures that may be the same")
    with ThreadPoolExecutor(reading_threads()) as pool:
        for number, (pair, distance) in enumerate(zip(maybe, pool.map(distance_of, maybe), strict=True), start=1):
            on_progress(number, len(maybe))
            if distance <= LIMIT:
                found.append((*pair, "same picture", distance))
    return found


def _kept(path: Path) -> list[Any] | None:
    """Returns the pairs that were found before; None where that is not known."""
    try:
        return list(read_json(path.parent, path.name)["pairs"])
    except StorageError:
        return None


def _open(spec: SetSpec, place: str, role: str, cache_dir: Path, say: Callable[[str], None]) -> _Set | None:
    """Opens a set without looking at its classes; None for a test set that cannot be listed."""
    images = plain(spec)
    if not isinstance(images, StoredSet):
        return _Set(place, role, spec, open_source(images, place, None))
    try:
        source = unlabelled_source(list_set(images, place), images, place)
        if images.on_bad_image == "skip" and role not in TEST_ROLES:
            source = without_bad_images(source, cache_dir, time_left(say, f"reading the images of {place}"))
        if not len(source):
            raise DataError(Problem(place, "must have an image"))
        identity(source)  # asks for size and date of each file
        return _Set(place, role, spec, source)
    except DataError as error:
        _pass_over(place, role, error)
        return None


def _known(each: _Set, cache_dir: Path, say: Callable[[str], None]) -> Records | None:
    """Returns what is known of a set; None for a test set with files that cannot be read."""
    try:
        on_progress = time_left(say, f"reading the images of {each.place}")
        found = records(each.source, cache_dir, each.role in TEST_ROLES, on_progress)
        if found.problems:
            raise DataError(list(found.problems.values())[:NUM_NAMED])
    except DataError as error:
        _pass_over(each.place, each.role, error)
        return None
    return found


def _pass_over(place: str, role: str, error: DataError) -> None:
    """Warns of a test set that cannot be read; of other sets that is an error."""
    if role not in TEST_ROLES:
        raise error
    _log.warning("It is unknown whether %s shares images with another role: %s", place, error.problems[0])
