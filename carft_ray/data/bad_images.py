"""Images that cannot be decoded, for sets with ``on_bad_image: skip``: found once, kept in the cache, counted."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from carft_ray.data.cache import key_of, lock
from carft_ray.data.content import THREADS
from carft_ray.data.images import DECODERS
from carft_ray.data.listing import StoredSource, without_labels
from carft_ray.errors import DataError, Problem
from carft_ray.files import read_json, write_json

FORMAT_VERSION = 1  # rises when other images count as bad
NUM_NAMED = 3  # images that a warning names

_log = logging.getLogger(__name__)
_told: set[tuple[str, int]] = set()  # of this process: what was found in which set; commands open a set several times


def without_bad_images(source: StoredSource, cache_dir: Path) -> StoredSource:
    """Returns a set without the images that cannot be decoded. The log tells how many, once per process.

    Every image is decoded once; which ones are bad, and why, stays in the cache until the set changes.

    Args:
        source: The set.
        cache_dir: Folder of the decoded sets; made when missing.

    Raises:
        DataError: No image is left.
        StorageError: The cache cannot be written.
    """
    files = without_labels(source)
    path = cache_dir / f"bad-{key_of([FORMAT_VERSION, DECODERS, files.fingerprint, files.home])}.json"
    with lock(cache_dir / f"{path.name}.lock"):
        if not path.exists():
            write_json(path, _bad_images(source))
        bad: dict[str, str] = read_json(path)
    if not bad:
        return source
    left = source.without([int(index) for index in bad])
    if (str(path), len(bad)) not in _told:
        _told.add((str(path), len(bad)))
        few = "; ".join(cause.splitlines()[0] for cause in list(bad.values())[:NUM_NAMED])
        more = f"; and {len(bad) - NUM_NAMED} more, all named in {path}" if len(bad) > NUM_NAMED else ""
        told = "%s: %d of %d images are left out, which cannot be decoded (on_bad_image: skip): %s%s"
        _log.warning(told, source.name, len(bad), len(source), few, more)
    if not len(left):
        rule = "there must be at least one image that can be decoded"
        raise DataError(Problem(source.name, rule, f"none of {len(bad)}, such as {next(iter(bad.values()))}"))
    return left


def _bad_images(source: StoredSource) -> dict[str, str]:
    """Returns the cause for every index of an image that cannot be decoded."""

    def cause(index: int) -> str | None:
        try:
            source.pixels(index)
        except DataError as error:
            return str(error.problems[0])
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = enumerate(pool.map(cause, range(len(source))))
        return {str(index): text for index, text in found if text is not None}
