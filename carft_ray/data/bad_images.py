"""Sets without the images that cannot be decoded: ``on_bad_image: skip``."""

import logging
from pathlib import Path

from carft_ray.data.listing import StoredSource
from carft_ray.data.records import NUM_NAMED, OnProgress, records
from carft_ray.errors import DataError, Problem

_log = logging.getLogger(__name__)
_warned: set[tuple[str, ...]] = set()  # of this process: images left out; commands open a set several times


def without_bad_images(
    source: StoredSource, cache_dir: Path, on_progress: OnProgress = lambda done, total: None
) -> StoredSource:
    """Returns a set without the images that cannot be decoded. The log states how many, once per process.

    Args:
        source: The set.
        cache_dir: Folder of the cache; made when missing.
        on_progress: As ``records``.

    Raises:
        DataError: No image is left.
        StorageError: The cache cannot be written.
    """
    bad = records(source, cache_dir, on_progress=on_progress).problems
    if not bad:
        return source
    left = source.without(list(bad))
    if left.skipped not in _warned:
        _warned.add(left.skipped)
        few = "; ".join(str(problem).splitlines()[0] for problem in list(bad.values())[:NUM_NAMED])
        text = "%s: %d of %d images cannot be decoded and are left out (on_bad_image: skip): %s"
        text += (
            "; carft-ray doctor RECIPE --json lists all in training and validation sets" if len(bad) > NUM_NAMED else ""
        )
        _log.warning(text, source.name, len(bad), len(source), few)
    if not len(left):
        rule = "there must be at least one image that can be decoded"
        raise DataError(Problem(source.name, rule, f"none of {len(bad)}, such as {next(iter(bad.values()))}"))
    return left
