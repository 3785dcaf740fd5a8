"""What can be said of the images of a set before anything is trained on them; every file is read once.

Of a test set only counts and a hash are taken: no image of it is decoded.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image, UnidentifiedImageError

from carft_ray.data.content import THREADS, image_digest, set_digest
from carft_ray.data.listing import StoredSource
from carft_ray.data.source import Source
from carft_ray.errors import DataError, Problem

NUM_EXAMPLES = 5  # of images that cannot be read
IMBALANCE = 10  # images of the largest class over those of the smallest from which on it is told


@dataclass(frozen=True)
class Checkup:
    """What was found in a set.

    Attributes:
        num_images: N.
        digest: Hash of ids, labels and contents; None when a file cannot be read.
        sizes: Smallest, median and largest short side in pixels; None where no image was decoded.
        modes: How many images have which mode of Pillow (RGB, L, CMYK ...); empty where no image was decoded.
        megabytes: Of all contents.
        unreadable: The first images that cannot be read or decoded.
        num_unreadable: How many there are.
        num_twice: Images with the very content of an earlier one of the set.
        contradictions: Of these, such as have another label than the earlier one.
    """

    num_images: int
    digest: str | None
    sizes: tuple[int, float, int] | None
    modes: dict[str, int]
    megabytes: float
    unreadable: tuple[Problem, ...]
    num_unreadable: int
    num_twice: int
    contradictions: tuple[str, ...]


def check_up(
    source: StoredSource, decode: bool, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Checkup:
    """Reads every image of a set.

    Args:
        source: The set.
        decode: Decode the images too; not of a test set.
        on_progress: Told the number of images done and in all, now and then.
    """
    found: list[_Image] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for number, one in enumerate(pool.map(lambda index: _look(source, index, decode), range(len(source))), start=1):
            found.append(one)
            if number % 200 == 0 or number == len(source):
                on_progress(number, len(source))
    problems = [one.problem for one in found if one.problem is not None]
    digests = [one.digest for one in found if one.digest is not None]
    sides = [one.side for one in found if one.side is not None]
    twice, contradictions = _repeated(source, found)
    return Checkup(
        num_images=len(source),
        digest=set_digest(source, digests) if len(digests) == len(found) else None,
        sizes=(min(sides), median(sides), max(sides)) if sides else None,
        modes=dict(Counter(one.mode for one in found if one.mode is not None).most_common()),
        megabytes=round(sum(one.num_bytes for one in found) / 1e6, 3),
        unreadable=tuple(problems[:NUM_EXAMPLES]),
        num_unreadable=len(problems),
        num_twice=twice,
        contradictions=tuple(contradictions[:NUM_EXAMPLES]),
    )


@dataclass(frozen=True)
class _Image:
    digest: bytes | None = None
    num_bytes: int = 0
    side: int | None = None
    mode: str | None = None
    problem: Problem | None = None


def _look(source: StoredSource, index: int, decode: bool) -> _Image:
    try:
        content = source.content(index)
    except DataError as error:
        return _Image(problem=error.problems[0])
    digest = image_digest(content)
    if not decode:
        return _Image(digest, len(content))
    try:
        height, width = source.decode(content, index).shape[:2]
    except DataError as error:
        return _Image(digest, len(content), problem=error.problems[0])
    return _Image(digest, len(content), min(height, width), _mode(content))


def _mode(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as file:
            return file.mode
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "RGB"  # pixels that were never encoded


def _repeated(source: Source, found: Sequence[_Image]) -> tuple[int, list[str]]:
    """Returns how many images repeat an earlier one, and those that contradict its label."""
    first: dict[bytes, int] = {}
    twice, contradictions = 0, []
    for index, one in enumerate(found):
        if one.digest is None:
            continue
        earlier = first.setdefault(one.digest, index)
        if earlier == index:
            continue
        twice += 1
        if source.labels[earlier] != source.labels[index]:
            contradictions.append(f"{source.place(earlier)} and {source.place(index)}")
    return twice, contradictions


def class_counts(source: Source) -> dict[str, Any]:
    """Returns what a set's labels tell, as plain data for JSON; no image is read."""
    counts = Counter(source.labels.tolist())
    fewest = min(counts, key=lambda label: (counts[label], label))
    return {
        "num_images": len(source),
        "num_classes": len(counts),
        "num_groups": None if source.groups is None else len(source.groups),
        "images_per_class": {
            "min": counts[fewest],
            "median": median(counts.values()),
            "max": max(counts.values()),
            "smallest_class": source.class_names[fewest],
        },
    }


def as_data(checkup: Checkup) -> dict[str, Any]:
    """Returns what a set's images tell, as plain data for JSON."""
    return {
        "digest": checkup.digest,
        "short_side": None
        if checkup.sizes is None
        else dict(zip(("min", "median", "max"), checkup.sizes, strict=True)),
        "modes": checkup.modes,
        "megabytes": checkup.megabytes,
        "num_unreadable": checkup.num_unreadable,
        "unreadable": [str(problem) for problem in checkup.unreadable],
        "num_twice": checkup.num_twice,
        "contradictions": list(checkup.contradictions),
    }


def same_words(words: Sequence[str]) -> dict[str, list[int]]:
    """Returns the words that name several classes, with the labels of these."""
    labels: dict[str, list[int]] = {}
    for label, word in enumerate(words):
        labels.setdefault(word.strip().lower(), []).append(label)
    return {word: found for word, found in labels.items() if len(found) > 1}
