"""Notes of reads of the test sets in the folder of the cache: what other studies have read of these very images.

The ledger belongs to one study, so a new study of the same images begins with an empty one. Each read is therefore
noted once more beside the cache, with a digest of every set: ``test_reads/<name>.json``, a file per read, written whole
under a name of its own, so that any number of processes may write at once. Notes are told and refuse nothing; where one
cannot be written or read, a line says so. Not known here are reads with another cache, or of a set of which one image
was added or left out. Of a corrupted set the images without corruptions count.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carft_ray import files
from carft_ray.data.cache import cache_dir, listed, made_folder
from carft_ray.data.copies.find import digests_of_tests
from carft_ray.errors import CarftError
from carft_ray.recipe.schema.recipe import Recipe
from carft_ray.study.ledger import Entry
from carft_ray.untrusted import is_name, read_text, visible
from carft_ray.words import times

FOLDER = "test_reads"
NAME = "note"  # in the details of a read's line in the ledger: that of its file
_MOST_BYTES, _MOST_SHOWN = 2**20, 3


# a read by another study: ``study`` (its folder, when it read), ``time`` (ISO 8601), ``user``, and ``sets``: those of
# this study that have the very images which were read there
OtherRead = dict[str, Any]


def note(study_dir: Path, recipe: Recipe, entries: Sequence[Entry]) -> tuple[list[OtherRead], list[str]]:
    """Notes the last read of a ledger and returns those that other studies have noted of the same images.

    Never raises for what is wrong with the notes.

    Args:
        study_dir: The study directory.
        recipe: Its recipe, whose test sets can be opened.
        entries: All lines of its ledger, that of this read last.

    Returns:
        The reads, oldest first; what could not be noted or read, a line each.
    """
    cache, entry = cache_dir(recipe), entries[-1]
    own, found, problems = {str(line.details.get(NAME)) for line in entries}, list[OtherRead](), list[str]()
    try:
        digests = digests_of_tests(recipe, cache)
    except (CarftError, OSError) as error:
        return [], [f"it is unknown whether other studies have read these images: {error}"]
    name, content = str(entry.details.get(NAME)), {"study": str(study_dir), "time": entry.time, "user": entry.user}
    try:
        folder = made_folder(cache, FOLDER)
        if is_name(name):
            files.write_json(folder / f"{name}.json", {**content, "sets": digests})
    except (CarftError, OSError) as error:
        problems.append(f"this read is not noted for other studies of these images: {error}")
    for path in (cache / FOLDER / name for name in listed(cache, FOLDER)):
        if path.suffix != ".json" or path.stem in own:
            continue
        try:
            other = json.loads(read_text(path, _MOST_BYTES))
            shared = [name for name, digest in digests.items() if digest in other["sets"].values()]
            if shared:
                found.append({**{key: visible(str(other[key])) for key in ("study", "time", "user")}, "sets": shared})
        except (CarftError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"a note of a read of test sets cannot be read and is ignored: {path} ({error!r})")
    return sorted(found, key=lambda one: one["time"]), problems


def lines(reads: Sequence[OtherRead]) -> list[str]:
    """Returns them as a line of text; none where there are none."""
    if not reads:
        return []
    shown = [f"{one['study']} ({one['time']}: {', '.join(one['sets'])})" for one in reads[-_MOST_SHOWN:]]
    more = f", and {len(reads) - len(shown)} more" if len(reads) > len(shown) else ""
    return [f"Other studies have also read these images {times(len(reads))}: {', '.join(shown)}{more}."]
