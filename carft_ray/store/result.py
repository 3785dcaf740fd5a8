"""``result.json`` of an attempt: written last, with size and hash of each file that belongs to it."""

import contextlib
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carft_ray import files, untrusted
from carft_ray.errors import StorageError
from carft_ray.layout import OF_RESULT, RESULT

FORMAT_VERSION = 1


def write_result(place: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the result of an attempt whose other files are there; returns all that is written.

    Args:
        place: Folder of the attempt.
        content: ``objective``, ``metrics``, ``rows`` that were reported, and whatever else is known.

    Raises:
        StorageError: It cannot be written.
    """
    kept = {
        name: {"bytes": (place / name).stat().st_size, "sha256": sha256(place / name)}
        for name in OF_RESULT
        if files.exists(place / name)
    }
    written = {"format_version": FORMAT_VERSION, **content, "files": kept}
    files.write_json(place / RESULT, written)
    return written


def read_result(place: Path) -> tuple[dict[str, Any], str] | None:
    """Returns what ``write_result`` has written, and the SHA-256 of the file; None where it is not there or not valid.

    It is valid with a known version, a finite objective, and steps in all its rows. Of its files, those that a study
    does not keep may be gone.
    """
    path = place / RESULT
    if not files.exists(path):
        return None
    data = files.retried(path, lambda: untrusted.read_regular(path, files.MOST_JSON_BYTES, StorageError))
    content: Any = None
    with contextlib.suppress(ValueError):
        content = untrusted.parse_json(data)
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        return None
    objective, rows = content.get("objective"), content.get("rows", [])
    valid = isinstance(objective, int | float) and math.isfinite(objective) and isinstance(content.get("metrics"), dict)
    valid &= isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    valid = valid and all(isinstance(row.get("step"), int | float) for row in rows)
    return (content, hashlib.sha256(data).hexdigest()) if valid else None


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file.

    Raises:
        StorageError: It cannot be read.
    """
    with files.writing(path), untrusted.open_regular(path, StorageError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it is a buffered file
