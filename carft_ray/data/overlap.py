"""Images that stand in two roles, under whatever name: found by what the files hold and by what the pictures show.

Two images are the same when

- their files have the same bytes (copies, renamed files, links, other class folders), or
- their thumbnails agree (the same picture saved again in another format or at another size).

A thumbnail is the picture averaged over 8 x 8 tiles, compared as brightness (8 x 8) and colour (4 x 4, weighted twice),
since that is what JPEG keeps. Their distance, divided by the contrast of the two pictures, must be below ``TOLERANCE``.
Measured on the sandbox (synthetic; 15,600 pictures of all twelve domains at 32 pixels, all pairs): no two different
pictures are nearer than 0.22, so there is no false alarm. Of 2,400 copies each are found: PNG, BMP and lossless WebP
100 %, JPEG quality 90 99.8 %, quality 75 92 %, WebP quality 80 91 %, double size 100 %, half size 97 to 100 % (depends
on the filter), half size and then JPEG 75 about 35 %. What is missed is mostly dark pictures, half of which JPEG 75
hides; one that is found is enough. Real photos were not measured.

Not found are crops, mirrored or rotated copies and strongly edited ones (colours, filters, text laid over), other
photos of the same scene, neighbouring frames of a video, and re-encoded copies of pictures that are all but one colour.

This is the one module besides `test` that reads test images. It sees neither labels nor a model, and nothing leaves it
but names of files that stand in two roles.

Shape letters: N images of a set, M of another, F = 96 features.
"""

import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from carft_ray.data.cache import key_of, lock
from carft_ray.data.content import DIGEST_BYTES, THREADS, image_digests
from carft_ray.data.listing import StoredSource, unlabelled_source
from carft_ray.data.readers import list_set
from carft_ray.data.sets import TEST_ROLES, check_roles, may_share, open_source, plain_place
from carft_ray.data.source import IntArray, PixelArray, Source
from carft_ray.errors import DataError, HoldOutError, Problem
from carft_ray.files import write_bytes, write_json
from carft_ray.recipe.rules import named_sets
from carft_ray.recipe.schema import Recipe, SetSpec, StoredSet, plain

FORMAT_VERSION = 1  # rises when other hashes or thumbnails are made, or another tolerance decides
SIDE = 8  # pixels of a thumbnail
TOLERANCE = 0.15  # largest distance of two thumbnails of one picture, relative to its contrast
FLOOR = 10.0  # variance, in squared grey levels, below which contrast is rounding and compression
LEAST_CONTRAST = 4.0  # variance; a picture below it has only its bytes to be known by
NUM_EXAMPLES = 2
TOLD_EVERY_S = 10.0

_log = logging.getLogger(__name__)

_Floats = npt.NDArray[np.float32]
_BLOCK = 2048  # rows compared at a time


@dataclass(frozen=True, eq=False)
class Signatures:
    """What the images of a set are known by.

    Attributes:
        digests: Hash of every file (of the pixels where there is none), uint8 [N, 16].
        thumbnails: uint8 [N, 8, 8, 3]; black where a picture cannot be decoded.
    """

    digests: PixelArray
    thumbnails: PixelArray


@dataclass(frozen=True)
class _Set:
    place: str  # key path, for messages
    role: str
    spec: SetSpec
    source: Source
    key: str
    may_be_damaged: bool  # pictures that cannot be decoded are known by their bytes alone


