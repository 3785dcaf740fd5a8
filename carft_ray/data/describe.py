"""What can be said of the images of a set before anything is trained on them, from its records.

Of a test set these are counts and a hash.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from carft_ray.data.listing import StoredSource
from carft_ray.data.records import Records
from carft_ray.data.source import Source, set_digest

NUM_EXAMPLES = 5  # of images that are named
IMBALANCE = 10  # images of the largest class over those of the smallest from which on it is reported


def image_facts(source: StoredSource, found: Records) -> dict[str, Any]:
    """Returns what is found in a set's images, as plain data for JSON.

    Args:
        source: The set.
        found: Its records.

    Returns:
        ``digest``: hash of ids, labels and contents; None when a file cannot be read.
        ``short_side``: ``min``, ``median`` and ``max`` in pixels; None for a test set.
        ``modes``: how many images have which mode of Pillow (RGB, L, CMYK ...); empty for a test set.
        ``megabytes``: of all files.
        ``num_unreadable``, ``unreadable``: images that cannot be read or decoded; of a test set that cannot be read.
        ``num_twice``: images with the very content of an earlier one of the set.
        ``contradictions``: the first of these that have another label than the earlier one.
    """
    is_read = not (found.num_bytes < 0).any()
    sides = np.minimum(found.heights, found.widths)[found.heights > 0]
    modes = Counter(mode.decode() for mode in found.modes.tolist() if mode)
    num_twice, contradictions = _repeated(source, found)
    return {
        "digest": set_digest(source, found.hashes()) if is_read else None,
        "short_side": {"min": int(sides.min()), "median": float(np.median(sides)), "max": int(sides.max())}
        if len(sides)
        else None,
        "modes": dict(modes.most_common()),
        "megabytes": round(int(found.num_bytes.clip(0).sum()) / 1e6, 3),
        "num_unreadable": len(found.problems),
        "unreadable": [str(problem) for problem in found.problems.values()],
        "num_twice": num_twice,
        "contradictions": contradictions[:NUM_EXAMPLES],
    }


def _repeated(source: StoredSource, found: Records) -> tuple[int, list[str]]:
    """Returns how many images repeat an earlier one, and those that contradict its label."""
    read = np.flatnonzero(found.num_bytes >= 0)
    _, first, group = np.unique(found.digests[read], axis=0, return_index=True, return_inverse=True)
    earlier = read[first[group]]
    pairs = np.stack([earlier, read], axis=1)[earlier != read]
    wrong = pairs[source.labels[pairs[:, 0]] != source.labels[pairs[:, 1]]].tolist()
    return len(pairs), [f"{source.place(one)} and {source.place(other)}" for one, other in wrong]


def class_counts(source: Source) -> dict[str, Any]:
    """Returns counts of a set's labels, as plain data for JSON; no image is read."""
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


def same_words(words: Sequence[str]) -> dict[str, list[int]]:
    """Returns the words that name several classes, with the labels of these."""
    labels: dict[str, list[int]] = {}
    for label, word in enumerate(words):
        labels.setdefault(word.strip().lower(), []).append(label)
    return {word: found for word, found in labels.items() if len(found) > 1}
