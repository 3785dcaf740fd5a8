"""What can be said of the images of a set before anything is trained on them, from its records.

Of a test set these are counts and a hash.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from carft_ray.data.content import set_digest
from carft_ray.data.listing import StoredSource
from carft_ray.data.records import Records
from carft_ray.data.source import Source
from carft_ray.errors import Problem

NUM_EXAMPLES = 5  # of images that are named
IMBALANCE = 10  # images of the largest class over those of the smallest from which on it is told


@dataclass(frozen=True)
class Checkup:
    """What was found in a set.

    Attributes:
        num_images: N.
        digest: Hash of ids, labels and contents; None when a file cannot be read.
        sizes: Smallest, median and largest short side in pixels; None for a test set.
        modes: How many images have which mode of Pillow (RGB, L, CMYK ...); empty for a test set.
        megabytes: Of all contents.
        unreadable: The images that cannot be read or decoded; of a test set only those that cannot be read.
        num_twice: Images with the very content of an earlier one of the set.
        contradictions: Of these, such as have another label than the earlier one.
    """

    num_images: int
    digest: str | None
    sizes: tuple[int, float, int] | None
    modes: dict[str, int]
    megabytes: float
    unreadable: tuple[Problem, ...]
    num_twice: int
    contradictions: tuple[str, ...]


def check_up(source: StoredSource, found: Records) -> Checkup:
    """Returns what can be said of a set.

    Args:
        source: The set.
        found: Its records.
    """
    problems = tuple(found.problems.values())
    is_read = not (found.num_bytes < 0).any()
    sides = np.minimum(found.heights, found.widths)[found.heights > 0]
    modes = Counter(mode.decode() for mode in found.modes.tolist() if mode)
    twice, contradictions = _repeated(source, found)
    return Checkup(
        num_images=len(source),
        digest=set_digest(source, found.hashes()) if is_read else None,
        sizes=(int(sides.min()), float(np.median(sides)), int(sides.max())) if len(sides) else None,
        modes=dict(modes.most_common()),
        megabytes=round(int(found.num_bytes.clip(0).sum()) / 1e6, 3),
        unreadable=problems,
        num_twice=twice,
        contradictions=tuple(contradictions[:NUM_EXAMPLES]),
    )


def _repeated(source: StoredSource, found: Records) -> tuple[int, list[str]]:
    """Returns how many images repeat an earlier one, and those that contradict its label."""
    first: dict[bytes, int] = {}
    twice, contradictions = 0, []
    for index in np.flatnonzero(found.num_bytes >= 0).tolist():
        earlier = first.setdefault(found.digests[index].tobytes(), index)
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
        "num_unreadable": len(checkup.unreadable),
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