def check_overlap(
    recipe: Recipe, base_dir: Path, cache_dir: Path, say: Callable[[str], None] = lambda text: None
) -> None:
    """Refuses a recipe in which two roles share images. Two sets of one role may, and sandbox sets are told by name.

    Of a corrupted set the images without corruptions are compared; ``sets.may_share`` says with which it may share.

    Every file of the folder sets is read once; the hashes stay in the cache, so the next call only looks at dates.
    A test set that cannot be read is passed over, with a warning in the log: it may be kept under lock.

    Args:
        recipe: The recipe; its sets have passed ``check_sets``.
        base_dir: Folder that relative paths count from.
        cache_dir: Folder of the decoded sets; made when missing.
        say: Told what is being done where that takes time.

    Raises:
        HoldOutError: Two roles share images; a problem for each pair of sets.
        DataError: An image of training or validation cannot be read.
        StorageError: The cache cannot be written.
    """
    if problems := check_roles(recipe, base_dir):
        raise HoldOutError(problems)
    specs = named_sets(recipe)
    if not any(isinstance(plain(spec), StoredSet) for spec in specs.values()):
        return
    places = {path: plain_place(path, spec) for path, spec in specs.items()}
    sets = [found for path, spec in specs.items() if (found := _open(spec, places[path], str(path[1]), base_dir))]
    clean = cache_dir / f"overlap-{_key(*(f'{each.role} {each.spec.source} {each.key}' for each in sets))}.json"
    if clean.exists():
        return
    with lock(cache_dir / "overlap.lock"):
        for left in (*cache_dir.glob(".signatures-*.tmp"), *cache_dir.glob(".overlap-*.tmp")):
            left.unlink(missing_ok=True)  # of a process that was killed
        known = [(each, made) for each in sets if (made := _signatures(each, cache_dir, say)) is not None]
        for (first, mine), (second, theirs) in itertools.combinations(known, 2):
            with_files = isinstance(first.source, StoredSource) or isinstance(second.source, StoredSource)
            if with_files and not may_share((first.role, first.spec), (second.role, second.spec)):
                problems += _compare(first, mine, second, theirs)
        if problems:
            raise HoldOutError(problems)
        if len(known) == len(sets):
            write_json(clean, {"format_version": FORMAT_VERSION, "shared_images": 0})


def signatures(
    source: Source,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    undecodable: bool = False,
) -> Signatures:
    """Returns the hashes and thumbnails of a set, from the cache or made now.

    Args:
        source: The set.
        cache_dir: Folder of the decoded sets; made when missing.
        on_progress: Told the number of images done and in all, now and then; first for the hashes, then the thumbnails.
        undecodable: Take a black thumbnail for a picture that cannot be decoded, instead of raising.

    Raises:
        DataError: A file cannot be read.
        StorageError: The cache cannot be written.
    """
    path = cache_dir / f"signatures-{_key(identity(source))}.npy"
    if (found := _cached(path, len(source))) is not None:
        return found
    digests = np.frombuffer(b"".join(image_digests(source, on_progress)), np.uint8).reshape(-1, DIGEST_BYTES)

    def thumbnail_of(index: int) -> PixelArray:
        try:
            return thumbnail(source.pixels(index))
        except DataError:
            if not undecodable:
                raise
            return np.zeros((SIDE, SIDE, 3), np.uint8)

    thumbnails = np.empty((len(source), SIDE, SIDE, 3), np.uint8)
    with ThreadPoolExecutor(THREADS) as pool:
        for index, pixels in enumerate(pool.map(thumbnail_of, range(len(source)))):
            thumbnails[index] = pixels
            if (index + 1) % 1000 == 0:
                on_progress(index + 1, len(source))
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([digests, thumbnails.reshape(len(source), -1)], axis=1))
    write_bytes(path, buffer.getvalue())
    return Signatures(digests, thumbnails)


def identity(source: Source) -> str:
    """Returns the fingerprint of a set and where its files are: archives give many files one date and one size."""
    return f"{source.fingerprint} {source.home}"


def thumbnail(pixels: PixelArray) -> PixelArray:
    """Returns the mean colours of 8 x 8 tiles of a picture.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        uint8 [8, 8, 3].
    """
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))


def shared_images(first: Signatures, second: Signatures) -> tuple[IntArray, IntArray]:
    """Finds for every image of the second set one of the first that is the same.

    Returns:
        Its index in the first set by content, int64 [M], and by thumbnail, int64 [M]; -1 where there is none. Images
        that are found by content are not looked for by thumbnail.
    """
    rows = {row.tobytes(): index for index, row in enumerate(first.digests)}
    by_content = np.array([rows.get(row.tobytes(), -1) for row in second.digests], dtype=np.int64)
    by_thumbnail = np.full(len(by_content), -1, dtype=np.int64)
    rest = np.flatnonzero(by_content < 0)
    for here, there in alike(first.thumbnails, second.thumbnails[rest]):
        by_thumbnail[rest[there]] = here
    return by_content, by_thumbnail


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


def alike(first: PixelArray, second: PixelArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yields pairs of indices of thumbnails within the tolerance, int64 [K] each, a block at a time.

    With its mean taken off, the floor as one more feature, and length 1, a picture is a point; the points of pictures
    x, y are at most ``|x - y| / sqrt(|x| |y|)`` apart (Dunkl and Williams 1964), which is no more than the distance
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
            same = distances(first[i], second[j]) <= TOLERANCE
            yield i[same], j[same]


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
    centred: _Floats = part - part.mean(1, keepdims=True)
    return centred


def _compare(first: _Set, mine: Signatures, second: _Set, theirs: Signatures) -> list[Problem]:
    by_content, by_thumbnail = shared_images(mine, theirs)
    match = np.maximum(by_content, by_thumbnail)
    shared = np.flatnonzero(match >= 0)
    if not len(shared):
        return []
    num_content = int((by_content >= 0).sum())
    counts = {"the same file content": num_content, "the same picture re-encoded or resized": len(shared) - num_content}
    how = ", ".join(f"{count} with {words}" for words, count in counts.items() if count)
    pairs = [
        (first.source.place(int(match[index])), second.source.place(int(index)))
        for index in shared[:NUM_EXAMPLES].tolist()
    ]
    examples = "; ".join(f"{one} and {other}" for one, other in pairs)
    rule = f"a set has one role and must not share images with {first.place}"
    value = f"{len(shared)} of {len(theirs.digests)} images in both ({how}): {examples}"
    step = f"Give each role images of its own: remove the shared ones from {first.place} or from {second.place}."
    return [Problem(second.place, rule, value, next_step=step)]


def _open(spec: SetSpec, place: str, role: str, base_dir: Path) -> _Set | None:
    """Opens a set without looking at its classes; None for a test set that cannot be listed."""
    images = plain(spec)
    if not isinstance(images, StoredSet):
        drawn = open_source(images, place, None, base_dir)
        return _Set(place, role, spec, drawn, identity(drawn), False)
    try:
        source = unlabelled_source(list_set(images, base_dir, place), images, place)
        return _Set(place, role, spec, source, identity(source), role in TEST_ROLES or images.on_bad_image == "skip")
    except DataError as error:
        _pass_over(place, role, error)
        return None


def _signatures(each: _Set, cache_dir: Path, say: Callable[[str], None]) -> Signatures | None:
    """Returns the signatures of a set; None for a test set with files that cannot be read."""
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TOLD_EVERY_S:
            told = time.monotonic()
            say(f"comparing the images of the roles: {each.place}, {done} of {total}")

    try:
        return signatures(each.source, cache_dir, on_progress, undecodable=each.may_be_damaged)
    except DataError as error:
        _pass_over(each.place, each.role, error)
        return None


def _pass_over(place: str, role: str, error: DataError) -> None:
    """Warns of a test set that cannot be read; of other sets that is an error."""
    if role not in TEST_ROLES:
        raise error
    _log.warning("Whether %s shares images with another role is not known: %s", place, error.problems[0])


def _key(*fingerprints: str) -> str:
    return key_of([FORMAT_VERSION, *fingerprints])


def _cached(path: Path, num_images: int) -> Signatures | None:
    """Opens an entry of the cache; None when it is missing or damaged."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    if rows.dtype != np.uint8 or rows.shape != (num_images, DIGEST_BYTES + SIDE * SIDE * 3):
        return None
    return Signatures(rows[:, :DIGEST_BYTES], rows[:, DIGEST_BYTES:].reshape(num_images, SIDE, SIDE, 3))
